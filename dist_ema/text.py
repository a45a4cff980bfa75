"""Texts for people: plurals, sizes in bytes and their parsing, lists, shortened names, warnings."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import index
from pathlib import Path
from typing import Any, TypeAlias

__all__ = [
    "Bar",
    "Tick",
    "listed",
    "plural",
    "printable",
    "sentence",
    "shortened",
    "silent",
    "size",
    "size_of",
    "some",
    "warn",
]


Tick: TypeAlias = Callable[[int], None]  # so many bytes more


Bar: TypeAlias = Callable[[int], AbstractContextManager[Tick]]  # over so many bytes in all


_UNITS = {
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1,
}  # fmt: skip


def printable(text: str) -> str:
    """The text with control characters as escapes, so that none reaches a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(values: dict[str, Any]) -> str:
    """`now 100, updates 10`"""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


def plural(number: int, word: str) -> str:
    """`1 file`, `2 files`"""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """`a, b and 3 more`"""
    left = len(names) - most
    return between.join(names[:most]) + (
        f"{between.rstrip(', ')} and {left} more" if left > 0 else ""
    )


def shortened(text: str, most: int) -> str:
    """`a/long/...last.safetensors`: the text in at most so many characters, its middle left out."""
    begin = (most - 3) // 2
    return text if len(text) <= most else f"{text[:begin]}...{text[begin + 3 - most :]}"


def size(nbytes: float) -> str:
    """1.23 GB"""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        # From 999.5 on, three digits would be 1e+03.
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    whole = unit == "B" or 999.5 <= nbytes < 1e6
    return f"{nbytes:,.0f} {unit}" if whole else f"{nbytes:.3g} {unit}"


def size_of(text: int | str, what: str = "max_shard_size") -> int:
    """Bytes in 5_000_000, '5GB', '500MB', '2GiB'. Raises ValueError for anything else."""
    try:
        if isinstance(text, str):
            digits = text.strip().upper().rstrip("KMGIB")
            size = int(float(digits) * _UNITS[text.strip().upper()[len(digits) :].strip()])
        elif isinstance(text, bool):  # an int too: True would be one byte
            raise TypeError
        else:
            size = index(text)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{what} must be bytes or a text like '5GB', got {text!r}.") from None
    if size <= 0:
        raise ValueError(f"{what} must be positive, got {text!r}.")
    return size


def sentence(error: Exception) -> str:
    """The message of an error; for an OSError, the file's name and the system's reason."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.strerror}."
            if error.filename is None
            else f"{error.filename}: {error.strerror}."
        )
    return str(error)


@contextmanager
def silent(total: int) -> Iterator[Tick]:
    """A progress bar that shows nothing."""
    yield lambda done: None


def warn(*texts: str) -> None:
    """Warn at the user's line, the innermost one outside of this package."""
    frame, level = sys._getframe(), 1
    # Frames of contextlib lie between a verb and the user's `with`.
    here = (f"{Path(__file__).parent}{os.sep}", contextlib.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, level = frame.f_back, level + 1
    for text in texts:
        warnings.warn(text, stacklevel=level)
