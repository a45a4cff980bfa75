"""Engines: when an update runs (at once, on a side stream, on a host thread), what waits for it.

An engine has three verbs. `update` may return before the shadows have moved; after `fence` live
weights may be overwritten; after `settle` shadows may be read. Each orders work, and none of them
is a collective.

    compute   | forward | backward | step |  forward | backward | fence step |
    side                           update >==========>                          Overlapped
    copy                           update >=====>                               HostThread: to a
    thread                                     >=================>              window, and from it

[Note: times]  Every engine times its updates and what it adds to a step, with marks that are read
later, so that timing never waits. On an accelerator a mark is an event, elsewhere the host's clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .executors import NAP, Executor, Instant, Meter, SideStream, Worker, has_streams, mark
from .kernels.eager import UpdatePlan
from .kernels.gpu_plan import FusedPlan
from .kernels.pairs import ShadowPair, Weights, join, touch

__all__ = ["Engine", "HostThread", "Inline", "Overlapped", "Plan", "Times", "choose_engine"]

Plan: TypeAlias = "UpdatePlan | FusedPlan"


@dataclass(frozen=True)
class Times:
    """Facts about the updates that are known without waiting ([Note: times])."""

    update_ms: float = 0.0  # of the last finished update
    stall_ms: float = 0.0  # that it added to the training step
    lag: int = 0  # updates submitted and not finished


class Engine(Protocol):
    """Runs the updates of a plan, in order."""

    deferred: bool  # live weights are still being read when `update` returns
    window_bytes: int  # of host memory, besides the shadows

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        """Start moving the shadows towards live. `number` counts the updates."""

    def fence(self) -> None:
        """Orders: all reads of live weights, then what overwrites them."""

    def settle(self) -> None:
        """Orders: all updates, then what reads the shadows.

        Raises:
            RuntimeError: An update failed in another thread.
        """

    def times(self) -> Times:
        """The times of the last finished update. Never waits."""


class Inline:
    """Runs updates on the caller's stream. Other engines must equal it bit for bit.

    Args:
        device: Where updates are timed; None: on the host.
    """

    deferred = False
    window_bytes = 0

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._meter = Meter()

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        begin = mark(self._device)
        plan.run(weights, number, guard)
        self._meter.add(begin, mark(self._device))

    def fence(self) -> None:
        """Do nothing: the caller's stream orders the next write after the read."""

    def settle(self) -> None:
        """Do nothing: the caller's stream orders the next read after the write."""

    def times(self) -> Times:
        spent = self._meter.read()
        return Times(spent, spent)  # the step waits for all of it


class Overlapped:
    """Run updates behind the next forward and backward; `fence` and `settle` wait on the device."""

    deferred = True
    window_bytes = 0

    def __init__(self, executor: Executor) -> None:
        self.executor, self._pass = executor, _InFlight(executor)
        # NOTE: weights are kept with their ticket, so that no memory is reused while it is read.
        self._tickets: deque[tuple[Any, Weights]] = deque()
        self._updates = Meter()
        self._plan: Plan | None = None

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        if plan is not self._plan:
            self._plan = plan
            self.executor.keep(plan.tensors)

        def run() -> None:
            begin = self.executor.mark()
            plan.run(weights, number, guard)
            self._updates.add(begin, self.executor.mark())

        # Orders: the optimizer's step, then this update.
        self._tickets.append((self._pass.submit(run), weights))
        self._lag()  # keeps the list short

    def fence(self) -> None:
        self._pass.wait(timed=True)

    def settle(self) -> None:
        self._pass.wait()  # one pass reads live and writes shadows

    def times(self) -> Times:
        return Times(self._updates.read(), self._pass.stalls.read(), self._lag())

    def _lag(self) -> int:
        while self._tickets and self.executor.done(self._tickets[0][0]):
            self._tickets.popleft()
        return len(self._tickets)


