"""`dist-ema export` and `average`: options, and lines about the model that was written to ship."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from ..text import listed, plural, printable, size, some
from .console import (
    CURVE,
    DTYPES,
    USAGE,
    WHICH,
    WINDOW,
    Verb,
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
    from ..offline.export import Exported

__all__ = ["AVERAGE", "EXPORT"]

# --- export ---------------------------------------------------------------------------------------


def _export(options: argparse.Namespace) -> int:
    from ..offline.export import export

    done = export(
        options.src,
        options.out,
        dtype=DTYPES.get(options.dtype),
        max_shard_size=options.max_shard_size,
        like=options.like,
        which=options.which,
        force=options.force,
        bar=partial(progress, "export"),
    )
    return show(options, asdict(done), map(printable, _text_of_export(done)))


def _text_of_export(done: Exported) -> list[str]:
    average = f" ({done.average})" if done.average else ""
    weights = f"{plural(done.weights, 'weight')} ({listed(done.dtypes)})"
    files = f"{size(sum(done.files.values()))} in {plural(len(done.files), 'file')}"
    beside = [f"beside them: {', '.join(done.beside)}"] if done.beside else []
    return [f"{done.path}: {weights}, {files}, from {done.source}{average}", *beside]


EXPORT = Verb(
    "export",
    """\
write the model to ship: one file, or a folder as Hugging Face lays it out

Write the model to ship from a saved average, in one streaming pass: one file if OUT ends in
.safetensors, else a folder with config and tokenizer beside the weights and a section in its model
card. Weights have the dtypes of the model that was averaged, or those of --dtype or --like.
The source's check sums are compared on the way. OUT appears whole or not at all.

--like DIR makes the files as those of DIR: their names (so diffusers finds its
diffusion_pytorch_model.safetensors), shards, key order, dtypes, and which of several tied names is
written. It refuses, by name, weights that only one of the two holds.

examples:
  dist-ema export run/ema-001000 out/                        the model's own dtypes
  dist-ema export run/ema-001000 model.safetensors --dtype bf16
  dist-ema export run/ema-001000 out/ --like ./Llama-3.2-1B  loads wherever that loads
  dist-ema export run/ema-001000 out/ --max-shard-size 2GB
  dist-ema export run/ema-001000 out/ --which 1              the second of several averages
""",
    {
        "src": {
            "metavar": "SRC",
            "help": "a saved average, an export, a Hugging Face folder or a .safetensors file",
        },
        "out": {"metavar": "OUT", "help": "a folder, or a file that ends in .safetensors"},
        "--like": {
            "metavar": "DIR",
            "help": "a model whose file names, order, dtypes and config are taken",
        },
        "--which": WHICH,
        **writing("those of the model that was averaged"),
    },
    _export,
)


# --- average --------------------------------------------------------------------------------------


def _average(options: argparse.Namespace) -> int:
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
    return show(options, report.to_json(), _text_of_average(report))


def _text_of_average(report: AverageReport) -> Iterator[str]:
    yield from columns(
        [("weight", "model"), *((f"{weight:.6g}", path) for path, weight in report.terms)]
    )
    yield ""
    yield printable(
        f"{report.out}: the average of {len(report.terms)} models, "
        f"{plural(report.averaged, 'weight')} averaged in float64"
    )
    yield from report.notes
    if report.taken:
        yield printable(
            f"taken from {report.terms[-1][0]}, because whole numbers that differ have no mean: "
            f"{some(report.taken, 3)}"
        )


AVERAGE = Verb(
    "average",
    """\
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
""",
    {
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
    },
    _average,
    one_of={
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
    },
)
