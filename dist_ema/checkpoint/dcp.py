"""Regions as torch.distributed.checkpoint sees them.

DCP asks a tensor in a state_dict which chunks of the whole it holds (the protocol that DTensor implements too). A range of
a weight is a handful of boxes, so flat shards save and reshard like any other, with no communication of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..sharding.geometry import boxes_with_data
from ..sharding.ownership import ParamState
from ..sharding.records import Region

__all__ = ["FlatRange", "match", "state", "whole"]


class FlatRange(Tensor):
    """The boxes of a weight that this rank averages, as one entry of a state_dict. *Aliases* the shadow.

    It is a handle for DCP, with the shape of the full weight and none of its memory; arithmetic on it raises.
    """

    blocks: list[tuple[tuple[int, ...], Tensor]]  # (offsets, elements in the block's shape)
    writes: bool  # some other rank writes the same elements if not

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        blocks: list[tuple[tuple[int, ...], Tensor]],
        writes: bool,
    ) -> FlatRange:
        self: FlatRange = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )  # type: ignore[attr-defined]
        self.blocks, self.writes = blocks, writes
        return self

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets), i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), view.size()),
                    properties=TensorProperties.create_from_tensor(view),
                    size=self.size(),
                ),
            )
            for i, (offsets, view) in enumerate(self.blocks if self.writes else [])
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), view.size()) for offsets, view in self.blocks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for offsets, view in self.blocks if torch.Size(offsets) == index.offset)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        held = sum(view.numel() for _, view in self.blocks)
        return f"FlatRange({held} of {self.numel()} elements of {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # NOTE: async_save stages with new_empty and then copies the attributes.
        if func is torch.ops.aten.new_empty.default:
            return cls(tuple(args[0].shape), args[0], [], False)
        if func is torch.ops.aten.detach.default:
            return cls(tuple(args[0].shape), args[0], args[0].blocks, args[0].writes)
        raise RuntimeError(
            f"{func} on a part of an average: a FlatRange is only for torch.distributed.checkpoint."
        )


def state(
    averages: Sequence[ParamState], buffers: Sequence[ParamState], own: dict[str, Tensor]
) -> dict[str, Any]:
    """One average, only tensors, because DCP pickles everything else: the weights, every floating buffer, and which of
    these are the average's own."""
    now = {
        slot.name: slot.local if slot.teacher_copy is None else slot.teacher_copy
        for slot in buffers
    }
    held = {name: own.get(name, value).clone() for name, value in now.items()}
    return {
        "weights": {
            s.name: _entry(s, s.averaged_region, s.shadow) for s in averages if s.shadow is not None
        },
        "buffers": {s.name: _entry(s, s.shard.local_region, held[s.name]) for s in buffers},
        "own": torch.tensor([slot.name in own for slot in buffers], dtype=torch.uint8),
    }


def whole(slots: Sequence[ParamState], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """One average under the names of the model's state_dict, tied ones included, frozen weights and buffers from live."""
    result: dict[str, Tensor] = {}
    for slot in slots:
        held = own.get(slot.name, slot.local).clone() if slot.shadow is None else slot.shadow
        region = slot.averaged_region if slot.shadow is not None else slot.shard.local_region
        result |= dict.fromkeys((slot.name, *slot.shard.aliases), _entry(slot, region, held))
    return result


def _entry(slot: ParamState, region: Region, data: Tensor) -> Tensor:
    """A plain tensor where this rank holds all of it, and is the one to say what it holds; else a FlatRange."""
    blocks = [(box.offsets, part) for box, part in boxes_with_data(slot.shard, region, data)]
    # NOTE: of plain tensors under one name DCP writes any rank's; a buffer's must be the first rank's.
    if region.numel == math.prod(slot.shard.shape) and slot.shard.is_writer:
        return blocks[0][1] if blocks else data.view(slot.shard.shape)
    return FlatRange(slot.shard.shape, data, blocks, slot.saved_region.numel > 0)


def match(
    state: dict[str, Any], averages: Sequence[ParamState], buffers: Sequence[ParamState]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """What to copy into the shadows of one average, as (shadow, value) pairs of one shape, and the memory of its own
    buffers among them. Nothing is written here. Raises ValueError for what is missing or does not fit."""
    missing = [key for key in ("weights", "buffers", "own") if key not in state]
    missing = missing or [slot.name for slot in averages if slot.name not in state["weights"]]
    if missing:
        raise ValueError(f"the state_dict of the EMA lacks {', '.join(missing[:5])}.")
    copies: list[tuple[Tensor, Tensor]] = []
    for slot in averages:
        assert slot.shadow is not None
        copies += _fitting(slot, slot.averaged_region, slot.shadow, state["weights"][slot.name])
    own = {}
    for slot, flag in zip(buffers, state["own"].tolist(), strict=True):
        into = slot.teacher_copy
        if into is None and flag:
            into = own[slot.name] = slot.local.clone()
        if into is not None:
            copies += _fitting(slot, slot.shard.local_region, into, state["buffers"][slot.name])
    return copies, own


def _fitting(
    slot: ParamState, region: Region, data: Tensor, value: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What of `value`, which `_entry` gave (here or in a run cut alike) or which is the full weight, goes into `data`."""
    if tuple(value.shape) != slot.shard.shape:
        raise ValueError(
            f"{slot.name} is {tuple(value.shape)} in the state_dict, {slot.shard.shape} in the model."
        )
    given = (
        {(o, tuple(part.shape)): part for o, part in value.blocks}
        if isinstance(value, FlatRange)
        else None
    )
    for box, part in boxes_with_data(slot.shard, region, data):
        if given is None:
            yield part, value[box.slices]
        elif (box.offsets, box.sizes) in given:
            yield part, given[box.offsets, box.sizes]
        else:
            raise ValueError(
                f"{slot.name} in the state_dict is cut for another rank; load it through dcp.load."
            )
