"""`SkippedSteps`: steps that GradScaler skipped, accepted ones; counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .executors import Mark, mark

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """The weight of an update whose step the device may have skipped; the host never waits.

    A skipped step has weight 0. Until one update was accepted, schedules whose first move copies
    go on copying.
    """

    def __init__(self) -> None:
        self.reset(accepted=False)

    def reset(self, accepted: bool) -> None:
        """Start counting anew. accepted: an earlier run has accepted an update."""
        self._accepted = accepted  # some update was accepted for sure
        self._tried = 0  # updates that the device was free to skip
        self._skipped: Tensor | None = None  # how many of them it skipped, float32 []
        self._known = 0  # the last count that reached the host
        self._request: tuple[Tensor, Mark] | None = None  # a count on the way to the host

    def weigh(self, weight: float, copies_first: bool, skip: Tensor | None) -> float | Tensor:
        """`weight`, 1 or 0.

        Args:
            weight: 1 - decay of this update.
            copies_first: The first move of the schedule copies.
            skip: [] on a device, not 0 if the step was skipped; None: it happened.
        """
        move: float | Tensor = weight
        if copies_first and not self._accepted:
            move = 1.0  # while the device has skipped every update
            if self._skipped is not None:
                # NOTE: where() of two numbers rounds them to the default dtype, perhaps bfloat16.
                ones = torch.ones_like(self._skipped)
                move = torch.where(self._skipped >= self._tried, ones, ones * weight)
        if skip is None:
            self._accepted = True
            return move
        # NOTE: optimizers may lie on other devices in later updates; the first one's counts.
        device = skip.device if self._skipped is None else self._skipped.device
        skipped = (skip != 0).to(device, torch.float32)
        self._skipped = skipped.clone() if self._skipped is None else self._skipped + skipped
        self._tried += 1
        return move * (1 - skipped)

    def count(self) -> int:
        """Updates skipped so far. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def heard(self) -> int:
        """Updates skipped, as far as the host knows; asks the device for the rest. Never waits."""
        if self._skipped is None or self._skipped.device.type == "cpu":
            return self.count()
        if self._request is not None and self._request[1].query():
            self._known, self._request = int(self._request[0]), None
        if self._request is None:
            answer = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
            # Orders: the copy, then the mark, so that the answer is whole when the mark has passed.
            self._request = (
                answer.copy_(self._skipped, non_blocking=True),
                mark(self._skipped.device),
            )
        return self._known
