"""What each key of ema.json must hold, and how values from outside are parsed. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from reprlib import repr as brief
from typing import Any

from .safetensors import is_file_name

__all__ = ["FORMS", "OPTIONAL", "OWN", "SUMS", "parse_averages", "parse_files"]

SUMS = {"crc32": 8, "sha256": 64}  # hexadecimal digits


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_seed(value: Any) -> bool:
    return value is None or (_is_object(value) and type(value.get("seed")) is int)


# key -> what it must be, and the test of that
FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": ("'ema' or 'export'", lambda value: value in ("ema", "export")),
    "weights": (
        "'all', 'averaged' or 'adapter'",
        lambda value: value in ("all", "averaged", "adapter"),
    ),
    "clock": ("an object", _is_object),
    "attach": ("an object or null", lambda value: value is None or _is_object(value)),
    "rounding": ("an object with a whole seed, or null", _is_seed),
    "schedules": ("a list", lambda value: isinstance(value, list)),
    "averages": ("an object", _is_object),
    "averaged": ("a list of names", _is_names),
    "own_buffers": ("a list of names", _is_names),
    "aliases": (
        "an object of lists of names",
        lambda value: _is_object(value) and all(map(_is_names, value.values())),
    ),
    "dtypes": (
        "an object of names",
        lambda value: _is_object(value) and _is_names(list(value.values())),
    ),
    "versions": ("an object", _is_object),
    "extra": ("an object", _is_object),
    "source": ("an object", _is_object),
    "files": ("an object", _is_object),
}
# Earlier versions and offline exports leave these out.
OPTIONAL = {"attach", "rounding", "averages", "dtypes", "source"}
OWN = "own_buffers"
_AVERAGE_LABEL = re.compile(r"[0-9]+-\w+")  # the number of the average and its schedule


def parse_averages(averages: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """The labels in the order of the schedules, and a list of problems.

    NOTE: JSON keeps labels as texts, '10-...' before '2-...'.
    """
    labels = list(filter(_AVERAGE_LABEL.fullmatch, averages))
    damage = [
        f"averages: {brief(label)} is no NUMBER-SCHEDULE"
        for label in averages
        if label not in labels
    ]
    own_buffers: dict[str, list[str]] = {}
    for label in sorted(labels, key=lambda label: int(label.split("-")[0])):
        own: Any = averages[label].get(OWN) if _is_object(averages[label]) else None
        own_buffers[label] = own if _is_names(own) else []
        if not _is_names(own):
            damage.append(f"averages: own_buffers of {label} must be a list of names")
    return own_buffers, damage


def parse_files(files: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The files in the folder, and a list of problems. An unsound entry becomes {}."""
    inside = {name: entry for name, entry in files.items() if _is_place(name)}
    damage = [
        f"files: {brief(name)} does not lie in the folder" for name in files if name not in inside
    ]
    damage += [
        f"files: {name} must have a size and a CRC-32 of 8 digits, listed is {brief(entry)}"
        for name, entry in inside.items()
        if not _is_entry(entry)
    ]
    sound = {name: entry if _is_entry(entry) else {} for name, entry in inside.items()}
    return sound, damage


def _is_place(name: str) -> bool:
    """A file of the folder, or of one of its further averages."""
    *folders, file = name.split("/")
    if folders and not (
        len(folders) == 2 and folders[0] == "averages" and _AVERAGE_LABEL.fullmatch(folders[1])
    ):
        return False
    return is_file_name(file) and name.isprintable()


def _is_entry(entry: Any) -> bool:
    if not _is_object(entry) or type(entry.get("size")) is not int or "crc32" not in entry:
        return False
    return all(
        isinstance(entry[kind], str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", entry[kind])
        for kind, digits in SUMS.items()
        if kind in entry
    )
