"""`StorageWatch`: have weights moved, been written, or come to lie in the memory of others?

[Note: a model lives]  At any line a training program may move a storage (`p.data = ...`, SAM,
offloading), write a weight outside the optimizer's step, or change the module tree. Hence two
rules. An update trusts no address that it did not check. A verb trusts no module tree that it did
not walk. An update walks it too where a module of it is another one now.

[Note: shared memory]  `b.data = a.data` puts two Parameters into one memory. If they lay there
always, their averages are the same. If they met later, a swap would have to put two averages into
one place. A weight that was given memory of the average (that of a `state_dict`, or of a teacher)
would be its own average.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import fingerprint, memory_watch, ownership, records
from .average import Average
from .clock import Clock
from .swap_registry import SwapRegistry, Versions

__all__ = ["StorageWatch", "refuse_shared", "versions"]

_VERSION = attrgetter("_version")
SAMPLE = 8  # elements of each weight, up to twice as many
Moment = tuple[int, int, int]  # steps and updates of the clock, writes by swaps


def _counted_apart(shard: records.Shard) -> list[Tensor]:
    """The tensors around local elements that count writes of their own.

    One into a DTensor is not counted by its local tensor, nor the other way round. FSDP1 keeps
    those of a Parameter and of the flat one apart.
    """
    around = [tensor for tensor in (shard.tensor, shard.flat_parameter) if tensor is not None]
    return [] if shard.local_tensor() is shard.tensor else around


def versions(state: ownership.ParamState) -> Versions:
    """The version counters of a weight. A frozen one made in inference mode has none."""
    if state.shard.tensor.is_inference():
        return 0, 0
    return state.local._version, sum(tensor._version for tensor in _counted_apart(state.shard))


class StorageWatch:
    """The addresses and version counters of the averaged weights, as they were at the last look.

    Args:
        clock: Moves with the average.
        swaps: Counts the writes by swaps.
    """

    def __init__(self, clock: Clock, swaps: SwapRegistry) -> None:
        self._clock, self._swaps = clock, swaps
        self._read_versions: list[int] | None = None  # while an update may be reading
        self._marked: tuple[list[int], Moment] | None = None
        self.renew([])

    def renew(
        self,
        params: Sequence[ownership.ParamState],
        further: Iterable[records.Shard] = (),
        frozen: Sequence[Tensor] = (),
        roots: Sequence[nn.Module] = (),
    ) -> None:
        """Watch these from now on.

        Args:
            params: What is averaged. Its `local` tensors share the version counters of the model's.
            further: Records whose addresses count too: those of a teacher.
            frozen: Weights that would be averaged if they needed a gradient.
            roots: Modules whose tree is watched.
        """
        # Buffers are read before an update returns, and a forward may write them at any time.
        self._params = [param for param in params if param.shard.kind != "buffer"]
        self._frozen, self.sees_tree = frozen, bool(roots)
        counted = {
            id(tensor): (param.name, tensor)
            for param in self._params
            for tensor in (param.local, *_counted_apart(param.shard))
        }
        self._names = [name for name, _ in counted.values()]
        self._counted = [tensor for _, tensor in counted.values()]
        self._memory = memory_watch.MemoryWatch(
            [*(param.shard for param in params), *further], roots
        )

    def changed(self) -> bool:
        """Some storage lies elsewhere, the tree is another, or a frozen weight needs a gradient.

        Note:
            *Cost*: that of `MemoryWatch`, and 0.05 us per frozen weight. Nothing else is looked at
            before an update.
        """
        return True in [tensor.requires_grad for tensor in self._frozen] or self.moved()

    def moved(self) -> bool:
        """Some storage lies elsewhere than when the plan was made, or in another order."""
        return self._memory.changed()

    # --- while an update reads behind the step ----------------------------------------------------

    def begin_read(self) -> None:
        """An update has begun to read the weights, and goes on after this returns."""
        self._read_versions = self._versions()

    def end_read(self) -> list[str]:
        """The read is over. Returns the names of weights that were written meanwhile.

        Note:
            *Cost*: that of `begin_read`, 0.05 us per weight, 0.1 us per DTensor.
        """
        before, self._read_versions = self._read_versions, None
        if before is None or before == (now := self._versions()):
            return []
        versions = zip(self._names, before, now, strict=True)
        return list(dict.fromkeys(name for name, old, new in versions if old != new))

    def refuse_written(self) -> None:
        """End the read. Raise RuntimeError if weights were written meanwhile, by name."""
        written = self.end_read()
        if written:
            raise RuntimeError(
                f"{', '.join(written[:5])} was written after the optimizer's step, while the "
                "average was reading it (a clamp, a forced normalisation?). Use ema.attach(..., "
                "overlap=False), or ema.update() by hand."
            )

    def _versions(self) -> list[int]:
        with torch.DisableTorchFunctionSubclass():  # a DTensor answers in half the time
            return list(map(_VERSION, self._counted))

    # --- training that no update follows ----------------------------------------------------------

    def mark(self) -> tuple[list[int], Moment]:
        """Remember how often the weights were written until now.

        No counter counts a write through `.data` or by a foreign kernel (LOMO, 8-bit optimizers).
        So some elements of each weight are summed, too. Waits for the device.
        """
        moment = self._clock.steps, self._clock.updates, self._swaps.writes
        samples: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for local in (param.local for param in self._params):
            if local.untyped_storage().nbytes():  # it was not freed
                # A few elements: an optimizer moves all of them.
                spaced = local[:: max(1, len(local) // SAMPLE)]
                samples[local.dtype, local.device].append(spaced)
        sums = fingerprint.bit_sums(map(torch.cat, samples.values()))
        self._marked = [sum(self._versions()), *sums], moment
        return self._marked

    def trained_unseen(self) -> bool:
        """Since the last mark the weights were written by no swap, and the clock stood still."""
        before, now = self._marked, self.mark()
        return before is not None and now[0] != before[0] and now[1] == before[1]

    def forget_mark(self) -> None:
        """Forget the mark: a script that has just resumed may still write the weights."""
        self._marked = None


# --- [Note: shared memory] ------------------------------------------------------------------------


def refuse_shared(averages: Iterable[Average]) -> None:
    """Raise RuntimeError, by name, where memory is shared that cannot be ([Note: shared memory]).

    Note:
        *Cost*: 5 us per weight. No element is read where nothing is shared.
    """
    memories = [
        _Memory(str(tensor.device), tensor.data_ptr(), state, tensor, tensor is state.shadow)
        for number, average in enumerate(averages)
        for state in average.averaged
        if state.shard.kind != "buffer" and state.averaged_region.numel
        for tensor in (state.shadow, None if number else state.live)
        if tensor is not None and tensor.data_ptr()
    ]
    # In order of their addresses only neighbours can overlap.
    for first, later in itertools.pairwise(sorted(memories, key=attrgetter("device", "begin"))):
        if first.device != later.device or first.begin + first.tensor.nbytes <= later.begin:
            continue
        if first.is_shadow != later.is_shadow:
            raise RuntimeError(
                f"{later.state.name} lies in the memory of the average now (of a state_dict, or of "
                "a teacher). Give it a copy."
            )
        if not first.agrees(later):
            raise RuntimeError(
                f"{later.state.name} lies in the memory of {first.state.name} now, and their "
                "averages differ. Give each its own memory, or register one Parameter under both "
                "names and call ema.rescan()."
            )


@dataclass
class _Memory:
    """Where a live weight or a shadow lies."""

    device: str
    begin: int
    state: ownership.ParamState
    tensor: Tensor
    is_shadow: bool

    def agrees(self, later: _Memory) -> bool:
        """Whether one average serves both."""
        if self.is_shadow:  # of a teacher whose weights are tied as the model's are
            return self.state.live.data_ptr() == later.state.live.data_ptr()
        shadow, later_shadow = self.state.own_shadow, later.state.own_shadow
        start = (later.begin - self.begin) // self.tensor.element_size()
        return torch.equal(
            shadow[start : start + len(later_shadow)], later_shadow[: len(shadow) - start]
        )
