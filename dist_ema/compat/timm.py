"""timm.utils.model_ema: `from dist_ema.compat.timm import ModelEma, ModelEmaV2, ModelEmaV3`.

All floating weights and buffers are averaged, tied ones once; integer buffers are the model's of
the last update. DDP and torch.compile may wrap the model between construction and the first update;
FSDP comes first.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..schedules import Constant, Warmup
from ._drop_ins import HolderDropIn, ModuleDropIn
from ._module import Device, ModuleAverage, ModuleFn

__all__ = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]

_logger = logging.getLogger(__name__)


class ModelEma(HolderDropIn):
    """The first version: `ema` is the module, in evaluation mode.

    Args:
        model: whose average it is.
        decay: may be changed between updates.
        device: the device of the average; '' for the model's.
        resume: a file of torch.save, from whose `state_dict_ema` the average starts. A file without
            one is passed over with a warning in the log.
        module_fn: as for `swa_utils.AveragedModel`.

    Note:
        *Collective* under FSDP: construction.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Device = "",
        resume: str = "",
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        self.decay, self.device = decay, device
        # timm's own word for the device of the model.
        place = None if device == "" else device
        self._average = ModuleAverage(model, decay, module_fn, device=place, evaluates=True)
        self.ema_has_module = hasattr(self._average.module, "module")
        if resume:
            saved = torch.load(resume, map_location="cpu", weights_only=True)
            if isinstance(saved, dict) and "state_dict_ema" in saved:
                self.load_state_dict(saved["state_dict_ema"])
            else:
                _logger.warning(
                    "%s has no state_dict_ema: the average starts from the model.", resume
                )

    def update(self, model: nn.Module) -> None:
        """Move towards `model`. No collective, no host sync."""
        self._average.move(model, self.decay)


class _Versioned(ModuleDropIn):
    """The method that the second and the third version share."""

    def set(self, model: nn.Module) -> None:
        """The average is `model` as it is now. No collective."""
        self.copied.move(model, 0.0)


class ModelEmaV2(_Versioned):
    """The second version: `module` is the average, in evaluation mode.

    Keys of `state_dict` are `module.NAME`.

    Args:
        model: whose average it is.
        decay: may be changed between updates.
        device: the device of the average; None for the model's.
        module_fn: as for `swa_utils.AveragedModel`.

    Note:
        *Collective* under FSDP: construction and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        device: Device = None,
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        super().__init__()
        self.decay, self.device = decay, device
        self._use(ModuleAverage(model, decay, module_fn, device=device, evaluates=True))

    def update(self, model: nn.Module) -> None:
        """Move towards `model`. No collective, no host sync."""
        self.copied.move(model, self.decay)


class ModelEmaV3(_Versioned):
    """The third version: a warm-up of the decay, by the step that `update` is told.

    A 16-bit average is always rounded stochastically, by a hash that is the same on all ranks.
    Keys of `state_dict` are `module.NAME`.

    Args:
        model: whose average it is.
        decay: the upper bound of the decay.
        min_decay: its lower bound.
        update_after_step: up to this step the average is the model.
        use_warmup: 1 - (1 + n / gamma)^-power, where n counts the steps after `update_after_step`.
        warmup_gamma: the scale of that warm-up.
        warmup_power: the exponent of that warm-up.
        device: the device of the average; None for the model's.
        dtype: the dtype of the average; None for the model's.
        stochastic_rounding: changes nothing.
        stochastic_rounding_seed: another one, other noise.
        foreach: changes nothing.
        exclude_buffers: floating buffers are the model's too.
        module_fn: as for `swa_utils.AveragedModel`.

    Note:
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
        device: Device = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        module_fn: ModuleFn | None = None,
    ) -> None:
        super().__init__()
        self._use(
            ModuleAverage(
                model,
                Warmup(decay, warmup_power, warmup_gamma) if use_warmup else Constant(decay),
                module_fn,
                device=device,
                dtype=dtype,
                buffers="copy" if exclude_buffers else "average",
                evaluates=True,
                seed=stochastic_rounding_seed,
            )
        )
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_warmup, self.device, self.dtype = use_warmup, device, dtype
        self.warmup_gamma, self.warmup_power = warmup_gamma, warmup_power
        self.foreach, self.exclude_buffers = foreach, exclude_buffers
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed

    def get_decay(self, step: int | None = None) -> float:
        """The decay of an update at this step of the optimizer; None: no warm-up and no start."""
        n = 1 if step is None else step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        if step is None or not self.use_warmup:
            return self.decay
        value = 1 - (1 + n / self.warmup_gamma) ** -self.warmup_power
        return float(max(min(value, self.decay), self.min_decay))

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move towards `model`. No collective, no host sync.

        Args:
            model: as it is now.
            step: the step of the optimizer, for `get_decay`.
        """
        self.apply_update_(model, self.get_decay(step))

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move towards `model` with the caller's decay. No collective, no host sync.

        Args:
            model: as it is now.
            decay: the share of the average that stays.
        """
        self.copied.move(model, decay)
        if self.exclude_buffers:
            self.copied.copy_rest()
