"""Which table of a foreign checkpoint is the average: a rule for each kind of writer. No torch.

A checkpoint is a tree: mappings, lists, numbers and texts, with a `Leaf` for each tensor. A rule
looks at one mapping of the tree and recognises an average by the keys alone. The facts behind the
rules:

kind         where the average is                                              its clock
torch        n_averaged and module.NAME: torch's AveragedModel                 n_averaged
lightning    state_dict, where averaging_state stands beside it (the callback  n_averaged, epoch,
             WeightAveraging moves the live weights to current_model_state);
             callbacks.NAME.average_model_state (StochasticWeightAveraging)
timm         state_dict_ema                                                    epoch
ema-pytorch  ema_model.NAME beside initted and step;                           step
             ema_models.I.ema_model.NAME: one of several profiles
ldm          model_ema.NAME, NAME without its dots; live under model.NAME      model_ema.num_updates
diffusers    shadow_params, a list without names, beside optimization_step     optimization_step
torch-ema    shadow_params, a list without names, beside num_updates           num_updates
mmengine     state_dict, where ema_state_dict holds steps and module.NAME: the steps
             hook exchanges the two, so ema_state_dict is the live model
dist-ema     averages.LABEL.weights.NAME beside clock: what EMA.state_dict     clock
             gives to torch.distributed.checkpoint; LABEL was the schedule
             before it became average_0, average_1 ...
raw          a table of tensors under a key that says so: ema, model_ema ...   numbers beside it
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint.strict_json import parse_json
from ..dtypes import NUMPY, Bytes
from ..schedules import from_dict
from ..text import some

__all__ = ["DIFFUSERS", "KINDS", "FoundAverage", "Leaf", "at", "find", "scalar"]

KINDS = (
    "torch", "lightning", "timm", "ema-pytorch", "ldm", "diffusers", "torch-ema", "mmengine",
    "dist-ema", "raw",
)  # fmt: skip
DIFFUSERS = (
    "optimization_step", "decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
)  # fmt: skip
_AVERAGE = re.compile(r"(^|[_.])(ema|average|averaged|avg|swa|shadow|polyak|teacher)([_.]|\d|$)")
_DIST_EMA_CLOCK = ("now", "before", "steps", "updates", "pending", "started", "accepted")
_MAX_DEPTH = 8
_MOST_SCHEDULE = 1024  # bytes of JSON


@dataclass(frozen=True)
class Leaf:
    """A tensor in a file."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Callable[[int, int], Bytes]  # its bytes [begin, end), in row-major order
    key: Hashable  # the same for leaves that are one tensor, as tied weights are


@dataclass(frozen=True)
class FoundAverage:
    """A table of tensors that can be converted."""

    key: str  # where it lies, keys joined by dots; '' is the whole file
    kind: str
    weights: Mapping[str, Leaf]  # by the model's names
    why: str  # what shows the kind
    average: bool = True  # False: live, or not known
    nameless: Sequence[Leaf] = ()  # in place of weights: in the order of model.parameters()
    extra: Mapping[str, Any] = field(default_factory=dict)  # its clock and decay
    rest: Mapping[str, Leaf] = field(default_factory=dict)  # live weights, for what is not averaged


def find(tree: Any) -> list[FoundAverage]:
    """Find every table in the tree that could be converted, averages first."""
    tables = list(_walk(tree, (), set()))
    # A table that a rule recognised is no raw one too.
    recognised = {table.key for table in tables if table.kind != "raw"}
    tables = [table for table in tables if table.kind != "raw" or table.key not in recognised]
    return sorted(tables, key=lambda table: (not table.average, table.kind == "raw", table.key))


def at(tree: Any, key: str) -> FoundAverage:
    """Find the table at a key, or the weights whose names begin with it.

    Raises ValueError if there is none.
    """
    tables = find(tree)
    for table in tables:
        if table.key == key:
            return table
    for node, prefix in _reach(tree, key):
        if weights := _under(_leaves(node), prefix):
            average = bool(_AVERAGE.search(key.lower()))
            return FoundAverage(key, "raw", weights, "chosen by its key", average)
    keys = some([repr(table.key) for table in tables], 10) or "none"
    raise ValueError(f"there is no table of tensors at {key!r}; there are {keys}.")


