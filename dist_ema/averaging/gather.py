"""`ema.gather` and `copy_to`: full weights by name in memory, and an average copied into a model.

Ranks send the blocks that they answer for in windows of 16 MB. There is no collective per weight,
and no rank holds more than the windows beside its own result. To one rank, those of other machines
send through a rank of its machine ([Note: columns] in machines).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import collectives, receiver
from ..distributed.ranks import Ranks, refuse_destroyed
from ..packing import packs
from ..sharding import discovery, geometry, ownership, parameters, records, wrappers
from ..sharding.geometry import Box
from ..sharding.ownership import ParamState
from .executors import await_host_reads, run_shielded

__all__ = ["Form", "copy_into", "full", "full_weights"]

WINDOW = 256 << 20  # bytes of full weights


class Form(NamedTuple):
    """What a full weight looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: Sequence[str]


def full(
    ranks: Ranks,
    states: Sequence[ParamState],
    own_buffers: dict[str, Tensor],
    forms: dict[str, Form] | None = None,
) -> dict[str, Tensor]:
    """The complete state_dict, with every alias, on the first rank; {} elsewhere. *Collective*.

    forms: what all ranks hold together, where they hold different weights.
    """
    if forms is None:
        forms = {
            state.name: Form(
                state.shard.shape,
                ownership.saved_dtype(state, own_buffers),
                tuple(state.shard.aliases),
            )
            for state in states
        }
    names = list(forms)
    weights: dict[str, Tensor] = {}
    blocks: list[collectives.Block] = []

    def prepare() -> None:
        # NOTE: memory for a whole model may be missing. Then the others must not begin to send.
        blocks.extend(ownership.saved_blocks(states, own_buffers, ranks.size == 1))
        for name, form in forms.items() if ranks.first else ():
            weights[name] = torch.empty(form.shape, dtype=form.dtype, device="cpu")

    def consume(number: int, offset: int, data: memoryview) -> None:
        geometry.bytes_of(weights[names[number]])[offset : offset + len(data)] = data

    ranks.run_on_all("gather", prepare)
    if ranks.first:
        for number, offsets, data in blocks:
            weights[states[number].name][Box(offsets, tuple(data.shape)).slices].copy_(data)
    if ranks.size > 1:
        connections, machines = ranks.connections("gather"), ranks.machines("gather")
        relay = machines.column(machines.columns[ranks.rank])[machines.numbers[0]]

        # Orders: the memory of the first rank is there (`run_on_all`), then the others send.
        def send() -> None:
            if not ranks.first:
                numbers = {name: number for number, name in enumerate(names)}
                through = None if relay in (0, ranks.rank) else relay
                connections.send(0, _runs(states, blocks, numbers), through)

        with connections.receiving(consume):
            ranks.run_transfer("gather", send)
    return weights | {alias: weights[name] for name in weights for alias in forms[name].aliases}


def _runs(
    states: Sequence[ParamState], blocks: Sequence[collectives.Block], numbers: dict[str, int]
) -> Iterator[receiver.Run]:
    """The bytes of the blocks as runs of the full weights, by their numbers."""
    for i, offsets, data in blocks:
        state, box = states[i], Box(offsets, tuple(data.shape))
        view = geometry.bytes_of(data.cpu().contiguous())
        for start, part in geometry.byte_runs(box, state.shard.shape, view, data.itemsize):
            yield receiver.Run(numbers[state.name], start, part)


