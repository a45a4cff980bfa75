"""Checks at construction: all ranks see the same weights and equal replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.coordinator import Ranks, digest
from .fingerprint import fingerprints
from .ownership import ParamState

__all__ = ["all_equal", "name_replicas", "on_averages", "on_weights", "sample"]


def on_weights(
    verb: str, ranks: Ranks, states: Sequence[ParamState], averaged: Sequence[bool]
) -> None:
    """Compare the models of the ranks, and the bits of replicas.

    Args:
        verb: The verb that compares.
        ranks: The ranks that hold the model.
        states: The weights and buffers, in the order of the model.
        averaged: Whether each of them is averaged.

    Raises:
        ValueError: Names, shapes or dtypes differ, or replicas hold other bits. On every rank.

    Note:
        *Collective*. *Cost*: one read of the replicated weights, three numbers sent. One rank
        compares.
    """
    if ranks.size == 1:
        return
    weights: list[list[object]] = [
        [state.name, list(state.shard.shape), str(state.shard.dtype), is_averaged]
        for state, is_averaged in zip(states, averaged, strict=True)
        if state.shard.kind != "buffer"
    ]
    replicas = _replicas(states, ranks.size)
    inventory: dict[str, list[Any]] = {"weights": weights, "regions": _regions(replicas)}

    def digests() -> dict[str, int]:
        inventory["hashes"] = fingerprints([state.local for state in replicas])
        return {key: digest(value) for key, value in inventory.items()}

    _, equal = ranks.run_on_all(verb, digests, combine=all_equal)
    if not equal:  # every rank learned this, so all of them exchange what differs
        inventories = ranks.all_gather_json(verb, inventory)
        _refuse_other_models(ranks.members, inventories)
        names = _differing_replicas(ranks.members, inventories)
        if names:
            raise ValueError(
                f"{names}, which should hold replicas. Broadcast the weights before building the "
                "EMA, or tell DDP to ignore them."
            )


def _replicas(states: Sequence[ParamState], ranks: int) -> list[ParamState]:
    return [
        state
        for state in states
        if state.shard.replicas or 0 < len(state.shard.owner_ranks) < ranks
    ]


def _regions(states: Sequence[ParamState]) -> list[list[object]]:
    regions = [(state.name, state.shard.local_region) for state in states]
    return [[name, *region.offsets, region.begin, region.end] for name, region in regions]


def sample(states: Sequence[ParamState], ranks: int) -> dict[str, int] | None:
    """Hash some elements of every weight that is replicated; None if there is none.

    Replicas that went apart differ in nearly all elements, so a few of each weight tell.

    Returns:
        What `all_equal` compares.

    Note:
        *Cost*: 64 to 127 elements per weight are read. Waits for the device.
    """
    by_kind: dict[Any, list[Tensor]] = {}
    replicas = _replicas(states, ranks)
    for state in replicas:
        spaced = state.local[:: max(1, len(state.local) // 64)]
        by_kind.setdefault((spaced.dtype, spaced.device), []).append(spaced)
    hashes = fingerprints([torch.cat(each) for each in by_kind.values()])
    return {"regions": digest(_regions(replicas)), "hashes": digest(hashes)} if replicas else None


def all_equal(digests: Sequence[dict[str, int] | None]) -> bool:
    """Ranks that hold the same regions sent the same hashes, and all sent the same weights."""
    sent = [entry for entry in digests if entry is not None]
    hashes = {entry["regions"]: entry["hashes"] for entry in sent}
    return all(
        entry.get("weights") == sent[0].get("weights")
        and hashes[entry["regions"]] == entry["hashes"]
        for entry in sent
    )


def name_replicas(verb: str, ranks: Ranks, states: Sequence[ParamState]) -> str:
    """The names of weights that differ between replicas, and on which ranks. *Collective*.

    *Cost*: one read of the replicated weights.
    """
    replicas = _replicas(states, ranks.size)
    hashes = fingerprints([state.local for state in replicas])
    inventory = {"regions": _regions(replicas), "hashes": hashes}
    return _differing_replicas(ranks.members, ranks.all_gather_json(verb, inventory))


def _refuse_other_models(members: Sequence[int], inventories: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for the first difference. Every rank compares all, so that all raise."""
    first = inventories[0]["weights"]
    for i, inventory in enumerate(inventories):
        weights = inventory["weights"]
        if weights != first:
            pairs = [f"{a} and {b}" for a, b in zip(first, weights, strict=False) if a != b]
            found = "; ".join(pairs[:3]) or f"{len(first)} and {len(weights)} weights"
            raise ValueError(
                f"ranks {members[0]} and {members[i]} hold different models: {found}. Build the "
                "same model on every rank."
            )


def _differing_replicas(members: Sequence[int], inventories: Sequence[dict[str, Any]]) -> str:
    """Of the first rank that differs; "" where none does."""
    first_holders: dict[str, int] = {}  # by the regions that they hold
    for i, inventory in enumerate(inventories):
        holder = first_holders.setdefault(str(inventory["regions"]), i)
        hashes = zip(inventories[holder]["hashes"], inventory["hashes"], strict=True)
        entries = zip(inventory["regions"], hashes, strict=True)
        mismatched = [region[0] for region, (a, b) in entries if a != b]
        if mismatched:
            ranks = f"ranks {members[holder]} and {members[i]}"
            return f"{', '.join(mismatched[:5])} differ between {ranks}"
    return ""


def on_averages(
    verb: str, ranks: Ranks, states: Sequence[ParamState], arguments: dict[str, Any]
) -> None:
    """Compare the averages of a model that is not wrapped, in a job of several ranks.

    Buffers may differ, as those of BatchNorm do under DDP. Files get the first rank's.

    Args:
        verb: The verb that compares.
        ranks: All ranks of the job.
        states: What the verb writes.
        arguments: What the verb was given.

    Raises:
        RuntimeError: The ranks hold different averages. On every rank.
        ValueError: They passed different arguments.

    Note:
        *Collective*. *Cost*: one read of the averages.
    """
    names = [state.name for state in states]
    weights = [state for state in states if state.shard.kind != "buffer"]
    ranks.begin(verb, arguments)
    _, positions = ranks.run_on_all(
        verb,
        lambda: [digest(names), *fingerprints([state.average for state in weights])],
        combine=_mismatched,
    )
    if positions:
        mismatched = ", ".join(sorted(weights[i - 1].name for i in positions if i)[:3])
        raise RuntimeError(
            f"ema.{verb}(): the model is not wrapped, and "
            f"{mismatched if positions[0] else 'the names of the weights'} differ between the "
            "ranks of this job. Wrap the model (DDP, fully_shard), or start one process."
        )


def _mismatched(hashes: list[list[int]]) -> list[int]:
    """The first positions at which the ranks differ."""
    return [i for i, values in enumerate(zip(*hashes, strict=False)) if len(set(values)) > 1][:10]
