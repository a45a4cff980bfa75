"""Weights in files, read a window at a time. No torch.

    with source.open_model(path) as model:
        for name, entry in model.entries.items():
            for raw in source.windows(model, name): ...

Whatever the form on disk, it is a table of names and a way to read bytes of each: everything behind this door knows no
more. A window is 16 MB, whatever the size of the weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..checkpoint import atomic, crc32, manifest, regular_file, safetensors
from ..dtypes import Bytes
from ..foreign import torch_dcp
from ..schedules import from_dict

__all__ = [
    "WINDOW",
    "Checked",
    "Safetensors",
    "Source",
    "choose",
    "find",
    "labels",
    "open_model",
    "pickled",
    "read_at",
    "refuse_odd",
    "windows",
]

WINDOW = 16 << 20  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar")


def read_at(fd: int, path: Path, begin: int, end: int) -> Bytes:
    """Bytes [begin, end) of an open file. Raises ValueError where it is shorter. *Cost*: no more than these bytes."""
    data = np.empty(end - begin, np.uint8)
    regular_file.read_into(fd, path, data.data, begin)
    return data


class Source(Protocol):
    """A model in files. Weights are dense and row-major, whatever lies on disk."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, safetensors.Entry]:
        """name -> dtype (a name of safetensors) and shape. begin and end mean nothing."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further name -> the name in `entries` for the same weight."""

    @property
    def meta(self) -> dict[str, Any] | None:
        """ema.json, where dist_ema wrote the files."""

    def read(self, name: str, begin: int, end: int) -> Bytes:
        """Bytes [begin, end) of a weight. Raises OSError, and ValueError where the file is shorter than it was."""

    def close(self) -> None: ...

    def __enter__(self) -> Source: ...

    def __exit__(self, *_: object) -> None: ...


def windows(model: Source | Checked, name: str, window: int = WINDOW) -> Iterator[Bytes]:
    """The bytes of a weight in order, `window` at a time (whole elements). *Cost*: one window."""
    nbytes = model.entries[name].nbytes
    for begin in range(0, nbytes, window):
        yield model.read(name, begin, min(begin + window, nbytes))


def find(path: str | Path) -> Path:
    """The folder or file at `path`. Raises FileNotFoundError if nothing is there, ValueError for what cannot hold a model."""
    path = atomic.follow(Path(path))
    if not path.exists():
        atomic.recover(path)  # a save over it may have been cut short
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        _refuse_other_folder(path)
    elif not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    elif pickled(path):
        raise ValueError(
            f"{path} is a pickled checkpoint, no safetensors file. `dist-ema convert {path} OUT` makes one."
        )
    return path


def _refuse_other_folder(path: Path) -> None:
    """A folder that holds pickled checkpoints alone."""
    names = sorted(each.name for each in path.iterdir())
    others = [name for name in names if name.endswith(PICKLES)]
    if others and torch_dcp.META not in names and not any(".safetensors" in name for name in names):
        raise ValueError(
            f"{path} holds no safetensors. It does hold {', '.join(others[:3])}: `dist-ema convert` makes safetensors of it."
        )


def pickled(path: Path) -> bool:
    """By the first bytes: torch.save writes a zip, earlier a bare pickle. A safetensors header is never that long."""
    with open(path, "rb") as file:
        first = file.read(8)
    return any(first[3:]) and (
        first[:4] == b"PK\x03\x04" or (first[0] == 0x80 and 2 <= first[1] <= 5)
    )


def labels(meta: Mapping[str, Any]) -> list[str]:
    """Of the averages in ema.json, in the order of their schedules: '' is the first, which lies in the folder itself."""

    def number(label: str) -> tuple[int, str]:
        digits = label.split("-")[0]
        return (int(digits) if digits.isdecimal() else len(label)), label

    return ["", *sorted(meta.get("averages", {}), key=number)]


def choose(meta: Mapping[str, Any] | None, which: int | str) -> str:
    """The label of an average: by its number, label, schedule's name or repr. Raises ValueError with what there is."""
    known = labels(meta or {})
    names = [
        (str(i), label, *_names(spec))
        for i, (label, spec) in enumerate(zip(known, _specs(meta, known), strict=True))
    ]
    fits = [
        label for label, mine in zip(known, names, strict=True) if str(which) in mine and str(which)
    ]
    if len(fits) != 1:
        there = ", ".join(
            f"{i}: {mine[-1] or label or 'the only one'}" for i, label, *mine in names
        )
        raise ValueError(
            f"there is {'more than one' if fits else 'no'} average {which!r}; there are {there}."
        )
    return fits[0]


