"""The snippets that projects paste: `from dist_ema.compat.shadow import EMA` (register, update, apply_shadow, restore) or
`ModelEMA` (update, apply, restore)."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ema as engine
from ..sharding import wrappers
from ._parameter_list import ParameterListAverage, trainable

__all__ = ["EMA", "ModelEMA"]


class _Lender:
    """Parameters kept aside in `backup` while the average is in their place."""

    _listed: ParameterListAverage | None
    backup: dict[str, Tensor]

    @property
    def average(self) -> engine.EMA:
        """What saves, loads and exports in any layout. Raises RuntimeError before `register`."""
        return self._begun("average").ema

    def _begun(self, verb: str) -> ParameterListAverage:
        if self._listed is None:
            raise RuntimeError(f"{verb} without a register() before it.")
        return self._listed

    def _lend(self, verb: str) -> None:
        listed = self._begun(verb)
        self.backup = listed.keep()
        listed.copy_to()

    def restore(self) -> None:
        """Write `backup` into the model and forget it. Raises RuntimeError if there is none."""
        if not self.backup:
            raise RuntimeError("restore() without parameters in backup: nothing was applied.")
        self._begun("restore").put_back(self.backup)
        self.backup = {}


class EMA(_Lender):
    """The average of the trainable parameters of `model` from `register` on: decay * shadow + (1 - decay) * parameter.

    Other than the snippet: parameters are written in place, so optimizers and wrappers keep theirs; float32 shadows for
    16-bit parameters; no `module.` of DDP in the names; RuntimeError for calls in the wrong order. *Collective* where the
    model is sharded: `register` and `apply_shadow`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.backup = {}
        self._listed = None

    @property
    def shadow(self) -> dict[str, Tensor]:
        """By name, in the form of the parameters; {} before `register`. *Aliases* the average."""
        return {} if self._listed is None else self._listed.table

    @shadow.setter
    def shadow(self, values: dict[str, Tensor]) -> None:
        """Raises ValueError, and changes nothing, for other names or shapes."""
        if self._listed is None:
            self.register()
        self._begun("shadow").fill_table(values)

    def register(self) -> None:
        """Begin, or begin again, at the parameters of now. Raises ValueError if none is trainable."""
        self._listed = ParameterListAverage(trainable(self.model), self.decay)

    def update(self) -> None:
        """Move towards the parameters. No collective. Raises ValueError if others are trainable than at `register`."""
        listed = self._begun("update")
        listed.update(self.decay, listed.of(self.model))

    def apply_shadow(self) -> None:
        """Keep the parameters in `backup`, and write the average into the model. *Collective* where it is sharded."""
        self._lend("apply_shadow")


class ModelEMA(_Lender):
    """The average of all that floats in the state_dict of `model`: trainable weights, and buffers like BatchNorm's.

    Frozen weights and integer buffers are the model's. Other than the snippet: float32 shadows for 16-bit weights; tied
    weights are averaged once; integers are not truncated averages; no `module.` of DDP in the names. *Collective* where the
    model is sharded: construction and `apply`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.backup = {}
        self._listed: ParameterListAverage = ParameterListAverage(
            wrappers.unwrapped(model), decay, buffers=True
        )

    @property
    def shadow(self) -> dict[str, Tensor]:
        """By name, in the form of the weights; frozen ones and integers are those of the model. *Aliases* both."""
        return dict(zip(self._listed.names, self._listed.shadows, strict=True))

    @shadow.setter
    def shadow(self, values: dict[str, Tensor]) -> None:
        """Frozen weights and integers in `values` are passed over. Raises ValueError, and changes nothing, for other names
        or shapes."""
        self._listed.fill_table(values)

    def update(self) -> None:
        """Move towards the model. No collective."""
        self._listed.update(self.decay)

    def apply(self) -> None:
        """Keep weights and buffers in `backup`, and write the average into the model. *Collective* where it is sharded."""
        self._lend("apply")
