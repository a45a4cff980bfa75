"""When the arithmetic runs.

An engine is three verbs. `update` may return before the shadows have moved; `fence` returns when live weights may be
overwritten; `settle` returns when shadows may be read. Each orders work, none of them is a collective.

    compute   | forward | backward | step |  forward | backward | fence step |
    side                           update >==========>                          Overlapped: one pass, on a side stream
    copy                           update >=====>                               HostThread: live to a window ...
    thread                                     >=================>              ... and the average in host memory
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels import Plan

__all__ = ["Engine", "Executor", "Gate", "HostThread", "Inline", "Overlapped", "SideStream", "Worker", "choose"]


Weights = Sequence[float | Tensor]


class Engine(Protocol):
    """Runs the updates of a plan, in order."""

    deferred: bool  # live weights are still being read when `update` returns

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        """Start moving the shadows towards live; weights are 1 - decay of each average, `number` counts the updates."""

    def fence(self) -> None:
        """Live weights may be overwritten after this."""

    def settle(self) -> None:
        """Shadows may be read after this. Raises RuntimeError if an update failed out of sight."""


class Executor(Protocol):
    """A place beside the caller where work is done in order: a stream of the device, or a thread."""

    def submit(self, work: Callable[[], None]) -> Any:
        """Do `work` after everything that the caller has issued so far; returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """What the caller issues from now on comes after the ticket's work."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Whoever drops them, their memory is not reused before the work that was submitted until then is done."""


class Inline:
    """On the caller's stream, before `update` returns: the reference that every other engine must equal bit for bit."""

    deferred = False

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        plan.run(weights, number, guard)

    def fence(self) -> None:
        """The current stream orders the next write after the read."""

    def settle(self) -> None:
        """The current stream orders the next read after the write."""


class Overlapped:
    """Behind the next forward and backward: whoever overwrites live weights or reads shadows waits, nobody else."""

    deferred = True

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._ticket: Any = None
        self._weights: Weights = []
        self._plan: Plan | None = None

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        if plan is not self._plan:
            self._plan = plan
            self._executor.keep(plan.tensors)
        # NOTE: weights on the device are kept until the next update, or their memory would be reused while it is read.
        self._weights = weights
        self._ticket = self._executor.submit(lambda: plan.run(weights, number, guard))

    def fence(self) -> None:
        if self._ticket is not None:
            self._executor.wait(self._ticket)

    def settle(self) -> None:
        self.fence()  # one pass reads live and writes shadows


class HostThread:
    """Shadows in host memory: live weights go into a window there, and a thread averages from the window.

    `fence` waits for the copy only. At most one update is in flight. *Cost*: a window of the live weights' size in (pinned)
    host memory, 2 to 4 bytes per weight over the host link, nothing on the device.
    """

    def __init__(self, copier: Executor | None, worker: Executor) -> None:
        self._copier, self._worker = copier, worker
        self._copied: Any = None
        self._averaged: Any = None
        self._plan: Plan | None = None
        self._failed: str | None = None
        self.deferred = copier is not None

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        self.settle()  # the window is free again
        if plan is not self._plan:
            self._open_window(plan)
            if self._copier is not None:
                self._copier.keep([pair.live for pair in plan.pairs])
        windowed, copied = self._windowed, None
        here = [self._weights[k] if isinstance(weight, Tensor) else weight for k, weight in enumerate(weights)]
        if self._copier is None:
            self._copy(weights)
        else:
            self._copied = copied = self._copier.submit(lambda: self._copy(weights))
        self._kept = weights  # until the copy was waited for, their memory must not be reused

        def average() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                windowed.run(here, number, guard)
            except Exception as error:  # surfaces at the next call
                self._failed = (
                    f"update {number} of the average failed in the host thread: {type(error).__name__}: {error}"
                )

        self._averaged = self._worker.submit(average)

    def fence(self) -> None:
        if self._copied is not None and self._copier is not None:
            self._copier.wait(self._copied)

    def settle(self) -> None:
        self.fence()
        if self._averaged is not None:
            self._worker.wait(self._averaged)
        if self._failed is not None:
            raise RuntimeError(f"{self._failed}. The average is not usable any more; load an earlier one.")

    def _open_window(self, plan: Plan) -> None:
        """One arena per dtype for what the live side of the plan sends."""
        self._plan = plan
        self._copies: list[tuple[Tensor, Tensor]] = []
        pin = any(pair.live.device.type != "cpu" for pair in plan.pairs)
        arenas: dict[torch.dtype, Tensor] = {}
        for dtype in {pair.live.dtype for pair in plan.pairs}:
            n = sum(pair.live.numel() for pair in plan.pairs if pair.live.dtype == dtype)
            arenas[dtype] = torch.empty(n, dtype=dtype, pin_memory=pin)
        pairs = []
        for pair in plan.pairs:
            window, arenas[pair.live.dtype] = arenas[pair.live.dtype].tensor_split([pair.live.numel()])
            self._copies.append((window, pair.live))
            pairs.append(replace(pair, live=window))
        self._windowed = Plan(pairs, plan.seed)
        averages = max((len(pair.shadows) for pair in plan.pairs), default=0)
        self._weights = torch.zeros(averages, pin_memory=pin)

    def _copy(self, weights: Weights) -> None:
        for window, live in self._copies:
            window.copy_(live, non_blocking=True)
        for k, weight in enumerate(weights):
            if isinstance(weight, Tensor):
                self._weights[k].copy_(weight, non_blocking=True)


