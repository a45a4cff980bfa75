"""Boxes, ranges and element numbers of row-major weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass  # type: ignore[import-untyped,import-not-found]


from collections.abc import Iterator
from itertools import product

from .records import Region, Shard

__all__ = ["Box", "Numbering", "boxes", "boxes_with_data", "numbering", "runs", "split_box"]


# --- element numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbering:
    """Which elements of the full weight lie in a piece, as a formula that a kernel can evaluate.

    Element i of the piece is at place begin + i of a block of `sizes`; the digits of the place in that mixed base, times
    `strides`, added to `base`, are its number in the full weight. Slowest dimension first, as in a shape. The outermost
    size is never used. Called with (start, stop) it is the `indices` of a `kernels.Pair`.
    """

    begin: int = 0
    base: int = 0
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    device: torch.device | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        inner, stride = self.joined
        if not inner and stride == 1:  # a run of neighbours
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
        """((size, stride) of each inner dimension, fastest first; stride of the outermost), neighbours joined."""
        if 0 in self.sizes:
            return [], 1
        found: list[tuple[int, int]] = []
        for size, stride in zip(self.sizes[::-1], self.strides[::-1], strict=True):
            if found and stride == found[-1][0] * found[-1][1]:
                found[-1] = found[-1][0] * size, found[-1][1]
            elif size != 1:
                found.append((size, stride))
        return found[:-1], found[-1][1] if found else 1

    def last(self, n: int) -> int:
        """An upper bound of the numbers of n elements."""
        inner, stride = self.joined
        most = math.prod(size for size, _ in inner)
        return (
            self.base
            + sum((size - 1) * step for size, step in inner)
            + (self.begin + n) // most * stride
        )


@dataclass(frozen=True)
class Box:
    """offsets and sizes of a block of a weight, row-major."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The slices that cut this box out of a tensor that holds `outer`."""
        spans = zip(self.offsets, outer.offsets, self.sizes, strict=True)
        return tuple(slice(o - base, o - base + n) for o, base, n in spans)

    def intersect(self, other: Box) -> Box | None:
        """The common block, None if there is none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for end, start in zip(ends, offsets, strict=True))
        return Box(offsets, sizes) if all(n > 0 for n in sizes) else None


# --- geometry ----------------------------------------------------------------------------------------------------


def boxes(sizes: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The range [begin, end) of a block's row-major order as at most 2 * ndim - 1 boxes, in order."""
    if begin >= end:
        return
    if not sizes:
        yield Box((), ())
        return
    row = math.prod(sizes[1:])
    head, rest = divmod(begin, row)
    last, tail = divmod(end, row)
    if head == last:
        yield from (_under(head, box) for box in boxes(sizes[1:], rest, tail))
        return
    if rest:
        yield from (_under(head, box) for box in boxes(sizes[1:], rest, row))
        head += 1
    if last > head:
        yield Box((head, *[0] * (len(sizes) - 1)), (last - head, *sizes[1:]))
    if tail:
        yield from (_under(last, box) for box in boxes(sizes[1:], 0, tail))


def _under(row: int, box: Box) -> Box:
    return Box((row, *box.offsets), (1, *box.sizes))


def boxes_with_data(shard: Shard, region: Region, data: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of the full row-major weight that `region` covers, each with its view of `data`.

    data: [region.numel], in storage order. *Aliases*: the views have the boxes' shapes.
    """
    start = 0
    for box in boxes(region.sizes, region.begin, region.end):
        view = data[start : start + box.numel].view(box.sizes)
        start += box.numel
        offsets = tuple(a + b for a, b in zip(region.offsets, box.offsets, strict=True))
        if shard.order is None:
            yield Box(offsets, box.sizes), view
        else:
            back = tuple(shard.order.index(dim) for dim in range(len(offsets)))
            yield (
                Box(tuple(offsets[i] for i in back), tuple(box.sizes[i] for i in back)),
                view.permute(back),
            )


def split_box(box: Box, most: int) -> Iterator[Box]:
    """Row blocks of at most `most` elements that cover the box, in order."""
    if box.numel <= most or not box.sizes:
        yield box
        return
    rows = max(1, most // max(1, box.numel // box.sizes[0]))
    for start in range(0, box.sizes[0], rows):
        block = Box(
            (box.offsets[0] + start, *box.offsets[1:]),
            (min(rows, box.sizes[0] - start), *box.sizes[1:]),
        )
        if block.sizes[0] > 1:
            yield block
        else:
            inner = split_box(Box(block.offsets[1:], block.sizes[1:]), most)
            yield from (Box((block.offsets[0], *part.offsets), (1, *part.sizes)) for part in inner)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first element, how many) of each contiguous run of the box in the row-major weight, in the box's own order."""
    whole = len(shape)  # dimensions from here on are covered completely
    while whole > 0 and box.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    inner = math.prod(shape[whole:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if whole == 0:
        yield 0, inner
        return
    length = box.sizes[whole - 1] * inner
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    for steps in product(*(range(n) for n in box.sizes[: whole - 1])):
        yield base + sum(i * s for i, s in zip(steps, strides, strict=False)), length


def numbering(shard: Shard, region: Region, device: torch.device | None = None) -> Numbering:
    """Row-major element numbers in the full weight of the region's elements: a formula, for kernels."""
    order = range(len(region.sizes)) if shard.order is None else shard.order
    strides = tuple(math.prod(shard.shape[dim + 1 :]) for dim in order)
    base = sum(offset * stride for offset, stride in zip(region.offsets, strides, strict=True))
    return Numbering(region.begin, base, region.sizes, strides, device)
