"""`Average`: a schedule with its states; `Selection`, `Placement`, `SkippedSteps`, own buffers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..schedules import Schedule, Window
from ..sharding import derived, records
from ..sharding.ownership import ParamState
from .executors import Mark, mark
from .window_ring import WindowRing

__all__ = [
    "OWN",
    "Average",
    "Placement",
    "Selection",
    "SkippedSteps",
    "refuse_dtype",
    "shadow_device",
    "whole_modules",
]


class SkippedSteps:
    """The weight of an update whose step the device may have skipped; the host never waits.

    A skipped step has weight 0. Until one update was accepted, schedules whose first move copies
    go on copying, and so does each block of a window.

    Args:
        accepted: An earlier run has accepted an update.
    """

    def __init__(self, accepted: bool = False) -> None:
        self._accepted = accepted  # some update was accepted for sure
        self._before: tuple[int, float | Tensor] = 0, 0.0  # tried and skipped before this block
        self._tried = 0  # updates that the device was free to skip
        self._skipped: Tensor | None = None  # how many of them it skipped, float32 []
        self._known = 0  # the last count that reached the host
        self._request: tuple[Tensor, Mark] | None = None  # a count on the way to the host

    def weigh(self, weight: float, copies_first: bool, skip: Tensor | None) -> float | Tensor:
        """`weight`, 1 or 0.

        Args:
            weight: 1 - decay of this update.
            copies_first: The first move of the schedule copies.
            skip: [] on a device, and not 0 if the step was skipped. None: the step happened.
        """
        move: float | Tensor = weight
        if copies_first and not self._accepted:
            move = 1.0  # while the device has skipped every update
            if self._skipped is not None:
                # NOTE: where() of two numbers rounds them to the default dtype, perhaps bfloat16.
                ones = torch.ones_like(self._skipped)
                tried, skipped_before = self._before
                none = self._skipped - skipped_before >= self._tried - tried
                move = torch.where(none, ones, ones * weight)
        if skip is None:
            self._accepted = True
            return move
        # NOTE: optimizers may lie on other devices in later updates; the first one's counts.
        device = skip.device if self._skipped is None else self._skipped.device
        skipped = (skip != 0).to(device, torch.float32)
        self._skipped = skipped.clone() if self._skipped is None else self._skipped + skipped
        self._tried += 1
        return move * (1 - skipped)

    def begin_block(self) -> None:
        """The next update that is accepted copies, as the first one of a run does."""
        self._accepted = False
        self._before = self._tried, 0.0 if self._skipped is None else self._skipped

    def count(self) -> int:
        """Updates skipped so far. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def heard(self) -> int:
        """Updates skipped, as far as the host knows; asks the device for the rest. Never waits."""
        if self._skipped is None or self._skipped.device.type == "cpu":
            return self.count()
        if self._request is not None and self._request[1].query():
            self._known, self._request = int(self._request[0]), None
        # One count at a time is on its way, so that asking often costs nothing.
        if self._request is None:
            answer = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
            # Orders: the copy, then the mark, so that the answer is whole when the mark has passed.
            self._request = (
                answer.copy_(self._skipped, non_blocking=True),
                mark(self._skipped.device),
            )
        return self._known


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

    @property
    def mover(self) -> Schedule:
        """The schedule by which the shadows move: of a window the mean of its block under way."""
        return self.schedule if self.ring is None else self.ring.mean

    def end_block(self, now: float) -> None:
        """Put the block of a window into its ring; the next update begins another one."""
        assert self.ring is not None
        self.ring.push(self.averaged, now)
        self.skipped_steps.begin_block()

    def used(self, which: int | str | Schedule, now: float) -> Average:
        """The average as verbs use it: a window is mixed from its ring. Settle before."""
        if self.ring is None:
            return self
        window = which if isinstance(which, Window) else self.ring.window
        return replace(self, schedule=window, states=self.ring.mixed(self.states, window, now))

    @property
    def averaged(self) -> list[ParamState]:
        """The records that have a shadow."""
        return [state for state in self.states if state.shadow is not None]

    @property
    def persistent(self) -> list[ParamState]:
        """The records that a state_dict holds. It leaves out a buffer that is None."""
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

    def copy_live(self) -> None:
        """Copy live weights into the shadows; a window begins anew."""
        for state in self.averaged:
            state.own_shadow.copy_(state.source)
        if self.ring is not None:
            self.ring.clear()

    def forget_buffers(self, lost: Collection[str]) -> None:
        """Forget all own buffers of a module that lost one of its buffers."""
        whole_names = whole_modules(self.own_buffers, lost)
        self.own_buffers = {name: self.own_buffers[name] for name in whole_names}

    def forget_reshaped_buffers(self, states: Sequence[ParamState]) -> None:
        """Forget own buffers whose live ones took another shape."""
        own = [state for state in states if state.name in self.own_buffers]
        self.forget_buffers(
            [
                state.name
                for state in own
                if len(self.own_buffers[state.name]) != state.shard.local_region.numel
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
        for words, chooser in (
            ("buffers must be 'copy', 'average',", self.buffers),
            ("only must be", "" if self.only is None else self.only),
        ):
            if not _is_chooser(chooser):
                raise ValueError(f"{words} a regex or a predicate, got {chooser!r}.")

    def allows(self, name: str) -> bool:
        """Whether `only=` takes the name."""
        return self.only is None or _matches(self.only, name)

    def averages(self, shard: records.Shard) -> bool:
        """Whether it is averaged: trained or a chosen buffer, floating, and taken by `only=`."""
        # `trainable` is of now: a weight that is thawed later is named, not averaged silently.
        chosen = self._chooses_buffer(shard) if shard.kind == "buffer" else shard.trainable
        return chosen and self.can_average(shard)

    def can_average(self, shard: records.Shard) -> bool:
        """Whether its values have a mean and `only=` takes it."""
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


def _is_chooser(chooser: object) -> bool:
    if not isinstance(chooser, str):
        return callable(chooser)
    try:
        re.compile(chooser)
    except re.error:
        return False
    return True


def _matches(chooser: Chooser, name: str) -> bool:
    return re.search(chooser, name) is not None if isinstance(chooser, str) else chooser(name)


@dataclass
class Placement:
    """Where shadows lie.

    Args:
        split: Divide replicated weights among the ranks that hold them.
        dtype: The dtype of the shadows.
        device: The device of the shadows; None keeps each beside its weight.
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


def shadow_device(device: str | torch.device | None) -> torch.device | None:
    """The device that a user asks for. Raises ValueError for one that cannot hold shadows."""
    if device is None:
        return None
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    if asked is None or asked.type == "meta":
        raise ValueError(
            f"device must be None or a device that is here, like 'cpu' or 'cuda:1', got {device!r}."
        )
    return asked
