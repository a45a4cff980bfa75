"""Which elements each rank averages, and which it writes.

A `ParamState` is one weight on this rank: the region that it averages, the region that it saves, and
the shadow. Where nothing is replicated both are the local region. Of replicas each rank takes an
equal share:

    DDP, 2 ranks: the weights end to end, one cut
    | conv.weight | bn | fc.weight        | fc.bias |
    |<------- rank 0 ------>|<------ rank 1 ------->|   averaged_region and saved_region

    split=False: every rank averages everything, and still saves its share only

[Note: stale records]  FSDP2 pins local tensors anew at its first forward under CPU offload, and
`.to()` keeps a Parameter but moves its storage. A record keeps the Parameter and the address.
Elements that moved are followed; another shape, order, dtype or device raises by name. A buffer that
is only copied may become anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.transfer import Block
from .discovery import redescribe
from .geometry import boxes_with_data, split_box
from .records import Region, Shard

__all__ = [
    "ParamState",
    "assign",
    "even",
    "replica_broadcasts",
    "saved_blocks",
    "saved_dtype",
    "saved_dtypes",
]


MOST = 4 << 20  # elements in one part of a file or a stream


@dataclass
class ParamState:
    """One weight or buffer on this rank. *Aliases*: `live` is a view of the model's storage."""

    shard: Shard
    averaged_region: Region  # averaged here
    saved_region: Region  # answered for here: written into files, sent to others
    local: Tensor  # [shard.held.numel], all that the model holds here
    span: tuple[int, int] | None = None  # (start, total) in the flat sequence that it is cut with
    shadow: Tensor | None = None  # [own.numel]; None: not averaged
    teacher_copy: Tensor | None = (
        None  # [shard.held.numel]; of what is not averaged, the copy that a teacher holds
    )
    address: int = 0  # where the elements lay when `local` was made

    def __post_init__(self) -> None:
        raw = self.shard.local_tensor()
        self.address, self.form = raw.data_ptr(), _form(raw)

    @property
    def moved(self) -> bool:
        """The model's elements lie elsewhere now ([Note: stale records])."""
        # NOTE: of strided elements `local` is a copy, and the next copy may lie where the last one did.
        if not self.shard.dense or self.shard.local_tensor().data_ptr() != self.address:
            return True
        return self.shard.kind == "buffer" and self.layout_changed  # resized in place

    @property
    def is_copied_buffer(self) -> bool:
        """A buffer that is taken from live when the average is used."""
        return self.shard.kind == "buffer" and self.shadow is None and self.teacher_copy is None

    @property
    def layout_changed(self) -> bool:
        """They have another shape or order in memory now."""
        return _form(self.shard.local_tensor()) != self.form

    def rebind(self) -> None:
        """Follow elements that moved. Raises RuntimeError if they are not what they were."""
        if self.is_copied_buffer:
            redescribe(self.shard)
            begin, end = _saved_range(self)
            self.averaged_region = self.shard.local_region
            self.saved_region = replace(self.shard.local_region, begin=begin, end=end)
            self.form = _form(self.shard.local_tensor())
        raw, old = self.shard.local_tensor(), self.local
        changed = self.layout_changed
        # A buffer may be another tensor: FSDP1 casts them, modules assign them.
        if self.shard.kind != "buffer":
            changed |= (raw.dtype, raw.device) != (old.dtype, old.device)
        if changed:
            resized = raw.shape != self.form[0]
            shapes = f" (shape {tuple(self.form[0])}, now {tuple(raw.shape)})" if resized else ""
            cure = "Call ema.rescan()" if resized else "Build the EMA after model.to(...)"
            raise RuntimeError(
                f"{self.name} was {old.dtype} on {old.device} with {old.numel()} elements here, and "
                f"is now {raw.dtype} on {raw.device} with {raw.numel()}{shapes}, or lies in another "
                f"order. {cure}."
            )
        self.local, self.address = self.shard.read(), raw.data_ptr()

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def live(self) -> Tensor:
        return self.local_view(self.averaged_region)

    @property
    def average(self) -> Tensor:
        """What a file or a gather takes for `duty`: the shadow or twin, or the live weight where there is none."""
        if self.shadow is not None:
            return self.shadow.narrow(
                0, self.saved_region.begin - self.averaged_region.begin, self.saved_region.numel
            )
        if self.teacher_copy is not None:
            return self.teacher_copy.narrow(
                0, self.saved_region.begin - self.shard.local_region.begin, self.saved_region.numel
            )
        return self.local_view(self.saved_region)

    def local_view(self, region: Region) -> Tensor:
        return self.local.narrow(0, region.begin - self.shard.local_region.begin, region.numel)


def _form(raw: Tensor) -> tuple[torch.Size, list[int]]:
    """Shape and order in memory. The stride of a dimension of length 1 says nothing."""
    return raw.shape, [
        step for step, length in zip(raw.stride(), raw.shape, strict=True) if length > 1
    ]


# --- cutting -----------------------------------------------------------------------------------------------------


