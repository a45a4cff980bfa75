"""The stages of a pipeline together: shared weights compared, one inventory, one set of files.

Ranks of one stage hold the same names, ranks of different stages others. A weight of two stages
(tied embeddings) is averaged on both, must have equal bits, and is written by the first of them.
No rank holds the weights of another stage: only names, shapes and check sums are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from ..averaging.average import Average
from ..averaging.gather import Form
from ..distributed.ranks import Ranks
from ..sharding import geometry, ownership
from . import crc32
from .request import AverageFiles, WeightRecord

__all__ = ["compare_shared", "forms", "lacking", "names_of_all", "unite"]

Holder = list[Any]  # [the ranks of a stage, the name that it gives the weight]


def compare_shared(
    verb: str, ranks: Ranks, stage: Sequence[int], averages: Sequence[Average]
) -> None:
    """Decide which stage writes a weight that stands on several, and compare its bits.

    Args:
        verb: The verb that compares.
        ranks: All ranks of the job.
        stage: The global ranks of this rank's stage.
        averages: The averages of this rank.

    Raises:
        ValueError: Two stages hold a weight in different forms, or with different bits. On every
            rank.

    Note:
        *Collective*. *Cost*: a message per stage; one read of the weights that stand on several.
    """
    states = averages[0].persistent
    form = {state.name: (_form(state), state.shard.aliases) for state in states}
    answer = _gather_stages(verb, ranks, stage, [list(stage), form], _shared)
    if "error" in answer:
        raise ValueError(answer["error"])
    shared: list[list[Holder]] = answer["shared"]
    writers = {name: holders[0] for holders in shared for at, name in holders if at == list(stage)}
    for state in states:
        own = [list(stage), state.name]
        # The first stage that has a weight writes it.
        state.shard.written_elsewhere = writers.get(state.name, own) != own
    if not answer["compared"]:
        return
    sums = {
        f"{i} {state.name}": _contribution(state)
        for i, average in enumerate(averages)
        for state in average.persistent
        if state.name in writers and state.shard.kind != "buffer" and state.shard.is_writer
    }
    problem = ranks.gather(verb, [list(stage), sums], partial(_other_bits, shared))
    if problem:
        raise ValueError(f"{problem} ({verb})")


def _gather_stages(
    verb: str,
    ranks: Ranks,
    stage: Sequence[int],
    message: Any,
    combine: Callable[[list[Any]], Any],
) -> Any:
    """`combine` one message of each stage. *Collective*."""
    # One rank speaks for a stage, whose ranks hold the same names.
    leads = ranks.members[ranks.rank] == stage[0]
    return ranks.gather(
        verb, message if leads else None, lambda messages: combine(list(filter(None, messages)))
    )


def _form(state: ownership.ParamState) -> list[Any]:
    shard = state.shard
    if shard.kind == "buffer":
        return ["buffer"]  # those of BatchNorm differ between ranks by nature
    return [list(shard.shape), str(shard.dtype), state.shadow is not None]


def _shared(messages: list[Any]) -> dict[str, Any]:
    """Which names stand on several stages, the first stage first."""
    leads = _leading_names(
        {name: record[1] for name, record in form.items()} for _, form in messages
    )
    holders: dict[str, list[Holder]] = {}
    forms: dict[str, list[Any]] = {}
    for stage, form in messages:
        for name, (weight_form, _) in form.items():
            lead = leads[name]
            holders.setdefault(lead, []).append([stage, name])
            if forms.setdefault(lead, weight_form) != weight_form:
                first = holders[lead][0][0]
                return {
                    "error": f"{lead} is {forms[lead]} on ranks {first} and {weight_form} on ranks "
                    f"{stage}. Stages that share a weight must hold it alike."
                }
    shared = {lead: stages for lead, stages in holders.items() if len(stages) > 1}
    # Buffers may differ, so where only those are shared no sums are sent.
    compared = any(forms[lead] != ["buffer"] for lead in shared)
    return {"shared": list(shared.values()), "compared": compared}


def _leading_names(tables: Iterable[Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """Every name of a weight, and the one that the first stage with it gives it.

    Names that one stage ties are one weight on all.

    Args:
        tables: name -> aliases, of each stage.
    """
    leads: dict[str, str] = {}
    for table in tables:
        for name, aliases in table.items():
            known = {leads[alias] for alias in (name, *aliases) if alias in leads}
            lead = next(iter(known), name)
            if len(known) > 1:  # this stage ties what earlier ones did not
                lead = next(alias for alias in leads if alias in known)
                leads = {alias: lead if old in known else old for alias, old in leads.items()}
            leads |= dict.fromkeys((name, *aliases), lead)
    return leads


def _contribution(state: ownership.ParamState) -> int:
    """What this rank's elements add to the check sum of the average's row-major bytes."""
    shape, data = state.shard.shape, state.average_in(state.owned_region)
    size = torch.Size(shape).numel() * data.itemsize
    total = crc32.RangeSum(size)
    for box, view in geometry.boxes_with_data(state.shard, state.owned_region, data):
        for block in geometry.split_box(box, ownership.MAX_BLOCK // data.itemsize):
            part = geometry.bytes_of(view[block.within(box)].cpu().contiguous())
            for start, run in geometry.byte_runs(block, shape, part, data.itemsize):
                total.add(start, run)
    return total.contribution


def _other_bits(shared: Sequence[Sequence[Holder]], messages: list[Any]) -> str:
    """The first weight whose bits differ between stages."""
    sums: dict[str, dict[str, int]] = {}  # by stage
    for stage, stage_sums in messages:
        sums[str(stage)] = crc32.combine([sums.get(str(stage), {}), stage_sums])
    table: dict[tuple[str, str], dict[str, int]] = {}  # stage, name -> sum of each average
    for stage, stage_sums in sums.items():
        for key, total in stage_sums.items():
            number, _, name = key.partition(" ")
            table.setdefault((stage, name), {})[number] = total
    for (first, name), *others in shared:
        for other, alias in others:
            if table.get((str(first), name)) != table.get((str(other), alias)):
                return (
                    f"{name} stands on two stages and has other bits on ranks {first} than on "
                    f"ranks {other}. Give both the same values, and the same gradients"
                )
    return ""


def unite(
    verb: str, ranks: Ranks, stage: Sequence[int], files: Sequence[AverageFiles]
) -> list[AverageFiles]:
    """The same files, with the inventory of all stages. *Collective*."""
    united = _gather_stages(verb, ranks, stage, [file.inventory for file in files], _united)
    return [
        replace(
            file, inventory_of_all={name: WeightRecord(*fields) for name, fields in table.items()}
        )
        for file, table in zip(files, united, strict=True)
    ]


def _united(messages: list[Any]) -> list[dict[str, WeightRecord]]:
    """One table for each average. What stands on several stages has the names of all."""
    return [_merged(tables) for tables in zip(*messages, strict=True)]


def _merged(tables: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, WeightRecord]:
    stages = [
        {name: WeightRecord(*record_fields) for name, record_fields in table.items()}
        for table in tables
    ]
    leads = _leading_names(
        {name: record.aliases for name, record in table.items()} for table in stages
    )
    merged: dict[str, WeightRecord] = {}
    for name, record in ((name, record) for table in stages for name, record in table.items()):
        known = merged.get(leads[name], record)
        merged[leads[name]] = known._replace(aliases=[], own=known.own or record.own)
    for name, lead in sorted(leads.items()):
        if name != lead:
            merged[lead].aliases.append(name)
    return merged


def names_of_all(
    verb: str, ranks: Ranks, stage: Sequence[int], states: Sequence[ownership.ParamState]
) -> frozenset[str]:
    """The names of the weights and buffers of all stages, with aliases. *Collective*."""
    names = [name for state in states for name in state.shard.names]
    return frozenset(
        _gather_stages(verb, ranks, stage, names, lambda stages: list(chain.from_iterable(stages)))
    )


def lacking(messages: list[list[str]]) -> str:
    """The error on which all stages agree, "" if one of them has none."""
    return next((text for text in messages[0] if all(text in lacks for lacks in messages)), "")


def forms(files: AverageFiles) -> dict[str, Form]:
    """What `gather` needs to know of the weights of all stages."""
    return {
        name: Form(record.shape, getattr(torch, record.saved_dtype), record.aliases)
        for name, record in files.inventory.items()
    }
