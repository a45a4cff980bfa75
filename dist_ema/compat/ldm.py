"""LitEma of latent-diffusion, a module whose buffers are the shadows, and of its descendants.

from dist_ema.compat.ldm import LitEma
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._drop_ins import Count, ListDropIn
from ._parameter_list import ParameterListAverage, as_model

__all__ = ["LitEma"]


class LitEma(ListDropIn, nn.Module):
    """The average of the trainable parameters of `model`, as buffers under names without dots.

    Other than the original: shadows of 16-bit parameters are float32; decay and shadows keep their
    dtype when the module around is cast; names lack DDP's `module.`.

    Args:
        model: whose parameters are averaged.
        decay: in [0, 1].
        use_num_upates: bound the decay of update n by (1 + n) / (10 + n); the original's spelling.
        use_num_updates: the same.

    Raises:
        ValueError: the decay is outside of [0, 1], or two names are one without their dots.

    Note:
        *Collective* where the model is sharded: construction and `copy_to`.
    """

    decay: Tensor  # float32 []
    num_updates: Tensor  # int32 [], -1 if they are not counted

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_upates: bool = True,
        *,
        use_num_updates: bool | None = None,
    ) -> None:
        super().__init__()
        counted = use_num_upates if use_num_updates is None else use_num_updates
        self._list = ParameterListAverage(as_model(model, only_trainable=True), decay)
        shadows = self._list.shadows
        device = next(iter(shadows.values())).device
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32, device=device))
        self.register_buffer(
            "num_updates", torch.tensor(0 if counted else -1, dtype=torch.int, device=device)
        )
        self.m_name2s_name = {name: name.replace(".", "") for name in shadows}
        short = list(self.m_name2s_name.values())
        taken = [
            name for name, s in self.m_name2s_name.items() if short.count(s) > 1 or hasattr(self, s)
        ]
        if taken:
            raise ValueError(
                f"{', '.join(taken[:5])}: without dots the name is taken already. Rename the "
                "parameter."
            )
        self._known_decay, self._known_updates = Count(), Count()
        self._show()

    def reset_num_updates(self) -> None:
        """Count the updates from 0 again."""
        self.num_updates = torch.zeros_like(self.num_updates)

    def forward(self, model: nn.Module) -> None:
        """Move towards the trainable parameters of `model`. No collective, and no host sync.

        Raises:
            ValueError: others are trainable than at the construction.
        """
        decay, n = self._known_decay.of(self.decay), self._known_updates.of(self.num_updates)
        before = self._list.ema
        if n >= 0:
            self._known_updates.up(self.num_updates)
            decay = min(decay, (2 + n) / (11 + n))
        self._list.update(decay, self._list.parameters_of(model))
        if self._list.ema is not before:
            self._show()

    def copy_to(self, model: nn.Module) -> None:  # type: ignore[override]
        """Write the average into the parameters of `model`. *Collective* where it is sharded."""
        super().copy_to(self._list.parameters_of(model))

    def _show(self) -> None:
        """Register the shadows as buffers. *Aliases*."""
        for name, shadow in self._list.shadows.items():
            self._buffers[self.m_name2s_name[name]] = shadow

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Follow the module around to a device, not to a dtype: in 16 bits 0.9999 is 1."""
        device = fn(torch.empty(0, device=self.decay.device)).device
        if device != self.decay.device:
            self.average.to(device)
            self.decay, self.num_updates = self.decay.to(device), self.num_updates.to(device)
            self._show()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._show()

    def _save_to_state_dict(self, *args: Any) -> None:
        self._show()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._show()
        super()._load_from_state_dict(*args)
        # NOTE: assign=True has put other tensors in the place of the shadows.
        self._list.fill({name: getattr(self, s) for name, s in self.m_name2s_name.items()})
        self._show()
