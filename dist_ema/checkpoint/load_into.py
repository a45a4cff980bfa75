"""`load_into`: a saved model written into a module in place, each rank into its own shards."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..averaging.executors import await_host_reads
from ..sharding import derived, discovery, geometry, wrappers
from ..text import some
from .library_files import FileForm, adapters_of
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
    weights, model_shards = load_file(path), discovery.find_shards(module)
    adapters = adapters_of(module, [])
    form = next((form for form in adapters if {*form.names.values()} == {*weights}), FileForm())
    shards = [shard for shard in model_shards.shards if shard.persistent and form.holds(shard.name)]
    held = {name: s.shape for s in shards for name in s.names if name in weights}
    held |= {form.name_of(shard.name): shard.shape for shard in shards}
    saved_shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    mismatched = sorted({name for name, _ in held.items() ^ saved_shapes.items()})
    if mismatched:
        raise ValueError(f"{path} and the module differ in {some(mismatched)}.")
    # Orders: copies of offloaded weights that a forward asked for, then the write of their memory.
    await_host_reads(shard.local_tensor() for shard in shards)
    with derived.caches_dropped(module):
        for shard in shards:
            elements = shard.read()
            # The copy casts. A box is all that this rank reads of the file's pages.
            for box, view in geometry.boxes_with_data(shard, shard.local_region, elements):
                view.copy_(weights[form.name_of(shard.name)][box.slices])
            if not shard.dense:
                shard.write(elements)
        # The next forward gathers what was written.
        wrappers.reshard(model_shards.sharded)
