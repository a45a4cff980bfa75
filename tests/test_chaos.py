"""A short `python -m tests.chaos`: one rank, ten versions, two kills: the trainer, a watcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.slow
@pytest.mark.multirank
def test_chaos(tmp_path: Path) -> None:
    """Under a network file system's rules, which are the stricter ones."""
    chaos.run(tmp_path, ranks=1, count=8, kills=2, network=True, seed=14)
