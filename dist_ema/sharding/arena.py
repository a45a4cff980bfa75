"""Arenas: shadows laid into one flat buffer per dtype and device, neighbours side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import packs
from .ownership import ParamState

__all__ = ["ALIGN", "allocate"]

ALIGN = 64  # bytes; where a long chain starts in the arena
WIDE = 16  # bytes of one access
LONG = 16 << 10  # elements; shorter chains lie end to end, so one flat lerp can take many of them


def allocate(
    states: Sequence[ParamState], dtype: torch.dtype, device: torch.device | None
) -> list[Tensor]:
    """Lay shadows into one arena per dtype and device.

    Neighbours in the model stay neighbours in the arena, as one chain. Short chains lie end to end
    before the long ones. Each of these starts at a multiple of `ALIGN`, or as far behind one as its
    live elements are behind a multiple of `WIDE`. So one kernel reads both in wide accesses.

    Args:
        states: What is averaged. Each gets a shadow equal to the one that it has, or to its live
            weights.
        dtype: The dtype of the shadows.
        device: The device of the shadows; None: of each weight.

    Returns:
        The arenas, 1-D. *Aliases* the shadows.
    """
    by_arena: dict[tuple[torch.dtype, torch.device], list[ParamState]] = {}
    for state in states:
        # Complex weights keep complex shadows, of at least the asked precision.
        is_complex = state.shard.dtype.is_complex
        shadow_dtype = torch.promote_types(dtype, torch.complex64) if is_complex else dtype
        key = shadow_dtype, device or state.source.device
        by_arena.setdefault(key, []).append(state)
    return [_fill_arena(chosen, *key) for key, chosen in by_arena.items()]


def _fill_arena(states: list[ParamState], dtype: torch.dtype, device: torch.device) -> Tensor:
    sources = [state.source for state in states]
    starts, total = _starts(sources, ALIGN // dtype.itemsize)
    # Pinned once for all beside an accelerator: `swap` moves it over the host link.
    pinned = device.type == "cpu" and any(state.local.device.type != "cpu" for state in states)
    arena = torch.empty(total, dtype=dtype, device=device, pin_memory=pinned)
    before = [
        source if state.shadow is None else state.shadow
        for state, source in zip(states, sources, strict=True)
    ]
    shadows = [arena[start : start + len(x)] for x, start in zip(sources, starts, strict=True)]
    torch._foreach_copy_(shadows, before)
    for state, shadow in zip(states, shadows, strict=True):
        state.shadow = shadow
    return arena


def _starts(sources: Sequence[Tensor], align: int) -> tuple[list[int], int]:
    """The first element of each shadow in the arena, and the arena's length."""
    starts, total = [0] * len(sources), 0
    filled = [i for i, live in enumerate(sources) if live.numel()]
    # Neighbours in the model: each of a chain begins in memory where the one before it ends.
    chains = list(packs(filled, lambda _: 0, 0, lambda i, j: _touch(sources[i], sources[j])))
    lengths = [sum(sources[i].numel() for i in chain) for chain in chains]
    # NOTE: sorted() keeps the order of the model within the short and within the long chains.
    for is_long, number in sorted((length >= LONG, j) for j, length in enumerate(lengths)):
        if is_long:
            live = sources[chains[number][0]]
            # A shadow starts late, to reach a multiple of WIDE bytes together with `live`.
            ahead = -live.data_ptr() % WIDE // live.element_size()
            total = -(-total // align) * align + -ahead % (align * WIDE // ALIGN)
        for i in chains[number]:
            starts[i] = total
            total += sources[i].numel()
    return starts, total


def _touch(live: Tensor, after: Tensor) -> bool:
    return live.data_ptr() + live.nbytes == after.data_ptr()
