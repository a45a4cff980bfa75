"""torchcontrib.optim.SWA: `from dist_ema.compat.contrib import SWA`."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..averaging.averages import Reads
from ..ema import EMA
from ..schedules import Uniform
from ._module import recalibrate_all
from ._parameter_list import ParameterListAverage, source

__all__ = ["SWA"]

Group = dict[str, Any]  # of parameters, as optimizers keep them


class SWA(Optimizer):
    """The mean of the weights that `optimizer` steps through, one mean per parameter group.

    Other than the original: means of 16-bit weights are float32; while the means are in the model,
    `step` and `update_swa` raise RuntimeError; a state_dict calls parameters by number, as every
    optimizer does; `bn_update` takes the statistics of all batches together.

    Args:
        optimizer: steps the weights.
        swa_start: after a step of a higher number that `swa_freq` divides, the weights join the
            mean. Without both of them only `update_swa` does that.
        swa_freq: see `swa_start`.
        swa_lr: the learning rate from `swa_start` on.

    Raises:
        ValueError: an argument is negative, or `swa_freq` is 0.

    Note:
        *Collective* where the parameters are sharded: the first update of a group, and
        `swap_swa_sgd`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        swa_start: int | None = None,
        swa_freq: int | None = None,
        swa_lr: float | None = None,
    ) -> None:
        start, freq = _whole("swa_start", swa_start), _whole("swa_freq", swa_freq)
        if (start is None) != (freq is None):
            warnings.warn(
                "swa_start and swa_freq count together only: the one that was given is ignored.",
                stacklevel=2,
            )
        self._auto_mode = start is not None and freq is not None
        if self._auto_mode:
            for name, value, least in (
                ("swa_start", start, 0),
                ("swa_freq", freq, 1),
                ("swa_lr", swa_lr, 0),
            ):
                if value is not None and value < least:
                    raise ValueError(f"{name} must be {least} or more, got {value}.")
        elif swa_lr is not None:
            warnings.warn(
                "swa_lr counts with swa_start and swa_freq only, and is ignored.", stacklevel=2
            )
        self.swa_start, self.swa_freq = (start, freq) if self._auto_mode else (None, None)
        self.swa_lr = swa_lr if self._auto_mode else None
        self.optimizer = optimizer
        # What Optimizer.__init__ would make, but the groups are those of the optimizer inside.
        defaults = dict(optimizer.defaults)
        groups = {"param_groups": optimizer.param_groups, "defaults": defaults}
        self.__setstate__({**groups, "state": defaultdict(dict)})
        self._means: list[ParameterListAverage | None] = []
        self._kept: list[list[Tensor]] = []  # the weights of a group while its mean replaces them
        for group in self.param_groups:
            self._count(group)

    def _count(self, group: Group) -> None:
        group["n_avg"] = group["step_counter"] = 0
        self._means.append(None)
        self._kept.append([])

    @property
    def averages(self) -> list[EMA | None]:
        """The EMA of each group that has a mean, which saves, loads and exports."""
        return [None if mean is None else mean.ema for mean in self._means]

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    # --- training -------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer inside, and in automatic mode an update of the means.

        Returns:
            What that step returns.

        Raises:
            RuntimeError: the means, or another average, are in the model.
        """
        self._refuse_swapped("step")
        for group in self.param_groups if self.swa_lr is not None else ():
            if group["step_counter"] >= self.swa_start:
                group["lr"] = self.swa_lr
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["step_counter"] += 1
            number = group["step_counter"]
            if self._auto_mode and number > self.swa_start and not number % self.swa_freq:
                self.update_swa_group(group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer inside does."""
        self.optimizer.zero_grad(set_to_none)

    def update_swa(self) -> None:
        """The weights of all groups join their means. Raises RuntimeError as `step` does."""
        for group in self.param_groups:
            self.update_swa_group(group)

    def update_swa_group(self, group: Group) -> None:
        """The same for one of `param_groups`."""
        self._refuse_swapped("update_swa")
        n = group["n_avg"]
        self._mean(group).update(n / (n + 1))
        group["n_avg"] = n + 1
        self._show()

    def _mean(self, group: Group) -> ParameterListAverage:
        number = next(i for i, known in enumerate(self.param_groups) if known is group)
        mean = self._means[number]
        if mean is None:
            mean = ParameterListAverage(source(group["params"], frozen=True), Uniform())
            self._means[number] = mean
        return mean

    def swap_swa_sgd(self) -> None:
        """Exchange weights and means; a second call undoes it, bit for bit.

        Groups without a mean keep their weights, with a warning.

        Note:
            *Collective* where the weights are sharded.
        """
        missing = [str(i) for i, mean in enumerate(self._means) if mean is None]
        if missing:
            warnings.warn(
                f"parameter groups without a mean keep their weights: {', '.join(missing)}.",
                stacklevel=2,
            )
        for i, mean in enumerate(self._means):
            if mean is not None and self._kept[i]:
                mean.put_back(self._kept[i])
                self._kept[i] = []
            elif mean is not None:
                self._kept[i] = mean.keep()
                mean.copy_to()
        self._show()

    def _refuse_swapped(self, verb: str) -> None:
        if any(self._kept):
            raise RuntimeError(
                f"{verb}() while the means are in the model: call swap_swa_sgd() first."
            )
        for mean in self._means:
            if mean is not None:
                mean.weights.refuse(verb, Reads.LIVE)

    def _show(self) -> None:
        """state[p]["swa_buffer"]: the mean, or the weights while it replaces them. *Aliases*."""
        for group, mean, kept in zip(self.param_groups, self._means, self._kept, strict=True):
            buffers = kept or (mean.shadows if mean is not None else [])
            for parameter, buffer in zip(group["params"], buffers, strict=False):
                self.state[parameter]["swa_buffer"] = buffer

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """opt_state, swa_state and param_groups; of a sharded model this rank's part."""
        self._show()
        inner = self.optimizer.state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        swa = {i: dict(self.state[p]) for i, p in enumerate(parameters) if self.state.get(p)}
        groups = inner["param_groups"]
        return {"opt_state": inner["state"], "swa_state": swa, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks.

        What was in the place of the weights then is the mean now.

        Raises:
            ValueError: the parameters are others.
        """
        self.optimizer.load_state_dict(
            {"state": state_dict["opt_state"], "param_groups": state_dict["param_groups"]}
        )
        self.param_groups, saved = self.optimizer.param_groups, state_dict["swa_state"]
        self._means, self._kept = [None] * len(self.param_groups), [[] for _ in self.param_groups]
        self.state.clear()
        first = 0
        for group in self.param_groups:
            numbers = range(first, first := first + len(group["params"]))
            buffers = [saved[i]["swa_buffer"] for i in numbers if i in saved]
            if buffers:
                self._mean(group).fill(buffers)
        self._show()

    def add_param_group(self, param_group: Group) -> None:
        """Give the optimizer inside another group, which begins a mean of its own."""
        self.optimizer.add_param_group(param_group)
        self._count(self.param_groups[-1])

    @staticmethod
    def bn_update(
        loader: Iterable[Any], model: nn.Module, device: str | torch.device | None = None
    ) -> None:
        """Give every BatchNorm the statistics of all batches together, of all ranks. *Collective*.

        The first element of a batch goes into the model, to `device` first if there is one.
        """
        recalibrate_all(model, loader, device)


def _whole(name: str, value: float | None) -> int | None:
    if value is not None and not isinstance(value, int):
        warnings.warn(f"{name}={value!r} is taken as {int(value)}.", stacklevel=3)
        return int(value)
    return value
