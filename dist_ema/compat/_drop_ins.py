"""What drop-ins inherit: a module with the average as child, its holder, store and restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ema import EMA
from ..sharding.parameters import Model
from . import _module, _parameter_list

__all__ = ["Count", "HolderDropIn", "ListDropIn", "ModuleDropIn"]


class Count:
    """The value of a buffer, read from its device only after another writer changed it."""

    def __init__(self) -> None:
        self._value, self._buffer, self._version = 0.0, torch.tensor(0), -1

    def of(self, buffer: Tensor) -> float:
        """The number in the buffer."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._value, self._buffer, self._version = buffer.item(), buffer, buffer._version
        return self._value

    def up(self, buffer: Tensor) -> float:
        """Add one. Returns what it was."""
        before = self.of(buffer)
        buffer.add_(1)
        self._value, self._version = before + 1, buffer._version
        return before

    def __reduce__(self) -> tuple[type[Count], tuple[()]]:
        """Copy without the known value: its version belongs to the tensor that was copied."""
        return Count, ()


class HolderDropIn:
    """A drop-in that is no module, and holds one as `ema`, in evaluation mode."""

    _average: _module.ModuleAverage

    @property
    def ema(self) -> nn.Module:
        """The module. Raises RuntimeError where FSDP shards the model and no module holds it."""
        return self._average.ema

    @property
    def average(self) -> EMA:
        """The `EMA` behind it, which saves for any number of ranks, and swaps under FSDP."""
        return self._average.average

    def state_dict(self) -> dict[str, Tensor]:
        """The state_dict of `ema`, or this rank's part of it. *Aliases* the average."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave on as many ranks, or full weights. *Collective* (FSDP)."""
        self._average.load_state_dict(state)


class ModuleDropIn(nn.Module):
    """A drop-in that is a module, with the average as a child."""

    child = "module"
    _average: _module.ModuleAverage | None = None

    @property
    def copied(self) -> _module.ModuleAverage:
        """The average behind it."""
        if self._average is None:
            raise RuntimeError(
                f"{type(self).__name__} has no average yet: the first update makes it."
            )
        return self._average

    @property
    def average(self) -> EMA:
        """The `EMA` behind it, which saves for any number of ranks, and swaps under FSDP."""
        return self.copied.average

    def _use(self, average: _module.ModuleAverage) -> None:
        self._average = average
        self._modules[self.child] = average.module  # None where FSDP shards the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the average."""
        return getattr(self, self.child)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only what is found nowhere else comes here, children included.
        return self.copied.ema if name == self.child else super().__getattr__(name)

    def _refuse_swapped(self, verb: str) -> None:
        """Do nothing: by default a checkpoint holds nothing of the model, swapped or not."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._refuse_swapped("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # FSDP shards the model: no child writes the average, so it is written here.
        if self._average is not None and self._average.module is None:
            for name, value in self._average.state_dict().items():
                destination[f"{prefix}{self.child}.{name}"] = value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        self._refuse_swapped("load_state_dict")
        start = f"{prefix}{self.child}."
        if self._average is not None:
            keys = [key for key in state_dict if key.startswith(start)]
            # Taken out, or a strict load would find keys that no child expects.
            weights = {key.removeprefix(start): state_dict.pop(key) for key in keys}
            if self._average.module is None:
                self._average.load_state_dict(weights)
            else:
                for name, value in self._average.named_here(weights).items():
                    state_dict[start + name] = value
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


class ListDropIn:
    """A drop-in over a list, which keeps parameters aside between `store` and `restore`.

    Attributes:
        collected_params: what `store` kept.
    """

    _list: _parameter_list.ParameterListAverage
    _default: Model | None = None  # the parameters of a call without any; None: those of the list
    collected_params: list[Tensor] | None = None

    def _given(self, parameters: Model | None) -> Model | None:
        return self._default if parameters is None else parameters

    @property
    def average(self) -> EMA:
        """The EMA behind it, which saves, loads and exports for any layout."""
        return self._list.ema

    def copy_to(self, parameters: Model | None = None) -> None:
        """Write the average into the parameters. *Collective* where the average is sharded."""
        self._list.copy_to(self._given(parameters))

    def store(self, parameters: Model | None = None) -> None:
        """Keep a copy of the parameters for `restore`."""
        self.collected_params = self._list.keep(self._given(parameters))

    def restore(self, parameters: Model | None = None) -> None:
        """Write what `store` kept into the parameters. Raises RuntimeError if nothing was."""
        if self.collected_params is None:
            raise RuntimeError("restore() found nothing that store() kept: call store() first.")
        self._list.put_back(self.collected_params, self._given(parameters))

    @property
    def shadow_params(self) -> list[Tensor]:
        """One tensor per parameter, in its form, made at each access. *Aliases* the average."""
        return list(self._list.shadows.values())

    @shadow_params.setter
    def shadow_params(self, values: list[Tensor]) -> None:
        self._list.fill(values)
