"""`dist-ema diff`: how far two models are apart."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ..text import plural, printable
from .console import (
    FINE,
    PROBLEM,
    WHICH,
    Arguments,
    columns,
    count,
    number,
    progress,
    show,
)

if TYPE_CHECKING:
    from ..offline.diff import Difference, Row

__all__ = ["ARGUMENTS", "CODES", "TEXT", "run"]

TEXT = """\
compare two models, weight by weight, the farthest first

Compare two models of any form that dist-ema reads. The distance of a weight is ||A - B|| / ||A||,
in float64; integers and booleans are compared exactly. Names that only one of the two has, other
shapes and other dtypes are listed. Tied weights are compared under each name that both know.

examples:
  dist-ema diff run/ema-001000 run/ema-002000          how far the average moved
  dist-ema diff run/ema-001000 out/ --threshold 0.01   is the bf16 export within 1 % of it?
  dist-ema diff run/ema run/ema --which-b 1            two averages of one folder
  dist-ema diff a.safetensors b.safetensors --json     every weight, for programs
"""

CODES = "0 the same, 1 they differ"
SHOWN = 20  # rows of the table, by default


ARGUMENTS: Arguments = {
    "a": {"metavar": "A", "help": "a folder, or one .safetensors file"},
    "b": {"metavar": "B", "help": "what is compared with it"},
    "--threshold": {
        "type": number("a distance, 0 or larger", lambda value: 0 <= value < math.inf),
        "metavar": "X",
        "help": "distances up to X, and other dtypes, are the same",
    },
    "--weights": {
        "type": count,
        "metavar": "N",
        "help": f"rows to print, or 'all' (default {SHOWN}; --json: all)",
    },
    "--which-a": {**WHICH, "help": "of several averages in A: number, label or schedule"},
    "--which-b": {**WHICH, "help": "of several averages in B: number, label or schedule"},
    "--json": {"action": "store_true", "help": "print JSON; an infinite distance is null"},
}


def run(options: argparse.Namespace) -> int:
    from ..offline.diff import diff

    which, bar = (options.which_a, options.which_b), partial(progress, "compare")
    found = diff(options.a, options.b, which=which, bar=bar)
    facts = _to_json(found, options.threshold, options.weights)
    shown = SHOWN if options.weights is None else options.weights
    show(options, facts, _text(found, options.threshold, shown))
    return FINE if found.same(options.threshold) else PROBLEM


def _to_json(found: Difference, threshold: float | None, shown: int | None) -> dict[str, Any]:
    rows = {
        row.name: {
            "distance": row.distance if math.isfinite(row.distance) else None,
            "largest": row.largest if math.isfinite(row.largest) else None,
            "changed": row.changed,
            "elements": row.elements,
            "dtypes": list(row.dtypes),
        }
        for row in found.rows[:shown]
    }
    return {
        "a": found.a,
        "b": found.b,
        "same": found.same(threshold),
        "compared": len(found.rows),
        "threshold": threshold,
        "beyond": len(found.beyond(threshold)),
        "missing": found.missing,
        "unexpected": found.unexpected,
        "reshaped": found.reshaped,
        "weights": rows,
    }


def _text(found: Difference, threshold: float | None, shown: int) -> Iterator[str]:
    beyond = found.beyond(threshold)
    allowed = "" if threshold is None else f" by more than {threshold:g}"
    verdict = f"{len(beyond):,} differ{allowed}" if beyond else f"none differs{allowed}"
    yield printable(
        f"{plural(len(found.rows), 'weight')} of {found.a} and {found.b} compared, {verdict}"
    )
    yield from (printable(f"missing     {name} (in A alone)") for name in found.missing)
    yield from (printable(f"unexpected  {name} (in B alone)") for name in found.unexpected)
    yield from (
        printable(f"reshaped    {name}: {was} in A, {now} in B")
        for name, (was, now) in found.reshaped.items()
    )
    rows = found.beyond(None)
    if rows[:shown]:
        yield ""
        yield from columns(
            [("weight", "distance", "max |A-B|", "changed", "dtype"), *map(_cells, rows[:shown])]
        )
    if len(rows) > shown:
        yield f"... and {len(rows) - shown:,} of {len(rows):,} more: --weights all"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.distance:.3e}",
        f"{row.largest:.3e}",
        f"{row.changed:,} of {row.elements:,}",
        " -> ".join(dict.fromkeys(row.dtypes)),
    )
