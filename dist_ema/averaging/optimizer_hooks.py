"""`Attachment`: hooks on optimizers, an update after each step of all that really happened.

The pre-step hook fences: live weights are overwritten in the step and nowhere else. The post-step
hook moves the clock when every listed optimizer has stepped since the last update, in whatever
order. A post hook fires once per real step under gradient accumulation, closures and GradScaler
skips alike, with one exception. A fused optimizer steps inside its kernel, so its hook also fires
for a skipped step, and `found_inf` on the device tells. It becomes a weight of 0 there; the host
never waits for it.

[Note: steps in steps]  torch runs hooks around the `step` of every class that was instantiated. A
class whose `step` calls that of its parent runs them twice, if an instance of the
parent was made. The inner step is not the whole step, so its hooks do nothing.

[Note: who holds whom]  An EMA holds its attachment, and an attachment holds the averages. The
optimizer's hooks hold neither. When nothing else reaches the EMA it is freed, shadows and all. Its
hooks do nothing then, but for one that says so at the next step. That step takes the others off,
and the next `attach` to that optimizer the last one. They must not come off when the EMA is freed:
the garbage collector may free it while torch iterates over them.
"""

from __future__ import annotations

import itertools
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import index
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ..sharding import torch_internals, zero
from .averages import AveragedWeights
from .stepped_weights import steps_any

__all__ = ["Attachment"]

PATIENCE = 128  # steps of one optimizer without an update, after which the others are named
# Wrappers that take no hooks themselves and do nothing after the inner step: (package, class).
TRANSPARENT_OPTIMIZERS = (
    ("accelerate", "AcceleratedOptimizer"),
    ("lightning", "LightningOptimizer"),
    ("pytorch_lightning", "LightningOptimizer"),
)
# The code of every function that torch puts around a `step` to run its hooks.
_RUNS_HOOKS: Any = Optimizer.profile_hook_step(len).__code__  # type: ignore[attr-defined]
# Packages whose functions around `optimizer.step` do not write after it.
KNOWN_WRAPPERS = ("torch", "accelerate", "lightning", "pytorch_lightning")


