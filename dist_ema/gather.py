"""Full weights by name, in memory, and the copy into another model.

Both are one stream: each rank in turn packs the boxes that it answers for into windows of 16 MB and sends them. There is
no collective per weight, and no rank holds more than the windows beside its own result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Box, Slot, kinds, parts, pieces
from .ranks import Ranks
from .shards import Shard
from .wire import stream

__all__ = ["copy_into", "full", "refuse_other"]


def full(
    ranks: Ranks, slots: Sequence[Slot], own_buffers: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The complete state_dict, with every alias, on the first rank; {} elsewhere. *Collective*."""
    kept = [slot for slot in slots if slot.shard.persistent]
    result: dict[str, Tensor] = {}
    if ranks.first:
        for slot in kept:
            result[slot.name] = torch.empty(slot.shard.shape, dtype=slot.average.dtype, device=device)

    def sink(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        if result:
            result[kept[number].name][Box(offsets, tuple(data.shape)).slices].copy_(data)

    stream(ranks, *kinds(kept), list(parts(kept, own_buffers)), sink)
    return result | {alias: result[slot.name] for slot in kept if result for alias in slot.shard.aliases}


def copy_into(ranks: Ranks, slots: Sequence[Slot], own_buffers: dict[str, Tensor], other: Sequence[Shard]) -> None:
    """Write the full weights into the shards of another model, however that one is cut. *Collective*.

    Every rank broadcasts its parts in turn; each takes what meets its own shards.
    """
    kept = [slot for slot in slots if slot.shard.persistent]
    targets = {shard.name: shard for shard in other if shard.persistent}
    holes = {name: list(pieces(shard, shard.held, shard.read())) for name, shard in targets.items()}

    def sink(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        box = Box(offsets, tuple(data.shape))
        for hole, view in holes[kept[number].name]:
            common = box.meet(hole)
            if common is not None:
                view[common.within(hole)].copy_(data[common.within(box)])

    stream(ranks, *kinds(kept), list(parts(kept, own_buffers)), sink, everywhere=True)


def refuse_other(slots: Sequence[Slot], other: Sequence[Shard]) -> None:
    """Raise ValueError with the names if the two models do not hold the same weights."""
    ours = {slot.name: slot.shard.shape for slot in slots if slot.shard.persistent}
    theirs = {shard.name: shard.shape for shard in other if shard.persistent}
    odd = sorted({name for name, _ in ours.items() ^ theirs.items()})
    if odd:
        raise ValueError(f"ema.copy_to(): the models differ in {', '.join(odd[:5])}.")
