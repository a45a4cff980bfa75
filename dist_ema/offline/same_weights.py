"""Do models hold the same weights? Names, ties, shapes and kinds of number; the bits of two.

The models may call tied weights by different names of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..dtypes import FLOATS
from ..text import some
from .sources import Source, Weights, windows

__all__ = ["is_equal", "locate", "refuse_different"]


def locate(model: Weights, name: str, like: Source) -> str:
    """The name that `model` has for a weight of `like`, which may tie it to others.

    Raises:
        KeyError: It has none.
    """
    for tied in (name, *(alias for alias, of in like.aliases.items() if of == name)):
        if tied in model.entries or tied in model.aliases:
            return tied if tied in model.entries else model.aliases[tied]
    raise KeyError(name)


def is_equal(model: Weights, name: str, other: Weights, its_name: str) -> bool:
    """Whether two weights have the same dtype, shape and bits. Closes both models."""
    a, b = model.entries[name], other.entries[its_name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    try:
        pairs = zip(windows(model, name), windows(other, its_name), strict=True)
        return all(bool((one == two).all()) for one, two in pairs)
    finally:
        # Or a comparison of 100 models would leave the files of all open.
        model.close()
        other.close()


def refuse_different(
    models: Sequence[Weights],
    like: Source,
    names: Sequence[str] | None = None,
    *,
    casts_whole: bool = True,
) -> None:
    """Raise ValueError with every difference in names, shapes and kinds of number.

    Args:
        models: The models to compare.
        like: The model that the others must agree with.
        names: The names to compare, by default all.
        casts_whole: Whole numbers of two dtypes are one kind.
    """
    differences = [
        difference
        for model in models
        if model is not like
        for difference in _differences(model, like, names, casts_whole)
    ]
    if differences:
        raise ValueError(
            f"the models do not hold the same weights as {like.path}, {len(differences)} "
            f"differences: {some(differences, 20, '; ')}."
        )


def _differences(
    model: Weights, like: Source, names: Sequence[str] | None, casts_whole: bool
) -> Iterator[str]:
    for name in sorted(like.entries) if names is None else names:
        try:
            here, there = model.entries[locate(model, name, like)], like.entries[name]
        except KeyError:
            yield f"{model.path} lacks {name}"
            continue
        if here.shape != there.shape:
            yield (
                f"{name} is {list(here.shape)} in {model.path}, {list(there.shape)} in {like.path}"
            )
        elif _sort(here.dtype, casts_whole) != _sort(there.dtype, casts_whole):
            yield f"{name} is {here.dtype} in {model.path}, {there.dtype} in {like.path}"
    if names is None:
        # Without a list of names, what only this model has is a difference too.
        known = {*like.entries, *like.aliases}
        for name in sorted(model.entries):
            if not known & {name, *(alias for alias, of in model.aliases.items() if of == name)}:
                yield f"{model.path} has {name} besides"
            elif name in like.aliases and not is_equal(
                model, name, model, locate(model, like.aliases[name], like)
            ):
                yield (
                    f"{name} is tied to {like.aliases[name]} in {like.path}, another weight in "
                    f"{model.path}"
                )


def _sort(dtype: str, casts_whole: bool) -> str:
    whole = "whole" if casts_whole and dtype != "C64" else dtype
    return "floating" if dtype in FLOATS else whole
