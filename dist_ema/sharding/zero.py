"""DeepSpeed ZeRO: the records of its weights, their fp32 masters, the step hooks of its engine.

DeepSpeed is not imported: what it leaves on the parameters says everything.

[Note: masters]  The optimizer steps fp32 masters, and their 16-bit copies serve the forward. An
average of the copies would miss what a step changes by less than their precision. So an update
reads the masters, and a swap writes the copies. The masters belong to the optimizer alone.

    ZeRO-1, ZeRO-2    the copies are whole on every rank; their flat buffer is cut evenly
    ZeRO-3            of the copies a rank has the flat range [r k, r k + k), the last one padded

[Note: steps of an engine]  The hooks of DeepSpeed's inner optimizer fire before the 16-bit copies
are written, and for each parameter group. Only the end of `engine.step()` says that a step is
complete, and `was_step_applied()` that it happened: accumulation and overflows skip it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .geometry import even
from .records import Region, Shard, group_ranks

__all__ = [
    "EngineSteps",
    "holds_partitions",
    "is_engine",
    "is_partitioned",
    "partition",
    "refuse_taken_over",
    "replicated_group",
    "take_masters",
    "zero3_group",
    "zero3_shard",
]

AVAILABLE = "AVAILABLE"  # the name of DeepSpeed's status of a weight that is whole on this rank


def is_engine(value: object) -> bool:
    """Whether deepspeed.initialize made it, or its class derives from an engine's."""
    return any(
        parent.__name__ == "DeepSpeedEngine" and parent.__module__.startswith("deepspeed.")
        for parent in type(value).__mro__
    )


def is_partitioned(tensor: Tensor) -> bool:
    """ZeRO-3 holds this parameter."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "ds_tensor")


def holds_partitions(module: nn.Module) -> bool:
    """The module's own parameters are ZeRO-3's: `partition` frees their whole copies."""
    return any(hasattr(parameter, "ds_status") for parameter in module._parameters.values())


def zero3_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold a ZeRO-3 parameter together; None for any other."""
    return getattr(tensor, "ds_process_group", None)


def partition(module: nn.Module) -> None:
    """Free whole copies of the module's own ZeRO-3 parameters: the next forward gathers."""
    for parameter in module._parameters.values():
        weight: Any = parameter
        if hasattr(weight, "ds_status") and weight.ds_status.name == AVAILABLE:
            weight.partition()


def zero3_shard(name: str, kind: Any, tensor: Any, place: tuple[nn.Module, str]) -> Shard:
    """The record of a ZeRO-3 parameter: a flat range of it lies here, and its masters beside."""
    _refuse_unsupported(name, tensor)
    group, shape, numel = tensor.ds_process_group, tuple(tensor.ds_shape), int(tensor.ds_numel)
    length = len(tensor.ds_tensor)
    begin = min(dist.get_rank(group) * length, numel)
    region = Region((0,) * len(shape), shape, begin, min(begin + length, numel))
    shard = Shard(name, kind, shape, tensor, place, region, partial(getattr, tensor, "ds_tensor"))
    shard.owner_ranks = group_ranks(group)
    optimizer = getattr(tensor, "_z3_optimizer", None)
    if kind == "trainable" and optimizer is not None:
        number, offset, _ = optimizer.grad_position[optimizer.get_param_id(tensor)]
        # NOTE: the getter of DeepSpeed waits for the device, and an update must not.
        shard.master = partial(optimizer.fp32_partitioned_groups_flat.__getitem__, number)
        shard.master_offset = offset
    return shard


def _refuse_unsupported(name: str, tensor: Any) -> None:
    """Raise ValueError where the partition is none, or not all that a rank has to average."""
    stored, optimizer = getattr(tensor, "ds_tensor", None), getattr(tensor, "_z3_optimizer", None)
    is_secondary = getattr(tensor, "ds_secondary_tensor", None) is not None
    location = getattr(stored, "final_location", None)
    unsupported = {
        "without a partition of it": stored is None or not hasattr(tensor, "ds_process_group"),
        "with secondary partitions (zero_hpz_partition_size)": is_secondary,
        "in replicated groups (MiCS)": hasattr(tensor, "comm"),
        "with quantized weights": hasattr(stored, "ds_quant_scale"),
        "with parameters on NVMe": getattr(location, "value", None) == "nvme",
        "with its optimizer on NVMe": getattr(optimizer, "swap_optimizer", False),
    }
    reasons = [reason for reason, is_so in unsupported.items() if is_so]
    if reasons:
        raise ValueError(
            f"{name} is partitioned by DeepSpeed (ZeRO stage 3) {reasons[0]}, which dist_ema "
            "cannot average. Turn that off, or use ZeRO stage 2 or FSDP."
        )


