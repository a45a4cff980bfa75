"""`Numbering`: the numbers of a region's elements in the full weight, as a formula for kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import geometry
from .records import Region, Shard

__all__ = ["Numbering"]


@dataclass(frozen=True)
class Numbering:
    """The numbers that the elements of a region have in the full weight, as a formula for kernels.

    Element i of the region is at place begin + i of a box of `sizes`. The digits of the place in
    that mixed base, times `strides`, added to `base`, are its number in the full weight. Slowest
    dimension first, as in a shape. The outermost size is never used. Called with (start, stop) it
    is the `indices` of a pair of live and shadow.
    """

    begin: int = 0
    base: int = 0
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    device: torch.device | None = None

    @classmethod
    def of(cls, shard: Shard, region: Region, device: torch.device | None = None) -> Numbering:
        """The row-major numbers of the region's elements in the full weight."""
        strides = geometry.strides(shard.shape)
        if shard.order is not None:
            strides = [strides[dim] for dim in shard.order]
        base = sum(offset * stride for offset, stride in zip(region.offsets, strides, strict=True))
        return cls(region.begin, base, region.sizes, tuple(strides), device)

    def __call__(self, start: int, stop: int) -> Tensor:
        inner, stride = self.joined
        if not inner and stride == 1:
            first = self.base + self.begin
            return torch.arange(first + start, first + stop, device=self.device)
        place = torch.arange(self.begin + start, self.begin + stop, device=self.device)
        numbers = torch.full_like(place, self.base)
        for size, step in inner:
            numbers += place % size * step
            place = place // size
        return numbers + place * stride

    @property
    def joined(self) -> tuple[list[tuple[int, int]], int]:
        """The dimensions, with those that follow each other without a gap made one.

        Returns:
            (size, stride) of each inner dimension, fastest first, and the outermost stride.
        """
        if 0 in self.sizes:
            return [], 1
        levels: list[tuple[int, int]] = []
        for size, stride in zip(self.sizes[::-1], self.strides[::-1], strict=True):
            if levels and stride == levels[-1][0] * levels[-1][1]:
                levels[-1] = levels[-1][0] * size, levels[-1][1]
            elif size != 1:
                levels.append((size, stride))
        return levels[:-1], levels[-1][1] if levels else 1

    @property
    def halved(self) -> Numbering | None:
        """Half the number of every even element, if its neighbour's number is one more.

        So elements 2i and 2i + 1 of the region are 2m and 2m + 1 of the full weight, where m is
        number i of the result. It has the dimensions of `joined`. None: this is not so.
        """
        inner, outer = self.joined
        # A single row has no digits to keep apart.
        begin, base = (self.begin, self.base) if inner else (0, self.base + self.begin)
        (size, step), *others = [*inner, (4, outer)]  # any even size: the outermost is not used
        strides = [stride for _, stride in others]
        if step != 1 or size < 3 or any(n % 2 for n in (begin, base, size, *strides)):
            return None
        sizes = [size // 2, *(size for size, _ in others)]
        steps = [1, *(stride // 2 for stride in strides)]
        return replace(
            self, begin=begin // 2, base=base // 2,
            sizes=tuple(sizes[::-1]), strides=tuple(steps[::-1]),
        )  # fmt: skip

    def last(self, n: int) -> int:
        """An upper bound of the numbers of n elements."""
        inner, stride = self.joined
        rows = (self.begin + n) // math.prod(size for size, _ in inner)
        return self.base + sum((size - 1) * step for size, step in inner) + rows * stride
