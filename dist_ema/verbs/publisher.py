"""`Publisher`: a publication begun, a version published when due, as a request of the writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakMethod

from ..averaging.swap_registry import Reads
from ..checkpoint import atomic, library_files, request, versions
from ..checkpoint.publishing import Publication
from ..text import warn
from .entry import Entry, Which
from .files import Files

__all__ = ["Publisher"]


class Publisher:
    """What `EMA.publish` has begun, and the updates carry on."""

    def __init__(self, entry: Entry, files: Files) -> None:
        self._entry, self._files = entry, files
        self._publication: Publication | None = None

    def begin(
        self,
        folder: str | Path,
        every: float,
        keep: int,
        keep_at_most: int | None,
        which: Which,
        beside: str | Path | None,
        form: dict[str, Any],
    ) -> Publication:
        """See `EMA.publish`. form: dtype, and how files are written. *Collective*."""
        earlier, made = self._publication, list[Publication]()
        weights = self._entry.weights

        def prepare() -> None:
            if earlier is not None and earlier.active:
                raise RuntimeError(
                    f"ema.publish() was called before, for {earlier.folder}. Call remove() on its "
                    "handle first."
                )
            finish = WeakMethod(self._files.finish)
            place, beside_folder = (
                atomic.real(folder),
                None if beside is None else atomic.real(beside),
            )
            files = library_files.form_of(weights.model, weights.names(), form["dtype"])
            made.append(
                Publication(
                    place, every, keep, keep_at_most, which, beside_folder, files, form, finish
                )
            )

        arguments = {"folder": os.fspath(folder), "every": every, "keep": keep}
        arguments |= {"keep_at_most": keep_at_most} | form
        self._entry.begin("publish", Reads.SHADOWS, which, prepare, arguments)
        self._publication = publication = made[0]
        publication.number = self._entry.ranks.run_on_first("publish", publication.begin)
        self._files.passes(publication.folder, every)
        weights.after_update = WeakMethod(self.publish_due)
        return publication

    def publish_due(self) -> None:
        """Publish a version if one is due. No error of the disk reaches the optimizer's step."""
        publication, files = self._publication, self._files
        if publication is None or not publication.active:
            return
        if not files.passes(publication.folder, publication.every):
            return
        with self._entry.everyone.entering("publish"):
            self._publish(publication)

    def _publish(self, publication: Publication) -> None:
        ranks, files = self._entry.everyone, self._files
        writer = files.writer
        if ranks.run_on_first("publish", lambda: writer is not None and writer.background.busy):
            publication.skipped += 1
            return
        publication.number += 1
        arguments = {"folder": os.fspath(publication.folder), "version": publication.number}

        def version() -> request.SaveRequest:
            return self._version(publication)

        try:
            files.write("publish", version, arguments, publication.which, wait=False)
        except Exception as error:
            warn(*publication.note(error, aloud=ranks.first))

    def _version(self, publication: Publication) -> request.SaveRequest:
        weights = self._entry.weights
        average, clock = weights.used(publication.which), weights.clock
        step, now = clock.steps or clock.updates, clock.at(average.schedule)
        return self._files.one_average(
            "publish",
            publication.folder / versions.name_of(publication.number),
            average,
            publication.files,
            extra={versions.KEY: publication.facts(average.name, step, now)},
            keep=publication.keep,
            numbered=True,
            publication=publication,
            **publication.form,
        )
