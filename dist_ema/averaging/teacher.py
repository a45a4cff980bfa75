"""`Teacher`: `EMA(model, into=teacher)`, whose memory is the shadow; frozen weights are copied.

The teacher's own memory is the shadow: there is no second copy, and a swap has nothing to exchange.
Each weight must lie there as it does in the model, the same elements on the same rank:

    model       FSDP2, rank 0 of 2   |####|    |      DDP    |#########|
    teacher     FSDP2, rank 0 of 2   |####|    |      plain  |#########| on every rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..schedules import Schedule, Window
from ..sharding import (
    derived,
    discovery,
    parameters,
    storage,
    tree_changes,
    wrappers,
)
from ..sharding.ownership import ParamState
from ..sharding.records import Shard
from . import teacher_hooks
from .storage_watch import versions
from .swap_registry import Versions

__all__ = ["Teacher", "refuse_beside_teacher"]


def refuse_beside_teacher(schedules: Sequence[Schedule], dtype: torch.dtype, device: Any) -> None:
    """Raise ValueError for arguments that the teacher's own memory decides."""
    if len(schedules) > 1:
        raise ValueError(
            f"into= takes one average, got {len(schedules)} decays. Build one EMA per teacher."
        )
    if isinstance(schedules[0], Window):
        raise ValueError(
            f"into= takes an average that moves in place, got {schedules[0]!r}, which is mixed "
            "when it is used. Write it into the other model by ema.copy_to()."
        )
    if device is not None or dtype != torch.float32:
        raise ValueError(
            f"device={device!r}, dtype={dtype} together with into=: the shadows are the teacher's "
            "weights. Move and cast the teacher before building the EMA."
        )


_TEACHERS: WeakSet[Teacher] = WeakSet()  # those that an EMA writes


