"""Seeing through wrappers: walk, unwrap, reshard; state_dict keys that no record explains.

[Note: stale roots]  After a forward without backward FSDP keeps weights unsharded, and the next
forward reads that copy whatever the shards hold by then. Every verb that writes shards, or that
must find them in `parameters()`, calls `reshard` first, and `swap` calls it at both ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from . import fsdp1, fsdp2, parameters, storage, zero
from .torch_classes import is_fsdp1, is_fsdp2
from .wrapper_names import canonical, is_compiled, wrapped_child

__all__ = [
    "Replicated",
    "blocker",
    "canonical",
    "entrances",
    "reshard",
    "unexplained_keys",
    "unwrapped",
    "walk_modules",
]


def reshard(sharded: list[nn.Module]) -> None:
    """Free the unsharded copies: the next forward reads the shards ([Note: stale roots])."""
    for module in sharded:
        if is_fsdp2(module):
            fsdp2.reshard_module(module)
        elif is_fsdp1(module):
            fsdp1.reshard_flat_parameter(module)
        else:
            zero.partition(module)


def blocker(sharded: list[nn.Module]) -> str | None:
    """Why the shards may not be written or read now, or None."""
    if any(is_fsdp1(module) and module.training_state.name != "IDLE" for module in sharded):
        return (
            "inside FSDP.summon_full_params() or a forward: what is written to the shards there "
            "is lost"
        )
    return None


def unexplained_keys(model: nn.Module, recorded: Mapping[str, Tensor]) -> list[str]:
    """Keys of the model's state_dict that no record explains, or that hold other values.

    They are quantisation state, extra state, and what hooks add or convert. FSDP1 is not asked,
    because its state_dict is collective.

    Args:
        model: The live model.
        recorded: By canonical name. A wrapper deep inside has its prefix in the key.
    """
    if any(is_fsdp1(module) for module in model.modules()):
        return []
    held = set(map(id, recorded.values()))
    unexplained = set()
    for stage in model if isinstance(model, parameters.Stages) else [model]:
        for key, value in _state_dict(unwrapped(stage)).items():
            own = recorded.get(canonical(key))
            if id(value) not in held if own is None else not _same_values(value, own):
                unexplained.add(canonical(key))
    return sorted(unexplained)


def _state_dict(module: nn.Module) -> Mapping[str, Any]:
    """What the module's own method gives, which may take no arguments, or give something else."""
    own: Any = module.state_dict
    for arguments in ({"keep_vars": True}, {}):
        with suppress(TypeError):
            state = own(**arguments)
            return state if isinstance(state, Mapping) else {}
    return {}


def _same_values(value: Any, own: Tensor) -> bool:
    """Whether a hook gave the same values, perhaps as a copy."""
    if value is own:
        return True
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (own.shape, own.dtype):
        return False
    memory, own_memory = storage.memory_of(value.detach()), storage.memory_of(own.detach())
    return memory is not None and own_memory is not None and torch.equal(memory, own_memory)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DDP, DataParallel and torch.compile around it. FSDP stays.

    Its forward is no collective of theirs.
    """
    while isinstance(model, (DistributedDataParallel, DataParallel)) or (
        is_compiled(model) and not is_fsdp2(model)
    ):
        model = model._modules[wrapped_child(model) or ""]  # type: ignore[assignment]
    return model


def entrances(module: nn.Module, sharded: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The modules whose forward reads weights.

    Returns:
        (module, whether it is `module` itself, a wrapper or what it wraps)
    """
    outer = set(map(id, sharded))
    outer |= {id(inner_module) for prefix, inner_module, _ in walk_modules(module) if not prefix}
    return [
        (inner_module, id(inner_module) in outer)
        for inner_module in dict.fromkeys([*sharded, *module.modules()])
        if id(inner_module) in outer or inner_module._parameters or inner_module._buffers
    ]


# --- walking ------------------------------------------------------------------------------------


def walk_modules(
    module: nn.Module, ddp: Replicated | None = None
) -> Iterator[tuple[str, nn.Module, Replicated | None]]:
    """(canonical prefix, module, the DDP around it) in the order of named_modules().

    Shared modules come at every path. *Cost*: 0.6 us per module.
    """
    stack = [("", module, ddp)]
    while stack:
        prefix, module, ddp = stack.pop()
        inner = wrapped_child(module)
        if inner is not None and isinstance(module, DistributedDataParallel):
            ignored = frozenset(prefix + canonical(name) for name in module.parameters_to_ignore)
            ddp = Replicated(module.process_group, ignored)
        elif inner is not None and zero.is_engine(module):
            ddp = Replicated(module.seq_data_parallel_group, frozenset())  # type: ignore[arg-type]
        yield prefix, module, ddp
        if module._modules:
            for name, child in reversed(module._modules.items()):  # the last is popped first
                if child is not None:
                    is_same = name == inner or isinstance(module, parameters.Stages)
                    stack.append((prefix if is_same else f"{prefix}{name}.", child, ddp))


@dataclass(frozen=True)
class Replicated:
    """The process group of a DDP module, and the names that it ignores."""

    group: dist.ProcessGroup
    parameters_to_ignore: frozenset[str]
