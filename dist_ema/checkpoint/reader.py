"""`OpenCheckpoint`: `ema.load` on every rank: what is there is opened, compared, summed, then read.

A folder that `ema.save` wrote is resumed with its clock. Any other safetensors model (an export, a
Hugging Face folder, one file) is a start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributed.diagnosis import digest
from ..distributed.ranks import Ranks
from ..sharding import geometry, ownership, records
from . import atomic, crc32, location, manifest, pointers, safetensors
from .open_file import OpenFile, OpenWeight
from .read_plan import LoadTarget, ReadPlan, plan_resume, plan_start

__all__ = ["LoadTarget", "OpenCheckpoint", "open_checkpoint"]

MakeTargets = Callable[[Sequence[dict[str, Any]]], list[LoadTarget]]

ATTEMPTS = 10  # to open one version on all ranks, while another job replaces it


class OpenCheckpoint:
    """A saved form with every file open, compared with the averages that are to be filled.

    clock: None where an average starts from it without one.
    first_warnings: The digest of what the first rank warns of.
    """

    def __init__(
        self, place: location.Location, targets: Sequence[LoadTarget], stack: ExitStack
    ) -> None:
        self.warnings: list[str] = []
        self.first_warnings = 0
        self._place, self._stack = place, stack  # which closes the files
        saved = None if place.manifest is None else manifest.Manifest.from_json(place.manifest)
        # An export has no clock to go on with, so an average starts from it.
        self._saved = saved if saved is not None and saved.kind == "ema" else None
        self.clock = None if self._saved is None else self._saved.clock
        self._plans = (
            plan_start(place, targets)
            if self._saved is None
            else plan_resume(place, self._saved, targets, self.warnings)
        )
        self._open: dict[Path, OpenFile] = {}

    def open(self, version: list[int] | None, is_last: bool) -> int | None:
        """Open every file and compare it with the model.

        Args:
            version: The version of the model, as the first rank found it.
            is_last: Take what is there now, whatever its version.

        Returns:
            A hash of the differences; None where the model was replaced.
        """
        # Held, so that its inode number cannot become that of another file.
        with atomic.held(Path(self._place.folder, self._place.model)):
            try:
                for plan in self._plans:
                    plan.compare(self._table(plan))
            except (OSError, ValueError):
                if is_last or _version(self._place) == version:
                    raise
                return None
            if not is_last and _version(self._place) != version:
                return None
        for plan in self._plans:
            self.warnings += plan.differences.warnings(plan.folder)
        if self._saved is None:
            self._warn_of_start()
        else:
            self.warnings += self._plans[0].frozen_warnings(self._saved, self._place.folder)
        return digest([vars(plan.differences) for plan in self._plans])

    def _table(self, plan: ReadPlan) -> dict[str, OpenWeight]:
        """Every weight of a folder, under its name and all aliases."""
        files: dict[str, OpenFile] = {}

        def header_of(name: str) -> safetensors.SafetensorsFile:
            path = plan.folder / name
            if path not in self._open:
                self._open[path] = self._stack.enter_context(closing(OpenFile(path)))
            files[name] = self._open[path]
            return files[name].header

        headers = safetensors.read_model(plan.folder, plan.model, header_of)
        if plan.listed is not None:
            location.refuse_unlisted(plan.folder, headers, plan.listed)
        table = {
            name: OpenWeight(file, name) for file in files.values() for name in file.header.entries
        }
        return location.with_aliases(plan.folder / plan.model, table, plan.aliases)

    def fits(self, strict: bool) -> bool:
        """Whether the model can be filled from it."""
        return not any(
            plan.differences.are_fatal or (strict and plan.differences.count)
            for plan in self._plans
        )

    def judge(self, strict: bool) -> None:
        """Raise ValueError with every difference, if there is one that does harm."""
        if self.fits(strict):
            return
        sentences = [
            f"{plan.folder} and the model disagree on {plan.differences.count} weights: "
            f"{plan.differences.text()}."
            for plan in self._plans
            if plan.differences.count
        ]
        if not any(plan.differences.are_fatal for plan in self._plans):
            sentences.append("Pass strict=False to load what they have in common.")
        # Averages of one folder may differ from it alike: a sentence is said once.
        raise ValueError(" ".join(dict.fromkeys(sentences)))

    def _warn_of_start(self) -> None:
        exported = self._place.manifest is not None
        what = "is an export" if exported else f"comes without {manifest.META}"
        where = Path(self._place.folder, "" if exported else self._place.model)
        self.warnings.append(
            f"{where} {what}: the average starts from it, and its clock at 0. What ema.save() "
            "wrote has a clock to go on with."
        )

    def sums(self, ranks: Ranks) -> dict[str, int]:
        """What this rank's part of each file adds to its check sum, by the file's number."""
        # Sorted, so that all ranks number the files alike.
        files = sorted(self._open.items()) if self._place.listed else []
        parts = [file.contribution(ranks.rank, ranks.size) for _, file in files]
        return {str(number): part for number, part in enumerate(parts) if part}

    def damage(self, sums: dict[str, int]) -> str:
        """Which file has another check sum than ema.json says."""
        numbers = {path: str(number) for number, path in enumerate(sorted(self._open))}
        for plan in self._plans:
            for name, entry in (plan.listed or {}).items():
                path = plan.folder / name
                crc = crc32.check_sum(entry["size"], [sums.get(numbers[path], 0)])
                if crc != entry["crc32"]:
                    return (
                        f"{path} is damaged: its CRC-32 is {crc}, {manifest.META} says "
                        f"{entry['crc32']}."
                    )
        return ""

    def warnings_of(self, ranks: Ranks) -> list[str]:
        """What this rank warns of: the first one speaks for all that would say the same."""
        repeats_first = not ranks.first and digest(self.warnings) == self.first_warnings
        return [] if repeats_first else self.warnings

    def fill(self, ranks: Ranks) -> list[dict[str, Tensor]]:
        """Write the shadows. Returns the own buffers of each average.

        Note:
            *Collective*: if it raises then on all ranks, and the shadows hold a mixture.
        """
        own: list[dict[str, Tensor]] = []
        ranks.run_on_all("load", lambda: own.extend(map(_fill, self._plans)))
        return own


@contextmanager
def open_checkpoint(
    ranks: Ranks,
    path: str | os.PathLike[str],
    make_targets: MakeTargets,
    *,
    strict: bool,
    verify: bool,
    stage: Sequence[int] = (),
) -> Iterator[OpenCheckpoint]:
    """Check a saved form against the averages that are to be filled, and change nothing.

    Args:
        ranks: all that call this.
        path: a folder that `ema.save` wrote, or any safetensors model.
        make_targets: gives the averages, in their order, for the schedules that are saved there.
        strict: names must agree.
        verify: compare check sums.
        stage: the ranks that hold the same weights, where not all do.

    Raises:
        ValueError: the saved form is damaged, or does not fit.

    Note:
        *Collective*. *Cost*: headers on every rank; with verify each rank reads its part of every
        file.
    """
    with ExitStack() as stack:
        # NOTE: another job may replace the files meanwhile. A file system may also show ranks
        # different times of one file, so the last attempt goes on.
        for left in reversed(range(ATTEMPTS)):
            # Of its own, because an attempt that saw several versions closes its files.
            files = stack.enter_context(ExitStack())
            opened = _open_one_version(
                ranks, Path(path), make_targets, files, stage, not left,
                strict=strict, verify=verify,
            )  # fmt: skip
            if opened is not None:
                break
            files.close()
        else:
            raise ValueError(
                f"the ranks see different files in {path}. Is it on a file system that all of them "
                "share?"
            )
        checkpoint, damage = opened
        if stage:  # what differs there differs on no other stage
            ranks.run_on_all("load", lambda: checkpoint.judge(strict))
        else:
            checkpoint.judge(strict)
        if damage:
            raise ValueError(damage)
        yield checkpoint


def _open_one_version(
    ranks: Ranks,
    path: Path,
    make_targets: MakeTargets,
    files: ExitStack,
    stage: Sequence[int],
    is_last: bool,
    *,
    strict: bool,
    verify: bool,
) -> tuple[OpenCheckpoint, str] | None:
    """Open the files on all ranks, and sum those that fit the model.

    Returns the files, and what is damaged. None where ranks saw several versions.
    """
    places: list[location.Location] = []
    opened: list[OpenCheckpoint] = []

    def find_model() -> list[Any]:
        places.append(atomic.read_one_version(pointers.resolve(path), location.locate))
        return [digest(places[0]), _version(places[0])]

    def work() -> dict[str, Any]:
        differences, sums = None, dict[str, int]()
        place: location.Location | None = None
        try:
            place = places[0] if places else location.locate(path, read_headers=False)
        except (OSError, ValueError):
            if is_last:
                raise
        if place is not None and digest(place) == first_sees:
            saved = [] if place.manifest is None else place.manifest["schedules"]
            checkpoint = OpenCheckpoint(place, make_targets(saved), files)
            opened.append(checkpoint)
            differences = checkpoint.open(version, is_last)
            if verify and differences is not None and checkpoint.fits(strict):
                sums = checkpoint.sums(ranks)
        return {"differences": {str(list(stage)): differences}, "sums": sums}

    def conclude(found: dict[str, Any]) -> list[Any] | None:
        if None in found["differences"].values():
            return None
        damage = opened[0].damage(found["sums"]) if verify else ""
        return [damage, digest(opened[0].warnings)]

    first_sees, version = ranks.run_on_first("load", find_model)
    # NOTE: no rank tells the others what ema.json says, which grows with the model.
    _, concluded = ranks.run_and_reduce("load", work, _combine, conclude)
    if concluded is None:
        return None
    damage, opened[0].first_warnings = concluded
    return opened[0], damage


def _combine(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine messages of ranks. Where two of a stage saw other files, its entry is None."""
    differences: dict[str, int | None] = {}
    for message in messages:
        for stage, found in message["differences"].items():
            if differences.setdefault(stage, found) != found:
                differences[stage] = None
    return {
        "differences": differences,
        "sums": crc32.combine([message["sums"] for message in messages]),
    }


def _version(place: location.Location) -> list[int] | None:
    # NOTE: the number of the device differs between hosts.
    identity = atomic.identity(Path(place.folder, place.model))
    return None if identity is None else list(identity[1:])


def _fill(plan: ReadPlan) -> dict[str, Tensor]:
    own = {}
    for state in plan.target.states:
        weight, held = plan.chosen.get(state.name), state.shard.local_region
        if weight is None:
            if state.shadow is not None:
                state.shadow.copy_(state.source)
            continue
        if state.shadow is not None:
            _read(state, state.averaged_region, state.shadow, weight)
        if state.teacher_copy is not None:
            _read(state, held, state.teacher_copy, weight)
        if state.name in plan.own_buffers:
            own[state.name] = state.local.clone()
            _read(state, held, own[state.name], weight)
    return own


def _read(
    state: ownership.ParamState, region: records.Region, data: Tensor, weight: OpenWeight
) -> None:
    """Fill `data` [region.numel] with the region's elements, in its dtype."""
    for box, view in geometry.boxes_with_data(state.shard, region, data):
        # A window of the file at a time; the copy casts.
        for block, elements in weight.file.read(weight.name, box):
            view[block.within(box)].copy_(elements)
