"""Another module whose weights are the average: `EMA(model, into=teacher)`.

The teacher's own memory is the shadow: there is no second copy, and nothing to lend. Each weight must lie there as it does
in the model, the same elements on the same rank:

    model       FSDP2, rank 0 of 2   |####|    |      DDP    |#########|
    teacher     FSDP2, rank 0 of 2   |####|    |      plain  |#########| on every rank

[Note: a read behind our back]  Nobody calls the EMA when a teacher computes. Hooks before its forwards, `state_dict` and
`load_state_dict` wait for the update under way, and free what FSDP kept unsharded since ([Note: stale roots] in
sharding.wrappers).
They also sit on every module inside that owns weights, because teachers are called by methods of their own too; inside a
compiled graph those are silent, as the hook of the outermost module has run before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..sharding import discovery, parameters, records, wrappers
from ..sharding.records import Shard

__all__ = ["Teacher"]


class Teacher:
    """The memory behind the names of the model's weights. Local: nothing in here is collective but finding it."""

    def __init__(self, model: parameters.Model, announce: Callable[[], None]) -> None:
        """announce: called before anybody reads the teacher; a bound method, whose owner is not kept alive."""
        self.module = parameters.module_of(model)
        found = discovery.find_shards(self.module)
        self.sharded = found.sharded
        self._shards = {
            name: shard for shard in found.shards for name in (shard.name, *shard.aliases)
        }
        self._given: dict[str, Shard] = {}  # by the model's names: what the EMA writes
        self._seen: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        for module, outer in wrappers.entrances(self.module, self.sharded):
            hook = _Hook(announce, outer)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
            self._handles.append(module.register_load_state_dict_pre_hook(hook))
            self._handles.append(wrappers.before_state_dict(module, hook))

    def release(self) -> None:
        """Take the hooks off, for another EMA that writes this teacher from now on."""
        while self._handles:
            self._handles.pop().remove()

    def give(self, asked: Sequence[Shard]) -> dict[str, Tensor]:
        """The teacher's elements for what each shard of the model holds here, overwritten with them, by name.

        From now on they are the EMA's to write: weights among them need no gradient any more. *Aliases* the teacher.
        Raises ValueError, naming the first weights, for what the teacher lacks or holds otherwise.
        """
        lacks = [shard.name for shard in asked if shard.name not in self._shards]
        if lacks:
            raise ValueError(
                f"the teacher has no {', '.join(lacks[:5])}, which the model has. Leave out with only= what is not to be "
                "averaged into it."
            )
        for shard in asked:
            self._refuse_unlike(shard, self._shards[shard.name])
            self._given[shard.name] = self._shards[shard.name]
        memory = {}
        for shard in asked:
            if shard.kind != "buffer":
                self._given[shard.name].tensor.requires_grad_(False)
            memory[shard.name] = self.memory(shard.name).copy_(shard.read())
        return memory

    def memory(self, name: str) -> Tensor:
        """The elements as they lie there now. Shape [held.numel]. *Aliases* the teacher."""
        mine = self._given[name]
        self._seen[name] = mine.local_tensor().data_ptr()
        return mine.read()

    @property
    def written(self) -> list[Shard]:
        """The records of what the EMA writes."""
        return list(self._given.values())

    @property
    def moved(self) -> list[str]:
        """What lies elsewhere than `memory` last said ([Note: stale records] in ownership)."""
        return [
            name
            for name, mine in self._given.items()
            if mine.local_tensor().data_ptr() != self._seen[name]
        ]

    @property
    def replaced(self) -> list[str]:
        """The teacher registers another Parameter under these names now."""
        return [name for name, mine in self._given.items() if records.replaced(mine)]

    def refuse_training(self, optimizers: Iterable[Optimizer]) -> None:
        """Raise ValueError if an optimizer would train what is the average."""
        mine = {id(shard.tensor): name for name, shard in self._given.items()}
        trained = [
            mine[id(p)]
            for o in optimizers
            for group in o.param_groups
            for p in group["params"]
            if id(p) in mine
        ]
        if trained:
            raise ValueError(
                f"the optimizer trains {', '.join(trained[:5])} of the teacher, which is the average: give it the model's "
                "parameters only."
            )

    def _refuse_unlike(self, shard: Shard, mine: Shard) -> None:
        name = shard.name
        if mine.shape != shard.shape:
            raise ValueError(
                f"{name} is {shard.shape} in the model and {mine.shape} in the teacher."
            )
        if (mine.local_region, mine.order) != (shard.local_region, shard.order):
            raise ValueError(
                f"{name}: this rank holds {_where(shard)} in the model and {_where(mine)} in the teacher. Wrap both the same "
                "way, on the same mesh, in the same memory format; beside a DDP model leave the teacher plain."
            )
        one, other = shard.dtype, mine.dtype
        cast = one == other or (
            one.is_floating_point and other.is_floating_point and other.itemsize > 1
        )
        if not cast:
            raise ValueError(
                f"{name} is {one} in the model and {other} in the teacher, which cannot hold its average."
            )
        if not mine.dense:
            raise ValueError(
                f"{name} of the teacher is strided or expanded. Make it contiguous, or leave it out with only=."
            )
        odd = [alias for alias in shard.aliases if self._shards.get(alias) is not mine]
        odd += [other for other, given in self._given.items() if given is mine and other != name]
        if odd:
            raise ValueError(
                f"{name} and {odd[0]} are tied in one of the model and the teacher, and not in the other."
            )
        if (
            shard.trainable
            and mine.read().data_ptr() == shard.read().data_ptr()
            and shard.local_region.numel
        ):
            raise ValueError(
                f"{name} is one weight in the model and the teacher: give into= a copy."
            )


def _where(shard: Shard) -> str:
    held = shard.local_region
    order = "" if shard.order is None else f", dimensions in the order {shard.order},"
    return f"elements {held.begin}:{held.end} of the block {held.sizes} at {held.offsets}{order}"


class _Hook:
    """Announces a read. A deep copy or a pickle of the teacher is no teacher: it gets a hook that does nothing."""

    def __init__(self, announce: Callable[[], None], outer: bool) -> None:
        self._announce, self._outer = WeakMethod(announce), outer
        # NOTE: a graph cannot wait; it breaks where a read must be announced. Every hook has this, as dynamo runs what it
        # compiled for the hook of one module with that of another (config.skip_nnmodule_hook_guards).
        self._breaking = torch.compiler.disable(self._tell)

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._tell()
        elif self._outer:
            self._breaking()

    def _tell(self) -> None:
        announce = self._announce()
        if announce is not None:
            announce()

    def __reduce__(self) -> tuple[Any, ...]:
        # NOTE: a function of the standard library's, so that pickled models load where dist_ema is not installed.
        return getattr, (nullcontext(), "__exit__")
