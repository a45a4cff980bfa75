"""Whether ranks hold the same model, the same bits in replicas, the same averages unwrapped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed.diagnosis import digest
from ..distributed.ranks import Ranks
from .fingerprint import fingerprints
from .ownership import ParamState

__all__ = ["name_replicas", "on_averages", "on_weights", "sampled_alike"]


def on_weights(
    verb: str,
    ranks: Ranks,
    stage: Sequence[int],
    states: Sequence[ParamState],
    averaged: Sequence[bool],
) -> None:
    """Compare the models of the ranks, and the bits of replicas.

    Args:
        verb: The verb that compares.
        ranks: The ranks that hold the model.
        stage: The global ranks of this rank's stage of a pipeline; else all of them.
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
    replicas, stage = _replicas(states, len(stage)), list(stage)
    regions = _regions(replicas)
    model: dict[str, list[Any]] = {"stage": stage, "weights": weights, "regions": regions}

    # Ranks exchange digests; names and shapes travel only where these differ.
    def differs() -> bool:
        model["hashes"] = fingerprints([state.local for state in replicas])
        holders = f"hashes of {digest([stage, regions])}"
        same_weights = ranks.is_same(f"weights of {digest(stage)}", digest(weights))
        return not (ranks.is_same(holders, digest(model["hashes"])) and same_weights)

    if ranks.count_on_all(verb, differs):  # every rank learned this, so all say what they hold
        raise ValueError(ranks.gather(verb, model, partial(_difference, ranks.members)))


def _difference(members: Sequence[int], rank_models: Sequence[dict[str, Any]]) -> str:
    """A sentence about the first ranks whose models differ, or else their replicas."""
    first_of_stage: dict[str, int] = {}
    for i, model in enumerate(rank_models):
        first = first_of_stage.setdefault(str(model["stage"]), i)
        expected, weights = rank_models[first]["weights"], model["weights"]
        if weights != expected:
            pairs = [f"{a} and {b}" for a, b in zip(expected, weights, strict=False) if a != b]
            differing = "; ".join(pairs[:3]) or f"{len(expected)} and {len(weights)} weights"
            return (
                f"ranks {members[first]} and {members[i]} hold different models: {differing}. "
                "Build the same model on every rank."
            )
    return (
        f"{_differing_replicas(members, rank_models)}, which should hold replicas. Broadcast the "
        "weights before building the EMA, or tell DDP to ignore them."
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


def sampled_alike(states: Sequence[ParamState], ranks: Ranks) -> bool:
    """Whether ranks that hold the same regions hold the same bits in some elements of each weight.

    Replicas that went apart differ in nearly all elements, so a few of each weight tell. Call it in
    the work of an exchange, see `Ranks.is_same`.

    Note:
        *Cost*: 64 to 127 elements per weight are read. Waits for the device.
    """
    samples: dict[Any, list[Tensor]] = {}  # one hash for all of a dtype and device
    replicas = _replicas(states, ranks.size)
    for state in replicas:
        spaced = state.local[:: max(1, len(state.local) // 64)]
        samples.setdefault((spaced.dtype, spaced.device), []).append(spaced)
    hashes = fingerprints(list(map(torch.cat, samples.values())))
    return not replicas or ranks.is_same(f"live {digest(_regions(replicas))}", digest(hashes))


def name_replicas(verb: str, ranks: Ranks, states: Sequence[ParamState]) -> str:
    """The names of weights that differ between replicas, and on which ranks. *Collective*.

    *Cost*: one read of the replicated weights.
    """
    replicas = _replicas(states, ranks.size)
    model = {
        "regions": _regions(replicas),
        "hashes": fingerprints([state.local for state in replicas]),
    }
    text: str = ranks.gather(verb, model, partial(_differing_replicas, ranks.members))
    return text


def _differing_replicas(members: Sequence[int], rank_models: Sequence[dict[str, Any]]) -> str:
    """A sentence about the first rank that differs; "" where none does."""
    first_holders: dict[str, int] = {}  # by the regions that they hold
    for i, model in enumerate(rank_models):
        regions, hashes = model["regions"], model["hashes"]
        first = first_holders.setdefault(str([model.get("stage"), regions]), i)
        replicas = zip(regions, rank_models[first]["hashes"], hashes, strict=True)
        mismatched = [name for (name, *_), expected, found in replicas if found != expected]
        if mismatched:
            ranks = f"ranks {members[first]} and {members[i]}"
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
    weights = [state for state in states if state.shard.kind != "buffer"]
    ranks.begin(verb, arguments)
    hashes = [digest([state.name for state in states])]  # then those of the averages

    def differs() -> bool:
        hashes.extend(fingerprints([state.average for state in weights]))
        return not ranks.is_same("averages", digest(hashes))

    if ranks.count_on_all(verb, differs):
        positions = ranks.gather(verb, hashes, _mismatched)
        differing = ", ".join(sorted(weights[i - 1].name for i in positions if i)[:3])
        raise RuntimeError(
            f"ema.{verb}(): the model is not wrapped, and "
            f"{differing if positions[0] else 'the names of the weights'} differ between the "
            "ranks of this job. Wrap the model (DDP, fully_shard), or start one process."
        )


def _mismatched(hashes: list[list[int]]) -> list[int]:
    """The first positions at which the ranks differ."""
    return [i for i, column in enumerate(zip(*hashes, strict=False)) if len(set(column)) > 1][:10]
