"""`ParamState`: which elements this rank averages, which it saves, and in which blocks.

A `ParamState` is one weight on this rank: the region that it averages, the region that it saves to
files, and the shadow. Where nothing is replicated both are the local region. What the same replicas
hold is laid end to end, and each of them takes an equal share of that sequence:

    DDP, 2 ranks: the weights end to end, one cut
    | conv.weight | bn | fc.weight        | fc.bias |
    |<------- rank 0 ------>|<------ rank 1 ------->|   averaged_region and saved_region

    split=False: every rank averages everything, and still saves its share only

[Note: stale records]  FSDP2 pins local tensors anew at its first forward under CPU offload, and
`.to()` keeps a Parameter but moves its storage. A record keeps the Parameter and the address.
Elements that moved are followed. Another shape, order, dtype or device raises by name. A buffer
that is only copied may become anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import Block
from . import discovery, geometry, storage, zero
from .records import Region, Shard

__all__ = [
    "MAX_BLOCK",
    "ParamState",
    "assign",
    "replica_runs",
    "saved_blocks",
    "saved_dtype",
    "saved_dtypes",
]


MAX_BLOCK = 16 << 20  # bytes of one block of a file or a stream


@dataclass
class ParamState:
    """One weight or buffer on this rank. *Aliases*: `live` is a view of the model's storage."""

    shard: Shard
    averaged_region: Region  # averaged here
    owned_region: Region  # of several replicas this one answers for it
    local: Tensor  # [shard.local_region.numel], all that the model holds here
    sequence: tuple[int, int]  # (start of `local`, end of all) in what its replicas divide
    shadow: Tensor | None = None  # [averaged_region.numel]; None: not averaged
    teacher_copy: Tensor | None = None  # shape of `local`; a teacher's copy of what has no shadow

    def __post_init__(self) -> None:
        memory = self.shard.local_tensor()
        # Where and how the elements lay when `local` was made.
        self._address, self._form = memory.data_ptr(), storage.form(memory)

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def saved_region(self) -> Region:
        """Written into files and sent to others by this rank."""
        owned, shard = self.owned_region, self.shard
        is_saved = shard.is_writer and not shard.written_elsewhere
        return owned if is_saved else replace(owned, end=owned.begin)

    @property
    def own_shadow(self) -> Tensor:
        """The shadow of what is averaged."""
        assert self.shadow is not None
        return self.shadow

    @property
    def live(self) -> Tensor:
        """The live elements that are averaged here: [averaged_region.numel]."""
        return self.local_view(self.averaged_region)

    @property
    def source(self) -> Tensor:
        """The elements that updates read: the optimizer's masters, else `live`."""
        shard, length = self.shard, self.averaged_region.numel
        if shard.master is None:
            return self.live
        return shard.master().detach().narrow(0, shard.master_offset, length)

    @property
    def saved_source(self) -> Tensor:
        """`source` where `average` is: [saved_region.numel]."""
        return _part(self.source, self.averaged_region, self.saved_region)

    @property
    def average(self) -> Tensor:
        """The elements for files and `gather`, live if not averaged: [saved_region.numel]."""
        return self.average_in(self.saved_region)

    def average_in(self, region: Region) -> Tensor:
        """The average, or live where nothing is averaged: [region.numel]."""
        if self.shadow is not None:
            return _part(self.shadow, self.averaged_region, region)
        if self.teacher_copy is not None:
            return _part(self.teacher_copy, self.shard.local_region, region)
        return self.local_view(region)

    def local_view(self, region: Region) -> Tensor:
        """The elements of `region` in the model."""
        return _part(self.local, self.shard.local_region, region)

    @property
    def is_copied_buffer(self) -> bool:
        """A buffer that is taken from live when the average is used."""
        return self.shard.kind == "buffer" and self.shadow is None and self.teacher_copy is None

    @property
    def moved(self) -> bool:
        """The model's elements lie elsewhere now ([Note: stale records])."""
        # NOTE: `local` copies strided elements, and the next copy may lie where the last one did.
        if not self.shard.dense or self.shard.local_tensor().data_ptr() != self._address:
            return True
        return self.shard.kind == "buffer" and self.layout_changed  # resized in place

    @property
    def layout_changed(self) -> bool:
        """They have another shape or order in memory now."""
        return storage.form(self.shard.local_tensor()) != self._form

    def rebind(self) -> None:
        """Follow elements that moved.

        Raises:
            RuntimeError: They have another dtype, device, shape or order now, or no memory.
        """
        if self.is_copied_buffer:
            discovery.redescribe(self.shard)
            self.averaged_region = self.owned_region = self.shard.local_region
            self._form = storage.form(self.shard.local_tensor())
        zero.refuse_taken_over(self.shard)
        memory, old = self.shard.local_tensor(), self.local
        if memory.numel() and not memory.data_ptr():
            raise RuntimeError(
                f"{self.name} has no memory now: its storage was freed or offloaded. Bring it back "
                "before the next update or verb."
            )
        if memory.is_inference() and self.shadow is not None and self.shard.kind != "buffer":
            raise RuntimeError(
                f"{self.name} lies in a tensor that was made under torch.inference_mode now. Give "
                "it a clone that is made outside of it."
            )
        changed = self.layout_changed
        # A buffer may be another tensor: FSDP1 casts them, modules assign them.
        if self.shard.kind != "buffer":
            changed |= (memory.dtype, memory.device) != (old.dtype, old.device)
        if changed:
            resized = memory.shape != self._form[0]
            shapes = (
                f" (shape {tuple(self._form[0])}, now {tuple(memory.shape)})" if resized else ""
            )
            cure = "Call ema.rescan()" if resized else "Build the EMA after model.to(...)"
            if resized and self.teacher_copy is not None:
                cure = "The teacher's copy cannot follow: leave it out with only="
            raise RuntimeError(
                f"{self.name} was {old.dtype} on {old.device} with {old.numel()} elements here, "
                f"and is now {memory.dtype} on {memory.device} with {memory.numel()}{shapes}, or "
                f"lies in another order. {cure}."
            )
        self.local, self._address = self.shard.read(), memory.data_ptr()