class _InFlight:
    """The last work given to an executor, and how long the training step waited for it."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._ticket: Any = None
        self._timed = False
        self.stalls = Meter()

    def submit(self, work: Callable[[], None]) -> Any:
        self._ticket, self._timed = self.executor.submit(work), False
        return self._ticket

    def wait(self, timed: bool = False) -> None:
        """Orders: the work, then what is issued from now on. timed: a training step waits."""
        if self._ticket is None:
            return
        begin = self.executor.mark() if timed and not self._timed else None
        # NOTE: every time, because the caller's stream may be another one now.
        self.executor.wait(self._ticket)
        if begin is not None:
            self.stalls.add(begin, self.executor.mark())
            self._timed = True


class HostThread:
    """Shadows in host memory: live weights go into a window, a thread averages from there.

    `fence` waits for the copy only. At most one update is in flight. The thread asks the device
    whether the copy is done, which the capture of a CUDA graph forbids: capture before the first
    update, or settle (`swap`, `metrics`) first.

    Args:
        copier: Copies live to the window; None: the caller does.
        worker: Averages.

    Note:
        *Cost*: one window of the live weights' size in (pinned) host memory, whose allocator may
        round it up to a power of two; 2 to 4 bytes per weight over the host link, in one copy per
        run of neighbours; nothing on the device.
    """

    def __init__(self, copier: Executor | None, worker: Executor) -> None:
        self._copier, self.worker = copier, worker
        self._copying = None if copier is None else _InFlight(copier)
        self._averaged: Any = None
        self._plan: Plan | None = None
        self._failed: str | None = None
        self._averages, self._submits = Meter(), Meter()
        self.deferred = copier is not None
        self.window_bytes = 0

    def update(self, plan: Plan, weights: Weights, number: int, guard: bool) -> None:
        begin = Instant()
        self.settle()  # orders: the last average, then the next copy into its window
        if plan is not self._plan:
            self._open_window(plan)
        copied = None
        if self._copying is None:
            self._copy(weights)
        else:
            # Orders: the optimizer's step, then the copy.
            copied = self._copying.submit(lambda: self._copy(weights))
        self._kept = weights  # until the copy was waited for, their memory must not be reused
        self._averaged = self._submit_average(copied, weights, number, guard)
        self._submits.add(begin, Instant())

    def _submit_average(self, copied: Any, weights: Weights, number: int, guard: bool) -> Any:
        on_host = [
            self._weights[k] if isinstance(weight, Tensor) else weight
            for k, weight in enumerate(weights)
        ]
        windowed = self.windowed

        def average() -> None:
            try:
                self._await_copy(copied)
                begin = self.worker.mark()
                windowed.run(on_host, number, guard)
                self._averages.add(begin, self.worker.mark())
            except BaseException as error:  # surfaces at the next call
                self._failed = (
                    f"update {number} of the average failed in the host thread: "
                    f"{type(error).__name__}: {error}"
                )

        return self.worker.submit(average)

    def _await_copy(self, copied: Any) -> None:
        """Orders: the copy, then the average; in the thread."""
        # NOTE: synchronize() would spin on a core, because torch.Event ignores blocking=True.
        while self._copier is not None and not self._copier.done(copied):
            time.sleep(NAP)

    def fence(self) -> None:
        self._refuse_failed()
        if self._copying is not None:
            self._copying.wait(timed=True)

    def settle(self) -> None:
        # The thread has waited for the copy.
        if self._averaged is not None:
            self.worker.wait(self._averaged)
        self._refuse_failed()

    def times(self) -> Times:
        lag = self._averaged is not None and not self.worker.done(self._averaged)
        stalled = 0.0 if self._copying is None else self._copying.stalls.read()
        return Times(self._averages.read(), self._submits.read() + stalled, int(lag))

    def _refuse_failed(self) -> None:
        if self._failed is not None:
            raise RuntimeError(
                f"{self._failed}. This average is not usable any more: call ema.detach(), or build "
                "the EMA anew and load an earlier average."
            )

    def _open_window(self, plan: Plan) -> None:
        """Make one arena per dtype for the live side of the plan."""
        # NOTE: the old window is free before the new one is allocated, and if that fails the next
        # update tries again.
        self._plan, self.copies, self.windowed = None, [], UpdatePlan([])
        pin = any(pair.live.device.type != "cpu" for pair in plan.pairs)
        pairs: list[ShadowPair] = []
        for dtype in dict.fromkeys(pair.live.dtype for pair in plan.pairs):
            pairs_of_dtype = [pair for pair in plan.pairs if pair.live.dtype == dtype]
            sizes = [len(pair.live) for pair in pairs_of_dtype]
            arena = torch.empty(sum(sizes), dtype=dtype, device="cpu", pin_memory=pin)
            windows = zip(pairs_of_dtype, arena.split(sizes), strict=True)
            pairs += [replace(pair, live=window) for pair, window in windows]
            self.copies += _runs(arena, [pair.live for pair in pairs_of_dtype])
        self.windowed = UpdatePlan(pairs, plan.seed)
        # The weights of an update, which may be tensors on the device, have a place in the window
        # too.
        averages = max((len(pair.shadows) for pair in plan.pairs), default=0)
        self._weights = torch.zeros(averages, dtype=torch.float32, device="cpu", pin_memory=pin)
        self.window_bytes = sum(window.nbytes for window, _ in self.copies) + self._weights.nbytes
        self._plan = plan

    def _copy(self, weights: Weights) -> None:
        ordered = self._copier is not None  # else nothing tells when a copy has arrived
        for window, live in self.copies:
            window.copy_(live, non_blocking=ordered)
        for k, weight in enumerate(weights):
            if isinstance(weight, Tensor):
                self._weights[k].copy_(weight, non_blocking=ordered)


def _runs(arena: Tensor, lives: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(part of the arena, live tensors that lie end to end in the model), in order."""
    runs: list[tuple[Tensor, Tensor]] = []
    start = 0
    for live in lives:
        if runs and touch(runs[-1][1], live):
            earlier = runs.pop()[1]
            live = join([earlier, live])
            start -= len(earlier)
        if len(live):
            runs.append((arena[start : start + len(live)], live))
            start += len(live)
    return runs


def choose_engine(live: Collection[torch.device], host: bool, overlap: bool = True) -> Engine:
    """The engine that hides an update best.

    Args:
        live: The devices of the live weights.
        host: The shadows lie in host memory, as was asked for.
        overlap: Hide the update behind the next step.
    """
    # NOTE: devices without streams order all work by themselves; one stream orders one device.
    streamed = [device for device in live if has_streams(device)]
    if not overlap or len(live) > 1:
        return Inline(streamed[0] if streamed else None)
    if not streamed:
        return HostThread(None, Worker()) if host else Inline()
    side_stream = SideStream(streamed[0])
    return HostThread(side_stream, Worker(device=streamed[0])) if host else Overlapped(side_stream)
