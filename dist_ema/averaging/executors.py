"""Places beside the caller where work is done in order, and marks that say how long it took.

Nobody waits for a mark: it is set where work is issued, and read once it has passed.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["NAP", "TIMED", "Executor", "Instant", "Mark", "Meter", "SideStream", "Worker", "mark"]

NAP = 0.0005  # seconds between two looks of a thread at the device
PATIENCE = 1.0  # seconds between two looks at whether the thread that is waited for lives
UNREAD = 64  # intervals that a meter keeps for somebody who reads
TIMED = ("cuda", "xpu")  # devices whose events tell the time


class Mark(Protocol):
    """A point in the order of work."""

    def query(self) -> bool:
        """The work before it is done."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to a later mark, when both have passed."""


class Instant:
    """A point on the host's clock."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Instant) -> float:
        return 1000 * (end._at - self._at)


def mark(device: torch.device | None) -> Mark:
    """Here, on the device's current stream; on the host's clock where events of the device tell no time."""
    if device is None or device.type not in TIMED:
        return Instant()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


class Meter:
    """Milliseconds that the last finished piece of work took; 0 before the first. Reading never waits."""

    def __init__(self) -> None:
        # NOTE: bounded, because perhaps nobody reads; a thread may add while another reads.
        self._intervals: deque[tuple[Mark, Mark]] = deque(maxlen=UNREAD)
        self._last = 0.0

    def add(self, begin: Mark, end: Mark) -> None:
        self._intervals.append((begin, end))

    def read(self) -> float:
        while self._intervals and self._intervals[0][1].query():
            begin, end = self._intervals.popleft()
            self._last = begin.elapsed_time(end)
        return self._last


class Executor(Protocol):
    """A stream of the device, or a thread."""

    def submit(self, work: Callable[[], None]) -> Any:
        """Do `work` after everything that the caller has issued so far; returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """What the caller issues from now on comes after the ticket's work."""

    def done(self, ticket: Any) -> bool:
        """The ticket's work is over. Never waits."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Whoever drops them, their memory is not reused before the work that was submitted until then is done."""

    def mark(self) -> Mark:
        """Here: inside `work` in its order, else in the caller's."""


class SideStream:
    """A stream of the accelerator. Submitting and waiting are ordered on the device; the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)

    def submit(self, work: Callable[[], None]) -> torch.Event:
        # Orders: everything issued on the compute stream so far, then the work.
        issued = torch.accelerator.current_stream(self.device).record_event()
        self._stream.wait_event(issued)
        with self._stream:
            work()
        return self._stream.record_event()

    def wait(self, ticket: torch.Event) -> None:
        # Orders: the work, then everything that the compute stream is given from now on.
        torch.accelerator.current_stream(self.device).wait_event(ticket)

    def done(self, ticket: torch.Event) -> bool:
        return ticket.query()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        # Orders: the work, then the reuse of memory that was allocated on the compute stream, when it is freed.
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def mark(self) -> Mark:
        return mark(self.device)


class Worker:
    """A thread with few intra-op threads, started when it is first needed; it ends with its owner.

    device: the accelerator whose events the thread looks at. A fork leaves the thread behind: the child starts another.
    """

    def __init__(self, threads: int = 2, device: torch.device | None = None) -> None:
        self._threads, self._device = threads, device
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> threading.Event:
        if self._thread is None or not self._thread.is_alive():
            self._start()
        done = threading.Event()
        self._queue.put((work, done))
        return done

    def wait(self, ticket: threading.Event) -> None:
        while not ticket.wait(PATIENCE):
            if self._thread is None or not (self._thread.is_alive() or ticket.is_set()):
                raise RuntimeError(
                    "the thread that averages in host memory is gone: was this process forked?"
                )

    def done(self, ticket: threading.Event) -> bool:
        return ticket.is_set()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Host memory belongs to whoever refers to it."""

    def mark(self) -> Mark:
        return Instant()

    def _start(self) -> None:
        # NOTE: the thread knows the queue and nothing else of us, or we would never be collected.
        self._queue: Tasks = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._queue,), name="dist_ema", daemon=True
        )
        weakref.finalize(self, self._queue.put, None)
        mine, ready, device = torch.get_num_threads(), threading.Event(), self._device
        few = min(self._threads, mine)
        self._queue.put((lambda: _settle_in(few, device), ready))
        self._thread.start()
        ready.wait()
        torch.set_num_threads(mine)  # the bound is the worker's; threads made later take ours


def _settle_in(threads: int, device: torch.device | None) -> None:
    torch.get_num_threads()  # NOTE: a thread's first look at the number sets it to the process's, and would undo ours
    torch.set_num_threads(threads)
    if device is not None:
        # NOTE: a new thread is on device 0, and looking at an event from there would open a context on it.
        torch.accelerator.set_device_index(device)


Tasks = queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]


def _serve(tasks: Tasks) -> None:
    with torch.no_grad():
        while (task := tasks.get()) is not None:
            work, done = task
            try:
                work()
            finally:
                done.set()
            del task, work, done  # or the last update's tensors would live until the next
