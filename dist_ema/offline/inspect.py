"""What is in a file or folder: no torch, and no more memory than the headers take.

Files come from anywhere, so nothing in them is trusted: what cannot be read is a ValueError with one sentence, what can be
read but is wrong goes into `Report.problems`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from .. import commit, distcp, format
from ..clock import Clock
from ..schedule import from_spec

__all__ = ["Report", "Total", "inspect"]

# What ema.json holds beside its format and kind, each with the value that stands for its absence.
_PARTS: dict[str, Any] = {
    "clock": {}, "schedules": [], "averaged": [], "own_buffers": [], "aliases": {}, "files": {}, "versions": {}, "extra": {},
}  # fmt: skip


@dataclass
class Total:
    """How many weights, elements in them, and bytes."""

    weights: int = 0
    parameters: int = 0
    bytes: int = 0

    def add(self, entry: format.Entry) -> None:
        self.weights += 1
        self.parameters += prod(entry.shape)
        self.bytes += entry.nbytes


@dataclass(frozen=True)
class Report:
    """What an artifact holds. kind: 'ema' or 'export' (written by dist_ema), 'model' (another folder) or 'file'."""

    path: str
    kind: str
    files: dict[str, format.File]
    meta: dict[str, Any]  # ema.json, every one of `_PARTS` present and of its type
    problems: list[str]

    @property
    def weights(self) -> dict[str, tuple[str, format.Entry]]:
        """name -> (file, entry), by name."""
        found = {name: (file, entry) for file, content in self.files.items() for name, entry in content.entries.items()}
        return dict(sorted(found.items()))

    @property
    def totals(self) -> dict[str, Total]:
        """By dtype, the most bytes first."""
        totals: dict[str, Total] = {}
        for _, entry in self.weights.values():
            totals.setdefault(entry.dtype, Total()).add(entry)
        return dict(sorted(totals.items(), key=lambda item: (-item[1].bytes, item[0])))

    @property
    def total(self) -> Total:
        """Of all dtypes together."""
        every = Total()
        for _, entry in self.weights.values():
            every.add(entry)
        return every

    @property
    def aliases(self) -> dict[str, str]:
        """Further name -> the name that the files have for the same weight."""
        listed = {name: others for name, others in self.meta["aliases"].items() if isinstance(others, list)}
        return {str(alias): name for name, others in listed.items() for alias in others}

    def sums(self, file: str) -> dict[str, str]:
        """The check sums that ema.json has for a file, by kind."""
        said = self.meta["files"].get(file)
        return {key: str(said[key]) for key in ("crc32", "sha256") if isinstance(said, dict) and said.get(key)}

    def plain(self) -> dict[str, Any]:
        """Everything as JSON values."""
        weights = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": file}
            for name, (file, entry) in self.weights.items()
        }
        said = {key: self.meta.get(key) for key in ("format", "attach", "rounding", *_PARTS)}
        return (
            {"path": self.path, "kind": self.kind, "holds": self.meta.get("weights")}
            | said
            | {
                "files": {name: {"size": file.size} | self.sums(name) for name, file in self.files.items()},
                "total": vars(self.total),
                "dtypes": {dtype: vars(total) for dtype, total in self.totals.items()},
                "weights": weights,
                "problems": self.problems,
            }
        )


def inspect(path: str | Path) -> Report:
    """What is in a saved average, an exported model, a Hugging Face folder or one .safetensors file.

    Headers and ema.json are read, weights are not. Raises FileNotFoundError if nothing is there, ValueError if it is no
    artifact or its weights cannot be told.
    """
    path = commit.follow(Path(path))
    if not path.exists():
        commit.recover(path)  # a save over it may have been cut short
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return _of_folder(path) if path.is_dir() else _of_file(path)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _of_file(path: Path) -> Report:
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    file = format.read_header(path)
    aliases: dict[str, list[str]] = {}
    for alias, name in file.metadata.items():
        if isinstance(name, str) and name in file.entries:
            aliases.setdefault(name, []).append(alias)
    return Report(str(path), "file", {path.name: file}, _PARTS | {"aliases": aliases}, [])


def _of_folder(path: Path) -> Report:
    if (path / distcp.META).exists():
        with distcp.Folder(path) as folder:
            return Report(str(path), "other", {"": format.File(b"", dict(folder.entries))}, _PARTS, [])
    meta = format.read_meta(path) if (path / format.META).exists() else None
    files = _model(path)
    if meta is None:
        return Report(str(path), "model", files, _PARTS, [])
    sound = {key: value for key, value in meta.items() if isinstance(value, type(_PARTS.get(key, value)))}
    report = Report(str(path), str(meta.get("kind")), files, _PARTS | sound, [])
    report.problems.extend(f"{key} is {brief(meta.get(key))}" for key in _PARTS if key not in sound)
    report.problems.extend(_problems(report))
    return report


def _model(folder: Path) -> dict[str, format.File]:
    """The model's files. A folder without a model raises with the files that could be named instead."""
    if not any((folder / name).exists() for name in (format.INDEX, "model.safetensors")):
        others = sorted(each.name for each in folder.glob("*.safetensors"))
        more = f" It does hold {', '.join(others[:3])}: name the file." if others else ""
        raise ValueError(f"{folder} holds no model.safetensors and no {format.INDEX}.{more}")
    return format.read_model(folder)


def _problems(report: Report) -> Iterator[str]:
    """Where ema.json and the files contradict each other, and what `EMA.load` would refuse."""
    meta, weights = report.meta, report.weights
    if report.kind not in ("ema", "export"):
        yield f"kind is {brief(report.kind)}"
    for name, said in meta["files"].items():
        if name not in report.files:
            yield f"{name} is listed, but is no part of the model"
        elif not isinstance(said, dict) or said.get("size") != report.files[name].size:
            yield f"{name} holds {report.files[name].size} bytes, listed is {brief(said)}"
    yield from (f"{name} is not listed" for name in report.files if name not in meta["files"])
    for key in ("averaged", "own_buffers", "aliases"):
        lost = [str(name) for name in meta[key] if not isinstance(name, str) or name not in weights]
        if lost:
            yield f"{key} names {', '.join(lost[:3])}, which the files do not hold"
    yield from (f"the alias {alias} is a weight too" for alias in report.aliases if alias in weights)
    yield from _unsound(meta)


def _unsound(meta: dict[str, Any]) -> Iterator[str]:
    """A clock or a schedule that cannot go on."""
    try:
        Clock().set(meta["clock"])
    except ValueError as error:
        yield str(error).rstrip(".")
    if not isinstance(meta["clock"].get("accepted"), int):
        yield f"the clock's accepted is {brief(meta['clock'].get('accepted'))}"
    if not meta["schedules"]:
        yield "it names no schedule"
    for spec in meta["schedules"]:
        try:
            from_spec(spec)
        except (TypeError, ValueError) as error:
            yield f"a schedule cannot be rebuilt from {brief(spec)}: {str(error).rstrip('.')}"
