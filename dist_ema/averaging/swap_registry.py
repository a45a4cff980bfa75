"""Which averages of this process share weights, and which of them have a swap open.

Several EMAs may average one model, or parts of it. While one of them has swapped its average in,
the live weights are not the training weights, and the others must know. Averages are related by the
identity of the weights that they share.

NOTE: no weak reference to a weight is kept. `torch.utils.swap_tensors` refuses a tensor that has
one, and with it every `model.to()` of a sharded model. Identities suffice: an average keeps its
weights alive, so none is used twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from weakref import WeakSet

from torch import Tensor

__all__ = ["SwapRegistry"]

_REGISTRIES: WeakSet[SwapRegistry] = WeakSet()
_OPENINGS = itertools.count(1)


class SwapRegistry:
    """The open swaps that concern one set of averages."""

    def __init__(self) -> None:
        self.open = False  # the model holds one of our averages
        self.open_beside = 0  # averages of the same weights that have a swap open
        self.writes = 0  # times that a swap, ours or theirs, wrote the weights
        self._opened = 0  # when our swap was opened, counted over all of them
        self._waiting: list[Callable[[], None]] = []  # for our swap, which covers theirs
        self._weights: frozenset[int] = frozenset()
        self._related: WeakSet[SwapRegistry] = WeakSet()
        _REGISTRIES.add(self)

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Relate to every other average of one of these weights."""
        self._weights = frozenset(map(id, weights))
        related = [other for other in _REGISTRIES if other is not self and self._shares(other)]
        for other in {*self._related, *related}:
            other._relate(self, other in related)
            self._relate(other, other in related)

    def _shares(self, other: SwapRegistry) -> bool:
        return not self._weights.isdisjoint(other._weights)

    def _relate(self, other: SwapRegistry, related: bool) -> None:
        if related == (other in self._related):
            return
        if related:
            self._related.add(other)
            self.open_beside += other.open
        else:
            self._related.discard(other)
            self.open_beside -= other.open

    def note(self, open_now: bool) -> None:
        """Our swap wrote the weights: it has put an average in, or restored them."""
        for other in (self, *self._related):
            other.writes += 1
            other.open_beside += 0 if other is self else open_now - self.open
        self.open = open_now
        if open_now:
            self._opened = next(_OPENINGS)
            return
        waiting, self._waiting = self._waiting, []
        for finish in waiting:
            finish()

    def refuse_covered(self) -> None:
        """Raise RuntimeError where a swap that was entered inside ours is still open."""
        if self._inner() is not None:
            raise RuntimeError(
                "ema.swap() was left before the swap of another EMA that was entered inside it. "
                "Leave swaps in the reverse order; live weights are restored when the inner one is "
                "left."
            )

    def when_outermost(self, finish: Callable[[], None]) -> None:
        """Call `finish` now, or when no swap is open inside ours any more."""
        inner = self._inner()
        if inner is None:
            finish()
        else:
            inner._waiting.append(partial(self.when_outermost, finish))

    def _inner(self) -> SwapRegistry | None:
        """An open swap that was entered inside ours: it holds our average as live weights."""
        later = [other for other in self._related if other.open and other._opened > self._opened]
        return later[0] if self.open and later else None

    def any_open(self, tensors: Iterable[Tensor]) -> bool:
        """Some average in this process has swapped one of these weights or buffers."""
        swapped = [other._weights for other in _REGISTRIES if other.open]
        return bool(swapped) and not frozenset().union(*swapped).isdisjoint(map(id, tensors))
