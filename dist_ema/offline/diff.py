"""`dist-ema diff`: the distance of two models in float64, weight by weight. No torch.

    distance = ||A - B|| / ||A||, in float64, over the elements of one weight

*Cost*: one pass over both, windows that fit a processor's cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.safetensors import ITEMSIZE
from ..dtypes import FLOATS, Bytes, view, widen
from ..text import Bar, Tick, silent
from .sources import Source, open_model, refuse_unsupported, windows

__all__ = ["Difference", "Row", "diff"]

WINDOW = 1 << 18  # elements
_INEXACT = (*FLOATS, "C64")
_PARTS = {"C64": "f4", "BOOL": "u1"}


@dataclass(frozen=True)
class Row:
    """One weight that both models have, in the same shape.

    changed: elements that are not the same value.
    """

    name: str
    distance: float  # inf where A is 0 or a value is not finite in one of the two
    largest: float  # of |A - B|
    changed: int
    elements: int
    dtypes: tuple[str, str]

    @property
    def exact(self) -> bool:
        """Whether any change counts: counters and indices have no distance."""
        return not any(dtype in _INEXACT for dtype in self.dtypes)


@dataclass
class Difference:
    """rows: the farthest first.

    missing: in A alone. unexpected: in B alone. reshaped: name -> the two shapes.
    """

    a: str
    b: str
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def beyond(self, threshold: float | None) -> list[Row]:
        """The rows that differ at all, dtypes included; or, with a threshold, by more than it."""
        if threshold is None:
            return [row for row in self.rows if row.changed or row.dtypes[0] != row.dtypes[1]]
        return [
            row for row in self.rows if (row.changed > 0 if row.exact else row.distance > threshold)
        ]

    def same(self, threshold: float | None = None) -> bool:
        return not (self.missing or self.unexpected or self.reshaped or self.beyond(threshold))


def diff(
    a: str | Path, b: str | Path, *, which: tuple[int | str, int | str] = (0, 0), bar: Bar = silent
) -> Difference:
    """Compare two models of any form.

    Tied weights are compared under each name that both know, each pair once.

    Args:
        a: The first model.
        b: The second model.
        which: The average to take of several, for each of the two.
        bar: Shows progress.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A path is no model, or tensors of it cannot be read.
    """
    with open_model(a, which[0]) as one, open_model(b, which[1]) as other:
        refuse_unsupported(one)
        refuse_unsupported(other)
        difference, pairs = Difference(str(a), str(b)), _pairs(one, other)
        difference.missing = sorted(set(one.entries) - {in_a for in_a, _ in pairs.values()})
        difference.unexpected = sorted(set(other.entries) - {in_b for _, in_b in pairs.values()})
        difference.reshaped = {
            name: (list(one.entries[in_a].shape), list(other.entries[in_b].shape))
            for name, (in_a, in_b) in pairs.items()
            if one.entries[in_a].shape != other.entries[in_b].shape
        }
        compared = {name: pair for name, pair in pairs.items() if name not in difference.reshaped}
        with bar(sum(one.entries[in_a].nbytes for in_a, _ in compared.values())) as tick:
            for name, (in_a, in_b) in compared.items():
                difference.rows.append(_row(name, one, in_a, other, in_b, tick))
    # The farthest weight is what a reader looks for.
    difference.rows.sort(key=lambda row: (-row.distance, -row.changed, row.name))
    return difference


def _pairs(one: Source, other: Source) -> dict[str, tuple[str, str]]:
    """Name -> what each of the two has it under. A pair that two names lead to is kept once."""
    first = {name: name for name in one.entries} | dict(one.aliases)
    second = {name: name for name in other.entries} | dict(other.aliases)
    pairs: dict[tuple[str, str], str] = {}
    for name in [*one.entries, *sorted({*first, *second} - set(one.entries))]:
        if name in first and name in second:
            pairs.setdefault((first[name], second[name]), name)
    return {name: pair for pair, name in pairs.items()}


def _row(name: str, one: Source, in_a: str, other: Source, in_b: str, tick: Tick) -> Row:
    a, b = one.entries[in_a], other.entries[in_b]
    squares = norm = largest = 0.0
    changed = 0
    sizes = ITEMSIZE[a.dtype] * WINDOW, ITEMSIZE[b.dtype] * WINDOW
    for raw, against in zip(
        windows(one, in_a, sizes[0]), windows(other, in_b, sizes[1]), strict=True
    ):
        # Equal windows are the common case, and `_compare` stops early there.
        x, delta, n = _compare(raw, a.dtype, against, b.dtype)
        norm += _square(x)
        if n:
            largest = max(largest, _far(float(delta.max(initial=0.0))))
            squares += _square(delta)
            changed += n
        tick(len(raw))
    distance = 0.0
    if changed:
        distance = _far(math.sqrt(squares) / math.sqrt(norm)) if norm > 0 else math.inf
    return Row(name, distance, largest, changed, math.prod(a.shape), (a.dtype, b.dtype))


def _square(values: NDArray[Any]) -> float:
    """The sum of squares; overwrites the values.

    NOTE: no dot product, which would wake a pool of threads each time.
    """
    with np.errstate(over="ignore"):
        return float(np.multiply(values, values, out=values).sum())


def _far(value: float) -> float:
    """NaN as infinity, so that it sorts first and passes no threshold."""
    return math.inf if math.isnan(value) else value


def _compare(
    raw: Bytes, dtype: str, against: Bytes, other: str
) -> tuple[NDArray[Any], NDArray[Any], int]:
    """A in float64, complex numbers as both parts; |A - B|; how many elements differ in value.

    NaN is the same as NaN.
    """
    a, b = _numbers(raw, dtype), _numbers(against, other)
    # One of the two is complex: the other gets imaginary parts.
    if (dtype == "C64") != (other == "C64"):
        a, b = (_real(part) if kind != "C64" else part for part, kind in ((a, dtype), (b, other)))
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        # NOTE: integers are compared as such, because float64 does not hold all of 64 bits.
        same = a == b if a.dtype.kind in "iu" and b.dtype.kind in "iu" else x == y
        if same.all():
            return x, np.zeros(0), 0
        # NaN differs from itself, and only this line says that it has not changed.
        same |= np.isnan(x) & np.isnan(y)
        delta = np.abs(np.subtract(x, y, out=y), out=y)
        delta[same] = 0.0
        if "C64" in (dtype, other):
            same, delta = same.reshape(-1, 2).all(axis=1), np.hypot(delta[::2], delta[1::2])
        return x, delta, int(len(same) - np.count_nonzero(same))


def _numbers(raw: Bytes, dtype: str) -> NDArray[Any]:
    """The values; of complex numbers both parts, of booleans the bytes."""
    values = widen(raw, dtype) if dtype in FLOATS else view(raw, dtype)
    return values.view(_PARTS[dtype]) if dtype in _PARTS else values


def _real(values: NDArray[Any]) -> NDArray[Any]:
    """Real numbers as pairs with an imaginary part of 0."""
    return np.stack([values, np.zeros_like(values)], axis=1).reshape(-1)
