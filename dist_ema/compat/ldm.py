"""LitEma of latent-diffusion and its descendants: `from dist_ema.compat.ldm import LitEma`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ema import EMA
from ..sharding.parameters import Model
from ._parameter_list import ParameterListAverage, keep, put_back, source, trainable

__all__ = ["LitEma"]


class LitEma(nn.Module):
    """The average of the trainable parameters of `model`, as buffers under their names without dots.

    decay: in [0, 1]. use_num_upates: the decay of update n is at most (1 + n) / (10 + n). (So the original spells it;
    use_num_updates is the same.)

    Other than the original: float32 shadows for 16-bit parameters, and decay and shadows stay what they are when the module
    around is cast; no `module.` of DDP in the names; names that are one without their dots raise ValueError. *Collective*
    where the model is sharded: construction and `copy_to`. Raises ValueError for a decay outside of [0, 1].
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
        self._listed = ParameterListAverage(trainable(model), decay)
        self.m_name2s_name = {name: name.replace(".", "") for name in self._listed.table}
        self._refuse_names()
        self._read: dict[str, tuple[Tensor, int, float]] = {}
        beside = next(iter(self._listed.table.values())).device
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32, device=beside))
        self.register_buffer(
            "num_updates", torch.tensor(0 if counted else -1, dtype=torch.int, device=beside)
        )
        self._show()
        self.collected_params: list[Tensor] = []

    def _refuse_names(self) -> None:
        short = list(self.m_name2s_name.values())
        odd = [
            name
            for name, s in self.m_name2s_name.items()
            if short.count(s) > 1 or hasattr(self, s) or s == "decay"
        ]
        if odd:
            raise ValueError(
                f"{', '.join(odd[:5])}: without dots the name is taken already. Rename the parameter."
            )

    @property
    def average(self) -> EMA:
        """What saves, loads and exports in any layout."""
        return self._listed.ema

    def reset_num_updates(self) -> None:
        """Count the updates from 0 again."""
        self.num_updates = torch.zeros_like(self.num_updates)

    def forward(self, model: nn.Module) -> None:
        """Move towards the trainable parameters of `model`. No collective, and no host sync.

        Raises ValueError if others than at the construction are trainable.
        """
        decay, n = self._number("decay"), self._number("num_updates")
        if n >= 0:
            self.num_updates += 1
            self._read["num_updates"] = self.num_updates, self.num_updates._version, n + 1
            decay = min(decay, (2 + n) / (11 + n))
        before = self._listed.ema
        self._listed.update(decay, self._listed.of(model))
        if self._listed.ema is not before:
            self._show()

    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of `model`. *Collective* where the average is sharded."""
        self._listed.copy_to(self._listed.of(model))

    def store(self, parameters: Model) -> None:
        """Keep a copy of the parameters for `restore`."""
        self.collected_params = keep(source(parameters))

    def restore(self, parameters: Model) -> None:
        """Write what `store` kept into the parameters. Raises ValueError if they are not as many."""
        put_back(source(parameters), self.collected_params)

    def _number(self, name: str) -> float:
        """The value of a buffer, asked of the device only after somebody else wrote it."""
        buffer, known = getattr(self, name), self._read.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = self._read[name] = buffer, buffer._version, float(buffer)
        return known[2]

    def _show(self) -> None:
        """The shadows as buffers. *Aliases*."""
        for name, shadow in self._listed.table.items():
            self._buffers[self.m_name2s_name[name]] = shadow

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Go where the module around goes, in the dtypes of before: a decay of 0.9999 is 1 in 16 bits."""
        device = fn(torch.empty(0, device=self.decay.device)).device
        if device != self.decay.device:
            self._listed.to(device, None)
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
        super()._load_from_state_dict(
            *args
        )  # NOTE: assign=True puts other tensors in the place of the shadows
        self._listed.fill_table({name: getattr(self, s) for name, s in self.m_name2s_name.items()})
        self._show()