class Attachment:
    """The handle that `EMA.attach` returns; `remove()` takes the hooks off again.

    Attributes:
        arguments: What `attach` was given, which must be alike on all ranks.
    """

    def __init__(
        self,
        weights: AveragedWeights,
        optimizers: Sequence[Optimizer],
        every: int,
        start: int,
        elapsed: float | Callable[[], float],
        guard: bool,
    ) -> None:
        if not optimizers:
            raise ValueError("ema.attach() needs the optimizers that step the model.")
        every, start = _whole_number("every", every), _whole_number("start", start)
        if every < 1 or start < 0:
            raise ValueError(
                f"every must be 1 or more and start 0 or more, got every={every}, start={start}."
            )
        if not callable(elapsed):
            elapsed = _units(elapsed)
            # A schedule that cannot take so many units says so now, and not in a later step.
            weights.clock.decays([a.schedule for a in weights.averages], every * elapsed)
        # Once each, as a round is over when every one of them has stepped.
        hooked = list(dict.fromkeys(map(_that_takes_hooks, optimizers)))
        self.every, self.start, self.guard = every, start, guard
        self.arguments: dict[str, Any] = {}
        self._weights, self._clock, self._elapsed = weights, weights.clock, elapsed
        self._names = [type(optimizer).__name__ for optimizer in hooked]
        self._places = {id(optimizer): place for place, optimizer in enumerate(hooked)}
        self._steps = [0] * len(hooked)  # of each optimizer since the last round
        # Flags of the steps since the last update; None: the step happened.
        self._skips: list[Tensor | None] = []
        self._unlisted: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._wrapped: set[int] = set()  # optimizers whose step was named
        self._hooks, self.active, self._is_uneven = ExitStack(), True, False
        for optimizer in hooked:
            _forget_dead_hooks(optimizer._optimizer_step_post_hooks, warned=True)
            self._keep(optimizer.register_step_pre_hook(_StepHook(self._before, others="post")))
            if isinstance(optimizer, zero.EngineSteps):
                self._keep(optimizer.register_step_post_hook(_StepHook(self._stepped)))
        self._keep(register_optimizer_step_pre_hook(_StepHook(self._before_any, others="post")))
        # Of all optimizers of torch's: these hooks run after an optimizer's own.
        self._every_step = self._keep(register_optimizer_step_post_hook(_StepHook(self._stepped)))
        # On one optimizer only, so that its warning comes once per step.
        self._last = hooked[-1].register_step_post_hook(_StepHook(self._alive, tells=True))
        # A resumed average has started, whatever `start` says now.
        if weights.clock.updates == 0 and weights.clock.steps < start:
            weights.clock.started = False

    def _keep(self, handle: RemovableHandle) -> RemovableHandle:
        """Keep a hook until `remove`, and take off what dead attachments left beside it."""
        _forget_dead_hooks(handle.hooks_dict_ref(), warned=True)
        return self._hooks.enter_context(handle)

    def remove(self) -> None:
        """Take the hooks off; the update in flight is waited for. Idempotent.

        Raises:
            RuntimeError: That update failed. The hooks are off all the same.
        """
        self._hooks.close()
        self._last.remove()
        if self.active:
            self.active, self._weights.bypassed = False, 0
            self._weights.settle()

    def to_dict(self) -> dict[str, Any]:
        """The arguments that files keep; a callable elapsed is not one."""
        elapsed = None if callable(self._elapsed) else self._elapsed
        return {"every": self.every, "start": self.start, "elapsed": elapsed}

    def _alive(self, *_: Any) -> None:
        """The hook that calls this tells when it no longer can."""

    def _before(self, *_: Any) -> None:
        # The update reads what hooks write that were registered since (a projection).
        hooks: Any = self._every_step.hooks_dict_ref()
        later = itertools.takewhile(self._every_step.id.__ne__, reversed(hooks))
        if not all(isinstance(hooks[key], _StepHook) for key in later):
            hooks.move_to_end(self._every_step.id)
        self._weights.before_step()

    def _before_any(self, optimizer: Optimizer, *_: Any) -> None:
        # Those of transformers' per-layer optimizers step in the backward, before the listed one.
        if self._is_unlisted(optimizer):
            self._weights.await_reads()

    def _is_unlisted(self, optimizer: Optimizer) -> bool:
        """It steps averaged weights, and is not attached."""
        if id(optimizer) in self._places:
            return False
        if optimizer not in self._unlisted:
            self._unlisted[optimizer] = steps_any([optimizer], self._weights)
        return self._unlisted[optimizer]

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_inside_step(optimizer):
            return
        # Counted, so that a verb can say that weights are trained which no update follows.
        if id(optimizer) not in self._places:
            self._weights.bypassed += self._is_unlisted(optimizer)
            return
        self._warn_of_wrapped_step(optimizer)
        # A fused optimizer skips on the device, where GradScaler has left this flag.
        self._skips.append(getattr(optimizer, "found_inf", None))
        steps, place = self._steps, self._places[id(optimizer)]
        steps[place] += 1
        if all(steps):
            self._steps = [0] * len(steps)
            self._round()
        elif steps[place] == PATIENCE:
            silent = {name for name, count in zip(self._names, steps, strict=True) if not count}
            warnings.warn(
                f"{self._names[place]} has stepped {PATIENCE} times, and "
                f"{', '.join(sorted(silent))} never since: no update comes until every optimizer "
                "that ema.attach() was given has stepped. Leave out the one that does not train.",
                stacklevel=4,
            )
        elif steps[place] > 1 and not self._is_uneven and torch_internals.is_in_backward():
            self._is_uneven = True
            warnings.warn(
                f"{steps.count(0)} of {len(steps)} optimizers did not step in the last backward "
                "(an expert that no token chose?). One update comes when all have stepped, so the "
                "average moves less often than the weights: call ema.update() after every "
                "backward in place of ema.attach().",
                stacklevel=4,
            )

    def _warn_of_wrapped_step(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._wrapped or not _is_wrapped(optimizer):
            return
        self._wrapped.add(id(optimizer))
        warnings.warn(
            f"{type(optimizer).__name__}.step was replaced on the optimizer itself or its "
            "class. What the new one writes after the inner step comes with the next update: call "
            "ema.update() after step() instead of ema.attach() if it writes (a clamp, a "
            "projection).",
            stacklevel=5,
        )

    def _round(self) -> None:
        """Every optimizer has stepped: the clock moves, and every so often the average."""
        clock = self._clock
        self._weights.bypassed = 0
        clock.tick(float(self._elapsed() if callable(self._elapsed) else self._elapsed))
        if not clock.started:
            self._skips.clear()
            if clock.steps >= self.start:
                with torch.inference_mode(False), torch.no_grad():
                    self._weights.begin()
        elif (clock.steps - self.start) % self.every == 0:
            # NOTE: a window or table made in inference mode could never be written outside it.
            with torch.inference_mode(False), torch.no_grad():
                self._weights.move(clock.pending, self._all_skipped(), self.guard)
                clock.pending = 0.0
                self._weights.updated()

    def _all_skipped(self) -> Tensor | None:
        """Not 0 on the device if every step since the last update was skipped.

        None: one of them happened for sure.
        """
        skips, self._skips = self._skips, []
        flags = [skip for skip in skips if skip is not None]
        # NOTE: two optimizers may have their flags on two devices; a copy between them is no host
        # sync.
        seen = [flag.reshape(()).to(flags[0].device) for flag in flags]
        return torch.stack(seen).amin() if seen and len(seen) == len(skips) else None


class _StepHook:
    """A hook that does not keep its owner alive ([Note: who holds whom])."""

    def __init__(
        self, method: Callable[..., None], tells: bool = False, others: str = "pre"
    ) -> None:
        self.method, self.tells = WeakMethod(method), tells
        self._is_warned, self._others = False, f"_optimizer_step_{others}_hooks"
        # NOTE: a compiled step would trace the update: minutes, and for these addresses alone.
        self._untraced = torch.compiler.disable(self._run)

    def __call__(self, *args: Any) -> None:
        self._untraced(*args)

    def _run(self, optimizer: Any, *args: Any) -> None:
        method = self.method()
        if method is not None:
            method(optimizer, *args)
            return
        # NOTE: torch iterates over the hooks of this kind, so only the others can go.
        _forget_dead_hooks(getattr(optimizer, self._others))
        if self.tells and not self._is_warned:
            self._is_warned = True
            warnings.warn(
                "the EMA that was attached to this optimizer is gone, so nothing is averaged any "
                "more. Keep the EMA (or what ema.attach() returned) for as long as you train, or "
                "call ema.detach() before you drop it.",
                stacklevel=2,
            )


def _forget_dead_hooks(hooks: Any, warned: bool = False) -> None:
    """Take off what attachments left that are gone; warned: those that have said so too."""
    for key, hook in list(hooks.items()):
        if isinstance(hook, _StepHook) and hook.method() is None and (warned or not hook.tells):
            del hooks[key]


def _whole_number(name: str, steps: Any) -> int:
    """The number as an int, because files hold it. Raises ValueError for anything else."""
    try:
        return index(steps)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of steps, got {steps!r}.") from None


def _units(elapsed: Any) -> float:
    """The number as an int or float, because files hold it. Else raises ValueError."""
    try:
        number = float(elapsed)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"elapsed must be positive and finite, got {elapsed!r}.")
    return elapsed if type(elapsed) is int else number


