"""The published versions of a run: names, numbers, order, and what each says. No torch.

    published/version-000007/     a complete model, with ema.json
    published/latest, best        files that name a version
    published/stop                ends those who follow
    published/.leases             what readers have open ([Note: leases] in leases)

A number is used once. A run that was rewound to an earlier step goes on with the next number, so a
version never changes, and newer is higher.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from . import manifest, pointers

__all__ = [
    "KEY",
    "STOP",
    "facts_of",
    "highest",
    "is_stopped",
    "name_of",
    "numbered",
    "refuse_model",
]

STOP = "stop"
KEY = "publish"  # in the extra of ema.json
_NAME = re.compile(r"version-([0-9]{6,})")


def name_of(number: int) -> str:
    return f"version-{number:06}"


def numbered(folder: Path) -> dict[int, Path]:
    """The versions in a folder by number, ascending; none if there is no folder yet."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    versions = {int(match[1]): folder / match[0] for match in map(_NAME.fullmatch, names) if match}
    return dict(sorted(versions.items()))


def refuse_model(folder: Path) -> None:
    """Raise ValueError where the folder is one model, and so no folder of versions."""
    if (folder / manifest.META).exists():
        raise ValueError(
            f"{folder} is one saved model. Name the folder that ema.publish() was given, in which "
            "versions lie."
        )


def highest(folder: Path) -> int:
    """The number of the newest version, 0 if there is none."""
    return max(numbered(folder), default=0)


def is_stopped(folder: Path, seen: int) -> bool:
    """Whether the training has ended, and no version comes after the number `seen`.

    NOTE: a listing on a network file system may be older than the stop file. The pointer is opened,
    which asks the server, so a listing that lacks what it names is looked at again.
    """
    latest = pointers.named(folder / pointers.LATEST) or ""
    match = _NAME.fullmatch(latest)
    missed = match is not None and int(match[1]) > seen and (folder / latest).is_dir()
    return (folder / STOP).exists() and not missed


def facts_of(saved: manifest.Manifest) -> dict[str, Any] | None:
    """What a publisher says of a version: version, id, step, average, metrics. Else None."""
    facts = saved.extra.get(KEY)
    return facts if isinstance(facts, dict) and saved.kind == "export" else None
