"""`WindowRing`: the block means of a window on the host, mixed by their shares.

[Note: ring]  A `Window` moves one shadow like any schedule: it holds the mean of the block under
way. When a block is full, its mean is copied to the host, and the next update begins another one.

    host       | mean 5 | mean 6 | mean 7 |          ring, blocks - 1 entries
    shadow                                | mean 8   so far
    window     |<---------- curve w ----------->|    weight of each: w(begin) - w(end)
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedules import BlockMean, Window, from_dict
from ..sharding.ownership import ParamState

__all__ = ["WindowRing"]


@dataclass(frozen=True)
class _RingEntry:
    """The mean of the weights after each update in (begin, end] of the clock, as held here."""

    begin: float
    end: float
    values: dict[str, Tensor]  # name -> [averaged_region.numel]


class WindowRing:
    """The full blocks of a window on this rank.

    Args:
        window: As it is tracked.

    Attributes:
        entries: The full blocks, the oldest one first.
        begin: The clock where the block under way begins.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.entries: deque[_RingEntry] = deque(maxlen=window.blocks - 1)
        self.begin = 0.0
        if window.ring is not None:  # asked now, and not when the first block is full
            try:
                tempfile.TemporaryFile(dir=window.ring).close()
            except OSError as error:
                raise ValueError(
                    f"ring={os.fspath(window.ring)!r} of {window!r} must be a folder that takes "
                    f"temporary files: {error.strerror}."
                ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks on this rank; shadows do not count."""
        return sum(value.nbytes for block in self.entries for value in block.values.values())

    @property
    def mean(self) -> BlockMean:
        """The schedule of the block under way, however the updates in it move the clock."""
        return BlockMean(self.window.block, self.begin, self.begin)

    def clear(self, begin: float = 0.0) -> None:
        """Drop all blocks: the window begins here."""
        self.entries.clear()
        self.begin = begin

    def forget_all_but(self, names: set[str]) -> None:
        """Drop the blocks of all other weights: a weight that was replaced has no past."""
        for block in self.entries:
            for name in block.values.keys() - names:
                del block.values[name]

    def is_full(self, now: float, elapsed: float) -> bool:
        """Whether the next update begins another block."""
        window = self.window
        return now > self.begin and window.block_at(now) != window.block_at(now + elapsed)

    def push(self, states: list[ParamState], now: float) -> None:
        """Keep the mean of the block that ends at `now`. No update may be in flight.

        Raises:
            OSError: The disk is full. Nothing has changed, and the next update tries again.
        """
        means = {
            state.name: self._new(state.own_shadow).copy_(state.own_shadow) for state in states
        }
        self.entries.append(_RingEntry(self.begin, now, means))
        self.begin = now

    def _new(self, like: Tensor) -> Tensor:
        if self.window.ring is None or not like.numel():
            return torch.empty_like(like, device="cpu")
        with tempfile.TemporaryFile(dir=self.window.ring) as file:  # the mapping keeps it
            # NOTE: a full disk ends the process where a page is written that has no space yet.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                try:
                    os.posix_fallocate(file.fileno(), 0, like.nbytes)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, self.window.ring) from None
            mapped: Any = file  # numpy takes a file, whatever its types say
            pages = np.memmap(mapped, np.uint8, "w+", shape=like.nbytes)
        return torch.from_numpy(pages).view(like.dtype)

    def saved(
        self, states: list[ParamState], now: float
    ) -> list[tuple[BlockMean, list[ParamState]]]:
        """Every block with its mean in place of the shadows; the one under way last, with `states`.

        A full block leaves out what has no shadow.
        """
        size, averaged = self.window.block, [state for state in states if state.shadow is not None]
        blocks = [
            (BlockMean(size, block.begin, block.end), _with_values(averaged, block.values))
            for block in self.entries
        ]
        return [*blocks, (BlockMean(size, self.begin, now), states)]

    def matching(self, specs: Sequence[dict[str, Any]]) -> list[BlockMean]:
        """The saved blocks that this window can go on with, the one under way last."""
        means = [from_dict(spec) for spec in specs if spec.get("name") == BlockMean.__name__]
        size = self.window.block
        blocks = [
            mean for mean in means if isinstance(mean, BlockMean) and abs(mean.size - size) < 1e-9
        ]
        return sorted(blocks, key=attrgetter("begin"))[-self.window.blocks :]

    def empty(self, states: list[ParamState]) -> list[ParamState]:
        """States to read a full block into."""
        return _with_values(states, {state.name: self._new(state.own_shadow) for state in states})

    def resume(self, blocks: list[tuple[BlockMean, list[ParamState]]], begin: float) -> None:
        """Go on from saved blocks. begin: of the one under way."""
        self.clear(begin)
        for mean, states in blocks:
            means = {state.name: state.own_shadow for state in states}
            self.entries.append(_RingEntry(mean.begin, mean.end, means))

    def mixed(self, states: list[ParamState], window: Window, now: float) -> list[ParamState]:
        """The states with the average over `window` in place of their shadows.

        Args:
            states: With the mean of the block under way.
            window: One that this ring spans.
            now: The clock after the last update.

        Note:
            *Cost*: one shard in the shadows' dtype, and two weights in float64.
        """
        first = window.block_at(now) - window.blocks + 1
        older = [block for block in self.entries if window.block_at(block.end) >= first]
        begin = older[0].begin if older else self.begin
        shares = window.shares(begin, [*(block.end for block in older), now])
        mixed_states = []
        for state in states:
            shadow = state.shadow
            if shadow is not None and older:
                wide = torch.promote_types(shadow.dtype, torch.float64)
                # On the host, where the blocks lie: nothing of the device's memory is taken.
                total = shadow.to("cpu", wide) * shares[-1]
                for share, block in zip(shares, older, strict=False):
                    # A weight that is newer than the block counts there as it is now.
                    total += block.values.get(state.name, shadow).to("cpu", wide) * share
                shadow = total.to(shadow.device, shadow.dtype)
            mixed_states.append(replace(state, shadow=shadow))
        return mixed_states


def _with_values(states: list[ParamState], values: dict[str, Tensor]) -> list[ParamState]:
    return [replace(state, shadow=values.get(state.name, state.shadow)) for state in states]
