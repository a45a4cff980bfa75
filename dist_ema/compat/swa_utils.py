"""torch.optim.swa_utils: `AveragedModel` with avg_fn or multi_avg_fn, `update_bn`, SWALR.

from dist_ema.compat.swa_utils import AveragedModel, update_bn
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from ..recipes import batchnorm
from ..schedules import Constant, Schedule, Uniform
from ..sharding import discovery
from ._drop_ins import Count, ModuleDropIn
from ._module import Device, ModuleAverage, ModuleFn, UpdateRule

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

Number = Tensor | float  # of models in the average
AvgFn = Callable[[Tensor, Tensor, Number], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Number], None]


@dataclass(frozen=True)
class _Rule:
    """A schedule as an averaging function of one tensor, or of lists in place.

    `AveragedModel` takes the schedule out of it.
    """

    schedule: Schedule

    @torch.no_grad()
    def __call__(self, averaged: Any, current: Any, num_averaged: Number) -> Any:
        # The clock of the schedule is 1 at the first average.
        weight = 1 - self.schedule(float(num_averaged) + 1, 1.0)
        if isinstance(averaged, Tensor):
            return torch.lerp(averaged, current.to(averaged), weight)
        return torch._foreach_lerp_(list(averaged), list(current), weight)


def get_ema_avg_fn(decay: float = 0.999) -> _Rule:
    """decay * averaged + (1 - decay) * current. Raises ValueError for a decay outside [0, 1]."""
    return _Rule(Constant(decay))


def get_swa_avg_fn() -> _Rule:
    """The plain mean of all models so far."""
    return _Rule(Uniform())


get_ema_multi_avg_fn, get_swa_multi_avg_fn = get_ema_avg_fn, get_swa_avg_fn


class AveragedModel(ModuleDropIn):
    """A running average of a model: the plain mean, or what `avg_fn` or `multi_avg_fn` says.

    Keys of `state_dict` are `n_averaged` and `module.NAME`.

    Args:
        model: plain, or wrapped first by DDP or FSDP ([Note: the copy] in _module).
        device: the device of the average.
        avg_fn: one of this module's, or any function that works element by element. It is given
            what this rank averages: whole weights where nothing is sharded.
        multi_avg_fn: the same on lists.
        use_buffers: average floating buffers. Else, and integers always, buffers are those of the
            model at the last update.
        module_fn: builds and wraps the module that is to hold the average.

    Raises:
        ValueError: both functions are given.

    Note:
        *Collective* under FSDP: construction and `load_state_dict`.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: Device = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("AveragedModel takes one of avg_fn and multi_avg_fn, got both.")
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers
        rule = self._rule()
        self._use(
            ModuleAverage(
                model,
                rule.schedule if isinstance(rule, _Rule) else Uniform(),
                module_fn,
                device=device,
                buffers="average" if use_buffers else "copy",
            )
        )
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self._count = Count()

    def _rule(self) -> AvgFn | MultiAvgFn:
        return self.multi_avg_fn or self.avg_fn or get_swa_multi_avg_fn()

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model as it is now; the first one is copied.

        Note:
            No collective. A host sync only after another writer changed `n_averaged`.
        """
        averaged, rule = self._count.of(self.n_averaged), self._rule()
        move: float | UpdateRule = self._apply_functions
        if averaged == 0:
            move = 0.0
        elif isinstance(rule, _Rule):
            move = rule.schedule(averaged + 1, 1.0)
        self.copied.move(model, move)
        self.copied.copy_rest()
        self._count.up(self.n_averaged)

    def _apply_functions(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        same_form: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for average, live in pairs:
            if self.avg_fn is not None:
                average.copy_(self.avg_fn(average, live, self.n_averaged.to(average.device)))
            same_form.setdefault((average.device, average.dtype), []).append((average, live))
        # torch groups its lists by device and dtype before it calls multi_avg_fn, so this does.
        for (device, _), group in same_form.items():
            if self.multi_avg_fn is not None:
                averages, lives = map(list, zip(*group, strict=True))
                self.multi_avg_fn(averages, lives, self.n_averaged.to(device))


def update_bn(loader: Iterable[Any], model: nn.Module, device: Device = None) -> None:
    """Give every BatchNorm the statistics of what it sees over the whole loader.

    A model without BatchNorm is left alone. See [Note: no training mode] in recipes.layer_watch.

    Args:
        loader: batches, or tuples and lists whose first element is the batch.
        model: an `AveragedModel`, or any module.
        device: where batches go; None leaves them.

    Note:
        *Collective* where the model is sharded, or DDP wrapped it at the last update of its
        average. The statistics are those of all ranks' data then.
    """

    def forward(module: nn.Module, batch: Any) -> object:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        return module(inputs if device is None else inputs.to(device))

    def over_all(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
        if any(
            isinstance(module, batchnorm.LAYERS) and module.running_mean is not None
            for module in model.modules()
        ):
            batchnorm.recalibrate(
                model, loader, sys.maxsize, forward=forward, progress=False, group=group
            )

    copied = model.copied if isinstance(model, ModuleDropIn) else None
    if copied is None:
        over_all(model)
    elif copied.module is None:
        with copied.average.swap() as ema:
            over_all(ema.model)
    else:
        # The copy is not wrapped; DDP around the model knows the ranks.
        wrapped = copied.module if copied.given is None else copied.given
        over_all(copied.ema, discovery.find_shards(wrapped).group)
