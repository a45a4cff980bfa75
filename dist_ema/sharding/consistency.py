"""All ranks see the same weights, and replicas are equal. Only what differs is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..distributed.coordinator import Ranks, digest
from .fingerprint import fingerprints
from .ownership import ParamState

__all__ = ["on_averages", "on_weights"]


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
    replicas = [
        state
        for state in states
        if state.shard.replicas or 0 < len(state.shard.owner_ranks) < ranks.size
    ]
    regions = [
        [state.name, *region.offsets, region.begin, region.end]
        for state in replicas
        for region in [state.shard.local_region]
    ]
    inventory: dict[str, list[Any]] = {"weights": weights, "regions": regions}

    def digests() -> dict[str, int]:
        inventory["hashes"] = fingerprints([state.local for state in replicas])
        return {key: digest(value) for key, value in inventory.items()}

    _, equal = ranks.run_on_all(verb, digests, combine=_all_equal)
    if not equal:  # every rank learned this, so all of them exchange what differs
        _name_differences(ranks.members, ranks.all_gather_json(verb, inventory))


def _all_equal(digests: Sequence[dict[str, int]]) -> bool:
    hashes = {entry["regions"]: entry["hashes"] for entry in digests}
    return all(
        entry["weights"] == digests[0]["weights"] and hashes[entry["regions"]] == entry["hashes"]
        for entry in digests
    )


def _name_differences(members: Sequence[int], inventories: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for the first difference. Every rank compares all, so that all raise."""
    first_holders: dict[str, int] = {}  # by the regions that they hold
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
        holder = first_holders.setdefault(str(inventory["regions"]), i)
        hashes = zip(inventories[holder]["hashes"], inventory["hashes"], strict=True)
        entries = zip(inventory["regions"], hashes, strict=True)
        mismatched = [region[0] for region, (a, b) in entries if a != b]
        if mismatched:
            raise ValueError(
                f"{', '.join(mismatched[:5])} differ between ranks {members[holder]} and "
                f"{members[i]}, which should hold replicas. Broadcast the weights before building "
                "the EMA, or tell DDP to ignore them."
            )


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
