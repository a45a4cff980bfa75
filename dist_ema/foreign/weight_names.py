"""The model's names for the weights of a foreign average: for lists without, and cut of wrappers.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..sharding.names import canonical
from .recognise import FoundAverage, Leaf

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
        ordered: Whether the mapping has the model's order. Where it is sorted by name, only a
            unique shape tells.

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
        if _is_parameter(name, leaf) and name in first.values()
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


def _is_parameter(name: str, leaf: Leaf) -> bool:
    return leaf.dtype.startswith(("F", "BF", "C")) and name.rpartition(".")[2] not in _STATISTICS


def _pair(found: FoundAverage, names: list[str]) -> dict[str, Leaf]:
    if len(set(names)) != len(found.nameless):
        raise ValueError(
            f"{len(found.nameless)} tensors without names, and {len(set(names))} names for them. "
            "Give the names of exactly the parameters that were averaged, as a JSON list."
        )
    return dict(zip(names, found.nameless, strict=True))


def _by_shape(found: FoundAverage, parameters: Mapping[str, Leaf]) -> dict[str, Leaf]:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, leaf in parameters.items():
        by_shape.setdefault(leaf.shape, []).append(name)
    _pair(found, list(parameters))
    for shadow in found.nameless:
        fits = by_shape.get(shadow.shape, [])
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
    ddp = all(old.startswith("module.") for old in weights)
    cut: dict[str, str] = {}  # new name -> old
    for old in weights:
        new = canonical(old.removeprefix("module.") if ddp else old)
        if new in cut:
            raise ValueError(
                f"{old} and {cut[new]} are both {new} without their wrappers. Choose one of the "
                "two tables by its key, or a prefix of its names."
            )
        cut[new] = old
    return {new: weights[old] for new, old in cut.items()}
