"""Errors on reading: each open for reading and each read of a verb fails once with EIO.

The error names the path, what was read stays as it is, and nothing is left of an output.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from . import shim
from .shim import Fault
from .verbs import Verbs
from .walk import Finding, Walk, call, held

__all__ = ["reading_walks"]

READ_ERROR = Fault("EIO on reading", errno.EIO)


def reading_walks(sources: Path, out: Path, stride: int) -> list[Walk]:
    """EIO on what each verb reads. sources: From an `ema_cases` before, or an empty folder."""
    verbs = Verbs(sources)
    if not sources.exists():
        verbs.prepare(range(1, 2))
    root = sources / "1"
    return [
        walk_reads(f"reads: {name}", read, root, stride)
        for name, read in verbs.reading(root, out).items()
    ]


def walk_reads(name: str, read: Callable[[], None], root: Path, stride: int = 1) -> Walk:
    """Fail each open for reading and each read of a verb with EIO.

    Args:
        name: Of the verb.
        read: Calls it; raises AssertionError where it returned and its result is not right.
        root: What it reads lies there, and must stay as it is.
        stride: See `walk`.
    """

    def strike(at: int) -> tuple[str, str]:
        shim.arm(root, at, READ_ERROR, reads=True)
        try:
            return call(read)
        finally:
            shim.disarm()

    read()
    shim.arm(root, reads=True)
    read()
    found = Walk(name, shim.disarm())
    before, files = held(), _contents(root)
    for at in range(1, found.operations + 1, stride):
        outcome, text = strike(at)
        found.faults += 1
        kinds = {"crash": outcome == "crash", "leak": bool(held() - before)}
        kinds["nameless"] = outcome == "raised" and str(root) not in text
        kinds["lost"] = _contents(root) != files
        found.findings += [
            Finding(kind, READ_ERROR.name, f"read {at}", text)
            for kind, seen in kinds.items()
            if seen
        ]
    return found


def _contents(root: Path) -> dict[str, bytes | None]:
    return {str(each): each.read_bytes() if each.is_file() else None for each in root.rglob("*")}
