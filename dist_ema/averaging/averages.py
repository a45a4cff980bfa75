"""`AveragedWeights`: all averages of one model here: adopt, follow, settle, move; the clock.

    AveragedWeights          what `EMA.weights` gives: the extension API
      Inventory              which weights, with which shadows; follows the module tree
      StorageWatch           addresses and version counters of the live weights
      SwapRegistry           who else averages these weights, and whose swap is open
      Teacher                with into=: whose memory the shadows are, and when it may be read
      Updates                the steps of an update, and the engine that runs them

`EMA` adds what needs other ranks. The hooks of `attach` call in here directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from ..distributed.ranks import Ranks
from ..schedules import Schedule
from ..sharding import discovery, ownership, records, wrappers
from . import clock, executors, storage_watch, updates
from .average import OWN, Average, Placement, Selection, SkippedSteps
from .inventory import Inventory
from .swap_registry import Reads, SwapRegistry
from .teacher import Teacher

__all__ = ["AveragedWeights"]

NEW_CLOCK = clock.Clock().to_dict() | {"accepted": 0}


class AveragedWeights:
    """All averages of one model, as far as this rank holds them.

    The extension API: what drop-ins, integrations and tests use beside `EMA` itself. Nothing here
    is collective.

    Attributes:
        model: The live model, as it was given.
        inventory: What is averaged, in step with the module tree.
        averages: In the order of the schedules that the EMA was given.
        selection: Which weights and buffers are averaged.
        placement: Where shadows lie.
        teacher: The module of into=, whose weights are the shadows.
        clock: How far training and the average have moved.
        swaps: Which swaps of these weights are open.
        updates: The plan of an update, and when it runs.
        seed: The seed of stochastic rounding.
        bypassed: Steps of averaged weights by optimizers that are not attached, since a round of
            those that are.
        ranks: The ranks of the EMA.
        after_update: A method that is called when an update was submitted and the clock has moved.
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Sequence[Schedule],
        selection: Selection,
        placement: Placement,
        into: nn.Module | None = None,
    ) -> None:
        self.clock, self.swaps, self.seed, self.bypassed = clock.Clock(), SwapRegistry(), 0, 0
        own = selection.buffers == OWN
        self.teacher = None if into is None else Teacher(into, self.sync_teacher, own)
        self.inventory = inventory = Inventory(model, schedules, selection, placement, self.teacher)
        self.model, self.averages = inventory.model, inventory.averages
        self.selection, self.placement = inventory.selection, inventory.placement
        self.average, self.find = inventory.average, inventory.find
        self.live_sums = inventory.live_sums
        self._watch = storage_watch.StorageWatch(self.clock, self.swaps)
        self.mark, self.forget_mark = self._watch.mark, self._watch.forget_mark
        self.updates = updates.Updates()
        self.ranks: Ranks | None = None
        self.after_update: WeakMethod[Callable[[], None]] | None = None

    # --- what is averaged -------------------------------------------------------------------------

    @property
    def states(self) -> list[ownership.ParamState]:
        """Every weight and buffer, with the shadow of the first average where it has one."""
        return self.inventory.states

    def names(self) -> list[str]:
        """The canonical names of what is averaged."""
        return [state.name for state in self.averages[0].averaged]

    @records.uncollected()
    def adopt(self, model_shards: discovery.ModelShards) -> None:
        """Average the model as `model_shards` describes it.

        What is averaged already and still there keeps its shadow.
        """
        self.inventory.adopt(model_shards)
        self.swaps.watch(state.shard.tensor for state in self.averages[0].averaged)
        self.inventory.rebind_moved()
        storage_watch.refuse_shared(self.averages)
        self._replan()
        self.mark()

    def reseed(self, seed: int) -> None:
        """Round by another noise from now on."""
        self.seed = seed
        self._replan()

    def reallocate(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """The same shadows in another dtype or on another device, updated where they lie then."""
        self.inventory.reallocate(dtype, device)
        self._replan()
        self.updates.choose(device, self.updates.overlap, anew=True)

    def _replan(self) -> None:
        """Make the steps of an update anew: once for each set of addresses, never per step."""
        self._averaged = self.averages[0].averaged
        further = [] if self.teacher is None else self.teacher.bind_copies(self.states)
        self._watch.renew(self._averaged, further, self.inventory.frozen, self.inventory.roots)
        self.updates.renew(self.averages, self.seed)

    def use_engine(self, overlap: bool | float | None = None) -> None:
        """Choose when updates run from now on.

        An engine of the right kind stays, with its thread and window. overlap: as `attach` asks
        for; None: an update overlaps in host memory only.
        """
        self.settle()
        self.updates.choose(self.placement.device, overlap)

    # --- the state of the model -------------------------------------------------------------------

    def refuse(self, verb: str, reads: Reads, further: Iterable[Tensor] = ()) -> None:
        """Raise RuntimeError where `verb` would read or write something else than training weights.

        Args:
            verb: As the user called it.
            reads: What it reads or writes.
            further: Weights that belong to the whole model beside those that are known here.
        """
        tensors = (state.shard.tensor for state in self.states)
        self.swaps.refuse(verb, reads, chain(tensors, further))
        self.updates.refuse_capture(verb)
        if why := wrappers.blocker(self.inventory.sharded):
            raise RuntimeError(f"{verb}() {why}.")

    def reshard(self) -> None:
        """The next forward reads the shards ([Note: stale roots] in sharding.wrappers)."""
        wrappers.reshard(self.inventory.sharded)

    def ready(self) -> None:
        """Shadows may be read and live weights written after this.

        Raises:
            RuntimeError: The module tree is not what it was ([Note: a model lives] in
                storage_watch).
        """
        self.reshard()
        self.settle()
        self.follow(tree=True)
        if self.teacher is not None:
            self.teacher.forget_copies()  # no counter counts a write through `.data`
            self.teacher.copy_frozen()
        if not self.clock.started:
            self.copy_live()  # until averaging starts, the average is the live model

    def settle(self) -> None:
        """Wait until no update is in flight."""
        self.updates.engine.settle()
        self._watch.end_read()  # verbs may write the weights from now on
        self._await_teacher_reads()

    def _await_teacher_reads(self) -> None:
        """Orders: copies of an offloaded teacher that its last forward asked for, then a write."""
        if self.teacher is not None:
            executors.await_host_reads(state.own_shadow for state in self._averaged)

    def follow(self, tree: bool = False) -> None:
        """Bind anew what moved ([Note: a model lives] in storage_watch).

        tree: walk the module tree too; new frozen weights and buffers are taken in.

        Raises:
            RuntimeError: A weight was replaced, is gone, is new and trainable, or changed its form.
        """
        if tree and self.inventory.walk_tree():
            self.adopt(self.find())
        self.inventory.rebind_moved()
        # Also after the exit of a swap, which rebinds what the block moved.
        if self._watch.moved():
            storage_watch.refuse_shared(self.averages)
            self._replan()

    @property
    def is_tree_moved(self) -> bool:
        """Whether an update sees another storage or module, and may walk the tree."""
        return self._watch.sees_tree and self._watch.changed()

    @property
    def idle(self) -> bool:
        """Weights were written since `mark`, not by an EMA's swap, and the clock stood still.

        Or optimizers that are not attached step them.
        """
        return self._watch.trained_unseen() or self.bypassed > 1

    def note_swap(self, open_now: bool) -> None:
        """A swap of one of these averages has written the weights."""
        self.swaps.note(open_now)
        self.mark()

    def sync_teacher(self) -> None:
        """Prepare the teacher for a read ([Note: unannounced reads] in teacher_hooks)."""
        if self.teacher is None or not self.teacher.is_stale:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self.clock.started:
                self.copy_live()
            self.settle()
            self.teacher.reshard()

    def used(self, which: int | str | Schedule) -> Average:
        """An average as verbs use it. No update may be in flight."""
        return self.average(which).used(which, self.clock.now)

    # --- moving -----------------------------------------------------------------------------------

    def copy_live(self) -> None:
        """Copy live weights into all shadows."""
        for average in self.averages:
            average.copy_live()
        if self.teacher is not None:
            self.teacher.forget_copies()
        self.after_move()

    def after_move(self) -> None:
        """Copy frozen weights and buffers into the teacher."""
        if self.teacher is not None:
            self.teacher.copy_frozen()
            self.teacher.copy_buffers()
            self.teacher.is_stale = True

    def before_step(self) -> None:
        """Live weights are about to be overwritten: wait for the update that reads them.

        Raises:
            RuntimeError: They were written since the update began to read them, by name.
        """
        self.refuse("optimizer.step", Reads.LIVE)
        if self.teacher is not None:
            self.teacher.is_stale |= not self.clock.started
        self.await_reads()

    def await_reads(self) -> None:
        """Orders: the reads of the update in flight, then a write of live weights.

        Raises:
            RuntimeError: They were written since the update began to read them, by name.
        """
        self.updates.engine.fence()
        self._watch.refuse_written()

    def begin(self) -> None:
        """Averaging begins at the live weights."""
        self.follow(tree=self._watch.sees_tree)  # live is copied from where it lies now
        self.copy_live()
        self.clock.start()

    def move(
        self,
        elapsed: float,
        skip: Tensor | None = None,
        guard: bool = False,
        once: Schedule | None = None,
    ) -> None:
        """One update. No host sync.

        Args:
            elapsed: Units of the clock since the last update.
            skip: On the device, not 0 if the step was skipped.
            guard: Keep the shadow, element by element, where live is not finite.
            once: A schedule in place of all others, for this update.
        """
        number = self.clock.updates
        if number < 2 or self._watch.changed():
            self.inventory.refuse_unfrozen()
            self.follow(tree=self._watch.sees_tree)
        self._keep_full_blocks(elapsed, once)
        decays = self.clock.move([once or average.mover for average in self.averages], elapsed)
        weights = []
        for average, decay in zip(self.averages, decays, strict=True):
            average.last = decay, elapsed
            copies_first = (once or average.schedule).copies_first
            weights.append(average.skipped_steps.weigh(1 - decay, copies_first, skip))
        self._await_teacher_reads()  # the update writes what they copy
        self.updates.run(weights, number, guard)
        self.after_move()
        if self.updates.engine.deferred:
            self._watch.begin_read()

    def _keep_full_blocks(self, elapsed: float, once: Schedule | None) -> None:
        """The next update begins another block of a window: the last one goes into the ring."""
        if any(average.ring for average in self.averages):
            # Asked before, as an update that is refused must end no block.
            self.clock.decays([once or average.schedule for average in self.averages], elapsed)
        for average in self.averages:
            if average.ring and average.ring.is_full(self.clock.now, elapsed):
                self.settle()  # the block is copied to the host, so no update may be in flight
                average.end_block(self.clock.now)

    def updated(self) -> None:
        """Tell the listener that an update was submitted and the clock has moved."""
        if self.after_update and (listener := self.after_update()):
            listener()

    def set_clock(self, counters: dict[str, Any]) -> None:
        """Go on from a saved clock."""
        self.clock.set(counters)
        for average in self.averages:
            average.skipped_steps = SkippedSteps(accepted=counters["accepted"] > 0)
        self.mark()

    def begin_again(self, started: bool = True) -> None:
        """Begin a new average: shadows equal live, no own buffers, the clock at 0."""
        self.copy_live()
        for average in self.averages:
            average.own_buffers = {}
        self.set_clock(NEW_CLOCK | {"started": started})

    def resume(self, counters: dict[str, Any] | None) -> None:
        """Go on from a saved clock with other shadows, and forget a swap that failed."""
        self.set_clock(counters or NEW_CLOCK)
        for average in self.averages:
            if average.ring is not None:
                average.ring.clear(self.clock.now)
        if self.swaps.failed:
            self.swaps.failed = False
            self.note_swap(False)
        self.forget_mark()

    def clock_to_dict(self) -> dict[str, Any]:
        """The clock as it is saved. Waits for the device."""
        return self.clock.to_dict() | {"accepted": self.clock.updates - self.skipped}

    @property
    def skipped(self) -> int:
        """Updates that the device refused. Waits for the device."""
        return self.averages[0].skipped_steps.count()