def choose(live: set[torch.device], host: bool) -> Engine:
    """The engine that hides an update best, for weights on `live`; host: shadows were asked into host memory."""
    if len(live) > 1:
        return Inline()  # one stream cannot order several devices
    (device,) = live
    aside = SideStream(device) if device.type in ("cuda", "xpu") else None  # the others order one stream
    if host:
        return HostThread(aside, Worker())
    return Inline() if aside is None else Overlapped(aside)


class SideStream:
    """A stream of the accelerator. Submitting and waiting are ordered on the device; the host goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def submit(self, work: Callable[[], None]) -> torch.Event:
        # Orders: everything issued on the compute stream so far, then the work.
        issued = torch.accelerator.current_stream(self._device).record_event()
        self._stream.wait_event(issued)
        with self._stream:
            work()
        return self._stream.record_event()

    def wait(self, ticket: torch.Event) -> None:
        # Orders: the work, then everything that the compute stream is given from now on.
        torch.accelerator.current_stream(self._device).wait_event(ticket)

    def keep(self, tensors: Iterable[Tensor]) -> None:
        # Orders: the work, then the reuse of memory that was allocated on the compute stream, when it is freed.
        for tensor in tensors:
            tensor.record_stream(self._stream)


class Worker:
    """A thread with few intra-op threads, started when it is first needed; it ends with its owner."""

    def __init__(self, threads: int = 2) -> None:
        self._threads = threads
        self._queue: Tasks = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> threading.Event:
        if self._thread is None:
            self._start()
        done = threading.Event()
        self._queue.put((work, done))
        return done

    def wait(self, ticket: threading.Event) -> None:
        ticket.wait()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Host memory belongs to whoever refers to it."""

    def _start(self) -> None:
        # NOTE: the thread knows the queue and nothing else of us, or we would never be collected.
        self._thread = threading.Thread(target=_serve, args=(self._queue,), name="dist_ema", daemon=True)
        weakref.finalize(self, self._queue.put, None)
        mine, ready = torch.get_num_threads(), threading.Event()
        few = min(self._threads, mine)
        self._queue.put((lambda: torch.set_num_threads(few), ready))
        self._thread.start()
        ready.wait()
        torch.set_num_threads(mine)  # the bound is the worker's; threads made later take ours


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


class Gate:
    """The weight of an update whose step the device may have skipped: decided there, the host never waits.

    A skipped step has weight 0. Until one update was accepted, schedules whose first move copies go on copying.
    """

    def __init__(self) -> None:
        self.reset(accepted=False)

    def reset(self, accepted: bool) -> None:
        """Start counting anew; `accepted`: an earlier run has accepted an update."""
        self._open = accepted  # some update was accepted for sure
        self._tried = 0  # updates that the device was free to skip
        self._skipped: Tensor | None = None  # how many of them it did skip, float32 []

    def weigh(self, weight: float, copies_first: bool, skip: Tensor | None) -> float | Tensor:
        """weight, 1 or 0. skip: [] on the device, not 0 if the step was skipped; None: it happened."""
        move: float | Tensor = weight
        if copies_first and not self._open:
            move = 1.0 if self._skipped is None else torch.where(self._skipped >= self._tried, 1.0, weight)
        if skip is None:
            self._open = True
            return move
        skipped = (skip != 0).to(torch.float32)
        self._skipped = skipped.clone() if self._skipped is None else self._skipped + skipped
        self._tried += 1
        return move * (1 - skipped)

    def count(self) -> int:
        """Updates skipped so far. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)
