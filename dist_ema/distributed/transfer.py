"""Bytes between ranks in bounded windows: broadcasts, and streams to all ranks.

[Note: windows]  Everything travels as uint8, because gloo cannot send int16 or float8 in
collectives. Small tensors are packed: one window with the bytes of 300 of them takes a hundredth of
the time of 300 collectives.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks, transfer_device

__all__ = [
    "Block",
    "broadcast",
    "stream_to_all",
]

WINDOW = 4 << 20  # bytes that one collective moves
AHEAD = 2  # windows in place that are under way while the oldest is waited for
STREAM = 16 << 20  # bytes that one send moves, or one longer block


class Block(NamedTuple):
    """A box of a weight with its data, in transit."""

    number: int  # of the weight
    offsets: tuple[int, ...]
    data: Tensor


Consume = Callable[[int, tuple[int, ...], Tensor], None]  # takes the fields of a Block


def broadcast(
    pieces: Iterable[tuple[int, Tensor]],
    group: dist.ProcessGroup,
    wait_for: Callable[[dist.Work], object] = dist.Work.wait,
) -> None:
    """Overwrite 1-D pieces with what their sources hold, in place.

    A window that several ranks fill is summed: each contributes its bytes, and zeros for those of
    the others. So the number of collectives does not grow with the number of ranks.

    Args:
        pieces: (source, as a rank in the group; piece), the same sources and lengths on every rank.
        group: The ranks that take part.
        wait_for: Waits for a collective; `Ranks.wait_for` within a timeout.

    Note:
        *Collective* over `group`. *Cost*: one collective per 4 MB, through one window. A long
        piece travels in place.
    """
    rank = dist.get_rank(group)
    in_flight: deque[dist.Work] = deque()
    for window in _packed(pieces):
        views = [view for _, view in window]
        root = dist.get_global_rank(group, window[0][0])
        device = transfer_device(group, views[0].device)
        device = views[0].device if device.type == "cpu" else device
        if len(views) == 1 and device.type == views[0].device.type:
            in_flight.append(dist.broadcast(views[0], root, group=group, async_op=True))
            if len(in_flight) > AHEAD:
                wait_for(in_flight.popleft())
            continue
        size = sum(map(len, views))
        words = torch.zeros(-(-size // 4), dtype=torch.int32, device=device)
        parts = words.view(torch.uint8)[:size].split([len(view) for view in views])
        entries = list(zip(window, parts, strict=True))
        _copy([(part, view) for (source, view), part in entries if source == rank])
        if len({source for source, _ in window}) == 1:
            wait_for(dist.broadcast(words, root, group=group, async_op=True))
        else:
            wait_for(dist.all_reduce(words, group=group, async_op=True))
        _copy([(view, part) for (source, view), part in entries if source != rank])
    for collective in in_flight:
        wait_for(collective)


def _packed(pieces: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """The bytes of the pieces in windows of one device, as full as can be."""
    window: list[tuple[int, Tensor]] = []
    free = WINDOW
    for source, piece in pieces:
        data = piece.view(torch.uint8)
        while len(data):
            if window and (not free or data.device != window[0][1].device):
                yield window
                window, free = [], WINDOW
            window.append((source, data[:free]))
            data, free = data[free:], max(0, free - len(data))
    if window:
        yield window


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair the second."""
    if pairs:
        targets, values = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, values)


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
        dtypes: Of the weights by number, alike on every rank.
        dims: Numbers of dimensions of the weights, alike on every rank.
        blocks: Of this rank.
        consume: Takes one block.

    Note:
        *Collective*. *Cost*: one window and one copy.
    """

    def work() -> None:
        device = ranks.transfer_device()
        for source in range(ranks.size):
            transfer = partial(ranks.broadcast, source=source)
            if source != ranks.rank:
                for block in _receive(transfer, dtypes, dims, device):
                    consume(*block)
                continue
            for block in blocks:
                consume(*block)
            if ranks.size > 1:
                _send(blocks, transfer, device)

    ranks.run_transfer(verb, work)


def _send(blocks: Sequence[Block], send: Callable[[Tensor], None], device: torch.device) -> None:
    table = [n for number, offsets, data in blocks for n in (number, *offsets, *data.shape)]
    send(torch.tensor([len(blocks), len(table)], device=device))
    if blocks:
        send(torch.tensor(table, device=device))
    sizes = [data.nbytes for _, _, data in blocks]
    windows = list(_windows(sizes))
    scratch = _scratch([window for window in windows if len(window) > 1], sizes, device)
    for window in windows:
        flat = [blocks[i].data.contiguous().view(-1).view(torch.uint8).to(device) for i in window]
        send(flat[0] if len(flat) == 1 else torch.cat(flat, out=scratch[: sum(map(len, flat))]))


def _receive(
    receive: Callable[[Tensor], None],
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    device: torch.device,
) -> Iterator[Block]:
    head = torch.empty(2, dtype=torch.int64, device=device)
    receive(head)
    count, length = head.tolist()
    if not count:
        return
    numbers = torch.empty(length, dtype=torch.int64, device=device)
    receive(numbers)
    table = list(_read_table(numbers.tolist(), dims))
    sizes = [math.prod(shape) * dtypes[number].itemsize for number, _, shape in table]
    windows = list(_windows(sizes))
    scratch = _scratch(windows, sizes, device)
    for window in windows:
        data = scratch[: sum(sizes[i] for i in window)]
        receive(data)
        for i, raw in zip(window, data.split([sizes[i] for i in window]), strict=True):
            number, offsets, shape = table[i]
            dtype = dtypes[number]
            # NOTE: a view of another dtype needs an offset that its size divides.
            aligned = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
            yield Block(number, offsets, aligned.view(dtype).view(shape))


def _scratch(windows: Sequence[list[int]], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Memory for each of the windows in turn.

    NOTE: allocated once. Were it freed in between, the allocator would not find the place again.
    """
    longest = max((sum(sizes[i] for i in window) for window in windows), default=0)
    return torch.empty(longest, dtype=torch.uint8, device=device)


def _read_table(
    numbers: list[int], dims: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Number, offsets and shape of every block."""
    rest = iter(numbers)
    for number in rest:
        offsets, shape = (tuple(islice(rest, dims[number])) for _ in range(2))
        yield number, offsets, shape


def _windows(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring blocks of at most one window together, the same for sender and receiver."""
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
