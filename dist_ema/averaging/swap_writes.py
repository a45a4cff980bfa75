"""Open swaps: which averages they concern, and what user code writes to weights inside them.

[Note: writes]  What the block writes into a swapped weight becomes the average's, whether contents
were exchanged or cast. It is the only outcome that is the same everywhere and costs no second
model. Of replicas, the owner's write counts. Where shadows have another dtype, only elements that
differ from the cast average are taken, so the others keep their precision. Version counters tell of
a write, but not of one through `.data`, by NumPy or by a kernel of somebody else. So the bits of
swapped weights are summed at both ends, too.

[Note: open swaps]  Several EMAs may average one model, or parts of it. While one of them has
swapped its average in, the live weights are not the training weights, and the others must know.
Averages are related by the identity of the weights that they share.

NOTE: no weak reference to a weight is kept. `torch.utils.swap_tensors` refuses a tensor that has
one, and with it every `model.to()` of a sharded model. Identities suffice: an average keeps its
weights alive, so none is used twice.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor

from ..sharding import fingerprint, ownership, records

__all__ = ["SwapRegistry", "SwapWrites", "Versions", "describe", "versions"]


class SwapWrites:
    """Notices what is written from now on, until the swap is left.

    Args:
        states: Every weight and buffer of the model.
        swaps: Knows what swaps of other EMAs write meanwhile.
    """

    def __init__(self, states: Sequence[ownership.ParamState], swaps: SwapRegistry) -> None:
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._versions = [versions(state) for state in self._weights]
        self._sums = self._bit_sums()
        self._buffers = [
            (state, state.shard.read().clone())
            for state in states
            if state.shard.kind == "buffer"
            and state.shard.persistent
            and records.registered(state.shard) is not None
        ]
        self._swaps = swaps
        swaps.nested.clear()

    def names(self) -> tuple[list[str], list[str]]:
        """The names of swapped weights and of others that were written.

        Weights whose storage moved are followed, and named if the new one holds other values.

        Raises:
            RuntimeError: A weight has another dtype, device, shape or order now.
        """
        counted: list[bool] = []
        for state, before in zip(self._weights, self._versions, strict=True):
            local, param = self._swaps.nested.get(id(state.shard.tensor), (0, 0))
            expected = before[0] + local, before[1] + param
            if state.moved or (state.layout_changed and state.shadow is not None):
                old = state.local
                state.rebind()
                counted.append(old._version != expected[0] or not _same_bits(old, state.local))
            else:
                counted.append(versions(state) != expected)
        swapped: list[str] = []
        others: list[str] = []
        summed = map(operator.ne, self._sums, self._bit_sums())
        for state, is_written in zip(self._weights, map(max, counted, summed), strict=True):
            if is_written:
                (others if state.shadow is None else swapped).append(state.name)
        return swapped, others

    def _bit_sums(self) -> list[int]:
        """Of swapped weights. 0 for others, as a merge that is undone inside may round them."""
        return fingerprint.bit_sums(
            state.local[:0] if state.shadow is None else state.live for state in self._weights
        )

    def changed_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """What every persistent buffer holds now, and the names of those that are the average's.

        A module's persistent buffers are one state: if one was written, all are. If one has another
        shape or dtype than before, the module keeps no state.
        """
        values: dict[str, Tensor] = {}
        changed, reshaped = set(), set()
        for state, applied in self._buffers:
            tensor, module = records.registered(state.shard), id(state.shard.place[0])
            if tensor is None:
                raise RuntimeError(f"{state.name} is no buffer of the model any more.")
            if (tensor.shape, tensor.dtype) != (state.shard.shape, applied.dtype):
                reshaped.add(module)
                continue
            values[state.name] = state.shard.read().clone()  # perhaps of another tensor by now
            if not _same_bits(values[state.name], applied):
                changed.add(module)
        names = [
            state.name
            for state, _ in self._buffers
            if id(state.shard.place[0]) in changed - reshaped
        ]
        return values, names


def describe(swapped: Sequence[str], others: Sequence[str], lost: Sequence[str]) -> list[str]:
    """A sentence about each kind of writes that there were, and about weights that are gone."""
    texts = []
    if swapped:
        texts.append(
            f"{', '.join(swapped[:5])} was written inside ema.swap() (max_norm, a clamp, a "
            "merge?). The average keeps what was written, live weights are restored."
        )
    if others:
        texts.append(
            f"{', '.join(others[:5])} is not averaged and was written inside ema.swap() (a "
            "merged adapter?). It keeps what was written: undo that by hand."
        )
    if lost:
        texts.append(
            f"{', '.join(lost[:5])} was replaced or removed inside ema.swap(): the model does not "
            "hold its live value any more. Edit a copy: copy.deepcopy(model) inside the block."
        )
    return texts


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# --- [Note: open swaps] ---------------------------------------------------------------------------


Versions = tuple[int, int]  # of a weight's local elements, and of its Parameter

_REGISTRIES: WeakSet[SwapRegistry] = WeakSet()
_OPENINGS = itertools.count(1)


def versions(state: ownership.ParamState) -> Versions:
    """The version counters of a weight. FSDP1 keeps them apart, and one more of the flat one.

    A frozen weight made in inference mode has none.
    """
    if state.shard.tensor.is_inference():
        return 0, 0
    flat = state.shard.flat_parameter
    writes = 0 if flat is None else flat._version
    return state.local._version, state.shard.tensor._version + writes


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

    @property
    def open_beside(self) -> bool:
        """Another average of the same weights has a swap open."""
        return any(other.open for other in self._related)

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

    def discount(self, states: Sequence[ownership.ParamState], before: Sequence[Versions]) -> None:
        """Our swap is over: a swap around it takes no write since `before` for one of its block."""
        for state, (local, param) in zip(states, before, strict=True):
            key, now = id(state.shard.tensor), versions(state)
            for other in self._related:
                first, second = other.nested.get(key, (0, 0))
                other.nested[key] = first + now[0] - local, second + now[1] - param

    def any_open(self, tensors: Iterable[Tensor]) -> bool:
        """Some average in this process has swapped one of these weights or buffers."""
        swapped = [other._weights for other in _REGISTRIES if other.open]
        return bool(swapped) and not frozenset().union(*swapped).isdisjoint(map(id, tensors))
