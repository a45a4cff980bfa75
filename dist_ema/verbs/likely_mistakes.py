"""What verbs warn of: updates that never came or came twice, weights and keys that files lack."""

from __future__ import annotations

from ..averaging.averages import AveragedWeights
from ..sharding import parameters, records, wrappers
from ..text import warn
from .entry import VerbEntry

__all__ = ["warn_if_doubled", "warn_if_idle", "warn_if_nameless", "warn_of_unexplained_keys"]

DOUBLED = 3  # updates by hand, each after one of an attached optimizer, that are no coincidence


def warn_if_idle(verb: str, weights: AveragedWeights) -> None:
    """Warn if the model was trained and the average did not follow."""
    if weights.idle:
        warn(
            f"ema.{verb}(): the weights were written since the last call, and no update came. Was "
            "ema.attach() given the optimizer that steps, or ema.update() called? (A replayed CUDA "
            "graph runs no hooks.)"
        )


def warn_if_doubled(entry: VerbEntry) -> None:
    """An update was called by hand after each of those that attached optimizers made."""
    updates, (before, times) = entry.weights.clock.updates, entry.by_hand
    since = updates - before  # this one, and with `every=` not always one of the hooks'
    entry.by_hand = updates, 0 if since > 2 else times + (since == 2)
    if entry.by_hand[1] == DOUBLED > times:
        warn(
            "ema.update() after every update of ema.attach(): each step moves the average twice. "
            "Call one of them; ema.detach() takes the hooks off."
        )


def warn_if_nameless(verb: str, weights: AveragedWeights) -> None:
    """Warn if the files will have names that no model knows."""
    if isinstance(weights.model, parameters.Parameters) and weights.model.nameless:
        warn(
            f"ema.{verb}(): the parameters came without names, so the files call them by their "
            "place in the list: 0, 1, ... Pass model.named_parameters() or the model for files "
            "that a model can load."
        )


def warn_of_unexplained_keys(verb: str, weights: AveragedWeights) -> None:
    """Warn of entries of the model's state_dict that no file will hold."""
    if weights.selection.only is not None or isinstance(weights.model, parameters.Parameters):
        return
    recorded = {
        name: records.registered_buffer(shard.place) if shard.kind == "buffer" else shard.tensor
        for shard in (state.shard for state in weights.averages[0].persistent)
        for name in shard.names
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
