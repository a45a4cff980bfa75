"""When the arithmetic runs.

An engine is three verbs. `update` may return before the shadows have moved; `fence` returns when live weights may be
overwritten; `settle` returns when shadows may be read. Each orders work, none of them is a collective.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .kernels import Plan

__all__ = ["Engine", "Gate", "Inline"]


class Engine(Protocol):
    """Runs the update of one plan."""

    def update(self, plan: Plan, weight: float | Tensor, number: int, guard: bool) -> None:
        """Start moving the shadows towards live; weight is 1 - decay, `number` counts the updates."""

    def fence(self) -> None:
        """Live weights may be overwritten after this."""

    def settle(self) -> None:
        """Shadows may be read after this."""


class Inline:
    """On the caller's stream, before `update` returns: the reference that every other engine must equal bit for bit."""

    def update(self, plan: Plan, weight: float | Tensor, number: int, guard: bool) -> None:
        plan.run(weight, number, guard)

    def fence(self) -> None:
        """The current stream orders the next write after the read."""

    def settle(self) -> None:
        """The current stream orders the next read after the write."""


class Gate:
    """The weight of an update whose step the device may have skipped: decided there, the host never waits.

    A skipped step has weight 0. Until one update was accepted, schedules whose first move copies go on copying.
    """

    def __init__(self) -> None:
        self._open = False  # some update was accepted for sure
        self._tried = 0  # updates that the device was free to skip
        self._skipped: Tensor | None = None  # how many of them it did skip, float32 []

    def weigh(self, weight: float, copies_first: bool, skip: Tensor | None) -> float | Tensor:
        """weight, 1 or 0. skip: [] on the device, not 0 if the step was skipped; None: it happened."""
        move: float | Tensor = weight
        if copies_first and not self._open and self._skipped is not None:
            move = torch.where(self._skipped >= self._tried, 1.0, weight)
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

    def reset(self, accepted: bool) -> None:
        """Start counting anew; `accepted`: an earlier run has accepted an update."""
        self.__init__()  # type: ignore[misc]
        self._open = accepted
