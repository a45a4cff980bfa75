"""A short `python -m tests.chaos`: one rank, a dozen versions, a few kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.slow
@pytest.mark.multirank
def test_chaos(tmp_path: Path) -> None:
    """Under a network file system's rules, which are the stricter ones."""
    chaos.run(tmp_path, ranks=1, count=10, kills=3, network=True, seed=3)
