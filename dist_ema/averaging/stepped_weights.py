"""Do optimizers step the averaged weights, their fp32 masters, or others? Warnings of `attach`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..sharding import ownership, parameters, storage, zero
from ..text import warn
from .averages import AveragedWeights

__all__ = ["refuse_beside_masters", "steps_any", "warn_of_others"]


def steps_any(optimizers: Iterable[Any], weights: AveragedWeights) -> bool:
    """One of the optimizers holds an averaged weight, or memory of one."""
    averaged = weights.averages[0].averaged
    params = [p for optimizer in optimizers for p in _stepped_parameters(optimizer)]
    storages = {state.local.untyped_storage().data_ptr() for state in averaged}
    # A wrapper may hold another Parameter over the same memory.
    memories = [memory for p in params if (memory := storage.memory_of(p)) is not None]
    return not {id(p) for p in params}.isdisjoint(id(state.shard.tensor) for state in averaged) or (
        any(memory.untyped_storage().data_ptr() in storages for memory in memories)
    )


def _stepped_parameters(optimizer: Any) -> list[Tensor]:
    """The parameters that an optimizer holds; for an engine the weights that it trains.

    transformers gives one that does nothing for those that step each layer in the backward.
    """
    if zero.is_engine(optimizer):
        return list(optimizer.parameters())
    per_layer = getattr(getattr(optimizer, "optimizer", optimizer), "optimizer_dict", None) or {}
    return [
        *(parameter for parameter in per_layer if isinstance(parameter, Tensor)),
        *(p for group in optimizer.param_groups for p in group["params"]),
    ]


def warn_of_others(weights: AveragedWeights, optimizers: Sequence[Optimizer]) -> None:
    """Warn where the optimizers step other tensors than those that are averaged."""
    is_stepped = not weights.names() or steps_any(optimizers, weights)
    if not is_stepped:
        weights.follow(tree=True)  # it may hold what has replaced them, or where they moved
        is_stepped = steps_any(optimizers, weights)
    if not is_stepped:
        names = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        warn(
            f"ema.attach(): {names} holds none of the averaged weights. If it steps copies of "
            "them (fp32 master weights), the average is one step behind: call ema.update() "
            "after they were written back."
        )
    elif displaced := _displaced(weights, optimizers):
        warn(
            f"ema.attach(): the optimizers hold other tensors in place of "
            f"{', '.join(displaced[:5])}, it seems. If they are fp32 master weights, call "
            "ema.update() after they were written back. If the module was replaced, build the "
            "EMA on the model, or on the parameters that the optimizers step."
        )


def _displaced(weights: AveragedWeights, optimizers: Iterable[Optimizer]) -> list[str]:
    """Weights in whose place the optimizers seem to hold other tensors.

    They may be masters of 16-bit weights. Of parameters without their module they may be those of a
    module that has replaced one.
    """
    shards = [state.shard for state in weights.averages[0].averaged]
    params = [p for optimizer in optimizers for p in _stepped_parameters(optimizer)]
    averaged, stepped = {id(shard.tensor) for shard in shards}, set(map(id, params))
    unknown_forms = {(p.shape, p.dtype.itemsize) for p in params if id(p) not in averaged}
    sizes = {2: 4}  # bytes per element: of a weight, and of what may stand in its place
    if isinstance(weights.model, parameters.Parameters):
        sizes |= {4: 4, 8: 8, 16: 16}
    return [
        shard.name
        for shard in shards
        if id(shard.tensor) not in stepped
        and shard.master is None
        and (shard.tensor.shape, sizes.get(shard.tensor.dtype.itemsize)) in unknown_forms
    ]


def refuse_beside_masters(
    states: Sequence[ownership.ParamState], optimizers: Sequence[Any]
) -> None:
    """Under DeepSpeed only the end of the engine's step says that the masters are final.

    Raises:
        ValueError: Something else than the engine was given, or its masters cannot be seen.
    """
    engines = [zero.is_engine(optimizer) for optimizer in optimizers]
    mastered = [state for state in states if state.shard.master is not None]
    if mastered and not all(engines):
        raise ValueError(
            f"{mastered[0].name} has fp32 masters at DeepSpeed, and its optimizers step them "
            "before the step is complete. Call ema.attach(engine), with what deepspeed.initialize "
            "returned first."
        )
    hidden = [
        state.name
        for state in states
        if state.shard.master is None and state.shard.dtype.itemsize == 2 and state.shard.trainable
    ]
    if any(engines) and hidden:
        raise ValueError(
            f"{', '.join(hidden[:5])} is kept in 16 bits here, and DeepSpeed without ZeRO does not "
            "show its fp32 masters. Use ZeRO stage 1, which needs less memory."
        )