def assign(
    shards: Sequence[Shard], averaged: Callable[[Shard], bool], split: bool
) -> list[ParamState]:
    """One slot per shard, replicas divided among the ranks that hold them (`split=False`: for files only)."""
    opaque = [shard.name for shard in shards if shard.opaque and averaged(shard)]
    if opaque:
        raise ValueError(
            f"{', '.join(opaque[:5])} is sparse, quantized, or a tensor subclass without exactly one "
            "inner tensor of its shape and dtype, so its elements cannot be averaged. Freeze it, or "
            "leave it out with only=."
        )
    spans: dict[int, tuple[int, int]] = {}
    for chosen in (True, False):  # two sequences, so that the averaged elements alone are balanced
        spans |= _spans([shard for shard in shards if shard.flat and averaged(shard) == chosen])
    slots = []
    for shard in shards:
        slot = ParamState(
            shard, shard.local_region, shard.local_region, shard.read(), spans.get(id(shard))
        )
        begin, end = _saved_range(slot)
        slot.saved_region = Region(
            shard.local_region.offsets,
            shard.local_region.sizes,
            shard.local_region.begin + begin,
            shard.local_region.begin + end,
        )
        if split and shard.replicas:
            slot.averaged_region = slot.saved_region
        slots.append(slot)
    return slots


def _spans(shards: Sequence[Shard]) -> dict[int, tuple[int, int]]:
    """Lay the weights of each group end to end: id(shard) -> (start, length of the whole sequence)."""
    totals: dict[tuple[dist.ProcessGroup, ...], int] = {}
    starts = {}
    for shard in shards:
        starts[id(shard)] = totals.get(shard.replicas, 0)
        totals[shard.replicas] = starts[id(shard)] + shard.local_region.numel
    return {id(shard): (starts[id(shard)], totals[shard.replicas]) for shard in shards}


def _saved_range(slot: ParamState) -> tuple[int, int]:
    """This rank's part of what its replicas hold too; nothing of a copy that somebody else answers for."""
    groups = slot.shard.replicas
    if not slot.shard.is_writer:
        return 0, 0
    if not groups:
        return 0, slot.shard.local_region.numel
    return _range_of(slot, len(groups) - 1, dist.get_rank(groups[-1]))


def _range_of(slot: ParamState, depth: int, source: int) -> tuple[int, int]:
    """The range of the held elements that rank `source` of the replica group at `depth` answers for."""
    n, groups = slot.shard.local_region.numel, slot.shard.replicas
    if slot.span:
        start, total = slot.span
        low, high = even(0, total, source, groups[depth].size())
        return min(max(low - start, 0), n), min(max(high - start, 0), n)
    begin, end = 0, n
    for group in groups[:depth]:
        begin, end = even(begin, end, dist.get_rank(group), group.size())
    return even(begin, end, source, groups[depth].size())


def even(begin: int, end: int, rank: int, size: int) -> tuple[int, int]:
    """The rank's part of [begin, end) when it is divided evenly."""
    n = end - begin
    return begin + n * rank // size, begin + n * (rank + 1) // size


def replica_broadcasts(
    slots: Iterable[ParamState],
) -> Iterator[tuple[dist.ProcessGroup, int, list[Tensor]]]:
    """The broadcasts that make every replica whole again after each rank wrote its own part: (group, source rank in
    it, views into the model), innermost group first, the same sequence on every rank of a group."""
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[ParamState]] = {}
    for slot in slots:
        by_groups.setdefault(slot.shard.replicas, []).append(slot)
    for groups, together in by_groups.items():
        for depth in reversed(range(len(groups))):
            views: list[list[Tensor]] = [[] for _ in range(groups[depth].size())]
            for slot in together:
                for source in _sources(slot, len(views)):
                    a, b = _range_of(slot, depth, source)
                    views[source].append(slot.local[a:b])
            yield from ((groups[depth], source, mine) for source, mine in enumerate(views))


def _sources(slot: ParamState, size: int) -> range:
    """The ranks of a replica group whose part of the slot is not empty: in a flat sequence, few of them."""
    n = slot.shard.local_region.numel
    if slot.span is None or not n:
        return range(size if n else 0)
    start, total = slot.span
    return range(start * size // total, min(size, -(-(start + n) * size // total)))


def saved_blocks(
    slots: Sequence[ParamState], values: dict[str, Tensor] | None = None
) -> Iterator[Block]:
    """What this rank answers for, in blocks of at most `MOST` elements: (number of the slot, offsets, block).

    values: own buffers by name, taken in place of the model's. *Aliases* shadows and live weights.
    """
    for number, slot in enumerate(slots):
        data = slot.average
        if values and slot.name in values and data.numel():
            data = values[slot.name]
        elif slot.is_copied_buffer:
            data = data.clone()  # NOTE: numpy forbids to resize memory that it has seen
        for box, view in boxes_with_data(slot.shard, slot.saved_region, data):
            for block in split_box(box, MOST):
                yield Block(number, block.offsets, view[block.within(box)])


def saved_dtype(slot: ParamState, values: dict[str, Tensor]) -> torch.dtype:
    """Of what `parts` gives: an own buffer is not rounded to the shadow's."""
    return values.get(slot.name, slot.average).dtype


def saved_dtypes(
    slots: Sequence[ParamState], values: dict[str, Tensor]
) -> tuple[list[torch.dtype], list[int]]:
    """dtype and number of dimensions of each, what a stream must know of the weights."""
    return [saved_dtype(slot, values) for slot in slots], [len(slot.shard.shape) for slot in slots]
