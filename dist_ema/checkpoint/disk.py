"""Files on the disk: reserve, write in windows, read exactly, sync, remove; errors with a path.

Reads are of regular files: nothing that blocks, nothing that ends early without an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..text import size

__all__ = [
    "FileWriter",
    "OpenFiles",
    "Target",
    "beginning",
    "disk_errors",
    "ensure",
    "link_or_copy",
    "open_regular",
    "read_exactly",
    "read_into",
    "remove",
    "remove_or_raise",
    "reserve",
    "sync",
    "write_at",
]

WINDOW = 16 << 20  # bytes that may wait for the disk
_TEMPORARY = re.compile(r"/\.([^/]+\.)?tmp-[0-9a-f]{32}(/|$)")  # as `atomic` names them
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(path: str | Path, needed: int = 0) -> Iterator[None]:
    """Give errors of the disk a path: calls with a descriptor know none.

    needed: Of a full disk it says too that so many bytes are needed, and how many are free.
    """
    try:
        yield
    except OSError as error:
        full = needed > 0 and error.errno in _FULL
        # Hidden names are ours: the user knows `path`.
        hidden = _TEMPORARY.search(str(error.filename)) is not None
        if error.errno is None or not (error.filename is None or hidden or full):
            raise
        text = error.strerror or os.strerror(error.errno)
        if full:
            free = shutil.disk_usage(Path(path).parent).free
            text = f"{text}: {size(needed)} are needed, {size(free)} are free"
        raise type(error)(error.errno, text, os.fspath(path)) from error


def reserve(fd: int, size: int) -> None:
    """Take `size` bytes of disk now, so that a full disk is found before anything is written."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as error:
        # Where the file system cannot reserve, a full disk is found by the write.
        if error.errno in _FULL:
            raise
    # The length, where nothing can be reserved; and of an empty file, which has reserved a byte.
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
        if self._filled[2] < WINDOW:
            return
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # The earlier window has reached the disk meanwhile, so its pages go; this one is sent.
            for begin, end, _ in filter(None, (self._sent, self._filled)):
                os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self._sent, self._filled = self._filled, []

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class FileWriter:
    """Writes runs into files, from several threads. Each file is opened once.

    Args:
        folder: The folder of the files.
        names: The names of the files, in the order of their numbers.
        disk_errors: Gives errors of the disk a path.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        disk_errors: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._folder, self._names, self._disk_errors = folder, names, disk_errors
        self._open: dict[int, Target] = {}
        self._lock = threading.Lock()

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Put a run into place."""
        with self._lock, self._disk_errors():
            self._target(file).write(data, offset)

    def _target(self, file: int) -> Target:
        if file not in self._open:
            self._open[file] = Target(self._folder / self._names[file])
        return self._open[file]

    def sync(self, every: bool) -> None:
        """Have the disk confirm what was written, and close. every: Also files not opened here."""
        with self._disk_errors():
            for file in range(len(self._names)) if every else list(self._open):
                self._target(file).sync()
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


# --- reading --------------------------------------------------------------------------------------


_Opened = TypeVar("_Opened", bound="OpenFiles")


class OpenFiles:
    """Descriptors of a folder's files, each opened when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def fd(self, name: str) -> int:
        with self._lock:
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


def beginning(path: Path, n: int) -> bytes:
    """The first n bytes of a file, or all of a shorter one."""
    with open_regular(path) as file:
        return read_exactly(file, n)


def read_into(fd: int, path: Path | str, into: memoryview, offset: int) -> None:
    """Fill `into` from an open file. Raises ValueError where the file ends before."""
    # NOTE: one call moves at most 2 GiB.
    while into:
        with disk_errors(path):
            count = os.preadv(fd, [into], offset)
        if not count:
            raise ValueError(
                f"{path} became shorter while it was read. Was it replaced? Read it again."
            )
        into, offset = into[count:], offset + count


def read_exactly(file: BinaryIO, n: int) -> bytes:
    """Read n bytes, or up to the end: one unbuffered read may return fewer than were asked for."""
    parts = []
    with disk_errors(file.name):
        # A read takes the memory that was asked for, however short the file is.
        n = min(n, os.fstat(file.fileno()).st_size)
        while n and (part := file.read(n)):
            parts.append(part)
            n -= len(part)
    return b"".join(parts)


# --- names on the disk ----------------------------------------------------------------------------


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ensure(folder: Path) -> None:
    """Make a folder and those above it, each of them on disk before anything lies in it.

    Raises:
        ValueError: A file is in the way.
    """
    if not folder.is_dir():
        ensure(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise ValueError(
                f"{folder} is a file, and a folder is needed there. Choose another path."
            ) from None
        sync(folder.parent)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """The same file under both names; a synced copy where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not os.path.islink(target):
            sync(Path(target))


def remove(path: Path) -> None:
    """Remove a file or folder. What cannot go now (NFS keeps mapped files) is left for later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_or_raise(path: Path) -> None:
    """Remove a file or folder that must not stay."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
