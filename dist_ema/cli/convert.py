"""`dist-ema convert`: options, the tables of a foreign checkpoint as lines, and what was taken."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import plural, printable, size, size_of, some
from .console import DTYPES, Verb, checked, columns, progress, show, writing

if TYPE_CHECKING:
    from ..foreign.recognise import FoundAverage
    from ..offline.convert import ConvertRequest

__all__ = ["CONVERT", "KINDS"]

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
    # Optional for argparse, because --list needs no OUT.
    if options.target is None:
        options.verb.error("the following arguments are required: OUT (or --list)")
    return _write(request, options)


def _list(
    options: argparse.Namespace, found: Sequence[FoundAverage], others: Mapping[str, str]
) -> int:
    tables = [
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
    facts = {"path": str(options.source), "tables": tables, "others": dict(others)}
    return show(options, facts, _text_of_tables(facts))


def _text_of_tables(facts: dict[str, Any]) -> Iterator[str]:
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
    # Before SRC is read, which may take long.
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
    passed = len(plan.weights) - len(plan.averaged)
    weights = plural(len(plan.weights), "weight") + (f", {passed} not averaged" if passed else "")
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
            "type": checked(partial(size_of, what="SIZE")),
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
