"""FSDP1: which slice of a flat parameter each weight is, its identity, its record, resharding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.construction import together
from .records import Kind, Region, Shard
from .storage import storage_order
from .torch_classes import is_fsdp1
from .torch_internals import side_store

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = [
    "FlatSlice",
    "FlatSlices",
    "bound_slice",
    "flat_slices",
    "identity",
    "ranks_and_group",
    "registered_parameters",
    "reshard_flat_parameter",
]

FLAT_PARAMETER = "_flat_param"  # the name under which FSDP1 registers it


@dataclass(frozen=True)
class FlatSlice:
    """One original parameter inside an FSDP1 flat parameter."""

    owner: FullyShardedDataParallel
    index: int

    @property
    def key(self) -> tuple[int, int]:
        """Equal for tied names."""
        return id(self._flat), self.index

    @property
    def tensor(self) -> Tensor:
        """The Parameter that the module shows; without use_orig_params the flat parameter."""
        params = self._flat._params
        return self._flat if params is None else params[self.index]  # type: ignore[no-any-return]

    @property
    def _flat(self) -> Any:
        return self.owner._handle.flat_param  # type: ignore[union-attr]

    def record(self, name: str, place: tuple[nn.Module, str], ranks: tuple[int, ...]) -> Shard:
        """The record of the weight.

        Args:
            name: Its canonical name.
            place: The module and the name under which it is registered.
            ranks: Those that hold the flat parameter together, replicas included.

        Raises:
            ValueError: It is on the meta device, or a DTensor.
        """
        flat, handle = self._flat, self.owner._handle
        flat_module: nn.Module = handle._fully_sharded_module  # type: ignore[union-attr]
        # NOTE: to("meta") registers another flat parameter, and FSDP1 goes on with its own.
        if flat_module._parameters.get(FLAT_PARAMETER, flat).is_meta:
            raise ValueError(
                f"{name} is on the meta device. Pass param_init_fn to FSDP, then build the EMA."
            )
        if flat._param_extensions[self.index] is not None:
            raise ValueError(
                f"{name} is a DTensor inside FSDP1. Use fully_shard for tensor parallel models."
            )
        shape, info = tuple(flat._shapes[self.index]), flat._shard_param_infos[self.index]
        _, order = storage_order(flat._shapes[self.index], flat._strides[self.index])
        begin = info.intra_param_start_idx if info.in_shard else 0
        end = max(begin, info.intra_param_end_idx + 1) if info.in_shard else 0
        sizes = shape if order is None else tuple(shape[i] for i in order)
        region = Region((0,) * len(shape), sizes, begin, end)
        sharded = handle.uses_sharded_strategy  # type: ignore[union-attr]
        outer = getattr(self.owner, "_inter_node_pg", None) if sharded else self.owner.process_group
        kind: Kind = "trainable" if self.tensor.requires_grad else "frozen"
        return Shard(
            name,
            kind,
            shape,
            self.tensor,
            place,
            region,
            # What this rank holds; before the first forward that is the flat parameter itself.
            partial(getattr, flat, "_local_shard", flat),
            info.offset_in_shard or 0,
            order,
            replicas=() if outer is None else (outer,),
            owner_ranks=ranks,
            flat_parameter=flat,
        )


FlatSlices = dict[int, dict[str, FlatSlice]]  # by the id of the module, then by parameter name


def flat_slices(modules: Iterable[nn.Module]) -> FlatSlices:
    """All that FSDP1 flattened in these modules, tied names included."""
    slices: FlatSlices = {}
    for owner in modules:
        if not is_fsdp1(owner) or owner._handle is None:
            continue
        flat = owner._handle.flat_param
        for i, info in enumerate(flat._param_infos):
            slices.setdefault(id(info.module), {})[info.param_name] = FlatSlice(owner, i)
        for shared in flat._shared_param_infos:
            first = slices[id(shared.prim_module)][shared.prim_param_name]
            slices.setdefault(id(shared.module), {})[shared.param_name] = first
    return slices


def registered_parameters(
    module: nn.Module, flats: FlatSlices
) -> Iterator[tuple[str, Tensor, FlatSlice | None]]:
    """The module's own parameters, in their order.

    Yields:
        (name, tensor, slice of an FSDP1 flat parameter or None)
    """
    for name, parameter in module._parameters.items():
        if parameter is not None and name != FLAT_PARAMETER:
            yield name, parameter, bound_slice((module, name), parameter, flats)
    for name, flat_slice in flats.get(id(module), {}).items():
        if module._parameters.get(name) is None:
            yield name, flat_slice.tensor, flat_slice


def bound_slice(
    place: tuple[nn.Module, str], parameter: Tensor, flats: FlatSlices
) -> FlatSlice | None:
    """The slice of a flat parameter that stands in this place as `parameter`; else None."""
    flat_slice = flats.get(id(place[0]), {}).get(place[1])
    return flat_slice if flat_slice is not None and flat_slice.tensor is parameter else None


def identity(tensor: Tensor, flat_slice: FlatSlice | None) -> Any:
    """Equal for tied names."""
    return id(tensor) if flat_slice is None else flat_slice.key


def ranks_and_group(
    owner: FullyShardedDataParallel, timeout: float
) -> tuple[list[int], dist.ProcessGroup | None]:
    """The ranks that hold a flat parameter together, and their group where FSDP1 has one.

    Note:
        *Collective* under hybrid strategies, where ranks wait for `timeout` seconds.
    """
    inner = dist.get_process_group_ranks(owner.process_group)
    outer = getattr(owner, "_inter_node_pg", None)
    if outer is None or not owner._handle.uses_sharded_strategy:  # type: ignore[union-attr]
        return inner, owner.process_group
    # A group for the shards and one for the replicas: no rank knows all others from its own two.
    all_ranks: list[Any] = [None] * outer.size()
    together(
        "EMA(...) over FSDP with a hybrid strategy",
        dist.get_process_group_ranks(outer),
        side_store("dist_ema/hybrid"),
        timeout,
        lambda: dist.all_gather_object(all_ranks, inner, group=outer),
    )
    return sorted(rank for ranks in all_ranks for rank in ranks), None


def reshard_flat_parameter(owner: FullyShardedDataParallel) -> None:
    """Free the unsharded copy. What was assigned to the weights comes into the shard first."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle = owner._handle
    # NOTE: before the first forward there is nothing unsharded and no event queue yet.
    if handle is None or owner._is_root is None:
        return
    _take_assigned(handle)
    _reshard(owner, handle, handle.uses_sharded_strategy)


def _take_assigned(handle: Any) -> None:
    """Bring what was assigned to the weights (`p.data = ...`, `.double().float()`) into the shard.

    NOTE: FSDP1 does so itself before a forward, for its original parameters. A flat parameter that
    was moved or assigned it gives up again after the next forward, and so would resharding.
    """
    if handle._use_orig_params and not handle._skipped_use_sharded_views:
        handle._writeback_orig_params()
    flat, shard = handle.flat_param, handle.flat_param._local_shard
    alike = (flat.shape, flat.dtype, flat.device) == (shard.shape, shard.dtype, shard.device)
    if alike and flat.data_ptr() != shard.data_ptr():
        flat._local_shard = flat.data
