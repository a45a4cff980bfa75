"""How a module tree differs from its records, by name; `memory_watch` notices that it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import wrappers
from .fsdp1 import FlatSlices, flat_slices, identity, registered_parameters
from .fsdp2 import unsharded_copies
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
    _compare_buffers(walk, [shard for shard in shards if shard.kind == "buffer"], changes)
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
    flats = flat_slices(module for _, module in walk)
    keys = {shard.name: _identity_now(shard, flats) for shard in weights}
    expected = dict(keys)
    expected |= {alias: keys[shard.name] for shard in weights for alias in shard.aliases}
    changes: defaultdict[str, list[str]] = defaultdict(list)
    registered = {
        prefix + name: identity(tensor, flat)
        for prefix, module in walk
        if module._parameters or flats
        for name, tensor, flat in registered_parameters(module, flats)
    }
    if registered == expected:
        return changes
    for name in [name for name in expected if name not in registered]:
        changes["gone" if name in keys else "retied"].append(name)
    recorded_names, copies = set(keys.values()), unsharded_copies(module for _, module in walk)
    for prefix, module in walk:
        for name, tensor, flat in registered_parameters(module, flats):
            full, tensor = prefix + name, copies.get(id(tensor), tensor)
            key = identity(tensor, flat)
            if expected.get(full) == key:
                continue
            if key in recorded_names or (full in expected and full not in keys):
                changes["retied"].append(full)
            elif full in keys:
                changes["replaced"].append(full)
                changes["replaced_frozen"] += [] if tensor.requires_grad else [full]
            else:
                changes["new_trainable" if tensor.requires_grad else "new_frozen"].append(full)
    return changes


def _compare_buffers(
    walk: list[tuple[str, nn.Module]], buffers: list[Shard], changes: defaultdict[str, list[str]]
) -> None:
    expected = {name: shard for shard in buffers for name in (shard.name, *shard.aliases)}
    missing, seen = set(expected), set()
    for prefix, module in walk:
        for name, buffer in module._buffers.items() if module._buffers else ():
            full = prefix + name
            if full in seen:  # of another stage
                continue
            seen.add(full)
            shard = expected.get(full)
            if shard is None:
                if buffer is not None:
                    changes["new_buffers"].append(full)
            elif buffer is not None or not shard.persistent:
                missing.discard(full)
                persistent = name not in module._non_persistent_buffers_set and not shard.opaque
                tied = full != shard.name and buffer is registered(shard)
                if persistent != shard.persistent or not (module is shard.place[0] or tied):
                    changes["replaced_buffers"].append(full)
    changes["gone_buffers"] += [name for name in expected if name in missing]


def _identity_now(shard: Shard, flats: FlatSlices) -> Any:
    """The `_identity` that `_parameters` finds where the weight is still registered."""
    module, name = shard.place
    flat = flats.get(id(module), {}).get(name)
    return identity(
        shard.tensor, flat if flat is not None and flat.tensor is shard.tensor else None
    )
