"""`Inventory`: which weights and buffers are averaged, kept in step with the walked module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from ..schedules import Schedule, Window
from ..sharding import arena, discovery, fingerprint, ownership, parameters, tree_changes
from ..sharding.records import ModelShards, Shard
from .average import OWN, Average, Placement, Selection
from .teacher import Teacher
from .window_ring import WindowRing

__all__ = ["Inventory"]


class Inventory:
    """The records of a model's weights and buffers, with a shadow for each that is averaged.

    Note:
        Local to this rank, except that `find` may exchange process groups under FSDP1's hybrid
        strategies.
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Sequence[Schedule],
        selection: Selection,
        placement: Placement,
        teacher: Teacher | None,
    ) -> None:
        self.model, self.selection, self.placement = model, selection, placement
        self._teacher = teacher
        self.averages = [
            Average(schedule, ring=WindowRing(schedule) if isinstance(schedule, Window) else None)
            for schedule in schedules
        ]
        self.lacks: list[str] = []  # errors, unless another stage of a pipeline has what they say
        self._members: list[int] = []  # global ranks that hold the model
        self.sharded: list[nn.Module] = []  # the model's FSDP modules, and those of the teacher

    @property
    def states(self) -> list[ownership.ParamState]:
        """Every weight and buffer, with the shadow of the first average where it has one.

        Regions and live weights are the same in all averages.
        """
        return self.averages[0].states

    def find(self, timeout: float = 300.0) -> ModelShards:
        """The records of the model as it is now."""
        return discovery.find_shards(self.model, self.placement.replicated, timeout)

    def adopt(self, model_shards: ModelShards) -> None:
        """Take `model_shards` for what the model holds now.

        What is averaged already keeps its shadow, if it is the same object. Everything else that
        should have a shadow gets one, equal to live. What the model no longer holds is dropped.
        """
        self._refuse_replaced_teacher()
        shards, holders = model_shards.shards, model_shards.members
        members = self._members or holders
        if holders != members:
            _refuse(
                [shard.name for shard in shards if not {*shard.owner_ranks} <= {*members}],
                f"is held by ranks {holders} now, and the EMA was built on ranks {members}. "
                "Build the EMA on the wrapped model; save() and load() carry the average over.",
            )
        self._members = holders
        kept = self._kept(shards)
        kept_shards = [shard for shard in shards if shard.name in kept]
        if self._teacher is not None:
            for shard in kept_shards:
                self._teacher.refuse_untied(shard)
        averaged = [shard for shard in shards if self.selection.averages(shard)]
        names = {shard.name for shard in averaged}
        fresh_shards = [shard for shard in shards if shard.name not in kept]
        fresh = ownership.assign(
            fresh_shards, lambda shard: shard.name in names, self.placement.split
        )
        # A stage says what it lacks later, when all ranks compare.
        self.lacks = self._what_is_lacking(averaged, bool(kept))
        if self.lacks and not isinstance(self.model, parameters.Stages):
            raise ValueError(self.lacks[0])
        self._refuse_hopeless(averaged)
        owners = {shard.name: shard.place[0] for shard in shards}
        lost = [
            state.name
            for state in self.states
            if state.shard.kind == "buffer" and owners.get(state.name) is not state.shard.place[0]
        ]
        for i, average in enumerate(self.averages):
            # Averages share regions and live weights, but each has shadows of its own.
            states = {state.name: replace(state) if i else state for state in fresh}
            if self._teacher is None:
                new = [states[shard.name] for shard in averaged if shard.name not in kept]
                arena.allocate(new, self.placement.dtype, self.placement.device)
            else:
                self._bind_teacher(self._teacher, states)
            old_states = {state.name: state for state in average.averaged}
            for shard in kept_shards:
                states[shard.name] = old_states[kept[shard.name]]
                states[shard.name].shard = shard
            average.states = [states[shard.name] for shard in shards]
            if average.ring is not None:
                average.ring.forget_all_but(set(kept.values()))
            average.forget_buffers(lost)
        self.sharded = model_shards.sharded + (
            [] if self._teacher is None else self._teacher.sharded
        )

    def _kept(self, shards: Sequence[Shard]) -> dict[str, str]:
        """Averaged weights that are there in the same form: name in `shards` -> name until now."""
        known = {
            name: state.shard
            for state in self.states
            if state.shadow is not None
            for name in state.shard.names
        }
        kept: dict[str, str] = {}
        taken: set[str] = set()
        for shard in shards:
            # A weight that was tied since may come under another of its names first.
            names = [name for name in shard.names if name in known]
            held = [known[name] for name in names if _held_alike(known[name], shard)]
            if held and held[0].name not in taken:  # by another name of a buffer that was shared
                kept[shard.name] = held[0].name
                taken.add(held[0].name)
        return kept

    def _bind_teacher(self, teacher: Teacher, states: dict[str, ownership.ParamState]) -> None:
        """The teacher's memory is the shadow of what is averaged, and a copy of the rest."""
        asked_shards = [
            state.shard
            for state in states.values()
            if state.shard.persistent and self.selection.allows(state.name)
        ]
        for name, memory in teacher.give(asked_shards).items():
            if self.selection.averages(states[name].shard):
                states[name].shadow = memory
            else:
                states[name].teacher_copy = memory
        teacher.is_stale = True

    def _what_is_lacking(self, chosen: Sequence[Shard], some_kept: bool) -> list[str]:
        """Errors where nothing is averaged; a stage of a pipeline may have nothing to average."""
        buffers, lacks = self.selection.buffers, []
        if not some_kept and all(shard.kind == "buffer" for shard in chosen):
            only = self.selection.only
            lacks.append(
                f"EMA found no trainable floating-point weights in {type(self.model).__name__}. "
                f"Are all frozen{'' if only is None else f', or does only={only!r} match nothing'}?"
            )
        if buffers not in ("copy", "average", OWN) and all(
            shard.kind != "buffer" for shard in chosen
        ):
            lacks.append(
                "buffers must be 'copy', 'average', or a regex or predicate that chooses some: "
                f"{buffers!r} chooses no floating-point buffer of {type(self.model).__name__}."
            )
        return lacks

    def _refuse_hopeless(self, chosen: Sequence[Shard]) -> None:
        sparse = [shard.name for shard in chosen if not shard.dense]
        if sparse:
            raise ValueError(
                f"{', '.join(sparse[:5])} is not dense in memory. Strided, expanded and conjugated "
                "weights cannot be averaged in place: make them contiguous (resolve_conj()) before "
                "building the EMA, or leave them out with only=."
            )
        narrow = [shard.name for shard in chosen if shard.dtype.itemsize == 1]
        if narrow:
            raise ValueError(
                f"{', '.join(narrow)}: float8 cannot be averaged. Freeze them, or leave them out "
                "with only= (buffers with buffers=)."
            )

    def reallocate(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """The same shadows in another dtype or on another device."""
        fresh = [[replace(state) for state in average.averaged] for average in self.averages]
        for states in fresh:
            arena.allocate(states, dtype, device)
        # Only now, when there was memory for all of them, the old shadows are let go.
        for average, states in zip(self.averages, fresh, strict=True):
            for state, new in zip(average.averaged, states, strict=True):
                state.shadow = new.shadow
        self.placement.dtype, self.placement.device = dtype, device

    @property
    def frozen(self) -> list[Tensor]:
        """The weights that would be averaged if they needed a gradient."""
        return [
            state.shard.tensor
            for state in self.states
            if state.shadow is None
            and state.shard.kind != "buffer"
            and self.selection.can_average(state.shard)
        ]

    @property
    def roots(self) -> list[nn.Module]:
        """Modules whose tree an update watches: not FSDP's, which registers other objects inside a
        step.
        """
        teachers = [] if self._teacher is None else [self._teacher.module]
        return [] if self.sharded else [self.model, *teachers]

    def average(self, which: int | str | Schedule) -> Average:
        """The average with that number, schedule or repr. Else raises ValueError."""
        if isinstance(which, Integral) and 0 <= int(which) < len(self.averages):  # numpy's too
            return self.averages[int(which)]
        for average in self.averages:
            if which in (average.name, average.schedule):
                return average
        for average in self.averages:
            if isinstance(which, Window) and average.ring and average.ring.window.spans(which):
                return average
        names = ", ".join(f"{i}: {average.name}" for i, average in enumerate(self.averages))
        raise ValueError(f"there is no average {which!r}; there are {names}.")

    def live_sums(self) -> dict[str, int]:
        """Sums of the bits of this rank's averaged weights in the model, by name.

        The sum is -1 where the storage moved since the last verb.

        Note:
            *Cost*: one read of them. Waits for the device.
        """
        swapped = [state for state in self.averages[0].averaged if state.shard.kind != "buffer"]
        sums = fingerprint.bit_sums(state.live for state in swapped)
        return {
            state.name: -1 if state.moved else bits
            for state, bits in zip(swapped, sums, strict=True)
        }

    # --- [Note: a model lives] -------------------------------------------------------------------

    def walk_tree(self) -> bool:
        """Compare the records with the module tree.

        Returns:
            Something is new that needs no decision.

        Raises:
            RuntimeError: What is averaged was replaced or is gone, a weight was tied otherwise, or
                should be averaged and is not.
        """
        changes = tree_changes.compare_inventory(self.model, [state.shard for state in self.states])
        averaged = {
            name for state in self.states if state.shadow is not None for name in state.shard.names
        }
        # A weight that was never averaged is read from live, whichever object holds it.
        trained = {n for n in changes.replaced if self.selection.allows(n)}
        needed = averaged | trained.difference(changes.replaced_frozen)
        replaced = [name for name in changes.replaced if name in needed]
        _refuse(
            [*replaced, *sorted(averaged.intersection(changes.replaced_buffers))],
            "no longer shares memory with the model: another object has the name now (a replaced "
            "module, load_state_dict(assign=True)?). Call ema.rescan() to average it from its "
            "value now, or build the EMA after that, on the outermost FSDP module (only= chooses "
            "parts).",
        )
        self._refuse_replaced_teacher()
        # A teacher would keep its last value.
        copied = {state.name for state in self.states if state.teacher_copy is not None}
        _refuse(
            [name for name in changes.gone if name in averaged | copied]
            + [name for name in changes.gone_buffers if name in averaged],
            "is gone from the model. Call ema.rescan() to drop it.",
        )
        _refuse(changes.retied, "is tied otherwise than when the EMA was built. Call ema.rescan().")
        _refuse(
            [name for name in changes.new_trainable if self.selection.allows(name)],
            "is new and trainable. Call ema.rescan() to average it from its value now.",
        )
        self.refuse_unfrozen()
        adopted = changes.new_trainable + changes.new_frozen + changes.new_buffers
        adopted += changes.replaced + changes.replaced_buffers
        return bool(adopted + changes.gone + changes.gone_buffers)

    def _refuse_replaced_teacher(self) -> None:
        _refuse(
            [] if self._teacher is None else self._teacher.replaced,
            "of the teacher is another object now, or none: the average would go on in the old "
            "one. Build another EMA with into=.",
        )

    def refuse_unfrozen(self) -> None:
        """Raise RuntimeError where a weight should be averaged and is not, by name."""
        unfrozen = [
            state.name
            for state in self.states
            if state.shadow is None and self.selection.averages(state.shard)
        ]
        _refuse(unfrozen, "became trainable after the EMA was built. Call ema.rescan().")

    def rebind_moved(self) -> None:
        """Bind the records anew whose storages moved, in the model or in the teacher.

        Raises:
            RuntimeError: A weight has another dtype, device, shape or order now, by name.
        """
        for average in self.averages:
            # Each for itself: a swap of one average has rebound only its own.
            moved = [state for state in average.states if state.moved or state.layout_changed]
            for state in moved:
                state.rebind()
            average.forget_reshaped_buffers(moved)
        if self._teacher is not None:
            self._teacher.follow(self.states)


def _held_alike(old: Shard, new: Shard) -> bool:
    """The same tensor object, or a buffer of the same form, in the same region."""
    are_buffers = [shard.kind == "buffer" for shard in (old, new)]
    is_same = all(are_buffers) or (old.tensor is new.tensor and not any(are_buffers))
    lies_alike = (old.local_region, old.order) == (new.local_region, new.order)
    _refuse(
        [new.name]
        if old.tensor is new.tensor and old.shape == new.shape and not lies_alike
        else [],
        "lies in another order in memory than its average (channels_last, a transposed view?). Put "
        "it back, or build another EMA.",
    )
    return is_same and lies_alike and old.shape == new.shape


def _refuse(names: Sequence[str], why: str) -> None:
    if names:
        raise RuntimeError(f"{', '.join(names[:5])} {why}")