def _specs(meta: Mapping[str, Any] | None, known: list[str]) -> list[Any]:
    specs = list((meta or {}).get("schedules") or [])
    return (specs + [None] * len(known))[: len(known)]


def _names(spec: Any) -> tuple[str, str]:
    """`Power` and `Power(sigma_rel=0.1, gamma=None, origin='start')`"""
    try:
        return str(spec["name"]), repr(from_dict(spec))
    except (AttributeError, KeyError, TypeError, ValueError):
        return "", ""


def open_model(path: str | Path, which: int | str = 0) -> Source:
    """A saved average, an export, a Hugging Face folder, one of torch.distributed.checkpoint, or one .safetensors file.

    which: of several averages; those behind the first are completed with the weights that it alone has. Raises
    FileNotFoundError if nothing is there, ValueError if it is no model, its headers are unsound or `which` is not there.
    """
    path = find(path)
    if (path / torch_dcp.META).exists():
        choose(None, which)
        return torch_dcp.Folder(path)
    return Safetensors(path, which)


def refuse_odd(model: Source) -> None:
    """Raise ValueError where tensors of a checkpoint cannot be read, so that what is made of it would lack them."""
    unsupported = model.unsupported if isinstance(model, torch_dcp.Folder) else {}
    if unsupported:
        name, why = next(iter(unsupported.items()))
        more = f", and so would {len(unsupported) - 1} more" if len(unsupported) > 1 else ""
        raise ValueError(
            f"{model.path}: {name} would be left out ({why}){more}. `dist-ema inspect` lists them."
        )


