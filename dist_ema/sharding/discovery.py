"""`find_shards`: one record per weight and buffer of any wrapped model, and the ranks that hold it.

DDP, FSDP1, FSDP2, HSDP, tensor parallel, torch.compile and activation checkpointing are dissolved
here. Nothing after this room asks how a model is wrapped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import fsdp1, fsdp2, records, storage, wrappers, zero
from .parameters import Parameters
from .records import Kind, ModelShards, Region, Shard
from .torch_classes import is_dtensor, is_fsdp1, is_fsdp2

__all__ = ["find_shards", "redescribe", "unfilled_buffers"]

RanksAndGroup = tuple[list[int], dist.ProcessGroup | None]  # the group is of exactly these ranks


@records.uncollected()
def find_shards(
    model: nn.Module, replicated: dist.ProcessGroup | None = None, timeout: float = 300.0
) -> ModelShards:
    """Dissolve the wrappers of `model`.

    Names are canonical: without module., _orig_mod., _fsdp_wrapped_module. and the like.

    Args:
        model: Wrapped as it is trained.
        replicated: The ranks that hold the same plain parameters, where no DDP says so.
        timeout: Seconds that ranks wait for each other where this is collective.

    Raises:
        ValueError: Something cannot be averaged by elements: meta tensors, Partial placements,
            FSDP1 over tensor parallel.

    Note:
        *Collective* under FSDP1's hybrid strategies.
    """
    replicated = replicated or zero.replicated_group(model.modules())
    outer = None if replicated is None else wrappers.Replicated(replicated, frozenset())
    walk = list(wrappers.walk_modules(model, outer))
    modules = list(dict.fromkeys(module for _, module, _ in walk))
    sharded: list[nn.Module] = [
        m for m in modules if is_fsdp2(m) or is_fsdp1(m) or zero.holds_partitions(m)
    ]
    if isinstance(model, Parameters):  # which has none of the modules inside
        sharded = model.owners
    wrappers.reshard(sharded)
    # NOTE: in the order of the modules, not of a set: every rank must ask in the same order.
    owners = {m: fsdp1.ranks_and_group(m, timeout) for m in modules if is_fsdp1(m) and m._handle}
    shards = _describe(walk, {owner: tuple(ranks) for owner, (ranks, _) in owners.items()})
    if isinstance(model, Parameters) and model.average_frozen:
        for shard in shards:  # the others can be copied, but not averaged
            shard.average_frozen = shard.dense and shard.dtype.itemsize > 1 and not shard.opaque
    _refuse_empty(shards)
    members, group = _members(
        [ddp.group for _, _, ddp in walk if ddp], shards, list(owners.values())
    )
    _choose_writers(shards, members)
    return ModelShards(shards, members, group, sharded)


def _describe(
    walk: list[tuple[str, nn.Module, wrappers.Replicated | None]],
    owners: dict[Any, tuple[int, ...]],
) -> list[Shard]:
    """One record for each weight and buffer. Tied names become aliases of the first one.

    owners: the ranks that hold the flat parameter of an FSDP1 module together.
    """
    flats = fsdp1.flat_slices(owners)
    shards: dict[Any, Shard] = {}
    names: set[str] = set()
    for prefix, module, ddp in walk:
        for name, tensor, flat in fsdp1.registered_parameters(module, flats):
            key, full = fsdp1.identity(tensor, flat), prefix + name
            # What an earlier module registers as a buffer may be this Parameter.
            is_buffer = key in shards and shards[key].kind == "buffer"
            earlier = shards.pop(key) if is_buffer else None
            if full in names and key not in shards:
                raise ValueError(
                    f"{full} stands on two stages of this rank, which hold different tensors. Give "
                    "both the same Parameter."
                )
            if key in shards:
                shards[key].aliases += [] if full in names else [full]
            elif flat is not None:
                shards[key] = flat.record(full, (module, name), owners[flat.owner])
            else:
                around = ddp if ddp and full not in ddp.parameters_to_ignore else None
                shards[key] = _plain(full, tensor, (module, name), around)
            if earlier is not None and earlier.persistent:
                shards[key].aliases += earlier.names
            elif earlier is not None:
                shards[id(earlier.place[0]), earlier.place[1]] = earlier
            names.add(full)
        for name, buffer in module._buffers.items():
            full, place = prefix + name, (module, name)
            is_persistent = name not in module._non_persistent_buffers_set
            # The first of several stages with such a buffer is the one that is recorded.
            if (buffer is None and is_persistent) or full in names:
                continue
            names.add(full)
            key = id(buffer)
            if key in shards and shards[key].persistent == is_persistent:
                shards[key].aliases.append(full)
            else:
                # A cache to be filled, and a name that the state_dict has, tied to one that it has
                # not, are buffers of their own.
                key = (id(module), name) if buffer is None or key in shards else key
                # NOTE: never split by rank. BatchNorm's differ between DDP ranks even after
                # broadcast_buffers=True.
                shards[key] = _plain(full, records.registered_buffer(place), place, None)
                shards[key].persistent &= is_persistent
    return list(shards.values())


def _refuse_empty(shards: list[Shard]) -> None:
    """Raise ValueError if all trainable weights hold nothing, whatever partitioned them."""
    trainable = [shard for shard in shards if shard.trainable]
    if trainable and not any(math.prod(shard.shape) for shard in trainable):
        raise ValueError(
            f"{', '.join(shard.name for shard in trainable[:5])} hold no elements on any rank. Are "
            "they partitioned (DeepSpeed, ZeRO stage 3)? Build the EMA on whole weights, DDP or "
            "FSDP."
        )


# --- one record ---------------------------------------------------------------------------------


def _plain(
    name: str, tensor: Tensor, place: tuple[nn.Module, str], ddp: wrappers.Replicated | None
) -> Shard:
    """The record of a tensor that a module registers itself."""
    _refuse_unfilled(name, tensor)
    kind: Kind = "trainable" if tensor.requires_grad else "frozen"
    if place[1] in place[0]._buffers:
        kind = "buffer"
    if zero.is_partitioned(tensor):
        return zero.zero3_shard(name, kind, tensor, place)
    if storage.memory_of(tensor) is None:
        return _opaque(name, kind, tensor, place)
    if is_dtensor(tensor):
        return fsdp2.dtensor_shard(name, kind, tensor, place)
    dense, order = storage.storage_order(tensor.shape, tensor.stride())
    if tensor.is_conj() or tensor.is_neg():  # its memory holds other bits than its values
        dense, order = False, None
    sizes = tuple(tensor.shape) if order is None else tuple(tensor.shape[i] for i in order)
    whole = Region((0,) * len(sizes), sizes, 0, tensor.numel())

    def local_tensor() -> Tensor:
        # NOTE: modules may register a new tensor under a buffer's name at any time; a Parameter
        # must stay the same object.
        now = records.registered_buffer(place) if kind == "buffer" else tensor
        memory = storage.present_memory(now)
        return memory if dense else memory.detach().resolve_conj().resolve_neg().contiguous()

    shape = tuple(tensor.shape)
    shard = Shard(name, kind, shape, tensor, place, whole, local_tensor, 0, order, dense=dense)
    if ddp:
        shard.replicas, shard.owner_ranks = (ddp.group,), records.group_ranks(ddp.group)
    zero.take_masters(shard)
    return shard


def _refuse_unfilled(name: str, tensor: Tensor) -> None:
    """Raise ValueError where the elements are not here yet, or not here alone."""
    problem = None
    if is_lazy(tensor):
        problem = "is not initialised yet. Run one forward through the lazy module"
    elif tensor.is_meta:
        problem = "is on the meta device. Materialise the model (to_empty, then load)"
    elif tensor.is_inference() and tensor.requires_grad:
        problem = "was made under torch.inference_mode. Make the model outside of it"
    if problem:
        raise ValueError(f"{name} {problem}, then build the EMA.")


def _opaque(name: str, kind: Kind, tensor: Tensor, place: tuple[nn.Module, str]) -> Shard:
    """A record without elements: it may be sparse or quantized, and its memory is never read."""
    # Quantized dtypes are known to few functions, and nested tensors have no one shape.
    dtype = torch.uint8 if tensor.is_quantized else tensor.dtype
    empty = torch.empty(0, dtype=dtype, device="cpu")
    shape, region = () if tensor.is_nested else tuple(tensor.shape), Region((0,), (0,), 0, 0)
    return Shard(
        name, kind, shape, tensor, place, region, lambda: empty, opaque=True, persistent=False
    )


def unfilled_buffers(model: nn.Module) -> set[str]:
    """Canonical names under which the state_dict will have a buffer, once it is not None."""
    return {
        prefix + name
        for prefix, module, _ in wrappers.walk_modules(model)
        for name, buffer in module._buffers.items()
        if buffer is None and name not in module._non_persistent_buffers_set
    }


def redescribe(shard: Shard) -> None:
    """Describe what is registered for a copied buffer now, which may have become any size."""
    now = _plain(shard.name, records.registered_buffer(shard.place), shard.place, None)
    for field in ("shape", "tensor", "local_region", "order", "local_tensor", "dense", "opaque"):
        setattr(shard, field, getattr(now, field))


# --- the ranks that hold the model together -----------------------------------------------------


def _members(
    replicated: list[dist.ProcessGroup], shards: list[Shard], fsdp1: list[RanksAndGroup]
) -> RanksAndGroup:
    """The widest mesh or group found.

    Raises:
        ValueError: It does not contain the others.
    """
    tensors = [shard.tensor for shard in shards]
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_dtensor(tensor))
    # A mesh of several dimensions has no group of all its ranks.
    groups: list[RanksAndGroup] = [
        (sorted(fsdp2.mesh_ranks(mesh)), mesh.get_group() if mesh.ndim == 1 else None)
        for mesh in meshes
    ]
    process_groups = dict.fromkeys([*replicated, *map(zero.zero3_group, tensors)])
    groups += [
        (list(records.group_ranks(group)), group) for group in process_groups if group is not None
    ]
    groups += fsdp1
    if not groups:
        return [dist.get_rank() if dist.is_initialized() else 0], None
    widest = max(groups, key=lambda entry: len(entry[0]))
    for members, _ in groups:
        if not set(members) <= set(widest[0]):
            raise ValueError(
                f"the model's weights live on ranks {widest[0]} and on ranks {members}; EMA needs "
                "one set of ranks that holds the model together. Build one EMA per part with only=."
            )
    return widest


def _choose_writers(shards: list[Shard], members: list[int]) -> None:
    """Mark which copy is written where ranks hold copies that are not known to be replicas.

    They are buffers, weights outside every wrapper or that DDP ignores, and weights on a part of
    the mesh.
    """
    is_first = members[0] == (dist.get_rank() if dist.is_initialized() else 0)
    for shard in shards:
        shard.is_writer = members[0] in shard.owner_ranks if shard.owner_ranks else is_first
