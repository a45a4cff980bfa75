"""vLLM: the average as a `WeightSource`, so that vLLM's transports send it without a swap.

    source = EMASource(ema, dtype=torch.bfloat16)
    engine = WeightTransferTrainerFactory.trainer_init(..., source=source)
    engine.send_weights()  # on every rank; the live model stays what it is

vLLM is not imported: a source is anything with `metadata()` that iterates over full tensors. For
servers that read files, publish versions and let `dist-ema watch --notify` tell them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ema import EMA
from ..schedules import Schedule

__all__ = ["EMASource", "ParamMeta"]


class ParamMeta(NamedTuple):
    """A weight as it is sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class EMASource:
    """The weights of an average, to be iterated over as often as there are updates to send.

    Args:
        ema: The average. Names must be those of the Hugging Face checkpoint.
        which: As for `EMA.swap`.
        dtype: The dtype of all floating weights; None sends the model's own.

    Raises:
        ValueError: `dtype` is no floating dtype.

    Note:
        *Collective*: every rank iterates to the end, and gets every full tensor. *Cost*: see
        `EMA.tensors`.
    """

    def __init__(
        self, ema: EMA, which: int | str | Schedule = 0, dtype: torch.dtype | None = None
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating dtype of torch, or None, got {dtype!r}.")
        self._ema, self._which, self._dtype = ema, which, dtype

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every weight, in the order of iteration. Local."""
        return [
            ParamMeta(
                state.name,
                (self._dtype if state.shard.dtype.is_floating_point else None) or state.shard.dtype,
                tuple(state.shard.shape),
            )
            for state in self._ema.weights.average(self._which).persistent
            if state.shard.kind != "buffer"
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        dtypes = {weight.name: weight.dtype for weight in self.metadata()}
        for name, tensor in self._ema.tensors(self._which):
            yield name, tensor.to(dtypes[name])
