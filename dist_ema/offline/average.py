"""`dist-ema average`: which checkpoints are averaged, in which order, with which shares."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import Manifest
from ..schedules import Window
from ..text import printable
from . import blend, same_weights, sources, writer

__all__ = ["AverageReport", "average", "in_order", "shares"]


@dataclass(frozen=True)
class AverageReport:
    """The models with their weights, and the names that have no mean."""

    out: Path
    terms: list[tuple[str, float]]
    averaged: int
    taken: list[str]  # weights of whole numbers that differ between the models
    notes: list[str]  # on the window

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "models": [{"path": path, "weight": weight} for path, weight in self.terms],
            "averaged": self.averaged,
            "taken_from_last": self.taken,
            "notes": self.notes,
        }


def average(
    paths: Sequence[str],
    out: str,
    *,
    weights: Sequence[float] | None = None,
    lawa: int | None = None,
    wma: bool = False,
    window: Window | None = None,
    control: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    progress: Callable[[str, int], Any],
) -> AverageReport:
    """Write sum(weight * model) as a model to ship. Whole numbers that differ are the last model's.

    With `window` each model stands for the updates since the one before, by the clocks in ema.json;
    those that lie before the window are left out. `control`, "reverse" or "shuffled", gives the
    models each other's shares, to see what the curve is worth in an experiment.

    Raises:
        ValueError: The models do not hold the same weights; the error lists all differences.

    Note:
        *Cost*: 32 MB, and the headers.
    """
    notes: list[str] = []
    if window is not None:
        chosen, factors, notes = _in_window(paths, window, control)
    elif lawa and lawa > len(paths):
        raise ValueError(f"lawa={lawa} asks for more models than the {len(paths)} that were given.")
    else:
        ordered = in_order(paths) if weights is None else list(paths)
        chosen = ordered[-lawa:] if lawa else ordered
        factors = shares(len(chosen), weights, wma)
    for path in chosen:
        # NOTE: OUT may be one of them, because it is read before it is replaced.
        if os.path.realpath(path) != os.path.realpath(out):
            writer.refuse_place(path, out)
    with ExitStack() as stack:
        models = [sources.open_model(path) for path in chosen]
        for model in models:
            stack.enter_context(model)
            sources.refuse_unsupported(model)
        # It gives names, aliases, and whatever has no mean.
        last = models[-1]
        same_weights.refuse_different(models, last)
        # Counters and indices have no mean.
        names = frozenset(name for name in last.entries if blend.numeric(last.entries[name].dtype))
        taken = [name for name in sorted(set(last.entries) - names) if _differs(name, models)]
        mean = blend.Blend(
            list(zip(models, factors, strict=True)),
            last,
            names,
            {} if dtype is None else dict.fromkeys(names, dtype),
        )
        terms = list(zip(chosen, factors, strict=True))
        # JSON is UTF-8, and a path may be any bytes.
        made_of = {
            "models": [{"path": printable(path), "weight": weight} for path, weight in terms],
            "taken_from_last": taken,
        }
        with progress("averaging", sum(entry.nbytes for entry in mean.entries.values())) as tick:
            mean.write(
                Path(out),
                Manifest(extra={"average": made_of}),
                max_shard_size=max_shard_size,
                force=force,
                tick=tick,
            )
    return AverageReport(Path(out), terms, len(names), taken, notes)


def _differs(name: str, models: Sequence[sources.Source]) -> bool:
    last = models[-1]
    return not all(
        same_weights.is_equal(model, same_weights.locate(model, name, last), last, name)
        for model in models
    )


def _in_window(
    paths: Sequence[str], window: Window, control: str | None
) -> tuple[list[str], list[float], list[str]]:
    """The models inside a window that ends with the last one, the share of each, and notes."""
    clocks = {path: _clock(path) for path in paths}
    inside = sorted(
        (now, path) for path, now in clocks.items() if now > max(clocks.values()) - window.length
    )
    if inside[-1][0] <= 0:
        raise ValueError(f"{inside[-1][1]} has a clock of {inside[-1][0]:g}: no update came yet.")
    # A run that is shorter than the window begins at 0.
    begin = max(0.0, inside[-1][0] - window.length)
    if len(inside) < 2:
        raise ValueError(
            f"a window of {window.length:g} holds {len(inside)} of {len(paths)} models, whose "
            f"clocks are {', '.join(f'{now:g}' for now in sorted(clocks.values()))}."
        )
    nows = [now for now, _ in inside]
    factors = window.shares(begin, nows)
    notes = []
    # The window reaches back over updates that no save is near to.
    if nows[-1] < window.length or nows[0] - begin > max(b - a for a, b in pairwise(nows)):
        notes.append(
            f"a window of {window.length:g} is longer than what the {len(nows)} models cover: it "
            f"begins at {begin:g}, and the first one, at {nows[0]:g}, stands for all updates since."
        )
    if control == "reverse":
        factors.reverse()
    elif control == "shuffled":
        # The same shuffle in every run, so that an experiment can be repeated.
        random.Random(0).shuffle(factors)
    return [path for _, path in inside], factors, notes


def _clock(path: str) -> float:
    with sources.open_model(path) as model:
        clock = {} if model.manifest is None else model.manifest.clock
    if "now" not in clock:
        raise ValueError(f"{path} has no clock: a window takes what ema.save() wrote.")
    return float(clock["now"])


def shares(count: int, weights: Sequence[float] | None, wma: bool) -> list[float]:
    """The weight of each model, summing to 1: as given, growing linearly (wma), or uniform."""
    if weights is None:
        raw = [float(i + 1) if wma else 1.0 for i in range(count)]
    elif len(weights) != count:
        raise ValueError(f"weights names {len(weights)} weights for {count} models.")
    else:
        raw = list(weights)
    total = math.fsum(raw)
    # A sum near 0 would blow up the rounding of every product.
    if not all(map(math.isfinite, raw)) or abs(total) <= 1e-12 * max(map(abs, raw)):
        raise ValueError(
            "weights must be finite and must not sum to 0, got "
            f"{', '.join(f'{weight:g}' for weight in raw)}."
        )
    return [weight / total for weight in raw]


def in_order(paths: Sequence[str]) -> list[str]:
    """The paths as given, or by number where their names differ in one number alone."""
    split_paths = [re.split(r"(\d+)", path) for path in paths]
    lengths = {len(parts) for parts in split_paths}
    if len(lengths) > 1:
        return list(paths)
    differ = [i for i in range(lengths.pop()) if len({parts[i] for parts in split_paths}) > 1]
    # `re.split` puts the numbers at odd places, and texts between them.
    if len(differ) != 1 or differ[0] % 2 == 0:
        return list(paths)
    numbers = [int(parts[differ[0]]) for parts in split_paths]
    return [path for _, path in sorted(zip(numbers, paths, strict=True))]
