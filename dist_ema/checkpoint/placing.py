"""`BlockPlacer`: where this rank's blocks of weights lie in the files of a save, as runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..averaging.kernels.eager import SCRATCH
from ..distributed import collectives, machines, receiver
from ..sharding.arena import ALIGN
from ..sharding.geometry import Box, byte_runs, bytes_of, runs
from . import crc32
from .open_file import DTYPES
from .request import SaveRequest

__all__ = ["BlockPlacer"]


class _Placed(NamedTuple):
    """A block, and where its weight lies in the file."""

    name: str
    file: int  # its number
    begin: int  # the weight's first byte
    shape: tuple[int, ...]  # of the weight
    dtype: torch.dtype  # in the file
    block: collectives.Block

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte of the block in its file, and the end of its last one."""
        offsets, sizes = self.block.offsets, self.block.data.shape
        # The runs of a block ascend, so its corners bound them.
        last = tuple(o + n - 1 for o, n in zip(offsets, sizes, strict=True))
        corners = (Box(corner, (1,) * len(sizes)) for corner in (offsets, last))
        first, final = (next(runs(corner, self.shape))[0] for corner in corners)
        size = self.dtype.itemsize
        return self.begin + first * size, self.begin + (final + 1) * size


class BlockPlacer:
    """Says where the blocks of this rank lie in the files, which are numbered in their order.

    Attributes:
        sums: What this rank's bytes add to the check sum of every file.
    """

    def __init__(self, request: SaveRequest) -> None:
        self.sums = [crc32.RangeSum(file.size) for file in request.files.values()]
        numbers = {name: number for number, name in enumerate(request.files)}
        self._blocks = list[_Placed]()
        for average, plan in zip(request.averages, request.plans, strict=True):
            file_of_weight = {name: file for file in plan for name in plan[file].entries}
            for block in average.blocks:
                name = average.form.name_of(average.states[block.number].name)
                file = file_of_weight[name]
                entry = plan[file].entries[name]
                begin, dtype = len(plan[file].head) + entry.begin, DTYPES[entry.dtype]
                self._blocks.append(_Placed(name, numbers[file], begin, entry.shape, dtype, block))

    def stage(self) -> None:
        """Copy the blocks into one buffer on the host, in the dtypes of the files, and wait for it.

        It is pinned for an accelerator. Casts are made here and not behind training: a thread of
        its own would take a second team of torch's threads, which training then waits for.
        """
        lengths = [placed.block.data.numel() * placed.dtype.itemsize for placed in self._blocks]
        # Aligned, so that each part can be viewed in any dtype.
        sizes = [-(-length // ALIGN) * ALIGN for length in lengths]
        block_devices = {placed.block.data.device for placed in self._blocks}
        devices = {device for device in block_devices if device.type != "cpu"}
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=bool(devices))
        staged = []
        for placed, room, length in zip(self._blocks, buffer.split(sizes), lengths, strict=True):
            copy = room[:length].view(placed.dtype).view(placed.block.data.shape)
            copy.copy_(placed.block.data, non_blocking=True)
            staged.append(placed._replace(block=placed.block._replace(data=copy)))
        _refuse_too_large((placed.name, placed.block.data, placed.dtype) for placed in self._blocks)
        for device in devices:
            torch.accelerator.synchronize(device)
        self._blocks = staged

    def runs(self) -> Iterator[receiver.Run]:
        """All runs of this rank, in the dtypes of the files."""
        for placed in self._blocks:
            yield from self._runs(placed)

    def runs_by_range(
        self, routes: machines.Routes
    ) -> Iterator[tuple[int, Iterator[receiver.Run]]]:
        """(a range, this rank's runs in it), in the order of the routes."""
        blocks_by_range: dict[int, list[_Placed]] = {}
        for placed in self._blocks:
            # An empty block has no first byte.
            if placed.block.data.numel():
                for number in routes.ranges(placed.file, *placed.extent):
                    blocks_by_range.setdefault(number, []).append(placed)
        for number in routes.order:
            if number in blocks_by_range:
                clip = partial(routes.clip, number)
                runs_here = (self._runs(placed, clip) for placed in blocks_by_range[number])
                yield number, chain.from_iterable(runs_here)

    def _runs(
        self,
        placed: _Placed,
        clip: Callable[[int, int, int], tuple[int, int]] = lambda file, begin, end: (begin, end),
    ) -> Iterator[receiver.Run]:
        """The runs of a block, as far as `clip` keeps them. They are added to the sum."""
        name, file, _, shape, dtype, block = placed
        _refuse_too_large([(name, block.data, dtype)])
        view = bytes_of(block.data.to(dtype).cpu().contiguous())
        box = Box(block.offsets, tuple(block.data.shape))
        for start, data in byte_runs(box, shape, view, dtype.itemsize):
            begin = placed.begin + start
            low, high = clip(file, begin, begin + len(data))
            # What is cut off lies in another range, which another rank writes.
            if low < high:
                clipped = data[low - begin : high - begin]
                self.sums[file].add(low, clipped)
                yield receiver.Run(file, low, clipped)

    def contributions(self) -> dict[str, int]:
        """This rank's part of the sum of every file, by number, where there is one."""
        return {
            str(number): file_sum.contribution
            for number, file_sum in enumerate(self.sums)
            if file_sum.contribution
        }


def _refuse_too_large(casts: Iterable[tuple[str, Tensor, torch.dtype]]) -> None:
    """Raise ValueError where a cast would make a finite value infinite or NaN.

    Note:
        *Cost*: reads what is cast once; waits once for each device.
    """
    by_device: dict[torch.device, list[tuple[str, Tensor, torch.dtype]]] = {}
    for name, data, dtype in casts:
        narrows = data.dtype != dtype and dtype.is_floating_point and data.numel()
        if narrows and torch.finfo(dtype).max < torch.finfo(data.dtype).max:
            by_device.setdefault(data.device, []).append((name, data, dtype))
    for casts_there in by_device.values():
        # NOTE: casts are monotone, and NaN shows in the extremes. To ask each element takes fifty
        # times as long.
        extremes = [
            torch.stack(torch.aminmax(data.float() if data.dtype.itemsize == 1 else data))
            for _, data, _ in casts_there
        ]
        cast = zip(extremes, casts_there, strict=True)
        finite = torch.stack(
            [extreme.to(dtype).float() for extreme, (_, _, dtype) in cast]
        ).isfinite()
        for (name, data, dtype), fits in zip(casts_there, finite.all(1).tolist(), strict=True):
            if not (fits or _fits(data, dtype)):
                raise ValueError(
                    f"{name} holds values that are too large for {dtype}. Choose another dtype."
                )


def _fits(data: Tensor, dtype: torch.dtype) -> bool:
    """Whether each finite element stays finite."""
    parts = data.reshape(-1).split(SCRATCH)
    return all(bool((part.to(dtype).float().isfinite() | ~part.isfinite()).all()) for part in parts)
