"""diffusers.training_utils.EMAModel: `from dist_ema.compat.diffusers import EMAModel`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding.parameters import Model
from ._parameter_list import ParameterListAverage, Shadowed, keep, put_back, source

__all__ = ["EMAModel"]

_SETTINGS: dict[str, Any] = {  # in a state_dict, and what each must be
    "decay": (float, int),
    "min_decay": (float,),
    "optimization_step": (int,),
    "update_after_step": (int,),
    "use_ema_warmup": (bool,),
    "inv_gamma": (float, int),
    "power": (float, int),
}


class EMAModel(Shadowed):
    """The average of all given parameters, updated by hand; what needs no gradient at a step is copied.

    parameters: an iterable of them, with or without names, or the model, which FSDP1 demands (then, as in the original,
    use_ema_warmup is True). decay, min_decay: bounds of `get_decay`. update_after_step: until then the average copies.
    use_ema_warmup: 1 - (1 + n / inv_gamma)^-power in place of (1 + n) / (10 + n). model_cls, model_config: for
    `save_pretrained`. foreach makes no difference.

    Other than the original: float32 shadows for 16-bit parameters; as many parameters as at the construction, or
    ValueError; unknown arguments raise TypeError. DeepSpeed's ZeRO-3 is not gathered. *Collective* where the parameters are
    sharded: construction, `copy_to` and `save_pretrained`.
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
        self.update_after_step = update_after_step
        self.use_ema_warmup = use_ema_warmup or isinstance(parameters, nn.Module)
        self.inv_gamma, self.power, self.foreach = inv_gamma, power, foreach
        self.model_cls, self.model_config = model_cls, model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self.temp_stored_params: list[Tensor] | None = None
        self._listed = ParameterListAverage(source(parameters, always=True), self.decay)
        if older["device"] is not None:
            self.to(device=older["device"])

    def get_decay(self, optimization_step: int) -> float:
        """The decay of that step, counted from 1; 0 copies."""
        n = optimization_step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        grown = (
            1 - (1 + n / self.inv_gamma) ** -self.power
            if self.use_ema_warmup
            else (1 + n) / (10 + n)
        )
        return max(min(grown, self.decay), self.min_decay)

    def step(self, parameters: Model) -> None:
        """Move towards the parameters. No collective."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        self._listed.update(self.cur_decay_value, parameters, copy_frozen=True)

    def copy_to(self, parameters: Model) -> None:
        """Write the average into the parameters. *Collective* where the average is sharded."""
        self._listed.copy_to(parameters)

    def store(self, parameters: Model) -> None:
        """Keep a copy of the parameters in host memory for `restore`."""
        self.temp_stored_params = keep(source(parameters), "cpu")

    def restore(self, parameters: Model) -> None:
        """Write what `store` kept into the parameters, and forget it. Raises RuntimeError if nothing was kept."""
        if self.temp_stored_params is None:
            raise RuntimeError("restore() without a store() before it.")
        put_back(source(parameters), self.temp_stored_params)
        self.temp_stored_params = None

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Move and cast the shadows, always in order. dtype: float32, float64 or bfloat16, else ValueError."""
        self._listed.to(device, dtype)

    def pin_memory(self) -> None:
        """Into host memory, pinned where the parameters lie on an accelerator; from then on a thread averages there."""
        self._listed.to("cpu", None)

    def state_dict(self) -> dict[str, Any]:
        """The original's keys. Tensors in the form of the parameters: of a sharded model each rank has its own part."""
        return {name: getattr(self, name) for name in _SETTINGS} | {
            "shadow_params": self.shadow_params
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on as many ranks, or full tensors; what is not in it stays.

        Raises ValueError, and changes nothing, for values of another type, a decay outside of [0, 1], or tensors that do
        not fit.
        """
        given = {name: state_dict[name] for name in _SETTINGS if name in state_dict}
        for name, value in given.items():
            if not isinstance(value, _SETTINGS[name]):
                raise ValueError(f"{name} must be {_SETTINGS[name][0].__name__}, got {value!r}.")
        if not 0 <= given.get("decay", 0) <= 1:
            raise ValueError(f"decay must be in [0, 1], got {given['decay']}.")
        values = state_dict.get("shadow_params")
        if values is not None:
            if not isinstance(values, list) or not all(
                isinstance(value, Tensor) for value in values
            ):
                raise ValueError("shadow_params must be a list of tensors.")
            self._listed.fill(values)
        self.__dict__.update(given)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the average as a model of `model_cls`, the settings in its config. *Collective* where the average is
        sharded, and then the first rank writes.

        Raises ValueError if model_cls or model_config were not given. *Cost*: a whole model on every rank.
        """
        if self.model_cls is None or self.model_config is None:
            raise ValueError(
                "save_pretrained() needs the model_cls and model_config that EMAModel was built with."
            )
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**{name: getattr(self, name) for name in _SETTINGS})
        self.copy_to(model.parameters())
        if self._listed.first:
            model.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], model_cls: Any, foreach: bool = False
    ) -> EMAModel:
        """What `save_pretrained` wrote, the original's too."""
        _, settings = model_cls.from_config(model_cls.load_config(path), return_unused_kwargs=True)
        model = model_cls.from_pretrained(path)
        ema = cls(
            model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach
        )
        ema.load_state_dict(settings)
        return ema
