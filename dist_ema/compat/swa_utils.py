"""torch.optim.swa_utils: `from dist_ema.compat.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from ..schedules import Constant, Schedule, Uniform
from ..sharding import discovery
from ._module import CopiedModule, Count, ModuleAverage, ModuleFn, recalibrate_all

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]


@dataclass(frozen=True)
class _Rule:
    """A schedule in the form of an averaging function; `AveragedModel` takes the schedule out of it."""

    schedule: Schedule

    def weight(self, averaged: Any) -> float:
        """averaged: how many models the average holds so far."""
        return 1 - self.schedule(float(averaged) + 1, 1.0)


class _One(_Rule):
    @torch.no_grad()
    def __call__(self, averaged: Tensor, current: Tensor, num_averaged: Any) -> Tensor:
        return torch.lerp(averaged, current.to(averaged), self.weight(num_averaged))


class _Many(_Rule):
    @torch.no_grad()
    def __call__(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Any
    ) -> None:
        torch._foreach_lerp_(list(averaged), list(current), self.weight(num_averaged))


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """decay * averaged + (1 - decay) * current. Raises ValueError for a decay outside [0, 1]."""
    return _One(Constant(decay))


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """The same on lists, in place."""
    return _Many(Constant(decay))


def get_swa_avg_fn() -> AvgFn:
    """The plain mean of all models so far."""
    return _One(Uniform())


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """The same on lists, in place."""
    return _Many(Uniform())


class AveragedModel(CopiedModule):
    """A running average of a model: the plain mean, or what `avg_fn` or `multi_avg_fn` says.

    model: plain, or wrapped first by DDP or FSDP ([Note: the copy] in copied). device: of the average. avg_fn,
    multi_avg_fn: one of this module's, or any function that works element by element: it is given the parts that this rank
    averages, whole weights where nothing is sharded. use_buffers: average floating buffers; else, and integers always,
    they are the model's of the last update. module_fn: builds and wraps the module that is to hold the average.

    Keys of `state_dict` are `n_averaged` and `module.NAME`. *Collective* under FSDP: construction and `load_state_dict`.
    Raises ValueError if both functions are given.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
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
        rule = multi_avg_fn or avg_fn
        decay = rule.schedule if isinstance(rule, _Rule) else Uniform()
        buffers = "average" if use_buffers else "copy"
        self._keep(
            ModuleAverage(model, module_fn and module_fn(), decay, device=device, buffers=buffers)
        )
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self._count = Count()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model as it is now; the first one is copied. No collective, and no host sync but after somebody
        else wrote `n_averaged`."""
        averaged = self._count.of(self.n_averaged)
        rule = self.multi_avg_fn or self.avg_fn or get_swa_multi_avg_fn()
        if averaged == 0 or isinstance(rule, _Rule):
            decay = 0.0 if averaged == 0 else 1 - rule.weight(averaged)  # type: ignore[union-attr]
            self.copied.update(model, decay)
        else:
            self.copied.update_by(model, self._apply_functions)
        self.copied.copy_rest()
        self._count.up(self.n_averaged)

    def _apply_functions(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if self.avg_fn is not None:
            for averaged, current in pairs:
                averaged.copy_(self.avg_fn(averaged, current, self.n_averaged.to(averaged.device)))
            return
        assert self.multi_avg_fn is not None
        kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            kinds.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
        for (device, _), group in kinds.items():
            self.multi_avg_fn(
                [mine for mine, _ in group], [live for _, live in group], self.n_averaged.to(device)
            )


def update_bn(
    loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None
) -> None:
    """Give every BatchNorm of `model` the statistics of what it sees over the whole loader ([Note: no training mode] in
    recipes.batchnorm).

    loader: batches, or tuples and lists whose first element is the batch. device: where batches go; None leaves them.
    *Collective* where the model is sharded, or came wrapped by DDP to the last update of its average: the statistics are
    those of all ranks' data then. A model without BatchNorm is left alone.
    """
    copied = model.copied if isinstance(model, CopiedModule) else None
    if copied is not None and copied.module is None:
        with copied.average.swap():
            recalibrate_all(copied.live, loader, device)
        return
    group = (
        None
        if copied is None or copied.given is None
        else discovery.find_shards(copied.given).group
    )
    recalibrate_all(model if copied is None else copied.evaluated, loader, device, group)
