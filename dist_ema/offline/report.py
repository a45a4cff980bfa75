"""`report_on`: what headers and ema.json say of a file or folder, and contradictions.

Files come from anywhere, so nothing in them is trusted. What cannot be read is a ValueError with
one sentence; what can be read but is wrong goes into `ModelReport.problems`. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint import manifest, safetensors
from ..checkpoint.manifest import Manifest
from ..foreign import torch_dcp
from ..text import sentence
from . import sources

__all__ = ["AverageListing", "ModelReport", "Total", "count_dtypes", "report_on"]


@dataclass(frozen=True)
class Total:
    """How many weights, elements in them, and bytes."""

    weights: int
    parameters: int
    bytes: int

    @classmethod
    def of(cls, entries: Iterable[safetensors.Entry]) -> Total:
        sizes = [(prod(entry.shape), entry.nbytes) for entry in entries]
        return cls(len(sizes), sum(n for n, _ in sizes), sum(nbytes for _, nbytes in sizes))


@dataclass(frozen=True)
class AverageListing:
    """The files of one average. label: '' of the first, which lies in the folder itself.

    files: by their names in ema.json, so averages/LABEL/... of a further one; '' where there is no
        file to name.
    """

    label: str
    files: dict[str, safetensors.SafetensorsFile]

    @property
    def weights(self) -> dict[str, tuple[str, safetensors.Entry]]:
        """name -> (file, entry), by name."""
        places = {
            name: (file, entry)
            for file, content in self.files.items()
            for name, entry in content.entries.items()
        }
        return dict(sorted(places.items()))

    @property
    def total(self) -> Total:
        """The total of all dtypes together."""
        return Total.of(entry for _, entry in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        weights = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": file}
            for name, (file, entry) in self.weights.items()
        }
        return {"total": vars(self.total), "weights": weights}


@dataclass(frozen=True)
class ModelReport:
    """The contents of a file or folder, by its headers and ema.json.

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
        """The weights of the first average: name -> (file, entry), by name."""
        return self.averages[0].weights

    @property
    def files(self) -> dict[str, safetensors.SafetensorsFile]:
        """The files of all averages."""
        return {name: file for tree in self.averages for name, file in tree.files.items() if name}

    @property
    def totals(self) -> dict[str, Total]:
        """The totals of the first average by dtype, the most bytes first."""
        entries = [entry for _, entry in self.weights.values()]
        totals = {
            dtype: Total.of(entry for entry in entries if entry.dtype == dtype)
            for dtype in {entry.dtype for entry in entries}
        }
        return dict(sorted(totals.items(), key=lambda item: (-item[1].bytes, item[0])))

    @property
    def aliases(self) -> dict[str, str]:
        """Further name -> the name that the files have for the same weight."""
        return {alias: name for name, others in self.manifest.aliases.items() for alias in others}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values, sums = self.manifest.to_json(), self.manifest.sums_of
        facts = {
            "format": values["format"] if self.has_manifest else None,
            "kind": self.kind,
            "holds": self.manifest.weights if self.has_manifest else None,
            "averages": {
                further.label: values["averages"].get(further.label, {}) | further.to_json()
                for further in self.averages[1:]
            },
            "files": {name: {"size": file.size} | sums(name) for name, file in self.files.items()},
            "dtypes": {dtype: vars(total) for dtype, total in self.totals.items()},
            "dtypes_of_the_model": self.manifest.dtypes,
            "others": self.others,
            "problems": self.problems,
        }
        return {"path": self.path} | values | facts | self.averages[0].to_json()


def count_dtypes(entries: Mapping[str, safetensors.Entry]) -> dict[str, int]:
    """dtype -> how many weights have it, the most first."""
    return dict(Counter(sorted(entry.dtype for entry in entries.values())).most_common())


def report_on(path: str | Path) -> ModelReport:
    """Look at the headers and ema.json of whatever `sources.open_model` opens. Reads no weight.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no model, or its weights cannot be told.
    """
    path = sources.find(path)
    if (path / torch_dcp.META).exists():
        with sources.open_model(path) as model:
            return _of_source(model)
    try:
        if path.is_dir():
            return _of_folder(path)
        file = safetensors.read_header(path)
    except OSError as error:
        raise ValueError(sentence(error)) from None
    # Other writers put texts of their own there, which name no weight.
    aliases = {alias: name for alias, name in file.metadata.items() if name in file.entries}
    return ModelReport(
        str(path),
        "file",
        [AverageListing("", {path.name: file})],
        Manifest(aliases=manifest.group_aliases(aliases)),
    )


def _of_source(model: sources.Source) -> ModelReport:
    # Their places in files mean nothing in another form, so each begins at 0.
    entries = {
        name: safetensors.Entry(entry.dtype, entry.shape, 0, entry.nbytes)
        for name, entry in model.entries.items()
    }
    return ModelReport(
        str(model.path),
        "other",
        [AverageListing("", {"": safetensors.SafetensorsFile(b"", entries)})],
        Manifest(aliases=manifest.group_aliases(model.aliases)),
        others=dict(model.others),
    )


def _of_folder(path: Path) -> ModelReport:
    saved = manifest.read(path)
    files = manifest.read_files(path, saved)
    if saved is None:
        problems = []
        if (path / "averages").exists():
            problems.append("ema.json is missing, though the folder holds further averages")
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
        for label in saved.labels
    ]
    return ModelReport(str(path), saved.kind, listings, saved, saved.problems(files))
