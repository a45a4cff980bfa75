"""`ema.metrics`: what the host knows, the distance to live weights, and whether replicas agree.

Each rank sends one message. Tensors are read in windows on the device where the shadows lie, and
the sums are fetched once, at the end. Every element is counted by the one rank that writes it into
files (`ParamState.saved_region`), so neither replicas nor whole copies count twice.

[Note: copies]  Some weights are averaged whole by several ranks: all of them with split=False,
else those that DDP ignores and those outside every FSDP group. For each kind of these weights a
rank sends two hashes: of which elements it holds, and of the bits of their shadows. Ranks that
hold the same elements must hold the same bits. Buffers are left out, because BatchNorm statistics
differ between DDP ranks by nature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.diagnosis import digest
from ..distributed.ranks import Ranks
from ..packing import packs
from ..sharding import consistency, fingerprint
from ..sharding.ownership import ParamState
from .average import Average
from .averages import AveragedWeights

__all__ = ["batches", "combine", "conclude", "known", "measure"]


WINDOW = 1 << 18  # elements that are compared at once, in 8 bytes each


def known(weights: AveragedWeights, average: Average) -> dict[str, float]:
    """The metrics that the host knows of an average. Never waits."""
    now, times = weights.clock.at(average.schedule), weights.updates.times()
    decay, half_life = average.pace(now)
    beside, on_host = _bytes(weights)
    return {
        "decay": decay,
        "now": now,
        "updates": weights.clock.updates,
        "half_life": half_life,
        "bytes": beside,
        "pinned": on_host,
        "update_ms": times.update_ms,
        "stall_ms": times.stall_ms,
        "lag": times.lag,
        "skipped": weights.averages[0].skipped_steps.heard(),
    }


def _bytes(weights: AveragedWeights) -> tuple[int, int]:
    """The bytes of shadows beside their weights; those of other shadows and of windows."""
    shadow_bytes = [0, weights.updates.engine.window_bytes]
    for state in (state for average in weights.averages for state in average.averaged):
        shadow_bytes[state.own_shadow.device != state.local.device] += state.own_shadow.nbytes
    rings = sum(average.ring.nbytes for average in weights.averages if average.ring is not None)
    return shadow_bytes[0], shadow_bytes[1] + rings


def measure(
    states: Sequence[ParamState], started: bool, split: bool, ranks: Ranks, holders: int
) -> dict[str, Any]:
    """Measure what `conclude` needs of this rank. Waits for the device.

    Args:
        states: The weights that are averaged.
        started: Averaging has begun. Before that the average is live, whatever the shadows hold.
        split: The average of replicated weights is cut over the ranks.
        ranks: Those whose next exchange compares.
        holders: How many of them hold this model, or this stage of it.

    Returns:
        A dictionary that JSON can hold.

    Note:
        *Cost*: one read of live and shadow, and another of shadows that are copies; temporaries
        of 8 MB.
    """
    copies: dict[str, list[ParamState]] = {}
    for state in states:
        if state.shard.kind != "buffer" and _is_copied(state, split, holders):
            kind = f"{len(state.shard.replicas)}/{len(state.shard.owner_ranks)}"
            copies.setdefault(kind, []).append(state)
    is_alike = consistency.sampled_alike(states, ranks)
    for kind, copied_states in copies.items():
        regions = [(state.name, state.averaged_region) for state in copied_states]
        elements = digest([[name, *at.offsets, at.begin, at.end] for name, at in regions])
        bits = fingerprint.fingerprints([state.own_shadow for state in copied_states])
        # Ranks with the same elements post under one name, and compare with whoever came first.
        is_alike &= ranks.is_same(f"{kind}/{elements}", digest(bits))
    return {"squares": _squares(states) if started else [0.0, 0.0], "agree": is_alike}


def combine(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine what several ranks measured into one message."""
    columns = zip(*(rank["squares"] for rank in measured), strict=True)
    return {"squares": list(map(sum, columns)), "agree": all(rank["agree"] for rank in measured)}


def conclude(measured: dict[str, Any]) -> tuple[float, bool]:
    """From what all ranks measured: (relative L2 distance to live, replicas are equal)."""
    apart, whole = measured["squares"]
    # NOTE: nothing is a fraction of a model of zeros; nan says that live or the average holds one.
    distance = math.sqrt(apart / whole) if whole else math.inf if apart else 0.0
    return distance, measured["agree"]


def _is_copied(state: ParamState, split: bool, ranks: int) -> bool:
    """Several ranks average the same elements. All ranks decide alike, from what all know."""
    return bool(state.shard.replicas and not split) or len(state.shard.owner_ranks) < ranks > 1


# --- distance -------------------------------------------------------------------------------------


def _squares(states: Sequence[ParamState]) -> list[float]:
    """[|live - average|^2, |live|^2] over the elements that this rank saves, in float64."""
    sums: dict[torch.device, Tensor] = {}
    for live, shadow in batches((state.saved_source, state.average) for state in states):
        # NOTE: MPS has no float64, so its sums are taken on the host.
        home = torch.device("cpu") if shadow.device.type == "mps" else shadow.device
        wide = live.to(home).to(torch.float64)  # may alias live: nothing is done in place
        total = sums.setdefault(home, torch.zeros(2, dtype=torch.float64, device=home))
        apart = wide - shadow.to(home)
        # Sums stay on the device until all windows are read: one wait for each device.
        total += torch.stack([apart.dot(apart), wide.dot(wide)])
    columns = zip([0.0, 0.0], *(total.tolist() for total in sums.values()), strict=True)
    return [math.fsum(column) for column in columns]


def batches(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[list[Tensor]]:
    """Columns of rows of equal length: windows of at most WINDOW elements, short rows together."""
    windows = (
        window
        for row in rows
        for window in zip(*(_real(x).split(WINDOW) for x in row), strict=True)
    )
    for batch in packs(
        windows, lambda row: len(row[0]), WINDOW, lambda last, row: _kinds(last) == _kinds(row)
    ):
        columns = zip(*batch, strict=True)
        yield [column[0] if len(column) == 1 else torch.cat(column) for column in columns]


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten() if x.is_complex() else x


def _kinds(row: Iterable[Tensor]) -> list[Any]:
    return [(x.dtype, x.device) for x in row]
