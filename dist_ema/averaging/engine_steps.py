"""Step hooks for a DeepSpeed engine, in the place of a torch optimizer's.

The hooks of DeepSpeed's inner optimizer fire before the 16-bit copies are written, and for each
parameter group. Only the end of `engine.step()` says that a step is complete, and
`was_step_applied()` that it happened: accumulation and overflows skip it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..sharding.zero import is_engine

__all__ = ["EngineSteps", "stepped_parameters"]


def stepped_parameters(optimizer: Any) -> list[Tensor]:
    """What an optimizer holds, and of an engine the weights that it trains."""
    if is_engine(optimizer):
        return list(optimizer.parameters())
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class EngineSteps:
    """The step hooks of one engine. Made once, and kept on it."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._step = engine, engine.step
        self._before: OrderedDict[int, Callable[..., None]] = OrderedDict()
        # Named as those of torch's optimizers, among which an attachment looks for dead ones.
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        engine.step = self.step

    @classmethod
    def of(cls, engine: Any) -> EngineSteps:
        """Those that are on the engine already, or new ones."""
        steps = getattr(engine.step, "__self__", None)
        return steps if isinstance(steps, cls) else cls(engine)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`engine.step()`, between the hooks."""
        for hook in list(self._before.values()):
            hook(self, args, kwargs)
        result = self._step(*args, **kwargs)
        if self._engine.was_step_applied():
            for hook in list(self._optimizer_step_post_hooks.values()):
                hook(self, args, kwargs)
        return result

    def register_step_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Run `hook` before every call of `engine.step()`."""
        return _registered(self._before, hook)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Run `hook` after every step that was applied."""
        return _registered(self._optimizer_step_post_hooks, hook)


def _registered(
    hooks: OrderedDict[int, Callable[..., None]], hook: Callable[..., None]
) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
