"""The `EMA` of the package ema_pytorch: `from dist_ema.compat.ema_pytorch import EMA`. (`KarrasEMA` and `PostHocEMA`:
`dist_ema.EMA` with `Power` and `dist_ema.posthoc`.)"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..schedules import Constant, Warmup
from ._module import CopiedModule, Count, ModuleAverage

__all__ = ["EMA"]


class EMA(CopiedModule):
    """A copy of the model that follows it, with a warm-up of the decay; called, it calls the copy.

    model: a module. ema_model: the module that is to hold the average, or a function that builds (and wraps) it; None
    copies the model, which one under FSDP does not allow.
    beta, inv_gamma, power, min_value: the decay is 1 - (1 + n / inv_gamma)^-power between min_value and beta, where n counts
    the calls after update_after_step; up to there the average is the model. update_every: calls from one move to the next.
    param_or_buffer_names_no_ema: copied by moves. ignore_names, ignore_startswith_names: not touched by moves. Names are
    those of the model without wrappers. include_online_model: the model is in `state_dict` too.
    update_model_with_ema_every, update_model_with_ema_beta: calls after which the model becomes beta * model + (1 - beta) *
    average. forward_method_names: methods of the copy, to be called here. move_ema_to_online_device: a move brings the copy
    to the model's device. lazy_init_ema: the first `update` makes the copy. use_foreach, allow_different_devices,
    coerce_dtype: taken, and change nothing: devices and dtypes may always differ.

    Keys of `state_dict` are `initted`, `step`, `ema_model.NAME` and `online_model.NAME`. *Collective* under FSDP:
    construction (with lazy_init_ema the first `update`) and `load_state_dict`. Raises ValueError for what is no module.
    """

    child = "ema_model"
    initted: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        include_online_model: bool = True,
        allow_different_devices: bool = False,
        use_foreach: bool = False,
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: Collection[str] = (),
        move_ema_to_online_device: bool = False,
        coerce_dtype: bool = False,
        lazy_init_ema: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"EMA takes a module, got {type(model).__name__}. For parameters use dist_ema.EMA."
            )
        if lazy_init_ema and ema_model is not None:
            raise ValueError("EMA takes one of ema_model and lazy_init_ema, got both.")
        self.beta, self.inv_gamma, self.power, self.min_value = beta, inv_gamma, power, min_value
        self.update_after_step, self.update_every = update_after_step, update_every
        self.param_or_buffer_names_no_ema = param_or_buffer_names_no_ema
        self.ignore_names, self.ignore_startswith_names = ignore_names, ignore_startswith_names
        self.include_online_model = include_online_model
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.forward_method_names, self.move_ema_to_online_device = (
            forward_method_names,
            move_ema_to_online_device,
        )
        self.online_model: Any = model if include_online_model else [model]
        if not lazy_init_ema:
            self.init_ema(
                ema_model if isinstance(ema_model, nn.Module) else ema_model and ema_model()
            )
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))
        self._begun, self._steps = Count(), Count()

    def init_ema(self, ema_model: nn.Module | None = None) -> None:
        """Make the copy, or take this module for it, as it is. *Collective* under FSDP."""
        warmup = min(self.power, self.inv_gamma) > 0
        schedule = Warmup(self.beta, self.power, self.inv_gamma) if warmup else Constant(self.beta)
        left_out = (
            self.param_or_buffer_names_no_ema or self.ignore_names or self.ignore_startswith_names
        )
        only = self._averaged if left_out else None
        self._keep(
            ModuleAverage(
                self.model, ema_model, schedule, buffers="average", only=only, fresh=False
            )
        )
        for name in self.forward_method_names:
            setattr(self, name, getattr(self.ema_model, name))

    @property
    def model(self) -> nn.Module:
        """The model that is followed."""
        model: nn.Module = self.online_model if self.include_online_model else self.online_model[0]
        return model

    @property
    def is_frozen(self) -> bool:
        """beta is 1: nothing moves the average but copies."""
        return self.beta == 1.0

    # --- which names -------------------------------------------------------------------------------------------

    def _ignored(self, name: str) -> bool:
        return name in self.ignore_names or name.startswith(tuple(self.ignore_startswith_names))

    def _averaged(self, name: str) -> bool:
        return not self._ignored(name) and name not in self.param_or_buffer_names_no_ema

    def _share(self, name: str, decay: float) -> float:
        """What a move takes over of a weight that is not averaged."""
        if self._ignored(name):
            return 0.0
        return 1.0 if name in self.param_or_buffer_names_no_ema else 1 - decay

    # --- moving ------------------------------------------------------------------------------------------------

    def get_current_decay(self) -> float:
        """Of the move that belongs to the last call of `update`."""
        n = self._steps.of(self.step) - self.update_after_step - 1
        if n <= 0:
            return 0.0
        value = 1 - (1 + n / self.inv_gamma) ** -self.power
        return float(min(max(value, self.min_value), self.beta))

    def update(self) -> None:
        """Call it after every step of the optimizer. No collective but under FSDP where it makes the copy or, under HSDP,
        writes the model; no host sync but after somebody else wrote `step` or `initted`."""
        step = self._steps.up(self.step)
        if not self._begun.of(self.initted):
            if self._copied is None:
                self.init_ema()
            self.copy_params_from_model_to_ema()
            self.initted.fill_(True)
            return
        due = step % self.update_every == 0
        if due and step <= self.update_after_step:
            self.copy_params_from_model_to_ema()
            return
        if due:
            self.update_moving_average(
                self.ema_model if self.copied.module is not None else None, self.model
            )
        if (
            self.update_model_with_ema_every is not None
            and step % self.update_model_with_ema_every == 0
        ):
            self.update_model_with_ema()

    @torch.no_grad()
    def update_moving_average(
        self,
        ma_model: nn.Module | None,
        current_model: nn.Module,
        current_decay: float | None = None,
    ) -> None:
        """Move the average towards the model; or, given them the other way round, the model towards the average."""
        if self.is_frozen:
            return
        decay = self.get_current_decay() if current_decay is None else current_decay
        if ma_model is self.model:
            self.copied.follow(self.model)
            self.copied.pull(1 - decay, lambda name: self._share(name, decay))
            return
        if self.move_ema_to_online_device and self.copied.module is not None:
            self.copied.module.to(next(current_model.parameters()).device)
        self.copied.update(current_model, decay)
        self.copied.copy_rest(lambda name: not self._ignored(name))

    def copy_params_from_model_to_ema(self) -> None:
        """The average is the model as it is now, ignored names included. No collective."""
        self.copied.update(self.model, 0.0)
        self.copied.copy_rest()

    def copy_params_from_ema_to_model(self) -> None:
        """The model is the average from now on. *Collective* under HSDP."""
        self.copied.follow(self.model)
        self.copied.pull(1.0)

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """decay * model + (1 - decay) * average becomes the model; 0 copies. *Collective* under HSDP."""
        decay = self.update_model_with_ema_beta if decay is None else decay
        if decay == 0.0:
            self.copy_params_from_ema_to_model()
        else:
            self.update_moving_average(self.model, self.model, decay)

    def add_to_optimizer_post_step_hook(self, optimizer: Optimizer) -> Any:
        """`update` after every step. Returns the handle."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    # --- the copy ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ema_model(*args, **kwargs)

    def eval(self) -> nn.Module:  # type: ignore[override]
        """Put the copy into evaluation mode, and return it."""
        module: nn.Module = self.ema_model
        return module.eval()

    @torch.no_grad()
    def forward_eval(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy without gradient."""
        return self.ema_model(*args, **kwargs)

    def restore_ema_model_device(self) -> None:
        """Bring the copy where `initted` is."""
        self.ema_model.to(self.initted.device)
