"""`Selection` and `Placement`: which weights are averaged, and where their shadows lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..sharding.derived import is_power_iteration_vector
from ..sharding.records import Shard

__all__ = ["OWN", "Placement", "Selection", "refuse_dtype"]

Chooser = str | Callable[[str], bool]
OWN = "own"


@dataclass(frozen=True)
class Selection:
    """Which weights and buffers are averaged.

    Args:
        only: A regex searched in names, or a predicate on them; None: every trainable weight.
        buffers: "copy": none. "average": every floating one. OWN: none, and a teacher keeps its
            own. Else a regex or a predicate that chooses them by name.
    """

    only: Chooser | None = None
    buffers: Chooser = "copy"

    def __post_init__(self) -> None:
        if not (isinstance(self.buffers, str) or callable(self.buffers)):
            raise ValueError(
                f"buffers must be 'copy', 'average', a regex or a predicate, got {self.buffers!r}."
            )

    def allows(self, name: str) -> bool:
        """`only=` lets the name through."""
        return self.only is None or _matches(self.only, name)

    def averages(self, shard: Shard) -> bool:
        """The weight is trained or the buffer chosen; it floats, and `only=` lets it through."""
        chosen = self._chooses_buffer(shard) if shard.kind == "buffer" else shard.trainable
        return chosen and self.can_average(shard)

    def can_average(self, shard: Shard) -> bool:
        """It has values that have a mean, and `only=` lets it through."""
        floats = shard.dtype.is_floating_point or shard.dtype.is_complex
        return floats and self.allows(shard.name)

    def _chooses_buffer(self, shard: Shard) -> bool:
        if (
            not shard.persistent
            or self.buffers in ("copy", OWN)
            or is_power_iteration_vector(shard)
        ):
            return False
        return self.buffers == "average" or _matches(self.buffers, shard.name)


def _matches(chooser: Chooser, name: str) -> bool:
    return re.search(chooser, name) is not None if isinstance(chooser, str) else chooser(name)


@dataclass
class Placement:
    """Where shadows lie.

    Args:
        split: Divide replicated weights among the ranks that hold them.
        dtype: Of the shadows.
        device: Of the shadows; None keeps each beside its weight.
        replicated: The ranks that hold the same plain weights, where no DDP says so.
    """

    split: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    replicated: dist.ProcessGroup | None = None

    @property
    def on_host(self) -> bool:
        """Shadows were asked into host memory."""
        return self.device is not None and self.device.type == "cpu"


def refuse_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that shadows cannot have."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float64 or bfloat16, got {dtype}.")
