"""torch_ema.ExponentialMovingAverage: `from dist_ema.compat.torch_ema import ExponentialMovingAverage`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..sharding.parameters import Model
from ._parameter_list import ParameterListAverage, Shadowed, keep, put_back, source

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(Shadowed):
    """The average of all given parameters, frozen ones included, updated by hand.

    parameters: an iterable of them, with or without names, or the model, which FSDP1 demands. decay: in [0, 1].
    use_num_updates: the decay of update n is at most (1 + n) / (10 + n).

    Other than the original: float32 shadows for 16-bit parameters; the parameters are kept alive; integer ones are taken
    as they are. *Collective* where the parameters are sharded: construction and `copy_to`, so also `average_parameters`.
    Raises ValueError for a decay outside of [0, 1].
    """

    def __init__(self, parameters: Model, decay: float, use_num_updates: bool = True) -> None:
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self.collected_params: list[Tensor] | None = None
        self._given = source(parameters, always=True)
        self._listed = ParameterListAverage(self._given, decay)

    def update(self, parameters: Model | None = None) -> None:
        """Move towards the parameters, by default those of the construction. No collective."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        self._listed.update(decay, self._or_own(parameters))

    def copy_to(self, parameters: Model | None = None) -> None:
        """Write the average into the parameters. *Collective* where the average is sharded."""
        self._listed.copy_to(self._or_own(parameters))

    def store(self, parameters: Model | None = None) -> None:
        """Keep a copy of the parameters for `restore`."""
        self.collected_params = keep(source(self._or_own(parameters)))

    def restore(self, parameters: Model | None = None) -> None:
        """Write what `store` kept into the parameters. Raises RuntimeError if nothing was."""
        if self.collected_params is None:
            raise RuntimeError("restore() without a store() before it.")
        put_back(source(self._or_own(parameters)), self.collected_params)

    @contextmanager
    def average_parameters(self, parameters: Model | None = None) -> Iterator[None]:
        """The parameters are the average inside the block. *Collective* where they are sharded."""
        given = source(self._or_own(parameters))
        self.store(given)
        self.copy_to(given)
        try:
            yield
        finally:
            self.restore(given)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Move and cast shadows and stored parameters. dtype: float32, float64 or bfloat16, else ValueError."""
        self._listed.to(device, dtype)
        if self.collected_params is not None:
            self.collected_params = [
                kept.to(device=device, dtype=dtype if kept.is_floating_point() else None)
                for kept in self.collected_params
            ]

    def state_dict(self) -> dict[str, Any]:
        """The original's keys. Tensors in the form of the parameters: of a sharded model each rank has its own part."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
            "collected_params": self.collected_params,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks, or full tensors. Raises ValueError, and changes nothing, for a
        decay outside of [0, 1] or tensors that do not fit."""
        decay, count = state_dict["decay"], state_dict["num_updates"]
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}.")
        if not (count is None or isinstance(count, int)):
            raise ValueError(f"num_updates must be an int or None, got {count!r}.")
        collected = state_dict["collected_params"]
        if collected is not None and len(collected) != len(state_dict["shadow_params"]):
            raise ValueError("collected_params and shadow_params differ in number.")
        self._listed.fill(state_dict["shadow_params"])
        self.decay, self.num_updates = decay, count
        self.collected_params = None if collected is None else [kept.clone() for kept in collected]

    def _or_own(self, parameters: Model | None) -> Model:
        return self._given if parameters is None else parameters
