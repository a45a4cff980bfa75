"""Sizes as texts, and the line that a warning names."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dist_ema import text


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (1_234_567_890, "1.23 GB"),
        (1e12 - 1, "1 TB"),
        (1.5e15, "1,500 TB"),
        (4e300, "4e+288 TB"),
    ],
)
def test_size(nbytes: float, expected: str) -> None:
    """Three digits and a unit; an exponent only beyond all disks, and never 1,000 of a unit that
    has a next one.
    """
    assert text.size(nbytes) == expected


@pytest.mark.parametrize(("folder", "is_ours"), [("", True), ("_of_mine", False)])
def test_a_warning_names_the_line_of_the_user(folder: str, is_ours: bool) -> None:
    """Files of this package are passed over, and not those of one whose name begins alike."""
    caller = f"{Path(text.__file__).parent}{folder}/train.py"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("warn('look')", caller, "exec"), {"warn": text.warn})
    assert (caught[0].filename == caller) is not is_ours
