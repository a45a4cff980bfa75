"""Shadows in one flat buffer per dtype and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .ownership import ParamState

__all__ = ["ALIGN", "allocate", "shadow_dtype"]


ALIGN = 64  # bytes; where a long chain starts in the arena

# elements; shorter chains lie end to end, so that one flat lerp can take many of them
LONG = 16 << 10


def shadow_dtype(live: torch.dtype, asked: torch.dtype) -> torch.dtype:
    """Complex weights keep complex shadows, of at least the asked precision."""
    if not live.is_complex:
        return asked
    return torch.complex128 if asked == torch.float64 else torch.complex64


def allocate(
    states: Sequence[ParamState], dtype: torch.dtype, device: torch.device | None
) -> list[Tensor]:
    """Lay shadows into one arena per dtype and device.

    Neighbours in the model stay neighbours in the arena, as one chain. Short chains lie end to end
    before the long ones, each of which starts at a multiple of `ALIGN`.

    Args:
        states: What is averaged. Each gets a shadow equal to the one that it has, or to its live
            weights.
        dtype: Of the shadows.
        device: Of the shadows; None: of each weight.

    Returns:
        The arenas, 1-D. *Aliases* the shadows.
    """
    arenas = []
    keys = [
        (shadow_dtype(state.shard.dtype, dtype), device or state.local.device) for state in states
    ]
    for key in dict.fromkeys(keys):
        chosen = [state for state, other in zip(states, keys, strict=True) if other == key]
        starts, total = _starts(chosen, ALIGN // key[0].itemsize)
        # Pinned once for all beside an accelerator: `swap` moves it over the host link.
        pinned = key[1].type == "cpu" and any(s.local.device.type != "cpu" for s in chosen)
        arena = torch.empty(total, dtype=key[0], device=key[1], pin_memory=pinned)
        arenas.append(arena)
        for state, start in zip(chosen, starts, strict=True):
            before = state.live if state.shadow is None else state.shadow
            state.shadow = arena[start : start + state.averaged_region.numel].copy_(before)
    return arenas


def _starts(states: Sequence[ParamState], align: int) -> tuple[list[int], int]:
    """The first element of each shadow in the arena, and the arena's length."""
    starts, total = [0] * len(states), 0
    chains = list(_chains(states))
    # NOTE: sorted() keeps the order of the model within the short and within the long chains.
    for chain, length in sorted(chains, key=lambda entry: entry[1] >= LONG):
        if length >= LONG:
            total = -(-total // align) * align
        for i in chain:
            starts[i] = total
            total += states[i].averaged_region.numel
    return starts, total


def _chains(states: Sequence[ParamState]) -> Iterator[tuple[list[int], int]]:
    """(indices of states whose live elements follow each other in memory, number of elements)."""
    chain: list[int] = []
    length, end = 0, None
    for i, state in enumerate(states):
        live = state.live
        if live.numel() and live.data_ptr() != end:
            if chain:
                yield chain, length
            chain, length = [], 0
        chain.append(i)
        length += live.numel()
        if live.numel():
            end = live.data_ptr() + live.nbytes
    if chain:
        yield chain, length
