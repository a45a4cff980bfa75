"""`EMA` and `KarrasEMA` of the package ema_pytorch: `from dist_ema.compat.ema_pytorch import EMA`.

For its `PostHocEMA` use `dist_ema.EMA` with `Power`, and `dist_ema.posthoc`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..averaging.swap_registry import Reads
from ..schedules import Constant, Power, Schedule, Warmup, gamma_of
from ._drop_ins import Count, ModuleDropIn
from ._module import ModuleAverage

__all__ = ["EMA", "KarrasEMA"]


class EMA(ModuleDropIn):
    """A copy of the model that follows it, with a warm-up of the decay; called, it calls the copy.

    The decay is 1 - (1 + n / inv_gamma)^-power, where n counts the calls after
    `update_after_step`; up to there the average is the model. Names are those of the model without
    wrappers. Keys of `state_dict` are `initted`, `step`, `ema_model.NAME`, `online_model.NAME`.

    Args:
        model: a module.
        ema_model: the module that is to hold the average, or a function that builds (and wraps) it.
            None copies the model, which one under FSDP does not allow.
        beta: the upper bound of the decay.
        update_after_step: calls that copy.
        update_every: calls from one move to the next.
        inv_gamma: the scale of the warm-up.
        power: the exponent of the warm-up.
        min_value: the lower bound of the decay.
        param_or_buffer_names_no_ema: names that moves copy. This set and the next two may change
            during training.
        ignore_names: names that moves do not touch.
        ignore_startswith_names: their beginnings.
        include_online_model: the model is in `state_dict` too.
        allow_different_devices: changes nothing: devices may differ.
        use_foreach: changes nothing.
        update_model_with_ema_every: calls after which the model becomes beta * model +
            (1 - beta) * average.
        update_model_with_ema_beta: that beta.
        forward_method_names: methods of the copy, to be called here.
        move_ema_to_online_device: a move brings the copy to the model's device.
        coerce_dtype: changes nothing: dtypes may differ.
        lazy_init_ema: the first `update` makes the copy.

    Raises:
        ValueError: `model` is no module.

    Note:
        *Collective* under FSDP: construction (with `lazy_init_ema` the first `update`) and
        `load_state_dict`.
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
        if lazy_init_ema and ema_model is not None:
            raise ValueError("EMA takes one of ema_model and lazy_init_ema, got both.")
        self.beta, self.inv_gamma, self.power, self.min_value = beta, inv_gamma, power, min_value
        self.is_frozen = beta == 1.0  # nothing moves the average but copies
        self.update_after_step, self.update_every = update_after_step, update_every
        self.param_or_buffer_names_no_ema = set(param_or_buffer_names_no_ema)
        self.ignore_names = set(ignore_names)
        self.ignore_startswith_names = set(ignore_startswith_names)
        self.include_online_model = include_online_model
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.forward_method_names = forward_method_names
        self.move_ema_to_online_device = move_ema_to_online_device
        # In a list it is no child, and so not in `state_dict`.
        self.online_model: Any = model if include_online_model else [model]
        if not lazy_init_ema:
            self.init_ema(ema_model)
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))
        self._begun, self._steps = Count(), Count()

    def init_ema(self, ema_model: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Make the copy, or take this module for it, as it is. *Collective* under FSDP."""
        self._chosen, only = self._left_out(), self._averaged if any(self._left_out()) else None
        build = (lambda: ema_model) if isinstance(ema_model, nn.Module) else ema_model
        self._use(ModuleAverage(self.model, self._schedule(), build, only=only, fresh=False))
        for name in self.forward_method_names:
            setattr(self, name, getattr(self.ema_model, name))

    def _schedule(self) -> Schedule:
        """The schedule that files name."""
        warmup = min(self.power, self.inv_gamma) > 0
        return Warmup(self.beta, self.power, self.inv_gamma) if warmup else Constant(self.beta)

    @property
    def model(self) -> nn.Module:
        """The model that is followed."""
        model: nn.Module = self.online_model if self.include_online_model else self.online_model[0]
        return model

    # --- which names ----------------------------------------------------------------------------

    def get_params_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters of what floats in a model like this one."""
        return _floating(model.named_parameters())

    def get_buffers_iter(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and buffers of what floats in a model like this one."""
        return _floating(model.named_buffers())

    def _left_out(self) -> tuple[set[str], ...]:
        return (
            set(self.param_or_buffer_names_no_ema),
            set(self.ignore_names),
            set(self.ignore_startswith_names),
        )

    def _ignored(self, name: str) -> bool:
        return name in self.ignore_names or name.startswith(tuple(self.ignore_startswith_names))

    def _averaged(self, name: str) -> bool:
        return not self._ignored(name) and name not in self.param_or_buffer_names_no_ema

    # --- moving ---------------------------------------------------------------------------------

    def get_current_decay(self) -> float:
        """The decay of the move that belongs to the last call of `update`."""
        n = self._steps.of(self.step) - self.update_after_step - 1
        value = 0.0 if n <= 0 else 1 - (1 + n / self.inv_gamma) ** -self.power
        return 0.0 if n <= 0 else float(min(max(value, self.min_value), self.beta))

    def update(self) -> None:
        """Call it after every step of the optimizer.

        Note:
            No collective, except under FSDP where it makes the copy or, under HSDP, writes the
            model. A host sync only after another writer changed `step` or `initted`.
        """
        step, every = self._steps.up(self.step), self.update_model_with_ema_every
        due = step % self.update_every == 0
        if not self._begun.of(self.initted):
            if self._average is None:
                self.init_ema()
            self.copy_params_from_model_to_ema()
            self.initted.fill_(True)
        elif due and step <= self.update_after_step:
            self.copy_params_from_model_to_ema()
        else:
            if due:
                self.update_moving_average(self.copied.module, self.model)
            if every is not None and step % every == 0:
                self.update_model_with_ema()

    @torch.no_grad()
    def update_moving_average(
        self,
        ma_model: nn.Module | None,
        current_model: nn.Module,
        current_decay: float | None = None,
    ) -> None:
        """Move the average towards the model; or, given them the other way round, the model."""
        if self.is_frozen:
            return
        decay = self.get_current_decay() if current_decay is None else current_decay
        # The sets of names are public, and scripts change them during training.
        if self._chosen != self._left_out():
            self._chosen = self._left_out()
            self.copied.choose(self.model, self._averaged)
        if ma_model is self.model:

            def weight(name: str) -> float:
                if self._ignored(name):
                    return 0.0
                return 1.0 if name in self.param_or_buffer_names_no_ema else 1 - decay

            self.copied.pull(self.model, 1 - decay, weight)
            return
        if self.move_ema_to_online_device and self.copied.module is not None:
            self.copied.module.to(next(current_model.parameters()).device)
        self.copied.move(current_model, decay)
        self.copied.copy_rest(lambda name: not self._ignored(name))

    def copy_params_from_model_to_ema(self) -> None:
        """The average is the model as it is now, ignored names included. No collective."""
        self.copied.move(self.model, 0.0)
        self.copied.copy_rest()

    def copy_params_from_ema_to_model(self) -> None:
        """The model is the average from now on. *Collective* under HSDP."""
        self.copied.pull(self.model, 1.0)

    def update_model_with_ema(self, decay: float | None = None) -> None:
        """The model becomes decay * model + (1 - decay) * average. *Collective* under HSDP."""
        decay = self.update_model_with_ema_beta if decay is None else decay
        if decay == 0.0:
            self.copy_params_from_ema_to_model()
        else:
            self.update_moving_average(self.model, self.model, decay)

    def add_to_optimizer_post_step_hook(self, optimizer: Optimizer) -> RemovableHandle:
        """`update` after every step. Returns the handle."""
        return optimizer.register_step_post_hook(lambda *_: self.update())

    def _refuse_swapped(self, verb: str) -> None:
        if self.include_online_model and self._average is not None:  # the model is saved too
            self.copied.follow(self.model)
            self.average.weights.refuse(verb, Reads.WHOLE_MODEL)

    # --- the copy -------------------------------------------------------------------------------

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


class KarrasEMA(EMA):
    """The power function of Karras et al. 2023: (1 - 1 / (n + 1))^(1 + gamma) is decay n.

    Saved by `average.save` or `average.snapshot`, its averages are mixed by `dist_ema.posthoc`,
    where `Power` is the schedule. Keys of `state_dict` are `initted`, `step`, `ema_model.NAME`.

    Args:
        model: a module.
        sigma_rel: the width of the profile, as a share of the training.
        gamma: the exponent, in place of the width.
        ema_model: as for `EMA`.
        update_every: calls from one move to the next.
        frozen: nothing moves the average but copies.
        param_or_buffer_names_no_ema: as for `EMA`, and so are the next two.
        ignore_names: as for `EMA`.
        ignore_startswith_names: as for `EMA`.
        allow_different_devices: changes nothing: devices may differ.
        move_ema_to_online_device: as for `EMA`.

    Raises:
        ValueError: both of `sigma_rel` and `gamma` are given, or none.

    Attributes:
        beta: the decay of the last call.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
    ) -> None:
        if (sigma_rel is None) == (gamma is None):
            raise ValueError(
                f"KarrasEMA takes one of sigma_rel and gamma, got {sigma_rel} and {gamma}."
            )
        self.gamma = gamma_of(sigma_rel) if sigma_rel is not None else gamma
        super().__init__(
            model,
            ema_model,
            beta=0.0,
            update_every=update_every,
            param_or_buffer_names_no_ema=param_or_buffer_names_no_ema,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            include_online_model=False,
            move_ema_to_online_device=move_ema_to_online_device,
        )
        self.is_frozen = frozen

    def iter_all_ema_params_and_buffers(self) -> Iterator[Tensor]:
        """The averaged tensors, parameters before buffers. *Aliases* the average."""
        model = self.ema_model
        named = (*self.get_params_iter(model), *self.get_buffers_iter(model))
        return (tensor for name, tensor in named if self._averaged(name))

    def _schedule(self) -> Schedule:
        return Power(gamma=self.gamma)

    def get_current_decay(self) -> float:
        """The decay of the last call of `update`."""
        assert self.gamma is not None
        return float((1 - 1 / (self._steps.of(self.step) + 1)) ** (1 + self.gamma))

    def update(self) -> None:
        """Call it after every step of the optimizer. No collective, no host sync."""
        step = self._steps.up(self.step)
        self.beta = self.get_current_decay()
        if step % self.update_every == 0:
            if not self._begun.of(self.initted):
                self.copy_params_from_model_to_ema()
                self.initted.fill_(True)
            self.update_moving_average(self.copied.module, self.model)


def _floating(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return (
        (name, tensor)
        for name, tensor in named
        if tensor.is_floating_point() or tensor.is_complex()
    )
