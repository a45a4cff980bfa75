"""The weighted mean of checkpoints, streaming."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import Manifest
from . import blend, writer
from .sources import is_equal, open_model, refuse_unsupported

__all__ = ["AverageReport", "average", "in_order", "shares"]


@dataclass(frozen=True)
class AverageReport:
    """The models with their weights, and the names that have no mean."""

    out: Path
    terms: list[tuple[str, float]]
    averaged: int
    taken: list[str]  # weights of whole numbers that differ between the models

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "models": [{"path": path, "weight": weight} for path, weight in self.terms],
            "averaged": self.averaged,
            "taken_from_last": self.taken,
        }


def average(
    paths: Sequence[str],
    out: str,
    *,
    weights: Sequence[float] | None = None,
    lawa: int | None = None,
    wma: bool = False,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    progress: Callable[[str, int], Any],
) -> AverageReport:
    """Write sum(weight * model) as a model to ship. Whole numbers that differ are the last model's.

    Raises:
        ValueError: The models do not hold the same weights; the error lists all differences.

    Note:
        *Cost*: 32 MB, and the headers.
    """
    ordered = list(paths) if weights else in_order(paths)
    chosen = ordered[-lawa:] if lawa else ordered
    factors = shares(len(chosen), weights, wma)
    if lawa and lawa > len(ordered):
        raise ValueError(
            f"lawa={lawa} asks for more models than the {len(ordered)} that were given."
        )
    for path in chosen:
        # NOTE: OUT may be one of them, because it is read before it is replaced.
        if os.path.realpath(path) != os.path.realpath(out):
            writer.refuse_place(path, out)
    models = [open_model(path) for path in chosen]
    last = models[-1]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model)
            refuse_unsupported(model)
        blend.alike(models, last)
        names = frozenset(
            name for name, entry in last.entries.items() if blend.numeric(entry.dtype)
        )
        taken = [
            name
            for name in sorted(set(last.entries) - names)
            if not all(
                is_equal(model, blend.locate(model, name, last), last, name) for model in models
            )
        ]
        kinds = {} if dtype is None else dict.fromkeys(names, dtype)
        mean = blend.Blend(list(zip(models, factors, strict=True)), last, names, kinds)
        terms = list(zip(chosen, factors, strict=True))
        made_of = {
            "models": [{"path": path, "weight": factor} for path, factor in terms],
            "taken_from_last": taken,
        }
        facts = Manifest(extra={"average": made_of})
        total = sum(entry.nbytes for entry in mean.entries.values())
        with progress("averaging", total) as tick:
            blend.write(
                Path(out), mean, facts, max_shard_size=max_shard_size, force=force, tick=tick
            )
    return AverageReport(Path(out), terms, len(names), taken)


def shares(count: int, weights: Sequence[float] | None, wma: bool) -> list[float]:
    """The weight of each model, summing to 1: as given, growing linearly (wma), or uniform."""
    if weights is None:
        raw = [float(i + 1) if wma else 1.0 for i in range(count)]
    elif len(weights) != count:
        raise ValueError(f"weights names {len(weights)} weights for {count} models.")
    else:
        raw = list(weights)
    total = math.fsum(raw)
    if not all(map(math.isfinite, raw)) or abs(total) <= 1e-12 * max(map(abs, raw)):
        raise ValueError(
            "weights must be finite and must not sum to 0, got "
            f"{', '.join(f'{each:g}' for each in raw)}."
        )
    return [each / total for each in raw]


def in_order(paths: Sequence[str]) -> list[str]:
    """As given; but names that differ in one number (a shell's run/ema-*) in its order."""
    split = [re.split(r"(\d+)", path) for path in paths]
    lengths = {len(each) for each in split}
    if len(lengths) > 1:
        return list(paths)
    differ = [i for i in range(lengths.pop()) if len({each[i] for each in split}) > 1]
    if len(differ) != 1 or differ[0] % 2 == 0:
        return list(paths)
    numbers = [int(each[differ[0]]) for each in split]
    return [path for _, path in sorted(zip(numbers, paths, strict=True))]
