"""How far the average is from the live weights, and whether replicas are replicas: one message from each rank.

Everything is read in chunks on the device where the shadows lie, and fetched at the end. Every element is counted by the
one rank that answers for it in files (`Slot.duty`), so neither replicas nor whole copies count twice.

[Note: copies]  Some weights are averaged whole by several ranks: with split=False, those that DDP ignores, those outside
every FSDP group. A rank sends, for each kind of them, a check sum of what it holds and one of the shadows' bits; ranks that
hold the same must have the same bits. Buffers are left out: BatchNorm statistics differ between DDP ranks by nature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.coordinator import digest
from ..sharding.ownership import ParamState
from .kernels.eager import SCRATCH

__all__ = ["compare", "measure"]

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a real number


def measure(slots: Sequence[ParamState], started: bool, split: bool, ranks: int) -> dict[str, Any]:
    """What this rank knows (JSON), for `compare`. slots: those that are averaged. Waits for the device.

    started: before that the average is live, whatever the shadows hold.

    *Cost*: one read of live and shadow, and of the shadows that are copies another; temporaries of 8 MB.
    """
    kinds: dict[str, list[ParamState]] = {}
    for slot in slots:
        if slot.shard.kind != "buffer" and _copied(slot, split, ranks):
            kinds.setdefault(
                f"{len(slot.shard.replicas)}/{len(slot.shard.owner_ranks)}", []
            ).append(slot)
    squares = _squares(slots) if started else [0.0, 0.0]
    return {"squares": squares, "copies": {kind: _summary(mine) for kind, mine in kinds.items()}}


def compare(said: Sequence[dict[str, Any]]) -> tuple[float, bool]:
    """(relative L2 distance of live and average, replicas agree), from what every rank measured; for `Board.attempt`."""
    apart, whole = (math.fsum(each["squares"][i] for each in said) for i in (0, 1))
    # NOTE: of a model of zeros nothing is a fraction; nan says that live or the average holds one.
    distance = math.sqrt(apart / whole) if whole else math.inf if apart else 0.0
    known: dict[tuple[str, int], int] = {}
    agree = all(
        known.setdefault((kind, where), bits) == bits
        for each in said
        for kind, (where, bits) in each["copies"].items()
    )
    return distance, agree


def _copied(slot: ParamState, split: bool, ranks: int) -> bool:
    """Several ranks average the same elements. Decided by what all ranks know alike."""
    return bool(slot.shard.replicas and not split) or len(slot.shard.owner_ranks) < ranks > 1


# --- distance ----------------------------------------------------------------------------------------------------


def _squares(slots: Sequence[ParamState]) -> list[float]:
    """[|live - shadow|^2, |live|^2] over what this rank answers for, in float64."""
    sums: dict[torch.device, Tensor] = {}
    for live, shadow in _batches(
        [(slot.local_view(slot.saved_region), slot.average) for slot in slots]
    ):
        home = (
            torch.device("cpu") if shadow.device.type == "mps" else shadow.device
        )  # which has no float64
        wide = live.to(home).to(torch.float64)  # perhaps live itself: nothing is done in place
        total = sums.setdefault(home, torch.zeros(2, dtype=torch.float64, device=home))
        total += torch.stack([(wide - shadow.to(home)).square_().sum(), wide.square().sum()])
    return [
        math.fsum(column)
        for column in zip([0.0, 0.0], *(total.tolist() for total in sums.values()), strict=True)
    ]


def _batches(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[list[Tensor]]:
    """Columns of tensors of one length, in chunks of at most SCRATCH elements, short ones together."""
    waiting: list[tuple[Tensor, ...]] = []
    for row in rows:
        for parts in zip(*(_real(x).split(SCRATCH) for x in row), strict=True):
            size = sum(len(held[0]) for held in waiting) + len(parts[0])
            if waiting and (size > SCRATCH or _kinds(waiting[0]) != _kinds(parts)):
                yield [_join(column) for column in zip(*waiting, strict=True)]
                waiting = []
            waiting.append(parts)
    if waiting:
        yield [_join(column) for column in zip(*waiting, strict=True)]


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten() if x.is_complex() else x


def _kinds(row: Iterable[Tensor]) -> list[Any]:
    return [(x.dtype, x.device) for x in row]


def _join(column: Sequence[Tensor]) -> Tensor:
    return column[0] if len(column) == 1 else torch.cat(list(column))


# --- [Note: copies] ----------------------------------------------------------------------------------------------


def _summary(slots: Sequence[ParamState]) -> list[int]:
    """Check sums of which elements these are, and of the bits of their shadows."""
    where = [
        [
            slot.name,
            *slot.averaged_region.offsets,
            slot.averaged_region.begin,
            slot.averaged_region.end,
        ]
        for slot in slots
    ]
    return [digest(where), _bits([slot.shadow for slot in slots if slot.shadow is not None])]


def _bits(tensors: Iterable[Tensor]) -> int:
    """A hash of the bits of 1-D tensors end to end: sums of words times odd random numbers, modulo 2^64."""
    totals: dict[torch.device, tuple[Tensor, Tensor]] = {}
    for (words,) in _batches((_words(x),) for x in tensors):
        if words.device not in totals:
            totals[words.device] = (
                torch.zeros((), dtype=torch.int64, device=words.device),
                _factors(words.device),
            )
        total, factors = totals[words.device]
        # Chunks are the digits of a polynomial, so that they cannot change places.
        total.mul_(0x2545F4914F6CDD1D).add_((words * factors[: len(words)]).sum())
    return digest([int(total) for total, _ in totals.values()])


def _words(x: Tensor) -> Tensor:
    x = _real(x)
    return x.view(WORDS[x.element_size()])


def _factors(device: torch.device) -> Tensor:
    """Odd numbers that look random, the same everywhere. int64 [SCRATCH]"""
    x = torch.arange(1, SCRATCH + 1, device=device) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * 0x7FB5D329728EA185
    return (x ^ (x >> 32)) | 1
