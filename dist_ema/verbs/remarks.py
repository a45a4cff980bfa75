"""What verbs warn of: an average that did not follow, and what it does not hold."""

from __future__ import annotations

from ..averaging.averages import AveragedWeights
from ..sharding import records, wrappers
from ..sharding.parameters import Parameters
from ..text import warn

__all__ = ["warn_if_idle", "warn_if_nameless", "warn_of_unexplained_keys"]


def warn_if_idle(verb: str, weights: AveragedWeights) -> None:
    """The model was trained, and the average did not follow."""
    if weights.idle:
        warn(
            f"ema.{verb}(): the weights were written since the last call, and no update came. Was "
            "ema.attach() given the optimizer that steps, or ema.update() called? (A replayed CUDA "
            "graph runs no hooks.)"
        )


def warn_if_nameless(verb: str, weights: AveragedWeights) -> None:
    """The files will have names that no model knows."""
    if isinstance(weights.model, Parameters) and weights.model.nameless:
        warn(
            f"ema.{verb}(): the parameters came without names, so the files call them by their "
            "place in the list: 0, 1, ... Pass model.named_parameters() or the model for files "
            "that a model can load."
        )


def warn_of_unexplained_keys(verb: str, weights: AveragedWeights) -> None:
    """What the model's state_dict holds and no parameter or buffer explains is in no file."""
    if weights.selection.only is not None or isinstance(weights.model, Parameters):
        return
    recorded = {
        name: records.registered_buffer(shard.place) if shard.kind == "buffer" else shard.tensor
        for shard in (state.shard for state in weights.averages[0].persistent)
        for name in (shard.name, *shard.aliases)
    }
    keys = wrappers.unexplained_keys(weights.model, recorded)
    if verb == "gather":  # what its state_dict lacks is named by load_state_dict
        keys = [key for key in keys if key in recorded]
    if keys:
        warn(
            f"ema.{verb}(): {', '.join(keys[:5])} of the state_dict is no plain parameter or "
            "buffer, or not the one of that name (quantisation state, extra state, a hook, a "
            "frozen tensor subclass?), so the average does not hold it. Save it beside."
        )
