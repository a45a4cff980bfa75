"""`compare_inventory`: what a module tree has replaced, tied, frozen, gained or lost, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from . import fsdp1, fsdp2, wrappers
from .records import Shard, registered

__all__ = ["InventoryChanges", "compare_inventory"]


@dataclass(frozen=True)
class InventoryChanges:
    """How a module tree differs from the records of it, by canonical names.

    `replaced`, `gone` and `retied` need a decision of the user.
    """

    replaced: tuple[str, ...] = ()  # weights: another tensor object stands under the name
    replaced_frozen: tuple[str, ...] = ()  # those whose new object needs no gradient
    gone: tuple[str, ...] = ()  # weights that the tree no longer has
    new_trainable: tuple[str, ...] = ()
    new_frozen: tuple[str, ...] = ()
    retied: tuple[str, ...] = ()  # names that came to a known weight, or that left one which stays
    unfrozen: tuple[str, ...] = ()  # weights that need a gradient now, and did not
    frozen: tuple[str, ...] = ()
    new_buffers: tuple[str, ...] = ()  # those that were None among them
    replaced_buffers: tuple[str, ...] = ()  # by another module's, or tied otherwise
    gone_buffers: tuple[str, ...] = ()


def compare_inventory(model: nn.Module, shards: Sequence[Shard]) -> InventoryChanges:
    """Compare the records of a model with its module tree as it is now.

    Args:
        model: What `find_shards` was given.
        shards: What it found then.

    Returns:
        What changed. Weights are compared by identity, so a storage that moved is no change.
        Modules assign new tensors to their buffers, so these are compared by their module.

    Note:
        Local. FSDP2 may hold weights unsharded. *Cost*: 1 us per weight; no element is read.
    """
    walk = [(prefix, module) for prefix, module, _ in wrappers.walk_modules(model)]
    weights = [shard for shard in shards if shard.kind != "buffer"]
    changes = _compare_weights(walk, weights)
    _compare_buffers(walk, shards, changes)
    changed = {*changes["replaced"], *changes["gone"]}
    for shard in weights:
        needs_gradient = shard.tensor.requires_grad
        flipped = needs_gradient != (shard.kind == "trainable") and not shard.average_frozen
        if flipped and shard.name not in changed:
            changes["unfrozen" if needs_gradient else "frozen"].append(shard.name)
    return InventoryChanges(**{field: tuple(names) for field, names in changes.items()})


def _compare_weights(
    walk: list[tuple[str, nn.Module]], weights: list[Shard]
) -> defaultdict[str, list[str]]:
    """The changes of weights, by the fields of `InventoryChanges`."""
    flats = fsdp1.flat_slices(module for _, module in walk)
    recorded = {  # the identity of each weight where it is still registered
        shard.name: fsdp1.identity(
            shard.tensor, fsdp1.bound_slice(shard.place, shard.tensor, flats)
        )
        for shard in weights
    }
    expected = recorded | {
        alias: recorded[shard.name] for shard in weights for alias in shard.aliases
    }
    registered = [
        (prefix + name, tensor, flat_slice)
        for prefix, module in walk
        if module._parameters or flats
        for name, tensor, flat_slice in fsdp1.registered_parameters(module, flats)
    ]
    changes: defaultdict[str, list[str]] = defaultdict(list)
    identities = {name: fsdp1.identity(tensor, flat) for name, tensor, flat in registered}
    if identities == expected:
        return changes
    buffers = {
        prefix + name: id(buffer)
        for prefix, module in walk
        for name, buffer in module._buffers.items()
    }
    for name in [name for name in expected if name not in identities]:
        # A Parameter may be registered as a buffer, too.
        if name in recorded or buffers.get(name) != expected[name]:
            changes["gone" if name in recorded else "retied"].append(name)
    known, copies = set(recorded.values()), fsdp2.unsharded_copies(module for _, module in walk)
    for name, tensor, flat_slice in registered:
        tensor = copies.get(id(tensor), tensor)
        identity = fsdp1.identity(tensor, flat_slice)
        if expected.get(name) == identity:
            continue
        if identity in known or (name in expected and name not in recorded):
            changes["retied"].append(name)
        elif name in recorded:
            changes["replaced"].append(name)
            changes["replaced_frozen"] += [] if tensor.requires_grad else [name]
        else:
            changes["new_trainable" if tensor.requires_grad else "new_frozen"].append(name)
    return changes


def _compare_buffers(
    walk: list[tuple[str, nn.Module]], shards: Sequence[Shard], changes: defaultdict[str, list[str]]
) -> None:
    recorded = {name: shard for shard in shards for name in shard.names}
    expected = {name: shard for name, shard in recorded.items() if shard.kind == "buffer"}
    missing = dict.fromkeys(expected)
    places = {
        prefix + name: (module, name, buffer)
        for prefix, module in reversed(walk)  # of several stages the first one counts
        for name, buffer in module._buffers.items()  # a scripted module has no dict to iterate
    }
    for full, (module, name, buffer) in places.items():
        shard = expected.get(full)
        if shard is None:
            changes["new_buffers"] += [] if buffer is None or full in recorded else [full]
        elif buffer is not None or not shard.persistent:
            del missing[full]
            is_persistent = name not in module._non_persistent_buffers_set and not shard.opaque
            is_tied = full != shard.name and buffer is registered(shard)
            if is_persistent != shard.persistent or not (module is shard.place[0] or is_tied):
                changes["replaced_buffers"].append(full)
    changes["gone_buffers"] += missing
