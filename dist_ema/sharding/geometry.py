"""`Box`: the boxes of a region, with their data; runs of elements and bytes. Nothing is moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .records import Region, Shard

__all__ = [
    "Box",
    "boxes",
    "boxes_with_data",
    "byte_runs",
    "bytes_of",
    "even",
    "runs",
    "split_box",
    "strides",
]


@dataclass(frozen=True)
class Box:
    """Offsets and sizes of a hyper-rectangle in a weight."""

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
        starts = (o - base for o, base in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(o, o + n) for o, n in zip(starts, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, None if there is none."""
        pairs = list(zip(self.slices, other.slices, strict=True))
        offsets = tuple(max(a.start, b.start) for a, b in pairs)
        sizes = tuple(min(a.stop, b.stop) - o for (a, b), o in zip(pairs, offsets, strict=True))
        return Box(offsets, sizes) if all(n > 0 for n in sizes) else None


def even(begin: int, end: int, rank: int, size: int) -> tuple[int, int]:
    """The rank's range of [begin, end) when it is divided evenly."""
    n = end - begin
    return begin + n * rank // size, begin + n * (rank + 1) // size


# --- boxes of a range ---------------------------------------------------------------------------


def boxes(sizes: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The range [begin, end) of a box's row-major order, as at most 2 * ndim - 1 boxes in order."""
    if begin >= end:
        return
    if not sizes:
        yield Box((), ())
        return
    row = math.prod(sizes[1:])
    first, head = divmod(begin, row)
    last, tail = divmod(end, row)
    if first == last:
        yield from _in_row(first, sizes, head, tail)
        return
    if head:  # the range starts inside a row
        yield from _in_row(first, sizes, head, row)
        first += 1
    if last > first:  # whole rows
        yield Box((first, *[0] * (len(sizes) - 1)), (last - first, *sizes[1:]))
    yield from _in_row(last, sizes, 0, tail)


def _in_row(row: int, sizes: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The boxes of a range inside one row of the first dimension."""
    for box in boxes(sizes[1:], begin, end):
        yield Box((row, *box.offsets), (1, *box.sizes))


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
            back = [shard.order.index(dim) for dim in range(len(offsets))]
            row_major = Box(tuple(offsets[i] for i in back), tuple(box.sizes[i] for i in back))
            yield row_major, view.permute(back)


def split_box(box: Box, most: int) -> Iterator[Box]:
    """Boxes of whole rows and of at most `most` elements that cover the box, in order."""
    if box.numel <= most or not box.sizes:
        yield box
        return
    inner = Box(box.offsets[1:], box.sizes[1:])
    rows = max(1, most // max(1, inner.numel))
    for start in range(0, box.sizes[0], rows):
        n = min(rows, box.sizes[0] - start)
        for part in [inner] if n > 1 else split_box(inner, most):
            yield Box((box.offsets[0] + start, *part.offsets), (n, *part.sizes))


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The runs of the box in the row-major weight, in the box's own order.

    Yields:
        (first element, how many)
    """
    whole = len(shape)  # dimensions from here on are covered completely
    while whole > 0 and box.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    inner = math.prod(shape[whole:])
    if whole == 0:
        yield 0, inner
        return
    steps = strides(shape)
    length = box.sizes[whole - 1] * inner
    base = sum(o * s for o, s in zip(box.offsets, steps, strict=True))
    for place in product(*(range(n) for n in box.sizes[: whole - 1])):
        yield base + sum(i * s for i, s in zip(place, steps, strict=False)), length


def byte_runs(
    box: Box, shape: tuple[int, ...], data: memoryview, itemsize: int
) -> Iterator[tuple[int, memoryview]]:
    """The runs of the box as bytes, each with its part of `data`, which holds the box.

    Yields:
        (first byte in the row-major weight, bytes)
    """
    done = 0
    for start, n in runs(box, shape):
        end = done + n * itemsize
        yield start * itemsize, data[done:end]
        done = end


def bytes_of(data: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host. *Aliases* it."""
    return memoryview(data.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def strides(shape: tuple[int, ...]) -> list[int]:
    """Of the dimensions of a row-major weight, in elements."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
