"""Blocks of weights as runs of bytes in files, and the files that take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..averaging.kernels.eager import SCRATCH
from ..distributed import connections, machines, transfer
from ..sharding.geometry import Box, byte_runs, bytes_of, runs
from . import crc32, disk, torch_dtypes
from .request import SaveRequest

__all__ = ["BlockPlacer", "FileWriter"]


class BlockPlacer:
    """Says where the blocks of this rank lie in the files, which are numbered in their order.

    Attributes:
        sums: What this rank's bytes add to the check sum of every file.
    """

    def __init__(self, request: SaveRequest) -> None:
        self._files = list(request.files.values())
        self.sums = [crc32.RangeSum(file.size) for file in self._files]
        numbers = {name: number for number, name in enumerate(request.files)}
        self._blocks: list[
            tuple[str, int, transfer.Block]
        ] = []  # name in the file, its number, block
        for average, plan in zip(request.averages, request.plans, strict=True):
            where = {name: numbers[file] for file in plan for name in plan[file].entries}
            names = list(map(average.name_of, average.states))
            self._blocks += [
                (names[block.number], where[names[block.number]], block) for block in average.blocks
            ]

    def runs(self) -> Iterator[connections.Run]:
        """All runs of this rank, in the dtypes of the files."""
        for placed in self._blocks:
            yield from self._runs(*placed)

    def runs_by_range(
        self, routes: machines.Routes
    ) -> Iterator[tuple[int, Iterator[connections.Run]]]:
        """(a range, this rank's runs in it), in the order of the routes."""
        chosen: dict[int, list[tuple[str, int, transfer.Block]]] = {}
        for placed in self._blocks:
            name, file, block = placed
            if block.data.numel():
                begin, end = self._extent(name, file, block)
                for number in routes.ranges(file, begin, end):
                    chosen.setdefault(number, []).append(placed)
        for number in routes.order:
            if number in chosen:
                clip = partial(routes.clip, number)
                runs_here = (self._runs(*placed, clip) for placed in chosen[number])
                yield number, chain.from_iterable(runs_here)

    def _extent(self, name: str, file: int, block: transfer.Block) -> tuple[int, int]:
        """The first byte of a block in its file, and the end of its last one."""
        entry, shape = self._files[file].entries[name], block.data.shape
        last = tuple(o + n - 1 for o, n in zip(block.offsets, shape, strict=True))
        corners = (Box(offsets, (1,) * len(shape)) for offsets in (block.offsets, last))
        first, final = (next(runs(corner, entry.shape))[0] for corner in corners)
        base, size = (
            len(self._files[file].head) + entry.begin,
            torch_dtypes.DTYPES[entry.dtype].itemsize,
        )
        return base + first * size, base + (final + 1) * size

    def _runs(
        self,
        name: str,
        file: int,
        block: transfer.Block,
        clip: Callable[[int, int, int], tuple[int, int]] = lambda file, begin, end: (begin, end),
    ) -> Iterator[connections.Run]:
        """The runs of a block, as far as `clip` keeps them. They are added to the sum."""
        entry = self._files[file].entries[name]
        dtype, base = torch_dtypes.DTYPES[entry.dtype], len(self._files[file].head) + entry.begin
        view = bytes_of(_cast(name, block.data, dtype).contiguous())
        box = Box(block.offsets, tuple(block.data.shape))
        for start, data in byte_runs(box, entry.shape, view, dtype.itemsize):
            begin = base + start
            low, high = clip(file, begin, begin + len(data))
            if low < high:
                kept = data[low - begin : high - begin]
                self.sums[file].add(low, kept)
                yield connections.Run(file, low, kept)

    def contributions(self) -> dict[str, int]:
        """This rank's part of the sum of every file, by number, where there is one."""
        found = {str(number): each.contribution for number, each in enumerate(self.sums)}
        return {number: added for number, added in found.items() if added}


class FileWriter:
    """Writes runs into files, from several threads. Each file is opened once.

    Args:
        folder: Of the files.
        names: Of the files, in the order of their numbers.
        disk_errors: Gives errors of the disk a path.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        disk_errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._folder, self._names, self._disk_errors = folder, names, disk_errors
        self._open: dict[int, disk.Target] = {}
        self._lock = threading.Lock()

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Put a run into place."""
        with self._lock, self._disk_errors():
            self._target(file).write(data, offset)

    def _target(self, file: int) -> disk.Target:
        if file not in self._open:
            self._open[file] = disk.Target(self._folder / self._names[file])
        return self._open[file]

    def sync(self, every: bool) -> None:
        """Have the disk confirm what was written, and close. every: Also files not opened here."""
        with self._disk_errors():
            for file in range(len(self._names)) if every else list(self._open):
                self._target(file).sync()
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _cast(name: str, data: Tensor, dtype: torch.dtype) -> Tensor:
    """On the host. Raises ValueError where a finite value would become infinite or NaN."""
    new = data.to(dtype)
    if not _fits(data, dtype):
        for was, now in zip(
            data.reshape(-1).split(SCRATCH), new.reshape(-1).split(SCRATCH), strict=True
        ):
            if not bool((now.float().isfinite() | ~was.isfinite()).all()):
                raise ValueError(
                    f"{name} holds values that are too large for {dtype}. Choose another dtype."
                )
    return new.cpu()


def _fits(data: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values stay finite in that dtype. False where some are not finite already."""
    if not (dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(data.dtype).max):
        return True
    if data.dtype.itemsize == 1 or not data.numel():  # torch finds no extremes of float8
        return False
    # NOTE: casts are monotone. `isfinite` of each element takes fifty times as long.
    return bool(torch.stack(torch.aminmax(data)).to(dtype).float().isfinite().all())
