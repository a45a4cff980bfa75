"""Atomic replacement: a new version of a file or folder appears whole or not at all, durably.

Everything is written to a hidden sibling (`.NAME.tmp-ID`), synced, and put in place. A file
replaces a file in one call. Two folders are exchanged in one call where the file system can.
Elsewhere the old one steps aside (`.NAME.old-ID`) before the new one steps in.

A folder that cannot be renamed (a mount point, the working directory, or a parent without write
permission) is rolled forward: the new version is completed inside it (`.tmp-ID`, then `.new-ID`),
and its files are linked over the old ones.

[Note: who repairs]  A writer can die between two steps. The next writer finishes for it
(`recover`). Readers rename nothing: they read where the whole version lies (`whole`). One process
writes to a path at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from . import disk

__all__ = [
    "NotDurableError",
    "exchange",
    "exchanges",
    "held",
    "identity",
    "locked",
    "publish",
    "read_one_version",
    "real",
    "recover",
    "remove_leftovers",
    "replace_file",
    "temporary_folder",
    "temporary_sibling",
    "whole",
]

_EXCHANGE = 2  # RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD
_MOST_ATTEMPTS = 100  # of a reader, while writers replace what it reads
_LOOKS = 5  # of a reader, until what is missing or elsewhere is taken as it is

T = TypeVar("T")


class NotDurableError(OSError):
    """The new version is in place, and the disk did not confirm it."""


# --- names ---------------------------------------------------------------------------------------


def real(path: str | os.PathLike[str]) -> Path:
    """Where links lead: a temporary sibling must lie on the same file system.

    Raises:
        FileNotFoundError: `path` is relative, and the working directory is gone.
    """
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno,
            "The working directory of this process was removed, so give an absolute path",
            os.fspath(path),
        ) from None


def temporary_sibling(path: Path, kind: str = "tmp") -> Path:
    """A hidden sibling that no other process uses."""
    return _beside(path, kind, uuid.uuid4().hex)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """The folder of a new version, removed if the block raises before it is in place."""
    # NOTE: exchanged, the working directory would be the earlier version, which is removed.
    fixed = path.is_dir() and (
        os.path.ismount(path)
        or not os.access(path.parent, os.W_OK)
        or identity(path) == identity(Path())
    )
    folder = _inside(path, "tmp", uuid.uuid4().hex) if fixed else temporary_sibling(path)
    folder.mkdir()
    try:
        yield folder
    except NotDurableError:  # the earlier version lies there now
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep out other processes that replace `path` under this lock.

    NOTE: the lock is on the parent folder. NFS refuses such locks, and then there is none.
    """
    disk.ensure(path.parent)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _beside(path: Path, kind: str, token: str = "") -> Path:
    return path.parent / f".{path.name}.{kind}-{token}"


def _inside(path: Path, kind: str, token: str = "") -> Path:
    return path / f".{kind}-{token}"


def _all_like(start: Path) -> list[Path]:
    """The siblings whose names begin so and go on with a token."""
    # NOTE: no glob, because names may hold its characters, or end in '.tmp-1' themselves.
    token = re.compile(re.escape(start.name) + "[0-9a-f]{32}")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [start.parent / name for name in os.listdir(start.parent) if token.fullmatch(name)]
    return []


# --- reading -------------------------------------------------------------------------------------


def whole(path: Path) -> Path:
    """Where the whole version of `path` lies now, which is elsewhere while a writer replaces it."""
    if path.exists():
        # A folder that is rolled forward is whole inside `.new`, and half replaced around it.
        return next(iter(_all_like(_inside(path, "new"))), path)
    for old in _all_like(_beside(path, "old")):
        # NOTE: an old version steps aside only when the new one is complete.
        for version in (_beside(path, "tmp", old.name[-32:]), old):
            if version.exists():
                return version
    return path  # there is none, or a writer has just put it in place


def read_one_version(path: Path, read: Callable[[Path], T]) -> T:
    """`read` of the whole version of `path`, repeated where a writer replaced it meanwhile."""
    for attempt in range(_MOST_ATTEMPTS):
        where = whole(path)
        with held(where) as before:
            try:
                result = read(where)
            except (OSError, ValueError):
                # What is missing may have come since, and what steps aside is removed soon.
                on_the_move = (before is None or where != path) and attempt < _LOOKS
                changed = identity(where) != before
                if attempt == _MOST_ATTEMPTS - 1 or not (changed or on_the_move):
                    raise
                continue
            # Nothing replaced it between the first byte and the last.
            if identity(where) == before:
                return result
    raise ValueError(
        f"{path} is replaced again and again while it is read. Try again when its writer is done."
    )


