"""`give_names`: the model's names for a list of foreign tensors; names without their wrappers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..foreign.recognise import FoundAverage, Leaf
from ..sharding.wrapper_names import canonical

__all__ = ["give_names", "without_wrappers"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def give_names(
    found: FoundAverage, names: Mapping[str, Leaf] | Sequence[str], ordered: bool
) -> FoundAverage:
    """Give a list of tensors the names of the model's parameters, in their order.

    Args:
        found: An average with `nameless` tensors.
        names: The live model, or the names alone. Its statistics and integers are no parameters,
            and become `rest`.
        ordered: The names have the order of the model's parameters. Where a file sorts them, only
            a unique shape tells.

    Raises:
        ValueError: The number, a shape or the order does not fit.
    """
    if not isinstance(names, Mapping):
        return replace(found, weights=_pair(found, list(names)), nameless=())
    # A tied weight is one parameter.
    first = {leaf.key: name for name, leaf in reversed(list(names.items()))}
    parameters = {
        name: leaf
        for name, leaf in names.items()
        if leaf.dtype.startswith(("F", "BF", "C"))
        # A list of parameters holds no buffers, and a state_dict does.
        and name.rpartition(".")[2] not in _STATISTICS
        and name in first.values()
    }
    weights = _pair(found, list(parameters)) if ordered else _by_shape(found, parameters)
    for name, leaf in weights.items():
        if leaf.shape != parameters[name].shape:
            raise ValueError(
                f"{name} is {leaf.shape} by its place in the list, {parameters[name].shape} in the "
                "model. Either they are of two models, or the list leaves out parameters: give "
                "their names as a JSON list."
            )
    return replace(found, weights=weights, nameless=(), rest=names)


def _pair(found: FoundAverage, names: list[str]) -> dict[str, Leaf]:
    if len(set(names)) != len(found.nameless):
        raise ValueError(
            f"{len(found.nameless)} tensors without names, and {len(set(names))} names for them. "
            "Give the names of exactly the parameters that were averaged, as a JSON list."
        )
    return dict(zip(names, found.nameless, strict=True))


def _by_shape(found: FoundAverage, parameters: Mapping[str, Leaf]) -> dict[str, Leaf]:
    by_shape = defaultdict[tuple[int, ...], list[str]](list)
    for name, leaf in parameters.items():
        by_shape[leaf.shape].append(name)
    _pair(found, list(parameters))  # which refuses another number of them
    for shadow in found.nameless:
        fits = by_shape[shadow.shape]
        if len(fits) != 1:
            raise ValueError(
                f"a tensor of shape {shadow.shape} has no name, and {len(fits)} weights of the "
                f"model have that shape ({', '.join(fits[:3])}). It comes from a format whose file "
                "sorts them by name, so their order is lost. Give torch.save(model.state_dict(), "
                "'live.pt'), or a JSON list of the names in model.named_parameters()."
            )
    return {by_shape[shadow.shape][0]: shadow for shadow in found.nameless}


def without_wrappers(weights: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Cut what wrappers add to names. Raises ValueError where two names become one."""
    # DDP renames every weight; a model may also have a child called `module`.
    ddp = all(old.startswith("module.") for old in weights)
    wrapped: dict[str, str] = {}  # the model's name -> the name in the checkpoint
    for old in weights:
        new = canonical(old.removeprefix("module.") if ddp else old)
        if new in wrapped:
            raise ValueError(
                f"{old} and {wrapped[new]} are both {new} without their wrappers. Choose one of "
                "the two tables by its key, or a prefix of its names."
            )
        wrapped[new] = old
    return {new: weights[old] for new, old in wrapped.items()}
