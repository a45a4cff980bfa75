"""Bytes on their way to the disk: reserved space, whole writes, a bounded page cache, errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..text import size

__all__ = ["Target", "disk_errors", "reserve", "write_at"]

WINDOW = 16 << 20  # bytes that may wait for the disk
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Give errors of the disk a path, and of a full one the bytes that are needed and free."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        if error.errno is None or (error.filename is not None and not full):
            raise
        text = error.strerror or os.strerror(error.errno)
        if full:
            free = shutil.disk_usage(path.parent).free
            text = f"{text}: {size(needed)} are needed, {size(free)} are free"
        raise type(error)(error.errno, text, os.fspath(path)) from error


def reserve(fd: int, size: int) -> None:
    """Take `size` bytes of disk now, so that a full disk is found before anything is written."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as error:
        if error.errno in _FULL:
            raise
    os.ftruncate(fd, size)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data`: one call moves at most 2 GiB, and may move less."""
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


class Target:
    """A file that is written in any order, and sent to the disk while it is written.

    [Note: pages]  A write fills the page cache and an fsync empties it. A large file would take the
    machine's memory from training, and all disk time would come at the end. So every full window is
    sent to the disk (POSIX_FADV_DONTNEED starts writing dirty pages), and its pages are dropped
    when the next window is full.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY)
        # Where the window begins and ends in the file, and how many bytes of it are written.
        self._filled: list[int] = []
        self._sent: list[int] = []

    def write(self, data: memoryview, offset: int) -> None:
        write_at(self._fd, data, offset)
        begin, end, n = self._filled or [offset, offset, 0]
        self._filled = [min(begin, offset), max(end, offset + len(data)), n + len(data)]
        if self._filled[2] >= WINDOW:
            self._let_go()

    def _let_go(self) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for begin, end, _ in filter(None, (self._sent, self._filled)):
                os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self._sent, self._filled = self._filled, []

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
