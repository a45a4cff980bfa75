"""Every wrapper of the parity table, over the models of `_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests import _deepspeed
from tests._models import Block, Experts, Net

CPU = torch.device("cpu")


def net(kind: str) -> Net:
    """The model that a wrapper can take."""
    hidden, experts = 8 if kind == "fsdp2 tp" else 5, 3 if kind == "fsdp2 ep" else 0
    return Net(hidden, scalar=not kind.startswith("zero"), experts=experts)


def wrap(kind: str, model: nn.Module) -> nn.Module:
    """`model` under one of the wrappers of the parity table."""
    return WRAPPERS[kind](model)


def _ddp(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, **options)


class Frozen(nn.Linear):
    """Wrapped alone under FSDP1: a flat parameter cannot be half frozen."""


def _fsdp1(model: nn.Module, orig: bool, strategy: str = "FULL_SHARD", **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def shard(module: nn.Module) -> nn.Module:
        policy, kind = ModuleWrapPolicy({Block, Frozen}), getattr(ShardingStrategy, strategy)
        return FSDP(
            module,
            auto_wrap_policy=policy,
            sharding_strategy=kind,
            use_orig_params=orig,
            device_id=CPU,
            **options,
        )

    if not isinstance(model, Net):
        return shard(model)
    model.core.frozen.__class__ = Frozen
    model.core = shard(model.core)
    return model


def _fsdp2(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    root = model.core if isinstance(model, Net) else model
    for block in getattr(root, "blocks", []):
        fully_shard(block, mesh=mesh, **options)
    fully_shard(root, mesh=mesh, **options)
    for module in root.modules():
        if hasattr(
            module, "set_force_sum_reduction_for_comms"
        ):  # torch 2.8: gloo takes an average for a sum
            module.set_force_sum_reduction_for_comms(True)
    return model


def _hsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    return _fsdp2(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor = mesh["tensor"]
    for block in model.core.blocks:
        parallelize_module(block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        distribute_module(
            block.norm,
            tensor,
            input_fn=lambda _, inputs, mesh: (
                DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),
            ),
            output_fn=lambda _, output, __: output.to_local(),
        )
    return _fsdp2(model, mesh["data"])


def _experts(model: nn.Module) -> nn.Module:
    """As torchtitan: experts are divided over `ep`, then sharded over what is left of the ranks.

    FSDP2 cuts `up` in another dimension, and `down` in the one that `ep` has cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    ep, cut = mesh["ep"], dict[nn.Parameter, Shard]()
    for experts in (each for each in model.modules() if isinstance(each, Experts)):
        experts.group = ep.get_group()
        for name, dimension in (("up", 1), ("down", 0)):
            whole = getattr(experts.grouped, name).detach()
            part = nn.Parameter(distribute_tensor(whole, ep, [Shard(0)]))
            setattr(experts.grouped, name, part)
            cut[part] = Shard(dimension)
        fully_shard(experts.grouped, mesh=mesh["efsdp"], shard_placement_fn=cut.get)
        experts.grouped.set_gradient_divide_factor(4)  # tokens come from all ranks
    return _fsdp2(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "ddp": _ddp,
    "ddp whole": _ddp,
    "ddp static": lambda model: _ddp(model, gradient_as_bucket_view=True),
    "fsdp1 flat": lambda model: _fsdp1(model, orig=False),
    "fsdp1 orig": lambda model: _fsdp1(model, orig=True),
    "fsdp1 grad_op": lambda model: _fsdp1(model, orig=True, strategy="SHARD_GRAD_OP"),
    "fsdp1 no_shard": lambda model: _fsdp1(model, orig=True, strategy="NO_SHARD"),
    "fsdp1 hybrid": lambda model: _fsdp1(model, True, "HYBRID_SHARD", device_mesh=_mesh22()),
    "fsdp2": _fsdp2,
    "fsdp2 kept": lambda model: _fsdp2(model, reshard_after_forward=False),
    "fsdp2 offload": lambda model: _fsdp2(model, offload_policy=_offload()),
    "hsdp": _hsdp,
    "fsdp2 tp": _tensor_parallel,
    "fsdp2 ep": _experts,
    "zero1": lambda model: _deepspeed.engine(model, 1),
    "zero2": lambda model: _deepspeed.engine(model, 2),
    "zero3": lambda model: _deepspeed.engine(model, 3),
    "zero3 kept": lambda model: _deepspeed.engine(
        model, 3, stage3_param_persistence_threshold=10_000
    ),
}


def _mesh22() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))


def _offload() -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=False)  # pinning needs an accelerator
