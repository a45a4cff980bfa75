"""`SwapWrites`: what user code writes to weights inside a swap, and what is kept of it.

[Note: writes]  What the block writes into a swapped weight becomes the average's, whether contents
were exchanged or cast. It is the only outcome that is the same everywhere and costs no second
model. Of replicas, the owner's write counts. Where shadows have another dtype, only elements that
differ from the cast average are taken, so the others keep their precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding.ownership import ParamState
from ..sharding.records import registered
from .swap_registry import SwapRegistry, versions

__all__ = ["SwapWrites", "describe"]


class SwapWrites:
    """Notices what is written from now on, until the swap is left.

    Args:
        states: Every weight and buffer of the model.
        swaps: Knows what swaps of other EMAs write meanwhile.
    """

    def __init__(self, states: Sequence[ParamState], swaps: SwapRegistry) -> None:
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._versions = [versions(state) for state in self._weights]
        self._buffers = [
            (state, state.shard.read().clone())
            for state in states
            if state.shard.kind == "buffer"
            and state.shard.persistent
            and registered(state.shard) is not None
        ]
        self._swaps = swaps
        swaps.nested.clear()

    def names(self) -> tuple[list[str], list[str]]:
        """The names of swapped weights and of others that were written.

        Weights whose storage moved are followed, and named if the new one holds other values.

        Raises:
            RuntimeError: A weight has another dtype, device, shape or order now.
        """
        swapped: list[str] = []
        others: list[str] = []
        for state, before in zip(self._weights, self._versions, strict=True):
            local, param = self._swaps.nested.get(id(state.shard.tensor), (0, 0))
            expected = before[0] + local, before[1] + param
            if state.moved or (state.layout_changed and state.shadow is not None):
                old = state.local
                state.rebind()
                written = old._version != expected[0] or not _same_bits(old, state.local)
            else:
                written = versions(state) != expected
            if written:
                (others if state.shadow is None else swapped).append(state.name)
        return swapped, others

    def changed_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """What every persistent buffer holds now, and the names of those that are the average's.

        A module's persistent buffers are one state: if one was written, all are. If one has another
        shape or dtype than before, the module keeps no state.
        """
        values: dict[str, Tensor] = {}
        changed, reshaped = set(), set()
        for state, applied in self._buffers:
            tensor, module = registered(state.shard), id(state.shard.place[0])
            if tensor is None:
                raise RuntimeError(f"{state.name} is no buffer of the model any more.")
            if (tensor.shape, tensor.dtype) != (state.shard.shape, applied.dtype):
                reshaped.add(module)
                continue
            values[state.name] = state.shard.read().clone()  # perhaps of another tensor by now
            if not _same_bits(values[state.name], applied):
                changed.add(module)
        names = [
            state.name
            for state, _ in self._buffers
            if id(state.shard.place[0]) in changed - reshaped
        ]
        return values, names


def describe(swapped: Sequence[str], others: Sequence[str], lost: Sequence[str]) -> list[str]:
    """A sentence about each kind of writes that there were, and about weights that are gone."""
    texts = []
    if swapped:
        texts.append(
            f"{', '.join(swapped[:5])} was written inside ema.swap() (max_norm, a clamp, a "
            "merge?). The average keeps what was written, live weights are restored."
        )
    if others:
        texts.append(
            f"{', '.join(others[:5])} is not averaged and was written inside ema.swap() (a "
            "merged adapter?). It keeps what was written: undo that by hand."
        )
    if lost:
        texts.append(
            f"{', '.join(lost[:5])} was replaced or removed inside ema.swap(): the model does not "
            "hold its live value any more. Edit a copy: copy.deepcopy(model) inside the block."
        )
    return texts


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
