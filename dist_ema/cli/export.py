"""`dist-ema export`: the file or folder to ship."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from ..text import listed, plural, printable, size
from .console import (
    DTYPES,
    WHICH,
    Arguments,
    progress,
    show,
    writing,
)

if TYPE_CHECKING:
    from ..offline.export import Exported

__all__ = ["ARGUMENTS", "TEXT", "run"]

TEXT = """\
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
"""


ARGUMENTS: Arguments = {
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
}


def run(options: argparse.Namespace) -> int:
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
    return show(options, asdict(done), map(printable, _text(done)))


def _text(done: Exported) -> list[str]:
    average = f" ({done.average})" if done.average else ""
    weights = f"{plural(done.weights, 'weight')} ({listed(done.dtypes)})"
    files = f"{size(sum(done.files.values()))} in {plural(len(done.files), 'file')}"
    beside = [f"beside them: {', '.join(done.beside)}"] if done.beside else []
    return [f"{done.path}: {weights}, {files}, from {done.source}{average}", *beside]
