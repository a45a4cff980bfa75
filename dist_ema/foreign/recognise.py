"""Other people's EMA checkpoints: which of their tables is the average, and what its weights are called. No torch.

A checkpoint is a tree: mappings, lists, numbers and texts, with `Leaf`s for tensors. Every rule looks at one mapping of the
tree and says what it knows by the keys alone. The facts behind the rules, and where they were seen:

kind         where the average is                                              its clock
torch        n_averaged and module.NAME: torch's AveragedModel                 n_averaged
lightning    state_dict, where averaging_state stands beside it (the callback  n_averaged, global_step, epoch
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
dist-ema     averages.SCHEDULE.weights.NAME beside clock: what EMA.state_dict  clock
             gives to torch.distributed.checkpoint
raw          a table of tensors under a key that says so: ema, model_ema ...   numbers beside it
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ..dtypes import NUMPY, Bytes

__all__ = ["KINDS", "FoundAverage", "Leaf", "at", "canonical", "find", "name", "plain"]

KINDS = (
    "torch",
    "lightning",
    "timm",
    "ema-pytorch",
    "ldm",
    "diffusers",
    "torch-ema",
    "mmengine",
    "dist-ema",
    "raw",
)
_WORDS = re.compile(r"(^|[_.])(ema|average|averaged|avg|swa|shadow|polyak|teacher)([_.]|\d|$)")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_CLOCK = ("now", "before", "steps", "updates", "pending", "started", "accepted")
_DEEPEST = 8


class Leaf(Protocol):
    """A tensor in a file: its dtype as safetensors names it, its shape, its bytes."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, begin: int, end: int) -> Bytes: ...


@dataclass(frozen=True)
class FoundAverage:
    """A table that could be converted."""

    key: str  # where it lies, keys joined by dots; '' is the whole file
    kind: str
    weights: Mapping[str, Leaf]  # by the model's names
    why: str  # what shows the kind
    average: bool = True  # or live, or not known
    nameless: Sequence[Leaf] = ()  # instead of weights: in the order of model.parameters()
    extra: Mapping[str, Any] = field(default_factory=dict)  # its clock and decay
    rest: Mapping[str, Leaf] = field(default_factory=dict)  # live weights, for what is not averaged


def find(tree: Any) -> list[FoundAverage]:
    """Every table in the tree that could be meant, averages first."""
    found = list(_walk(tree, (), set()))
    known = {each.key for each in found if each.kind != "raw"}
    sure = [each for each in found if each.kind != "raw" or each.key not in known]
    return sorted(sure, key=lambda each: (not each.average, each.kind == "raw", each.key))


def at(tree: Any, key: str) -> FoundAverage:
    """The table at a key, or the weights whose names begin with it. Raises ValueError if there is none."""
    for each in find(tree):
        if each.key == key:
            return each
    for node, prefix in _reach(tree, key):
        weights = {name: leaf for name, leaf in _leaves(node).items() if name.startswith(prefix)}
        if weights:
            cut = {name[len(prefix) :]: leaf for name, leaf in weights.items()}
            return FoundAverage(key, "raw", cut, "named by --key", bool(_WORDS.search(key.lower())))
    raise ValueError(f"there is no table of tensors at {key!r}.")


def _reach(node: Any, key: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The mappings on the way to a key, each with what is left of it. NOTE: keys may hold dots themselves."""
    if not isinstance(node, Mapping):
        return
    for name, value in node.items():
        if key == name and isinstance(value, Mapping):
            yield value, ""
        elif isinstance(name, str) and key.startswith(f"{name}."):
            yield from _reach(value, key[len(name) + 1 :])
    yield node, f"{key}."


def _walk(node: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[FoundAverage]:
    if len(path) > _DEEPEST or id(node) in seen:
        return
    seen.add(id(node))
    key, last = ".".join(path), path[-1] if path else ""
    if isinstance(node, Mapping):
        for rule in _RULES:
            yield from rule(node, key, last)
        if all(isinstance(name, str) for name in node):  # the states of an optimizer are numbered
            ours = any(_dist_ema(node, key, last))
            for name, value in node.items():
                yield from (
                    _walk(value, (*path, name), seen) if not (ours and name == "averages") else ()
                )
    elif isinstance(node, (list, tuple)) and node:
        if all(map(_is_leaf, node)) and _WORDS.search(last.lower()) and last != "shadow_params":
            yield FoundAverage(key, "raw", {}, f"a list of tensors under {last!r}", True, node)
        for i, value in enumerate(node):
            if isinstance(value, Mapping):
                yield from _walk(value, (*path, str(i)), seen)


def _is_leaf(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape") and hasattr(value, "read")


def _leaves(node: Any) -> dict[str, Leaf]:
    if not isinstance(node, Mapping):
        return {}
    return {
        name: value for name, value in node.items() if isinstance(name, str) and _is_leaf(value)
    }


def _under(leaves: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf]:
    return {name[len(prefix) :]: leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def _numbers(node: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What stands under these names, as plain values."""
    found = {name: plain(node[name]) for name in names if name in node}
    return {
        name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))
    }