def replicated_group(modules: Iterable[nn.Module]) -> dist.ProcessGroup | None:
    """The data-parallel group of ZeRO-1 or ZeRO-2, which replicates all weights; None without."""
    for module in modules:
        for parameter in module._parameters.values():
            group = getattr(parameter, "_dp_group", None)
            if group is not None and hasattr(parameter, "_hp_mapping"):
                return group  # type: ignore[no-any-return]
    return None


def take_masters(shard: Shard) -> None:
    """Note in the record of a ZeRO-1 or ZeRO-2 parameter how it is cut, and where its masters lie.

    Raises:
        ValueError: The optimizer cuts it in another way than the flat buffer says.
    """
    tensor: Any = shard.tensor
    if not hasattr(tensor, "_hp_mapping"):
        return
    group, mapping = tensor._dp_group, tensor._hp_mapping
    start, total = tensor.storage_offset(), tensor.untyped_storage().nbytes() // tensor.itemsize
    own = even(0, total, group.rank(), group.size())
    begin, end = (min(max(at - start, 0), tensor.numel()) for at in own)
    stepped = (0, 0)
    if mapping is not None:
        address = mapping.lp_fragment_address
        stepped = address.start, address.start + address.numel
    if total % group.size() or shard.order is not None or (stepped != (begin, end) and begin < end):
        raise ValueError(
            f"{shard.name} is cut by DeepSpeed at {stepped} on rank {group.rank()}, where the flat "
            f"buffer of {total} elements says {(begin, end)}. dist_ema does not know this layout."
        )
    shard.replicas, shard.cut = (group,), (start, total)
    shard.owner_ranks = group_ranks(group)
    shard.master = partial(
        _fragment, tensor, torch.empty(0, dtype=torch.float32, device=tensor.device)
    )


def _fragment(tensor: Any, empty: Tensor) -> Tensor:
    """The fp32 masters of what this rank steps, read afresh: `empty` where that is nothing."""
    mapping = tensor._hp_mapping
    return empty if mapping is None else mapping.hp_fragment  # type: ignore[no-any-return]


def refuse_taken_over(shard: Shard) -> None:
    """Raise RuntimeError if DeepSpeed has taken the weight over since it was recorded."""
    is_taken = is_partitioned(shard.tensor) or hasattr(shard.tensor, "_hp_mapping")
    is_described = shard.cut is not None or shard.local_tensor() is not shard.tensor
    if is_taken and not is_described:
        raise RuntimeError(
            f"{shard.name} belongs to DeepSpeed now, whose optimizer keeps fp32 masters of it. "
            "Build the EMA after deepspeed.initialize."
        )


# --- steps --------------------------------------------------------------------------------------


class EngineSteps:
    """The step hooks of one engine ([Note: steps of an engine]).

    Made once, and kept on it. Hooks run before every call of `engine.step()`, and after every step
    that was applied.
    """

    # They need no more of an optimizer than its dictionaries of hooks.
    register_step_pre_hook: Any = Optimizer.register_step_pre_hook
    register_step_post_hook: Any = Optimizer.register_step_post_hook

    def __init__(self, engine: Any) -> None:
        self._engine, self._step = engine, engine.step
        # Named as those of torch's optimizers, among which an attachment looks for dead ones.
        self._optimizer_step_pre_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        engine.step = self.step  # on the instance, before the method of its class

    @classmethod
    def of(cls, engine: Any) -> EngineSteps:
        """Those that are on the engine already, or new ones."""
        steps = getattr(engine.step, "__self__", None)
        return steps if isinstance(steps, cls) else cls(engine)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`engine.step()`, between the hooks."""
        # Copies of the lists: a hook may take itself off.
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self, args, kwargs)
        result = self._step(*args, **kwargs)
        if self._engine.was_step_applied():
            for hook in list(self._optimizer_step_post_hooks.values()):
                hook(self, args, kwargs)
        return result
