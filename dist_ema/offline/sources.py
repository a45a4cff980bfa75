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
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..checkpoint import atomic, crc32, manifest, regular_file, safetensors
from ..checkpoint.manifest import Manifest
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
    def manifest(self) -> Manifest | None:
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


def choose(saved: Manifest | None, which: int | str) -> str:
    """The label of an average: by its number, label, schedule's name or repr. Raises ValueError with what there is."""
    saved = saved or Manifest()
    specs = [*saved.schedules, *[None] * len(saved.labels)]
    names = [
        (str(i), label, *_names_of(spec))
        for i, (label, spec) in enumerate(zip(saved.labels, specs, strict=False))
    ]
    fits = [each[1] for each in names if str(which) in each and str(which)]
    if len(fits) != 1:
        there = ", ".join(f"{i}: {text or label or 'the only one'}" for i, label, _, text in names)
        raise ValueError(
            f"there is {'more than one' if fits else 'no'} average {which!r}; there are {there}."
        )
    return fits[0]


def _names_of(spec: Any) -> tuple[str, str]:
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


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Safetensors:
    """A folder or file of safetensors."""

    def __init__(self, path: Path, which: int | str = 0) -> None:
        self.path = path
        self._folder = path if path.is_dir() else path.parent
        self._top = self._folder
        self._saved: Manifest | None = None
        self.manifest, self.listed = self._read_manifest()
        self.label = choose(self.manifest, which)
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

    def _read_manifest(self) -> tuple[Manifest | None, dict[str, dict[str, Any]] | None]:
        """ema.json of this folder; and what the ema.json that lists the files says of them, if one does.

        Raises ValueError where that is damaged. One file, and the folder of a further average, have theirs elsewhere.
        """
        inside = self._folder.parent.name == "averages"
        top = self._folder.parent.parent if inside else self._folder
        found = manifest.read(top)
        if found is None:
            return None, None
        self._top, self._saved = top, found
        manifest.refuse_damaged(top, replace(found, is_changed=False))
        if self.path == top:
            return found, found.files
        listed = found.files_of(self._folder.name if inside else "")
        return None, listed if self.path.is_dir() or self.path.name in listed else None

    def refuse_changed(self) -> None:
        """Raise ValueError for an ema.json that was changed. What is not read may have such a one."""
        if self._saved is not None:
            manifest.refuse_damaged(self._top, self._saved)

    def _further(self) -> dict[str, safetensors.SafetensorsFile]:
        """The files under averages/LABEL. Raises ValueError where buffers of the first average would be taken for its own."""
        assert self.manifest is not None, "only ema.json knows labels"
        own = self.manifest.own_buffers_of(self.label)
        foreign = sorted(set(self.manifest.own_buffers) - set(own))
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
        """Further name -> name in the files: of ema.json, and of the header where there is one file."""
        listed = self.manifest.aliases if self.manifest else {}
        found = {alias: name for name, others in listed.items() for alias in others}
        for file in self.files.values():
            found |= file.metadata
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

    *Cost*: the windows; `finish` reads what was not asked for. Nothing is summed where there is nothing to compare.
    """

    def __init__(self, model: Source) -> None:
        self._model, self.entries = model, model.entries
        if isinstance(model, Safetensors):
            model.refuse_changed()
        listed = model.listed if isinstance(model, Safetensors) else None
        self._listed = listed or {}
        self._summed = model if isinstance(model, Safetensors) and listed is not None else None
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
        if self._summed is None:
            return
        with self._summed as model:
            for name, file in model.files.items():
                for begin, end in self._unseen(name, file):
                    self._sums[name].add(begin, model.raw(name, begin, end).data)
                found = crc32.check_sum(file.size, [self._sums[name].contribution])
                recorded = self._listed.get(name, {}).get("crc32")
                if recorded != found:
                    where = model.path / name if model.path.is_dir() else model.path
                    raise ValueError(
                        f"{where} is damaged: its CRC-32 is {found}, {manifest.META} says {recorded}."
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