def full_weights(
    ranks: Ranks, states: Sequence[ParamState], own_buffers: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each full weight in turn, on every rank and beside its shard. *Collective*.

    *Cost*: `WINDOW` bytes of full weights at a time, or one weight.
    """

    def full_bytes(state: ParamState) -> int:
        return math.prod(state.shard.shape) * state.average.itemsize

    refuse_destroyed("tensors", ranks.group)
    # Ranks that sum other sizes would cut other windows; the full sizes are the same everywhere.
    for window in packs(states, full_bytes, WINDOW):
        yield from _full_window(ranks, window, own_buffers)


# Not on the generator, whose caller runs between its values. Ranks write in a thread, where no
# inference mode of the caller's holds.
@torch.inference_mode(False)
@torch.no_grad()
def _full_window(
    ranks: Ranks, states: Sequence[ParamState], own_buffers: dict[str, Tensor]
) -> list[tuple[str, Tensor]]:
    dtypes, dims = ownership.saved_dtypes(states, own_buffers)
    tensors = [
        torch.empty(state.shard.shape, dtype=dtype, device=state.local.device)
        for state, dtype in zip(states, dtypes, strict=True)
    ]

    def receive(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        tensors[number][Box(offsets, tuple(data.shape)).slices].copy_(data)

    blocks = list(ownership.saved_blocks(states, own_buffers, ranks.size == 1))
    _run_to_its_end(
        ranks,
        states,
        partial(collectives.stream_to_all, ranks, "tensors", dtypes, dims, blocks, receive),
    )
    return [(state.name, tensor) for state, tensor in zip(states, tensors, strict=True)]


def copy_into(
    ranks: Ranks,
    states: Sequence[ParamState],
    own_buffers: dict[str, Tensor],
    module: parameters.Model,
) -> None:
    """Write the full weights into another model, however that one is wrapped. *Collective*.

    Each rank copies its own region where it averages all that it holds and the other model is cut
    alike. Only buffers, which are not divided, are sent then. Otherwise every rank broadcasts its
    parts in turn, and each takes what meets its own shards.

    Raises:
        ValueError: The two models do not hold the same weights; they are named.
    """
    targets: dict[str, records.Shard] = {}
    views: dict[str, list[tuple[Box, Tensor]]] = {}
    strided: list[tuple[records.Shard, Tensor]] = []  # read as copies, to be written back
    blocks: list[collectives.Block] = []
    sharded: list[nn.Module] = []

    def prepare() -> bool:
        refuse_destroyed("copy_to", ranks.group)
        shards_of_model = discovery.find_shards(parameters.module_of(module))
        _refuse_other(states, shards_of_model.shards)
        for shard in shards_of_model.shards:
            targets[shard.name], elements = shard, shard.read()
            views[shard.name] = list(geometry.boxes_with_data(shard, shard.local_region, elements))
            strided.extend([] if shard.dense else [(shard, elements)])
        await_host_reads(shard.local_tensor() for shard in shards_of_model.shards)
        blocks.extend(ownership.saved_blocks(states, own_buffers))
        sharded.extend(shards_of_model.sharded)
        divided = [state for state in states if state.shard.owner_ranks]
        return any(_is_cut_otherwise(state, targets[state.name]) for state in divided)

    def receive(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        box = Box(offsets, tuple(data.shape))
        for target, view in views[states[number].name]:
            common = box.intersect(target)
            if common is not None:
                view[common.within(target)].copy_(data[common.within(box)])

    def copy() -> None:
        otherwise = ranks.count_on_all("copy_to", prepare)
        for state in states if not otherwise else ():
            if state.shard.owner_ranks:
                targets[state.name].write(state.local if state.shadow is None else state.shadow)
        sent = [block for block in blocks if otherwise or not states[block[0]].shard.owner_ranks]
        collectives.stream_to_all(
            ranks, "copy_to", *ownership.saved_dtypes(states, own_buffers), sent, receive
        )
        # Last, because what was received lies in copies of strided elements only.
        for shard, elements in strided:
            if otherwise or not shard.owner_ranks:
                shard.write(elements)
        wrappers.reshard(sharded)  # FSDP's unsharded weights would hide what was written

    _run_to_its_end(ranks, states, copy)


def _run_to_its_end(ranks: Ranks, states: Sequence[ParamState], work: Callable[[], None]) -> None:
    """Run a collective to its end, whatever interrupts come ([Note: interrupts] in swap)."""
    if ranks.size == 1:
        work()
    else:
        run_shielded(work, {state.local.device for state in states}, ranks.timeout)


def _is_cut_otherwise(state: ParamState, target: records.Shard) -> bool:
    """This rank averages only a part of what it holds, or the other model holds other elements."""
    shard = state.shard
    return (
        state.averaged_region != shard.local_region
        or state.teacher_copy is not None
        or (target.local_region, target.order) != (shard.local_region, shard.order)
    )


def _refuse_other(states: Sequence[ParamState], other: Sequence[records.Shard]) -> None:
    shapes = {state.name: state.shard.shape for state in states}
    other_shapes = {shard.name: shard.shape for shard in other if shard.persistent}
    mismatched = sorted({name for name, _ in shapes.items() ^ other_shapes.items()})
    if mismatched:
        raise ValueError(
            f"ema.copy_to(): the models differ in {', '.join(mismatched[:5])}. Pass a model "
            "that is built like the averaged one."
        )
