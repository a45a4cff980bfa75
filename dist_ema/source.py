"""Weights in files, read a window at a time. No torch.

    with source.open_model(path) as model:
        for name, entry in model.entries.items():
            for raw in model.windows(name): ...

Whatever the form on disk, it is a table of names and a way to read bytes of each: everything behind this door knows no
more. A window is 16 MB, whatever the size of the weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from . import commit, distcp, format
from .elements import Bytes

__all__ = ["WINDOW", "Safetensors", "Source", "open_model", "windows"]

WINDOW = 16 << 20  # bytes


class Source(Protocol):
    """A model in files. Weights are dense and row-major, whatever lies on disk."""

    @property
    def path(self) -> Path: ...

    @property
    def entries(self) -> Mapping[str, format.Entry]:
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def windows(model: Source, name: str, window: int = WINDOW) -> Iterator[Bytes]:
    """The bytes of a weight in order, `window` at a time (whole elements). *Cost*: one window."""
    nbytes = model.entries[name].nbytes
    for begin in range(0, nbytes, window):
        yield model.read(name, begin, min(begin + window, nbytes))


def open_model(path: str | Path) -> Source:
    """A saved average, an export, a Hugging Face folder, one of torch.distributed.checkpoint, or one .safetensors file.

    Raises FileNotFoundError if nothing is there, ValueError if it is no model or its headers are unsound.
    """
    path = commit.follow(Path(path))
    if not path.exists():
        commit.recover(path)  # a save over it may have been cut short
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    return distcp.Folder(path) if (path / distcp.META).exists() else Safetensors(path)


class Safetensors:
    """A folder or file of safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = path if path.is_dir() else path.parent
        self.meta = format.read_meta(path) if path.is_dir() and (path / format.META).exists() else None
        files = format.read_model(path) if path.is_dir() else {path.name: format.read_header(path)}
        self.files = files
        self.entries = {name: entry for file in files.values() for name, entry in file.entries.items()}
        self._where = {name: (file, content) for file, content in files.items() for name in content.entries}
        self.aliases = self._aliases()
        self._open: dict[str, int] = {}

    def _aliases(self) -> dict[str, str]:
        listed: Any = self.meta.get("aliases", {}) if self.meta else {}
        if not isinstance(listed, dict) or not all(isinstance(others, list) for others in listed.values()):
            raise ValueError(f"{self.path / format.META}: aliases must map weights to lists of names, got {listed!r}.")
        found = {str(alias): name for name, others in listed.items() for alias in others}
        for file in self.files.values():  # a single file has them in its header
            found |= {alias: name for alias, name in file.metadata.items() if name in self.entries}
        return {alias: name for alias, name in found.items() if alias not in self.entries and name in self.entries}

    def read(self, name: str, begin: int, end: int) -> Bytes:
        file, content = self._where[name]
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_RDONLY)
        start = len(content.head) + content.entries[name].begin + begin
        data = np.empty(end - begin, np.uint8)
        view, at = data.data, 0
        while at < len(data):  # one call moves at most 2 GiB, and may move less
            count = os.preadv(self._open[file], [view[at:]], start + at)
            if count == 0:
                raise ValueError(f"{self._folder / file} became shorter while it was read.")
            at += count
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
