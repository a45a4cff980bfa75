"""Pointers: files (`latest`, `best`) that name one folder beside them, as `keep=` leaves them."""

from __future__ import annotations

import os
from pathlib import Path

from . import atomic, disk

__all__ = ["BEST", "LATEST", "follow", "named", "point", "resolve"]

LATEST = "latest"
BEST = "best"


def point(path: Path, name: str = LATEST) -> None:
    """Have the pointer with that name beside `path` name it."""
    atomic.replace_file(path.parent / name, f"{path.name}\n".encode())


def resolve(path: str | os.PathLike[str]) -> Path:
    """What a reader opens for a path: links are followed, and pointers.

    A linked file keeps its name, which tells what it holds: a hub's cache links to files without a
    suffix.
    """
    path = Path(path)
    if path.suffix in (".safetensors", ".json") and path.is_file():
        return atomic.real(path.parent) / path.name
    return follow(atomic.real(path))


def follow(path: Path) -> Path:
    """The folder that a pointer names; any other path as it is.

    Raises:
        ValueError: The pointer names no folder beside it.
    """
    # A folder may be called so too.
    if path.name not in (LATEST, BEST) or not path.is_file():
        return path
    name = named(path)
    if name is None and path.name == BEST:  # any file may be called so
        return path
    if name is None or (path.parent / name).is_symlink():
        raise ValueError(
            f"{path} must name one folder beside it, as ema.save(keep=...) has it. Name the folder "
            "itself."
        )
    return path.parent / name


def named(pointer: Path) -> str | None:
    """The name in a pointer; None if it holds anything but the name of one entry beside it."""
    if pointer.is_symlink() or not pointer.is_file() or pointer.stat().st_size > 1024:
        return None
    try:
        name = disk.beginning(pointer, 1024).decode().removesuffix("\n")
    except UnicodeDecodeError:
        return None
    plain = name.isprintable() and name == os.path.basename(name) and not name.startswith(".")
    return name if name and plain and name not in (LATEST, BEST) else None
