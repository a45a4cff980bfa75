"""How a model differs from its records. `compare_inventory` says it, `MemoryWatch` only whether.

An update reads memory by address. So it must know whether a weight lies elsewhere or in another
order, or is no longer what the model registers ([Note: a model lives] in storage_watch). Each of
these has an owner here. They are asked before every update, so C loops over the weights, and calls
torch as seldom as it can.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from . import torch_classes, wrappers
from .fsdp1 import FlatSlices, flat_slices, identity, registered_parameters
from .parameters import unsharded_copies
from .records import Shard, registered

__all__ = ["InventoryChanges", "MemoryWatch", "compare_inventory"]


@dataclass(frozen=True)
class InventoryChanges:
    """How a module tree differs from the records of it, by canonical names.

    `replaced`, `gone` and `retied` need a decision of the user.
    """

    replaced: tuple[str, ...] = ()  # weights: another tensor object stands under the name
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
    found = {
        prefix + name: identity(tensor, flat)
        for prefix, module in walk
        if module._parameters or flats
        for name, tensor, flat in registered_parameters(module, flats)
    }
    if found == expected:
        return changes
    for name in [name for name in expected if name not in found]:
        changes["gone" if name in keys else "retied"].append(name)
    known, copies = set(keys.values()), unsharded_copies(module for _, module in walk)
    for prefix, module in walk:
        for name, tensor, flat in registered_parameters(module, flats):
            full, tensor = prefix + name, copies.get(id(tensor), tensor)
            key = identity(tensor, flat)
            if expected.get(full) == key:
                continue
            if key in known or (full in expected and full not in keys):
                changes["retied"].append(full)
            elif full in keys:
                changes["replaced"].append(full)
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


# --- what an update looks at ----------------------------------------------------------------------


_LOCAL_TENSOR = operator.attrgetter("_local_tensor")  # of a DTensor


class MemoryWatch:
    """Where some weights lie, in which order, and the module tree that registers them.

    Args:
        shards: The records of the weights.
        roots: Modules whose tree is watched too.

    Note:
        *Cost*: 0.06 us per weight, 0.04 us per module, and 0.05 us more per weight of which two
        dimensions are equal. All weights of one FSDP1 flat parameter count once.
    """

    def __init__(self, shards: Iterable[Shard], roots: Iterable[nn.Module] = ()) -> None:
        plain: dict[int, Tensor] = {}
        self._dtensors: list[Tensor] = []  # whose local tensor FSDP2 replaces
        readers: dict[int, Callable[[], Tensor]] = {}  # FSDP1 flat parameters, buffers, masters
        for shard in shards:
            local = shard.local_tensor()
            if torch_classes.is_dtensor(shard.tensor) and local is shard.tensor._local_tensor:
                self._dtensors.append(shard.tensor)
            elif shard.kind != "buffer" and local is shard.tensor:
                plain[id(local)] = local
            else:
                readers[id(local)] = shard.local_tensor
            if shard.master is not None:
                readers[id(shard.master())] = shard.master
        self._readers = list(readers.values())
        self._tree, self._orders = _Tree(roots, plain), _Orders(plain.values())
        self._seen = self._look()

    def changed(self) -> bool:
        """Something lies elsewhere, in another order, or was replaced."""
        return self._tree.changed() or self._look() != self._seen

    def _look(self) -> tuple[Any, ...]:
        read = [reader() for reader in self._readers]
        weights = [*self._tree.weights(), map(_LOCAL_TENSOR, self._dtensors), read]
        return _addresses(chain.from_iterable(weights)), self._orders.now(read)


class _Tree:
    """What the modules under some roots register: live views, which cost no copies.

    Args:
        roots: Modules.
        plain: The parameters whose addresses are compared, by identity.
    """

    def __init__(self, roots: Iterable[nn.Module], plain: Mapping[int, Tensor]) -> None:
        modules: list[Any] = [
            module
            for module in dict.fromkeys(module for root in roots for module in root.modules())
            if isinstance(module._parameters, dict)  # not a scripted one, which cannot be edited
        ]
        parents = [
            module._modules for module in modules if module._modules or not module._parameters
        ]
        self._children = [children.values() for children in parents]
        self._whole: list[Iterable[Tensor]] = []  # parameters of modules that have no others
        self._owners: list[dict[str, Tensor]] = []  # of others too, or of none (None)
        self._names: list[str] = []  # one for each owner
        for parameters in [module._parameters for module in modules]:
            known = [name for name, tensor in parameters.items() if id(tensor) in plain]
            if len(known) == len(parameters):
                self._whole.append(parameters.values())
            else:
                self._owners += [parameters] * len(known)
                self._names += known
        found = set(map(id, chain.from_iterable(self.weights())))
        self._whole.append([tensor for key, tensor in plain.items() if key not in found])
        self._seen = [*chain.from_iterable(self._children), self]

    def weights(self) -> list[Iterable[Any]]:
        """The plain parameters, as modules register them now."""
        return [*self._whole, map(dict.get, self._owners, self._names)]

    def changed(self) -> bool:
        """Another child is registered, one more, or one less."""
        now = chain(chain.from_iterable(self._children), (self,))  # which ends both
        return not all(map(operator.is_, now, self._seen))


def _addresses(tensors: Iterable[Tensor]) -> int | None:
    """One number for all addresses; None where a weight is gone, or has no memory.

    A single other address always gives another number, several do but for a chance of 2^-64.
    """
    try:
        return hash(tuple(map(Tensor.data_ptr, tensors)))
    except (TypeError, RuntimeError):
        return None


class _Orders:
    """In which order the elements lie, where a transposed view has the same address and shape."""

    def __init__(self, tensors: Collection[Tensor]) -> None:
        turnable = [tensor for tensor in tensors if _has_equal_dimensions(tensor)]
        self._row_major = [tensor for tensor in turnable if tensor.is_contiguous()]
        self._permuted = [tensor for tensor in turnable if not tensor.is_contiguous()]
        self._complex = [tensor for tensor in tensors if tensor.is_complex()]

    def now(self, read: list[Tensor]) -> list[Any]:
        """What stays equal as long as no weight is turned or conjugated."""
        row_major = all(map(Tensor.is_contiguous, self._row_major))
        strides = map(Tensor.stride, chain(self._permuted, read))
        return [row_major, *strides, *map(Tensor.is_conj, self._complex)]


def _has_equal_dimensions(tensor: Tensor) -> bool:
    long = [length for length in tensor.shape if length > 1]
    return len(set(long)) < len(long)
