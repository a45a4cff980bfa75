"""All ranks see the same weights, and what is called replicated is: compared by hash, named where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..distributed.coordinator import Ranks, digest
from .fingerprint import fingerprints
from .ownership import ParamState

__all__ = ["on_averages", "on_weights"]


def on_weights(
    verb: str, ranks: Ranks, slots: Sequence[ParamState], averaged: Sequence[bool]
) -> None:
    """Raise ValueError on every rank if names, shapes or dtypes differ, or replicas do not hold the same bits.

    *Collective*. *Cost*: one read of the replicated weights, three numbers sent; one rank compares.
    """
    if ranks.size == 1:
        return
    weights: list[list[object]] = [
        [slot.name, list(slot.shard.shape), str(slot.shard.dtype), chosen]
        for slot, chosen in zip(slots, averaged, strict=True)
        if slot.shard.kind != "buffer"
    ]
    replicas = [
        slot
        for slot in slots
        if slot.shard.replicas or 0 < len(slot.shard.owner_ranks) < ranks.size
    ]
    where = [
        [
            slot.name,
            *slot.shard.local_region.offsets,
            slot.shard.local_region.begin,
            slot.shard.local_region.end,
        ]
        for slot in replicas
    ]
    mine: dict[str, list[Any]] = {"weights": weights, "where": where}

    def brief() -> dict[str, int]:
        mine["values"] = fingerprints([slot.local for slot in replicas])
        return {key: digest(value) for key, value in mine.items()}

    if not ranks.run_on_all(verb, brief, combine=_alike)[
        1
    ]:  # seen by all, so all go on to name what differs
        _compare(ranks.members, ranks.all_gather_json(verb, mine))


def _alike(brief: Sequence[dict[str, int]]) -> bool:
    values = {each["where"]: each["values"] for each in brief}
    return all(
        each["weights"] == brief[0]["weights"] and values[each["where"]] == each["values"]
        for each in brief
    )


def _compare(members: Sequence[int], said: Sequence[dict[str, Any]]) -> None:
    """Every rank compares all the others too, so that all of them raise or none."""
    holders: dict[str, int] = {}
    for i, other in enumerate(said):
        if other["weights"] != said[0]["weights"]:
            pairs = zip(said[0]["weights"], other["weights"], strict=False)
            differ = [f"{a} and {b}" for a, b in pairs if a != b]
            counts = f"{len(said[0]['weights'])} and {len(other['weights'])} weights"
            raise ValueError(
                f"ranks {members[0]} and {members[i]} hold different models: {'; '.join(differ[:3]) or counts}."
            )
        first = holders.setdefault(str(other["where"]), i)
        names = [entry[0] for entry in other["where"]]
        _refuse_odd(names, said[first]["values"], other["values"], members[first], members[i])


def _refuse_odd(names: list[str], a: list[int], b: list[int], one: int, other: int) -> None:
    odd = [name for name, x, y in zip(names, a, b, strict=True) if x != y]
    if odd:
        raise ValueError(
            f"{', '.join(odd[:5])} differ between ranks {one} and {other}, which should hold replicas. Broadcast the "
            "weights before building the EMA, or tell DDP to ignore them."
        )


def on_averages(verb: str, ranks: Ranks, slots: Sequence[ParamState]) -> None:
    """Raise RuntimeError on every rank unless each holds the same average of a model that nobody wrapped.

    Buffers may differ, as BatchNorm's do under DDP, which drop-ins take off: files get the first rank's, as there.
    """
    names = [slot.name for slot in slots]
    weights = [slot for slot in slots if slot.shard.kind != "buffer"]
    ranks.begin(verb)
    _, odd = ranks.run_on_all(
        verb,
        lambda: [digest(names), *fingerprints([slot.average for slot in weights])],
        combine=_differing,
    )
    if odd:
        said = (
            ", ".join(sorted(weights[i - 1].name for i in odd if i)[:3])
            if odd[0]
            else "the names of the weights"
        )
        raise RuntimeError(
            f"ema.{verb}(): the model is not wrapped, and {said} differ between the ranks of this job. Wrap the model (DDP, "
            "fully_shard), or start one process."
        )


def _differing(said: list[list[int]]) -> list[int]:
    """The first places where not all say the same."""
    return [i for i, values in enumerate(zip(*said, strict=False)) if len(set(values)) > 1][:10]
