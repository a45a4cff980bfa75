"""`ema.load`: the averages, and the blocks of windows, that a saved folder fills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..averaging.averages import AveragedWeights
from ..averaging.window_ring import WindowRing
from ..checkpoint import library_files, reader, stages
from ..schedules import BlockMean, Schedule
from ..sharding import discovery
from ..sharding.ownership import ParamState
from ..text import warn
from .entry import VerbEntry

__all__ = ["load"]


def load(entry: VerbEntry, path: str | Path, *, strict: bool, verify: bool) -> None:
    """See `EMA.load`; the verb has begun. *Collective*."""
    weights, ranks = entry.weights, entry.ranks
    elsewhere = discovery.unfilled_buffers(weights.model)
    stage: Sequence[int] = ()
    if entry.is_staged:
        stage = entry.stage
        elsewhere |= stages.names_of_all("load", ranks, stage, weights.averages[0].persistent)
    targets = _Targets(weights, frozenset(elsewhere))
    with reader.open_checkpoint(
        ranks, path, targets.make, strict=strict, verify=verify, stage=stage
    ) as checkpoint:
        try:
            own_buffers = checkpoint.fill(ranks)
        except BaseException:
            # The shadows hold a mixture now, which is no average.
            weights.begin_again()
            raise
    for average, buffers in zip(weights.averages, own_buffers, strict=False):
        average.own_buffers = {} if weights.teacher else buffers
    weights.resume(checkpoint.clock)
    targets.resume_windows()
    # Last: a warning may be an error, and the other ranks, which have none, wait in the messages.
    warn(*checkpoint.warnings_of(ranks))


class _Targets:
    """The records that a load fills: every average, then the full blocks of windows.

    Args:
        weights: The weights of this rank.
        elsewhere: Names that stand on other stages of the pipeline, or will once they are filled.
    """

    def __init__(self, weights: AveragedWeights, elsewhere: frozenset[str]) -> None:
        self._averages, self._elsewhere = weights.averages, elsewhere
        names = weights.names()
        form = library_files.only_used(library_files.adapters_of(weights.model, names), names)
        self._model_names = {there: name for name, there in form.names.items()}
        # Of each window its ring, its full blocks, and where the block under way begins.
        self._windows: list[tuple[WindowRing, list[tuple[BlockMean, list[ParamState]]], float]] = []

    def make(self, saved: Sequence[dict[str, Any]]) -> list[reader.LoadTarget]:
        """The targets in a saved form with these schedules."""
        filled: list[tuple[Schedule, list[ParamState]]] = []
        self._windows = []  # an attempt before this one may have opened another version
        for average in self._averages:
            means = average.ring.matching(saved) if average.ring else []
            filled.append((means[-1] if means else average.schedule, average.persistent))
            if average.ring and means:
                full = [(mean, average.ring.empty(average.averaged)) for mean in means[:-1]]
                self._windows.append((average.ring, full, means[-1].begin))
        filled += [block for _, full, _ in self._windows for block in full]
        return [
            reader.LoadTarget(schedule.to_dict(), states, self._model_names, self._elsewhere)
            for schedule, states in filled
        ]

    def resume_windows(self) -> None:
        """Go on with the blocks that were filled."""
        for ring, full, begin in self._windows:
            ring.resume(full, begin)
