"""`load_into`: a saved model written into a module that exists, however it is wrapped."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..sharding import derived, discovery, wrappers
from ..sharding.geometry import boxes_with_data
from ..text import some
from . import library_files
from .load_file import load_file

__all__ = ["load_into"]


@torch.no_grad()
def load_into(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Write a saved model into a module in place, each rank into its own shards.

    Args:
        path: A folder, or one .safetensors file.
        module: The same model, however it is wrapped. An adapter's file goes into that adapter of a
            PeftModel.

    Raises:
        ValueError: The module holds other weights; they are named, and nothing was written.

    Note:
        *Cost*: pages of the files, no second model.
    """
    weights, found = load_file(path), discovery.find_shards(module)
    form = library_files.adapter_in(module, weights)
    shards = [shard for shard in found.shards if shard.persistent and form.holds(shard.name)]
    held = {name: s.shape for s in shards for name in (s.name, *s.aliases) if name in weights}
    held |= {form.name_of(shard.name): shard.shape for shard in shards}
    there = {name: tuple(weight.shape) for name, weight in weights.items()}
    mismatched = sorted({name for name, _ in held.items() ^ there.items()})
    if mismatched:
        raise ValueError(f"{path} and the module differ in {some(mismatched)}.")
    with derived.caches_dropped(module):
        for shard in shards:
            elements = shard.read()
            for box, view in boxes_with_data(shard, shard.local_region, elements):
                view.copy_(weights[form.name_of(shard.name)][box.slices])
            if not shard.dense:
                shard.write(elements)
        wrappers.reshard(found.sharded)
