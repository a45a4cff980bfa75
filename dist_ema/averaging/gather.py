"""Full weights by name, in memory, and the copy into another model.

Both are one stream: each rank in turn packs the boxes that it answers for into windows of 16 MB and sends them. There is
no collective per weight, and no rank holds more than the windows beside its own result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..distributed.coordinator import Ranks
from ..distributed.transfer import Block, stream
from ..sharding import discovery, parameters, wrappers
from ..sharding.geometry import Box, boxes_with_data
from ..sharding.ownership import ParamState, saved_blocks, saved_dtype, saved_dtypes
from ..sharding.records import Shard

__all__ = ["copy_into", "full"]


def full(
    ranks: Ranks, slots: Sequence[ParamState], own_buffers: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The complete state_dict, with every alias, on the first rank; {} elsewhere. *Collective*."""
    result: dict[str, Tensor] = {}
    mine: list[Block] = []

    def prepare() -> None:
        """NOTE: the memory for a whole model may be missing, and then the others must not begin to send."""
        mine.extend(saved_blocks(slots, own_buffers))
        for slot in slots if ranks.first else ():
            result[slot.name] = torch.empty(
                slot.shard.shape, dtype=saved_dtype(slot, own_buffers), device=device
            )

    def sink(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        if result:
            result[slots[number].name][Box(offsets, tuple(data.shape)).slices].copy_(data)

    ranks.run_on_all("gather", prepare)
    stream(ranks, *saved_dtypes(slots, own_buffers), mine, sink)
    return result | {
        alias: result[slot.name] for slot in slots if result for alias in slot.shard.aliases
    }


def copy_into(
    ranks: Ranks,
    slots: Sequence[ParamState],
    own_buffers: dict[str, Tensor],
    module: parameters.Model,
) -> None:
    """Write the full weights into another model, however that one is wrapped. *Collective*.

    Where every rank averages what it holds and the other model is cut alike, each rank copies its own part, and only what
    nobody divides (buffers) is sent. Otherwise every rank broadcasts its parts in turn, and each takes what meets its own
    shards. Raises ValueError with the names if the two models do not hold the same weights.
    """
    theirs: dict[str, Shard] = {}
    holes: dict[str, list[tuple[Box, Tensor]]] = {}
    apart: list[tuple[Shard, Tensor]] = []  # copies of strided weights, to be written back
    mine: list[Block] = []
    sharded: list[nn.Module] = []

    def prepare() -> bool | None:
        found = discovery.find_shards(parameters.module_of(module))
        _refuse_other(slots, found.shards)
        for shard in found.shards:
            theirs[shard.name] = shard
            elements = shard.read()
            holes[shard.name] = list(boxes_with_data(shard, shard.local_region, elements))
            apart.extend([] if shard.dense else [(shard, elements)])
        mine.extend(saved_blocks(slots, own_buffers))
        sharded.extend(found.sharded)
        return (
            True
            if any(
                _cut_otherwise(slot, theirs[slot.name]) for slot in slots if slot.shard.owner_ranks
            )
            else None
        )

    def sink(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        box = Box(offsets, tuple(data.shape))
        for hole, view in holes[slots[number].name]:
            common = box.intersect(hole)
            if common is not None:
                view[common.within(hole)].copy_(data[common.within(box)])

    _, otherwise = ranks.run_on_all("copy_to", prepare, combine=any)
    for slot in slots if not otherwise else ():
        if slot.shard.owner_ranks:
            theirs[slot.name].write(slot.local if slot.shadow is None else slot.shadow)
    sent = [part for part in mine if otherwise or not slots[part[0]].shard.owner_ranks]
    stream(ranks, *saved_dtypes(slots, own_buffers), sent, sink, everywhere=True)
    for shard, elements in apart:
        if otherwise or not shard.owner_ranks:
            shard.write(elements)
    wrappers.reshard(sharded)


def _cut_otherwise(slot: ParamState, its: Shard) -> bool:
    """This rank does not average all that it holds, or the other model holds other elements here."""
    mine = slot.shard
    return (
        slot.averaged_region != mine.local_region
        or slot.teacher_copy is not None
        or (its.local_region, its.order) != (mine.local_region, mine.order)
    )


def _refuse_other(slots: Sequence[ParamState], other: Sequence[Shard]) -> None:
    """Raise ValueError with the names if the two models do not hold the same weights."""
    ours = {slot.name: slot.shard.shape for slot in slots}
    theirs = {shard.name: shard.shape for shard in other if shard.persistent}
    odd = sorted({name for name, _ in ours.items() ^ theirs.items()})
    if odd:
        raise ValueError(f"ema.copy_to(): the models differ in {', '.join(odd[:5])}.")
