"""FSDP2 and tensor parallel: records of DTensors, copies that FSDP2 unsharded, resharding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping

from .records import Kind, Region, Shard
from .storage import present_memory, storage_order
from .torch_classes import is_fsdp2

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement

__all__ = ["dtensor_shard", "find_modules", "mesh_ranks", "reshard_module", "unsharded_copies"]


def dtensor_shard(name: str, kind: Kind, tensor: DTensor, place: tuple[nn.Module, str]) -> Shard:
    """The record of a DTensor: a box, replicated over the mesh dimensions that do not cut it."""
    mesh, placements, local = tensor.device_mesh, tensor.placements, present_memory(tensor)
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name} has placements {placements}: a Partial weight is a sum still to be made. "
            "Redistribute it."
        )
    cuts, offsets, sizes = _box_of_dtensor(mesh, placements, tensor.shape)
    if tuple(local.shape) != sizes:
        raise ValueError(
            f"{name}: {placements} over {mesh} should leave {sizes} here, found "
            f"{tuple(local.shape)}."
        )
    dense, order = storage_order(local.shape, local.stride())
    if not dense:
        raise ValueError(
            f"{name}: the local tensor has shape {tuple(local.shape)} and strides "
            f"{local.stride()}. Strided and expanded weights cannot be averaged in place: make it "
            "contiguous before building the EMA."
        )
    if order is not None:
        offsets, sizes = (tuple(at[i] for i in order) for at in (offsets, sizes))
    region = Region(offsets, sizes, 0, local.numel())
    read, shape = partial(present_memory, tensor), tuple(tensor.shape)
    shard = Shard(name, kind, shape, tensor, place, region, read, 0, order)
    if kind != "buffer":  # ranks may hold other bits of a buffer that nothing cuts
        whole = [i for i in range(mesh.ndim) if i not in cuts]
        shard.replicas = tuple(mesh.get_group(i) for i in whole)
    if cuts or kind != "buffer":
        shard.owner_ranks = mesh_ranks(mesh)
    return shard


@lru_cache(maxsize=256)
def _box_of_dtensor(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size
) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """The mesh dimensions that cut the weight; offsets and sizes of the local tensor.

    Asked once for all weights of one shape: a model may have ten thousand experts.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    cuts = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    offsets, sizes = [0] * len(shape), list(shape)
    # NOTE: FSDP2 over TP splits right to left: _StridedShard (on the left) cuts what Shard (on the
    # right) left over.
    strided = [i for i in cuts if type(placements[i]).__name__ == "_StridedShard"]
    for i in [i for i in cuts if i not in strided] + strided[::-1]:
        dim: int = placements[i].dim  # type: ignore[attr-defined]
        step = -(-sizes[dim] // mesh.size(i))  # torch.chunk: full chunks first
        start = min(step * coordinate[i], sizes[dim])
        offsets[dim], sizes[dim] = offsets[dim] + start, min(step, sizes[dim] - start)
    return cuts, tuple(offsets), tuple(sizes)


@lru_cache(maxsize=16)
def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks, asked once: a weight must not cost more in a larger world."""
    return tuple(mesh.mesh.flatten().tolist())


def reshard_module(module: FSDPModule) -> None:
    """Free the unsharded copies of one module."""
    module.reshard()
    # NOTE: set_post_optim_event() makes the next all-gather wait for the optimizer alone, and not
    # for what is written to the shards after it. Without it, it waits for all.
    module._get_fsdp_state()._state_ctx.post_optim_event = None


def unsharded_copies(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """The sharded parameter behind each parameter that FSDP2 unsharded, by the id of the copy."""
    return {
        id(getattr(record, copy)): record.sharded_param
        for _, record in _sharded_parameters(modules)
        for copy in ("_unsharded_param", "_sharded_post_forward_param")
        if getattr(record, copy, None) is not None
    }


def find_modules(parameters: dict[str, Tensor]) -> list[nn.Module]:
    """The FSDP2 modules around parameters. Copies that they unsharded give way to the shards.

    See [Note: stale roots] in wrappers.
    """
    modules = list(_module_state_mapping)  # all of this process
    copies = unsharded_copies(modules)
    for name, tensor in parameters.items():
        parameters[name] = copies.get(id(tensor), tensor)
    given = set(map(id, parameters.values()))
    return list(
        dict.fromkeys(
            module
            for module, record in _sharded_parameters(modules)
            if id(record.sharded_param) in given
        )
    )


def _sharded_parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    """(module, what FSDP2 keeps of one parameter) of the modules given to fully_shard."""
    for module in modules:
        reference = _module_state_mapping.get(module) if is_fsdp2(module) else None
        state: Any = None if reference is None else reference()
        if state is not None:
            # torch 2.8 has one group.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (
                (module, record) for group in groups if group for record in group.fsdp_params
            )
