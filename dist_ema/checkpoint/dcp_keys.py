"""`Averages`: the keys of averages in a checkpoint of DCP, and which saved average is which.

[Note: keys of DCP]  `dcp.load` calls `state_dict` before it opens the checkpoint, and refuses a key
that the checkpoint lacks. So a key holds nothing that a resumed run may change, and buffers, whose
shapes may change, are asked for as they were saved. Earlier versions had the schedule's repr in
place of `average_0`. In place of `own_by_name` they had `own`, one number for each floating buffer
in the order of the model. `Averages` reads those too.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..averaging.average import Average
from ..schedules import Schedule, from_dict
from . import dcp, read_plan

if TYPE_CHECKING:  # a program that never calls DCP does not pay for its import
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["Averages", "match_all"]

# Groups: where the key begins, and the label of the average.
_OWN_BUFFERS_KEY = re.compile(r"((?:.*\.)?averages\.(.+)\.)own(?:_by_name)?")
_AVERAGE_KEY = re.compile(r"average_[0-9]+")


class Averages(dict[str, Any]):
    """average_0, average_1 ... -> `dcp.state` of that average.

    While `dcp.load` asks for the keys, they are those of its checkpoint ([Note: keys of DCP]).
    """

    def __init__(self, averages: Sequence[Average]) -> None:
        super().__init__({f"average_{i}": dcp.state(each) for i, each in enumerate(averages)})
        self._schedules = [each.schedule for each in averages]
        self.saved_labels = list(self)  # as the checkpoint calls them

    def items(self) -> Any:  # type: ignore[override]
        metadata = _metadata_of_load()
        if metadata is None:
            return super().items()
        keys = list(metadata.state_dict_metadata)
        labels = [match[2] for match in map(_OWN_BUFFERS_KEY.fullmatch, keys) if match]
        if not labels:
            others = ", ".join(sorted({key.split(".")[0] for key in keys})[:5])
            raise ValueError(
                f"the checkpoint holds no average of dist_ema, only {others or 'nothing'}. Leave "
                "the EMA out of dcp.load() to start from the live weights, or name a checkpoint of "
                'dcp.save({"ema": ema}).'
            )
        self.saved_labels = _labels_of(labels, self._schedules)
        # NOTE: DCP assigns what it iterates, so the dict may hold the saved labels by now, too.
        shown = {}
        for i, label in enumerate(self.saved_labels):
            state = shown[label] = self[f"average_{i}"]
            _adapt(state, label, metadata.state_dict_metadata)
            if not _AVERAGE_KEY.fullmatch(label):  # no schedule was saved beside the weights then
                shown[label] = {key: value for key, value in state.items() if key != "schedule"}
        return shown.items()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of a class that torch.load(weights_only=True) knows.
        return OrderedDict, (), None, None, iter(super().items())


def _metadata_of_load() -> Metadata | None:
    """The metadata of the checkpoint that a planner of `dcp.load` is about to read, else None.

    NOTE: DCP gives a Stateful no way to see the checkpoint. So this looks for the planner up the
    stack. Without one, or with one that loads what it finds, the keys are this version's.
    """
    if "torch.distributed.checkpoint" not in sys.modules:
        return None
    from torch.distributed.checkpoint import LoadPlanner, Metadata

    for frame, _ in traceback.walk_stack(sys._getframe()):
        planner = frame.f_locals.get("self")
        if isinstance(planner, LoadPlanner):
            partial = getattr(planner, "allow_partial_load", False)
            metadata = frame.f_locals.get("metadata", getattr(planner, "metadata", None))
            return metadata if isinstance(metadata, Metadata) and not partial else None
    return None


def _labels_of(found: Collection[str], schedules: Sequence[Schedule]) -> list[str]:
    """The key of a saved average for each schedule. Raises ValueError where that is not clear."""
    labels = [f"average_{i}" for i in range(len(schedules))]
    if any(map(_AVERAGE_KEY.fullmatch, found)):
        if missing := [label for label in labels if label not in found]:
            count = len(labels) - len(missing)
            raise ValueError(
                f"the checkpoint holds {count} averages, this EMA has {len(labels)}: build it with "
                f"{count} schedules."
            )
        return labels
    names = [repr(schedule) for schedule in schedules]
    if not found:
        raise ValueError(
            f"the state_dict of the EMA lacks {', '.join(names)}. Pass what ema.state_dict() gave."
        )
    unmatched = [name for name in dict.fromkeys(found) if name not in names]
    missing = [name for name in names if name not in found]
    if len(missing) > 1 or (missing and len(unmatched) != 1):
        raise ValueError(
            f"the checkpoint holds averages of {', '.join(found)}, this EMA has "
            f"{', '.join(names)}. Build the EMA with the saved schedules, load, and save it with "
            "this version; from then on any schedule can go on."
        )
    return [name if name in found else unmatched[0] for name in names]


def _adapt(state: dict[str, Any], label: str, tables: Mapping[str, Any]) -> None:
    """Give `state` the buffers of a checkpoint ([Note: keys of DCP]). Idempotent.

    Args:
        state: As `dcp.state` gave it.
        label: The label of the average, in the checkpoint.
        tables: key -> what the checkpoint's metadata says of it.

    Raises:
        ValueError: The checkpoint does not fit, by name.
    """
    matches = [
        match for match in map(_OWN_BUFFERS_KEY.fullmatch, tables) if match and match[2] == label
    ]
    weights, live = state["weights"], state["buffers"]
    live_keys = {f"weights.{name}" for name in weights} | {f"buffers.{name}" for name in live}

    def differing(start: str) -> int:
        tensor_keys = (f"{start}weights.", f"{start}buffers.")
        saved_keys = {key.removeprefix(start) for key in tables if key.startswith(tensor_keys)}
        return len(live_keys ^ saved_keys)

    # Several EMAs may be in one checkpoint; DCP does not say under which of its keys this one is.
    start = min((match[1] for match in matches), key=differing)
    saved_sizes = {key: getattr(table, "size", None) for key, table in tables.items()}
    unlike = [
        name for name in weights if saved_sizes.get(f"{start}weights.{name}") != weights[name].shape
    ]
    if unlike:
        raise ValueError(
            f"the checkpoint holds no average of {', '.join(unlike[:5])}, or one of another shape. "
            "Build the EMA on the model as it was saved, load, edit the model, and call "
            "ema.rescan()."
        )
    buffers = _buffers_as_saved(live, tables, f"{start}buffers.")
    if f"{start}own_by_name" not in tables:
        if unknown := [name for name in buffers if name not in live]:
            raise ValueError(
                f"the checkpoint is of an earlier version, and holds {', '.join(unknown[:5])}, "
                "which the model lacks. Load it into the model as it was, and save it with this "
                "version."
            )
        state["own"] = state.pop("own_by_name", state.get("own"))
    elif tables[f"{start}own_by_name"].size.numel() < len(buffers):  # of stages, one wrote it
        buffers = {name: value for name, value in buffers.items() if name in live}
    key = "own" if "own" in state else "own_by_name"
    if len(state[key]) != len(buffers):
        state[key] = torch.zeros(len(buffers), dtype=torch.uint8, device="cpu")
    state["buffers"] = buffers


def _buffers_as_saved(
    live: Mapping[str, Any], tables: Mapping[str, Any], start: str
) -> dict[str, Any]:
    """A place for each saved buffer: that of the model, where it has the saved shape."""
    saved = {key.removeprefix(start): tables[key] for key in tables if key.startswith(start)}
    order = [name for name in live if name in saved]  # that of the model
    order += [name for name in saved if name not in live]
    return {
        name: live[name]
        if name in live and tuple(live[name].shape) == tuple(saved[name].size)
        else torch.empty(saved[name].size, dtype=saved[name].properties.dtype, device="cpu")
        for name in order
    }


def match_all(
    saved: Mapping[str, Any], averages: Sequence[Average]
) -> tuple[list[dcp.Matched], list[str]]:
    """`match` for each average, with the saved one of the same schedule or the next in order.

    Returns:
        The matches, and a remark on every average that goes on with another schedule.
    """
    wanted = [average.schedule.to_dict() for average in averages]
    labels = _labels_of(saved, [average.schedule for average in averages])
    states = [saved[label] for label in labels]
    recorded = [_schedule_of(state, default) for state, default in zip(states, wanted, strict=True)]
    order = read_plan.match_schedules(recorded, wanted)
    saved_labels = saved.saved_labels if isinstance(saved, Averages) else labels
    names = [
        repr(from_dict(recorded[k])) if _AVERAGE_KEY.fullmatch(saved_labels[k]) else saved_labels[k]
        for k in order
    ]
    remarks = [
        f"the checkpoint was averaged with {name}; this EMA goes on with {average.schedule!r}."
        for name, average in zip(names, averages, strict=True)
        if name != repr(average.schedule)
    ]
    matched = [dcp.match(states[k], average) for k, average in zip(order, averages, strict=True)]
    reshaped = sorted(
        {
            name
            for k, (_, own) in zip(order, matched, strict=True)
            for name in dcp.own_names(states[k]) - {*own}
        }
    )
    if reshaped:
        remarks.append(
            f"the checkpoint holds recalibrated buffers ({', '.join(reshaped[:5])}) of a module "
            "that has others now: the average uses the model's."
        )
    if order != sorted(order):  # values that alias other shadows would be overwritten
        # Without copies the second average would read what the first has overwritten.
        matched = [([(s, value.clone()) for s, value in copies], own) for copies, own in matched]
    return matched, remarks


def _schedule_of(state: Mapping[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The schedule that an average was saved with; `default` where it is not recorded."""
    if "schedule" not in state:
        return default
    try:
        schedule: dict[str, Any] = json.loads(bytes(state["schedule"].tolist()).rstrip(b"\0"))
        from_dict(schedule)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the schedule in the state_dict of the EMA is damaged: {error}. Pass what "
            "ema.state_dict() gave."
        ) from None
    return schedule
