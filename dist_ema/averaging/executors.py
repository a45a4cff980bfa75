"""Executors under engines: streams, worker threads; work shielded from interrupts; marks, meters.

Reading a mark never waits: it is set where work is issued, and read once it has passed.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "NAP",
    "Executor",
    "Instant",
    "Mark",
    "Meter",
    "SideStream",
    "Worker",
    "await_host_reads",
    "has_streams",
    "is_capturing",
    "mark",
    "run_shielded",
]

NAP = 0.0005  # seconds between two polls of the device by a thread
PATIENCE = 1.0  # seconds between two checks that the thread that is awaited is alive
UNREAD = 64  # intervals that a meter keeps until they are read

Tasks: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]"


class Instant:
    """A point on the host's clock."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Instant) -> float:
        return 1000 * (end._at - self._at)


# A point in the order of work: `query` says that the work before it is done, `elapsed_time` the
# milliseconds to a later mark, when both have passed.
Mark: TypeAlias = "Instant | torch.Event"


@lru_cache(maxsize=64)
def has_streams(device: torch.device) -> bool:
    """The device has streams whose events record and answer; it is asked, not known by its name."""
    try:
        event = torch.Event(device, enable_timing=True)
        event.record(torch.Stream(device))
        event.query()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def is_capturing(device: torch.device | None) -> bool:
    """The device's current stream records a graph, and does no work."""
    # Hosts have no graphs to capture.
    if device is None or device.type == "cpu":
        return False
    stream = torch.accelerator.current_stream(device)
    if hasattr(stream, "is_capturing"):
        return bool(stream.is_capturing())
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def await_host_reads(tensors: Iterable[Tensor]) -> None:
    """Orders: copies out of these that a device was given, then what the host writes into them.

    Devices read pinned memory alone while the host goes on: weights that FSDP offloads.
    """
    if torch.accelerator.is_available() and any(
        tensor.device.type == "cpu" and tensor.is_pinned() for tensor in tensors
    ):
        torch.accelerator.synchronize()


def mark(device: torch.device | None) -> Mark:
    """A mark on the device's current stream, or on the host's clock without streams."""
    if device is None or not has_streams(device):
        return Instant()
    event = torch.Event(device, enable_timing=True)
    # Orders nothing: the event passes when the stream has done what it was given so far.
    event.record(torch.accelerator.current_stream(device))
    return event


class Meter:
    """Milliseconds of the last finished work; 0 before the first. Reading never waits."""

    def __init__(self) -> None:
        # NOTE: bounded, because it may never be read; a thread may add while another reads.
        self.intervals: deque[tuple[Mark, Mark]] = deque(maxlen=UNREAD)
        self._last = 0.0

    def add(self, begin: Mark, end: Mark) -> None:
        self.intervals.append((begin, end))

    def read(self) -> float:
        while self.intervals and self.intervals[0][1].query():
            begin, end = self.intervals.popleft()
            self._last = begin.elapsed_time(end)  # type: ignore[arg-type]
        return self._last


class Executor(Protocol):
    """A stream of the device, or a thread."""

    def submit(self, work: Callable[[], None]) -> Any:
        """Do `work` after everything that the caller has issued so far. Returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """Order the ticket's work before all that the caller issues from now on."""

    def done(self, ticket: Any) -> bool:
        """The ticket's work is done. Never waits."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Memory of these tensors is not reused before the work submitted until then is done."""

    def mark(self) -> Mark:
        """A mark in the order of the work that calls this, else in the caller's order."""


