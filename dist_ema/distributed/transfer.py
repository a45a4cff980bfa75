"""Bounded windows of bytes between ranks.

[Note: windows]  Everything travels as uint8, because gloo cannot send int16 or float8 in collectives, and packed: one
flat window of the bytes of 300 small tensors takes a hundredth of the time of 300 collectives.

[Note: turns]  Files may be written behind training, and ranks may die or fill a disk meanwhile. So bytes for files travel on
a process group of their own, on which nobody else waits; and a rank sends only after the first one has said that all went
well with the rank before: who waits for its turn is not stuck in a send that nobody will ever receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .coordinator import Ranks, transfer_device

__all__ = [
    "Block",
    "FileTransferError",
    "FileTransferGroup",
    "broadcast",
    "stream",
    "stream_to_writers",
]

WINDOW = 4 << 20  # bytes that one broadcast moves
STREAM = 16 << 20  # bytes that one send moves
CPU = torch.device("cpu")
Block = tuple[
    int, tuple[int, ...], Tensor
]  # number of the weight, offsets of the block in it, the block


def broadcast(pieces: list[Tensor], source: int, group: dist.ProcessGroup) -> None:
    """Overwrite 1-D `pieces` with the source's, in place. *Collective* over `group`; `source` is a rank in it.

    *Cost*: one scratch of 4 MB; long pieces travel from and into place, short ones packed together.
    """
    root = dist.get_global_rank(group, source)
    mine = dist.get_rank(group) == source
    wire = transfer_device(group)
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


Sink = Callable[[int, tuple[int, ...], Tensor], None]


def stream(
    ranks: Ranks,
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    mine: Sequence[Block],
    sink: Sink,
    everywhere: bool = False,
) -> None:
    """Hand every rank's parts to `sink` on the first rank, or on all. *Collective*. *Cost*: one window and one copy.

    dtypes and dims describe the weights by number, alike on every rank.
    """
    wire = ranks.transfer_device()

    def out(data: Tensor) -> None:
        ranks.broadcast(data, ranks.rank) if everywhere else ranks.send(data, 0)

    for source in range(ranks.size):
        if source == ranks.rank:
            for part in mine:
                sink(*part)
            if ranks.size > 1 and (everywhere or source > 0):
                _send(mine, out, wire)
        elif everywhere or ranks.first:

            def take(data: Tensor, source: int = source) -> None:
                ranks.broadcast(data, source) if everywhere else ranks.receive(data, source)

            for part in _receive(take, dtypes, dims, wire):
                sink(*part)


class FileTransferGroup:
    """A process group for files alone ([Note: turns]). *Collective*.

    NOTE: its methods, not `torch.distributed.send`: they still work after the program has called destroy_process_group(),
    while a file is being written behind it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._patience = timedelta(seconds=ranks.timeout)
        group = dist.new_group(
            ranks.members, timeout=self._patience, backend="gloo", use_local_synchronization=True
        )
        self._group, self._places = (
            group,
            [dist.get_group_rank(group, member) for member in ranks.members],
        )

    def send(self, data: Tensor, to: int) -> None:
        with _naming():
            self._group.send([data], self._places[to], 0).wait(self._patience)

    def receive(self, data: Tensor, source: int) -> None:
        with _naming():
            self._group.recv([data], self._places[source], 0).wait(self._patience)


class FileTransferError(RuntimeError):
    """The other end is gone, or hangs."""


@contextmanager
def _naming() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FileTransferError(str(error)) from error


def stream_to_writers(
    ranks: Ranks,
    line: FileTransferGroup,
    verb: str,
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    mine: Sequence[Block],
    sink: Sink,
) -> None:
    """`stream` to the first rank, over `line` and in turns: what fails there is raised on all. *Collective*.

    *Cost*: one window on every rank; one message per rank, read by all.
    """
    broken: Exception | None = None
    for source in range(ranks.size):

        def turn(source: int = source) -> None:
            """On the first rank: the part of `source`, whose turn it is."""
            if source == ranks.rank:
                return _pour(mine, sink)
            try:
                _pour(_receive(lambda data: line.receive(data, source), dtypes, dims, CPU), sink)
            except FileTransferError as error:
                raise RuntimeError(
                    f"rank {ranks.members[source]} broke off what it was sending: {error}"
                ) from error

        try:
            ranks.run_on_first(verb, turn)
        except RuntimeError as refused:
            raise refused from broken
        if ranks.rank == source + 1:
            try:
                _send(mine, lambda data: line.send(data, 0), CPU)
            except Exception as error:  # the first rank finds out, and says so to all
                broken = error


