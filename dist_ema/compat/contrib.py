"""torchcontrib's SWA, an optimizer around one: `from dist_ema.compat.contrib import SWA`."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..averaging.swap_registry import Reads
from ..ema import EMA
from ..schedules import Uniform
from . import swa_utils
from ._parameter_list import ParameterListAverage, as_model

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
        lacking = [swa_start, swa_freq].count(None)
        if lacking == 1:
            warnings.warn("Some of swa_start, swa_freq is None, ignoring other", stacklevel=2)
        if lacking and swa_lr is not None:
            warnings.warn("Some of swa_start, swa_freq is None, ignoring swa_lr", stacklevel=2)
        if not all(isinstance(steps, int | None) for steps in (swa_start, swa_freq)):
            warnings.warn("Casting swa_start, swa_freq to int", stacklevel=2)
        # As in the original, which is in automatic mode only with both of them.
        self._auto_mode, self.optimizer = not lacking, optimizer
        self.swa_start = self.swa_freq = self.swa_lr = None
        if swa_start is not None and swa_freq is not None:
            self.swa_start, self.swa_freq, self.swa_lr = int(swa_start), int(swa_freq), swa_lr
            for name, value, least in (
                ("swa_start", self.swa_start, 0),
                ("swa_freq", self.swa_freq, 1),
                ("SWA learning rate", swa_lr, 0),
            ):
                if value is not None and value < least:
                    raise ValueError(f"Invalid {name}: {value}")
        # What Optimizer.__init__ would make, but the groups are those of the optimizer inside.
        self.__setstate__(
            {
                "param_groups": optimizer.param_groups,
                "defaults": dict(optimizer.defaults),
                "state": defaultdict(dict),
            }
        )
        self._means: dict[int, ParameterListAverage] = {}  # by the number of the group
        self._kept: dict[int, list[Tensor]] = {}  # the weights of a group, its mean in their place
        for group in self.param_groups:
            group["n_avg"] = group["step_counter"] = 0

    @property
    def averages(self) -> list[EMA | None]:
        """The EMA of each group that has a mean, which saves, loads and exports."""
        means = map(self._means.get, range(len(self.param_groups)))
        return [None if mean is None else mean.ema for mean in means]

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

    def update_swa(self) -> None:
        """The weights of all groups join their means. Raises RuntimeError as `step` does."""
        for group in self.param_groups:
            self.update_swa_group(group)

    def update_swa_group(self, group: Group) -> None:
        """The weights of one of `param_groups` join its mean."""
        self._refuse_swapped("update_swa")
        number = next(i for i, known in enumerate(self.param_groups) if known is group)
        n = group["n_avg"]
        self._mean(number).update(n / (n + 1))
        group["n_avg"] = n + 1
        self._show()

    def _mean(self, number: int) -> ParameterListAverage:
        if number not in self._means:
            # The original averages what is in the group, whether it needs a gradient or not.
            parameters = self.param_groups[number]["params"]
            self._means[number] = ParameterListAverage(
                as_model(parameters, average_frozen=True), Uniform()
            )
        return self._means[number]

    def swap_swa_sgd(self) -> None:
        """Exchange weights and means; a second call undoes it, bit for bit.

        Groups without a mean keep their weights, with a warning for each of them.

        Note:
            *Collective* where the weights are sharded.
        """
        for number, group in enumerate(self.param_groups):
            mean = self._means.get(number)
            if mean is None:
                for parameter in group["params"]:
                    warnings.warn(
                        f"SWA wasn't applied to param {parameter}; skipping it", stacklevel=2
                    )
            elif number in self._kept:
                mean.put_back(self._kept[number])
                del self._kept[number]
            else:
                self._kept[number] = mean.keep()
                mean.copy_to()
        self._show()

    def _refuse_swapped(self, verb: str) -> None:
        if self._kept:
            raise RuntimeError(
                f"{verb}() while the means are in the model: call swap_swa_sgd() first."
            )
        for mean in self._means.values():
            mean.weights.refuse(verb, Reads.LIVE)

    def _show(self) -> None:
        """state[p]["swa_buffer"]: the mean, or the weights while it replaces them. *Aliases*."""
        for number, mean in self._means.items():
            # While swapped, the means are in the model, and what `swa_buffer` names are the
            # weights.
            buffers = self._kept.get(number) or mean.shadows.values()
            for parameter, buffer in zip(self.param_groups[number]["params"], buffers, strict=True):
                self.state[parameter]["swa_buffer"] = buffer

    # --- state ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which follow their copy of the parameters."""
        own = ("optimizer", "swa_start", "swa_freq", "swa_lr", "_auto_mode", "_means", "_kept")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def state_dict(self) -> dict[str, Any]:
        """opt_state, swa_state and param_groups; of a sharded model this rank's part."""
        self._show()
        inner = self.optimizer.state_dict()
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        swa_states = map(self.state.get, parameters)
        return {
            "opt_state": inner["state"],
            "swa_state": {i: dict(state) for i, state in enumerate(swa_states) if state},
            "param_groups": inner["param_groups"],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks.

        What was in the place of the weights then is the mean now.

        Raises:
            ValueError: the parameters are others.
        """
        # NOTE: torch keeps the tensors that it is given, and steps would write into the caller's.
        self.optimizer.load_state_dict(
            copy.deepcopy(
                {"state": state_dict["opt_state"], "param_groups": state_dict["param_groups"]}
            )
        )
        self.param_groups, saved = self.optimizer.param_groups, state_dict["swa_state"]
        self._means, self._kept = {}, {}
        self.state.clear()
        first = 0
        for number, group in enumerate(self.param_groups):
            numbers = range(first, first := first + len(group["params"]))
            buffers = [saved[i]["swa_buffer"] for i in numbers if i in saved]
            if buffers:
                self._mean(number).fill(buffers)
        self._show()

    def add_param_group(self, param_group: Group) -> None:
        """Give the optimizer inside another group, which begins a mean of its own."""
        self.optimizer.add_param_group(param_group)
        self.param_groups[-1]["n_avg"] = self.param_groups[-1]["step_counter"] = 0

    bn_update = staticmethod(swa_utils.update_bn)
