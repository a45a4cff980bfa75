"""What wrappers are called, and what they add to the names of weights; nothing is imported for it.

Files are read without torch, and models without the wrappers that they do not have.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["canonical", "is_compiled", "wrapped_child"]

_COMPILED = "_orig_mod"
_WRAPPED = {  # the child under which each wrapper keeps the module that it wraps
    "OptimizedModule": _COMPILED,
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
}
_ADDED = {*_WRAPPED.values()} - {"module"}  # which models have too


def canonical(name: str) -> str:
    """The name that a weight or module has where nothing is wrapped; for DDP start inside."""
    return ".".join(part for part in name.split(".") if part not in _ADDED)


def wrapped_child(module: object) -> str | None:
    """The name of the child that a wrapper wraps; None for any other module."""
    return _child_of_class(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _child_of_class(module_class: type) -> str | None:
    # fully_shard(torch.compile(block)) makes a subclass.
    names = [
        parent.__name__
        for parent in module_class.__mro__
        if parent.__module__.startswith(("torch.", "deepspeed."))
    ]
    return next((child for wrapper, child in _WRAPPED.items() if wrapper in names), None)


def is_compiled(module: object) -> bool:
    """torch.compile was called on this module, not on one inside it."""
    return wrapped_child(module) == _COMPILED