def plain(value: Any) -> Any:
    """A number or text; a tensor of one element as the number it holds; None for all else."""
    if _is_leaf(value):
        if math.prod(value.shape) != 1:
            return None
        kind = NUMPY[value.dtype]
        value = value.read(0, kind.itemsize).view(kind)[0].item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, (bool, int, float, str)) else None


# --- the rules: (node, its key, the key's last part) -> what is found in it --------------------------------------


def _torch(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    weights = _under(_leaves(node), "module.")
    if weights and "n_averaged" in node:
        yield FoundAverage(
            key, "torch", weights, "n_averaged and module.*", extra=_numbers(node, "n_averaged")
        )
    elif weights and "steps" in node:
        exchanged = last == "ema_state_dict"
        why = (
            "exchanged with state_dict by mmengine: the live weights"
            if exchanged
            else "steps and module.*"
        )
        yield FoundAverage(
            key, "mmengine", weights, why, not exchanged, extra=_numbers(node, "steps")
        )


def _lightning(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    said = _numbers(node, "global_step", "epoch", "pytorch-lightning_version")
    if "averaging_state" in node and "current_model_state" in node:
        said |= (
            _numbers(node["averaging_state"], "n_averaged")
            if isinstance(node["averaging_state"], Mapping)
            else {}
        )
        why = "averaging_state beside it: WeightAveraging put the average here"
        yield FoundAverage(
            _join(key, "state_dict"), "lightning", _leaves(node.get("state_dict")), why, extra=said
        )
    callbacks = node.get("callbacks")
    for name, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        weights = _leaves(state.get("average_model_state")) if isinstance(state, Mapping) else {}
        if weights:
            where = _join(key, f"callbacks.{name}.average_model_state")
            extra = said | _numbers(state, "n_averaged", "latest_update_epoch")
            yield FoundAverage(
                where, "lightning", weights, f"the state of the callback {name}", extra=extra
            )


def _mmengine(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    live = node.get("ema_state_dict")
    weights = _leaves(node.get("state_dict"))
    if (
        weights
        and isinstance(live, Mapping)
        and "steps" in live
        and _under(_leaves(live), "module.")
    ):
        why = "ema_state_dict beside it, with which mmengine exchanged it: the average is here"
        yield FoundAverage(
            _join(key, "state_dict"), "mmengine", weights, why, extra=_numbers(live, "steps")
        )


def _timm(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    weights = _leaves(node.get("state_dict_ema"))
    if weights:
        extra = _numbers(node, "epoch", "arch", "metric", "version")
        yield FoundAverage(
            _join(key, "state_dict_ema"), "timm", weights, "state_dict_ema", extra=extra
        )


def _ema_pytorch(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves = _leaves(node)
    weights = _under(leaves, "ema_model.")
    if weights:
        yield FoundAverage(
            key, "ema-pytorch", weights, "ema_model.*", extra=_numbers(node, "step", "initted")
        )
    profiles = sorted(
        {
            match[1]
            for name in leaves
            if (match := re.match(r"ema_models\.(\d+)\.ema_model\.", name))
        },
        key=int,
    )
    for i in profiles:
        one = _under(leaves, f"ema_models.{i}.")
        where = _join(key, f"ema_models.{i}")
        yield FoundAverage(
            where,
            "ema-pytorch",
            _under(one, "ema_model."),
            "ema_models.*",
            extra=_numbers(one, "step", "initted"),
        )


def _ldm(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves = _leaves(node)
    shadows = _under(leaves, "model_ema.")
    extra = _numbers(shadows, "num_updates", "decay")
    short = {name: leaf for name, leaf in shadows.items() if name not in ("num_updates", "decay")}
    if short and "num_updates" in shadows:
        live = {name: leaf for name, leaf in leaves.items() if not name.startswith("model_ema.")}
        weights = _dotted(short, live, _join(key, "model_ema"))
        yield FoundAverage(
            _join(key, "model_ema"),
            "ldm",
            weights,
            "model_ema.* with num_updates",
            extra=extra,
            rest=live,
        )


def _dotted(short: Mapping[str, Leaf], live: Mapping[str, Leaf], where: str) -> dict[str, Leaf]:
    """Names without dots under those of the live weights. Raises ValueError where that is not told by name and shape."""
    by_short: dict[str, list[str]] = {}
    for name in live:  # LitEma(self.model), or LitEma(self)
        for each in {name.removeprefix("model."), name}:
            by_short.setdefault(each.replace(".", ""), []).append(name)
    weights: dict[str, Leaf] = {}
    for name, leaf in short.items():
        fits = [each for each in by_short.get(name, ()) if live[each].shape == leaf.shape]
        if len(fits) != 1:
            why = (
                f"fits {' and '.join(fits)}"
                if fits
                else "fits no live weight of the same checkpoint"
            )
            raise ValueError(
                f"{where}.{name} has lost its dots, and {why}, so its name is not known."
            )
        weights[fits[0]] = leaf
    return weights


def _lists(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    shadows = node.get("shadow_params")
    if isinstance(shadows, list) and shadows and all(map(_is_leaf, shadows)):
        ours = "optimization_step" in node
        extra = _numbers(
            node, "num_updates", "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
            "inv_gamma", "power",
        )  # fmt: skip
        why = "shadow_params and optimization_step" if ours else "shadow_params"
        yield FoundAverage(key, "diffusers" if ours else "torch-ema", {}, why, True, shadows, extra)


def _dist_ema(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    averages, clock = node.get("averages"), _leaves(node).get("clock")
    if (
        not isinstance(averages, Mapping)
        or clock is None
        or clock.dtype != "F64"
        or clock.shape != (len(_CLOCK),)
    ):
        return
    hands = dict(zip(_CLOCK, clock.read(0, 8 * len(_CLOCK)).view(np.float64).tolist(), strict=True))
    for schedule, state in averages.items():
        if isinstance(state, Mapping) and _leaves(state.get("weights")):
            where = _join(key, f"averages.{schedule}")
            weights = _leaves(state["weights"])
            extra = {"schedule": schedule, "clock": hands}
            yield FoundAverage(
                where,
                "dist-ema",
                weights,
                "averages and clock",
                extra=extra,
                rest=_leaves(state.get("buffers")),
            )


def _raw(node: Mapping[str, Any], key: str, last: str) -> Iterator[FoundAverage]:
    leaves = _leaves(node)
    shaped = [leaf for leaf in leaves.values() if leaf.shape]
    alone = (
        bool(leaves) and not key and len(leaves) == len(node)
    )  # a file of scalars and of nothing else
    if (shaped or alone) and "averages" not in node:
        why = f"a table of tensors under {last!r}" if key else "a table of tensors"
        yield FoundAverage(key, "raw", leaves, why, bool(_WORDS.search(last.lower())))


_RULES: tuple[Callable[[Mapping[str, Any], str, str], Iterator[FoundAverage]], ...] = (
    _torch, _lightning, _mmengine, _timm, _ema_pytorch, _ldm, _lists, _dist_ema, _raw,
)  # fmt: skip


def _join(key: str, more: str) -> str:
    return f"{key}.{more}" if key else more


# --- names -------------------------------------------------------------------------------------------------------


def name(
    found: FoundAverage, names: Mapping[str, Leaf] | Sequence[str], ordered: bool
) -> FoundAverage:
    """Give names to a list without any: those of the model's parameters, in their order.

    names: a live model, or the names alone. Statistics and integers of a model are no parameters, and become `rest`.
    ordered: False where files sort the names, so that only a shape that nothing else has tells. Raises ValueError.
    """
    if not isinstance(names, Mapping):
        return replace(found, weights=_pair(found, list(names)), nameless=())
    # A tied weight is one parameter.
    once = {getattr(leaf, "key", each): each for each, leaf in reversed(list(names.items()))}
    ours = {
        each: leaf
        for each, leaf in names.items()
        if _is_parameter(each, leaf) and each in once.values()
    }
    weights = _pair(found, list(ours)) if ordered else _by_shape(found, ours)
    wrong = [each for each in weights if weights[each].shape != ours[each].shape]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is {weights[wrong[0]].shape} by its place in the list, {ours[wrong[0]].shape} in the model: the two "
            f"are not of one model, or the list leaves out parameters. Give the names as a JSON list."
        )
    return replace(found, weights=weights, nameless=(), rest=names)


def _is_parameter(name: str, leaf: Leaf) -> bool:
    return leaf.dtype.startswith(("F", "BF", "C")) and name.rpartition(".")[2] not in _STATISTICS


def _pair(found: FoundAverage, names: list[str]) -> dict[str, Leaf]:
    if len(set(names)) != len(found.nameless):
        raise ValueError(
            f"{len(found.nameless)} tensors without names, and {len(set(names))} names for them. Give the names of exactly "
            f"the parameters that were averaged, as a JSON list."
        )
    return dict(zip(names, found.nameless, strict=True))


def _by_shape(found: FoundAverage, ours: Mapping[str, Leaf]) -> dict[str, Leaf]:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for each, leaf in ours.items():
        shapes.setdefault(leaf.shape, []).append(each)
    _pair(found, list(ours))
    for shadow in found.nameless:
        fits = shapes.get(shadow.shape, [])
        if len(fits) != 1:
            raise ValueError(
                f"a tensor of shape {shadow.shape} has no name, and {len(fits)} weights of that shape are in the model "
                f"({', '.join(fits[:3])}), whose file sorts them by name: their order is lost. Give a file that keeps it: "
                f"torch.save(model.state_dict(), 'live.pt'), or a JSON list of the names in model.named_parameters()."
            )
    return {shapes[shadow.shape][0]: shadow for shadow in found.nameless}


def canonical(weights: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Names without what wrappers add. Raises ValueError where two become one."""
    cut = all(each.startswith("module.") for each in weights)
    names = {each: _unwrapped(each.removeprefix("module.") if cut else each) for each in weights}
    seen: dict[str, str] = {}
    for old, new in names.items():
        if new in seen:
            raise ValueError(
                f"{old} and {seen[new]} are both {new} without their wrappers. Choose with --key or --prefix."
            )
        seen[new] = old
    return {new: weights[old] for new, old in seen.items()}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
