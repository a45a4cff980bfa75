"""What a file or folder says that it holds: headers and ema.json, and where the two contradict each other. No torch.

Files come from anywhere, so nothing in them is trusted: what cannot be read is a ValueError with one sentence, what can be
read but is wrong goes into `Report.problems`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..averaging.clock import Clock
from ..checkpoint import manifest, safetensors
from ..foreign import torch_dcp
from ..schedules import from_dict
from . import sources

__all__ = ["AverageListing", "ModelReport", "Total", "native", "of_source", "report_on", "sums"]

# What ema.json holds beside its format and kind, each with the value that stands for its absence.
_PARTS: dict[str, Any] = {
    "clock": {}, "schedules": [], "averaged": [], "averages": {}, "own_buffers": [], "aliases": {}, "dtypes": {}, "files": {},
    "versions": {}, "extra": {},
}  # fmt: skip


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
    """What lies at a path. kind: 'ema' or 'export' (written by dist_ema), 'model' (another folder), 'file', 'other'."""

    path: str
    kind: str
    trees: list[
        AverageListing
    ]  # the first average, then the others in the order of their schedules
    meta: dict[str, Any]  # ema.json, every one of `_PARTS` present and of its type
    problems: list[str] = field(default_factory=list)
    others: dict[str, str] = field(
        default_factory=dict
    )  # what lies there besides, and why it is not among the weights

    @property
    def weights(self) -> dict[str, tuple[str, safetensors.Entry]]:
        """Of the first average: name -> (file, entry), by name."""
        return self.trees[0].weights

    @property
    def files(self) -> dict[str, safetensors.SafetensorsFile]:
        """Of all averages."""
        return {name: file for tree in self.trees for name, file in tree.files.items() if name}

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
        known = {
            name: others
            for name, others in self.meta["aliases"].items()
            if isinstance(others, list)
        }
        return {str(alias): name for name, others in known.items() for alias in others}

    def own_buffers(self, label: str) -> list[Any]:
        """Of the average with that label."""
        said = self.meta["averages"].get(label) if label else self.meta
        own = said.get("own_buffers") if isinstance(said, dict) else None
        return own if isinstance(own, list) else []

    def sums(self, file: str) -> dict[str, str]:
        """The check sums that ema.json has for a file, by kind."""
        return sums(self.meta, file)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        said = {
            key: self.meta.get(key)
            for key in ("format", "attach", "rounding", *_PARTS)
            if key != "dtypes"
        }
        averages = {
            tree.label: {
                "own_buffers": self.own_buffers(tree.label),
                "total": vars(tree.total),
                "weights": _plain(tree),
            }
            for tree in self.trees[1:]
        }
        return (
            {"path": self.path, "kind": self.kind, "holds": self.meta.get("weights")}
            | said
            | {
                "averages": averages,
                "files": {
                    name: {"size": file.size} | self.sums(name) for name, file in self.files.items()
                },
                "total": vars(self.trees[0].total),
                "dtypes": {dtype: vars(total) for dtype, total in self.totals.items()},
                "dtypes_of_the_model": self.meta["dtypes"],
                "weights": _plain(self.trees[0]),
                "others": self.others,
                "problems": self.problems,
            }
        )


def sums(meta: Mapping[str, Any], file: str) -> dict[str, str]:
    """The check sums in ema.json, by kind."""
    said = meta["files"].get(file)
    return {
        key: str(said[key])
        for key in ("crc32", "sha256")
        if isinstance(said, dict) and said.get(key)
    }


def _plain(tree: AverageListing) -> dict[str, Any]:
    return {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": file}
        for name, (file, entry) in tree.weights.items()
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
    tree = AverageListing("", {"": safetensors.SafetensorsFile(b"", entries)})
    aliases = manifest.group_aliases(model.aliases)
    others = dict(model.others) if isinstance(model, torch_dcp.Folder) else {}
    return ModelReport(
        str(model.path),
        "other",
        [tree],
        _PARTS | (model.meta or {}) | {"aliases": aliases},
        [],
        others,
    )


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
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from None
    aliases = manifest.group_aliases(
        {alias: name for alias, name in file.metadata.items() if name in file.entries}
    )
    return ModelReport(
        str(path), "file", [AverageListing("", {path.name: file})], _PARTS | {"aliases": aliases}
    )


def _of_folder(path: Path) -> ModelReport:
    meta = manifest.read_meta(path) if (path / manifest.META).exists() else None
    first = AverageListing("", safetensors.read_model(path))
    if meta is None:
        cut = (
            ["it is missing, though the folder holds further averages"]
            if (path / "averages").exists()
            else []
        )
        return ModelReport(str(path), "model", [first], _PARTS, cut)
    sound = {
        key: value for key, value in meta.items() if isinstance(value, type(_PARTS.get(key, value)))
    }
    others = [_of_average(path, label) for label in sources.labels(meta)[1:]]
    report = ModelReport(str(path), str(meta.get("kind")), [first, *others], _PARTS | sound)
    report.problems.extend(
        f"{key} is {brief(meta.get(key))}" for key in _PARTS if key not in sound and key in _NEEDED
    )
    report.problems.extend(_problems(report))
    return report


_NEEDED = set(_PARTS) - {
    "averages",
    "dtypes",
}  # which the first versions did not write, or not always


def _of_average(path: Path, label: str) -> AverageListing:
    found = safetensors.read_model(path / "averages" / label)
    return AverageListing(label, {f"averages/{label}/{name}": file for name, file in found.items()})


def _problems(report: ModelReport) -> Iterator[str]:
    """Where ema.json and the files contradict each other, and what `EMA.load` would refuse."""
    meta, weights = report.meta, report.weights
    if report.kind not in ("ema", "export"):
        yield f"kind is {brief(report.kind)}"
    yield from _of_files(meta["files"], report.files)
    for key in ("averaged", "own_buffers", "aliases", "dtypes"):
        yield from _lost(key, meta[key], weights)
    for tree in report.trees[1:]:
        yield from _lost(
            f"averages/{tree.label} own_buffers", report.own_buffers(tree.label), tree.weights
        )
        yield from _lost(
            f"averages/{tree.label}",
            tree.weights,
            weights if meta.get("weights") == "all" else tree.weights,
        )
    yield from (
        f"the alias {alias} is a weight too" for alias in report.aliases if alias in weights
    )
    yield from _unsound(meta)


def _of_files(
    told: Mapping[str, Any], files: Mapping[str, safetensors.SafetensorsFile]
) -> Iterator[str]:
    for name, said in told.items():
        if name not in files:
            yield f"{name} is listed, but is no part of the model"
        elif not isinstance(said, dict) or said.get("size") != files[name].size:
            yield f"{name} holds {files[name].size} bytes, listed is {brief(said)}"
    yield from (f"{name} is not listed" for name in files if name not in told)


def _lost(what: str, names: Any, weights: Mapping[str, Any]) -> Iterator[str]:
    lost = [str(name) for name in names if not isinstance(name, str) or name not in weights]
    if lost:
        yield f"{what} names {', '.join(lost[:3])}, which the files do not hold"


def _unsound(meta: dict[str, Any]) -> Iterator[str]:
    """A clock or a schedule that cannot go on. What was exported need not have any."""
    saved = meta.get("kind") != "export"
    if meta["clock"] or saved:
        try:
            Clock().set(meta["clock"])
        except ValueError as error:
            yield str(error).rstrip(".")
        if not isinstance(meta["clock"].get("accepted"), int):
            yield f"the clock's accepted is {brief(meta['clock'].get('accepted'))}"
    if saved and not meta["schedules"]:
        yield "it names no schedule"
    elif saved and len(meta["schedules"]) != 1 + len(meta["averages"]):
        yield f"it names {len(meta['schedules'])} schedules for {1 + len(meta['averages'])} averages"
    for spec in meta["schedules"]:
        try:
            from_dict(spec)
        except (TypeError, ValueError) as error:
            yield f"a schedule cannot be rebuilt from {brief(spec)}: {str(error).rstrip('.')}"
