"""FlatRange: the boxes of a weight that this rank averages, as one tensor in a state_dict of DCP.

DCP asks a tensor which chunks of the whole it holds, by a protocol that DTensor implements too. So
flat ranges save and reshard like any other shard, and no rank sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # a program that never calls DCP does not pay for its import
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

__all__ = ["FlatRange"]

Blocks = list[tuple[tuple[int, ...], Tensor]]  # (offsets, elements in the block's shape)


class FlatRange(Tensor):
    """The boxes of a weight that this rank averages, as one entry of a state_dict.

    It is a handle for DCP with the shape of the full weight and none of its memory. It can be
    staged (copied, shared, pickled); arithmetic on it raises.

    Note:
        *Aliases* the shadow.
    """

    blocks: Blocks
    writes: bool  # False: another rank writes the same elements

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        blocks: Blocks,
        writes: bool,
    ) -> FlatRange:
        self: FlatRange = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        self.blocks, self.writes = blocks, writes
        return self

    # DCP finds this method and the next two by their names; DTensor has them too.
    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint import metadata, planner

        return [
            planner.WriteItem(
                index=metadata.MetadataIndex(fqn, chunk.offsets, i),
                type=planner.WriteItemType.SHARD,
                tensor_data=planner.TensorWriteData(
                    chunk=chunk,
                    properties=metadata.TensorProperties.create_from_tensor(self.blocks[i][1]),
                    size=self.size(),
                ),
            )
            for i, chunk in enumerate(self.__create_chunk_list__() if self.writes else [])
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(torch.Size(offsets), data.size()) for offsets, data in self.blocks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(data for offsets, data in self.blocks if torch.Size(offsets) == index.offset)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        held = sum(data.numel() for _, data in self.blocks)
        return f"FlatRange({held} of {self.numel()} elements of {tuple(self.shape)}, {self.dtype})"

    def share_memory_(self) -> FlatRange:
        """Move the blocks into shared memory, for a process that writes the checkpoint."""
        for _, data in self.blocks:
            data.share_memory_()
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(func) not in _STAGING:
            raise RuntimeError(
                f"{func} on a part of an average: a FlatRange is only for "
                "torch.distributed.checkpoint."
            )
        return _STAGING[str(func)](*args, **(kwargs or {}))


# NOTE: the signatures below are those of the operators that torch's stagers call.


def _with_blocks(source: FlatRange, device: Any, take: Callable[[Tensor], Tensor]) -> FlatRange:
    return FlatRange(
        source.shape,
        source.dtype,
        device or source.device,
        [(offsets, take(data)) for offsets, data in source.blocks],
        source.writes,
    )


def _detach(source: FlatRange) -> FlatRange:
    return _with_blocks(source, None, Tensor.detach)


def _new_empty(source: FlatRange, size: Any, *, device: Any = None, **_: Any) -> FlatRange:
    """A FlatRange without blocks, whose attributes the stager sets afterwards."""
    return FlatRange(source.shape, source.dtype, device or source.device, [], False)


def _zeros_like(source: FlatRange, *, device: Any = None, **_: Any) -> FlatRange:
    return _with_blocks(source, device, lambda data: torch.zeros_like(data, device=device))


def _copied(source: FlatRange, *, device: Any = None, **_: Any) -> FlatRange:
    return _with_blocks(source, device, lambda data: data.to(device or data.device, copy=True))


def _copy_into(target: Tensor, source: FlatRange, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, FlatRange):
        # A stager keeps a plain tensor for every 0-dim entry, and DCP would write that of any rank.
        if target.dim() or source.writes or not isinstance(source, FlatRange):
            raise RuntimeError(f"{source!r} cannot be copied into a plain tensor.")
        target.__class__ = FlatRange  # type: ignore[assignment]
        target.blocks, target.writes = [], False  # type: ignore[attr-defined]
        return target
    # NOTE: an entry that this rank does not write needs no copy, and has no memory if 0-dim.
    for (_, data), (_, value) in zip(target.blocks, source.blocks, strict=target.writes):
        data.copy_(value, non_blocking=non_blocking)
    return target


_STAGING: dict[str, Callable[..., Tensor]] = {
    "aten.detach.default": _detach,
    "aten.new_empty.default": _new_empty,
    "aten.zeros_like.default": _zeros_like,
    "aten.clone.default": _copied,
    "aten._to_copy.default": _copied,
    "aten.copy_.default": _copy_into,
}