def _own_buffers(said: Any) -> set[str]:
    own = said.get("own_buffers", []) if isinstance(said, dict) else None
    if not isinstance(own, list) or not all(isinstance(name, str) for name in own):
        raise ValueError(
            f"{manifest.META} is damaged: own_buffers must be a list of names, got {own!r}."
        )
    return set(own)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Safetensors:
    """A folder or file of safetensors."""

    def __init__(self, path: Path, which: int | str = 0) -> None:
        self.path = path
        self._folder = path if path.is_dir() else path.parent
        self.meta = (
            manifest.read_meta(path) if path.is_dir() and (path / manifest.META).exists() else None
        )
        self.label = choose(self.meta, which)
        self.files = (
            safetensors.read_model(path)
            if path.is_dir()
            else {path.name: safetensors.read_header(path)}
        )
        if self.label:
            self.files |= self._further()
        self._where = {
            name: (file, content)
            for file, content in self.files.items()
            for name in content.entries
        }
        self.entries = {name: content.entries[name] for name, (_, content) in self._where.items()}
        self.aliases = self._aliases()
        self._stamps = {file: _stamp(os.stat(self._folder / file)) for file in self.files}
        self._known = set[str]()
        self._open: dict[str, int] = {}

    def _further(self) -> dict[str, safetensors.SafetensorsFile]:
        """The files under averages/LABEL. Raises ValueError where buffers of the first average would be taken for its own."""
        assert self.meta is not None, "only ema.json knows labels"
        foreign = sorted(_own_buffers(self.meta) - _own_buffers(self.meta["averages"][self.label]))
        if foreign:
            raise ValueError(
                f"{self.path} holds {', '.join(foreign[:3])} as recalibrated for its first average only, so {self.label} is "
                f"not complete in it. Recalibrate inside ema.swap(which) before ema.save(), or use ema.export(which=...)."
            )
        inside = f"averages/{self.label}"
        return {
            f"{inside}/{name}": file
            for name, file in safetensors.read_model(self._folder / inside).items()
        }

    def _aliases(self) -> dict[str, str]:
        listed: Any = self.meta.get("aliases", {}) if self.meta else {}
        if not isinstance(listed, dict) or not all(
            isinstance(others, list) for others in listed.values()
        ):
            raise ValueError(
                f"{self.path / manifest.META}: aliases must map weights to lists of names, got {listed!r}."
            )
        found = {str(alias): name for name, others in listed.items() for alias in others}
        for file in self.files.values():  # a single file has them in its header
            found |= {alias: name for alias, name in file.metadata.items() if name in self.entries}
        return {
            alias: name
            for alias, name in found.items()
            if alias not in self.entries and name in self.entries
        }

    def read(self, name: str, begin: int, end: int) -> Bytes:
        file, start = self.place(name)
        return self.raw(file, start + begin, start + end)

    def place(self, name: str) -> tuple[str, int]:
        """The file that holds a weight, and the byte at which it begins there."""
        file, content = self._where[name]
        return file, len(content.head) + content.entries[name].begin

    def raw(self, file: str, begin: int, end: int) -> Bytes:
        """Bytes [begin, end) of a file. Raises ValueError if it is another one than the headers were read from."""
        if file not in self._open:
            self._reach(file, self.files[file].head)
        return read_at(self._open[file], self._folder / file, begin, end)

    def _reach(self, name: str, head: bytes) -> None:
        """NOTE: files are opened when they are read, so a save may have replaced them; two versions must not mix."""
        fd = self._open[name] = os.open(self._folder / name, os.O_RDONLY)
        same = _stamp(os.fstat(fd)) == self._stamps[name]
        if same and name not in self._known:  # the stamp was taken after the header was read
            same = read_at(fd, self._folder / name, 0, len(head)).tobytes() == head
            self._known.add(name)
        if not same:
            raise ValueError(f"{self._folder / name} was replaced while it was read. Try again.")

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checked:
    """Windows of a model, summed as they go by: what is made of damaged files must not be passed on as sound.

    *Cost*: the windows; `finish` reads what nobody asked for. Nothing is summed where there is nothing to compare. Raises
    ValueError for an ema.json that was changed.
    """

    def __init__(self, model: Source) -> None:
        self._model, self.entries = model, model.entries
        self._told = _listed(model.path) if isinstance(model, Safetensors) else None
        self._summed = model if isinstance(model, Safetensors) and self._told is not None else None
        files = self._summed.files if self._summed else {}
        self._sums = {name: crc32.RangeSum(file.size) for name, file in files.items()}
        self._seen: dict[
            tuple[str, str], int
        ] = {}  # (file, weight) -> how many of its bytes were summed

    def read(self, name: str, begin: int, end: int) -> Bytes:
        """As the method of that name. Windows in order count once, however often they are asked for."""
        raw = self._model.read(name, begin, end)
        if self._summed is not None:
            file, at = self._summed.place(name)
            if begin == self._seen.get((file, name), 0):
                self._sums[file].add(at + begin, raw.data)
                self._seen[file, name] = end
        return raw

    def finish(self) -> None:
        """Raise ValueError for a file that is not what ema.json says, and close the model. Once."""
        if self._summed is None or self._told is None:
            return
        with self._summed as model:
            for name, file in model.files.items():
                for begin, end in self._unseen(name, file):
                    self._sums[name].add(begin, model.raw(name, begin, end).data)
                found = crc32.check_sum(file.size, [self._sums[name].contribution])
                said = self._told.get(name)
                told = said.get("crc32") if isinstance(said, dict) else None
                if told != found:
                    where = model.path / name if model.path.is_dir() else model.path
                    raise ValueError(
                        f"{where} is damaged: its CRC-32 is {found}, {manifest.META} says {told}."
                    )

    def _unseen(self, name: str, file: safetensors.SafetensorsFile) -> Iterator[tuple[int, int]]:
        """The byte ranges of a file that nobody asked for, in windows."""
        spans = [(0, len(file.head))]
        spans += [
            (
                len(file.head) + entry.begin + self._seen.get((name, weight), 0),
                len(file.head) + entry.end,
            )
            for weight, entry in file.entries.items()
        ]
        for begin, end in spans:
            yield from ((at, min(at + WINDOW, end)) for at in range(begin, end, WINDOW))


def _listed(path: Path) -> dict[str, Any] | None:
    """What ema.json says of the files of a model; None if it says nothing. Raises ValueError if it was changed."""
    folder = path if path.is_dir() else path.parent
    inside = f"{folder.parent.name}/{folder.name}/" if folder.parent.name == "averages" else ""
    top = folder.parent.parent if inside else folder
    if not (top / manifest.META).exists():
        return None
    meta = manifest.read_meta(top)
    if manifest.changed(meta):
        raise ValueError(f"{top / manifest.META} was changed since dist_ema wrote it.")
    files = {
        name.removeprefix(inside): said
        for name, said in meta["files"].items()
        if name.startswith(inside)
    }
    return files if path.is_dir() or path.name in files else None
