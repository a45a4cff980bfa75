"""`MemoryWatch`: whether weights lie at the addresses, in the order and in the tree where they lay.

An update reads memory by address, so it asks that first ([Note: a model lives] in storage_watch).
Each of the three questions has an owner here.

[Note: one look]  A call of torch's per weight, from Python, takes 0.06 us, and 0.15 us where the
step has emptied the caches. So where numba is installed, one compiled loop looks at all of them
(`memory_watch_numba`). It says only whether something is another object or lies elsewhere; what
that means is decided here, as it is without numba.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import torch_classes
from .records import Shard

__all__ = ["MemoryWatch", "find_loop"]

MANY = 100  # weights; fewer are not worth compiling the loop for
_LOCAL_TENSOR = operator.attrgetter("_local_tensor")  # of a DTensor


class MemoryWatch:
    """Where some weights lie, in which order, and the module tree that registers them.

    Args:
        shards: The records of the weights.
        roots: Modules whose tree is watched too.

    Note:
        *Aliases*: keeps the tensors. *Cost*: per weight 0.02 us and 0.04 us more for a DTensor
        ([Note: one look]; without numba 0.1 us), per module 0.01 us (0.02 us), and 0.05 us more per
        weight of which two dimensions are equal. All weights of one FSDP1 flat parameter count
        once.
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
        self._tree, self._orders = _ModuleTree(roots, plain), _Orders(plain.values())
        self._addresses, self._read = _address_hash(self._weights()), self._state()
        # A subclass may answer for another memory than its own.
        plain_types = {*map(type, self._weights())} <= {Tensor, nn.Parameter}
        many = len(self._tree.names) + len(self._dtensors) >= MANY
        self._is_compiled = many and plain_types and self._addresses is not None
        self._table: _Table | None = None  # until the first look, which may compile the loop

    def changed(self) -> bool:
        """Something lies elsewhere, in another order, or was replaced."""
        if self._table is None or self._table.differs():
            if self._tree.changed() or _address_hash(self._weights()) != self._addresses:
                return True
            # Other objects, in the memory of those before; or this is the first look.
            loop = find_loop() if self._is_compiled else None
            self._table = None if loop is None else _Table(loop, self._tree, self._dtensors)
        return self._state() != self._read

    def _weights(self) -> Iterable[Tensor]:
        return chain(self._tree.weights(), map(_LOCAL_TENSOR, self._dtensors))

    def _state(self) -> tuple[Any, ...]:
        read = [reader() for reader in self._readers]
        return _address_hash(read), self._orders.now(read)


class _ModuleTree:
    """What the modules under some roots register: their dictionaries, which are live.

    Args:
        roots: Modules.
        plain: The parameters whose addresses are compared, by identity.

    Attributes:
        parents: The children of modules, by name.
        owners: The parameters of modules: a dictionary for each weight.
        names: That of each weight in it.
        closed: Dictionaries that may not grow: the parents, and parameters that are all watched.
    """

    def __init__(self, roots: Iterable[nn.Module], plain: Mapping[int, Tensor]) -> None:
        modules: list[Any] = [
            module
            for module in dict.fromkeys(module for root in roots for module in root.modules())
            if isinstance(module._parameters, dict)  # not a scripted one, which cannot be edited
        ]
        self.parents: list[dict[str, nn.Module]] = [
            module._modules for module in modules if module._modules or not module._parameters
        ]
        owners = {
            id(tensor): (module._parameters, name)
            for module in modules
            for name, tensor in module._parameters.items()
            if id(tensor) in plain
        }
        # No module under the roots registers these.
        others = {str(key): tensor for key, tensor in plain.items() if key not in owners}
        places = [*owners.values(), *((others, key) for key in others)]
        self.owners: list[dict[str, Tensor]] = [owner for owner, _ in places]
        self.names = [name for _, name in places]
        whole = [
            module._parameters
            for module in modules
            if all(id(tensor) in plain for tensor in module._parameters.values())
        ]
        self.closed: list[dict[str, Any]] = [*self.parents, *whole]
        self._children = [children.values() for children in self.parents]
        self._seen, self._sizes = list(chain.from_iterable(self._children)), self.sizes()

    def weights(self) -> Iterable[Any]:
        """The plain parameters, as modules register them now."""
        return map(dict.get, self.owners, self.names)

    def changed(self) -> bool:
        """Another child is registered, or a child or a weight more or less."""
        children = chain.from_iterable(self._children)
        return self.sizes() != self._sizes or not all(map(operator.is_, children, self._seen))

    def sizes(self) -> list[int]:
        """How many entries the closed dictionaries have."""
        return list(map(len, self.closed))


class _Table:
    """What `_ModuleTree` and DTensors held at one moment, for the compiled loop ([Note: one look]).

    Args:
        loop: As `find_loop` returns it.
        tree: Whose weights and children are looked at.
        dtensors: Whose local tensors are looked at.
    """

    def __init__(
        self, loop: Callable[..., bool], tree: _ModuleTree, dtensors: list[Tensor]
    ) -> None:
        weights, locals_ = list(tree.weights()), list(map(_LOCAL_TENSOR, dtensors))
        # The loop reads all of these by `id`. So they live as long as the table does.
        self._kept = [tree, weights, [*map(dict.copy, tree.parents)]]
        self._dtensors, self._locals = dtensors, locals_
        rows = [
            *zip(tree.owners, tree.names, weights, strict=True),
            *((children, *item) for children in tree.parents for item in children.items()),
        ]
        objects = [*map(id, chain.from_iterable(rows)), *map(id, locals_)]
        addresses = map(Tensor.data_ptr, [*weights, *locals_])
        sizes = chain.from_iterable(zip(map(id, tree.closed), tree.sizes(), strict=True))
        self._arrays = [array("Q", numbers) for numbers in (objects, addresses, sizes)]
        pointers = [numbers.buffer_info()[0] for numbers in self._arrays]
        counts = len(weights), len(rows), len(locals_), len(tree.closed)
        self._differs = partial(loop, *pointers, *counts)

    def differs(self) -> bool:
        """A weight or a child is another object, or lies elsewhere."""
        locals_ = map(_LOCAL_TENSOR, self._dtensors)
        return not all(map(operator.is_, locals_, self._locals)) or self._differs()


@cache
def find_loop() -> Callable[..., bool] | None:
    """The compiled loop. None without numba, or with a torch that lacks the function for it."""
    read = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)
    try:
        from . import memory_watch_numba

        return None if read is None else memory_watch_numba.compile_loop(read)
    except Exception:  # numba is absent, disabled, or refuses our code
        return None


def _address_hash(tensors: Iterable[Tensor]) -> int | None:
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
        # One answer for all: `stride` of each would make a tuple.
        row_major = all(map(Tensor.is_contiguous, self._row_major))
        strides = map(Tensor.stride, chain(self._permuted, read))
        return [row_major, *strides, *map(Tensor.is_conj, self._complex)]


def _has_equal_dimensions(tensor: Tensor) -> bool:
    long = [length for length in tensor.shape if length > 1]
    return len(set(long)) < len(long)
