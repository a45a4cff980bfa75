"""`packs`: neighbours of a sequence put together, as many as a bound on their sizes allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["packs"]

T = TypeVar("T")


def packs(
    items: Iterable[T],
    size_of: Callable[[T], int],
    most: int,
    fits: Callable[[T, T], bool] = lambda last, item: True,
) -> Iterator[list[T]]:
    """Consecutive items, of at most `most` together or one larger item alone.

    Args:
        items: In their order, which stays.
        size_of: An item's size, in the unit of `most`.
        most: What a pack may hold.
        fits: Whether an item may follow the last one of a pack.
    """
    pack: list[T] = []
    filled = 0
    for item in items:
        if pack and (filled + size_of(item) > most or not fits(pack[-1], item)):
            yield pack
            pack, filled = [], 0
        pack.append(item)
        filled += size_of(item)
    if pack:
        yield pack
