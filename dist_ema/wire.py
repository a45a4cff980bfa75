"""Bounded windows of bytes between ranks.

[Note: windows]  Everything travels as uint8, because gloo cannot send int16 or float8 in collectives, and packed: one
flat window of the bytes of 300 small tensors takes a hundredth of the time of 300 collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks, wire_device

__all__ = ["Part", "broadcast", "stream"]

WINDOW = 4 << 20  # bytes that one broadcast moves
STREAM = 16 << 20  # bytes that one send moves, if no single part is longer
Part = tuple[int, tuple[int, ...], Tensor]  # number of the weight, offsets of the block in it, the block


def broadcast(pieces: list[Tensor], source: int, group: dist.ProcessGroup) -> None:
    """Overwrite 1-D `pieces` with the source's, in place. *Collective* over `group`; `source` is a rank in it.

    *Cost*: one scratch of 4 MB; long pieces travel from and into place, short ones packed together.
    """
    root = dist.get_global_rank(group, source)
    mine = dist.get_rank(group) == source
    wire = wire_device(group)
    for bucket in _buckets([piece.view(torch.uint8) for piece in pieces if piece.numel()]):
        if len(bucket) == 1 and wire.type in ("cpu", bucket[0].device.type):
            dist.broadcast(bucket[0], root, group=group)
            continue
        packed = torch.cat(bucket).to(bucket[0].device if wire.type == "cpu" else wire)
        dist.broadcast(packed, root, group=group)
        if not mine:
            torch._foreach_copy_(bucket, list(packed.split([piece.numel() for piece in bucket])))


def _buckets(pieces: list[Tensor]) -> Iterator[list[Tensor]]:
    """Windows of at most WINDOW bytes: slices of long pieces, and runs of short ones of one device."""
    bucket: list[Tensor] = []
    size = 0
    for piece in pieces:
        if bucket and (size + piece.numel() > WINDOW or piece.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        if piece.numel() >= WINDOW // 4:
            yield from ([part] for part in piece.split(WINDOW))
        else:
            bucket.append(piece)
            size += piece.numel()
    if bucket:
        yield bucket


def stream(
    ranks: Ranks,
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    mine: Sequence[Part],
    sink: Callable[[int, tuple[int, ...], Tensor], None],
    everywhere: bool = False,
) -> None:
    """Hand every rank's parts to `sink` on the first rank, or on all. *Collective*. *Cost*: one window and one copy.

    dtypes and dims describe the weights by number, alike on every rank.
    """
    for source in range(ranks.size):
        if source == ranks.rank:
            for part in mine:
                sink(*part)
            if ranks.size > 1 and (everywhere or source > 0):
                _send(ranks, mine, everywhere)
        elif everywhere or ranks.first:
            for part in _receive(ranks, source, dtypes, dims, everywhere):
                sink(*part)


def _send(ranks: Ranks, mine: Sequence[Part], everywhere: bool) -> None:
    wire = ranks.wire_device()

    def out(data: Tensor) -> None:
        data = data.to(wire)
        ranks.share(data, ranks.rank) if everywhere else ranks.send(data, 0)

    table = [n for number, offsets, data in mine for n in (number, *offsets, *data.shape)]
    out(torch.tensor([len(mine), len(table)]))
    if mine:
        out(torch.tensor(table))
    for window in _windows([data.nbytes for _, _, data in mine]):
        out(torch.cat([mine[i][2].contiguous().view(-1).view(torch.uint8).to(wire) for i in window]))


def _receive(
    ranks: Ranks, source: int, dtypes: Sequence[torch.dtype], dims: Sequence[int], everywhere: bool
) -> Iterator[Part]:
    wire = ranks.wire_device()

    def take(n: int, dtype: torch.dtype) -> Tensor:
        data = torch.empty(n, dtype=dtype, device=wire)
        ranks.share(data, source) if everywhere else ranks.receive(data, source)
        return data

    count, length = take(2, torch.int64).tolist()
    if not count:
        return
    table = _read_table(take(length, torch.int64).tolist(), dims)
    sizes = [math.prod(shape) * dtypes[number].itemsize for number, _, shape in table]
    for window in _windows(sizes):
        data = take(sum(sizes[i] for i in window), torch.uint8)
        for i, raw in zip(window, data.split([sizes[i] for i in window]), strict=True):
            number, offsets, shape = table[i]
            # NOTE: the clone aligns the bytes; a view of another dtype needs an offset that its size divides.
            yield number, offsets, raw.clone().view(dtypes[number]).view(shape)


def _read_table(numbers: list[int], dims: Sequence[int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    table, at = [], 0
    while at < len(numbers):
        number, d = numbers[at], dims[numbers[at]]
        table.append((number, tuple(numbers[at + 1 : at + 1 + d]), tuple(numbers[at + 1 + d : at + 1 + 2 * d])))
        at += 1 + 2 * d
    return table


def _windows(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Runs of parts of at most one window of bytes together, the same on both ends of the wire."""
    window: list[int] = []
    filled = 0
    for i, n in enumerate(sizes):
        if window and filled + n > STREAM:
            yield window
            window, filled = [], 0
        window.append(i)
        filled += n
    if window:
        yield window