class SideStream:
    """A stream of the accelerator. The device orders submits and waits; the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)

    def submit(self, work: Callable[[], None]) -> torch.Event:
        # Orders: everything issued on the caller's stream so far, then the work.
        issued = torch.accelerator.current_stream(self.device).record_event()
        self._stream.wait_event(issued)
        with self._stream:
            work()
        # Orders nothing yet: the ticket passes after the work, for `wait` and `done`.
        return self._stream.record_event()

    def wait(self, ticket: torch.Event) -> None:
        # Orders: the work, then everything that the caller's stream is given from now on.
        torch.accelerator.current_stream(self.device).wait_event(ticket)

    def done(self, ticket: torch.Event) -> bool:
        return ticket.query()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        # Orders: the work, then the reuse of memory that the caller's stream allocated.
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def mark(self) -> Mark:
        return mark(self.device)


class Worker:
    """A thread with few intra-op threads, started when it is first needed; it ends with its owner.

    A fork leaves the thread behind, and the child starts another.

    Args:
        threads: Bound of the intra-op threads.
        device: The accelerator whose events the thread polls.
    """

    def __init__(self, threads: int = 2, device: torch.device | None = None) -> None:
        self._threads, self._device = threads, device
        self.thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> threading.Event:
        # Orders: the work submitted before, then this; nothing that the caller does.
        if self.thread is None or not self.thread.is_alive():
            self._start()
        done = threading.Event()
        self._queue.put((work, done))
        return done

    def wait(self, ticket: threading.Event) -> None:
        # Orders: the work, then what the caller does next, on the host.
        while not ticket.wait(PATIENCE):
            if self.thread is None or not (self.thread.is_alive() or ticket.is_set()):
                raise RuntimeError(
                    "the thread that averages in host memory is gone: was this process forked? "
                    "Build the EMA in the process that updates it."
                )

    def done(self, ticket: threading.Event) -> bool:
        return ticket.is_set()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Host memory lives as long as it is referred to."""

    def mark(self) -> Mark:
        return Instant()

    def _start(self) -> None:
        # NOTE: the thread refers to the queue, not to self, or self would never be collected.
        self._queue: Tasks = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=_serve, args=(self._queue,), name="dist_ema", daemon=True
        )
        weakref.finalize(self, self._queue.put, None)
        threads, ready, device = torch.get_num_threads(), threading.Event(), self._device
        few = min(self._threads, threads)
        self._queue.put((lambda: _settle_in(few, device), ready))
        self.thread.start()
        ready.wait()
        # NOTE: the bound is the worker's alone; threads that are made later take the caller's.
        torch.set_num_threads(threads)


def _settle_in(threads: int, device: torch.device | None) -> None:
    # NOTE: a thread's first read of the number sets it to the process's, and would undo the bound.
    torch.get_num_threads()
    torch.set_num_threads(threads)
    if device is not None:
        # NOTE: a new thread is on device 0, and polling an event from there opens a context on it.
        torch.accelerator.set_device_index(device)


def _serve(tasks: Tasks) -> None:
    with torch.no_grad():
        while (task := tasks.get()) is not None:
            work, done = task
            try:
                work()
            finally:
                done.set()
            # NOTE: without this the last update's tensors would live until the next update.
            del task, work, done


def run_shielded(
    work: Callable[[], None],
    devices: Iterable[torch.device],
    patience: float,
    abandon: Callable[[], None] | None = None,
) -> None:
    """Run `work` in a thread, outside autograd, whatever signal handlers raise meanwhile.

    Handlers run in the main thread alone. What one raises is raised here when the work is done. A
    second interrupt, or `patience` seconds after the first one, end the wait.

    Args:
        work: What must not stop half way.
        devices: Those whose current streams the work continues.
        patience: Seconds.
        abandon: Called where the wait ends before the work.
    """
    # Orders: what the caller issued, then the work, then what the caller issues next.
    streams = [
        torch.accelerator.current_stream(device) for device in devices if has_streams(device)
    ]
    if torch.accelerator.is_available():
        # NOTE: set last, because a stream brings its device, and a new thread is on device 0.
        streams.append(torch.accelerator.current_stream())
    first, done = threading.Lock(), threading.Event()
    raised: list[BaseException] = []
    interrupts: list[BaseException] = []

    def run() -> None:
        if not first.acquire(blocking=False):
            return
        try:
            for stream in streams:
                torch.accelerator.set_stream(stream)
            with torch.inference_mode(False), torch.no_grad():
                work()
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    while not done.is_set():
        try:
            # NOTE: an interrupt does not tell whether a thread has started. Only one does the work.
            threading.Thread(target=run, name="dist_ema swap", daemon=True).start()
            if not done.wait(patience if interrupts else None):
                break
        except BaseException as interrupt:
            interrupts.append(interrupt)
            if len(interrupts) == 2:
                break
    if abandon and not done.is_set():
        abandon()
    for error in (*interrupts, *raised):
        raise error
