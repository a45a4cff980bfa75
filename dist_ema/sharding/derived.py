"""What modules derive from their weights and keep: caches, and the vectors of power iterations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.hooks import RemovableHandle

from . import records
from .wrapper_names import canonical

__all__ = ["caches_dropped", "is_power_iteration_vector", "merged_modules", "refreshed_vectors"]

ITERATIONS = 15  # as torch makes them at construction


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
        # NOTE: `train` of a parent reaches its children, which may have had another mode.
        for module, mode in modes if sleeping else ():
            if module.training != mode and _overrides_train(module):
                module.train(mode)
        for module, mode in modes if sleeping else ():
            module.training = mode


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train


def merged_modules(model: nn.Module) -> list[str]:
    """Names of modules into whose weights peft has merged adapters: the adapters are not read."""
    return [
        canonical(name)
        for name, module in model.named_modules()
        if getattr(module, "merged_adapters", None)
    ]


@contextmanager
def refreshed_vectors(model: nn.Module) -> Iterator[list[Tensor]]:
    """Every forward inside the block first refreshes the singular vectors of its spectral norms.

    The forward is where wrappers show whole weights. If the block raises, the vectors are restored.

    Returns:
        The vectors, in the same order on every rank. *Aliases* the model.
    """
    hooks: list[RemovableHandle] = []
    vectors: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _SpectralNorm) and hasattr(module, "_u"):
            hooks.append(module.register_forward_pre_hook(_iterate))
            vectors += [module._u, module._v]
        for norm in _spectral_norms(module):
            hooks.append(module.register_forward_pre_hook(partial(_iterate_old, norm)))
            vectors += [getattr(module, f"{norm.name}_u"), getattr(module, f"{norm.name}_v")]
    before = [vector.clone() for vector in vectors]
    try:
        yield vectors
    except BaseException:
        for vector, value in zip(vectors, before, strict=True):
            vector.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _iterate(module: nn.Module, args: tuple[Tensor]) -> None:
    assert isinstance(module, _SpectralNorm)
    module._power_method(module._reshape_weight_to_matrix(args[0]), ITERATIONS)


def _iterate_old(norm: SpectralNorm, module: nn.Module, _: object) -> None:
    """After the norm's own hook, as FSDP's hook that gathers the weight comes before that."""
    once, norm.n_power_iterations = norm.n_power_iterations, ITERATIONS
    try:
        setattr(module, norm.name, norm.compute_weight(module, do_power_iteration=True))
    finally:
        norm.n_power_iterations = once


def _spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """The spectral norms of the old style that hang on this module as forward pre-hooks."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def is_power_iteration_vector(shard: records.Shard) -> bool:
    """Whether a buffer is a singular vector of a spectral norm, which has no mean."""
    module, name = shard.place
    if isinstance(module, _SpectralNorm):
        return name in ("_u", "_v")
    return any(name in (f"{norm.name}_u", f"{norm.name}_v") for norm in _spectral_norms(module))
