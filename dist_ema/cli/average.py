"""`dist-ema average`: the mean of checkpoints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors import size_of
from ..text import printable, some
from .console import (
    DTYPES,
    FINE,
    USAGE,
    add_verb,
    add_writing,
    checked,
    columns,
    out,
    out_json,
    progress,
    say,
)

if TYPE_CHECKING:
    from ..offline.average import AverageReport

__all__ = ["add"]


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "average",
        "average several models into one: uniform, the last N, growing or given weights",
        "Average models in files: saved averages, exports, Hugging Face folders, .safetensors files. They must\n"
        "hold the same weights. Config and the like come from the last one, and so do whole numbers (step\n"
        "counters) that differ. Names that differ in one number alone (run/ema-*) are taken in its order.",
        "  dist-ema average a b c out                       the plain mean (a soup)\n"
        "  dist-ema average run/epoch-*/model out --lawa 5  the last five (LAWA)\n"
        "  dist-ema average run/epoch-*/model out --wma     later ones weigh more: 1, 2, 3 ...\n"
        "  dist-ema average a b out --weights 0.7,0.3",
        _average,
    )
    verb.add_argument(
        "paths",
        metavar="MODEL",
        nargs="+",
        help="two or more models, and last of all the OUT to write",
    )
    which = verb.add_mutually_exclusive_group()
    which.add_argument(
        "--weights", type=_weights, metavar="W,W,...", help="one per model; scaled to sum to 1"
    )
    which.add_argument("--wma", action="store_true", help="weights that grow linearly")
    verb.add_argument("--lawa", type=_whole, metavar="N", help="only the last N models")
    text = "of each file in a folder (default 5GB)"
    verb.add_argument(
        "--max-shard-size", type=checked(size_of), default="5GB", metavar="SIZE", help=text
    )
    add_writing(verb, "as in the last model")


def _weights(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}")
    return values


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def _average(options: argparse.Namespace) -> int:
    from ..offline import average as offline

    *models, target = options.paths
    if len(models) < 2:
        return say(
            f"average takes at least two models and an OUT, got {' '.join(options.paths)}.", USAGE
        )
    report = offline.average(
        models,
        target,
        weights=options.weights,
        lawa=options.lawa,
        wma=options.wma,
        dtype=DTYPES.get(options.dtype),
        max_shard_size=options.max_shard_size,
        force=options.force,
        progress=progress,
    )
    if options.json:
        out_json(report.plain())
    else:
        out(_text(report))
    return FINE


def _text(report: AverageReport) -> Iterator[str]:
    yield from columns(
        [("weight", "model"), *((f"{weight:.6g}", path) for path, weight in report.terms)]
    )
    yield ""
    yield printable(
        f"{report.out}: the average of {len(report.terms)} models, {report.averaged:,} weights averaged in float64"
    )
    if report.taken:
        yield printable(
            f"taken from {report.terms[-1][0]}, because whole numbers that differ have no mean: {some(report.taken, 3)}"
        )
