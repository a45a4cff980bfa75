"""The tensors of a parameter list: full or a rank's part, in a storage of their own, or cast."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sharding import geometry, ownership, records

__all__ = ["changed_form", "overwrite", "own_storage"]


def changed_form(state: ownership.ParamState) -> bool:
    """The weight has another dtype, device or order now, which an EMA refuses to follow."""
    now, before = state.shard.local_tensor(), state.local
    return state.moved and (
        state.layout_changed or (now.dtype, now.device) != (before.dtype, before.device)
    )


def own_storage(elements: Tensor) -> Tensor:
    """A tensor over the same memory, with a storage of its own. *Aliases* the shadow.

    torch.save writes the whole storage of a view, and cannot write a DTensor over one.
    """
    start = elements.storage_offset() * elements.itemsize
    memory = elements.untyped_storage()[start : start + elements.nbytes]
    return elements.new_empty(0).set_(memory, 0, elements.shape, elements.stride())


def overwrite(targets: Sequence[tuple[records.Shard, Tensor | None, Tensor]]) -> None:
    """Overwrite the elements of each record with a tensor of their form, or with the full weight.

    Args:
        targets: (record, one element per held element or None to check only, value).

    Raises:
        ValueError: a shape differs; nothing has changed then.
    """
    for shard, _, value in targets:
        if tuple(value.shape) not in (shard.shape, tuple(shard.local(shard.read()).shape)):
            raise ValueError(
                f"{shard.name} is {tuple(value.shape)}, and {shard.shape} in the model."
            )
    for shard, elements, value in targets:
        if elements is None:
            continue
        form = (shard.shaped if isinstance(value, DTensor) else shard.local)(elements)
        if value.shape == form.shape:
            form.copy_(value)
        else:
            # A full weight was given: this rank takes its boxes of it.
            for box, block in geometry.boxes_with_data(shard, shard.local_region, elements):
                block.copy_(value[box.slices])
        if not shard.dense:  # of a weight, whose elements are a copy
            shard.write(elements)
