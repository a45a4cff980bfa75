"""`SwapRegistry`: the open swaps, and which verbs (`Reads`) are refused inside them.

[Note: open swaps]  Several EMAs may average one model, or parts of it. While one of them has
swapped its average in, the live weights are not the training weights, and the others must know.
Averages are related by the identity of the weights that they share.

NOTE: no weak reference to a weight is kept. `torch.utils.swap_tensors` refuses a tensor that has
one, and with it every `model.to()` of a sharded model. Identities suffice: an average keeps its
weights alive, so none is used twice.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import WeakSet

from torch import Tensor

__all__ = ["Reads", "SwapRegistry", "Versions"]


class Reads(enum.Flag):
    """What a verb reads or writes, and so inside which swaps it must not be called.

    Every verb is refused inside the swap of its own EMA.
    """

    SHADOWS = enum.auto()  # nothing but shadows: allowed inside the swap of another EMA
    LIVE = enum.auto()  # averaged live weights: refused where another EMA has swapped one of them
    WHOLE_MODEL = enum.auto()  # every weight and buffer: refused where any of them is swapped
    REPLACED = enum.auto()  # shadows that are replaced: allowed after a swap that failed


Versions = tuple[int, int]  # of a weight's local elements, and of the Parameters around them

_REGISTRIES: WeakSet[SwapRegistry] = WeakSet()
_OPENINGS = itertools.count(1)


class SwapRegistry:
    """The open swaps that concern one set of averages.

    Attributes:
        open: The model holds one of our averages.
        failed: Not all replicas could be restored after our swap, so that it stays open.
        writes: Times that a swap, ours or another, wrote the weights.
        nested: By the identity of a weight: how often other swaps wrote it inside ours.
    """

    def __init__(self) -> None:
        self.open, self.failed, self.writes = False, False, 0
        self.nested: dict[int, Versions] = {}
        self._opened = 0  # when our swap was opened, counted over all of them
        self._waiting: list[Callable[[], None]] = []  # for our swap, which covers theirs
        self._weights: frozenset[int] = frozenset()
        self._related: WeakSet[SwapRegistry] = WeakSet()
        _REGISTRIES.add(self)

    def watch(self, weights: Iterable[Tensor]) -> None:
        """Relate to every other average of one of these weights."""
        self._weights = frozenset(map(id, weights))
        for other in [other for other in _REGISTRIES if other is not self]:
            shares = not self._weights.isdisjoint(other._weights)
            for one, two in ((self, other), (other, self)):
                one._related.add(two) if shares else one._related.discard(two)

    def refuse(self, verb: str, reads: Reads, tensors: Iterable[Tensor]) -> None:
        """Raise RuntimeError where `verb` would read what a swap has put into the model.

        Args:
            verb: As the user called it.
            reads: What it reads or writes.
            tensors: Every weight and buffer of the model.
        """
        if self.failed:
            if Reads.REPLACED not in reads:
                raise RuntimeError(
                    f"{verb}() after an ema.swap() that failed while ranks sent each other weights:"
                    " the model holds parts of the average. Load the model's weights again, and "
                    "then the average by ema.load()."
                )
        elif self.open:
            hint = " metrics(distance=False) works here." if verb == "ema.metrics" else ""
            raise RuntimeError(
                f"{verb}() inside ema.swap(): the model holds the average, not the training "
                f"weights.{hint}"
            )
        if (reads & Reads.LIVE and any(other.open for other in self._related)) or (
            reads & Reads.WHOLE_MODEL and self._any_open(tensors)
        ):
            raise RuntimeError(
                f"{verb}() inside the swap of another EMA: the model does not hold its training "
                "weights. Call it before or after that swap."
            )

    def note(self, open_now: bool) -> None:
        """Our swap wrote the weights: it has put an average in, or restored them."""
        for other in (self, *self._related):
            other.writes += 1
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

    def discount(
        self, weights: Sequence[Tensor], before: Sequence[Versions], after: Sequence[Versions]
    ) -> None:
        """Keep a swap around ours from counting our writes as those of its block.

        Args:
            weights: What our swap wrote.
            before: Their version counters when it was entered.
            after: And now.
        """
        for weight, old, new in zip(weights, before, after, strict=True):
            for other in self._related:
                local, around = other.nested.get(id(weight), (0, 0))
                other.nested[id(weight)] = local + new[0] - old[0], around + new[1] - old[1]

    def _any_open(self, tensors: Iterable[Tensor]) -> bool:
        """Some average in this process has swapped one of these weights or buffers."""
        swapped = [other._weights for other in _REGISTRIES if other.open]
        return bool(swapped) and not frozenset().union(*swapped).isdisjoint(map(id, tensors))