def _reach(node: Any, key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The mappings on the way to a key, each with the rest of the key.

    NOTE: keys may hold dots themselves.
    """
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        if key == name and isinstance(value, Mapping):
            yield value, ""
        elif isinstance(name, str) and key.startswith(f"{name}."):
            yield from _reach(value, key[len(name) + 1 :])
    yield node, f"{key}."


def _walk(node: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[FoundAverage]:
    if len(path) > _MAX_DEPTH or id(node) in seen:
        return
    seen.add(id(node))
    key, last = ".".join(path), path[-1] if path else ""
    children: list[tuple[str, Any]] = []
    if isinstance(node, Mapping):
        for rule in _RULES:
            yield from rule(node, key, last)
        if all(isinstance(name, str) for name in node):  # the states of an optimizer are numbered
            skipped = "averages" if any(_dist_ema(node, key, last)) else None
            children = [(name, value) for name, value in node.items() if name != skipped]
    elif isinstance(node, (list, tuple)) and node:
        if _AVERAGE.search(last.lower()) and last != "shadow_params" and _are_leaves(node):
            yield FoundAverage(key, "raw", {}, f"a list of tensors under {last!r}", True, node)
        children = [(str(i), value) for i, value in enumerate(node) if isinstance(value, Mapping)]
    for name, value in children:
        yield from _walk(value, (*path, name), seen)


def _are_leaves(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Leaf) for value in values)


def _leaves(node: Any) -> dict[str, Leaf]:
    items = node.items() if isinstance(node, Mapping) else ()
    return {
        name: value for name, value in items if isinstance(name, str) and isinstance(value, Leaf)
    }


def _under(leaves: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf]:
    return {name[len(prefix) :]: leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def _numbers(node: Any, *names: str) -> dict[str, Any]:
    """The entries of these names that are numbers or texts."""
    mapping = node if isinstance(node, Mapping) else {}
    scalars = {name: scalar(mapping.get(name)) for name in names}
    return {name: value for name, value in scalars.items() if value is not None}


def scalar(value: Any) -> Any:
    """A number or text; a tensor of one element as the number that it holds; None for all else."""
    if isinstance(value, Leaf):
        if math.prod(value.shape) != 1:
            return None
        kind = NUMPY[value.dtype]
        value = value.read(0, kind.itemsize).view(kind)[0].item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, (bool, int, float, str)) else None


# --- rules: (node, its key, the last part of the key) -> the averages in it -----------------------


def _torch(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    weights = _under(_leaves(node), "module.")
    if weights and "n_averaged" in node:
        why = "n_averaged and module.*"
        yield FoundAverage(key, "torch", weights, why, extra=_numbers(node, "n_averaged"))
    elif weights and "steps" in node:
        live = last == "ema_state_dict"
        why = (
            "exchanged with state_dict by mmengine: the live weights"
            if live
            else "steps and module.*"
        )
        yield FoundAverage(key, "mmengine", weights, why, not live, extra=_numbers(node, "steps"))


def _lightning(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    extra = _numbers(node, "global_step", "epoch", "pytorch-lightning_version")
    if "averaging_state" in node and "current_model_state" in node:
        extra |= _numbers(node["averaging_state"], "n_averaged")
        why = "averaging_state beside it: WeightAveraging put the average here"
        weights = _leaves(node.get("state_dict"))
        yield FoundAverage(_join(key, "state_dict"), "lightning", weights, why, extra=extra)
    callbacks = node.get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        weights = _leaves(state.get("average_model_state")) if isinstance(state, Mapping) else {}
        if weights:
            where = _join(key, f"callbacks.{name}.average_model_state")
            more = extra | _numbers(state, "n_averaged", "latest_update_epoch")
            why = f"the state of the callback {name}"
            yield FoundAverage(where, "lightning", weights, why, extra=more)


def _mmengine(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    live, weights = node.get("ema_state_dict"), _leaves(node.get("state_dict"))
    extra = _numbers(live, "steps")
    if weights and extra and _under(_leaves(live), "module."):
        why = "ema_state_dict beside it, with which mmengine exchanged it: the average is here"
        yield FoundAverage(_join(key, "state_dict"), "mmengine", weights, why, extra=extra)


def _timm(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    if weights := _leaves(node.get("state_dict_ema")):
        extra, where = _numbers(node, "epoch", "arch", "metric", "version"), "state_dict_ema"
        yield FoundAverage(_join(key, where), "timm", weights, where, extra=extra)


def _ema_pytorch(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves = _leaves(node)
    several = {match[0] for match in map(re.compile(r"ema_models\.\d+\.").match, leaves) if match}
    for prefix in ("", *sorted(several, key=lambda prefix: int(prefix.split(".")[1]))):
        one = _under(leaves, prefix)
        if weights := _under(one, "ema_model."):
            where = _join(key, prefix[:-1]) if prefix else key
            why, extra = f"{prefix}ema_model.*", _numbers(one, "step", "initted")
            yield FoundAverage(where, "ema-pytorch", weights, why, extra=extra)


def _ldm(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves, where = _leaves(node), _join(key, "model_ema")
    dotless = _under(leaves, "model_ema.")
    extra = _numbers(dotless, "num_updates", "decay")
    clock = dotless.pop("num_updates", None), dotless.pop("decay", None)
    if dotless and clock[0] is not None:
        live = {name: leaf for name, leaf in leaves.items() if not name.startswith("model_ema.")}
        weights, why = _dotted(dotless, live, where), "model_ema.* with num_updates"
        yield FoundAverage(where, "ldm", weights, why, extra=extra, rest=live)


def _dotted(dotless: Mapping[str, Leaf], live: Mapping[str, Leaf], where: str) -> dict[str, Leaf]:
    """Give names that lost their dots the names of the live weights.

    Raises ValueError where name and shape leave it open.
    """
    by_dotless: dict[str, list[str]] = {}
    for name in live:  # LitEma(self.model), or LitEma(self)
        for full in {name.removeprefix("model."), name}:
            by_dotless.setdefault(full.replace(".", ""), []).append(name)
    weights: dict[str, Leaf] = {}
    for name, leaf in dotless.items():
        fits = [full for full in by_dotless.get(name, ()) if live[full].shape == leaf.shape]
        if len(fits) != 1:
            why = " and ".join(fits) or "no live weight of the same checkpoint"
            raise ValueError(
                f"{where}.{name} has lost its dots, and fits {why}, so its name is not known."
            )
        weights[fits[0]] = leaf
    return weights


def _lists(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    shadows = node.get("shadow_params")
    if isinstance(shadows, list) and shadows and _are_leaves(shadows):
        extra = _numbers(node, "num_updates", *DIFFUSERS)
        kind, why = "torch-ema", "shadow_params"
        if "optimization_step" in node:
            kind, why = "diffusers", "shadow_params and optimization_step"
        yield FoundAverage(key, kind, {}, why, True, shadows, extra)


def _dist_ema(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    averages, clock = node.get("averages"), _leaves(node).get("clock")
    if clock is None or (clock.dtype, clock.shape) != ("F64", (len(_DIST_EMA_CLOCK),)):
        return
    numbers = clock.read(0, 8 * len(_DIST_EMA_CLOCK)).view(np.float64).tolist()
    for label, state in averages.items() if isinstance(averages, Mapping) else ():
        if isinstance(state, Mapping) and (weights := _leaves(state.get("weights"))):
            schedule = _schedule_of(state) or label
            extra = {
                "schedule": schedule,
                "clock": dict(zip(_DIST_EMA_CLOCK, numbers, strict=True)),
            }
            where, why = _join(key, f"averages.{label}"), "averages and clock"
            rest = _leaves(state.get("buffers"))
            yield FoundAverage(where, "dist-ema", weights, why, extra=extra, rest=rest)


def _schedule_of(state: Mapping[str, Any]) -> str:
    """The repr of the schedule beside the weights; '' where it is not recorded."""
    leaf = _leaves(state).get("schedule")
    if leaf is None or leaf.dtype != "U8" or len(leaf.shape) != 1:
        return ""
    text = leaf.read(0, min(leaf.shape[0], _MOST_SCHEDULE)).tobytes().rstrip(b"\0")
    try:
        return repr(from_dict(parse_json(text)))
    except (AttributeError, TypeError, ValueError):
        return ""


def _raw(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves = _leaves(node)
    shaped = any(leaf.shape for leaf in leaves.values())
    only_scalars = bool(leaves) and not key and len(leaves) == len(node)  # the whole file
    if (shaped or only_scalars) and "averages" not in node:
        why = "a table of tensors" + (f" under {last!r}" if key else "")
        yield FoundAverage(key, "raw", leaves, why, bool(_AVERAGE.search(last.lower())))


_RULES: tuple[Callable[[Mapping[str, Any], str, str], Iterator[FoundAverage]], ...] = (
    _torch, _lightning, _mmengine, _timm, _ema_pytorch, _ldm, _lists, _dist_ema, _raw,
)  # fmt: skip


def _join(key: str, more: str) -> str:
    return f"{key}.{more}" if key else more
