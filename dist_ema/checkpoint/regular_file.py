"""Reads of regular files: nothing that blocks, nothing that ends early without an error."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

__all__ = ["OpenFiles", "beginning", "open_regular", "read_errors", "read_exactly", "read_into"]


_Opened = TypeVar("_Opened", bound="OpenFiles")


class OpenFiles:
    """Descriptors of a folder's files, each opened when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}

    def fd(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY)
        return self._open[name]

    def close(self) -> None:
        """Close them all. The next `fd` opens its file again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self: _Opened) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, unbuffered.

    Raises:
        ValueError: It is no regular file. A pipe would block, and a device would never end.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path} is no file, so nothing can be read from it.")
    return open(path, "rb", buffering=0, opener=lambda *_: fd)


@contextmanager
def read_errors(path: str | Path) -> Iterator[None]:
    """Give errors on reading the path of the file, which reads by a descriptor lack."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def beginning(path: Path, n: int) -> bytes:
    """The first n bytes of a file, or all of a shorter one."""
    with open_regular(path) as file:
        return read_exactly(file, n)


def read_into(fd: int, path: Path, into: memoryview, offset: int) -> None:
    """Fill `into` from an open file. Raises ValueError where the file ends before."""
    # NOTE: one call moves at most 2 GiB.
    while into:
        with read_errors(path):
            count = os.preadv(fd, [into], offset)
        if not count:
            raise ValueError(f"{path} became shorter while it was read.")
        into, offset = into[count:], offset + count


def read_exactly(file: BinaryIO, n: int) -> bytes:
    """Read n bytes, or up to the end: one unbuffered read may return fewer than were asked for."""
    parts = []
    with read_errors(file.name):
        # A read takes the memory that was asked for, however short the file is.
        n = min(n, os.fstat(file.fileno()).st_size)
        while n and (part := file.read(n)):
            parts.append(part)
            n -= len(part)
    return b"".join(parts)
