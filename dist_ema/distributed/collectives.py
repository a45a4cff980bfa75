"""Windows of bytes over the process group: `broadcast` in place, `stream_to_all` with their blocks.

[Note: windows]  Everything travels as uint8, because gloo cannot send int16 or float8 in
collectives. Small tensors are packed: one window with the bytes of 300 of them takes a hundredth of
the time of 300 collectives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..packing import packs
from .ranks import Ranks, transfer_device

__all__ = [
    "Block",
    "broadcast",
    "stream_to_all",
]

WINDOW = 4 << 20  # bytes that one collective moves
AHEAD = 2  # windows in place that are under way while the oldest is waited for
STREAM = 16 << 20  # bytes that one collective moves, or one longer block


class Block(NamedTuple):
    """A box of a weight with its data, in transit."""

    number: int  # of the weight
    offsets: tuple[int, ...]
    data: Tensor


class _BlockHeader(NamedTuple):
    """A block that a rank holds, without its data."""

    source: int
    number: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


Consume = Callable[[int, tuple[int, ...], Tensor], None]  # takes the fields of a Block


def broadcast(
    runs: Iterable[tuple[int, Tensor]],
    group: dist.ProcessGroup,
    wait_for: Callable[[dist.Work], object] = dist.Work.wait,
) -> None:
    """Overwrite 1-D runs with what their sources hold, in place.

    A window that several ranks fill is summed: each contributes its bytes, and zeros for those of
    the others. So the number of collectives does not grow with the number of ranks.

    Args:
        runs: (source, as a rank in the group; run), the same sources and lengths on every rank.
        group: The ranks that take part.
        wait_for: Waits for a collective; `Ranks.wait_for` within a timeout.

    Note:
        *Collective* over `group`. *Cost*: one collective per 4 MB, through one window. A long
        run travels in place.
    """
    rank = dist.get_rank(group)
    in_flight: deque[dist.Work] = deque()
    for window in _packed(runs):
        views = [view for _, view in window]
        root = dist.get_global_rank(group, window[0][0])
        # gloo sends from the host and nccl from the device, whatever holds the weight.
        device = transfer_device(group, views[0].device)
        device = views[0].device if device.type == "cpu" else device
        if len(views) == 1 and device.type == views[0].device.type:
            in_flight.append(dist.broadcast(views[0], root, group=group, async_op=True))
            if len(in_flight) > AHEAD:
                wait_for(in_flight.popleft())
            continue
        size = sum(map(len, views))
        # Summed as int32: a byte is 0 on all ranks but one, so nothing is carried.
        words = torch.zeros(-(-size // 4), dtype=torch.int32, device=device)
        parts = words.view(torch.uint8)[:size].split([len(view) for view in views])
        runs_with_parts = list(zip(window, parts, strict=True))
        _copy([(part, view) for (source, view), part in runs_with_parts if source == rank])
        if len({source for source, _ in window}) == 1:
            wait_for(dist.broadcast(words, root, group=group, async_op=True))
        else:
            wait_for(dist.all_reduce(words, group=group, async_op=True))
        _copy([(view, part) for (source, view), part in runs_with_parts if source != rank])
    for collective in in_flight:
        wait_for(collective)


def _packed(runs: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """The bytes of the runs in windows of one device, as full as can be."""
    window: list[tuple[int, Tensor]] = []
    free = WINDOW
    for source, run in runs:
        data = run.view(torch.uint8)
        while len(data):
            if window and (not free or data.device != window[0][1].device):
                yield window
                window, free = [], WINDOW
            window.append((source, data[:free]))
            data, free = data[free:], max(0, free - len(data))
    if window:
        yield window


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)


def stream_to_all(
    ranks: Ranks,
    verb: str,
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    blocks: Sequence[Block],
    consume: Consume,
) -> None:
    """Hand the blocks of every rank to `consume`, on all ranks.

    Args:
        ranks: The ranks that take part.
        verb: What they do, for errors.
        dtypes: The dtypes of the weights by number, alike on every rank.
        dims: Numbers of dimensions of the weights, alike on every rank.
        blocks: The blocks of this rank.
        consume: Takes one block.

    Note:
        *Collective*. *Cost*: one window and one copy; two collectives per 16 MB, whatever the
        number of ranks.
    """

    def work() -> None:
        table = [n for number, offsets, data in blocks for n in (number, *offsets, *data.shape)]
        device, nbytes = ranks.transfer_device(), sum(block.data.nbytes for block in blocks)
        amounts = torch.zeros(ranks.size, 2, dtype=torch.int64, device=device)
        amounts[ranks.rank] = torch.tensor([len(table), nbytes], device=device)
        # Every rank learns who sends how much, in one collective of 16 bytes per rank.
        ranks.sum(amounts)
        for sources, lengths in _batches(amounts.tolist()):
            own = table if ranks.rank in sources else []
            headers = _headers_of(ranks, sources, lengths, own, dims)
            _stream(ranks, headers, blocks if own else [], dtypes, consume)

    if ranks.size == 1:
        for block in blocks:
            consume(*block)
    else:
        ranks.run_transfer(verb, work)


def _batches(amounts: list[list[int]]) -> Iterator[tuple[range, list[int]]]:
    """Neighbouring ranks that hold one window or more, and the lengths of their tables."""
    begin = total = 0
    for rank, (_, nbytes) in enumerate(amounts):
        total += nbytes
        if total >= STREAM or rank == len(amounts) - 1:
            yield range(begin, rank + 1), [length for length, _ in amounts[begin : rank + 1]]
            begin, total = rank + 1, 0


def _headers_of(
    ranks: Ranks, sources: range, lengths: list[int], own: list[int], dims: Sequence[int]
) -> list[_BlockHeader]:
    """The blocks of some ranks, in their order."""
    device = ranks.transfer_device()
    numbers = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
    parts = numbers.split(lengths)
    if own:
        parts[ranks.rank - sources[0]].copy_(torch.tensor(own, device=device))
    ranks.sum(numbers)
    headers = []
    for source, part in zip(sources, parts, strict=True):
        numbers_left = iter(part.tolist())
        for number in numbers_left:
            offsets, shape = (tuple(islice(numbers_left, dims[number])) for _ in range(2))
            headers.append(_BlockHeader(source, number, offsets, shape))
    return headers


def _stream(
    ranks: Ranks,
    headers: Sequence[_BlockHeader],
    own: Sequence[Block],
    dtypes: Sequence[torch.dtype],
    consume: Consume,
) -> None:
    """Hand the blocks with these headers to `consume`; this rank sends `own`."""

    def nbytes(header: _BlockHeader) -> int:
        return math.prod(header.shape) * dtypes[header.number].itemsize

    own_blocks = iter(own)
    # Alike for sender and receiver.
    windows = list(packs(headers, nbytes, STREAM))
    longest = max((sum(map(nbytes, window)) for window in windows), default=0)
    # NOTE: allocated once. Were it freed in between, the allocator would not find the place again.
    scratch = torch.empty(-(-longest // 4), dtype=torch.int32, device=ranks.transfer_device())
    for window in windows:
        lengths = [nbytes(header) for header in window]
        words = scratch[: -(-sum(lengths) // 4)].zero_()
        parts = words.view(torch.uint8)[: sum(lengths)].split(lengths)
        for header, part in zip(window, parts, strict=True):
            if header.source == ranks.rank:
                part.copy_(next(own_blocks).data.contiguous().view(-1).view(torch.uint8))
        if len({header.source for header in window}) == 1:
            ranks.broadcast(words, window[0].source)
        else:
            ranks.sum(words)
        for (_, number, offsets, shape), part in zip(window, parts, strict=True):
            dtype = dtypes[number]
            # NOTE: a view of another dtype needs an offset that its size divides.
            aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
            consume(number, offsets, aligned.view(dtype).view(shape))
