"""Shadows in one flat buffer per dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .ownership import ParamState

__all__ = ["ALIGN", "allocate", "shadow_dtype"]


ALIGN = 64  # bytes; where a long piece starts in the arena


LONG = (
    16 << 10
)  # elements; shorter pieces lie end to end, so that one flat lerp can take many of them


# --- shadows -----------------------------------------------------------------------------------------------------


def shadow_dtype(live: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """Complex weights keep complex shadows, of at least the asked precision."""
    if not live.is_complex:
        return asked
    return torch.complex128 if asked == torch.float64 else torch.complex64


def allocate(
    slots: Sequence[ParamState], dtype: torch.dtype, device: torch.device | None
) -> list[Tensor]:
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