def _part(data: Tensor, whole: Region, region: Region) -> Tensor:
    """The elements of `region` in `data`, which holds `whole`: `data` itself where that is all."""
    if (region.begin, region.end) == (whole.begin, whole.end):
        return data
    return data.narrow(0, region.begin - whole.begin, region.numel)


# --- who owns what ------------------------------------------------------------------------------


def assign(
    shards: Sequence[Shard], averaged: Callable[[Shard], bool], split: bool
) -> list[ParamState]:
    """One state per shard, each saved by exactly one of its replicas.

    Args:
        shards: What the model holds here.
        averaged: Whether a shard is averaged. These form sequences of their own, so that the
            averaged elements alone are balanced.
        split: Each replica averages what it saves; else all that it holds.

    Raises:
        ValueError: What should be averaged is a tensor subclass with unknown memory.
    """
    keys = [(shard.replicas, averaged(shard)) for shard in shards]
    pairs = list(zip(shards, keys, strict=True))
    opaque = [shard.name for shard, (_, is_averaged) in pairs if is_averaged and shard.opaque]
    if opaque:
        raise ValueError(
            f"{', '.join(opaque[:5])} is sparse, quantized, or a tensor subclass without exactly "
            "one inner tensor of its shape and dtype, so its elements cannot be averaged. Freeze "
            "it, or leave it out with only=."
        )
    divided = [shard.name for shard in shards if shard.cut and shard.master and not split]
    if divided:
        raise ValueError(
            f"{', '.join(divided[:5])} has fp32 masters that DeepSpeed divides among the ranks, so "
            "no rank can average all of it. Leave split=False out; in place of into= call "
            "ema.copy_to(teacher) before the teacher is read, or use ZeRO stage 3 for both."
        )
    # A range of a sequence is known when its length is: all starts come before the first state.
    lengths: dict[Any, int] = {}
    starts = []
    for shard, key in pairs:
        starts.append(lengths.get(key, 0))
        if shard.cut is None:  # else DeepSpeed has laid out a sequence of its own
            lengths[key] = starts[-1] + shard.local_region.numel
    own_range = cache(_own_range)  # asks the groups once for each sequence
    states = []
    for (shard, key), start in zip(pairs, starts, strict=True):
        local, sequence = shard.local_region, shard.cut or (start, lengths[key])
        bounds = own_range(shard.replicas, sequence[1])
        begin, end = (local.begin + min(max(at - sequence[0], 0), local.numel) for at in bounds)
        owned_region = replace(local, begin=begin, end=end)
        averaged_region = owned_region if split and shard.replicas else local
        states.append(ParamState(shard, averaged_region, owned_region, shard.read(), sequence))
    return states


