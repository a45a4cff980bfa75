"""`ema.publish`: its handle `Publication`; `Publisher` writes a version when one is due."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakMethod

from ..averaging.swap_registry import Reads
from ..checkpoint import atomic, disk, leases, library_files, request, retention, versions
from ..text import sentence, warn
from .entry import VerbEntry, Which
from .saving import Saving, interval

__all__ = ["Publication", "Publisher"]

log = logging.getLogger("dist_ema")


class Publication:
    """The handle that `EMA.publish` returns.

    Attributes:
        folder: Where versions appear.
        every: Units of the clock between two versions.
        keep: How many versions stay.
        keep_at_most: How many versions stay, leased ones included.
        which: The average that is published.
        beside: The folder whose config and tokenizer each version gets.
        files: The names of the weights in the files, and the config beside them.
        form: The dtype of the files, and how they are written.
        metrics: JSON values of yours, like {"loss": 0.3}, which go into the next versions. The
            values of the first rank are used.
        number: The number of the last version that was begun.
        published: Versions in place, as far as this rank knows.
        skipped: Versions that were due while an earlier one was written.
        failed: Versions that the disk refused; a warning named each.
    """

    def __init__(
        self,
        folder: Path,
        every: float,
        keep: int,
        keep_at_most: int | None,
        which: Any,
        beside: Path | None,
        files: library_files.FileForm,
        form: dict[str, Any],
        finish: Callable[[], Callable[[], None] | None],
    ) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep must be a whole number of versions, at least 1, got {keep!r}.")
        keep_at_most = 4 * keep if keep_at_most is None else keep_at_most
        if type(keep_at_most) is not int or keep_at_most < keep:
            raise ValueError(
                f"keep_at_most={keep_at_most!r} must be a whole number, and no less than "
                f"keep={keep}: it bounds what leases may add to keep."
            )
        self.folder, self.every = folder, interval(every)
        self.keep, self.keep_at_most = keep, keep_at_most
        self.which, self.beside = which, beside
        self.files, self.form = files, form
        if beside is not None and not beside.is_dir():
            raise ValueError(
                f"beside={os.fspath(beside)!r} is no folder. Name one with config.json."
            )
        self.metrics: dict[str, Any] = {}
        self.number = self.published = self.skipped = self.failed = 0
        self.active = True
        self.leases = leases.LeaseWatch(folder)
        self._finish = finish  # a weak reference: the EMA holds this, and not the other way round

    def begin(self) -> int:
        """Prepare the folder on the first rank. Returns the number of its last version."""
        disk.ensure(self.folder)
        disk.remove(self.folder / versions.STOP)
        number = versions.highest(self.folder)
        last_version = self.folder / versions.name_of(number)
        retention.refuse(last_version, self.keep)
        if number:  # a trainer that was killed may have left one too many
            retention.advance(last_version, self.keep, self.leases, self.keep_at_most)
        else:
            self.leases.begin_anew()
        return number

    def facts(self, average: str, step: int, now: float) -> dict[str, Any]:
        """The facts of a version, which ema.json holds under `versions.KEY`."""
        return {
            "version": self.number,
            "id": uuid.uuid4().hex,
            "average": average,
            "step": step,
            "now": now,
            "time": time.time(),
            "every": self.every,
            "skipped": self.skipped,
            "beside": [] if self.beside is None else retention.companions(self.beside),
            "texts": sorted(self.files.texts),
            "metrics": dict(self.metrics),
        }

    def note(self, error: Exception | None, aloud: bool = True) -> list[str]:
        """The outcome of a version. Returns a remark where training goes on without it.

        Args:
            error: What went wrong.
            aloud: This rank reports it.
        """
        if error is None:
            self.published += 1
            return []
        self.failed += 1
        if not aloud:
            return []
        remark = (
            f"version {self.number} could not be published in {self.folder}: "
            f"{sentence(error).rstrip('.')}. Training goes on, and the next version is tried when "
            "it is due."
        )
        log.error(remark)
        return [remark]

    def wait(self) -> None:
        """Wait for the version that is being written; warn if it failed."""
        finish = self._finish()
        if finish is not None:
            finish()

    def remove(self, stop: bool = False) -> None:
        """Publish no more; the version that is being written is waited for. Idempotent.

        Args:
            stop: Leave a stop file, so that those who follow the folder end. Pass it on one rank.
        """
        self.active = False
        self.wait()
        if stop:
            (self.folder / versions.STOP).touch()

    def __repr__(self) -> str:
        return (
            f"Publication({os.fspath(self.folder)!r}, every={self.every:g}, keep={self.keep}, "
            f"published={self.published}, skipped={self.skipped}, failed={self.failed})"
        )


class Publisher:
    """Publishes versions after `EMA.publish`, when updates make them due."""

    def __init__(self, entry: VerbEntry, saving: Saving) -> None:
        self._entry, self._saving = entry, saving
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
            publication = Publication(
                atomic.real(folder),
                every,
                keep,
                keep_at_most,
                which,
                None if beside is None else atomic.real(beside),
                library_files.form_of(weights.model, weights.names(), form["dtype"]),
                form,
                WeakMethod(self._saving.finish),
            )
            weights.ready()
            # What every version would be refused for is refused before training goes on.
            version = self._version(publication)
            version.refuse_unsound()
            _ = version.plans  # raises for dtypes
            made.append(publication)

        arguments = {
            "folder": os.fspath(folder),
            "every": every,
            "keep": keep,
            "keep_at_most": keep_at_most,
            **form,
        }
        self._entry.begin("publish", Reads.SHADOWS, which, prepare, arguments)
        publication, ranks = made[0], self._entry.everyone("publish")
        with ranks.entering("publish"):  # one of all that write: others may hold the model alone
            publication.number = ranks.run_on_first("publish", publication.begin)
        self._publication = publication
        # Notes the clock: versions are due from here on.
        self._saving.passes("publish", publication.folder, every)
        # Weak: the weights must not keep the EMA alive.
        weights.after_update = WeakMethod(self.publish_due)
        return publication

    def publish_due(self) -> None:
        """Publish a version if one is due. No error of the disk reaches the optimizer's step."""
        publication = self._publication
        if publication is None or not publication.active:
            return
        if self._saving.passes("publish", publication.folder, publication.every):
            with self._entry.everyone("publish").entering("publish"):
                self._publish(publication)

    def _publish(self, publication: Publication) -> None:
        ranks, writer = self._entry.everyone("publish"), self._saving.writer
        # One rank decides: threads behind training end at different times.
        if ranks.run_on_first("publish", lambda: writer is not None and writer.background.busy):
            publication.skipped += 1
            return
        # Also where it fails: a number is used once.
        publication.number += 1
        arguments = {"folder": os.fspath(publication.folder), "version": publication.number}
        version = partial(self._version, publication)
        try:
            self._saving.write("publish", version, arguments, publication.which, wait=False)
        except Exception as error:
            warn(*publication.note(error, aloud=ranks.first))

    def _version(self, publication: Publication) -> request.SaveRequest:
        weights = self._entry.weights
        average, clock = weights.used(publication.which), weights.clock
        step, now = clock.steps or clock.updates, clock.at(average.schedule)
        return self._saving.one_average(
            "publish",
            publication.folder / versions.name_of(publication.number),
            average,
            publication.files,
            extra={versions.KEY: publication.facts(average.name, step, now)},
            keep=publication.keep,
            numbered=True,
            leases=publication.leases,
            keep_at_most=publication.keep_at_most,
            beside=publication.beside,
            note=publication.note,
            **publication.form,
        )
