"""diffusers' `EMAModel`: get_decay, step, store and restore, save_pretrained.

from dist_ema.compat.diffusers import EMAModel
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules import Constant
from ..sharding.parameters import Model
from ._drop_ins import ListDropIn
from ._parameter_list import Device, ParameterListAverage, as_model

__all__ = ["EMAModel"]

# The settings in a state_dict, and the types that the original takes for each.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "decay": (float, int),
    "min_decay": (float,),
    "optimization_step": (int,),
    "update_after_step": (int,),
    "use_ema_warmup": (bool,),
    "inv_gamma": (float, int),
    "power": (float, int),
}


class EMAModel(ListDropIn):
    """The average of all given parameters, updated by hand; frozen ones are copied at every step.

    Other than the original: shadows of 16-bit parameters are float32; another number of parameters
    raises ValueError, an unknown argument TypeError. DeepSpeed's ZeRO-3 is not gathered.

    Args:
        parameters: an iterable of them, with or without names, or the model, which FSDP1 demands
            (then, as in the original, `use_ema_warmup` is True).
        decay: the upper bound of `get_decay`.
        min_decay: its lower bound.
        update_after_step: up to this step the average copies.
        use_ema_warmup: 1 - (1 + n / inv_gamma)^-power in place of (1 + n) / (10 + n).
        inv_gamma: the scale of that warm-up.
        power: the exponent of that warm-up.
        foreach: makes no difference.
        model_cls: for `save_pretrained`.
        model_config: for `save_pretrained`.
        kwargs: max_value, min_value and device of older versions.

    Note:
        *Collective* where the parameters are sharded: construction, `copy_to`, `save_pretrained`.
    """

    def __init__(
        self,
        parameters: Model,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
        **kwargs: Any,
    ) -> None:
        older = {name: kwargs.pop(name, None) for name in ("max_value", "min_value", "device")}
        if kwargs:
            raise TypeError(f"EMAModel takes no {', '.join(kwargs)}.")
        self.decay = decay if older["max_value"] is None else older["max_value"]
        self.min_decay = min_decay if older["min_value"] is None else older["min_value"]
        self.update_after_step, self.optimization_step = update_after_step, 0
        # The original sets it for a module too, to be like its older versions.
        self.use_ema_warmup = use_ema_warmup or isinstance(parameters, nn.Module)
        self.inv_gamma, self.power, self.foreach = inv_gamma, power, foreach
        self.model_cls, self.model_config = model_cls, model_config
        self.cur_decay_value: float | None = None
        self.temp_stored_params: list[Tensor] | None = None
        self._list = ParameterListAverage(as_model(parameters, average_frozen=True), self.decay)
        if older["device"] is not None:
            self.to(device=older["device"])

    def get_decay(self, optimization_step: int) -> float:
        """The decay of that step, counted from 1; 0 copies."""
        n = optimization_step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        warm = 1 - (1 + n / self.inv_gamma) ** -self.power
        value = warm if self.use_ema_warmup else (1 + n) / (10 + n)
        return max(min(value, self.decay), self.min_decay)

    def step(self, parameters: Model) -> None:
        """Move towards the parameters. No collective."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        self._list.update(self.cur_decay_value, parameters, copy_frozen=True)

    def store(self, parameters: Model | None = None) -> None:
        """Keep a copy of the parameters in host memory for `restore`."""
        self.temp_stored_params = self._list.keep(parameters, "cpu")

    def restore(self, parameters: Model | None = None) -> None:
        """Write what `store` kept into the parameters and forget it. Else raises RuntimeError."""
        if self.temp_stored_params is None:
            raise RuntimeError("restore() found nothing that store() kept: call store() first.")
        self._list.put_back(self.temp_stored_params, parameters)
        self.temp_stored_params = None

    def to(
        self, device: Device = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> None:
        """Move and cast the shadows, always in order. 16-bit shadows are rounded stochastically.

        Args:
            device: where the shadows go; None leaves them.
            dtype: a floating dtype of 16 bits or more; None leaves it.
            non_blocking: makes no difference.

        Raises:
            ValueError: the dtype is no floating one of 16 bits or more.
        """
        self._list.to(device, dtype)

    def pin_memory(self) -> None:
        """Move the shadows to host memory, pinned beside an accelerator; a thread updates them."""
        self.average.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """The original's keys. Tensors have the form of the parameters: this rank's part."""
        return {name: getattr(self, name) for name in (*_SETTINGS, "shadow_params")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks, or full tensors; what is missing stays.

        Raises:
            ValueError: a value has another type, the decay is outside of [0, 1], or tensors do not
                fit. Nothing has changed then.
        """
        settings = {name: state_dict[name] for name in _SETTINGS if name in state_dict}
        for name, value in settings.items():
            if not isinstance(value, _SETTINGS[name]):
                raise ValueError(f"{name} must be {_SETTINGS[name][0].__name__}, got {value!r}.")
        Constant(settings.get("decay", 0))  # refuses what is none
        shadows = state_dict.get("shadow_params")
        if shadows is not None:
            if not isinstance(shadows, list) or not all(isinstance(s, Tensor) for s in shadows):
                raise ValueError("shadow_params must be a list of tensors.")
            self.shadow_params = shadows
        vars(self).update(settings)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the average as a model of `model_cls`, the settings in its config.

        Raises:
            ValueError: model_cls or model_config were not given.

        Note:
            *Collective* where the average is sharded; then one rank writes.
            *Cost*: a whole model on every rank.
        """
        if self.model_cls is None or self.model_config is None:
            raise ValueError(
                "save_pretrained() needs the model_cls and model_config that EMAModel was built "
                "with."
            )
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**{name: getattr(self, name) for name in _SETTINGS})
        self.copy_to(model.parameters())
        # One writer, or ranks would write the same files at once.
        members = self.average.weights.find().members  # the ranks that hold it together
        if len(members) == 1 or members[0] == torch.distributed.get_rank():
            model.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], model_cls: Any, foreach: bool = False
    ) -> EMAModel:
        """Load what `save_pretrained` wrote, here or in the original.

        Args:
            path: the folder.
            model_cls: the class of the model in it.
            foreach: makes no difference.
        """
        _, settings = model_cls.from_config(model_cls.load_config(path), return_unused_kwargs=True)
        model = model_cls.from_pretrained(path)
        ema = cls(
            model.parameters(), foreach=foreach, model_cls=model_cls, model_config=model.config
        )
        ema.load_state_dict(settings)
        return ema
