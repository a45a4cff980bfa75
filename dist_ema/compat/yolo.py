"""The ModelEMA of the YOLO repositories: `from dist_ema.compat.yolo import ModelEMA`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ..schedules import Ramp
from ._module import Holder, ModuleFn, evaluating

__all__ = ["ModelEMA"]


class ModelEMA(Holder):
    """An average of all floating weights and buffers, whose decay rises as decay * (1 - exp(-updates / tau)).

    `ema` is the module, in evaluation mode; `updates` counts, and may be set to resume; `decay` is a function of it.
    Integer buffers are the model's of the last update. module_fn: as for `AveragedModel`. *Collective* under FSDP:
    construction; under DDP one rank alone may keep it.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        updates: int = 0,
        *,
        tau: float = 2000,
        module_fn: ModuleFn | None = None,
    ) -> None:
        self._copied = evaluating(model, module_fn, Ramp(decay, tau), buffers="average")
        self.updates = updates
        self.decay: Callable[[float], float] = lambda n: -decay * math.expm1(-n / tau)

    def update(self, model: nn.Module) -> None:
        """One move towards `model`. No collective, no host sync."""
        self.updates += 1
        self._copied.update(model, self.decay(self.updates))

    def update_attr(
        self,
        model: nn.Module,
        include: Collection[str] = (),
        exclude: Collection[str] = ("process_group", "reducer"),
    ) -> None:
        """Set the attributes of `model` (names, classes, strides) on `ema`: those in `include`, or if that is empty all but
        private ones and those in `exclude`."""
        given: dict[str, Any] = vars(model)
        for name, value in given.items():
            if (
                (name in include or not include)
                and not name.startswith("_")
                and name not in exclude
            ):
                setattr(self.ema, name, value)
