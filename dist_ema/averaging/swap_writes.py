"""`SwapWrites`: which weights and buffers the block of a swap wrote, and what is said of it.

[Note: writes]  What the block writes into a swapped weight becomes the average's, whether contents
were exchanged or cast. It is the only outcome that is the same everywhere and costs no second
model. The owner's write counts among replicas. Where shadows have another dtype, only elements that
differ from the cast average are taken, so the others keep their precision. Version counters tell of
a write, but not of one through `.data`, by NumPy or by a foreign kernel. So the bits of swapped
weights are summed at both ends, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding import fingerprint, ownership, records
from .storage_watch import versions
from .swap_registry import SwapRegistry

__all__ = ["SwapWrites", "describe"]


class SwapWrites:
    """Notices what is written from now on, until the swap is left.

    Args:
        states: Every weight and buffer of the model.
        swaps: Knows what swaps of other EMAs write meanwhile.
    """

    def __init__(self, states: Sequence[ownership.ParamState], swaps: SwapRegistry) -> None:
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._versions = [versions(state) for state in self._weights]
        self._sums = self._bit_sums()
        self._buffers = [
            (state, state.shard.read().clone())
            for state in states
            if state.shard.kind == "buffer"
            and state.shard.persistent
            and records.registered(state.shard) is not None
        ]
        self._swaps = swaps
        swaps.nested.clear()  # what others wrote before is in the counters already

    def names(self) -> tuple[list[str], list[str]]:
        """The names of swapped weights and of others that were written.

        Weights whose storage moved are followed, and named if the new one holds other values.

        Raises:
            RuntimeError: A weight has another dtype, device, shape or order now.
        """
        counted: list[bool] = []
        for state, before in zip(self._weights, self._versions, strict=True):
            local, param = self._swaps.nested.get(id(state.shard.tensor), (0, 0))
            expected = before[0] + local, before[1] + param
            if state.moved or (state.layout_changed and state.shadow is not None):
                old = state.local
                state.rebind()
                counted.append(old._version != expected[0] or not _same_bits(old, state.local))
            else:
                counted.append(versions(state) != expected)
        # Summed after `rebind`, so that weights that moved are read where they lie now.
        sums = zip(self._weights, counted, self._sums, self._bit_sums(), strict=True)
        written = [state for state, is_counted, old, new in sums if is_counted or old != new]
        swapped = [state.name for state in written if state.shadow is not None]
        return swapped, [state.name for state in written if state.shadow is None]

    def _bit_sums(self) -> list[int]:
        """The bit sums of swapped weights; 0 for others, which an undone merge may round."""
        return fingerprint.bit_sums(
            state.local[:0] if state.shadow is None else state.live for state in self._weights
        )

    def changed_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """The values of all persistent buffers, and the names of those that become the average's.

        A module's persistent buffers are one state: if one was written, all are. If one has another
        shape or dtype than before, the module keeps no state.
        """
        buffers: dict[str, Tensor] = {}
        changed, reshaped = set(), set()
        for state, applied in self._buffers:
            tensor, module = records.registered(state.shard), id(state.shard.place[0])
            if tensor is None:
                raise RuntimeError(
                    f"{state.name} is no buffer of the model any more. Edit the model outside of "
                    "ema.swap(), and call ema.rescan()."
                )
            if (tensor.shape, tensor.dtype) != (state.shard.shape, applied.dtype):
                reshaped.add(module)
                continue
            buffers[state.name] = state.shard.read().clone()  # perhaps of another tensor by now
            if not _same_bits(buffers[state.name], applied):
                changed.add(module)
        names = [
            state.name
            for state, _ in self._buffers
            if id(state.shard.place[0]) in changed - reshaped
        ]
        return buffers, names


def describe(swapped: Sequence[str], others: Sequence[str], lost: Sequence[str]) -> list[str]:
    """A sentence about each kind of writes that there were, and about weights that are gone."""
    predicates = (
        (
            swapped,
            "was written inside ema.swap() (max_norm, a clamp, a merge?). The average keeps what "
            "was written, live weights are restored.",
        ),
        (
            others,
            "is not averaged and was written inside ema.swap() (a merged adapter, a fused layer?). "
            "It keeps what was written: undo that by hand.",
        ),
        (
            lost,
            "was replaced or removed inside ema.swap(): the model does not hold its live value any "
            "more. Edit a copy: copy.deepcopy(model) inside the block.",
        ),
    )
    return [f"{', '.join(names[:5])} {predicate}" for names, predicate in predicates if names]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
