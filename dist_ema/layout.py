"""Who holds which elements, on which device, in which dtype.

A `Slot` is one weight as this rank answers for it: the region that it averages (`own`), the region that it writes into
files (`duty`), and the shadow. Where nothing is replicated the two regions are what the rank holds. Where ranks hold
replicas, each takes an equal part:

    DDP, 2 ranks: the weights end to end, one cut          split=False: everybody averages all, and still writes a part
    | conv.weight | bn | fc.weight        | fc.bias |      own   |==================================| on every rank
    |<------- rank 0 ------>|<------ rank 1 ------->|      duty  |<---- rank 0 --->|<--- rank 1 --->|

[Note: stale records]  FSDP2 pins local tensors anew at its first forward under CPU offload, and `.to()` keeps a Parameter
but moves its storage. A slot keeps the Parameter and the address; addresses are compared before the first two updates,
every 100th, and in every verb. The same elements elsewhere are followed, anything else raises by name; a cache (a buffer
in no state_dict) may become anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from .elements import TO_TORCH
from .fused import Numbering
from .shards import Region, Shard, redescribe

__all__ = [
    "ALIGN",
    "DTYPES",
    "Box",
    "ParamState",
    "allocate",
    "assign",
    "boxes",
    "boxes_with_data",
    "even",
    "fingerprint",
    "numbering",
    "replica_broadcasts",
    "runs",
    "saved_blocks",
    "saved_dtype",
    "saved_dtypes",
    "shadow_dtype",
    "split_box",
]

DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in TO_TORCH.items()}  # of safetensors
ALIGN = 64  # bytes; where a long piece starts in the arena
MOST = 4 << 20  # elements in one part of a file or a stream
LONG = 16 << 10  # elements; shorter pieces lie end to end, so that one flat lerp can take many of them


@dataclass(frozen=True)
class Box:
    """offsets and sizes of a block of a weight, row-major."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The slices that cut this box out of a tensor that holds `outer`."""
        spans = zip(self.offsets, outer.offsets, self.sizes, strict=True)
        return tuple(slice(o - base, o - base + n) for o, base, n in spans)

    def intersect(self, other: Box) -> Box | None:
        """The common block, None if there is none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for end, start in zip(ends, offsets, strict=True))
        return Box(offsets, sizes) if all(n > 0 for n in sizes) else None


@dataclass
class ParamState:
    """One weight or buffer on this rank. *Aliases*: `live` is a view of the model's storage."""

    shard: Shard
    averaged_region: Region  # averaged here
    saved_region: Region  # answered for here: written into files, sent to others
    local: Tensor  # [shard.held.numel], all that the model holds here
    span: tuple[int, int] | None = None  # (start, total) in the flat sequence that it is cut with
    shadow: Tensor | None = None  # [own.numel]; None: not averaged
    teacher_copy: Tensor | None = None  # [shard.held.numel]; of what is not averaged, the copy that a teacher holds
    address: int = 0  # where the elements lay when `local` was made

    def __post_init__(self) -> None:
        raw = self.shard.local_tensor()
        self.address, self.form = raw.data_ptr(), _form(raw)

    @property
    def moved(self) -> bool:
        """The model's elements lie elsewhere now ([Note: stale records]). *Cost*: 0.2 us."""
        # NOTE: of strided elements `local` is a copy, and the next copy may lie where the last one did.
        return not self.shard.dense or self.shard.local_tensor().data_ptr() != self.address

    @property
    def layout_changed(self) -> bool:
        """They have another shape or order in memory now."""
        return _form(self.shard.local_tensor()) != self.form

    def rebind(self) -> None:
        """Follow elements that moved. Raises RuntimeError if they are not what they were."""
        if not self.shard.persistent:
            redescribe(self.shard)
            self.averaged_region = self.saved_region = self.shard.local_region
        raw, old = self.shard.local_tensor(), self.local
        changed = self.shard.persistent and self.layout_changed
        if self.shard.kind != "buffer":  # which may be another tensor: FSDP1 casts them, modules assign them
            changed |= (raw.dtype, raw.device) != (old.dtype, old.device)
        if changed:
            raise RuntimeError(
                f"{self.name} was {old.dtype} on {old.device} with {old.numel()} elements here, and is now {raw.dtype} on "
                f"{raw.device} with {raw.numel()}, or lies in another order. Build the EMA after model.to(...)."
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
            return self.shadow.narrow(0, self.saved_region.begin - self.averaged_region.begin, self.saved_region.numel)
        if self.teacher_copy is not None:
            return self.teacher_copy.narrow(
                0, self.saved_region.begin - self.shard.local_region.begin, self.saved_region.numel
            )
        return self.local_view(self.saved_region)

    def local_view(self, region: Region) -> Tensor:
        return self.local.narrow(0, region.begin - self.shard.local_region.begin, region.numel)


def _form(raw: Tensor) -> tuple[torch.Size, list[int]]:
    """Shape and order in memory. The stride of a dimension of length 1 says nothing."""
    return raw.shape, [step for step, length in zip(raw.stride(), raw.shape, strict=True) if length > 1]


# --- cutting -----------------------------------------------------------------------------------------------------


def assign(shards: Sequence[Shard], averaged: Callable[[Shard], bool], split: bool) -> list[ParamState]:
    """One slot per shard, replicas divided among the ranks that hold them (`split=False`: for files only)."""
    spans: dict[int, tuple[int, int]] = {}
    for chosen in (True, False):  # two sequences, so that the averaged elements alone are balanced
        spans |= _spans([shard for shard in shards if shard.flat and averaged(shard) == chosen])
    slots = []
    for shard in shards:
        slot = ParamState(shard, shard.local_region, shard.local_region, shard.read(), spans.get(id(shard)))
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


def replica_broadcasts(slots: Iterable[ParamState]) -> Iterator[tuple[dist.ProcessGroup, int, list[Tensor]]]:
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


# --- geometry ----------------------------------------------------------------------------------------------------


def boxes(sizes: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The range [begin, end) of a block's row-major order as at most 2 * ndim - 1 boxes, in order."""
    if begin >= end:
        return
    if not sizes:
        yield Box((), ())
        return
    row = math.prod(sizes[1:])
    head, rest = divmod(begin, row)
    last, tail = divmod(end, row)
    if head == last:
        yield from (_under(head, box) for box in boxes(sizes[1:], rest, tail))
        return
    if rest:
        yield from (_under(head, box) for box in boxes(sizes[1:], rest, row))
        head += 1
    if last > head:
        yield Box((head, *[0] * (len(sizes) - 1)), (last - head, *sizes[1:]))
    if tail:
        yield from (_under(last, box) for box in boxes(sizes[1:], 0, tail))


def _under(row: int, box: Box) -> Box:
    return Box((row, *box.offsets), (1, *box.sizes))


def boxes_with_data(shard: Shard, region: Region, data: Tensor) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of the full row-major weight that `region` covers, each with its view of `data`.

    data: [region.numel], in storage order. *Aliases*: the views have the boxes' shapes.
    """
    start = 0
    for box in boxes(region.sizes, region.begin, region.end):
        view = data[start : start + box.numel].view(box.sizes)
        start += box.numel
        offsets = tuple(a + b for a, b in zip(region.offsets, box.offsets, strict=True))
        if shard.order is None:
            yield Box(offsets, box.sizes), view
        else:
            back = tuple(shard.order.index(dim) for dim in range(len(offsets)))
            yield Box(tuple(offsets[i] for i in back), tuple(box.sizes[i] for i in back)), view.permute(back)


def split_box(box: Box, most: int) -> Iterator[Box]:
    """Row blocks of at most `most` elements that cover the box, in order."""
    if box.numel <= most or not box.sizes:
        yield box
        return
    rows = max(1, most // max(1, box.numel // box.sizes[0]))
    for start in range(0, box.sizes[0], rows):
        block = Box((box.offsets[0] + start, *box.offsets[1:]), (min(rows, box.sizes[0] - start), *box.sizes[1:]))
        if block.sizes[0] > 1:
            yield block
        else:
            inner = split_box(Box(block.offsets[1:], block.sizes[1:]), most)
            yield from (Box((block.offsets[0], *part.offsets), (1, *part.sizes)) for part in inner)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first element, how many) of each contiguous run of the box in the row-major weight, in the box's own order."""
    whole = len(shape)  # dimensions from here on are covered completely
    while whole > 0 and box.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    inner = math.prod(shape[whole:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if whole == 0:
        yield 0, inner
        return
    length = box.sizes[whole - 1] * inner
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    for steps in product(*(range(n) for n in box.sizes[: whole - 1])):
        yield base + sum(i * s for i, s in zip(steps, strides, strict=False)), length


def saved_blocks(
    slots: Sequence[ParamState], values: dict[str, Tensor] | None = None
) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    """What this rank answers for, in blocks of at most `MOST` elements: (number of the slot, offsets, block).

    values: own buffers by name, taken in place of the model's. *Aliases* shadows and live weights.
    """
    for number, slot in enumerate(slots):
        data = slot.average
        if values and slot.name in values and data.numel():
            data = values[slot.name]
        for box, view in boxes_with_data(slot.shard, slot.saved_region, data):
            for block in split_box(box, MOST):
                yield number, block.offsets, view[block.within(box)]


def saved_dtype(slot: ParamState, values: dict[str, Tensor]) -> torch.dtype:
    """Of what `parts` gives: an own buffer is not rounded to the shadow's."""
    return values.get(slot.name, slot.average).dtype


def saved_dtypes(slots: Sequence[ParamState], values: dict[str, Tensor]) -> tuple[list[torch.dtype], list[int]]:
    """dtype and number of dimensions of each, what a stream must know of the weights."""
    return [saved_dtype(slot, values) for slot in slots], [len(slot.shard.shape) for slot in slots]


def numbering(shard: Shard, region: Region, device: torch.device | None = None) -> Numbering:
    """Row-major element numbers in the full weight of the region's elements: a formula, for kernels."""
    order = range(len(region.sizes)) if shard.order is None else shard.order
    strides = tuple(math.prod(shard.shape[dim + 1 :]) for dim in order)
    base = sum(offset * stride for offset, stride in zip(region.offsets, strides, strict=True))
    return Numbering(region.begin, base, region.sizes, strides, device)


# --- shadows -----------------------------------------------------------------------------------------------------


def shadow_dtype(live: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """Complex weights keep complex shadows, of at least the asked precision."""
    if not live.is_complex:
        return asked
    return torch.complex128 if asked == torch.float64 else torch.complex64


def allocate(slots: Sequence[ParamState], dtype: torch.dtype, device: torch.device | None) -> list[Tensor]:
    """Give every slot a shadow equal to the one that it has, or to its live weights, in one arena per dtype and device.
    Returns the arenas.

    Neighbours in the model stay neighbours in the arena, as one chain. Short chains lie end to end before the long ones,
    each of which starts at 64 bytes.
    """
    arenas = []
    keys = [(shadow_dtype(slot.shard.dtype, dtype), device or slot.local.device) for slot in slots]
    for key in dict.fromkeys(keys):
        mine = [slot for slot, its in zip(slots, keys, strict=True) if its == key]
        starts, total = _starts(mine, ALIGN // key[0].itemsize)
        # Host memory beside an accelerator is pinned, once for all: `swap` moves it over the host link.
        pinned = key[1].type == "cpu" and any(slot.local.device.type != "cpu" for slot in mine)
        arena = torch.empty(total, dtype=key[0], device=key[1], pin_memory=pinned)
        arenas.append(arena)
        for slot, start in zip(mine, starts, strict=True):
            before = slot.live if slot.shadow is None else slot.shadow
            slot.shadow = arena[start : start + slot.averaged_region.numel].copy_(before)
    return arenas


def _starts(slots: Sequence[ParamState], align: int) -> tuple[list[int], int]:
    """Where each slot starts, and where the last one ends."""
    starts, total = [0] * len(slots), 0
    long = []
    for chain, length in _chains(slots):
        if length >= LONG:
            long.append((chain, length))
            continue
        total = _place(chain, slots, starts, total)
    for chain, _ in long:
        total = _place(chain, slots, starts, -(-total // align) * align)
    return starts, total


def _place(chain: list[int], slots: Sequence[ParamState], starts: list[int], at: int) -> int:
    """Lay a chain end to end from `at`; returns its end."""
    for i in chain:
        starts[i] = at
        at += slots[i].averaged_region.numel
    return at


def _chains(slots: Sequence[ParamState]) -> Iterator[tuple[list[int], int]]:
    """(numbers of slots whose live elements follow each other in memory, how many elements)."""
    chain: list[int] = []
    length, ends_at = 0, None
    for i, slot in enumerate(slots):
        live = slot.live
        if live.numel() and live.data_ptr() != ends_at:
            if chain:
                yield chain, length
            chain, length = [], 0
        chain.append(i)
        length += live.numel()
        if live.numel():
            ends_at = live.data_ptr() + live.nbytes
    if chain:
        yield chain, length


def fingerprint(data: Tensor) -> Tensor:
    """A hash of the bits of a 1-D tensor, int64 [], on its device: equal bits, equal hash, whatever wrote them."""
    bits = data.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for i, chunk in enumerate(bits.split(1 << 20)):
        # NOTE: byte and place are mixed before the sum; a product of them gives all permutations of rows one hash.
        x = torch.arange(i << 20, (i << 20) + len(chunk), device=data.device) << 8 | chunk
        x = (x ^ x >> 31) * 0x7FB5D329728EA185
        x = (x ^ x >> 27) * 0x2545F4914F6CDD1D
        total += (x ^ x >> 33).sum()
    return total
