"""`Average`: a schedule and shadows. Which weights have some, and where these lie.

[Note: ring]  A `Window` moves one shadow like any schedule: it holds the mean of the block under
way. When a block is full, its mean is copied to the host, and the next update begins another one.

    host       | mean 5 | mean 6 | mean 7 |          ring, blocks - 1 entries
    shadow                                | mean 8   so far
    window     |<---------- curve w ----------->|    weight of each: w(begin) - w(end)
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..schedules import BlockMean, Schedule, Window, from_dict
from ..sharding import derived, records
from ..sharding.ownership import ParamState
from .skipped_steps import SkippedSteps

__all__ = [
    "OWN",
    "Average",
    "Placement",
    "RingEntry",
    "Selection",
    "WindowRing",
    "refuse_dtype",
    "ring_of",
    "whole_modules",
]


@dataclass
class Average:
    """One average: a schedule, and a shadow for every weight that is averaged."""

    schedule: Schedule
    states: list[ParamState] = field(default_factory=list)  # every weight and buffer of the model
    own_buffers: dict[str, Tensor] = field(default_factory=dict)  # recalibrated inside a swap
    skipped_steps: SkippedSteps = field(default_factory=SkippedSteps)
    last: tuple[float, float] | None = None  # decay and elapsed of the last update
    ring: WindowRing | None = None  # of a Window, whose shadows are the block under way

    @property
    def name(self) -> str:
        """The repr of the schedule."""
        return repr(self.schedule)

    def used(self, which: int | str | Schedule, now: float) -> Average:
        """As verbs use it: a window is mixed from its ring. No update may be in flight."""
        if self.ring is None:
            return self
        window = which if isinstance(which, Window) else self.ring.window
        return replace(self, schedule=window, states=self.ring.mixed(self.states, window, now))

    def empty(self) -> list[ParamState]:
        """States to read a full block of a window into."""
        assert self.ring is not None
        return self.ring.empty(self.averaged)

    @property
    def averaged(self) -> list[ParamState]:
        """What has a shadow."""
        return [state for state in self.states if state.shadow is not None]

    @property
    def persistent(self) -> list[ParamState]:
        """What a state_dict holds: a buffer that is None is not in it."""
        return [
            state
            for state in self.states
            if state.shard.persistent
            and (state.shard.kind != "buffer" or records.registered(state.shard) is not None)
        ]

    @property
    def buffers(self) -> list[ParamState]:
        """The buffers of a state_dict."""
        return [state for state in self.persistent if state.shard.kind == "buffer"]

    def forget_buffers(self, lost: Collection[str]) -> None:
        """Own buffers end for all of a module with one that the model lost."""
        kept = whole_modules(self.own_buffers, lost)
        self.own_buffers = {name: self.own_buffers[name] for name in kept}

    def forget_reshaped_buffers(self, states: Sequence[ParamState]) -> None:
        """They end where live ones took another shape."""
        own = [(self.own_buffers.get(state.name), state) for state in states]
        self.forget_buffers(
            [
                state.name
                for value, state in own
                if value is not None and len(value) != state.shard.local_region.numel
            ]
        )

    def pace(self, now: float) -> tuple[float, float]:
        """(decay, half life in units of the clock) of the last update, or of a first step of 1."""
        decay, elapsed = self.last or (self.schedule(now + 1.0, 1.0), 1.0)
        if not 0 < decay < 1:
            return decay, 0.0 if decay == 0 else math.inf
        return decay, elapsed * math.log(0.5) / math.log(decay)


def whole_modules(own: Collection[str], lost: Collection[str]) -> list[str]:
    """Names of own buffers, without modules that lost one: a module's buffers are one state."""
    torn = {name.rpartition(".")[0] for name in lost}
    return [name for name in own if name.rpartition(".")[0] not in torn]


# --- what is averaged, and where it lies ----------------------------------------------------------


Chooser = str | Callable[[str], bool]
OWN = "own"


@dataclass(frozen=True)
class Selection:
    """Which weights and buffers are averaged.

    Args:
        only: A regex searched in names, or a predicate on them; None: every trainable weight.
        buffers: "copy": none. "average": every floating one. OWN: none, and a teacher keeps its
            own. Else a regex or a predicate that chooses them by name.
    """

    only: Chooser | None = None
    buffers: Chooser = "copy"

    def __post_init__(self) -> None:
        if not (isinstance(self.buffers, str) or callable(self.buffers)):
            raise ValueError(
                f"buffers must be 'copy', 'average', a regex or a predicate, got {self.buffers!r}."
            )

    def allows(self, name: str) -> bool:
        """`only=` lets the name through."""
        return self.only is None or _matches(self.only, name)

    def averages(self, shard: records.Shard) -> bool:
        """The weight is trained or the buffer chosen; it floats, and `only=` lets it through."""
        chosen = self._chooses_buffer(shard) if shard.kind == "buffer" else shard.trainable
        return chosen and self.can_average(shard)

    def can_average(self, shard: records.Shard) -> bool:
        """It has values that have a mean, and `only=` lets it through."""
        floats = shard.dtype.is_floating_point or shard.dtype.is_complex
        return floats and self.allows(shard.name)

    def _chooses_buffer(self, shard: records.Shard) -> bool:
        if (
            not shard.persistent
            or self.buffers in ("copy", OWN)
            or derived.is_power_iteration_vector(shard)
        ):
            return False
        return self.buffers == "average" or _matches(self.buffers, shard.name)


