"""`OpenFile`: a safetensors file that stays open: windows of its weights, and its check sum.

It is checked, summed and read through one handle. So a save that replaces the file in between
cannot mix two versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import TO_TORCH
from ..sharding.geometry import Box, byte_runs, bytes_of, split_box
from . import crc32, disk, safetensors

__all__ = ["DTYPES", "KINDS", "OpenFile", "OpenWeight"]

# The dtypes of safetensors as torch has them, and back.
DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in TO_TORCH.items()}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
WINDOW = 4 << 20  # bytes read at a time


class OpenFile:
    """The file, open from the moment that its header was read until `close`."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, disk.open_regular(path)
        try:
            self.header = safetensors.header_of(self._handle, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._handle.close()

    def read(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Blocks of a box, each at most a window. *Aliases*: the next block overwrites this one."""
        entry = self.header.entries[name]
        dtype, begin = DTYPES[entry.dtype], len(self.header.head) + entry.begin
        blocks = list(split_box(box, WINDOW // dtype.itemsize))
        buffer = torch.empty(
            max(block.numel for block in blocks) * dtype.itemsize, dtype=torch.uint8, device="cpu"
        )
        view = bytes_of(buffer)
        for block in blocks:
            for start, part in byte_runs(block, entry.shape, view, dtype.itemsize):
                disk.read_into(self._handle.fileno(), self.path, part, begin + start)
            yield block, buffer[: block.numel * dtype.itemsize].view(dtype).view(block.sizes)

    def contribution(self, rank: int, size: int) -> int:
        """What this rank's bytes add to the check sum of the file ([Note: check sums] in crc32)."""
        total = self.header.size
        # Equal shares of the bytes, whatever lies in them.
        at, end = total * rank // size, total * (rank + 1) // size
        range_sum, buffer = crc32.RangeSum(total), memoryview(bytearray(min(WINDOW, end - at)))
        while at < end:
            part = buffer[: min(WINDOW, end - at)]
            disk.read_into(self._handle.fileno(), self.path, part, at)
            range_sum.add(at, part)
            at += len(part)
        return range_sum.contribution


class OpenWeight(NamedTuple):
    """A weight in an open file, under the name that the file has for it."""

    file: OpenFile
    name: str

    @property
    def entry(self) -> safetensors.Entry:
        return self.file.header.entries[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]
