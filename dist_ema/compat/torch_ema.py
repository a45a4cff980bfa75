"""torch_ema's `ExponentialMovingAverage`: update, average_parameters, its state_dict.

from dist_ema.compat.torch_ema import ExponentialMovingAverage
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..schedules import Constant
from ..sharding.parameters import Model
from ._drop_ins import ListDropIn
from ._parameter_list import Device, ParameterListAverage, as_model

__all__ = ["ExponentialMovingAverage"]

_KEYS = ("decay", "num_updates", "shadow_params", "collected_params")


class ExponentialMovingAverage(ListDropIn):
    """The average of all given parameters, frozen ones included, updated by hand.

    Other than the original: shadows of 16-bit parameters are float32, the parameters are kept
    alive, and integer ones are taken as they are.

    Args:
        parameters: an iterable of them, with or without names, or the model, which FSDP1 demands.
        decay: in [0, 1].
        use_num_updates: bound the decay of update n by (1 + n) / (10 + n).

    Raises:
        ValueError: the decay is outside of [0, 1].

    Note:
        *Collective* where the parameters are sharded: construction, `copy_to` and
        `average_parameters`.
    """

    def __init__(self, parameters: Model, decay: float, use_num_updates: bool = True) -> None:
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self._default = as_model(parameters, average_frozen=True)
        self._list = ParameterListAverage(self._default, decay)

    def update(self, parameters: Model | None = None) -> None:
        """Move towards the parameters, by default those of the construction. No collective."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            # The warm-up of TensorFlow's ExponentialMovingAverage.
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        self._list.update(decay, self._default if parameters is None else parameters)

    @contextmanager
    def average_parameters(self, parameters: Model | None = None) -> Iterator[None]:
        """The parameters are the average inside the block. *Collective* where they are sharded."""
        model = self._default if parameters is None else as_model(parameters)
        self.store(model)
        kept = self.collected_params
        try:
            self.copy_to(model)
            yield
        finally:
            # A block inside, or a load, has kept something else since.
            self.collected_params = kept
            self.restore(model)

    def to(self, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Move and cast shadows and stored parameters. 16-bit shadows are rounded stochastically.

        Args:
            device: where the tensors go; None leaves them.
            dtype: a floating dtype of 16 bits or more; None leaves it.

        Raises:
            ValueError: the dtype is no floating one of 16 bits or more.
        """
        self._list.to(device, dtype)
        self.collected_params = self.collected_params and [
            kept.to(device=device, dtype=dtype if kept.is_floating_point() else None)
            for kept in self.collected_params
        ]

    def state_dict(self) -> dict[str, Any]:
        """The original's keys. Tensors have the form of the parameters: this rank's part."""
        return {key: getattr(self, key) for key in _KEYS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks, or full tensors.

        Raises:
            ValueError: a value is none that the original takes, or tensors do not fit. Nothing has
                changed then.
        """
        decay, count, shadows, collected = (state_dict[key] for key in _KEYS)
        Constant(decay)  # refuses what is none
        if not (count is None or isinstance(count, int)):
            raise ValueError(f"num_updates must be an int or None, got {count!r}.")
        if collected is not None and len(collected) != len(shadows):
            raise ValueError(
                "collected_params and shadow_params differ in number: both hold one per parameter."
            )
        self.shadow_params = shadows
        self.decay, self.num_updates = decay, count
        self.collected_params = None if collected is None else [kept.clone() for kept in collected]