def _own_range(groups: Sequence[dist.ProcessGroup], end: int) -> tuple[int, int]:
    """This rank's range of the sequence [0, end), which the outermost group divides first."""
    low, high = 0, end
    for group in groups:
        low, high = geometry.even(low, high, dist.get_rank(group), group.size())
    return low, high


def replica_runs(
    states: Iterable[ParamState],
) -> Iterator[tuple[dist.ProcessGroup, list[tuple[int, Tensor]]]]:
    """The runs to copy between replicas after each rank wrote the regions that it averages.

    Yields:
        (group, runs), the innermost group first. A run is (its source, as a rank in the group;
        a view into the model). Every rank of the group has the same sources in the same order.

    Note:
        *Cost*: a run per weight and one more per rank of the group.
    """
    by_replicas: dict[tuple[dist.ProcessGroup, ...], list[ParamState]] = {}
    for state in states:
        by_replicas.setdefault(state.shard.replicas, []).append(state)
    for groups, replicated_states in by_replicas.items():
        # The inner groups first: the outer ones copy what these have made whole.
        for depth in reversed(range(len(groups))):
            yield (
                groups[depth],
                [run for state in replicated_states for run in _runs(state, depth)],
            )


def _runs(state: ParamState, depth: int) -> Iterator[tuple[int, Tensor]]:
    """The weight, cut where the source changes in the replica group at `depth`."""
    groups, (start, total) = state.shard.replicas, state.sequence
    low, high = _own_range(groups[:depth], total)
    size, begin = groups[depth].size(), max(low, start)
    end = min(high, start + state.shard.local_region.numel)
    while begin < end:
        source = -(-(begin - low + 1) * size // (high - low)) - 1  # whose range holds `begin`
        stop = min(end, geometry.even(low, high, source, size)[1])
        yield source, state.local[begin - start : stop - start]
        begin = stop


# --- what this rank saves -----------------------------------------------------------------------


def saved_blocks(
    states: Sequence[ParamState], own_buffers: dict[str, Tensor] | None = None, alone: bool = False
) -> Iterator[Block]:
    """The elements that this rank saves, in blocks of at most `MAX_BLOCK` bytes.

    Args:
        states: The weights and buffers.
        own_buffers: The average's own, by name, taken in place of the model's.
        alone: Everything that this rank holds, as no other rank saves the rest.

    Yields:
        Blocks, numbered like the states. *Aliases* shadows and live weights.
    """
    for number, state in enumerate(states):
        saved_region = state.shard.local_region if alone else state.saved_region
        average = state.average_in(saved_region)
        if own_buffers and state.name in own_buffers and average.numel():
            average = own_buffers[state.name]
        elif state.is_copied_buffer:
            average = average.clone()  # NOTE: numpy forbids to resize memory that it has seen
        for box, view in geometry.boxes_with_data(state.shard, saved_region, average):
            for block in geometry.split_box(box, MAX_BLOCK // average.itemsize):
                yield Block(number, block.offsets, view[block.within(box)])


def saved_dtype(state: ParamState, own_buffers: dict[str, Tensor]) -> torch.dtype:
    """The dtype that `saved_blocks` gives: an own buffer keeps its own."""
    return own_buffers.get(state.name, state.average).dtype


def saved_dtypes(
    states: Sequence[ParamState], own_buffers: dict[str, Tensor]
) -> tuple[list[torch.dtype], list[int]]:
    """dtype and number of dimensions of each, what a stream must know of the weights."""
    dims = [len(state.shard.shape) for state in states]
    return [saved_dtype(state, own_buffers) for state in states], dims
