"""What a file or folder says that it holds: headers and ema.json, and where the two contradict each other. No torch.

Files come from anywhere, so nothing in them is trusted: what cannot be read is a ValueError with one sentence, what can be
read but is wrong goes into `ModelReport.problems`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import manifest, safetensors
from ..checkpoint.manifest import Manifest
from ..foreign import torch_dcp
from ..text import sentence
from . import sources

__all__ = ["AverageListing", "ModelReport", "Total", "native", "of_source", "report_on"]


@dataclass
class Total:
    """How many weights, elements in them, and bytes."""

    weights: int = 0
    parameters: int = 0
    bytes: int = 0

    def add(self, entry: safetensors.Entry) -> None:
        self.weights += 1
        self.parameters += prod(entry.shape)
        self.bytes += entry.nbytes


@dataclass(frozen=True)
class AverageListing:
    """The files of one average. label: '' of the first, which lies in the folder itself.

    files: by their names in ema.json, so averages/LABEL/... of a further one; '' where none is seen.
    """

    label: str
    files: dict[str, safetensors.SafetensorsFile]

    @property
    def weights(self) -> dict[str, tuple[str, safetensors.Entry]]:
        """name -> (file, entry), by name."""
        found = {
            name: (file, entry)
            for file, content in self.files.items()
            for name, entry in content.entries.items()
        }
        return dict(sorted(found.items()))

    @property
    def total(self) -> Total:
        """Of all dtypes together."""
        every = Total()
        for _, entry in self.weights.values():
            every.add(entry)
        return every


@dataclass(frozen=True)
class ModelReport:
    """What lies at a path.

    kind: 'ema' or 'export' (written by dist_ema), 'model' (another folder), 'file', 'other'.
    averages: the first one, then the others in the order of their schedules.
    manifest: ema.json, or what can be told without one.
    others: what lies there besides, and why it is not among the weights.
    """

    path: str
    kind: str
    averages: list[AverageListing]
    manifest: Manifest
    problems: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def has_manifest(self) -> bool:
        return self.kind not in ("model", "file", "other")

    @property
    def weights(self) -> dict[str, tuple[str, safetensors.Entry]]:
        """Of the first average: name -> (file, entry), by name."""
        return self.averages[0].weights

    @property
    def files(self) -> dict[str, safetensors.SafetensorsFile]:
        """Of all averages."""
        return {name: file for each in self.averages for name, file in each.files.items() if name}

    @property
    def totals(self) -> dict[str, Total]:
        """Of the first average by dtype, the most bytes first."""
        totals: dict[str, Total] = {}
        for _, entry in self.weights.values():
            totals.setdefault(entry.dtype, Total()).add(entry)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].bytes, item[0])))

    @property
    def aliases(self) -> dict[str, str]:
        """Further name -> the name that the files have for the same weight."""
        return {alias: name for name, others in self.manifest.aliases.items() for alias in others}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = self.manifest.to_json()
        averages = {
            each.label: {
                **values["averages"].get(each.label, {}),
                "total": vars(each.total),
                "weights": _entries_to_json(each),
            }
            for each in self.averages[1:]
        }
        sums = self.manifest.sums_of
        return (
            {"path": self.path}
            | values
            | {
                "format": values["format"] if self.has_manifest else None,
                "kind": self.kind,
                "holds": self.manifest.weights if self.has_manifest else None,
                "averages": averages,
                "files": {
                    name: {"size": file.size} | sums(name) for name, file in self.files.items()
                },
                "total": vars(self.averages[0].total),
                "dtypes": {dtype: vars(total) for dtype, total in self.totals.items()},
                "dtypes_of_the_model": self.manifest.dtypes,
                "weights": _entries_to_json(self.averages[0]),
                "others": self.others,
                "problems": self.problems,
            }
        )


def _entries_to_json(average: AverageListing) -> dict[str, Any]:
    return {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": file}
        for name, (file, entry) in average.weights.items()
    }


def native(path: str | Path) -> bool:
    """Whether safetensors lie there: what `look` can look at without opening a weight."""
    return not (Path(path) / torch_dcp.META).exists()


def of_source(model: sources.Source) -> ModelReport:
    """A model of another form, as far as it can be told."""
    entries = {
        name: safetensors.Entry(entry.dtype, entry.shape, 0, entry.nbytes)
        for name, entry in model.entries.items()
    }
    listing = AverageListing("", {"": safetensors.SafetensorsFile(b"", entries)})
    facts = Manifest(aliases=manifest.group_aliases(model.aliases))
    others = dict(model.others) if isinstance(model, torch_dcp.Folder) else {}
    return ModelReport(str(model.path), "other", [listing], facts, [], others)


def report_on(path: str | Path) -> ModelReport:
    """Headers and ema.json of a saved average, an exported model, a Hugging Face folder or one .safetensors file.

    Raises FileNotFoundError if nothing is there, ValueError if it is no model or its weights cannot be told.
    """
    path = sources.find(path)
    try:
        if path.is_dir():
            return _of_folder(path)
        file = safetensors.read_header(path)
    except OSError as error:
        raise ValueError(sentence(error)) from None
    aliases = {alias: name for alias, name in file.metadata.items() if name in file.entries}
    listing = AverageListing("", {path.name: file})
    facts = Manifest(aliases=manifest.group_aliases(aliases))
    return ModelReport(str(path), "file", [listing], facts)


def _of_folder(path: Path) -> ModelReport:
    found = manifest.read(path)
    files = manifest.read_files(path, found)
    if found is None:
        lost = ["ema.json is missing, though the folder holds further averages"]
        problems = lost if (path / "averages").exists() else []
        return ModelReport(str(path), "model", [AverageListing("", files)], Manifest(), problems)
    listings = [
        AverageListing(
            label,
            {
                name: file
                for name, file in files.items()
                if name.rpartition("/")[0] == (f"averages/{label}" if label else "")
            },
        )
        for label in found.labels
    ]
    return ModelReport(str(path), found.kind, listings, found, found.problems(files))
