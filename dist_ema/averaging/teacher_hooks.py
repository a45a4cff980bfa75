"""Hooks on a teacher: what is in flight ends before a forward or a `state_dict` reads it.

[Note: unannounced reads]  No verb of the EMA is called when a teacher computes. Hooks before its
forwards, `state_dict` and `load_state_dict` wait for the update in flight, and free what FSDP has
kept unsharded since ([Note: stale roots] in sharding.wrappers). They also sit on every module
inside that owns weights, because teachers are called by methods of their own too. Inside a compiled
graph those are silent, as the hook of the outermost module has run before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..sharding import torch_internals, wrappers

__all__ = ["put_on"]


def put_on(
    teacher: nn.Module, sharded: Sequence[nn.Module], announce: Callable[[], None]
) -> ExitStack:
    """Put the hooks on. The result takes them off when it is closed.

    Args:
        teacher: The module.
        sharded: The FSDP modules in it.
        announce: Called before a read; a bound method, whose owner is not kept alive.
    """
    hooks = ExitStack()
    for module, outer in wrappers.entrances(teacher, sharded):
        for hook_there in list(module._forward_pre_hooks.values()):
            if isinstance(hook_there, _ReadHook):
                hook_there.take_off_spent()
        hook, forward_hook = (_ReadHook(announce, outer) for _ in range(2))
        forward_hook.spent = [
            module.register_forward_pre_hook(forward_hook, prepend=True),
            module.register_load_state_dict_pre_hook(hook),
            torch_internals.before_state_dict(module, hook),
        ]
        for handle in forward_hook.spent:
            hooks.callback(handle.remove)
    return hooks


class _ReadHook:
    """Announces a read.

    When the EMA is gone, the next forward or the next EMA takes the hooks of its module off. They
    cannot come off when it is collected, for torch may be iterating over them (in `state_dict`). Of
    the hooks of forwards it iterates over a copy.

    A deep copy or a pickle of the teacher is no teacher: it gets a hook that does nothing.
    """

    def __init__(self, announce: Callable[[], None], outer: bool) -> None:
        self._announce, self._outer = WeakMethod(announce), outer
        self.spent: list[RemovableHandle] = []  # when the EMA is gone
        # NOTE: a graph cannot wait; it breaks where a read must be announced. Every hook has this,
        # as dynamo runs what it compiled for the hook of one module with that of another
        # (config.skip_nnmodule_hook_guards).
        self._breaking = torch.compiler.disable(self._tell)

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._tell()
        elif self._outer:
            self._breaking()

    def _tell(self) -> None:
        announce = self._announce()
        if announce is None:
            self.take_off_spent()
        else:
            announce()

    def take_off_spent(self) -> None:
        """Take the hooks of this module off if the EMA is gone."""
        for handle in self.spent if self._announce() is None else ():
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        # NOTE: a function of the standard library's, so that pickled models load where dist_ema is
        # not installed.
        return getattr, (nullcontext(), "__exit__")
