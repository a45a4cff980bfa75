"""What wrappers add to the names of weights. No torch, so that files are read without it."""

from __future__ import annotations

__all__ = ["CHECKPOINTED", "COMPILED", "FSDP1", "canonical"]

# The child under which a wrapper keeps the module that it wraps. DDP and DataParallel call it
# `module`, as models do too.
COMPILED, FSDP1, CHECKPOINTED = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"


def canonical(name: str) -> str:
    """The name that a weight or module has where nothing is wrapped; for DDP start inside."""
    return ".".join(part for part in name.split(".") if part not in (COMPILED, FSDP1, CHECKPOINTED))