def _that_takes_hooks(optimizer: Any) -> Optimizer | zero.EngineSteps:
    """The optimizer whose hooks fire when its step is done, and after which no weight is written.

    Raises:
        ValueError: No such optimizer is there: a wrapper (Lookahead, SAM, ZeRO) that may write
            after the inner step.
    """
    if zero.is_engine(optimizer):
        return zero.EngineSteps.of(optimizer)
    while _is_transparent(optimizer):
        optimizer = optimizer.optimizer
    # NOTE: Optimizer.__init__ patches `step` of the class to call hooks; a wrapper that skips it is
    # never hooked.
    kind = type(optimizer)
    fires = issubclass(kind, Optimizer) and getattr(kind.step, "hooked", False)
    if not fires or "_optimizer_step_post_hooks" not in vars(optimizer):
        raise ValueError(
            f"ema.attach() cannot hook {type(optimizer).__name__}: it takes torch optimizers whose "
            "step hooks fire. A wrapper may write the weights after its inner optimizer has "
            "stepped, so call ema.update() after its step() instead. Under DeepSpeed give "
            "ema.attach() the engine: its optimizers step before the model's weights are written."
        )
    return optimizer  # type: ignore[no-any-return]


def _is_inside_step(optimizer: Any) -> bool:
    """The hooks of this optimizer run inside another `step` of it ([Note: steps in steps])."""
    steps = (vars(optimizer_class).get("step") for optimizer_class in type(optimizer).__mro__)
    if sum(getattr(step, "hooked", False) for step in steps) < 2:
        return False
    running = sum(
        frame.f_code is _RUNS_HOOKS and frame.f_locals.get("self") is optimizer
        for frame, _ in traceback.walk_stack(sys._getframe(1))
    )
    return running > 1


def _is_wrapped(optimizer: Any) -> bool:
    """A function stands around the optimizer's step that no library known here put there."""
    step = None if isinstance(optimizer, zero.EngineSteps) else optimizer.step
    while step is not None and getattr(step, "__code__", None) is not _RUNS_HOOKS:
        module = getattr(step, "__globals__", {}).get("__name__", "")
        if module.split(".")[0] not in KNOWN_WRAPPERS:
            return True
        step = getattr(step, "__wrapped__", None)
    return False


def _is_transparent(optimizer: Any) -> bool:
    kind = type(optimizer)
    return (kind.__module__.split(".")[0], kind.__name__) in TRANSPARENT_OPTIMIZERS
