"""timm.utils.model_ema: `from dist_ema.compat.timm import ModelEma, ModelEmaV2, ModelEmaV3`.

All floating weights and buffers are averaged, each of tied ones once; integer buffers are the model's of the last update. The
model may be wrapped after the average was built and before the first update, by DDP and torch.compile; FSDP comes first.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..schedules import Constant, Warmup
from ._module import CopiedModule, Holder, ModuleFn, evaluating

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]

_logger = logging.getLogger(__name__)


class ModelEma(Holder):
    """The first version: `ema` is the module, in evaluation mode.

    decay: may be changed between updates. device: of the average; '' for the model's. resume: a file of torch.save whose
    `state_dict_ema` the average starts from; a file without one is passed over with a warning in the log. module_fn: as
    for `AveragedModel`. *Collective* under FSDP: construction.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Any = "",
        resume: str = "",
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        self.decay, self.device = decay, device
        self._copied = evaluating(model, module_fn, decay, device=device or None, buffers="average")
        self.ema_has_module = self._copied.module is not None and hasattr(
            self._copied.module, "module"
        )
        if resume:
            self._load_checkpoint(resume)

    def _load_checkpoint(self, path: str) -> None:
        table = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(table, dict) or "state_dict_ema" not in table:
            _logger.warning("%s has no state_dict_ema: the average starts from the model.", path)
            return
        self._copied.load(table["state_dict_ema"])

    def update(self, model: nn.Module) -> None:
        """One move towards `model`. No collective, no host sync."""
        self._copied.update(model, self.decay)


class _Versioned(CopiedModule):
    """What the second and the third version share: `module`, in evaluation mode."""

    def set(self, model: nn.Module) -> None:
        """The average is `model` as it is now. No collective."""
        self.copied.update(model, 0.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class ModelEmaV2(_Versioned):
    """The second version: `module` is the average, in evaluation mode; keys of `state_dict` are `module.NAME`.

    decay: may be changed between updates. device: of the average; None for the model's. module_fn: as for
    `AveragedModel`. *Collective* under FSDP: construction and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Any = None,
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        super().__init__()
        self.decay, self.device = decay, device
        self._keep(evaluating(model, module_fn, decay, device=device, buffers="average"))

    def update(self, model: nn.Module) -> None:
        """One move towards `model`. No collective, no host sync."""
        self.copied.update(model, self.decay)


class ModelEmaV3(_Versioned):
    """The third version: a warm-up of the decay, by the step that `update` is told; keys are `module.NAME`.

    update_after_step: up to this step the average is the model. use_warmup: 1 - (1 + n / gamma)^-power, between min_decay
    and decay, where n counts the steps after that. device, dtype: of the average; None for the model's. exclude_buffers:
    floating buffers are the model's too. foreach, stochastic_rounding and stochastic_rounding_seed are taken and change
    nothing: a 16-bit average is always rounded stochastically, by a hash that is the same on all ranks.

    *Collective* under FSDP: construction and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: Any = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        super().__init__()
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.warmup_gamma, self.warmup_power = (
            use_warmup,
            warmup_gamma,
            warmup_power,
        )
        self.device, self.dtype, self.foreach, self.exclude_buffers = (
            device,
            dtype,
            foreach,
            exclude_buffers,
        )
        self.stochastic_rounding, self.stochastic_rounding_seed = (
            stochastic_rounding,
            stochastic_rounding_seed,
        )
        schedule = Warmup(decay, warmup_power, warmup_gamma) if use_warmup else Constant(decay)
        buffers = "copy" if exclude_buffers else "average"
        self._keep(
            evaluating(model, module_fn, schedule, device=device, dtype=dtype, buffers=buffers)
        )

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update at this step of the optimizer; None: no warm-up and no start."""
        if step is None:
            return self.decay
        n = step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        value = 1 - (1 + n / self.warmup_gamma) ** -self.warmup_power
        return float(max(min(value, self.decay), self.min_decay))

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """One move towards `model`. No collective, no host sync."""
        self.copied.update(model, self.get_decay(step))
        if self.exclude_buffers:
            self.copied.copy_rest()
