"""`Saving`: `ema.save`, `export` and the rest as a `SaveRequest` each, and when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..averaging.average import Average
from ..averaging.swap_registry import Reads
from ..checkpoint import atomic, library_files, manifest, stages, writer
from ..checkpoint.request import AverageFiles, SaveRequest
from ..distributed.ranks import Ranks
from ..schedules import plain_number
from ..sharding import consistency
from ..sharding.ownership import ParamState
from ..text import warn
from .entry import VerbEntry, Which
from .likely_mistakes import warn_if_idle, warn_if_nameless, warn_of_unexplained_keys

__all__ = ["Saving", "interval"]


def interval(every: float) -> float:
    """Units between two files, an int or float, as ema.json holds it. Else raises ValueError."""
    number = plain_number(every)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"every must be positive and finite, got {every!r}.")
    return number


class Saving:
    """The files that one EMA writes, one request at a time.

    Attributes:
        writer: Made by the first request, and kept.
    """

    def __init__(self, entry: VerbEntry) -> None:
        self._entry, self._weights = entry, entry.weights
        self.writer: writer.Writer | None = None
        # The clock at the last look of `snapshot` or `publish` for each of their folders.
        self._last_looks: dict[tuple[str, str], float] = {}

    def passes(self, verb: str, folder: str | Path, every: float) -> bool:
        """Whether the clock has passed a multiple of `every` since the verb's last look."""
        now, last = self._weights.clock.now, self._weights.averages[0].last
        # The first look is that of the update before.
        before = self._last_looks.get((verb, str(folder)), now - (last[1] if last else 0.0))
        self._last_looks[verb, str(folder)] = now
        # Ten times 0.1 is less than 1, in floating point.
        return math.floor(now / every + 1e-9) > math.floor(before / every + 1e-9)

    # --- what to write ----------------------------------------------------------------------------

    def all_averages(
        self,
        path: str | Path,
        kind: str,
        *,
        mixed: bool,
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> SaveRequest:
        """A folder with all averages.

        Args:
            path: The folder.
            kind: "ema" has a clock to resume with, "export" has none.
            mixed: Save a window as the average that verbs use, and its blocks after all averages.
                Else save its block under way, from which `posthoc` reconstructs any curve.
            extra: For ema.json.
            options: The options of the request.
        """
        averages, weights = self._average_files(mixed)
        facts = self._manifest(kind, weights, extra)
        return SaveRequest("save", atomic.real(path), averages, facts, **options)

    def one_average(
        self,
        verb: str,
        path: Path,
        average: Average,
        form: library_files.FileForm,
        *,
        merged: list[ParamState] | None = None,
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> SaveRequest:
        """A complete model, or an adapter, with one average in it.

        Args:
            verb: "export" or "publish".
            path: The folder or file.
            average: As verbs use it.
            form: The form of the files.
            merged: What a model with merged adapters persists, in place of the average's states.
            extra: For ema.json.
            options: The options of the request.
        """
        states = average.persistent if merged is None else merged
        held = [state for state in states if form.holds(state.name)]
        own_buffers = dict(average.own_buffers) if merged is None else {}
        alone = verb == "export" and self._entry.needed is self._entry.alone
        schedule = average.schedule.to_dict()
        files = AverageFiles(held, own_buffers, schedule, alone=alone, form=form)
        facts = self._manifest("export", form.weights, extra)
        return SaveRequest(verb, path, [files], facts, **options)

    def _average_files(self, mixed: bool) -> tuple[list[AverageFiles], str]:
        """The first average is complete (with `only=`: what is averaged), others share its rest.

        Returns:
            The files, and what `Manifest.weights` says of them.
        """
        weights = self._weights
        names = weights.names()
        adapters = library_files.adapters_of(weights.model, names)
        form = library_files.only_used(adapters, names)
        complete = weights.selection.only is None and not adapters
        files, blocks = [], []
        for i, raw in enumerate(weights.averages):
            average = weights.used(i) if mixed else raw
            states = [
                state
                for state in average.persistent
                if state.shadow is not None
                or state.name in average.own_buffers
                or (i == 0 and complete)
                or (form.is_adapter and state.name in form.names)
            ]
            label = f"{i}-{type(average.schedule).__name__}" if i else ""
            schedule = average.schedule.to_dict()
            own_buffers = dict(average.own_buffers)
            files.append(AverageFiles(states, own_buffers, schedule, label, form=form))
            if mixed and raw.ring is not None:
                # `load` fills the average from the block under way, its own buffers too.
                under_way = [
                    state
                    for state in raw.persistent
                    if state.shadow is not None or state.name in own_buffers
                ]
                blocks += [
                    (mean, held, own_buffers if held is under_way else {})
                    for mean, held in raw.ring.saved(under_way, weights.clock.now)
                ]
        for i, (mean, states, own_buffers) in enumerate(blocks, len(files)):
            label = f"{i}-{type(mean).__name__}"
            files.append(AverageFiles(states, own_buffers, mean.to_dict(), label, form=form))
        return files, "adapter" if form.is_adapter else "all" if complete else "averaged"

    def _manifest(self, kind: str, weights: str, extra: dict[str, Any] | None) -> manifest.Manifest:
        attached = self._entry.attachment
        return manifest.Manifest(
            kind=kind,
            weights=weights,
            clock=self._weights.clock_to_dict(),
            attach=None if attached is None else attached.to_dict(),
            rounding={"seed": self._weights.seed},
            extra={} if extra is None else extra,
        )

    # --- writing it -------------------------------------------------------------------------------

    def write(
        self,
        verb: str,
        make_request: Callable[[], SaveRequest],
        arguments: dict[str, Any],
        which: Which = 0,
        wait: bool = True,
    ) -> None:
        """Begin the verb and write what it asks for. *Collective*.

        Args:
            verb: As the user called it.
            make_request: Called when the shadows may be read.
            arguments: The arguments of the verb, alike on every rank.
            which: The average that it uses.
            wait: False writes in the background.
        """
        made: list[SaveRequest] = []

        def prepare() -> None:
            self._weights.ready()
            made.append(make_request())  # with the buffers that were filled since

        ranks = self._entry.needed if verb == "export" else self._entry.ranks
        with ranks.entering(verb):
            self.finish()
            self._entry.begin(verb, Reads.WHOLE_MODEL, which, prepare, arguments, ranks)
            warn_if_idle(verb, self._weights)
            self.submit(made[0], ranks, which, arguments, wait)

    def submit(
        self,
        request: SaveRequest,
        ranks: Ranks,
        which: Which,
        arguments: dict[str, Any],
        wait: bool = True,
    ) -> None:
        """Write what all ranks ask for, inside a verb that has begun. *Collective*."""
        entry, verb = self._entry, request.verb
        warn_if_nameless(verb, self._weights)
        if request.manifest.weights == "all":
            warn_of_unexplained_keys(verb, self._weights)
        if ranks is entry.alone:
            # Every rank is alone here, so no exchange keeps them apart.
            with atomic.locked(request.path):  # all ranks may export to one path
                warn(*writer.Writer(ranks).write(request))
            return
        with entry.everyone(verb).entering(verb):
            self._write_together(request, which, arguments, wait)

    def _write_together(
        self, request: SaveRequest, which: Which, arguments: dict[str, Any], wait: bool
    ) -> None:
        entry, verb = self._entry, request.verb
        ranks = entry.everyone(verb)
        if entry.is_staged:
            entry.compare_shared(verb)
            united = stages.unite(verb, ranks, entry.stage, request.averages)
            request = replace(request, averages=united)
        if ranks is not entry.ranks:  # an unwrapped model: the first writes, if all hold the same
            states = [state for files in request.averages for state in files.states]
            consistency.on_averages(verb, ranks, states, entry.common(which, arguments))
            on_first = [replace(files, writes=ranks.first) for files in request.averages]
            request = replace(request, averages=on_first)
        # Kept, with its connections, for all later saves.
        if self.writer is None:
            self.writer = writer.Writer(ranks)
        warn(*self.writer.write(request, wait))

    def finish(self) -> None:
        """Wait until no save is in flight behind training.

        Raises:
            RuntimeError: The last one failed.
        """
        if self.writer is not None:
            warn(*self.writer.background.finish())
