"""`BoundedStore`: the key-value store under a timeout, and the error where its host is silent.

[Note: the host of the store]  A connection to the key-value store waits for ever for a host that is
stopped. So operations run in a thread of the connection, and the caller waits `timeout` seconds for
each. After one that was not answered, the next ones fail at once, until the host answers.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .diagnosis import call_text

__all__ = ["BoundedStore", "clone", "ends", "run_beside", "store_errors", "store_is_silent"]

T = TypeVar("T")
Tasks = queue.SimpleQueue[tuple[Callable[[], Any], Future] | None]


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
        if not ends(future, self.timeout):
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


def clone(store: Any, timeout: float) -> BoundedStore:
    """Another connection to the host of `store`. Raises DistNetworkError after `timeout` seconds.

    A connection that waits is locked, and another thread would wait with it.
    """
    future = run_beside(store.clone)
    if not ends(future, timeout):
        raise dist.DistNetworkError(f"(No answer for {timeout:g} s.)")
    return BoundedStore(future.result(), timeout)


def store_is_silent(error: dist.DistNetworkError) -> str:
    """What a user reads when the store's host gives no answer."""
    return (
        "the key-value store of the process group is gone or does not answer; did the process that "
        f"holds it (rank 0, or the agent of torchrun) die, or was it stopped? {error}"
    )


def run_beside(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread that nothing waits for at exit."""
    index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> T:
        if index is not None:
            torch.accelerator.set_device_index(index)  # a new thread is on device 0
        return work()

    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(run, future), name="dist_ema", daemon=True).start()
    return future


def ends(future: Future[Any], seconds: float) -> bool:
    """Wait up to `seconds` for the future. Returns whether it is done."""
    try:
        future.exception(seconds)
    except Late:
        return False
    return True


@contextmanager
def store_errors(verb: str) -> Iterator[None]:
    """Name the verb and the usual cause when the store is gone."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(f"{call_text(verb)}: {store_is_silent(error)}") from error
