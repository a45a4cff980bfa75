"""What the stages of a pipeline hold together: one inventory, one set of files.

Ranks of one stage hold the same names, ranks of different stages others. A weight of two stages
(tied embeddings) is averaged on both, must have equal bits, and is written by the first of them.
No rank holds the weights of another stage: only names, shapes and check sums are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..averaging.gather import Form
from ..averaging.inventory import Average
from ..distributed.ranks import Ranks
from ..sharding.geometry import boxes_with_data, runs, split_box
from ..sharding.ownership import MAX_BLOCK, ParamState
from . import crc32
from .request import AverageFiles, WeightRecord

__all__ = ["agree", "forms", "lacking", "names_of_all", "unite"]

Holders = dict[str, list[list[int]]]  # name -> the ranks of each stage that holds it


def agree(verb: str, ranks: Ranks, stage: Sequence[int], averages: Sequence[Average]) -> None:
    """Decide which stage writes a weight that stands on several, and compare its bits.

    Args:
        verb: The verb that compares.
        ranks: All ranks of the job.
        stage: The global ranks of this rank's stage.
        averages: Of this rank.

    Raises:
        ValueError: Two stages hold a weight in different forms, or with different bits. On every
            rank.

    Note:
        *Collective*. *Cost*: a message per stage; one read of the weights that stand on several.
    """
    states = averages[0].persistent
    form = {state.name: _form(state) for state in states}
    leads = ranks.members[ranks.rank] == stage[0]
    answer = ranks.gather(verb, [list(stage), form] if leads else None, _shared)
    if "error" in answer:
        raise ValueError(answer["error"])
    shared: Holders = answer["shared"]
    for state in states:
        holders = shared.get(state.name, [list(stage)])
        state.shard.written_elsewhere = holders[0] != list(stage)
    compared = [name for name in shared if not answer["buffers"].count(name)]
    if not compared:
        return
    sums = {
        f"{i} {state.name}": _contribution(state)
        for i, average in enumerate(averages)
        for state in average.persistent
        if state.name in compared and state.shard.is_writer
    }
    problem = ranks.gather(verb, [list(stage), sums], partial(_other_bits, shared))
    if problem:
        raise ValueError(f"{problem} ({verb})")


def _form(state: ParamState) -> list[Any]:
    shard = state.shard
    if shard.kind == "buffer":
        return ["buffer"]  # those of BatchNorm differ between ranks by nature
    return [list(shard.shape), str(shard.dtype), state.shadow is not None]


def _shared(messages: list[Any]) -> dict[str, Any]:
    """Which names stand on several stages, the first stage first."""
    holders: Holders = {}
    forms: dict[str, list[Any]] = {}
    for stage, form in filter(None, messages):
        for name, found in form.items():
            holders.setdefault(name, []).append(stage)
            if forms.setdefault(name, found) != found:
                first = holders[name][0]
                return {
                    "error": f"{name} is {forms[name]} on ranks {first} and {found} on ranks "
                    f"{stage}. Stages that share a weight must hold it alike."
                }
    shared = {name: stages for name, stages in holders.items() if len(stages) > 1}
    return {"shared": shared, "buffers": [name for name in shared if forms[name] == ["buffer"]]}


def _contribution(state: ParamState) -> int:
    """What this rank's elements add to the check sum of the average's row-major bytes."""
    shape, data = state.shard.shape, state.average_in(state.owned_region)
    size = torch.Size(shape).numel() * data.itemsize
    total = crc32.RangeSum(size)
    for box, view in boxes_with_data(state.shard, state.owned_region, data):
        for block in split_box(box, MAX_BLOCK):
            part = view[block.within(box)].cpu().contiguous().view(-1).view(torch.uint8)
            memory, done = memoryview(part.numpy()), 0  # type: ignore[arg-type]
            for start, n in runs(block, shape):
                end = done + n * data.itemsize
                total.add(start * data.itemsize, memory[done:end])
                done = end
    return total.contribution


def _other_bits(shared: Holders, messages: list[Any]) -> str:
    """The first weight whose bits differ between stages."""
    sums: dict[str, dict[str, int]] = {}  # by stage
    for stage, found in messages:
        sums[str(stage)] = crc32.combine([sums.get(str(stage), {}), found])
    for name, (first, *others) in shared.items():
        for other in others:
            one, two = sums.get(str(first), {}), sums.get(str(other), {})
            keys = [key for key in one if key.partition(" ")[2] == name]
            if any(one[key] != two.get(key) for key in keys):
                return (
                    f"{name} stands on two stages and has other bits on ranks {first} than on "
                    f"ranks {other}. Give both the same values, and the same gradients"
                )
    return ""


def unite(
    verb: str, ranks: Ranks, stage: Sequence[int], files: Sequence[AverageFiles]
) -> list[AverageFiles]:
    """The same files, with the inventory of all stages. *Collective*."""
    leads = ranks.members[ranks.rank] == stage[0]
    tables = [file.inventory for file in files] if leads else None
    united = ranks.gather(verb, tables, _united)
    return [
        replace(file, inventory_of_all={name: WeightRecord(*each) for name, each in table.items()})
        for file, table in zip(files, united, strict=True)
    ]


def _united(messages: list[Any]) -> list[dict[str, WeightRecord]]:
    """One table for each average. What stands on several stages has the aliases of all."""
    tables: list[dict[str, WeightRecord]] = []
    for of_stage in filter(None, messages):
        tables = tables or [{} for _ in of_stage]
        for table, found in zip(tables, of_stage, strict=True):
            for name, fields in found.items():
                record = WeightRecord(*fields)
                known = table.get(name, record)
                aliases = sorted({*known.aliases, *record.aliases})
                table[name] = known._replace(aliases=aliases, own=known.own or record.own)
    return [
        {
            name: record._replace(aliases=[each for each in record.aliases if each not in table])
            for name, record in table.items()
        }
        for table in tables
    ]


def names_of_all(
    verb: str, ranks: Ranks, stage: Sequence[int], states: Sequence[ParamState]
) -> frozenset[str]:
    """The names of the weights and buffers of all stages, with aliases. *Collective*."""
    leads = ranks.members[ranks.rank] == stage[0]
    names = [name for state in states for name in (state.name, *state.shard.aliases)]
    return frozenset(ranks.gather(verb, names if leads else None, _concatenated))


def _concatenated(messages: list[Any]) -> list[str]:
    return [name for names in filter(None, messages) for name in names]


def lacking(messages: list[list[str]]) -> str:
    """What every stage says is lacking, "" if there is nothing."""
    return next((text for text in messages[0] if all(text in each for each in messages)), "")


def forms(files: AverageFiles) -> dict[str, Form]:
    """What `gather` needs to know of the weights of all stages."""
    return {
        name: Form(record.shape, getattr(torch, record.saved_dtype), record.aliases)
        for name, record in files.inventory.items()
    }