class Teacher:
    """The teacher's memory under the names of the model's weights, and what keeps it in step.

    Besides the updates, which write the shadows, frozen weights and buffers are copied into it.
    Local: nothing in here is collective but finding the records.

    Args:
        model: The teacher.
        announce: Called before the teacher is read; a bound method, whose owner is not kept alive.
        own_buffers: Its buffers are left alone.

    Attributes:
        is_stale: The teacher was written since its last forward, so FSDP may hold an old unsharded
            copy ([Note: stale roots] in sharding.wrappers).
    """

    def __init__(
        self,
        model: parameters.ModelOrStages,
        announce: Callable[[], None],
        own_buffers: bool = False,
    ) -> None:
        self.module, self.is_stale = parameters.module_of(model), False
        self._own_buffers = own_buffers
        teacher_shards = discovery.find_shards(self.module)
        self.sharded = teacher_shards.sharded
        self._records = teacher_shards.shards
        self._shards = {name: shard for shard in teacher_shards.shards for name in shard.names}
        self._given: dict[str, Shard] = {}  # by the model's names: what the EMA writes
        self._places: dict[str, Any] = {}  # address and form
        self._frozen: list[ParamState] = []  # whose live weights are copied into the teacher
        self._frozen_versions: list[Versions | None] = []  # when they were copied last
        self._buffers: list[ParamState] = []  # copied too, but for the teacher's own
        self._hooks = teacher_hooks.put_on(self.module, self.sharded, announce)

    def release(self) -> None:
        """Take the hooks off, for another EMA that writes this teacher from now on."""
        self._hooks.close()
        _TEACHERS.discard(self)

    # --- whose memory is whose -------------------------------------------------------------------

    def give(self, asked: Sequence[Shard]) -> dict[str, Tensor]:
        """The teacher's elements for what each shard of the model holds here, by name.

        They are overwritten with the model's. From now on they are the EMA's to write, and weights
        among them need no gradient any more. *Aliases* the teacher.

        Raises:
            ValueError: The teacher lacks a weight, has it in another form, or it is another EMA's.
        """
        lacks = [shard.name for shard in asked if shard.name not in self._shards]
        if lacks:
            raise ValueError(
                f"the teacher has no {', '.join(lacks[:5])}, which the model has. Leave out with "
                "only= what is not to be averaged into it."
            )
        # All are asked before the first one is written, so that a refusal leaves the teacher alone.
        for shard in asked:
            self._refuse_unlike(shard, self._shards[shard.name])
            self._given[shard.name] = self._shards[shard.name]
        self._refuse_taken()
        memory = {}
        for shard in asked:
            given = self._given[shard.name]
            if shard.kind != "buffer":
                given.tensor.requires_grad_(False)
            memory[shard.name], self._places[shard.name] = given.read(), _address_and_form(given)
            if not (self._own_buffers and shard.kind == "buffer"):
                memory[shard.name].copy_(shard.read())
        _TEACHERS.add(self)
        return memory

    @property
    def written(self) -> list[Shard]:
        """The records of what the EMA writes."""
        return list(self._given.values())

    @property
    def replaced(self) -> list[str]:
        """Names under which the teacher has another object now, or none."""
        changes = tree_changes.compare_inventory(self.module, self._records)
        lost = {*changes.replaced, *changes.gone, *changes.retied, *changes.gone_buffers}
        return [name for name, shard in self._given.items() if shard.name in lost]

    def follow(self, states: Sequence[ParamState]) -> None:
        """Bind shadows and copies anew where the teacher's storages moved.

        Raises:
            RuntimeError: A weight of the teacher has another dtype, device or size now.
        """
        for state in states:
            shard = self._given.get(state.name)
            # [Note: stale records] in ownership
            if shard is None or _address_and_form(shard) == self._places[state.name]:
                continue
            old = state.teacher_copy if state.shadow is None else state.shadow
            assert old is not None
            new, place = shard.read(), _address_and_form(shard)
            forms = [(memory.dtype, memory.device, len(memory)) for memory in (new, old)]
            if forms[0] != forms[1] or place[1] != self._places[state.name][1]:
                cure = "Build the EMA after teacher.to(...)."
                if shard.kind == "buffer":
                    cure += " If it changes its shape in training, leave it out with only=."
                raise RuntimeError(
                    f"{state.name} of the teacher was {old.dtype} on {old.device} with {len(old)} "
                    f"elements here, and is now {new.dtype} on {new.device} with {len(new)}, or "
                    f"lies in another order. {cure}"
                )
            self._places[state.name] = place
            if state.shadow is None:
                state.teacher_copy = new
            else:
                state.shadow = new

    def refuse_training(self, optimizers: Iterable[Optimizer]) -> None:
        """Raise ValueError if an optimizer would train what is the average."""
        names = {id(shard.tensor): name for name, shard in self._given.items()}
        # A DeepSpeed engine has no groups; `give` refuses what it trains.
        groups = [g for optimizer in optimizers for g in getattr(optimizer, "param_groups", ())]
        trained = [names[id(p)] for group in groups for p in group["params"] if id(p) in names]
        if trained:
            raise ValueError(
                f"the optimizer trains {', '.join(trained[:5])} of the teacher, which is the "
                "average: give it the model's parameters only."
            )

    def _refuse_taken(self) -> None:
        """Raise ValueError if another EMA writes these weights of the teacher."""
        taught = {
            id(shard.tensor)
            for teacher in _TEACHERS
            if teacher is not self
            for shard in teacher.written
        }
        names = [name for name, shard in self._given.items() if id(shard.tensor) in taught]
        if names:
            raise ValueError(
                f"{', '.join(names[:5])} of the teacher is the average of another EMA already. "
                "Give each EMA a teacher of its own, or drop the other EMA first."
            )

    def refuse_untied(self, shard: Shard, memory: Shard | None = None) -> None:
        """Raise ValueError if names are tied in only one of the model and the teacher."""
        name, memory = shard.name, memory or self._given[shard.name]
        untied = [alias for alias in shard.aliases if self._shards.get(alias) is not memory]
        untied += [
            given_name
            for given_name, shard_of_teacher in self._given.items()
            if shard_of_teacher is memory and given_name != name
        ]
        if untied:
            raise ValueError(
                f"{name} and {untied[0]} are tied in one of the model and the teacher, and not in "
                "the other. Tie them in both, or in neither."
            )

    def _refuse_unlike(self, shard: Shard, memory: Shard) -> None:
        """The teacher's record must be able to hold the average of the model's."""
        name, live, dtype = shard.name, shard.dtype, memory.dtype
        if memory.shape != shard.shape:
            raise ValueError(
                f"{name} is {shard.shape} in the model and {memory.shape} in the teacher. Build "
                "both alike, or leave it out with only=."
            )
        if (memory.local_region, memory.order) != (shard.local_region, shard.order):
            raise ValueError(
                f"{name}: this rank holds {_region_in_words(shard)} in the model and "
                f"{_region_in_words(memory)} in the teacher. Wrap both the same way, on the same "
                "mesh, in the same memory format; beside a DDP model leave the teacher plain."
            )
        floats = live.is_floating_point and dtype.is_floating_point and dtype.itemsize > 1
        if live != dtype and not floats:
            raise ValueError(
                f"{name} is {live} in the model and {dtype} in the teacher, which cannot hold its "
                "average."
            )
        if memory.master is not None:
            raise ValueError(
                f"{name} of the teacher has fp32 masters at DeepSpeed, whose optimizer would train "
                "it. Call deepspeed.initialize without an optimizer for the teacher."
            )
        if not memory.dense:
            raise ValueError(
                f"{name} of the teacher is strided or expanded. Make it contiguous, or leave it "
                "out with only=."
            )
        self.refuse_untied(shard, memory)
        shares_memory = memory.read().data_ptr() == shard.read().data_ptr()
        if shard.trainable and shares_memory and shard.local_region.numel:
            raise ValueError(
                f"{name} is one weight in the model and the teacher: give into= a copy."
            )

    # --- what is copied --------------------------------------------------------------------------

    def bind_copies(self, states: Sequence[ParamState]) -> list[Shard]:
        """Keep the teacher's copies of these from now on; each is copied at the next sync.

        Returns:
            Whose addresses count: the teacher's memory, and frozen weights that are copied into it.
        """
        copied = [state for state in states if state.teacher_copy is not None]
        self._frozen = [state for state in copied if state.shard.kind != "buffer"]
        self._buffers = [
            state for state in copied if state.shard.kind == "buffer" and not self._own_buffers
        ]
        self.forget_copies()
        return self.written + [state.shard for state in self._frozen if state.shard.dense]

    def forget_copies(self) -> None:
        """Let the next `copy_frozen` copy everything."""
        self._frozen_versions = [None for _ in self._frozen]

    def copy_frozen(self) -> None:
        """Copy the frozen weights that were written since, by `load_state_dict` for one.

        Verbs call `forget_copies` before, as a write through `.data` is not counted.
        """
        for i, state in enumerate(self._frozen):
            version = versions(state)
            if version != self._frozen_versions[i]:
                _copy(state)
                self._frozen_versions[i], self.is_stale = version, True

    def copy_buffers(self) -> None:
        """Copy the buffers, but for the teacher's own."""
        for state in self._buffers:
            _copy(state)

    def reshard(self) -> None:
        """Let the teacher's next forward read what was written."""
        wrappers.reshard(self.sharded)
        self.is_stale = False
        with derived.caches_dropped(self.module):
            pass  # the teacher's weights were written already


def _copy(state: ParamState) -> None:
    """Copy what is registered now: modules may register a new buffer at every step."""
    assert state.teacher_copy is not None
    state.teacher_copy.copy_(state.shard.read())


def _address_and_form(shard: Shard) -> tuple[int, Any]:
    memory = shard.local_tensor()
    return memory.data_ptr(), storage.form(memory)


def _region_in_words(shard: Shard) -> str:
    region = shard.local_region
    order = "" if shard.order is None else f", dimensions in the order {shard.order},"
    return (
        f"elements {region.begin}:{region.end} of the block {region.sizes} at "
        f"{region.offsets}{order}"
    )
