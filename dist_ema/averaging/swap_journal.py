"""The exchange of live weights and shadows, window by window; its undoing; writes inside a swap.

With one dtype and device their contents are exchanged through a scratch of 4 MB: no second model
exists. Otherwise an exchange would round, so the live elements are kept aside and the average is
cast in. Everything here is a write to model storage, never a pointer change, so compiled code and
CUDA graphs see it.

[Note: the journal]  An interrupt may come between any two lines. Every window moves by copies of
which each may be repeated, and `_done` counts them after they were made. Whatever the count says,
the copy that follows it may have been made already or not, in both directions:

    exchange   0  scratch <- live   1  live <- shadow    2  shadow <- scratch  3
               0                    1  live <- scratch   2  shadow <- live     3  scratch <- shadow
    cast       0  aside <- live     1  live <- shadow    2                     3
               0                    1  live <- aside     2                     3  shadow <- live

[Note: writes]  What the block writes into a swapped weight becomes the average's, whether contents
were exchanged or cast. It is the only outcome that is the same everywhere and costs no second
model. The owner's write counts among replicas. Where shadows have another dtype, only elements that
differ from the cast average are taken, so the others keep their precision. Version counters tell of
a write, but not of one through `.data`, by NumPy or by a foreign kernel. So the
bits of swapped weights are summed at both ends, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.transfer import broadcast
from ..sharding import fingerprint
from ..sharding.ownership import ParamState, replica_runs
from ..sharding.records import register, registered
from .executors import await_host_reads
from .kernels.eager import SCRATCH
from .swap_registry import SwapRegistry, versions

__all__ = [
    "SwapJournal",
    "SwapWrites",
    "broadcast_to_replicas",
    "describe",
    "refuse_destroyed_groups",
]

Elements = tuple[ParamState, int, int]  # elements [begin, end) of what is averaged here
COPIES = 3  # per window ([Note: the journal])


class SwapJournal:
    """The copies that one swap has made on this rank, and their undoing. Local.

    Args:
        model: The live model.
        states: Every weight and buffer of it.
        own_buffers: Recalibrated buffers of the average, by name.
    """

    def __init__(
        self, model: nn.Module, states: Sequence[ParamState], own_buffers: dict[str, Tensor]
    ) -> None:
        self._buffers = [state for state in states if state.shard.kind == "buffer"]
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._model, self._own_buffers = model, own_buffers
        self._unfilled: list[tuple[nn.Module, str]] = []
        self._windows: list[Elements] = []
        self._done = 0  # copies, COPIES for each window
        self._aside: dict[int, Tensor] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._live_buffers: list[tuple[ParamState, Tensor, Tensor | None]] = []

    def apply(self) -> None:
        """Write the average into the live weights. `restore` undoes it, also half way."""
        self._live_buffers = [
            (state, state.local.clone(), registered(state.shard)) for state in self._buffers
        ]
        self._unfilled = [
            (module, name)
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is None
        ]
        self._windows = [window for state in self._weights for window in _windows(state)]
        await_host_reads(state.local for state in self._weights)
        while self._done < COPIES * len(self._windows):
            self._advance(*self._windows[self._done // COPIES], self._done % COPIES)
            self._done += 1
        for state in self._buffers:
            average = self._own_buffers.get(state.name, state.shadow)
            if average is not None:
                state.shard.write(average)

    def restore(self) -> None:
        """Restore live weights, buffers and shadows, bit for bit. Idempotent."""
        if self._done:
            await_host_reads(state.local for state in self._weights)
        while self._done:
            window = self._windows[(self._done - 1) // COPIES]
            self._retreat(*window, (self._done - 1) % COPIES + 1)
            self._done -= 1
        for state, value, tensor in self._live_buffers:
            register(state.shard, tensor)
            _restore_buffer(state, value, tensor)
        for module, name in self._unfilled:
            module._buffers[name] = None  # the block may have filled it
        self._live_buffers = []

    def _advance(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        live, shadow = state.live[begin:end], state.own_shadow[begin:end]
        scratch = self._kept(state, live)
        if copies == 0:
            scratch.copy_(live)
        elif copies == 1:
            live.copy_(shadow)
        elif _exchanged(state):
            shadow.copy_(scratch)

    def _retreat(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        live, shadow = state.live[begin:end], state.own_shadow[begin:end]
        scratch = self._kept(state, live)
        if not _exchanged(state):
            if copies == COPIES:
                _take_written(live, shadow)
            elif copies == 1:
                live.copy_(scratch)
        elif copies == COPIES:
            scratch.copy_(shadow)
        elif copies == COPIES - 1:
            shadow.copy_(live)
        else:
            live.copy_(scratch)

    def _kept(self, state: ParamState, live: Tensor) -> Tensor:
        """Where live elements are while the average stands in their place. Shape of `live`."""
        if not _exchanged(state):
            if id(state) not in self._aside:
                self._aside[id(state)] = torch.empty_like(live)
            return self._aside[id(state)]
        key = (live.dtype, live.device)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(SCRATCH, dtype=live.dtype, device=live.device)
        return self._scratch[key][: len(live)]


def broadcast_to_replicas(
    states: Sequence[ParamState], wait_for: Callable[[dist.Work], object]
) -> None:
    """Copy what each rank averages to the ranks that hold it too. *Collective*."""
    for group, runs in replica_runs(states):
        broadcast(runs, group, wait_for)


def refuse_destroyed_groups(states: Sequence[ParamState]) -> None:
    """Raise RuntimeError if replicas can no longer be reached, before anything is written."""
    for group in dict.fromkeys(group for state in states for group in state.shard.replicas):
        try:
            dist.get_rank(group)
        except ValueError:
            raise RuntimeError(
                "ema.swap() needs the process group over which the weights are replicated, and it "
                "was destroyed (a model that was wrapped anew?). Build another EMA; save() and "
                "load() carry the average over."
            ) from None


def _windows(state: ParamState) -> list[Elements]:
    """The windows of one weight: each fits the scratch, or all of it is kept aside."""
    if state.shadow is None:
        return []
    total = state.averaged_region.numel
    step = SCRATCH if _exchanged(state) else max(total, 1)
    return [(state, begin, min(begin + step, total)) for begin in range(0, total, step)]


def _exchanged(state: ParamState) -> bool:
    shadow = state.own_shadow
    return (state.local.dtype, state.local.device) == (shadow.dtype, shadow.device)


def _take_written(live: Tensor, shadow: Tensor) -> None:
    """Take what the block wrote: the elements that differ from the cast average."""
    for part, average in zip(live.split(SCRATCH), shadow.split(SCRATCH), strict=True):
        cast = average.to(part)
        same = (cast == part) | (cast.isnan() & part.isnan())
        average.copy_(torch.where(same.to(average.device), average, part.to(average)))


def _restore_buffer(state: ParamState, value: Tensor, tensor: Tensor | None) -> None:
    if state.shard.opaque:
        return
    if tensor is not None and tensor.shape != state.shard.shape:
        tensor.resize_(state.shard.shape)  # the block resized it in place
        state.rebind()
    state.shard.write(value)


# --- [Note: writes] -------------------------------------------------------------------------------


class SwapWrites:
    """Notices what is written from now on, until the swap is left.

    Args:
        states: Every weight and buffer of the model.
        swaps: Knows what swaps of other EMAs write meanwhile.
    """

    def __init__(self, states: Sequence[ParamState], swaps: SwapRegistry) -> None:
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._versions = [versions(state) for state in self._weights]
        self._sums = self._bit_sums()
        self._buffers = [
            (state, state.shard.read().clone())
            for state in states
            if state.shard.kind == "buffer"
            and state.shard.persistent
            and registered(state.shard) is not None
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
        """The bit sums of swapped weights; 0 for others, which an undone merge may round."""
        return fingerprint.bit_sums(
            state.local[:0] if state.shadow is None else state.live for state in self._weights
        )

    def changed_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """The values of all persistent buffers, and the names of those that become the average's.

        A module's persistent buffers are one state: if one was written, all are. If one has another
        shape or dtype than before, the module keeps no state.
        """
        buffers: dict[str, Tensor] = {}
        changed, reshaped = set(), set()
        for state, applied in self._buffers:
            tensor, module = registered(state.shard), id(state.shard.place[0])
            if tensor is None:
                raise RuntimeError(
                    f"{state.name} is no buffer of the model any more. Edit the model outside of "
                    "ema.swap(), and call ema.rescan()."
                )
            if (tensor.shape, tensor.dtype) != (state.shard.shape, applied.dtype):
                reshaped.add(module)
                continue
            buffers[state.name] = state.shard.read().clone()  # perhaps of another tensor by now
            if not _same_bits(buffers[state.name], applied):
                changed.add(module)
        names = [
            state.name
            for state, _ in self._buffers
            if id(state.shard.place[0]) in changed - reshaped
        ]
        return buffers, names


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
            "merged adapter, a fused layer?). It keeps what was written: undo that by hand."
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
