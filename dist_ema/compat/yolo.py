"""The ModelEMA of the YOLO repositories: `from dist_ema.compat.yolo import ModelEMA`."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from ..schedules import Ramp
from ._drop_ins import HolderDropIn
from ._module import ModuleAverage, ModuleFn

__all__ = ["ModelEMA"]


class ModelEMA(HolderDropIn):
    """An average of all floating weights and buffers with decay * (1 - exp(-updates / tau)).

    Integer buffers are the model's of the last update.

    Args:
        model: whose average `ema` is, in evaluation mode.
        decay: what the decay rises to.
        updates: the count to begin with.
        tau: how many updates the rise takes.
        module_fn: as for `swa_utils.AveragedModel`.

    Attributes:
        updates: the count; it may be set to resume.
        decay: the function that gives the decay of a count.
        enabled: False makes updates do nothing, as in ultralytics.

    Note:
        *Collective* under FSDP: construction. Under DDP one rank alone may keep it.
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
        schedule = Ramp(decay, tau)
        self._average = ModuleAverage(model, schedule, module_fn, evaluates=True)
        self.updates = updates
        self.decay: Callable[[float], float] = schedule
        self.enabled = True

    def update(self, model: nn.Module) -> None:
        """Move towards `model`. No collective, no host sync."""
        # ultralytics switches the average off by this attribute.
        if self.enabled:
            self.updates += 1
            self._average.move(model, self.decay(self.updates))

    def update_attr(
        self,
        model: nn.Module,
        include: Collection[str] = (),
        exclude: Collection[str] = ("process_group", "reducer"),
    ) -> None:
        """Set the attributes of `model` (names, classes, strides) on `ema`.

        Args:
            model: whose attributes are meant.
            include: their names; empty: all but private ones and those in `exclude`.
            exclude: names that are left out.
        """
        for name, value in vars(model).items():
            chosen = name in include or not include
            if chosen and not name.startswith("_") and name not in exclude:
                setattr(self.ema, name, value)
