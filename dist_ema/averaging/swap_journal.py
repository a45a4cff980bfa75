"""`SwapJournal`: live weights and shadows exchanged window by window, by copies that are counted.

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
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..sharding import records
from ..sharding.ownership import ParamState
from .executors import await_host_reads
from .kernels.eager import SCRATCH

__all__ = ["SwapJournal"]

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
        self._kept: dict[object, Tensor] = {}
        self._live_buffers: list[tuple[ParamState, Tensor, Tensor | None]] = []

    def apply(self) -> None:
        """Write the average into the live weights. `restore` undoes it, also half way."""
        self._live_buffers = [
            (state, state.local.clone(), records.registered(state.shard)) for state in self._buffers
        ]
        self._unfilled = [
            (module, name)
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is None
        ]
        averaged = [state for state in self._weights if state.shadow is not None]
        self._windows = [window for state in averaged for window in _windows(state)]
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
            records.register(state.shard, tensor)
            _restore_buffer(state, value, tensor)
        for module, name in self._unfilled:
            module._buffers[name] = None  # the block may have filled it
        self._live_buffers = []

    def _advance(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        """The copy that follows when so many of a window were made."""
        live, shadow = state.live[begin:end], state.own_shadow[begin:end]
        scratch = self._keep(state, live)
        into, source = ((scratch, live), (live, shadow), (shadow, scratch))[copies]
        if into is not shadow or _exchanged(state):
            into.copy_(source)

    def _retreat(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        """The copy that undoes the last one when so many of a window were made."""
        live, shadow = state.live[begin:end], state.own_shadow[begin:end]
        scratch = self._keep(state, live)
        if _exchanged(state) or copies == 1:
            into, source = ((live, scratch), (shadow, live), (scratch, shadow))[copies - 1]
            into.copy_(source)
        elif copies == COPIES:
            _take_written(live, shadow)

    def _keep(self, state: ParamState, live: Tensor) -> Tensor:
        """Where live elements are while the average stands in their place. Shape of `live`."""
        # All windows of an exchange share one scratch; what is cast is kept aside by itself.
        shared = _exchanged(state)
        key = (live.dtype, live.device) if shared else id(state)
        if key not in self._kept:
            n = SCRATCH if shared else len(live)
            self._kept[key] = torch.empty(n, dtype=live.dtype, device=live.device)
        return self._kept[key][: len(live)]


def _windows(state: ParamState) -> list[Elements]:
    """The windows of one weight: each fits the scratch, or all of it is kept aside."""
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
