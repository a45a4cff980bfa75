"""`together`: what ranks do before they have an id in common, and who did not come to it.

[Note: construction]  Ranks that build an EMA share no id yet ([Note: incarnations] in ranks),
so a key of the store may be a killed attempt's. Only a counter that moves says who is here: a rank
that waits counts, and after the timeout it names those whose counters stood still meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

from .bounded_store import BoundedStore, clone, ends, run_beside, store_is_silent
from .diagnosis import names

__all__ = ["together"]

T = TypeVar("T")

COUNT = 0.5  # seconds between two counts of a rank that waits, at most
MUST_MOVE = 3 * COUNT  # seconds in which the counter of a rank that waits must move


def together(
    doing: str, ranks: Sequence[int], store: dist.Store, timeout: float, work: Callable[[], T]
) -> T:
    """Do `work`, in which ranks wait for each other without a deadline ([Note: construction]).

    Args:
        doing: What they do, for errors.
        ranks: The global ranks that take part.
        store: For counters of this kind alone.
        timeout: Seconds.
        work: Runs in a thread, which is left behind where it does not end.

    Raises:
        RuntimeError: It failed, or took longer. The ranks that are not here are named.

    Note:
        *Collective*. *Cost*: a thread. Counters are written only after COUNT seconds.
    """
    future = run_beside(work)
    end = time.monotonic() + timeout
    # The usual case costs no counter.
    if ends(future, COUNT) and not isinstance(future.exception(), RuntimeError):
        return future.result()
    try:
        # NOTE: `work` may wait on the connection, and that locks it.
        absent = _absent(ranks, clone(store, timeout), end, future)
    except dist.DistNetworkError as error:
        raise RuntimeError(f"{doing}: {store_is_silent(error)}") from error
    if future.done() and not absent:
        return future.result()
    who = names(absent) if absent else "a rank"
    cause = f"within {timeout:g} s"
    if future.done():
        cause = f"({str(future.exception()).split('. ')[0]})"  # gloo's first sentence
    raise RuntimeError(f"{doing} is collective, and {who} did not come {cause}.")


def _absent(
    ranks: Sequence[int], counters: BoundedStore, end: float, future: Future[Any]
) -> list[int]:
    """The ranks whose counters stand still until `end`; none where the future succeeds."""
    others = [rank for rank in ranks if rank != dist.get_rank()]
    absent: list[int] = []
    for _ in range(2):  # if all were here, one may have been stopped since
        before = [counters.add(str(rank), 0) for rank in others]
        if absent or _count_until(max(end, time.monotonic() + MUST_MOVE), counters, future):
            break
        after = [counters.add(str(rank), 0) for rank in others]
        absent = [rank for rank, a, b in zip(others, before, after, strict=True) if a == b]
    return absent


def _count_until(end: float, counters: BoundedStore, future: Future[Any]) -> bool:
    """Show that this rank is here. Returns whether the future has succeeded.

    After a failure it goes on for MUST_MOVE seconds, in which the others show that they are here.
    """
    failed = False
    while (left := end - time.monotonic()) > 0:
        counters.add(str(dist.get_rank()), 1)
        if failed:
            time.sleep(min(COUNT, left))
        elif ends(future, min(COUNT, left)):
            if future.exception() is None:
                return True
            failed = True
            end = min(end, time.monotonic() + MUST_MOVE)  # the others need this long to count
    return False
