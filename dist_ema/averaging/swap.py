"""`ema.swap()`: the steps in which ranks apply an average to the model and restore what was there.

[Note: one swap]  Each rank exchanges what it averages (`swap_journal`) and notices what the block
writes (`swap_writes`). The ranks exchange messages and broadcasts around that:

    enter    all exchange --> message: all have --> broadcast the average to replicas
    block    the model is the average
    leave    message: what went wrong, which buffers changed --> all restore --> broadcast live

A rank that has entered owes the others its message at the exit, whatever happens to it. Where a
broadcast fails, it fails on all ranks, and only a part of the replicas holds what it should. Then
the swap stays open and the EMA refuses every verb, until `load` says that the weights are right
again.

[Note: interrupts]  Alone, a rank restores from the journal, wherever an interrupt came. Among other
ranks it must not stop half way, as a collective cannot be repeated. So that work runs in a thread,
where no signal handler runs, and the interrupt is raised after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from ..distributed.ranks import Ranks, refuse_destroyed
from ..sharding import derived, ownership, tree_changes
from . import averages, executors, swap_journal, swap_writes
from .average import Average
from .storage_watch import versions

__all__ = ["WeightSwap", "broadcast_to_replicas"]


class WeightSwap:
    """One swap of one average. *Collective*: `enter` and `leave`.

    Attributes:
        ranks: All that enter the swap.
        remarks: What the block wrote, a sentence for each kind of write.

    Note:
        A swap that is dropped while it holds live weights restores them. An interrupt may leave
        every `finally` behind that would have done so.
    """

    _open = _abandoned = False  # also of a swap whose construction was interrupted

    def __init__(
        self, weights: averages.AveragedWeights, average: Average, ranks: Ranks, leads: bool
    ) -> None:
        self._weights, self._average, self.ranks = weights, average, ranks
        self._leads = leads  # the first rank that holds this model, or this stage of it
        self._swapped = [state for state in average.averaged if state.shard.kind != "buffer"]
        self._before = [versions(state) for state in self._swapped]
        self._journal = swap_journal.SwapJournal(weights.model, average.states, average.own_buffers)
        self._writes: swap_writes.SwapWrites | None = None
        self._replicated = weights.placement.split and any(
            group.size() > 1 for state in self._swapped for group in state.shard.replicas
        )
        self._owes_message = False  # all have entered, and wait for each other at the exit
        self._stale_replicas = False  # they hold the average, or parts of it
        self._covered = False  # left before the swap of another EMA inside, perhaps on all ranks
        self.remarks: list[str] = []

    def enter(self) -> None:
        """Put the average in, on every replica."""
        self._run(self._enter)
        torch.clear_autocast_cache()  # autocast would go on using the casts of the live weights

    def leave(self, error: BaseException | None) -> None:
        """Restore live weights and shadows. Idempotent; call it again after an interrupt.

        Args:
            error: What the entry or the block raised.

        Raises:
            RuntimeError: Another rank left by an exception, or replicas could not be restored.
        """
        try:
            if self._owes_message and not self._abandoned:
                self._run(self._leave, error)
        finally:
            self._weights.swaps.when_outermost(self._restore_alone)
            torch.clear_autocast_cache()

    def __del__(self) -> None:
        if self._open:
            self._owes_message = self._covered = False
            self._restore_alone()

    def _run(self, work: Callable[..., None], *args: Any) -> None:
        """Run outside autograd, and to the end ([Note: interrupts])."""

        def abandon() -> None:
            self._abandoned = self._weights.swaps.failed = True

        if self.ranks.size == 1:
            with torch.inference_mode(False), torch.no_grad():
                work(*args)
        else:
            devices = {state.local.device for state in self._average.states}
            executors.run_shielded(partial(work, *args), devices, self.ranks.timeout, abandon)

    def _enter(self) -> None:
        with derived.caches_dropped(self._weights.model):
            self.ranks.run_on_all("swap", self.apply)
            self._broadcast(applied=True)
        self._owes_message = True
        self._writes = swap_writes.SwapWrites(self._average.states, self._weights.swaps)

    def _broadcast(self, applied: bool) -> None:
        """Broadcast from owners to replicas. applied: What owners hold is the average."""
        if self._replicated:
            self._stale_replicas = True
            broadcast_to_replicas("swap", self.ranks, self._swapped)
            self._stale_replicas = applied

    def apply(self) -> None:
        """Exchange what this rank averages."""
        if self._replicated:
            _refuse_destroyed_groups(self._swapped)
        self._open = True
        self._weights.note_swap(True)
        self._journal.apply()

    def _leave(self, error: BaseException | None) -> None:
        self._owes_message, self._covered = False, True
        self._weights.swaps.refuse_covered()
        self._covered = False
        buffers: dict[str, Tensor] = {}
        names: tuple[list[str], list[str]] = [], []
        message: dict[str, Any] = {}
        raised = error
        try:
            self._weights.reshard()
            if self._writes is not None:
                names = self._writes.names()
                if error is None:
                    buffers, message["changed"] = self._writes.changed_buffers()
        except Exception as caught:  # the others learn of it as of an error of the block
            raised = caught
        if raised is not None:
            message["error"] = f"{type(raised).__name__}: {raised}"
        exits = self._exchange_and_restore(message)
        if raised is not error:
            raise raised  # type: ignore[misc]
        if "error" in exits and error is None:
            raise RuntimeError(
                f"rank {self.ranks.members[exits['rank']]} left ema.swap() by an exception: "
                f"{exits['error']}"
            )
        (swapped, others), (lost, registered) = names, self._edits()
        self.remarks = swap_writes.describe(swapped, others + registered, lost)
        if merged := derived.merged_modules(self._weights.model):
            self.remarks.append(
                f"adapters were merged into {', '.join(merged[:5])} inside ema.swap(), which keep "
                "those of the average: call unmerge_adapter() inside the block."
            )
        if error is None:
            changed = [name for name in exits.get("changed", ()) if name in buffers]
            self._average.own_buffers |= {name: buffers[name] for name in changed}
        elif hasattr(error, "add_note"):
            for text in self.remarks:
                error.add_note(text)

    def _edits(self) -> tuple[list[str], list[str]]:
        """Swapped weights that the block took out of the model, and others that it replaced.

        The former are restored outside of the model; what replaced the latter stays, perhaps made
        of the average.
        """
        changes = tree_changes.compare_inventory(
            self._weights.model, [state.shard for state in self._average.states]
        )
        swapped = {state.name for state in self._swapped}
        new = filter(self._weights.selection.allows, changes.new_trainable)
        edited = (*changes.replaced, *changes.gone)
        lost = [name for name in edited if name in swapped]
        return lost, [name for name in (*edited, *new) if name not in swapped]

    def _exchange_and_restore(self, message: dict[str, Any]) -> dict[str, Any]:
        """All ranks' messages, combined; live weights are back on every replica, if possible."""
        with derived.caches_dropped(self._weights.model):
            try:
                exits = self._exchange(message)
            finally:
                self._journal.restore()
            self._broadcast(applied=False)
        return exits  # type: ignore[no-any-return]

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """All ranks' messages, combined, once all have come."""
        ranks = self.ranks
        # NOTE: DDP rewrites the other ranks' buffers in every forward, so the first rank says which
        # of them changed.
        tells = self._leads or "error" in message
        message = message | {"rank": ranks.rank} if tells else {}
        if not ranks.count_on_all("swap", lambda: any(map(message.get, ("error", "changed")))):
            return {}
        exits: dict[str, Any] = ranks.run_and_reduce("swap", lambda: message, _combine_exits)[1]
        return exits

    def _restore_alone(self) -> None:
        """Restore what this rank can restore alone, and close what is whole then. Idempotent.

        Replicas are restored too where this swap was left before the swap inside it. The exit of
        that one brings all ranks here together; else the broadcast names the missing ranks.
        """
        if not self._open or self._abandoned:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._journal.restore()
        covered, self._covered = self._covered, False
        try:
            if covered and self._stale_replicas:
                with derived.caches_dropped(self._weights.model):
                    self._run(self._broadcast, False)
        finally:
            if not self._stale_replicas:
                written = [state.shard.tensor for state in self._swapped]
                after = [versions(state) for state in self._swapped]
                self._weights.swaps.discount(written, self._before, after)
                self._weights.note_swap(False)
                self._open = False
            elif not self._owes_message:
                self._weights.swaps.failed = True
                self._open = False


def broadcast_to_replicas(verb: str, ranks: Ranks, states: Sequence[ownership.ParamState]) -> None:
    """Copy what each rank averages to the ranks that hold it too. *Collective*."""

    def broadcast() -> None:
        for group, runs in ownership.replica_runs(states):
            collectives.broadcast(runs, group, ranks.wait_for)

    ranks.run_transfer(verb, broadcast)


def _refuse_destroyed_groups(states: Sequence[ownership.ParamState]) -> None:
    """Raise RuntimeError if replicas can no longer be reached, before anything is written."""
    for group in dict.fromkeys(group for state in states for group in state.shard.replicas):
        refuse_destroyed("swap", group)


def _combine_exits(exits: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of the lowest rank that left a swap by one, and what the first rank says."""
    errors = [exit_message for exit_message in exits if "error" in exit_message]
    lowest = min(errors, key=lambda exit_message: exit_message["rank"], default={})
    changed = [name for exit_message in exits for name in exit_message.get("changed", ())]
    return lowest | {"changed": changed}
