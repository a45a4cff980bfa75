"""`dist-ema average`: the mean of checkpoints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..text import printable, some
from .console import (
    CURVE,
    DTYPES,
    USAGE,
    WINDOW,
    Arguments,
    add_arguments,
    columns,
    number,
    progress,
    say,
    show,
    window_of,
    writing,
)

if TYPE_CHECKING:
    from ..offline.average import AverageReport

__all__ = ["ARGUMENTS", "TEXT", "add_groups", "run"]

TEXT = """\
average several models into one: uniform, the last N, growing or given weights

Average models in files: saved averages, exports, Hugging Face folders, .safetensors files. They
must hold the same weights. Config and the like come from the last one, and so do whole numbers
(step counters) that differ. Names that differ in one number alone (run/ema-*) are taken in its
order.

examples:
  dist-ema average a b c out                       the plain mean (a soup)
  dist-ema average run/epoch-*/model out --lawa 5  the last five (LAWA)
  dist-ema average run/epoch-*/model out --wma     later ones weigh more: 1, 2, 3 ...
  dist-ema average a b out --weights 0.7,0.3
  dist-ema average run/ema-* out --curve minus-sqrt --window 5000   a virtual cooldown, by the clock
"""


ARGUMENTS: Arguments = {
    "paths": {
        "metavar": "MODEL",
        "nargs": "+",
        "help": "two or more models, and last of all the OUT to write",
    },
    "--lawa": {
        "type": number("a whole number of 1 or more", lambda value: value >= 1, int),
        "metavar": "N",
        "help": "only the last N models",
    },
    **WINDOW,
    "--control": {
        "choices": ["reverse", "shuffled"],
        "help": "for experiments: the shares of --curve in reverse, or in an order by chance",
    },
    **writing("as in the last model"),
}
WEIGHTING: Arguments = {
    "--weights": {
        "type": number(
            "numbers with commas between them",
            lambda values: isinstance(values, list) and all(map(math.isfinite, values)),
            lambda text: [float(value) for value in text.split(",")],
        ),
        "metavar": "W,W,...",
        "help": "one per model; scaled to sum to 1",
    },
    "--wma": {"action": "store_true", "help": "weights that grow linearly"},
    "--curve": CURVE,
}


def add_groups(verb: argparse.ArgumentParser) -> None:
    add_arguments(verb.add_mutually_exclusive_group(), WEIGHTING)


def run(options: argparse.Namespace) -> int:
    from ..offline import average as offline

    *models, target = options.paths
    if len(models) < 2:
        return say(
            f"average takes at least two models and an OUT, got {' '.join(options.paths)}.", USAGE
        )
    if options.control and options.curve is None:
        return say("--control reorders the shares of --curve.", USAGE)
    report = offline.average(
        models,
        target,
        weights=options.weights,
        lawa=options.lawa,
        wma=options.wma,
        window=window_of(options),
        control=options.control,
        dtype=DTYPES.get(options.dtype),
        max_shard_size=options.max_shard_size,
        force=options.force,
        progress=progress,
    )
    return show(options, report.to_json(), _text(report))


def _text(report: AverageReport) -> Iterator[str]:
    yield from columns(
        [("weight", "model"), *((f"{weight:.6g}", path) for path, weight in report.terms)]
    )
    yield ""
    yield printable(
        f"{report.out}: the average of {len(report.terms)} models, {report.averaged:,} weights "
        "averaged in float64"
    )
    if report.taken:
        yield printable(
            f"taken from {report.terms[-1][0]}, because whole numbers that differ have no mean: "
            f"{some(report.taken, 3)}"
        )
