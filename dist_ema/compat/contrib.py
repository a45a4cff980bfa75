"""torchcontrib.optim.SWA: `from dist_ema.compat.contrib import SWA`."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ema import EMA
from ..schedules import Uniform
from ..sharding.parameters import Parameters
from ._module import recalibrate_all
from ._parameter_list import ParameterListAverage

__all__ = ["SWA"]


class SWA(Optimizer):
    """The mean of the weights that `optimizer` steps through, over some of its steps, one mean per parameter group.

    swa_start, swa_freq: after a step whose number is beyond swa_start and a multiple of swa_freq, the weights join the mean;
    without both of them only `update_swa` does. swa_lr: the learning rate from swa_start on.

    Other than the original: float32 means of 16-bit weights; while the means are in the model, `step` and `update_swa` raise
    RuntimeError; in a state_dict parameters are called by number, as in every optimizer's, where the original took ids that
    no other process knows; `bn_update` takes the statistics of all batches together. *Collective* where the parameters are
    sharded: the first update of a group, and `swap_swa_sgd`.
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
            _refuse(start, freq, swa_lr)
        elif swa_lr is not None:
            warnings.warn(
                "swa_lr counts with swa_start and swa_freq only, and is ignored.", stacklevel=2
            )
        self.swa_start, self.swa_freq = (start, freq) if self._auto_mode else (None, None)
        self.swa_lr = swa_lr if self._auto_mode else None
        self.optimizer = optimizer
        # NOTE: what Optimizer.__init__ would make, but the groups are those of the optimizer inside.
        groups = optimizer.param_groups
        self.__setstate__(
            {
                "param_groups": groups,
                "state": defaultdict(dict),
                "defaults": dict(optimizer.defaults),
            }
        )
        self._means: list[ParameterListAverage | None] = []
        self._aside: list[
            dict[str, Tensor] | None
        ] = []  # the weights of a group while its mean is in their place
        for group in self.param_groups:
            self._count(group)

    def _count(self, group: dict[str, Any]) -> None:
        group["n_avg"] = group["step_counter"] = 0
        self._means.append(None)
        self._aside.append(None)

    @property
    def averages(self) -> list[EMA | None]:
        """What saves, loads and exports, one for each group that has a mean."""
        return [None if mean is None else mean.ema for mean in self._means]

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    # --- training ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer inside, and in automatic mode an update of the means. Returns what that step returns.

        Raises RuntimeError while the means are in the model.
        """
        self._refuse_swapped("step")
        for group in self.param_groups if self.swa_lr is not None else ():
            if group["step_counter"] >= self.swa_start:
                group["lr"] = self.swa_lr
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            group["step_counter"] += 1
            if (
                self._auto_mode
                and group["step_counter"] > self.swa_start
                and not group["step_counter"] % self.swa_freq
            ):
                self.update_swa_group(group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer inside does."""
        self.optimizer.zero_grad(set_to_none)

    def update_swa(self) -> None:
        """The weights of all groups join their means. Raises RuntimeError while the means are in the model."""
        for group in self.param_groups:
            self.update_swa_group(group)

    def update_swa_group(self, group: dict[str, Any]) -> None:
        """The same for one of `param_groups`."""
        self._refuse_swapped("update_swa")
        n = group["n_avg"]
        self._mean(group).update(n / (n + 1))
        group["n_avg"] = n + 1
        self._show()

    def _mean(self, group: dict[str, Any]) -> ParameterListAverage:
        number = next(i for i, mine in enumerate(self.param_groups) if mine is group)
        mean = self._means[number]
        if mean is None:
            mean = self._means[number] = ParameterListAverage(
                Parameters(group["params"], always=True), Uniform()
            )
        return mean

    def swap_swa_sgd(self) -> None:
        """Exchange weights and means; a second call undoes it, bit for bit. *Collective* where the weights are sharded.

        Groups without a mean keep their weights, with a warning.
        """
        if None in self._means:
            missing = [str(i) for i, mean in enumerate(self._means) if mean is None]
            warnings.warn(
                f"parameter groups without a mean keep their weights: {', '.join(missing)}.",
                stacklevel=2,
            )
        for i, mean in enumerate(self._means):
            if mean is None:
                continue
            kept = self._aside[i]
            if kept is None:
                self._aside[i] = mean.keep()
                mean.copy_to()
            else:
                mean.put_back(kept)
                self._aside[i] = None
        self._show()

    def _refuse_swapped(self, verb: str) -> None:
        if any(self._aside):
            raise RuntimeError(
                f"{verb}() while the means are in the model: call swap_swa_sgd() first."
            )

    def _show(self) -> None:
        """state[p]["swa_buffer"]: the mean, or the weights while the mean is in the model. *Aliases* them."""
        for group, mean, kept in zip(self.param_groups, self._means, self._aside, strict=True):
            buffers = (
                []
                if mean is None
                else mean.shadows
                if kept is None
                else [kept[name] for name in mean.names]
            )
            for parameter, buffer in zip(group["params"], buffers, strict=False):
                self.state[parameter]["swa_buffer"] = buffer

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """opt_state, swa_state and param_groups; parameters by number. Of a sharded model each rank has its own part."""
        self._show()
        inner = self.optimizer.state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        swa = {
            i: dict(self.state[parameter])
            for i, parameter in enumerate(parameters)
            if self.state.get(parameter)
        }
        return {
            "opt_state": inner["state"],
            "swa_state": swa,
            "param_groups": inner["param_groups"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks. What was in the place of the weights then is the mean now.

        Raises ValueError if the parameters are others.
        """
        self.optimizer.load_state_dict(
            {"state": state_dict["opt_state"], "param_groups": state_dict["param_groups"]}
        )
        self.param_groups = self.optimizer.param_groups
        self._means, self._aside = (
            [None for _ in self.param_groups],
            [None for _ in self.param_groups],
        )
        self.state.clear()
        number = 0
        for group in self.param_groups:
            numbers = range(number, number := number + len(group["params"]))
            buffers = [
                state_dict["swa_state"][i]["swa_buffer"]
                for i in numbers
                if i in state_dict["swa_state"]
            ]
            if buffers:
                self._mean(group).fill(buffers)
        self._show()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer inside another group, which begins a mean of its own."""
        self.optimizer.add_param_group(param_group)
        self._count(self.param_groups[-1])

    @staticmethod
    def bn_update(
        loader: Iterable[Any], model: nn.Module, device: str | torch.device | None = None
    ) -> None:
        """Give every BatchNorm of `model` the statistics of all batches of `loader` together. *Collective*: of all ranks'.

        The first element of a batch goes into the model, to `device` first if there is one. See `recipes.batchnorm`.
        """
        recalibrate_all(model, loader, device)


def _whole(name: str, value: float | None) -> int | None:
    if value is not None and not isinstance(value, int):
        warnings.warn(f"{name}={value!r} is taken as {int(value)}.", stacklevel=3)
        return int(value)
    return value


def _refuse(start: int | None, freq: int | None, lr: float | None) -> None:
    if start is not None and start < 0:
        raise ValueError(f"swa_start must be 0 or more, got {start}.")
    if freq is not None and freq < 1:
        raise ValueError(f"swa_freq must be 1 or more, got {freq}.")
    if lr is not None and lr < 0:
        raise ValueError(f"swa_lr must be 0 or more, got {lr}.")
