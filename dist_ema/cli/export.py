"""`dist-ema export`: the file or folder to ship."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors import size_of
from ..text import listed, plural, printable, size
from .console import DTYPES, FINE, add_verb, add_writing, checked, out, out_json, progress

if TYPE_CHECKING:
    from ..offline.export import Exported

__all__ = ["add"]


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export",
        "write the model to ship: one file, or a folder as Hugging Face lays it out",
        "Write the model to ship from a saved average, in one streaming pass: one file if OUT ends in\n"
        ".safetensors, else a folder with config and tokenizer beside the weights and a section in its model\n"
        "card. Weights have the dtypes of the model that was averaged, unless --dtype or --like says otherwise.\n"
        "The source's check sums are compared on the way. OUT appears whole or not at all.\n"
        "\n"
        "--like DIR makes the files as those of DIR: their names (so diffusers finds its\n"
        "diffusion_pytorch_model.safetensors), shards, key order, dtypes, and which of several tied names is\n"
        "written. It refuses, by name, weights that only one of the two holds.",
        "  dist-ema export run/ema-001000 out/                        the model's own dtypes\n"
        "  dist-ema export run/ema-001000 model.safetensors --dtype bf16\n"
        "  dist-ema export run/ema-001000 out/ --like ./Llama-3.2-1B  loads wherever that loads\n"
        "  dist-ema export run/ema-001000 out/ --max-shard-size 2GB\n"
        "  dist-ema export run/ema-001000 out/ --which 1              the second of several averages",
        _export,
    )
    verb.add_argument(
        "src",
        metavar="SRC",
        help="a saved average, an export, a Hugging Face folder or a .safetensors file",
    )
    verb.add_argument("out", metavar="OUT", help="a folder, or a file that ends in .safetensors")
    verb.add_argument(
        "--max-shard-size",
        type=checked(size_of),
        metavar="SIZE",
        help="of each file in a folder (default 5GB)",
    )
    verb.add_argument(
        "--like", metavar="DIR", help="a model whose file names, order, dtypes and config are taken"
    )
    verb.add_argument(
        "--which",
        default="0",
        metavar="NAME",
        help="of several averages: its number, label or schedule",
    )
    add_writing(verb, "those of the model that was averaged")


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
    if options.json:
        out_json(asdict(done))
    else:
        out(map(printable, _text(done)))
    return FINE


def _text(done: Exported) -> list[str]:
    average = f" ({done.average})" if done.average else ""
    held = f"{plural(done.weights, 'weight')} ({listed(done.dtypes)}), {size(sum(done.files.values()))}"
    files = plural(len(done.files), "file")
    beside = [f"beside them: {', '.join(done.beside)}"] if done.beside else []
    return [f"{done.path}: {held} in {files}, from {done.source}{average}", *beside]
