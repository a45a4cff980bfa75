"""One average as tensors of a state_dict, for torch.distributed.checkpoint (DCP), and back.

    weights.NAME    the shadow
    buffers.NAME    every buffer
    own_by_name     1 for each of them that the average has for itself, sorted
    schedule        JSON, padded with zeros to a fixed shape

`dcp_keys` puts several under `averages.average_0`, ... All values are tensors, because DCP pickles
everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..averaging.average import Average, whole_modules
from ..sharding import geometry, ownership, records
from . import flat_range
from .read_plan import converts

__all__ = ["Matched", "match", "own_names", "state", "whole"]

SCHEDULE_BYTES = 1024  # the shape must not depend on the schedule

# (shadow, value) pairs, own buffers
Matched = tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]


def state(average: Average) -> dict[str, Any]:
    """One average as tensors: weights, buffers, which of them are its own, its schedule.

    Note:
        *Aliases* the shadows; buffers are copies.
    """
    own, buffers = average.own_buffers, average.buffers
    live = {
        param.name: param.local if param.teacher_copy is None else param.teacher_copy
        for param in buffers
    }
    copies = {name: own.get(name, value).clone() for name, value in live.items()}
    text = json.dumps(average.schedule.to_dict()).encode().ljust(SCHEDULE_BYTES, b"\0")
    assert len(text) == SCHEDULE_BYTES, "a schedule is a few numbers"
    as_bytes: dict[str, Any] = {"dtype": torch.uint8, "device": "cpu"}
    return {
        "weights": {
            param.name: _entry(param, param.averaged_region, param.own_shadow)
            for param in average.averaged
        },
        "buffers": {
            param.name: _entry(param, param.shard.local_region, copies[param.name])
            for param in buffers
        },
        "own_by_name": torch.tensor([name in own for name in sorted(live)], **as_bytes),
        "schedule": torch.tensor(list(text), **as_bytes),
    }


def whole(states: Sequence[ownership.ParamState], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """One average under the names of the model's state_dict, aliases included.

    Frozen weights and buffers are live.
    """
    entries: dict[str, Tensor] = {}
    for state in states:
        if state.shadow is not None:
            entry = _entry(state, state.averaged_region, state.shadow)
        else:
            entry = _entry(
                state, state.shard.local_region, own.get(state.name, state.local).clone()
            )
        entries |= dict.fromkeys(state.shard.names, entry)
    return entries


def _entry(state: ownership.ParamState, region: records.Region, data: Tensor) -> Tensor:
    """A plain tensor where this rank holds all of the weight and writes it; else a FlatRange."""
    shape = state.shard.shape
    blocks = [
        (box.offsets, part) for box, part in geometry.boxes_with_data(state.shard, region, data)
    ]
    # NOTE: of plain tensors under one name DCP writes any rank's. A buffer's must be the writer's.
    if region.numel == math.prod(shape) and state.shard.is_writer:
        return blocks[0][1] if blocks else data.view(shape)
    return flat_range.FlatRange(
        shape, data.dtype, data.device, blocks, state.saved_region.numel > 0
    )


def match(saved_state: Mapping[str, Any], average: Average) -> Matched:
    """Pair the shadows of one average with the values of `state`. Nothing is written.

    Returns:
        (shadow, value) pairs of one shape, and the memory of the own buffers among them.

    Raises:
        ValueError: A value is missing or does not fit.
    """
    missing = [key for key in ("weights", "buffers") if key not in saved_state]
    missing += [] if {"own_by_name", "own"} & saved_state.keys() else ["own_by_name"]
    weights = saved_state.get("weights", {})
    missing = missing or [state.name for state in average.averaged if state.name not in weights]
    if missing:
        raise ValueError(
            f"the state_dict of the EMA lacks {', '.join(missing[:5])}. Pass what "
            "ema.state_dict() gave."
        )
    copies: list[tuple[Tensor, Tensor]] = []
    for state in average.averaged:
        copies += _pairs(state, state.averaged_region, state.own_shadow, weights[state.name])
    own, flagged = {}, own_names(saved_state)
    for state in average.buffers:
        value, into = saved_state["buffers"].get(state.name), state.teacher_copy
        if value is None:
            continue
        if state.name in flagged and into is None and tuple(value.shape) == state.shard.shape:
            into = own[state.name] = state.local.clone()
        if into is not None:
            copies += _pairs(state, state.shard.local_region, into, value)
    return copies, {name: own[name] for name in whole_modules(own, flagged - own.keys())}


def own_names(state: Mapping[str, Any]) -> set[str]:
    """The names of the buffers that the average has for itself."""
    if "own_by_name" in state:
        names, flags = sorted(state["buffers"]), state["own_by_name"].tolist()
    else:  # of an earlier version ([Note: keys of DCP] in dcp_keys)
        names, flags = list(state["buffers"]), state["own"].tolist()
    if len(names) != len(flags):
        raise ValueError(
            f"the state_dict of the EMA has {len(names)} buffers, and says of {len(flags)} whose "
            "they are. Pass what ema.state_dict() gave."
        )
    return {name for name, flag in zip(names, flags, strict=True) if flag}


def _pairs(
    state: ownership.ParamState, region: records.Region, data: Tensor, value: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair `data` with `value`: the full weight, or what `_entry` gave for the same region."""
    # Here, because a copy that fails leaves a mixture.
    if not isinstance(value, Tensor) or value.is_meta or not converts(value.dtype, data.dtype):
        found = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value)
        raise ValueError(
            f"{state.name} is {found} in the state_dict, {data.dtype} in the average. Pass what "
            "ema.state_dict() gave."
        )
    if tuple(value.shape) != state.shard.shape:
        raise ValueError(
            f"{state.name} is {tuple(value.shape)} in the state_dict, {state.shard.shape} in the "
            "model."
        )
    blocks = value.blocks if isinstance(value, flat_range.FlatRange) else []
    parts = {(offsets, tuple(part.shape)): part for offsets, part in blocks}
    for box, part in geometry.boxes_with_data(state.shard, region, data):
        if not isinstance(value, flat_range.FlatRange):
            yield part, value[box.slices]
        elif (box.offsets, box.sizes) in parts:
            yield part, parts[box.offsets, box.sizes]
        else:
            raise ValueError(
                f"{state.name} in the state_dict is cut for another rank; load it through dcp.load."
            )