def _matches(chooser: Chooser, name: str) -> bool:
    return re.search(chooser, name) is not None if isinstance(chooser, str) else chooser(name)


@dataclass
class Placement:
    """Where shadows lie.

    Args:
        split: Divide replicated weights among the ranks that hold them.
        dtype: Of the shadows.
        device: Of the shadows; None keeps each beside its weight.
        replicated: The ranks that hold the same plain weights, where no DDP says so.
    """

    split: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    replicated: dist.ProcessGroup | None = None


def refuse_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that shadows cannot have."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float64 or bfloat16, got {dtype}.")


# --- [Note: ring] ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingEntry:
    """The mean of the weights after each update in (begin, end] of the clock, as held here."""

    begin: float
    end: float
    values: dict[str, Tensor]  # name -> [averaged_region.numel]


def ring_of(schedule: Schedule) -> WindowRing | None:
    """What a window needs beside its shadow."""
    return WindowRing(schedule) if isinstance(schedule, Window) else None


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
        self.entries: deque[RingEntry] = deque(maxlen=window.blocks - 1)
        self.begin = 0.0

    @property
    def nbytes(self) -> int:
        """On this rank, outside of the shadows."""
        return sum(value.nbytes for each in self.entries for value in each.values.values())

    def clear(self, begin: float = 0.0) -> None:
        """The window begins here."""
        self.entries.clear()
        self.begin = begin

    def forget_all_but(self, names: set[str]) -> None:
        """Weights that were replaced have no past."""
        for each in self.entries:
            for name in each.values.keys() - names:
                del each.values[name]

    def is_full(self, now: float, elapsed: float) -> bool:
        """The next update begins another block."""
        window = self.window
        return now > self.begin and window.block_at(now) != window.block_at(now + elapsed)

    def push(self, states: list[ParamState], now: float) -> None:
        """Keep the mean of the block that ends at `now`. No update may be in flight."""
        values = {
            state.name: self._new(state.own_shadow).copy_(state.own_shadow) for state in states
        }
        self.entries.append(RingEntry(self.begin, now, values))
        self.begin = now

    def _new(self, like: Tensor) -> Tensor:
        if self.window.ring is None or not like.numel():
            return torch.empty_like(like, device="cpu")
        with tempfile.TemporaryFile(dir=self.window.ring) as file:  # the mapping keeps it
            mapped: Any = file  # numpy takes a file, whatever its types say
            pages = np.memmap(mapped, np.uint8, "w+", shape=like.nbytes)
        return torch.from_numpy(pages).view(like.dtype)

    def saved(
        self, states: list[ParamState], now: float
    ) -> list[tuple[BlockMean, list[ParamState]]]:
        """Every block with its mean in place of the shadows, the one under way last."""
        size = self.window.block
        blocks = [
            (BlockMean(size, each.begin, each.end), _with_values(states, each.values))
            for each in self.entries
        ]
        return [*blocks, (BlockMean(size, self.begin, now), states)]

    def matching(self, specs: Sequence[dict[str, Any]]) -> list[BlockMean]:
        """The saved blocks that this window can go on with, the one under way last."""
        means = [from_dict(spec) for spec in specs if spec.get("name") == BlockMean.__name__]
        size = self.window.block
        found = [
            mean for mean in means if isinstance(mean, BlockMean) and abs(mean.size - size) < 1e-9
        ]
        return sorted(found, key=attrgetter("begin"))[-self.window.blocks :]

    def empty(self, states: list[ParamState]) -> list[ParamState]:
        """States to read a full block into."""
        return _with_values(states, {state.name: self._new(state.own_shadow) for state in states})

    def resume(self, blocks: list[tuple[BlockMean, list[ParamState]]], begin: float) -> None:
        """Go on from saved blocks. begin: of the one under way."""
        self.clear(begin)
        for mean, states in blocks:
            values = {state.name: state.own_shadow for state in states}
            self.entries.append(RingEntry(mean.begin, mean.end, values))

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
        older = [each for each in self.entries if window.block_at(each.end) >= first]
        begin = older[0].begin if older else self.begin
        ends = [*(each.end for each in older), now]
        shares = window.shares(begin, ends)
        found = []
        for state in states:
            shadow = state.shadow
            if shadow is not None and older:
                wide = torch.promote_types(shadow.dtype, torch.float64)
                total = shadow.to("cpu", wide) * shares[-1]
                for share, each in zip(shares, older, strict=False):
                    total += each.values.get(state.name, shadow).to("cpu", wide) * share
                shadow = total.to(shadow.device, shadow.dtype)
            found.append(replace(state, shadow=shadow))
        return found


def _with_values(states: list[ParamState], values: dict[str, Tensor]) -> list[ParamState]:
    return [replace(state, shadow=values.get(state.name, state.shadow)) for state in states]
