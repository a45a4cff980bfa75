"""Lend the average to the live model and take it back, bit for bit.

Where shadow and live weight have one dtype and device their contents are exchanged through a scratch of 4 MB: no second
model exists. Otherwise an exchange would round, so the live elements are kept aside and the average is cast in. Then the
replicas are made whole by broadcasts in place. Everything here is a write to model storage, never a pointer change, so
compiled code and CUDA graphs see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.transfer import broadcast
from ..sharding.ownership import ParamState, replica_broadcasts
from ..sharding.records import register, registered
from .kernels.eager import SCRATCH

__all__ = ["WeightSwap", "broadcast_to_replicas"]


class WeightSwap:
    """What is lent, and how to undo it. `lend` and `take_back` are local; `spread` makes the replicas whole."""

    def __init__(self, slots: Sequence[ParamState], own_buffers: dict[str, Tensor]) -> None:
        self._buffers = [slot for slot in slots if slot.shard.kind == "buffer"]
        self._weights = [
            slot for slot in slots if slot.shadow is not None and slot.shard.kind != "buffer"
        ]
        self._own = own_buffers
        self._aside: dict[int, Tensor] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._done: list[ParamState] = []
        self._kept: list[tuple[ParamState, Tensor, Tensor | None]] = []
        self._lent: list[tuple[ParamState, Tensor]] = []

    def apply(self) -> None:
        """Write the average into the live weights. If it fails half way, `take_back` undoes what was done."""
        self._kept = [(slot, slot.local.clone(), registered(slot.shard)) for slot in self._buffers]
        for slot in self._weights:
            self._put(slot)
            self._done.append(slot)
        for slot in self._buffers:
            average = self._own.get(slot.name, slot.shadow)
            if average is not None:
                slot.shard.write(average)
        told = [
            slot
            for slot in self._buffers
            if slot.shard.persistent and slot.shard.dtype.is_floating_point
        ]
        self._lent = [(slot, slot.shard.read().clone()) for slot in told]
        torch.clear_autocast_cache()  # autocast would go on using the casts of the live weights

    def floating_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """What every floating buffer holds now, and the names of those that were written since `lend`."""
        now = {
            slot.name: slot.shard.read().clone() for slot, _ in self._lent
        }  # perhaps another tensor by now
        return now, [slot.name for slot, lent in self._lent if not _same_bits(now[slot.name], lent)]

    def restore(self) -> None:
        """Restore live weights and buffers and the shadows, bit for bit."""
        while self._done:
            self._restore(self._done.pop())
        for slot, kept, tensor in self._kept:
            register(slot.shard, tensor)
            slot.shard.write(kept)
        torch.clear_autocast_cache()

    def _put(self, slot: ParamState) -> None:
        live, shadow = slot.live, slot.shadow
        assert shadow is not None
        if (live.dtype, live.device) == (shadow.dtype, shadow.device):
            self._exchange(live, shadow)
        else:
            self._aside[id(slot)] = live.clone()
            live.copy_(shadow)

    def _restore(self, slot: ParamState) -> None:
        if id(slot) in self._aside:
            slot.live.copy_(self._aside.pop(id(slot)))
        else:
            assert slot.shadow is not None
            self._exchange(slot.live, slot.shadow)

    def _exchange(self, live: Tensor, shadow: Tensor) -> None:
        key = (live.dtype, live.device)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(SCRATCH, dtype=live.dtype, device=live.device)
        for a, b in zip(live.split(SCRATCH), shadow.split(SCRATCH), strict=True):
            held = self._scratch[key][: len(a)].copy_(a)
            a.copy_(b)
            b.copy_(held)


def broadcast_to_replicas(slots: Sequence[ParamState], split: bool) -> None:
    """Broadcast every rank's own part to the ranks that hold it too. *Collective*. Nothing to do if nothing is split."""
    if split:
        for group, source, views in replica_broadcasts(
            slot for slot in slots if slot.shadow is not None
        ):
            broadcast(views, source, group)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
