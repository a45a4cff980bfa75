"""Whether each average and each averaged weight has memory of its own.

`b.data = a.data` puts two Parameters into one memory. If they lay there always, their averages are
the same. If they met later, a swap would have to put two averages into one place. A weight that was
given memory of the average (that of a `state_dict`, or of a teacher) would be its own average.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding.ownership import ParamState
from .average import Average

__all__ = ["refuse_shared"]


def refuse_shared(averages: Iterable[Average]) -> None:
    """Raise RuntimeError, by name, where memory is shared that cannot be.

    Note:
        *Cost*: 5 us per weight. No element is read where nothing is shared.
    """
    memories = [
        _Memory(state, tensor, tensor is state.shadow)
        for number, average in enumerate(averages)
        for state in average.averaged
        if state.shard.kind != "buffer" and state.averaged_region.numel
        for tensor in (state.shadow, None if number else state.live)
        if tensor is not None and tensor.data_ptr()
    ]
    for one, other in itertools.pairwise(sorted(memories, key=_Memory.place)):
        if not one.overlaps(other):
            continue
        if one.is_shadow != other.is_shadow:
            raise RuntimeError(
                f"{other.state.name} lies in the memory of the average now (of a state_dict, or of "
                "a teacher). Give it a copy."
            )
        if not one.agrees(other):
            raise RuntimeError(
                f"{other.state.name} lies in the memory of {one.state.name} now, and their "
                "averages differ. Give each its own memory, or register one Parameter under both "
                "names and call ema.rescan()."
            )


@dataclass
class _Memory:
    """Where a live weight or a shadow lies."""

    state: ParamState
    tensor: Tensor
    is_shadow: bool

    def place(self) -> tuple[str, int]:
        return str(self.tensor.device), self.tensor.data_ptr()

    def overlaps(self, later: _Memory) -> bool:
        """`later` follows in the order of `place`."""
        (device, begin), (other_device, other_begin) = self.place(), later.place()
        return device == other_device and other_begin < begin + self.tensor.nbytes

    def agrees(self, later: _Memory) -> bool:
        """What both hold has one average."""
        if self.is_shadow:  # of a teacher whose weights are tied as the model's are
            return self.state.live.data_ptr() == later.state.live.data_ptr()
        one, other = self.state.shadow, later.state.shadow
        assert one is not None
        assert other is not None
        start = (later.tensor.data_ptr() - self.tensor.data_ptr()) // self.tensor.element_size()
        return torch.equal(one[start : start + len(other)], other[: len(one) - start])
