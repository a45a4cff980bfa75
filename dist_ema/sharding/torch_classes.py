"""Is it a DTensor, FSDP1 or FSDP2, and does a backward run? No class of theirs is imported.

Importing FSDP and DTensor takes as long as half of torch. A program whose model needs neither has
not imported them, and then no object of these classes exists.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["is_dtensor", "is_fsdp1", "is_fsdp2", "is_in_backward"]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def is_fsdp1(value: object) -> TypeIs[FullyShardedDataParallel]:
    return _is_instance(value, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_fsdp2(value: object) -> TypeIs[FSDPModule]:
    """fully_shard was called on this module."""
    return _is_instance(value, "torch.distributed.fsdp", "FSDPModule")


def _is_instance(value: object, module: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name, ()))


def is_in_backward() -> bool:
    """A gradient is computed by this thread: its hook may step an optimizer."""
    return torch._C._current_graph_task_id() >= 0  # type: ignore[attr-defined, no-any-return]
