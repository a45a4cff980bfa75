"""`BoundedStore`, `together`: deadlines that torch lacks: a silent store, ranks that never come.

[Note: the host of the store]  A connection to the key-value store waits for ever for a host that is
stopped. So operations run in a thread of the connection, and the caller waits `timeout` seconds for
each. After one that was not answered, the next ones fail at once, until the host answers.

[Note: construction]  Ranks that build an EMA share no id yet ([Note: incarnations] in ranks),
so a key of the store may be a killed attempt's. Only a counter that moves says who is here: a rank
that waits counts, and after the timeout it names those whose counters stood still meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["BoundedStore", "store_is_silent", "together", "within"]

T = TypeVar("T")
Tasks = queue.SimpleQueue[tuple[Callable[[], Any], Future] | None]

COUNT = 0.5  # seconds between two counts of a rank that waits, at most
MUST_MOVE = 3 * COUNT  # seconds in which the counter of a rank that waits must move


class BoundedStore:
    """A store whose operations raise when its host is silent ([Note: the host of the store]).

    Args:
        store: A connection that nothing else uses.
        timeout: Seconds that an operation may take. It may be set later.
    """

    def __init__(self, store: dist.Store, timeout: float) -> None:
        self.store, self.timeout = store, timeout
        self._tasks: Tasks = queue.SimpleQueue()
        self._unanswered: Future | None = None
        # NOTE: the thread refers to the queue, not to self, or self would never be collected.
        threading.Thread(
            target=_serve, args=(self._tasks,), name="dist_ema store", daemon=True
        ).start()
        weakref.finalize(self, self._tasks.put, None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._run, getattr(self.store, name))

    def _run(self, operation: Callable[..., Any], *args: Any) -> Any:
        if self._unanswered is not None and not self._unanswered.done():
            raise dist.DistNetworkError("(It has not answered since the last call.)")
        future: Future = Future()
        self._tasks.put((partial(operation, *args), future))
        if not _ends(future, self.timeout):
            self._unanswered = future
            raise dist.DistNetworkError(f"(No answer for {self.timeout:g} s.)")
        return future.result()


def _serve(tasks: Tasks) -> None:
    while (task := tasks.get()) is not None:
        _settle(*task)
        del task


def _settle(work: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


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
    future = _started(work)
    end = time.monotonic() + timeout
    # The usual case costs no counter.
    if _ends(future, COUNT) and not isinstance(future.exception(), RuntimeError):
        return future.result()
    try:
        # NOTE: `work` may wait on the connection, and that locks it.
        own = BoundedStore(within(timeout, store.clone), timeout)  # type: ignore[attr-defined]
        absent = _absent(ranks, own, end, future)
    except dist.DistNetworkError as error:
        raise RuntimeError(f"{doing}: {store_is_silent(error)}") from error
    if future.done() and not absent:
        return future.result()
    names = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}" if absent else "a rank"
    cause = f"within {timeout:g} s"
    if future.done():
        cause = f"({str(future.exception()).split('. ')[0]})"  # gloo's first sentence
    raise RuntimeError(f"{doing} is collective, and {names} did not come {cause}.")


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


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do `work`, which talks to the host of the store. Raises DistNetworkError after `seconds`."""
    future = _started(work)
    if not _ends(future, seconds):
        raise dist.DistNetworkError(f"(No answer for {seconds:g} s.)")
    return future.result()


def store_is_silent(error: dist.DistNetworkError) -> str:
    """What a user reads when the store's host gives no answer."""
    return (
        "the key-value store of the process group is gone or does not answer; did the process that "
        f"holds it (rank 0, or the agent of torchrun) die, or was it stopped? {error}"
    )


def _started(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread that nothing waits for at exit."""
    index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> T:
        if index is not None:
            torch.accelerator.set_device_index(index)  # a new thread is on device 0
        return work()

    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(run, future), name="dist_ema", daemon=True).start()
    return future


def _ends(future: Future[Any], seconds: float) -> bool:
    try:
        future.exception(seconds)
    except Late:
        return False
    return True


def _count_until(end: float, counters: BoundedStore, future: Future[Any]) -> bool:
    """Show that this rank is here. Returns whether the future has succeeded.

    After a failure it goes on for MUST_MOVE seconds, in which the others show that they are here.
    """
    failed = False
    while (left := end - time.monotonic()) > 0:
        counters.add(str(dist.get_rank()), 1)
        if failed:
            time.sleep(min(COUNT, left))
        elif _ends(future, min(COUNT, left)):
            if future.exception() is None:
                return True
            failed, end = True, min(end, time.monotonic() + MUST_MOVE)
    return False
