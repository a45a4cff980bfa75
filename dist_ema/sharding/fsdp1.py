"""FSDP1: flat parameters and the ranges that each rank holds of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .records import Kind, Region, Shard, storage_order

__all__ = [
    "FLAT_PARAMETER",
    "FlatSlice",
    "FlatSlices",
    "flat_slices",
    "fsdp1_members",
    "local_shard",
]


FLAT_PARAMETER = "_flat_param"  # the name under which FSDP1 registers it


@dataclass(frozen=True)
class FlatSlice:
    """One original parameter inside an FSDP1 flat parameter."""

    owner: FullyShardedDataParallel
    index: int

    @property
    def key(self) -> tuple[int, int]:
        return id(self._flat), self.index

    @property
    def _flat(self) -> Any:
        return self.owner._handle.flat_param  # type: ignore[union-attr]

    @property
    def tensor(self) -> Tensor:
        params = self._flat._params  # use_orig_params=True
        return self._flat if params is None else params[self.index]  # type: ignore[no-any-return]

    def __call__(
        self,
        name: str,
        tensor: Tensor,
        place: tuple[nn.Module, str],
        ranks: tuple[int, ...],
    ) -> Shard:
        """The record. `ranks`: which hold the flat parameter together, replicas included."""
        flat, handle = self._flat, self.owner._handle
        if flat.is_meta:
            raise ValueError(
                f"{name} is on the meta device. Pass param_init_fn to FSDP, then build the EMA."
            )
        if flat._param_extensions[self.index] is not None:
            raise ValueError(
                f"{name} is a DTensor inside FSDP1. Use fully_shard for tensor parallel models."
            )
        shape, info = tuple(flat._shapes[self.index]), flat._shard_param_infos[self.index]
        _, order = storage_order(flat._shapes[self.index], flat._strides[self.index])
        sizes = shape if order is None else tuple(shape[i] for i in order)
        begin, end = (
            (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
        )
        held = Region((0,) * len(shape), sizes, begin, max(begin, end))
        sharded = handle.uses_sharded_strategy  # type: ignore[union-attr]
        outer = getattr(self.owner, "_inter_node_pg", None) if sharded else self.owner.process_group
        kind: Kind = "trainable" if tensor.requires_grad else "frozen"
        # The shard outside forward and backward; before the first forward the flat parameter itself.
        raw = partial(local_shard, flat)
        shard = Shard(name, kind, shape, tensor, place, held, raw, info.offset_in_shard or 0, order)
        shard.replicas, shard.flat = () if outer is None else (outer,), not sharded
        shard.owner_ranks = ranks
        return shard


FlatSlices = dict[int, dict[str, FlatSlice]]  # by the id of the module, then by parameter name


def local_shard(flat: Any) -> Tensor:
    local: Tensor = getattr(flat, "_local_shard", flat)
    return local


def flat_slices(modules: Iterable[nn.Module]) -> FlatSlices:
    """All that FSDP1 flattened in these modules, tied names included."""
    found: FlatSlices = {}
    for owner in modules:
        if not isinstance(owner, FullyShardedDataParallel) or owner._handle is None:
            continue
        flat = owner._handle.flat_param
        for i, info in enumerate(flat._param_infos):
            found.setdefault(id(info.module), {})[info.param_name] = FlatSlice(owner, i)
        for shared in flat._shared_param_infos:
            first = found[id(shared.prim_module)][shared.prim_param_name]
            found.setdefault(id(shared.module), {})[shared.param_name] = first
    return found


def fsdp1_members(owner: FullyShardedDataParallel) -> tuple[list[int], dist.ProcessGroup | None]:
    inner = dist.get_process_group_ranks(owner.process_group)
    outer = getattr(owner, "_inter_node_pg", None)
    if outer is None or not owner._handle.uses_sharded_strategy:  # type: ignore[union-attr]
        return inner, owner.process_group
    everyone: list[Any] = [None] * outer.size()
    dist.all_gather_object(everyone, inner, group=outer)
    return sorted(rank for ranks in everyone for rank in ranks), None
