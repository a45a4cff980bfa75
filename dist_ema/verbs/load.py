"""`ema.load`: which averages and blocks of windows a saved form fills, and what goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..averaging.averages import AveragedWeights
from ..checkpoint import library_files, reader, stages
from ..schedules import BlockMean
from ..sharding.discovery import unfilled_buffers
from ..sharding.ownership import ParamState
from ..text import warn
from .entry import Entry

__all__ = ["load"]


def load(entry: Entry, path: str | Path, *, strict: bool, verify: bool) -> None:
    """See `EMA.load`; the verb has begun. *Collective*."""
    weights, ranks = entry.weights, entry.ranks
    elsewhere, stage = unfilled_buffers(weights.model), entry.stage if entry.is_staged else ()
    if entry.is_staged:
        persistent = weights.averages[0].persistent
        elsewhere |= stages.names_of_all("load", ranks, entry.stage, persistent)
    targets = _Targets(weights, frozenset(elsewhere))
    with reader.open_checkpoint(
        ranks, path, targets.make, strict=strict, verify=verify, stage=stage
    ) as found:
        warn(*found.warnings)
        try:
            own_buffers = found.fill(ranks)
        except BaseException:
            weights.begin_again()
            raise
    for average, buffers in zip(weights.averages, own_buffers, strict=False):
        average.own_buffers = {} if weights.teacher else buffers
    weights.resume(found.clock)
    targets.resume_windows()


class _Targets:
    """What is to be filled: every average, then the full blocks of windows.

    Args:
        weights: Of this rank.
        elsewhere: Names that stand on other stages of the pipeline, or will once they are filled.
    """

    def __init__(self, weights: AveragedWeights, elsewhere: frozenset[str]) -> None:
        self._averages, self._elsewhere = weights.averages, elsewhere
        names = weights.names()
        form = library_files.only_used(library_files.adapters_of(weights.model, names), names)
        self._model_names = {there: name for name, there in form.names.items()}
        self._means: list[list[BlockMean]] = []  # of each average; the last block is under way
        self._blocks: list[list[tuple[BlockMean, list[ParamState]]]] = []  # full ones

    def make(self, saved: Sequence[dict[str, Any]]) -> list[reader.LoadTarget]:
        """The targets in a saved form with these schedules."""
        self._means = [a.ring.matching(saved) if a.ring else [] for a in self._averages]
        self._blocks = [
            [(mean, average.empty()) for mean in means[:-1]]
            for average, means in zip(self._averages, self._means, strict=True)
        ]
        pairs = [
            (means[-1] if means else average.schedule, average.persistent)
            for average, means in zip(self._averages, self._means, strict=True)
        ]
        pairs += [block for blocks in self._blocks for block in blocks]
        return [
            reader.LoadTarget(schedule.to_dict(), states, self._model_names, self._elsewhere)
            for schedule, states in pairs
        ]

    def resume_windows(self) -> None:
        """Go on with the blocks that were filled."""
        for average, means, blocks in zip(self._averages, self._means, self._blocks, strict=True):
            if average.ring is not None and means:
                average.ring.resume(blocks, means[-1].begin)