def _pour(parts: Iterable[Block], sink: Sink) -> None:
    """Hand parts to `sink`. After an error the others are taken and dropped: their sender must get rid of them."""
    failed = None
    for part in parts:
        if failed is None:
            try:
                sink(*part)
            except Exception as error:
                failed = error
    if failed is not None:
        raise failed


def _bounded(parts: Iterable[Block]) -> Iterator[Block]:
    """The same elements in parts of at most one window: a long block goes in slices of its first dimension."""
    for number, offsets, data in parts:
        if data.nbytes <= STREAM:
            yield number, offsets, data
            continue
        dim = next(d for d, size in enumerate(data.shape) if size > 1)
        rows = max(1, STREAM * data.shape[dim] // data.nbytes)
        for start, piece in zip(
            range(0, data.shape[dim], rows), data.split(rows, dim), strict=True
        ):
            yield from _bounded(
                [(number, (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :]), piece)]
            )


def _send(parts: Iterable[Block], out: Callable[[Tensor], None], wire: torch.device) -> None:
    mine = list(_bounded(parts))
    table = [n for number, offsets, data in mine for n in (number, *offsets, *data.shape)]
    out(torch.tensor([len(mine), len(table)]).to(wire))
    if mine:
        out(torch.tensor(table).to(wire))
    sizes = [data.nbytes for _, _, data in mine]
    windows = list(_windows(sizes))
    scratch = _scratch([window for window in windows if len(window) > 1], sizes, wire)
    for window in windows:
        flat = [mine[i][2].contiguous().view(-1).view(torch.uint8).to(wire) for i in window]
        out(flat[0] if len(flat) == 1 else torch.cat(flat, out=scratch[: sum(map(len, flat))]))


def _receive(
    take: Callable[[Tensor], None],
    dtypes: Sequence[torch.dtype],
    dims: Sequence[int],
    wire: torch.device,
) -> Iterator[Block]:
    head = torch.empty(2, dtype=torch.int64, device=wire)
    take(head)
    count, length = head.tolist()
    if not count:
        return
    numbers = torch.empty(length, dtype=torch.int64, device=wire)
    take(numbers)
    table = _read_table(numbers.tolist(), dims)
    sizes = [math.prod(shape) * dtypes[number].itemsize for number, _, shape in table]
    windows = list(_windows(sizes))
    scratch = _scratch(windows, sizes, wire)
    for window in windows:
        data = scratch[: sum(sizes[i] for i in window)]
        take(data)
        for i, raw in zip(window, data.split([sizes[i] for i in window]), strict=True):
            number, offsets, shape = table[i]
            # NOTE: a view of another dtype needs an offset that its size divides.
            aligned = raw.storage_offset() % dtypes[number].itemsize == 0
            yield (
                number,
                offsets,
                (raw if aligned else raw.clone()).view(dtypes[number]).view(shape),
            )


def _scratch(windows: Sequence[Sequence[int]], sizes: Sequence[int], wire: torch.device) -> Tensor:
    """Memory for each of the windows in turn. NOTE: were it freed in between, its place would not be found again."""
    longest = max((sum(sizes[i] for i in window) for window in windows), default=0)
    return torch.empty(longest, dtype=torch.uint8, device=wire)


def _read_table(
    numbers: list[int], dims: Sequence[int]
) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    table, at = [], 0
    while at < len(numbers):
        number, d = numbers[at], dims[numbers[at]]
        table.append(
            (
                number,
                tuple(numbers[at + 1 : at + 1 + d]),
                tuple(numbers[at + 1 + d : at + 1 + 2 * d]),
            )
        )
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
