"""One average: its slots, its clock, and what it takes to move it.

`EMA` is the door to this room; the hooks of `attach` come in here directly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import layout, shards
from .clock import Clock
from .engine import Engine, Gate, Inline, choose
from .kernels import Pair, Plan
from .schedule import Schedule

__all__ = ["Average"]

LOOK_EVERY = 100  # updates between two looks at whether weights moved


class Average:
    """Local to this rank: nothing in here is collective."""

    def __init__(
        self, model: nn.Module, schedule: Schedule, *, only: str | Callable[[str], bool] | None, buffers: str
    ) -> None:
        self.model, self.schedule, self.clock = model, schedule, Clock()
        self.only, self._buffers = only, buffers
        self.engine: Engine = Inline()
        self._inline = Inline()
        self._versions: list[int] | None = None  # of the live weights, while an update may be reading them
        self.gate, self.seed = Gate(), 0
        self._last: tuple[float, float] | None = None  # decay and elapsed of the last update
        self.own: dict[str, Tensor] = {}  # buffers that were recalibrated inside a swap
        self.lent = False
        self.slots: list[layout.Slot] = []  # every weight and buffer of the model
        self.averages: list[layout.Slot] = []  # those that have a shadow
        self._sharded: list[nn.Module] = []

    # --- what is averaged --------------------------------------------------------------------------------------

    def wants(self, shard: shards.Shard) -> bool:
        """It is trained (or a buffer to average), it floats, and it was asked for."""
        if not (shard.dtype.is_floating_point or shard.dtype.is_complex):
            return False
        if not (shard.trainable or (shard.kind == "buffer" and self._buffers == "average")):
            return False
        if isinstance(self.only, str):
            return re.search(self.only, shard.name) is not None
        return self.only is None or bool(self.only(shard.name))

    def adopt(self, found: shards.Found, split: bool, dtype: torch.dtype, device: torch.device | None) -> None:
        """Give a shadow to every weight that should have one and has none yet, equal to live."""
        known = {slot.name: slot for slot in self.averages}
        fresh = layout.cut([shard for shard in found.shards if shard.name not in known], self.wants, split)
        chosen = [slot for slot in fresh if self.wants(slot.shard)]
        self._refuse_hopeless([slot.shard for slot in chosen])
        layout.allocate(chosen, dtype, device)
        by_name = {slot.name: slot for slot in fresh} | known
        self.slots = [by_name[shard.name] for shard in found.shards]
        self._sharded = found.sharded
        self._replan()
        self.mark()

    def _refuse_hopeless(self, chosen: list[shards.Shard]) -> None:
        if not self.averages and all(shard.kind == "buffer" for shard in chosen):
            raise ValueError(
                f"EMA found no trainable floating-point weights in {type(self.model).__name__}. "
                f"Are all frozen, or does only={self.only!r} match nothing?"
            )
        narrow = [shard.name for shard in chosen if shard.dtype.itemsize == 1]
        if narrow:
            raise ValueError(
                f"{', '.join(narrow)}: float8 cannot be averaged. Freeze them, or leave them out with only=."
            )

    def _replan(self) -> None:
        pairs = []
        self.averages = [slot for slot in self.slots if slot.shadow is not None]
        for slot in self.averages:
            assert slot.shadow is not None
            number = partial(layout.indices, slot.shard, slot.own, device=slot.shadow.device)
            pairs.append(Pair(slot.name, slot.shadow, slot.live, number))
        buffers = {slot.name for slot in self.averages if slot.shard.kind == "buffer"}
        self._plan = Plan([pair for pair in pairs if pair.name not in buffers], self.seed)
        # Buffers are written by the next forward, so they are never read behind it.
        self._buffer_plan = Plan([pair for pair in pairs if pair.name in buffers], self.seed)

    def use_engine(self, overlap: bool, host: bool) -> None:
        """Choose when updates run from now on."""
        self.settle()
        devices = {slot.local.device for slot in self.averages}
        self.engine = choose(devices, host) if overlap else Inline()

    @property
    def persistent(self) -> list[layout.Slot]:
        """What a state_dict holds."""
        return [slot for slot in self.slots if slot.shard.persistent]

    @property
    def floating_buffers(self) -> list[layout.Slot]:
        return [slot for slot in self.persistent if slot.shard.kind == "buffer" and slot.shard.dtype.is_floating_point]

    # --- the state of the model --------------------------------------------------------------------------------

    def refuse(self, verb: str) -> None:
        """Raise RuntimeError where `verb` would read or write something else than training weights."""
        if self.lent:
            raise RuntimeError(f"{verb}() inside ema.swap(): the model holds the average, not the training weights.")
        why = shards.blocker(self._sharded)
        if why:
            raise RuntimeError(f"{verb}() {why}.")

    def reshard(self) -> None:
        """The next forward reads the shards ([Note: stale roots] in shards)."""
        shards.reshard(self._sharded)

    def ready(self) -> None:
        """Shadows may be read and live weights written after this."""
        self.reshard()
        self.settle()
        self.follow(replaced=True)
        if not self.clock.started:
            self.copy_live()  # until averaging starts, the average is the live model

    def settle(self) -> None:
        """No update is under way after this."""
        self.engine.settle()
        self._versions = None

    def follow(self, replaced: bool = False, newly_trainable: bool = True) -> None:
        """[Note: stale records] in layout. `replaced` also looks for other Parameters under the same names."""
        gone = [slot.name for slot in self.slots if replaced and shards.replaced(slot.shard)]
        if gone:
            raise RuntimeError(
                f"{', '.join(gone[:5])} no longer shares memory with the model (load_state_dict(assign=True)?). "
                "Build the EMA after that."
            )
        new = [slot.name for slot in self.slots if slot.shadow is None and self.wants(slot.shard)]
        if new and newly_trainable:
            raise RuntimeError(f"{', '.join(new[:5])} became trainable after the EMA was built. Call ema.rescan().")
        moved = [slot for slot in self.slots if slot.moved]
        for slot in moved:
            slot.rebind()
        if any(slot.shadow is not None for slot in moved):
            self._replan()

    def mark(self) -> None:
        """Remember how often weights were written, to notice training that no update follows."""
        self._marked = sum(slot.local._version for slot in self.averages), self.clock.steps, self.clock.updates

    @property
    def idle(self) -> bool:
        """Weights were written since `mark`, and the clock stood still."""
        writes, *moves = self._marked
        self.mark()
        return self._marked[0] != writes and list(self._marked[1:]) == moves

    # --- moving ------------------------------------------------------------------------------------------------

    def copy_live(self) -> None:
        """Every shadow is its live weight again."""
        for slot in self.averages:
            assert slot.shadow is not None
            slot.shadow.copy_(slot.live)

    def before_step(self) -> None:
        """Live weights are about to be overwritten."""
        self.refuse("optimizer.step")
        self.engine.fence()
        versions, self._versions = self._versions, None
        if versions is None:
            return
        pairs = zip(self.averages, versions, strict=True)
        written = [s.name for s, version in pairs if s.local._version != version and s.shard.kind != "buffer"]
        if written:
            raise RuntimeError(
                f"{', '.join(written[:5])} was written after the optimizer's step, while the average was reading it (a "
                "clamp, a forced normalisation?). Use ema.attach(..., overlap=False), or ema.update() by hand."
            )

    def begin(self) -> None:
        """Averaging begins at the live weights."""
        self.settle()
        self.copy_live()
        self.clock.start(self.schedule)

    def move(self, elapsed: float, skip: Tensor | None = None, guard: bool = False) -> None:
        """One update. skip: not 0, on the device, if the step was skipped. No host sync, no collective."""
        number = self.clock.updates
        if number < 2 or number % LOOK_EVERY == 0:
            self.follow()
        decay = self.clock.move(self.schedule, elapsed)
        self._last = decay, elapsed
        weight = self.gate.weigh(1 - decay, self.schedule.copies_first, skip)
        self.engine.update(self._plan, weight, number, guard)
        self._inline.update(self._buffer_plan, weight, number, guard)
        if self.engine.deferred:
            self._versions = [slot.local._version for slot in self.averages]

    @property
    def pace(self) -> tuple[float, float]:
        """(decay, half life in units of the clock) of the last update; before the first, of a step of one unit."""
        decay, elapsed = self._last or (self.schedule(self.clock.now + 1.0, 1.0), 1.0)
        if not 0 < decay < 1:
            return decay, 0.0 if decay == 0 else math.inf
        return decay, elapsed * math.log(0.5) / math.log(decay)

    def set_clock(self, spec: dict[str, Any]) -> None:
        """Go on from a saved clock."""
        self.clock.set(spec)
        self.gate.reset(accepted=spec["accepted"] > 0)
        self.mark()

    def clock_spec(self) -> dict[str, Any]:
        """The clock as it is saved. Waits for the device."""
        return self.clock.spec() | {"accepted": self.clock.updates - self.gate.count()}
