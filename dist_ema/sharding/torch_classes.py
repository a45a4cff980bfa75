"""`is_dtensor`, `is_fsdp1`, `is_fsdp2`, `is_flattened`: asked without an import of these classes.

Importing FSDP and DTensor takes as long as half of torch. A program whose model needs neither has
not imported them, and then no object of these classes exists.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["is_dtensor", "is_flattened", "is_fsdp1", "is_fsdp2"]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    return _is_instance(value, "torch.distributed.tensor", "DTensor")


def is_fsdp1(value: object) -> TypeIs[FullyShardedDataParallel]:
    return _is_instance(value, "torch.distributed.fsdp", "FullyShardedDataParallel")


def is_fsdp2(value: object) -> TypeIs[FSDPModule]:
    """fully_shard was called on this module."""
    return _is_instance(value, "torch.distributed.fsdp", "FSDPModule")


def is_flattened(parameter: object) -> bool:
    """An original parameter of FSDP1, which is a view of a flat one."""
    return getattr(parameter, "_fsdp_flattened", False)


def _is_instance(value: object, module: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name, ()))
