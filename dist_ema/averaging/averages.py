"""The averages of one model: their slots, the clock that they share, and what it takes to move them.

`EMA` is the door to this room; the hooks of `attach` come in here directly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..schedules import Schedule
from ..sharding import arena, geometry, ownership, records, wrappers
from .clock import Clock
from .engines import Engine, Inline, Times, choose_engine
from .kernels.eager import UpdatePlan
from .kernels.gpu_plan import FusedPlan, available
from .kernels.pairs import ShadowPair
from .skipped_steps import SkippedSteps
from .teacher import Teacher

__all__ = ["Average", "AveragedWeights"]

LOOK_EVERY = 100  # updates between two looks at whether weights moved
# What reads live weights for good, and so must not come inside the swap of another EMA.
_OF_LIVE = ("ema.update", "ema.metrics", "ema.reset", "ema.load", "optimizer.step")
# What reads the whole model, so also live weights that are not averaged here.
_WHOLE = ("ema.gather", "ema.copy_to", "ema.save", "ema.export", "ema.state_dict", "ema.rescan")


_MOVED_BY = (
    WeakTensorKeyDictionary()
)  # weight -> WeakSet of the averages of it, who must know of each other's swaps


@dataclass
class Average:
    """One average: a schedule, and a shadow for every weight that is averaged."""

    schedule: Schedule
    states: list[ownership.ParamState] = field(
        default_factory=list
    )  # every weight and buffer of the model
    own_buffers: dict[str, Tensor] = field(
        default_factory=dict
    )  # buffers that were recalibrated inside a swap
    skipped_steps: SkippedSteps = field(default_factory=SkippedSteps)
    last: tuple[float, float] | None = None  # decay and elapsed of the last update

    @property
    def name(self) -> str:
        return repr(self.schedule)

    @property
    def averaged(self) -> list[ownership.ParamState]:
        return [slot for slot in self.states if slot.shadow is not None]

    @property
    def persistent(self) -> list[ownership.ParamState]:
        """What a state_dict holds."""
        return [slot for slot in self.states if slot.shard.persistent]

    @property
    def floating_buffers(self) -> list[ownership.ParamState]:
        return [
            slot
            for slot in self.persistent
            if slot.shard.kind == "buffer" and slot.shard.dtype.is_floating_point
        ]

    @property
    def nbytes(self) -> int:
        return sum(slot.shadow.nbytes for slot in self.states if slot.shadow is not None)

    def pace(self, now: float) -> tuple[float, float]:
        """(decay, half life in units of the clock) of the last update; before the first, of a step of one unit."""
        decay, elapsed = self.last or (self.schedule(now + 1.0, 1.0), 1.0)
        if not 0 < decay < 1:
            return decay, 0.0 if decay == 0 else math.inf
        return decay, elapsed * math.log(0.5) / math.log(decay)


class AveragedWeights:
    """Local to this rank: nothing in here is collective."""

    def __init__(
        self,
        model: nn.Module,
        schedules: Sequence[Schedule],
        *,
        only: str | Callable[[str], bool] | None,
        buffers: str,
    ) -> None:
        self.model, self.clock, self.seed = model, Clock(), 0
        self.averages = [Average(schedule) for schedule in schedules]
        self.only, self._buffers = only, buffers
        self.engine: Engine = Inline()
        self._chosen: Any = None
        self._inline: Engine = Inline()
        self._versions: list[int] | None = (
            None  # of the live weights, while an update may be reading them
        )
        self._beside: WeakSet[AveragedWeights] = (
            WeakSet()
        )  # other averages of some of these weights
        self._swapped = (
            0  # times that a swap of one of them or of this one wrote to the live weights
        )
        self._lent_beside = (
            0  # swaps of theirs that are open. NOTE: dynamo of torch 2.8 cannot look into a WeakSet
        )
        self.lent = False
        self._sharded: list[nn.Module] = []
        self._unfilled: list[tuple[str, tuple[nn.Module, str]]] = []
        self._marked: tuple[int, tuple[int, int, int]] | None = None
        self.teacher: Teacher | None = None
        self._teacher_is_stale = self._read = (
            False  # the teacher was written since its last forward; it had one since we looked
        )

    # --- what is averaged --------------------------------------------------------------------------------------

    @property
    def states(self) -> list[ownership.ParamState]:
        """Every weight and buffer, as the first average has it; cuts and live weights are the same in all."""
        return self.averages[0].states

    def wants(self, shard: records.Shard) -> bool:
        """It is trained (or a buffer to average), it floats, and it was asked for."""
        if not (shard.dtype.is_floating_point or shard.dtype.is_complex):
            return False
        if not (
            shard.trainable
            or (shard.kind == "buffer" and self._buffers == "average" and shard.persistent)
        ):
            return False
        return self._asked(shard.name)

    def _asked(self, name: str) -> bool:
        if isinstance(self.only, str):
            return re.search(self.only, name) is not None
        return self.only is None or bool(self.only(name))

    def adopt(
        self,
        found: records.ModelShards,
        split: bool,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        """Give a shadow to every weight that should have one and has none yet, equal to live."""
        known = {slot.name for slot in self.states if slot.shadow is not None}
        cut = ownership.assign(
            [shard for shard in found.shards if shard.name not in known], self.wants, split
        )
        self._refuse_hopeless([slot.shard for slot in cut if self.wants(slot.shard)], bool(known))
        for profile in self.averages:
            fresh = {slot.name: replace(slot) for slot in cut}
            if self.teacher is None:
                arena.allocate(
                    [slot for slot in fresh.values() if self.wants(slot.shard)], dtype, device
                )
            else:
                self._lay_into(self.teacher, fresh)
            by_name = fresh | {slot.name: slot for slot in profile.averaged}
            profile.states = [by_name[shard.name] for shard in found.shards]
        self._sharded = found.sharded + ([] if self.teacher is None else self.teacher.sharded)
        self._unfilled = found.unfilled
        self._meet()
        self._replan()
        self.mark()

    def _meet(self) -> None:
        """Other averages of the same weights, whatever each was given: the model, its wrapper, a part, its parameters."""
        for slot in self.averages[0].averaged:
            moved_by = _MOVED_BY.setdefault(slot.shard.tensor, WeakSet())
            for other in moved_by:
                if other is not self and other not in self._beside:
                    self._beside.add(other)
                    other._beside.add(self)
                    self._lent_beside += other.lent
            moved_by.add(self)

    def reallocate(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """The same shadows in another dtype or on another device, updated where and how `use_engine` said."""
        fresh = [[replace(slot) for slot in profile.averaged] for profile in self.averages]
        for slots in fresh:
            arena.allocate(slots, dtype, device)
        for profile, slots in zip(
            self.averages, fresh, strict=True
        ):  # only now: memory for all of them was there
            for slot, new in zip(profile.averaged, slots, strict=True):
                slot.shadow = new.shadow
        self._replan()
        self._chosen = (
            None  # NOTE: an engine that stayed would keep the old shadows until the next update
        )

    def _lay_into(self, teacher: Teacher, fresh: dict[str, ownership.ParamState]) -> None:
        """The teacher's memory is the shadow of what is averaged, and the twin of what else only= lets through."""
        asked = [
            slot.shard
            for slot in fresh.values()
            if slot.shard.persistent and self._asked(slot.name)
        ]
        for name, memory in teacher.give(asked).items():
            if self.wants(fresh[name].shard):
                fresh[name].shadow = memory
            else:
                fresh[name].teacher_copy = memory
        self._teacher_is_stale = True

    def _refuse_hopeless(self, chosen: list[records.Shard], some: bool) -> None:
        if not some and all(shard.kind == "buffer" for shard in chosen):
            raise ValueError(
                f"EMA found no trainable floating-point weights in {type(self.model).__name__}. "
                f"Are all frozen, or does only={self.only!r} match nothing?"
            )
        sparse = [shard.name for shard in chosen if not shard.dense]
        if sparse:
            raise ValueError(
                f"{', '.join(sparse[:5])} is not dense in memory. Strided and expanded weights cannot be averaged in place: "
                "make them contiguous before building the EMA, or leave them out with only=."
            )
        narrow = [shard.name for shard in chosen if shard.dtype.itemsize == 1]
        if narrow:
            raise ValueError(
                f"{', '.join(narrow)}: float8 cannot be averaged. Freeze them, or leave them out with only=."
            )

    def _replan(self) -> None:
        self._averages = self.averages[0].averaged
        self._twins = [slot for slot in self.states if slot.teacher_copy is not None]
        self._copied: list[int] = [-1 for _ in self._twins]
        kept = self._averages + self._twins
        self._watched = [
            slot for slot in kept if slot.shard.kind == "buffer" or not slot.shard.dense
        ]
        weights: list[ShadowPair] = []
        buffers: list[ShadowPair] = []
        for i, slot in enumerate(self.states):
            shadows = [profile.states[i].shadow for profile in self.averages]
            if slot.shadow is not None:
                number = geometry.numbering(slot.shard, slot.averaged_region, slot.shadow.device)
                every = [shadow for shadow in shadows if shadow is not None]
                pair = ShadowPair(
                    slot.name, every, slot.live, number, math.prod(slot.shard.shape) >= 1 << 32
                )
                (buffers if slot.shard.kind == "buffer" else weights).append(pair)
        self._plan = _plan(weights, self.seed)
        # Buffers are written by the next forward, so they are never read behind it. Modules may replace them at every
        # step, which is no time for tables on the device.
        self._buffer_plan = UpdatePlan(buffers, self.seed)

    def use_engine(self, overlap: bool, host: bool) -> None:
        """Choose when updates run from now on; an engine of the right kind stays, with its thread and window."""
        self.settle()
        devices = {slot.local.device for slot in self._averages}
        if not host:  # a teacher may lie on another device than the model
            devices |= {slot.shadow.device for slot in self._averages if slot.shadow is not None}
        chosen = (overlap, host, frozenset(devices))
        if chosen != self._chosen:
            self.engine = choose_engine(chosen[2], host, overlap)
            self._inline = choose_engine(chosen[2], host, overlap=False)
            self._chosen = chosen

    @property
    def far_on_host(self) -> bool:
        """Every shadow lies in host memory and its live weight on a device."""
        pairs = [(slot.shadow, slot.local) for slot in self._averages if slot.shadow is not None]
        return all(shadow.device.type == "cpu" != local.device.type for shadow, local in pairs)

    def average(self, which: int | str | Schedule) -> Average:
        """By number, by the schedule, or by its repr."""
        if isinstance(which, int) and 0 <= which < len(self.averages):
            return self.averages[which]
        for profile in self.averages:
            if which in (profile.name, profile.schedule):
                return profile
        names = ", ".join(f"{i}: {profile.name}" for i, profile in enumerate(self.averages))
        raise ValueError(f"there is no average {which!r}; there are {names}.")

    # --- the state of the model --------------------------------------------------------------------------------

    def refuse(self, verb: str) -> None:
        """Raise RuntimeError where `verb` would read or write something else than training weights."""
        if self.lent:
            hint = " metrics(distance=False) works here." if verb == "ema.metrics" else ""
            raise RuntimeError(
                f"{verb}() inside ema.swap(): the model holds the average, not the training weights.{hint}"
            )
        if (self._lent_beside and verb in _OF_LIVE) or (verb in _WHOLE and self._any_lent()):
            raise RuntimeError(
                f"{verb}() inside the swap of another EMA: the model does not hold its training weights."
            )
        why = wrappers.blocker(self._sharded)
        if why:
            raise RuntimeError(f"{verb}() {why}.")

    def _any_lent(self) -> bool:
        """Some weight or buffer of the model, averaged here or not."""
        others = {other for slot in self.states for other in _MOVED_BY.get(slot.shard.tensor, ())}
        return any(other.lent for other in others)

    def reshard(self) -> None:
        """The next forward reads the shards ([Note: stale roots] in shards)."""
        wrappers.reshard(self._sharded)

    def ready(self) -> None:
        """Shadows may be read and live weights written after this."""
        self.reshard()
        self.settle()
        self.follow(replaced=True)
        self._copy_frozen()
        if not self.clock.started:
            self.copy_live()  # until averaging starts, the average is the live model

    def settle(self) -> None:
        """No update is under way after this."""
        self.engine.settle()
        self._versions = None

    def follow(self, replaced: bool = False, newly_trainable: bool = True) -> None:
        """[Note: stale records] in layout. `replaced` also looks for other Parameters under the same names."""
        gone = [slot.name for slot in self.states if replaced and records.replaced(slot.shard)]
        gone += [
            f"{name} of the teacher"
            for name in (self.teacher.replaced if self.teacher and replaced else [])
        ]
        if gone:
            raise RuntimeError(
                f"{', '.join(gone[:5])} no longer shares memory with the model (load_state_dict(assign=True)?). "
                "Build the EMA after that, and on the outermost FSDP module (only= chooses parts)."
            )
        new = [slot.name for slot in self.states if slot.shadow is None and self.wants(slot.shard)]
        if new and newly_trainable:
            raise RuntimeError(
                f"{', '.join(new[:5])} became trainable after the EMA was built. Call ema.rescan()."
            )
        filled = [
            name for name, (module, key) in self._unfilled if module._buffers.get(key) is not None
        ]
        if filled and replaced and newly_trainable:
            raise RuntimeError(
                f"{', '.join(filled[:5])} was None when the EMA was built. Call ema.rescan()."
            )
        moved = [i for i, slot in enumerate(self.states) if slot.moved]
        for profile in self.averages:
            for i in moved:
                profile.states[i].rebind()
        if self._follow_teacher() or any(self.states[i].shadow is not None for i in moved):
            self._replan()

    def _follow_teacher(self) -> bool:
        """The same for the teacher's memory; whether any of it moved."""
        moved = [] if self.teacher is None else self.teacher.moved
        for slot in [slot for slot in self.states if slot.name in moved]:
            assert self.teacher is not None
            old, new = (
                slot.teacher_copy if slot.shadow is None else slot.shadow,
                self.teacher.memory(slot.name),
            )
            assert old is not None
            if (new.dtype, new.device, len(new)) != (old.dtype, old.device, len(old)):
                raise RuntimeError(
                    f"{slot.name} of the teacher was {old.dtype} on {old.device} with {len(old)} elements here, and is now "
                    f"{new.dtype} on {new.device} with {len(new)}. Build the EMA after teacher.to(...)."
                )
            slot.shadow, slot.teacher_copy = (None, new) if slot.shadow is None else (new, None)
        return bool(moved)

    def lend(self, lent: bool) -> None:
        """Note that the model holds the average, or no longer does."""
        for other in (self, *self._beside):
            other._swapped += 1
            other._lent_beside += 0 if other is self else lent - self.lent
        self.lent = lent

    def mark(self) -> tuple[int, tuple[int, int, int]]:
        """Remember how often weights were written, to notice training that no update follows."""
        writes = sum(slot.local._version for slot in self._averages)
        self._marked = writes, (self.clock.steps, self.clock.updates, self._swapped)
        return self._marked

    @property
    def idle(self) -> bool:
        """Weights were written since `mark`, not by an EMA's swap, and the clock stood still."""
        before, now = self._marked, self.mark()
        return before is not None and now[0] != before[0] and now[1] == before[1]

    def forget_mark(self) -> None:
        """Whoever resumed may still be writing the live weights: not the first look after that says anything."""
        self._marked = None

    def sync_teacher(self) -> None:
        """The teacher is about to be read ([Note: a read behind our back] in teacher)."""
        if self.teacher is None or not self._teacher_is_stale:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self.clock.started:
                self.copy_live()
            self.settle()
            wrappers.reshard(self.teacher.sharded)
        self._teacher_is_stale, self._read = False, True

    # --- moving ------------------------------------------------------------------------------------------------

    def copy_live(self) -> None:
        """Every shadow is its live weight again."""
        for profile in self.averages:
            for slot in profile.averaged:
                assert slot.shadow is not None
                slot.shadow.copy_(slot.live)
        self._copied = [-1 for _ in self._twins]
        self._copy_frozen()
        self._copy_buffers()
        self._teacher_is_stale = True

    def _copy_frozen(self) -> None:
        """A teacher holds frozen weights too: they follow whenever live was written, by load_state_dict for one."""
        for i, slot in enumerate(self._twins):
            written = slot.local._version != self._copied[i] or not slot.shard.dense
            if slot.shard.kind != "buffer" and written:
                assert slot.teacher_copy is not None
                slot.teacher_copy.copy_(slot.local)
                self._copied[i] = slot.local._version
                self._teacher_is_stale = True

    def _copy_buffers(self) -> None:
        for slot in self._twins:
            if slot.shard.kind == "buffer":
                assert slot.teacher_copy is not None
                slot.teacher_copy.copy_(slot.local)

    def before_step(self) -> None:
        """Live weights are about to be overwritten."""
        self.refuse("optimizer.step")
        self._teacher_is_stale |= not self.clock.started
        self.engine.fence()
        versions, self._versions = self._versions, None
        if versions is None:
            return
        pairs = zip(self._averages, versions, strict=True)
        written = [
            s.name
            for s, version in pairs
            if s.local._version != version and s.shard.kind != "buffer"
        ]
        if written:
            raise RuntimeError(
                f"{', '.join(written[:5])} was written after the optimizer's step, while the average was reading it (a "
                "clamp, a forced normalisation?). Use ema.attach(..., overlap=False), or ema.update() by hand."
            )

    def begin(self) -> None:
        """Averaging begins at the live weights."""
        self.follow()  # before its first forward FSDP2 may have held the weights elsewhere
        self.copy_live()
        self.clock.start()

    def move(
        self,
        elapsed: float,
        skip: Tensor | None = None,
        guard: bool = False,
        once: Schedule | None = None,
    ) -> None:
        """One update. skip: not 0, on the device, if the step was skipped. once: in place of the schedules, this time.
        No host sync, no collective."""
        number = self.clock.updates
        if number < 2 or number % LOOK_EVERY == 0:
            self.follow()
        elif (
            self._read and self._follow_teacher()
        ):  # FSDP2 may hold it elsewhere after a first forward
            self._replan()
        self._read = False
        if any(slot.moved for slot in self._watched):
            self.follow()  # modules may register a new tensor under a buffer's name at every step
        schedules = [once or profile.schedule for profile in self.averages]
        decays = self.clock.move(schedules, elapsed)
        weights = []
        for profile, schedule, decay in zip(self.averages, schedules, decays, strict=True):
            profile.last = decay, elapsed
            weights.append(profile.skipped_steps.weigh(1 - decay, schedule.copies_first, skip))
        self.engine.update(self._plan, weights, number, guard)
        if self._buffer_plan.pairs:
            self._inline.update(self._buffer_plan, weights, number, guard)
        self._copy_frozen()
        self._copy_buffers()
        self._teacher_is_stale = True
        if self.engine.deferred:
            self._versions = [slot.local._version for slot in self._averages]

    def move_by(self, rule: Callable[[Sequence[tuple[Tensor, Tensor]]], None]) -> None:
        """One update by somebody else's arithmetic: rule((shadow, live), ...) writes the shadows of the first average.

        The views have the shapes of whole weights where this rank averages all of one, else of the boxes that it holds;
        live comes in the shadow's dtype, on its device. No collective.
        """
        self.refuse("ema.update")
        self.settle()
        self.follow()
        self.clock.move([profile.schedule for profile in self.averages], 1.0)
        pairs = []
        for slot in self._averages:
            assert slot.shadow is not None
            shadow, live = (
                geometry.boxes_with_data(slot.shard, slot.averaged_region, data)
                for data in (slot.shadow, slot.live.to(slot.shadow))
            )
            pairs += [(mine, theirs) for (_, mine), (_, theirs) in zip(shadow, live, strict=True)]
        rule(pairs)
        self._copy_frozen()
        self._copy_buffers()
        self._teacher_is_stale = True

    def pull(self, weight: float) -> None:
        """The other way round: live moves towards the first average; 1 copies. Replicas are for `swap.spread`."""
        self.ready()
        pairs = []
        for slot in self._averages:
            assert slot.shadow is not None
            if weight == 1:
                slot.live.copy_(slot.shadow)
            else:
                number = geometry.numbering(slot.shard, slot.averaged_region, slot.local.device)
                pairs.append(ShadowPair(slot.name, [slot.live], slot.shadow, number))
        UpdatePlan(pairs, self.seed).run([weight], self.clock.updates)
        self.mark()

    def set_clock(self, spec: dict[str, Any]) -> None:
        """Go on from a saved clock."""
        self.clock.set(spec)
        for profile in self.averages:
            profile.skipped_steps.reset(accepted=spec["accepted"] > 0)
        self.mark()

    def clock_to_dict(self) -> dict[str, Any]:
        """The clock as it is saved. Waits for the device."""
        return self.clock.to_dict() | {"accepted": self.clock.updates - self.skipped}

    @property
    def skipped(self) -> int:
        """Updates that the device refused. Waits for the device."""
        return self.averages[0].skipped_steps.count()

    # --- what is known of it -----------------------------------------------------------------------------------

    def report(self, profile: Average) -> dict[str, float]:
        """The local half of `EMA.metrics`. Never waits."""
        now, times = self.clock.at(profile.schedule), self._times()
        decay, half_life = profile.pace(now)
        beside, on_host = self._bytes()
        return {
            "decay": decay,
            "now": now,
            "updates": self.clock.updates,
            "half_life": half_life,
            "bytes": beside,
            "pinned": on_host,
            "update_ms": times.update_ms,
            "stall_ms": times.stall_ms,
            "lag": times.lag,
            "skipped": self.averages[0].skipped_steps.heard(),
        }

    def _times(self) -> Times:
        """Of the engine, and of the buffers, which are averaged before `move` returns."""
        times, buffers = self.engine.times(), self._inline.times()
        return replace(
            times,
            update_ms=times.update_ms + buffers.update_ms,
            stall_ms=times.stall_ms + buffers.stall_ms,
        )

    def _bytes(self) -> tuple[int, int]:
        """Of the shadows that lie where their weights do; of those that host memory keeps for a device, and of windows."""
        kept = [0, self.engine.window_bytes]
        for slot in (slot for profile in self.averages for slot in profile.averaged):
            assert slot.shadow is not None
            kept[slot.shadow.device != slot.local.device] += slot.shadow.nbytes
        return kept[0], kept[1]


def _plan(pairs: Sequence[ShadowPair], seed: int) -> UpdatePlan | FusedPlan:
    """One launch per dtype where a Triton kernel takes the pairs and is right on their devices."""
    devices = {shadow.device for pair in pairs for shadow in pair.shadows}
    if devices and all(available(device) for device in devices):
        return FusedPlan(pairs, seed, UpdatePlan)
    return UpdatePlan(pairs, seed)
