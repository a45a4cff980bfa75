"""Private parts of torch that other packages need: its store, its hooks, Inductor, a backward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.hooks import RemovableHandle

from .wrapper_names import is_compiled

__all__ = ["before_state_dict", "frozen_by_inductor", "is_in_backward", "side_store"]


def side_store(prefix: str) -> dist.Store:
    """The store of the default process group, for messages that are no collectives."""
    return dist.PrefixStore(prefix, _get_default_store())


def before_state_dict(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Run `hook` before `module.state_dict()`, and before FSDP1's own hook, which reads weights."""
    state_dict_hooks = module._state_dict_pre_hooks
    earlier = list(state_dict_hooks)
    register: Callable[..., RemovableHandle] = module.register_state_dict_pre_hook
    handle = register(hook)
    for number in earlier:  # torch runs them in the order of the dictionary: behind the new one
        state_dict_hooks[number] = state_dict_hooks.pop(number)
    return handle


def frozen_by_inductor(model: nn.Module) -> bool:
    """Inductor copied the weights into its code (config.freezing), so a swap would not be seen.

    Any function that was compiled in this process may have been one of this model.
    """
    config = sys.modules.get("torch._inductor.config")
    if not getattr(config, "freezing", False):
        return False
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    has_compiled = compiler is not None and compiler.counters["frames"]["ok"] > 0
    return has_compiled or any(is_compiled(module) for module in model.modules())


def is_in_backward() -> bool:
    """A gradient is computed by this thread: its hook may step an optimizer."""
    return torch._C._current_graph_task_id() >= 0  # type: ignore[attr-defined, no-any-return]
