"""Put the average into the live model and restore what was there, bit for bit.

Where shadow and live weight have one dtype and device their contents are exchanged through a
scratch of 4 MB: no second model exists. Otherwise an exchange would round, so the live elements are
kept aside and the average is cast in. Then the replicas are made whole by broadcasts in place.
Everything here is a write to model storage, never a pointer change, so compiled code and CUDA
graphs see it.

[Note: writes inside a swap]  What the block writes into a swapped weight becomes the average's,
whether contents were exchanged or cast. It is the only outcome that is the same everywhere and
costs no second model. Of replicas, the owner's write counts. Where shadows have another dtype, only
elements that differ from the cast average are taken, so the others keep their precision.

[Note: the journal]  An interrupt may come between any two lines. Every chunk moves by copies of
which each may be repeated, and `_done` counts them after they were made. Whatever the count says,
the copy that follows it may have been made already or not, in both directions:

    exchange   0  scratch <- live   1  live <- shadow    2  shadow <- scratch  3
               0                    1  live <- scratch   2  shadow <- live     3  scratch <- shadow
    cast       0  aside <- live     1  live <- shadow    2                     3
               0                    1  live <- aside     2                     3  shadow <- live
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.coordinator import Ranks
from ..distributed.transfer import broadcast
from ..sharding.ownership import ParamState, replica_pieces
from ..sharding.records import register, registered
from .kernels.eager import SCRATCH

__all__ = ["WeightSwap", "broadcast_to_replicas"]

Chunk = tuple[ParamState, int, int]  # elements [begin, end) of what is averaged here
COPIES = 3  # per chunk ([Note: the journal])


class WeightSwap:
    """One swap, and how to undo it. Local: `broadcast_to_replicas` makes the replicas whole.

    Args:
        model: The live model.
        states: Every weight and buffer of it.
        own_buffers: Recalibrated buffers of the average, by name.
        split: Replicated weights are divided among the ranks.
        ranks: All that enter the swap.
        note: Told whether the model holds the average now.

    Note:
        A swap that is dropped while it holds live weights restores them. An interrupt may leave
        every `finally` behind that would have done so.
    """

    _open = False  # also of a swap whose construction was interrupted

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[ParamState],
        own_buffers: dict[str, Tensor],
        split: bool,
        ranks: Ranks,
        note: Callable[[bool], None],
    ) -> None:
        self._buffers = [state for state in states if state.shard.kind == "buffer"]
        self._weights = [state for state in states if state.shard.kind != "buffer"]
        self._model, self._own_buffers = model, own_buffers
        self._unfilled: list[tuple[nn.Module, str]] = []
        self.ranks, self._note = ranks, note
        self._has_replicas = split and any(state.shard.replicas for state in self._weights)
        self._replicas_whole = True
        self._chunks: list[Chunk] = []
        self._done = 0  # copies, COPIES for each chunk
        self._aside: dict[int, Tensor] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._live_buffers: list[tuple[ParamState, Tensor, Tensor | None]] = []
        self._applied_buffers: list[tuple[ParamState, Tensor]] = []
        self._versions: list[tuple[int, int]] = []

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
        self._open = True
        self._note(True)
        self._chunks = [chunk for state in self._weights for chunk in _chunks(state)]
        while self._done < COPIES * len(self._chunks):
            self._advance(*self._chunks[self._done // COPIES], self._done % COPIES)
            self._done += 1
        for state in self._buffers:
            average = self._own_buffers.get(state.name, state.shadow)
            if average is not None:
                state.shard.write(average)
        torch.clear_autocast_cache()  # autocast would go on using the casts of the live weights

    def restore(self) -> None:
        """Restore live weights, buffers and shadows, bit for bit. Idempotent."""
        while self._done:
            chunk = self._chunks[(self._done - 1) // COPIES]
            self._retreat(*chunk, (self._done - 1) % COPIES + 1)
            self._done -= 1
        for state, value, tensor in self._live_buffers:
            register(state.shard, tensor)
            _restore_buffer(state, value, tensor)
        for module, name in self._unfilled:
            module._buffers[name] = None  # the block may have filled it
        self._live_buffers = []
        torch.clear_autocast_cache()

    def broadcast(self) -> None:
        """Make the replicas whole: they hold what their owners hold. *Collective*."""
        ranks = self.ranks
        self._replicas_whole = ranks.size == 1
        if self._has_replicas:
            ranks.run_transfer("swap", lambda: broadcast_to_replicas(self._weights, ranks.wait_for))
        # After the entry they hold the average, and only the exit makes them whole.
        self._replicas_whole = ranks.size == 1 or not self._done

    def close(self) -> None:
        """Live weights are back on every replica; else the swap stays open."""
        if self._open and self._replicas_whole and not self._done:
            self._note(False)
            self._open = False

    def undo(self) -> None:
        """Restore what this rank can restore alone. Idempotent."""
        if self._open:
            with torch.inference_mode(False), torch.no_grad():
                self.restore()
            self.close()

    def __del__(self) -> None:
        self.undo()

    def _advance(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        live, shadow = _views(state, begin, end)
        kept = self._kept(state, live)
        if copies == 0:
            kept.copy_(live)
        elif copies == 1:
            live.copy_(shadow)
        elif _exchanged(state):
            shadow.copy_(kept)

    def _retreat(self, state: ParamState, begin: int, end: int, copies: int) -> None:
        live, shadow = _views(state, begin, end)
        kept = self._kept(state, live)
        if not _exchanged(state):
            if copies == COPIES:
                _take_written(live, shadow)
            elif copies == 1:
                live.copy_(kept)
        elif copies == COPIES:
            kept.copy_(shadow)
        elif copies == COPIES - 1:
            shadow.copy_(live)
        else:
            live.copy_(kept)

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

    # --- what the block wrote ---------------------------------------------------------------------

    def watch(self) -> None:
        """The swap is complete: what is written from now on, the block wrote."""
        self._applied_buffers = [
            (state, state.shard.read().clone())
            for state in self._buffers
            if state.shard.persistent and registered(state.shard) is not None
        ]
        self._versions = [_versions(state) for state in self._weights]

    def written(self) -> tuple[list[str], list[str]]:
        """The names of swapped weights and of others that were written since `watch`.

        Weights whose storage moved are followed, and named if the new one holds other values.

        Raises:
            RuntimeError: A weight has another dtype, device, shape or order now.
        """
        swapped: list[str] = []
        others: list[str] = []
        for state, versions in zip(self._weights, self._versions, strict=True):
            if state.moved:
                before = state.local
                state.rebind()
                written = before._version != versions[0] or not _same_bits(before, state.local)
            else:
                written = _versions(state) != versions
            if written:
                (others if state.shadow is None else swapped).append(state.name)
        return swapped, others

    def changed_buffers(self) -> tuple[dict[str, Tensor], list[str]]:
        """What every persistent buffer holds now, and the names of those that are the average's.

        A module's persistent buffers are one state: if one was written since `watch`, all are. If
        one has another shape or dtype than before, the module keeps no state.
        """
        values: dict[str, Tensor] = {}
        changed, reshaped = set(), set()
        for state, applied in self._applied_buffers:
            tensor, module = registered(state.shard), id(state.shard.place[0])
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
            for state, _ in self._applied_buffers
            if id(state.shard.place[0]) in changed - reshaped
        ]
        return values, names


def broadcast_to_replicas(
    states: Sequence[ParamState], wait_for: Callable[[dist.Work], object] = dist.Work.wait
) -> None:
    """Copy what each rank averages to the ranks that hold it too. *Collective*."""
    averaged = [state for state in states if state.shadow is not None]
    for group, pieces in replica_pieces(averaged):
        broadcast(pieces, group, wait_for)


def _chunks(state: ParamState) -> list[Chunk]:
    """What moves at once: as much as the scratch holds, or all that must be kept aside."""
    if state.shadow is None:
        return []
    total = state.averaged_region.numel
    step = SCRATCH if _exchanged(state) else max(total, 1)
    return [(state, begin, min(begin + step, total)) for begin in range(0, total, step)]


def _exchanged(state: ParamState) -> bool:
    assert state.shadow is not None
    return (state.local.dtype, state.local.device) == (state.shadow.dtype, state.shadow.device)


def _views(state: ParamState, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Live and shadow. *Aliases* both."""
    assert state.shadow is not None
    if len(state.shadow) != state.averaged_region.numel:
        raise RuntimeError(
            f"{state.name}: the shadow has {len(state.shadow)} elements and the weight has "
            f"{state.averaged_region.numel}."
        )
    return state.live[begin:end], state.shadow[begin:end]


def _take_written(live: Tensor, shadow: Tensor) -> None:
    """What differs from the cast average, the block wrote ([Note: writes inside a swap])."""
    for part, average in zip(live.split(SCRATCH), shadow.split(SCRATCH), strict=True):
        cast = average.to(part)
        same = (cast == part) | (cast.isnan() & part.isnan())
        average.copy_(torch.where(same.to(average.device), average, part.to(average)))


def _versions(state: ParamState) -> tuple[int, int]:
    """The version counters of the local elements, and of the Parameter: FSDP1 keeps them apart."""
    return state.local._version, state.shard.tensor._version


def _restore_buffer(state: ParamState, value: Tensor, tensor: Tensor | None) -> None:
    if state.shard.opaque:
        return
    if tensor is not None and tensor.shape != state.shard.shape:
        tensor.resize_(state.shard.shape)  # the block resized it in place
        state.rebind()
    state.shard.write(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
