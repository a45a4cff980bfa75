"""`dist-ema convert`: other people's EMA checkpoints into a model folder or file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoint.safetensors import size_of
from ..text import printable, size, some
from .console import DTYPES, FINE, add_verb, add_writing, checked, columns, out, out_json, progress

__all__ = ["add"]

KINDS = (  # NOTE: those of `foreign`, which imports numpy
    "auto", "torch", "swa", "lightning", "timm", "ema-pytorch", "ldm", "diffusers", "torch-ema",
    "mmengine", "dist-ema", "raw", "dcp",
)  # fmt: skip


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "convert",
        "make a model of other people's EMA checkpoints, and of torch.distributed.checkpoint "
        "folders",
        "Take the average out of a checkpoint that something else wrote, give its weights the "
        "model's names, and\nwrite a safetensors model. Reads safetensors, files of torch.save, "
        "and folders of\ntorch.distributed.checkpoint, knows torch's AveragedModel, Lightning, "
        "timm, ema-pytorch, ldm, diffusers,\ntorch-ema, mmengine and plain tables, and says what "
        "it took and why. Nothing pickled is ever run: what\nwould need code is refused by name. "
        "Weights are read a window at a time.",
        "  dist-ema convert last.ckpt --list                 what is in there\n  dist-ema convert "
        "last.ckpt out/                   the average, if there is one\n  dist-ema convert "
        "last.pth.tar out.safetensors --dtype bf16\n  dist-ema convert last.ckpt out/ --key "
        "state_dict --prefix model.   a table, the prefix cut off its names\n  dist-ema convert "
        "step-1000/ out/ --key ema.averages.Constant(decay=0.999)\n  dist-ema convert ema.pt out/ "
        "--like live.pt       a list without names, in the order of the live model",
        _convert,
    )
    verb.add_argument("source", metavar="SRC", type=Path, help="a file or folder")
    verb.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="a folder, or a name that ends in .safetensors",
    )
    verb.add_argument(
        "--list",
        action="store_true",
        help="list the tables in SRC with their keys, and write nothing",
    )
    verb.add_argument(
        "--from", dest="kind", choices=KINDS, default="auto", metavar="KIND", help=", ".join(KINDS)
    )
    verb.add_argument(
        "--key", help="the table to take: keys joined by dots, or how its names begin"
    )
    verb.add_argument(
        "--prefix", default="", help="take only names that begin so, and cut that off"
    )
    verb.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="the live model, or a JSON list: names for a list without",
    )
    verb.add_argument(
        "--rest", metavar="KEY", help="the table of live weights that fills in what is not averaged"
    )
    verb.add_argument("--averaged-only", action="store_true", help="leave out what is not averaged")
    text = "of each file in a folder (default 5GB)"
    verb.add_argument(
        "--max-shard-size", type=checked(size_of), default="5GB", metavar="SIZE", help=text
    )
    verb.add_argument(
        "--max-size",
        type=checked(size_of),
        metavar="SIZE",
        help="refuse to write more (default: 4 times what SRC holds)",
    )
    verb.add_argument(
        "--inert",
        action="append",
        default=[],
        metavar="CLASS",
        help="read past objects of this class",
    )
    add_writing(verb, "as in SRC")
    verb.set_defaults(verb=verb)


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
        return _list(request, options.json)
    if options.target is None:
        options.verb.error("the following arguments are required: OUT (or --list)")
    return _write(request, options)


def _list(request: Any, as_json: bool) -> int:
    from ..offline import convert as offline

    found, others = offline.candidates(request)
    rows = [
        {
            "key": each.key, "kind": each.kind, "tensors": len(each.weights) or len(each.nameless), "average": each.average,
            "named": not each.nameless, "why": each.why, **({"extra": dict(each.extra)} if each.extra else {}),
        }
        for each in found
    ]  # fmt: skip
    if as_json:
        out_json({"path": str(request.source), "tables": rows, "others": dict(others)})
        return FINE
    head = ("key", "kind", "tensors", "", "why")
    table = [
        (
            each.key or "(all)",
            each.kind,
            str(row["tensors"]),
            "average" if each.average else "",
            each.why,
        )
        for each, row in zip(found, rows, strict=True)
    ]
    out(
        columns([head, *table])
        if table
        else [printable(f"{request.source} holds no table of tensors.")]
    )
    if others:
        out(["", printable(f"left unread: {some(sorted(others), 10)}")])
    return FINE


def _write(request: Any, options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from ..offline import convert as offline
    from ..offline.writer import refuse_place, refuse_target

    for each in filter(None, (options.source, options.like)):
        refuse_place(each, options.target)
    refuse_target(options.target, options.force)
    with ExitStack() as stack:
        plan = offline.plan(request, stack)
        with progress(f"writing {options.target}", plan.nbytes) as tick:
            said = offline.write(
                plan,
                options.target,
                force=options.force,
                tick=tick,
                max_shard_size=options.max_shard_size,
            )
    facts = {
        "path": str(options.target), "weights": len(plan.weights), "averaged": len(plan.averaged), "bytes": plan.nbytes,
        "aliases": dict(plan.aliases), "notes": list(plan.notes), "extra": said["extra"],
    }  # fmt: skip
    if options.json:
        out_json(facts)
        return FINE
    out(printable(note) for note in plan.notes)
    rest = (
        f", {len(plan.weights) - len(plan.averaged)} not averaged"
        if len(plan.weights) > len(plan.averaged)
        else ""
    )
    out(
        [
            printable(
                f"wrote {options.target}: {len(plan.weights)} weights{rest}, {size(plan.nbytes)}"
            )
        ]
    )
    return FINE
