"""A new version of a folder or file appears whole or not at all.

Everything is written to a hidden sibling (`.NAME.tmp-ID`), synced, and renamed. Over an existing path the two are
exchanged in one system call where the file system can; elsewhere the old one steps aside (`.NAME.old-ID`), the new one
steps in, and whoever comes next finishes what was interrupted (`recover`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import uuid
from pathlib import Path

__all__ = [
    "LATEST",
    "Target",
    "ensure",
    "exchange",
    "exchanges",
    "follow",
    "named",
    "point",
    "publish",
    "recover",
    "remove",
    "remove_leftovers",
    "reserve",
    "sync",
    "temporary_sibling",
    "write_at",
]

LATEST = "latest"  # a file that names a folder beside it
WINDOW = 16 << 20  # bytes that may wait for the disk
_EXCHANGE = 2  # RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD


def temporary_sibling(path: Path, kind: str = "tmp") -> Path:
    """A hidden sibling that nobody else uses."""
    return _beside(path, kind, uuid.uuid4().hex)


def ensure(folder: Path) -> None:
    """Make a folder and those above it, each of them on disk before anything lies in it."""
    if not folder.is_dir():
        ensure(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _beside(path: Path, kind: str, token: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{token}"


def _tokens(path: Path, kind: str) -> list[str]:
    """Of the siblings of that kind. NOTE: no glob, because names may hold its characters, or end in '.tmp-1' themselves."""
    pattern = re.compile(re.escape(f".{path.name}.{kind}-") + "([0-9a-f]{32})")
    found = (
        (pattern.fullmatch(name) for name in os.listdir(path.parent))
        if path.parent.is_dir()
        else ()
    )
    return [match[1] for match in found if match]


def remove_leftovers(path: Path) -> None:
    """Remove what writers that died left beside `path`. Nobody else may be writing it."""
    for token in _tokens(path, "tmp"):
        remove(_beside(path, "tmp", token))


def recover(path: Path) -> None:
    """Finish or undo an exchange by two renames that was cut short. Readers call this too.

    `.NAME.old-ID` exists only after `.NAME.tmp-ID` was complete and synced, so finishing is always right.
    """
    for token in _tokens(path, "old"):
        old, new = _beside(path, "old", token), _beside(path, "tmp", token)
        if not path.exists():
            try:
                os.rename(new if new.exists() else old, path)
            except FileNotFoundError:  # another reader was faster
                if not path.exists():
                    raise
            sync(path.parent)
        if old.exists():
            remove(old)


def publish(new: Path, path: Path) -> None:
    """Put the synced `new` at `path`, and remove what was there."""
    sync(path.parent)
    if not path.exists():
        os.rename(new, path)
    elif exchange(new, path):
        sync(path.parent)
        remove(new)
    else:
        _rename_twice(new, path)
    sync(path.parent)


def exchanges(folder: Path) -> bool:
    """Whether `publish` over an existing path is one step in this folder. Tried out on two files that are left there."""
    two = temporary_sibling(folder / "a"), temporary_sibling(folder / "b")
    for path in two:
        path.touch()
    return exchange(*two)


def _rename_twice(new: Path, path: Path) -> None:
    old = _beside(path, "old", new.name[-32:])
    os.rename(path, old)
    sync(path.parent)
    try:
        os.rename(new, path)
    except FileNotFoundError:  # a reader that came between has finished it
        if not path.exists():
            raise
    except OSError:
        os.rename(old, path)
        raise
    sync(path.parent)
    remove(old)


def exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or an old C library
        return False
    if call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))


def point(path: Path) -> None:
    """Have the pointer beside `path` name it."""
    latest = path.parent / LATEST
    remove_leftovers(latest)
    new = temporary_sibling(latest)
    new.write_bytes(f"{path.name}\n".encode())
    sync(new)
    os.replace(new, latest)
    sync(path.parent)


def follow(path: Path) -> Path:
    """The folder that a pointer names; any other path as it is. Readers call this, on one rank.

    Raises ValueError for a pointer that names no folder beside it.
    """
    if path.name != LATEST or not path.is_file():
        return path
    name = named(path)
    if name is None or (path.parent / name).is_symlink():
        raise ValueError(
            f"{path} must name one folder beside it, as ema.save(keep=...) has it. Name the folder itself."
        )
    return path.parent / name


def named(pointer: Path) -> str | None:
    """The name in a pointer; None if it holds anything but the name of one entry beside it."""
    if pointer.is_symlink() or not pointer.is_file() or pointer.stat().st_size > 1024:
        return None
    try:
        name = pointer.read_bytes().decode().removesuffix("\n")
    except UnicodeDecodeError:
        return None
    plain = name.isprintable() and name == os.path.basename(name) and not name.startswith(".")
    return name if name and plain and name != LATEST else None


def reserve(fd: int, size: int) -> None:
    """Take `size` bytes of disk now, so that a full disk is found before anything is written."""
    try:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(fd, 0, max(size, 1))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    os.ftruncate(fd, size)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data`: one call moves at most 2 GiB, and may move less."""
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """What cannot go now (NFS keeps mapped files) or is gone already is left to the next sweep: `path` is in place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


class Target:
    """A file that is written in any order, and handed to the disk while it is written.

    [Note: pages]  A write fills the page cache and an fsync empties it. Of a large file that takes the machine's memory
    away from training, and has the disk wait first and everybody else afterwards. So every window is sent to the disk when
    it is full (POSIX_FADV_DONTNEED starts writing dirty pages), and its pages are given back when the next one is.
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
