"""`dist-ema export`, `convert` and `average`: the verbs that write a model to ship."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import listed, plural, printable, size, size_of, some
from .console import (
    CURVE,
    DTYPES,
    USAGE,
    WHICH,
    WINDOW,
    Verb,
    checked,
    columns,
    number,
    progress,
    say,
    show,
    window_of,
    writing,
)

if TYPE_CHECKING:
    from ..foreign.recognise import FoundAverage
    from ..offline.average import AverageReport
    from ..offline.convert import ConvertRequest
    from ..offline.export import Exported

__all__ = ["AVERAGE", "CONVERT", "EXPORT", "KINDS"]

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


# --- convert --------------------------------------------------------------------------------------


KINDS = (  # NOTE: those of `foreign.recognise`, which imports numpy
    "auto", "torch", "swa", "lightning", "timm", "ema-pytorch", "ldm", "diffusers", "torch-ema",
    "mmengine", "dist-ema", "raw", "dcp",
)  # fmt: skip


def _convert(options: argparse.Namespace) -> int:
    from ..offline import convert as offline

    request = offline.ConvertRequest(
        options.source,
        "torch" if options.kind == "swa" else options.kind,
        key=options.key,
        like=options.like,
        prefix=options.prefix,
        rest=options.rest,
        averaged_only=options.averaged_only,
        dtype=DTYPES.get(options.dtype),
        inert=options.inert,
        max_size=None if options.max_size is None else size_of(options.max_size),
    )
    if options.list:
        return _list(options, *offline.candidates(request))
    if options.target is None:
        options.verb.error("the following arguments are required: OUT (or --list)")
    return _write(request, options)


def _list(
    options: argparse.Namespace, found: Sequence[FoundAverage], others: Mapping[str, str]
) -> int:
    rows = [
        {
            "key": table.key,
            "kind": table.kind,
            "tensors": len(table.weights) or len(table.nameless),
            "average": table.average,
            "named": not table.nameless,
            "why": table.why,
            **({"extra": dict(table.extra)} if table.extra else {}),
        }
        for table in found
    ]
    facts = {"path": str(options.source), "tables": rows, "others": dict(others)}
    return show(options, facts, _tables(facts))


def _tables(facts: dict[str, Any]) -> Iterator[str]:
    """The facts of --list as lines."""
    cells = [
        (
            table["key"] or "(all)",
            table["kind"],
            str(table["tensors"]),
            "average" if table["average"] else "live, or unknown",
            table["why"],
        )
        for table in facts["tables"]
    ]
    if cells:
        yield from columns([("key", "kind", "tensors", "holds", "why"), *cells])
    else:
        yield printable(f"{facts['path']} holds no table of tensors.")
    if facts["others"]:
        yield from ("", printable(f"left unread: {some(sorted(facts['others']), 10)}"))


def _write(request: ConvertRequest, options: argparse.Namespace) -> int:
    from ..offline import convert as offline
    from ..offline import writer

    for path in filter(None, (options.source, options.like)):
        writer.refuse_place(path, options.target)
    writer.refuse_target(options.target, options.force)
    with ExitStack() as stack:
        plan = offline.plan(request, stack)
        with progress(f"writing {options.target}", plan.nbytes) as tick:
            written = offline.write(
                plan,
                options.target,
                force=options.force,
                tick=tick,
                max_shard_size=options.max_shard_size,
            )
    facts = {
        "path": str(options.target),
        "weights": len(plan.weights),
        "averaged": len(plan.averaged),
        "bytes": plan.nbytes,
        "aliases": dict(plan.aliases),
        "notes": list(plan.notes),
        "extra": written.extra,
    }
    rest = len(plan.weights) - len(plan.averaged)
    weights = plural(len(plan.weights), "weight") + (f", {rest} not averaged" if rest else "")
    lines = [*plan.notes, f"wrote {options.target}: {weights}, {size(plan.nbytes)}"]
    return show(options, facts, map(printable, lines))


CONVERT = Verb(
    "convert",
    """\
make a model of other people's EMA checkpoints, and of torch.distributed.checkpoint folders

Take the average out of a checkpoint that another program wrote, give its weights the model's names,
and write a safetensors model. SRC is safetensors, a file of torch.save, or a folder of
torch.distributed.checkpoint, as torch's AveragedModel, Lightning, timm, ema-pytorch, ldm,
diffusers, torch-ema and mmengine write them, or a plain table of tensors. The command prints what
it took and why. Pickled code is never run: a class that needs code is refused by name. Weights are
read a window at a time.

examples:
  dist-ema convert last.ckpt --list                 what is in there
  dist-ema convert last.ckpt out/                   the average, if there is one
  dist-ema convert last.pth.tar out.safetensors --dtype bf16
  dist-ema convert last.ckpt out/ --key state_dict --prefix model.
                                                    a table, the prefix cut off its names
  dist-ema convert step-1000/ out/ --key ema.averages.average_0
  dist-ema convert ema.pt out/ --like live.pt       a list without names, in the live model's order
""",
    {
        "source": {"metavar": "SRC", "type": Path, "help": "a file or folder"},
        "target": {
            "metavar": "OUT",
            "type": Path,
            "nargs": "?",
            "help": "a folder, or a name that ends in .safetensors",
        },
        "--list": {
            "action": "store_true",
            "help": "list the tables in SRC with their keys, and write nothing",
        },
        "--from": {
            "dest": "kind",
            "choices": KINDS,
            "default": "auto",
            "metavar": "KIND",
            "help": ", ".join(KINDS),
        },
        "--key": {"help": "the table to take: keys joined by dots, or how its names begin"},
        "--prefix": {"default": "", "help": "take only names that begin so, and cut that off"},
        "--like": {
            "type": Path,
            "metavar": "FILE",
            "help": "the live model, or a JSON list: names for a list without",
        },
        "--rest": {
            "metavar": "KEY",
            "help": "the table of live weights that fills in what is not averaged",
        },
        "--averaged-only": {"action": "store_true", "help": "leave out what is not averaged"},
        "--max-size": {
            "type": checked(size_of),
            "metavar": "SIZE",
            "help": "refuse to write more (default: 4 times what SRC holds)",
        },
        "--inert": {
            "action": "append",
            "default": [],
            "metavar": "CLASS",
            "help": "read past objects of this class",
        },
        **writing("as in SRC"),
    },
    _convert,
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
        f"{report.out}: the average of {len(report.terms)} models, {report.averaged:,} weights "
        "averaged in float64"
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
