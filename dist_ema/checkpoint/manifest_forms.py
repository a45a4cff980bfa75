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
_LABEL = re.compile(r"[0-9]+-\w+")  # the number of the average and its schedule


def parse_averages(averages: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """The labels in the order of the schedules, and a list of problems.

    NOTE: JSON keeps labels as texts, '10-...' before '2-...'.
    """
    damage = [
        f"averages: {brief(label)} is no NUMBER-SCHEDULE"
        for label in averages
        if not _LABEL.fullmatch(label)
    ]
    parsed: dict[str, list[str]] = {}
    labels = filter(_LABEL.fullmatch, averages)
    for label in sorted(labels, key=lambda label: int(label.split("-")[0])):
        own: Any = averages[label].get(OWN) if _is_object(averages[label]) else None
        if not _is_names(own):
            damage.append(f"averages: own_buffers of {label} must be a list of names")
        parsed[label] = list(own) if _is_names(own) else []
    return parsed, damage


def parse_files(files: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The files in the folder, and a list of problems. An unsound entry becomes {}."""
    damage = [
        f"files: {brief(name)} does not lie in the folder" for name in files if not _is_place(name)
    ]
    parsed = {}
    for name, entry in files.items():
        if _is_place(name):
            parsed[name] = entry if _is_entry(entry) else {}
            if not parsed[name]:
                damage.append(
                    f"files: {name} must have a size and a CRC-32 of 8 digits, listed is "
                    f"{brief(entry)}"
                )
    return parsed, damage


def _is_place(name: str) -> bool:
    """A file of the folder, or of one of its further averages."""
    *folders, file = name.split("/")
    inside = len(folders) == 2 and folders[0] == "averages" and _LABEL.fullmatch(folders[1])
    return is_file_name(file) and name.isprintable() and (not folders or bool(inside))


def _is_entry(entry: Any) -> bool:
    if not _is_object(entry) or type(entry.get("size")) is not int or "crc32" not in entry:
        return False
    return all(
        isinstance(entry[kind], str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", entry[kind])
        for kind, digits in SUMS.items()
        if kind in entry
    )
