"""What modules derive from their weights and keep: caches, and the vectors of power iterations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .records import Shard

__all__ = ["caches_dropped", "has_caches", "is_power_iteration_vector", "spectral_norms"]


@contextmanager
def caches_dropped(model: nn.Module) -> Iterator[None]:
    """Let modules forget what they derived from their weights, which change inside the block.

    A module in eval mode whose class overrides `train` is put into training mode before the
    weights change and back after that: it may hold a cache, or have merged one weight into
    another. Every mode is restored. The cache of `parametrize.cached()` is emptied.
    """
    modes = [(module, module.training) for module in model.modules()]
    sleeping = [module for module, mode in modes if not mode and _overrides_train(module)]
    for module in sleeping:
        module.train(True)
    parametrize._cache.clear()
    try:
        yield
    finally:
        parametrize._cache.clear()
        for module in sleeping:
            module.train(False)
        # NOTE: `train` of a parent reaches its children, which may have had another mode.
        for module, mode in modes if sleeping else ():
            if module.training != mode and _overrides_train(module):
                module.train(mode)
        for module, mode in modes if sleeping else ():
            module.training = mode


def has_caches(model: nn.Module) -> bool:
    """Some module may keep what it derived from its weights."""
    return any(_overrides_train(module) for module in model.modules())


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train


def spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """The spectral norms of the old style that hang on this module as forward pre-hooks."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def is_power_iteration_vector(shard: Shard) -> bool:
    """The buffer is a singular vector of a spectral norm: the mean of two of them is none."""
    module, name = shard.place
    if isinstance(module, _SpectralNorm):
        return name in ("_u", "_v")
    return any(name in (f"{norm.name}_u", f"{norm.name}_v") for norm in spectral_norms(module))
