"""Claims to paths: who may write where, over one connection, with few keys."""

from __future__ import annotations

import torch.distributed as dist

from dist_ema.distributed.bounded_store import BoundedStore
from dist_ema.distributed.job_keys import RECENT, Claims


def test_claims() -> None:
    """Guards that the connection is kept, and that keys of earlier paths are deleted."""
    store, opened = dist.HashStore(), list[float]()

    def connect(timeout: float) -> BoundedStore:
        opened.append(timeout)
        return BoundedStore(store, timeout)

    low, high = Claims(connect), Claims(connect)
    assert low.claim("run", [0, 1], "a", 9) == ([0, 1], "a")
    assert low.claim("run", [0, 1], "b", 9) == ([0, 1], "b"), "its own claim may change"
    assert high.claim("run", [2, 3], "c", 9) == ([0, 1], "b")
    assert high.claim("run", [2, 3], "b", 9) == ([0, 1], "b"), "the same weights"
    for i in range(3 * RECENT):
        assert low.claim(f"run/{i % (2 * RECENT)}", [0, 1], "b", 9) == ([0, 1], "b")
    assert store.num_keys() == RECENT
    assert high.claim("run", [2, 3], "c", 9) == ([2, 3], "c"), "free again"
    assert low.claim("run/\udcff", [0, 1], "b", 9) == ([0, 1], "b"), "bytes that are no text"
    assert opened == [9, 9]
