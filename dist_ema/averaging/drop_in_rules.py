"""`move_by`, `pull`: what drop-ins do beside updates: other rules, live pulled to an average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..sharding import geometry
from ..sharding.numbering import Numbering
from . import executors, swap
from .averages import AveragedWeights
from .kernels.eager import ShadowPair, UpdatePlan
from .swap_registry import Reads

__all__ = ["move_by", "pull"]


def move_by(
    weights: AveragedWeights, rule: Callable[[Sequence[tuple[Tensor, Tensor]]], None]
) -> None:
    """One update by the arithmetic of a drop-in.

    The views have the shapes of whole weights where this rank averages all of one, else of the
    boxes that it holds. Live comes in the shadow's dtype, on its device.

    Args:
        weights: Whose first average moves.
        rule: rule([(shadow, live), ...]) writes the shadows.
    """
    weights.refuse("ema.update", Reads.LIVE)
    weights.settle()
    # A rule writes shadows without an engine, so it checks what `AveragedWeights.move` checks.
    weights.follow(tree=weights.is_tree_moved)
    weights.clock.move([average.schedule for average in weights.averages], 1.0)
    views = []
    for state in weights.averages[0].averaged:
        live = state.source.to(state.own_shadow)
        boxes = (
            geometry.boxes_with_data(state.shard, state.averaged_region, elements)
            for elements in (state.own_shadow, live)
        )
        views += [(shadow, value) for (_, shadow), (_, value) in zip(*boxes, strict=True)]
    rule(views)
    weights.after_move()


def pull(weights: AveragedWeights, weight: float) -> None:
    """Move live weights towards the first average, on every replica.

    Args:
        weights: The averages, and the live weights that move.
        weight: The weight of the average; 1 copies it.

    Note:
        *Collective* where replicated weights are split among the ranks.
    """
    weights.ready()
    averaged = weights.averages[0].averaged
    # Orders: copies of offloaded weights that a forward asked for, then this write.
    executors.await_host_reads(state.local for state in averaged)
    pairs = []
    for state in averaged:
        if weight == 1:
            state.source.copy_(state.own_shadow)
        else:
            numbers = Numbering.of(state.shard, state.averaged_region, state.source.device)
            # The other way round: live moves, towards the average.
            pairs.append(ShadowPair(state.name, [state.source], state.own_shadow, numbers))
    UpdatePlan(pairs, weights.seed).run([weight], weights.clock.updates)
    for state in averaged:
        # DeepSpeed computes with the 16-bit copy of what was moved.
        if state.shard.master is not None:
            state.live.copy_(state.source)
    if weights.placement.split:
        assert weights.ranks is not None
        swap.broadcast_to_replicas("weights.pull", weights.ranks, averaged)
    weights.mark()
