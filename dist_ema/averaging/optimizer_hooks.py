"""Hooks on optimizers: an update after every step that really happened.

The pre-step hook fences (live weights are overwritten in the step and nowhere else); the post-step hook of the last-listed
optimizer moves the clock. A post hook fires once per real step under gradient accumulation, closures and GradScaler skips
alike, with one exception: a fused optimizer steps inside its kernel, so its hook also fires for a skipped step, and
`found_inf` is there on the device to say so. It becomes a weight of 0; the host never waits for it.

[Note: who holds whom]  An EMA holds its attachment, and an attachment the averages. The optimizer's hooks hold neither: an
EMA that nobody can reach any more is freed, shadows and all, and the next step says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, Protocol
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from .clock import Clock

__all__ = ["Attachment", "Averager"]


class Averager(Protocol):
    """What an attachment drives."""

    def before_step(self) -> None:
        """Live weights are about to be overwritten."""

    def settle(self) -> None:
        """No update is under way after this."""

    def begin(self) -> None:
        """Averaging begins, seeded from live."""

    def move(self, elapsed: float, skip: Tensor | None, guard: bool) -> None:
        """Update; skip: not 0 on the device if nothing happened."""


class Attachment:
    """What `EMA.attach` returns; `remove()` takes the hooks off again."""

    def __init__(
        self,
        averager: Averager,
        clock: Clock,
        optimizers: Sequence[Optimizer],
        every: int,
        start: int,
        elapsed: float | Callable[[], float],
        guard: bool,
    ) -> None:
        if not optimizers:
            raise ValueError("ema.attach() needs the optimizers that step the model.")
        every, start = _whole("every", every), _whole("start", start)
        if every < 1 or start < 0:
            raise ValueError(
                f"every must be 1 or more and start 0 or more, got every={every}, start={start}."
            )
        elapsed = elapsed if callable(elapsed) else _units(elapsed)
        inner = [_inner(optimizer) for optimizer in optimizers]
        self.every, self.start, self.guard = every, start, guard
        self._averager, self._clock, self._elapsed = averager, clock, elapsed
        self._skips: list[
            Tensor | None
        ] = []  # of the steps since the last update; None: it happened
        self._handles: list[Any] = []
        for optimizer in inner:
            self._handles.append(optimizer.register_step_pre_hook(_Hook(self._before)))
            self._handles.append(optimizer.register_step_post_hook(_Hook(self._note)))
        self._handles.append(inner[-1].register_step_post_hook(_Hook(self._stepped, last=True)))
        if clock.updates == 0 and clock.steps < start:
            clock.started = False

    def remove(self) -> None:
        """Take the hooks off; an update under way is waited for, as nobody else would. Twice is once.

        Raises RuntimeError if that update failed; the hooks are off all the same.
        """
        attached = self.active
        while self._handles:
            self._handles.pop().remove()
        if attached:
            self._averager.settle()

    def to_dict(self) -> dict[str, Any]:
        """What is worth keeping in a file; a callable elapsed is not."""
        return {
            "every": self.every,
            "start": self.start,
            "elapsed": None if callable(self._elapsed) else self._elapsed,
        }

    @property
    def active(self) -> bool:
        return bool(self._handles)

    def _before(self, *_: Any) -> None:
        self._averager.before_step()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._skips.append(getattr(optimizer, "found_inf", None))

    def _stepped(self, *_: Any) -> None:
        clock = self._clock
        clock.tick(float(self._elapsed() if callable(self._elapsed) else self._elapsed))
        if not clock.started:
            self._skips.clear()
            if clock.steps >= self.start:
                with torch.inference_mode(False), torch.no_grad():
                    self._averager.begin()
        elif (clock.steps - self.start) % self.every == 0:
            # NOTE: a window or table made in inference mode could never be written outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._averager.move(clock.pending, self._void(), self.guard)
            clock.pending = 0.0

    def _void(self) -> Tensor | None:
        """Not 0 on the device if every step since the last update was skipped; None: one of them happened for sure."""
        skips, self._skips = self._skips, []
        seen = [skip.reshape(()) for skip in skips if skip is not None]
        if not seen or len(seen) < len(skips):
            return None
        return torch.stack([skip.to(seen[0].device) for skip in seen]).amin()


class _Hook:
    """A hook that does not keep its owner alive ([Note: who holds whom])."""

    def __init__(self, method: Callable[..., None], last: bool = False) -> None:
        self._method, self._tells = WeakMethod(method), last

    def __call__(self, *args: Any) -> None:
        method = self._method()
        if method is not None:
            method(*args)
        elif self._tells:
            self._tells = False
            warnings.warn(
                "the EMA that was attached to this optimizer is gone, so nothing is averaged any more. Keep the EMA (or what "
                "ema.attach() returned) for as long as you train, or call ema.detach() before you drop it.",
                stacklevel=2,
            )


def _whole(name: str, steps: Any) -> int:
    """Of whatever integer type: it goes into files."""
    try:
        return index(steps)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of steps, got {steps!r}.") from None


def _units(elapsed: Any) -> float:
    """Of whatever numeric type: it goes into files."""
    try:
        number = float(elapsed)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"elapsed must be positive and finite, got {elapsed!r}.")
    return elapsed if type(elapsed) is int else number


def _inner(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's, whose own hooks cannot be registered. ZeRO's outer one is right."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"ema.attach() takes torch optimizers, got {type(optimizer).__name__}.")
    return optimizer