@contextlib.contextmanager
def held(path: Path) -> Iterator[tuple[int, ...] | None]:
    """The identity of `path`. While it is open, no other file can get its inode number."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # there is none, or the system opens no folders
        yield identity(path)
        return
    try:
        yield identity(fd)
    finally:
        os.close(fd)


def identity(path: Path | int) -> tuple[int, ...] | None:
    """Device, inode and time of change; None where nothing is."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


# --- writing -------------------------------------------------------------------------------------


def publish(new: Path, path: Path) -> None:
    """Put the synced `new` at `path`, and remove what was there.

    Raises:
        NotDurableError: `new` is in place, and what was there stays beside it.
        OSError: `path` is what it was.
    """
    if new.parent == path:
        _roll_forward(new, path)
        return
    disk.sync(path.parent)
    old: Path | None = None
    if not new.is_dir():
        os.replace(new, path)
    elif not os.path.lexists(path):
        os.rename(new, path)
    # After the exchange the earlier version lies where the new one was made.
    elif exchange(new, path):
        old = new
    else:
        old = _rename_twice(new, path)
    stays = "" if old is None else f" The earlier version stays at {old} until the next save."
    _confirm(path.parent, path, stays)
    if old is not None:
        disk.remove(old)


def _confirm(folder: Path, path: Path, stays: str = "") -> None:
    """Sync the folder in which a rename has put the new version of `path` in place."""
    try:
        disk.sync(folder)
    except OSError as error:
        raise NotDurableError(
            error.errno,
            f"{error.strerror}: the new version is in place, but its durability is not certain."
            f"{stays}",
            os.fspath(path),
        ) from error


def _rename_twice(new: Path, path: Path) -> Path:
    """Returns where the old version lies."""
    old = _beside(path, "old", new.name[-32:])
    os.rename(path, old)
    # NOTE: no sync in between. After a power loss `whole` and `recover` take either rename alone.
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    return old


def _roll_forward(new: Path, path: Path) -> None:
    """Put a version that was completed inside `path` in place of the files there."""
    disk.sync(path)
    staged = _inside(path, "new", new.name[-32:])
    os.rename(new, staged)  # from here on it is the version that counts
    disk.sync(path)
    _link_over(staged, path)
    _retire(staged, path)


def _link_over(staged: Path, path: Path) -> None:
    """Give every file of `staged` its name in `path`, JSON files last, and remove the others."""
    # ema.json and the index come when what they name lies there.
    names = sorted(os.listdir(staged), key=lambda name: (name.endswith(".json"), name))
    for name in names:
        if (staged / name).is_dir():
            (path / name).mkdir(exist_ok=True)
            _link_over(staged / name, path / name)
        else:
            link = temporary_sibling(path / name)
            disk.link_or_copy(staged / name, link)
            os.replace(link, path / name)
    for name in set(os.listdir(path)) - set(names) - {staged.name}:
        if not name.startswith(".nfs"):
            disk.remove_or_raise(path / name)  # loaders would take it for a part of the new version
    disk.sync(path)


def _retire(staged: Path, path: Path) -> None:
    """Make the files in `path` the version that counts."""
    gone = _inside(path, "tmp", staged.name[-32:])
    os.rename(staged, gone)
    _confirm(path, path)  # or a power loss could undo the rename of a folder that lacks files
    disk.remove(gone)


def recover(path: Path) -> None:
    """Finish what a writer of `path` that died has begun. Only writers call this."""
    for staged in _all_like(_inside(path, "new")):
        _link_over(staged, path)
        _retire(staged, path)
    for old in _all_like(_beside(path, "old")):
        if not os.path.lexists(path):
            os.rename(whole(path), path)
            disk.sync(path.parent)
        disk.remove(old)


def remove_leftovers(path: Path) -> None:
    """Remove what writers that died left beside `path`. No other process may be writing it."""
    leftovers = [*_all_like(_beside(path, "tmp")), *_all_like(_inside(path, "tmp"))]
    if leftovers:
        disk.sync(path.parent)  # what is in place is on disk before an earlier version goes
    for leftover in leftovers:
        disk.remove(leftover)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file anew, durably and in one rename. No other process may be writing it."""
    remove_leftovers(path)
    new = temporary_sibling(path)
    try:
        new.write_bytes(content)
        disk.sync(new)
        publish(new, path)
    finally:
        with contextlib.suppress(OSError):  # it says what the first error says
            new.unlink()


def exchanges(folder: Path) -> bool:
    """Whether `publish` over an existing folder is one step in this one. Leaves two files there."""
    two = temporary_sibling(folder / "a"), temporary_sibling(folder / "b")
    for path in two:
        path.touch()
    return exchange(*two)


def exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or an old C library
        return False
    if call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    # The kernel or the file system lacks the call. Anything else is wrong with the paths.
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), os.fspath(b))
