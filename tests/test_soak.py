"""A short part of the long run of `python -m tests.soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import soak
from tests._ranks import run_ranks


@pytest.mark.multirank
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_nothing_grows(wrapper: str, tmp_path: Path) -> None:
    """The average equals float64, and the second half of the run holds no more than the first."""
    for counts in run_ranks(soak.WORLD, soak.rank, str(tmp_path), 160, wrapper, 5, 20):
        assert len(counts) == 8
        assert soak.grown(counts) == {}


def test_growth_is_seen() -> None:
    flat = soak.Counts(memory=1 << 30, descriptors=9, threads=1, keys=5, files=20)
    leaking = soak.Counts(memory=2 << 30, descriptors=10, threads=2, keys=6, files=21)
    assert soak.grown([flat] * 6) == {}
    assert soak.grown([flat, flat, flat, leaking]).keys() == leaking.__dict__.keys()
