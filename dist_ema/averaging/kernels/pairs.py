"""`ShadowPair`: shadows and live of one weight, as every kernel takes them; `merge` joins pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...packing import packs
from .rounding import ROUND

__all__ = ["LIVE", "SHADOW", "ShadowPair", "Weights", "join", "merge", "touch"]

Weights = Sequence[float | Tensor]  # 1 - decay of each average: floats, or fp32 [] on a device

# The dtypes that compiled kernels read and average, on a CPU and on a GPU.
LIVE = (torch.float32, torch.bfloat16, torch.float16)
SHADOW = (torch.float32, torch.bfloat16)


@dataclass
class ShadowPair:
    """The shadows of one weight, one per average, and the live elements that they average.

    All tensors are 1-D and have one length. `indices(start, stop)` gives the numbers of these
    elements in the full weight, as int64; `huge` says that numbers beyond 32 bits may occur.
    """

    name: str
    shadows: list[Tensor]
    live: Tensor
    indices: Callable[[int, int], Tensor]
    huge: bool = True

    def __len__(self) -> int:
        return len(self.live)

    @property
    def tensors(self) -> list[Tensor]:
        """Live, then the shadows."""
        return [self.live, *self.shadows]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Those of live and of the shadows."""
        return self.live.dtype, self.shadows[0].dtype

    @property
    def rounds(self) -> bool:
        """The shadows have 16 bits: they round stochastically ([Note: rounding] in rounding)."""
        return self.shadows[0].dtype in ROUND

    @property
    def is_uniform(self) -> bool:
        """Live has the dtype of the shadows and lies on their device, so nothing is cast."""
        shadow = self.shadows[0]
        return (self.live.dtype, self.live.device) == (shadow.dtype, shadow.device)

    def follows(self, other: ShadowPair) -> bool:
        """Every shadow begins where the same shadow of `other` ends."""
        return all(touch(a, b) for a, b in zip(other.shadows, self.shadows, strict=True))


def touch(a: Tensor, b: Tensor) -> bool:
    """b begins where a ends, in the same storage."""
    if a.data_ptr() + a.nbytes != b.data_ptr() or a.dtype != b.dtype:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The one view over tensors that lie end to end. *Aliases* them."""
    return tensors[0].as_strided((sum(map(len, tensors)),), (1,))


def merge(pairs: Iterable[ShadowPair]) -> Iterator[ShadowPair]:
    """Join consecutive pairs that touch on both sides. The first one's name and indices remain."""
    # Without a bound on the sizes, so that a pack ends only where two pairs do not touch.
    for pack in packs(pairs, lambda _: 0, 0, lambda a, b: touch(a.live, b.live) and b.follows(a)):
        first = pack[0]
        if len(pack) > 1:
            shadows = [join(column) for column in zip(*(p.shadows for p in pack), strict=True)]
            first = replace(first, shadows=shadows, live=join([pair.live for pair in pack]))
        yield first
