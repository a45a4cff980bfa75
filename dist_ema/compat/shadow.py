"""The snippets that projects paste: `from dist_ema.compat.shadow import EMA` or `ModelEMA`.

`EMA` has register, update, apply_shadow and restore; `ModelEMA` has update, apply and restore.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import ema as engine
from ..sharding import wrappers
from ._parameter_list import ParameterListAverage, as_model

__all__ = ["EMA", "ModelEMA"]


class _Backup:
    """Parameters kept aside in `backup` while the average is in their place."""

    _begun: ParameterListAverage | None = None

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.backup: dict[str, Tensor] = {}

    @property
    def average(self) -> engine.EMA:
        """The EMA behind it. Raises RuntimeError before `register`."""
        return self._list.ema

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The shadows by name, in the form of the weights; {} before `register`. *Aliases* them.

        What is not averaged is the model's. A table of other shapes (of `EMA`: of other names)
        raises ValueError when it is set, and changes nothing.
        """
        return {} if self._begun is None else self._begun.shadows

    @shadow.setter
    def shadow(self, values: dict[str, Tensor]) -> None:
        if self._begun is None:
            self._begin()
        self._list.fill(values)

    def update(self) -> None:
        """Move towards the model. No collective.

        Raises:
            ValueError: the trainable parameters are not those of `register` (in `EMA`).
        """
        self._list.update(self.decay, self._list.parameters_of(self.model))

    def restore(self) -> None:
        """Write `backup` into the model and forget it. Raises RuntimeError if there is none."""
        if not self.backup:
            raise RuntimeError(
                "restore() found no backup: apply the average first, and restore once."
            )
        # In the order of the list, whatever a script did to the dict.
        self._list.put_back([self.backup[name] for name in self._list.names])
        self.backup = {}

    def _begin(self) -> None:
        self._begun = ParameterListAverage(as_model(self.model, only_trainable=True), self.decay)

    @property
    def _list(self) -> ParameterListAverage:
        if self._begun is None:
            raise RuntimeError("this EMA has no average yet: call register() first.")
        return self._begun

    def _apply(self) -> None:
        self.backup = dict(zip(self._list.names, self._list.keep(), strict=True))
        self._list.copy_to()


class EMA(_Backup):
    """The average of the trainable parameters: decay * shadow + (1 - decay) * parameter.

    Other than the snippet: parameters are written in place, so optimizers and wrappers keep theirs;
    shadows of 16-bit parameters are float32; names lack DDP's `module.`; calls in the wrong order
    raise RuntimeError.

    Note:
        *Collective* where the model is sharded: `register` and `apply_shadow`.
    """

    def register(self) -> None:
        """Begin, or begin again, at the parameters of now. Raises ValueError if all are frozen."""
        self._begin()

    def apply_shadow(self) -> None:
        """Keep the parameters in `backup`, and write the average into the model."""
        self._apply()


class ModelEMA(_Backup):
    """The average of all that floats in the state_dict: trainable weights, and buffers.

    Frozen weights and integer buffers are the model's. Other than the snippet: shadows of 16-bit
    weights are float32; tied weights are averaged once; integers are not truncated averages; names
    lack DDP's `module.`.

    Note:
        *Collective* where the model is sharded: construction and `apply`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self._begun = ParameterListAverage(wrappers.unwrapped(model), decay, buffers="average")

    def apply(self) -> None:
        """Keep weights and buffers in `backup`, and write the average into the model."""
        self._apply()
