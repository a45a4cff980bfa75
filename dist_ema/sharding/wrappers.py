"""The wrappers that PyTorch puts around a module, and how to see through them.

[Note: stale roots]  After a forward without backward FSDP keeps weights unsharded, and the next
forward reads that copy whatever the shards hold by then. Every verb that writes shards, or that
must find them in `parameters()`, calls `reshard` first, and `swap` calls it at both ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .names import CHECKPOINTED, COMPILED, FSDP1, canonical

__all__ = [
    "Replicated",
    "before_state_dict",
    "blocker",
    "canonical",
    "entrances",
    "frozen_by_inductor",
    "is_compiled",
    "reshard",
    "side_store",
    "unexplained_keys",
    "unwrapped",
    "walk_modules",
]

# The child under which each wrapper keeps the module that it wraps.
_WRAPPED: tuple[tuple[type, str], ...] = (
    (DistributedDataParallel, "module"),
    (DataParallel, "module"),
    (FullyShardedDataParallel, FSDP1),
    (CheckpointWrapper, CHECKPOINTED),
)


def reshard(sharded: list[nn.Module]) -> None:
    """Free every unsharded copy, so that the next forward reads the shards ([Note: stale roots])."""
    for module in sharded:
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            # NOTE: before the first forward there is nothing unsharded and no event queue yet.
            if handle is None or module._is_root is None:
                continue
            _take_assigned(handle)
            _reshard(module, handle, handle.uses_sharded_strategy)


def _take_assigned(handle: Any) -> None:
    """Bring what was assigned to the weights since (`p.data = ...`, `.double().float()`) into FSDP1's shard.

    NOTE: FSDP1 does so itself before a forward, for its original parameters. A flat parameter that was moved
    or assigned it gives up again after the next forward, and so would resharding.
    """
    if handle._use_orig_params and not handle._skipped_use_sharded_views:
        handle._writeback_orig_params()
    flat, shard = handle.flat_param, handle.flat_param._local_shard
    alike = (flat.shape, flat.dtype, flat.device) == (shard.shape, shard.dtype, shard.device)
    if alike and flat.data_ptr() != shard.data_ptr():
        flat._local_shard = flat.data


def blocker(sharded: list[nn.Module]) -> str | None:
    """Why the shards may not be written or read now, or None."""
    for module in sharded:
        if not isinstance(module, FullyShardedDataParallel):
            continue
        if module.training_state != TrainingState.IDLE:
            return (
                "inside FSDP.summon_full_params() or a forward: what is written to the shards there "
                "is lost"
            )
    return None


def unexplained_keys(
    model: nn.Module, known: Collection[str], tensors: Collection[Tensor]
) -> list[str]:
    """Keys of the model's state_dict beside what is `known` by canonical name or is one of `tensors`.

    Quantisation state, extra state, what hooks add. FSDP1 is not asked: its state_dict is collective.
    """
    inner = unwrapped(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in inner.modules()):
        return []
    # A wrapper deep inside has its prefix in the key, but the tensor is the one that is recorded.
    recorded = set(map(id, tensors))
    values = inner.state_dict(keep_vars=True)
    others = {canonical(key) for key, value in values.items() if id(value) not in recorded}
    return sorted(others.difference(known))


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DDP, DataParallel and torch.compile around it: a forward that is no collective of theirs. FSDP stays."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or (
        is_compiled(model) and not isinstance(model, FSDPModule)
    ):
        model = model._modules[_wrapped_child(model) or ""]  # type: ignore[assignment]
    return model


def entrances(module: nn.Module, sharded: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The modules whose forward reads weights: (module, whether it is `module` itself, a wrapper or what it wraps)."""
    outer = {id(each) for each in sharded} | {
        id(each) for prefix, each, _ in walk_modules(module) if not prefix
    }
    inside = [*sharded, *module.modules()]
    return [
        (m, id(m) in outer)
        for m in dict.fromkeys(inside)
        if id(m) in outer or m._parameters or m._buffers
    ]


def before_state_dict(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Run `hook` before `module.state_dict()`, and before FSDP1's own hook, which reads the weights already."""
    hooks = module._state_dict_pre_hooks
    handle: RemovableHandle = module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)
    return handle


def frozen_by_inductor(model: nn.Module) -> bool:
    """Inductor copied the weights into its code (config.freezing), so a swap would not be seen."""
    config = sys.modules.get("torch._inductor.config")
    return bool(getattr(config, "freezing", False)) and any(
        is_compiled(module) for module in model.modules()
    )


def side_store(prefix: str) -> dist.Store:
    """The store of the default process group, for messages that are no collectives."""
    return dist.PrefixStore(prefix, _get_default_store())


# --- walking -----------------------------------------------------------------------------------------------------


def walk_modules(
    module: nn.Module, ddp: Replicated | None = None
) -> Iterator[tuple[str, nn.Module, Replicated | None]]:
    """(canonical prefix, module, the DDP around it) in the order of named_modules().

    Shared modules come at every path. *Cost*: 0.6 us per module.
    """
    stack = [("", module, ddp)]
    while stack:
        prefix, module, ddp = stack.pop()
        inner = _wrapped_child(module)
        if inner is not None and isinstance(module, DistributedDataParallel):
            ignored = frozenset(prefix + canonical(name) for name in module.parameters_to_ignore)
            ddp = Replicated(module.process_group, ignored)
        yield prefix, module, ddp
        if module._modules:
            for name, child in reversed(module._modules.items()):
                if child is not None:
                    stack.append((prefix if name == inner else f"{prefix}{name}.", child, ddp))


@dataclass(frozen=True)
class Replicated:
    """What DDP says of the weights below it."""

    group: dist.ProcessGroup
    parameters_to_ignore: frozenset[str]


def is_compiled(module: nn.Module) -> bool:
    """torch.compile was called on this module, not on one inside it."""
    return _wrapped_child(module) == COMPILED


def _wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None for any other module."""
    return _wrapped_child_of(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _wrapped_child_of(module_class: type[nn.Module]) -> str | None:
    # fully_shard(torch.compile(block)) makes a subclass of OptimizedModule.
    if any(parent.__name__ == "OptimizedModule" for parent in module_class.__mro__):
        return COMPILED
    return next((child for wrapper, child in _WRAPPED if issubclass(module_class, wrapper)), None)
