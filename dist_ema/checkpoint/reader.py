"""Saved forms, read by ranks: each rank reads only its regions, and checks come before any change.

A folder that `ema.save` wrote is resumed with its clock. Any other safetensors model (an export, a
Hugging Face folder, one file) is a start.

Every file is opened once, and checked, summed and read through that one handle. So a save that
replaces the folder in between cannot mix two versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed.coordinator import Ranks, digest
from ..schedules import from_dict
from ..sharding.geometry import Box, boxes_with_data, runs, split_box
from ..sharding.ownership import ParamState
from ..sharding.records import Region
from ..text import some
from . import atomic, crc32, manifest, regular_file, safetensors
from .torch_dtypes import DTYPES

__all__ = [
    "LoadTarget",
    "OpenCheckpoint",
    "OpenFile",
    "load_file",
    "match_schedules",
    "open_checkpoint",
]

WINDOW = 4 << 20  # bytes read at a time

Aliases = dict[str, list[str]]  # name in the file -> further names of the same weight


# --- one file ------------------------------------------------------------------------------------


class OpenFile:
    """A safetensors file that stays open: parts of its weights, its check sum."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, regular_file.open_regular(path)
        try:
            self.header = safetensors.header_of(self._handle, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._handle.close()

    def read(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Blocks of a box, each at most a window. *Aliases*: the next block overwrites this one."""
        entry = self.header.entries[name]
        dtype, begin = DTYPES[entry.dtype], len(self.header.head) + entry.begin
        blocks = list(split_box(box, WINDOW // dtype.itemsize))
        buffer = torch.empty(
            max(block.numel for block in blocks) * dtype.itemsize, dtype=torch.uint8
        )
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        for block in blocks:
            at = 0
            for start, n in runs(block, entry.shape):
                end = at + n * dtype.itemsize
                self._read(view[at:end], begin + start * dtype.itemsize)
                at = end
            yield block, buffer[:at].view(dtype).view(block.sizes)

    def _read(self, into: memoryview, offset: int) -> None:
        regular_file.read_into(self._handle.fileno(), self.path, into, offset)

    def contribution(self, rank: int, size: int) -> int:
        """What this rank's bytes add to the check sum of the file ([Note: check sums] in crc32)."""
        total = self.header.size
        at, end = total * rank // size, total * (rank + 1) // size
        found, buffer = crc32.RangeSum(total), memoryview(bytearray(min(WINDOW, end - at)))
        while at < end:
            part = buffer[: min(WINDOW, end - at)]
            self._read(part, at)
            found.add(at, part)
            at += len(part)
        return found.contribution


class _Weight(NamedTuple):
    """A weight in an open file, under the name that the file has for it."""

    file: OpenFile
    name: str

    @property
    def entry(self) -> safetensors.Entry:
        return self.file.header.entries[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]


# --- what is there -------------------------------------------------------------------------------


class _Location(NamedTuple):
    """What lies at a path, as JSON values: the first rank finds it and tells the others."""

    folder: str
    model: str  # the index, or the only file
    aliases: Aliases
    manifest: dict[str, Any] | None  # ema.json; None too where one file of its folder is named
    listed: dict[str, dict[str, Any]]  # size and check sum of the files, as far as they are known


def _locate(path: Path) -> _Location:
    """Raises ValueError for what is no model, and for an ema.json that is not sound."""
    path = atomic.whole(atomic.follow(Path(os.path.realpath(path))))
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: there is no folder and no file to read an average from."
        )
    if not path.is_dir():
        return _locate_file(path)
    found = manifest.read(path)
    if found is None:
        if (path / "averages").exists():
            raise ValueError(
                f"{path} holds further averages, and no {manifest.META}: it is not all of what "
                "ema.save() wrote."
            )
        return _Location(str(path), safetensors.find_model(path), {}, None, {})
    manifest.refuse_damaged(path, found, manifest.read_files(path, found))
    model = safetensors.find_model(path)
    return _Location(str(path), model, found.aliases, found.to_json(), found.files_of(""))


def _locate_file(path: Path) -> _Location:
    """One file of a model, or its index. The ema.json beside it tells its check sum."""
    found = manifest.read(path.parent) or manifest.Manifest()
    if found.files:
        manifest.refuse_damaged(path.parent, found)
    aliases = {} if path.suffix == ".json" else _aliases_of_file(path, found)
    listed = found.files_of("")
    if path.name != safetensors.INDEX or len(listed) < 2:
        listed = {path.name: listed[path.name]} if path.name in listed else {}
    return _Location(str(path.parent), path.name, aliases, None, listed)


def _aliases_of_file(path: Path, found: manifest.Manifest) -> Aliases:
    """Exports of one file keep aliases in its header, folders in the ema.json beside it."""
    header = safetensors.read_header(path)
    known = header.entries
    aliases = manifest.group_aliases(
        {
            alias: name
            for alias, name in header.metadata.items()
            if name in known and alias not in known and alias != "format"
        }
    )
    if path.name in found.files:
        aliases |= {name: others for name, others in found.aliases.items() if name in known}
    return aliases


# --- what is to be read --------------------------------------------------------------------------


class LoadTarget(NamedTuple):
    """An average that is to be filled."""

    schedule: dict[str, Any]
    states: list[ParamState]  # of all that the model persists


class _ReadPlan(NamedTuple):
    """Where one average is read from."""

    folder: Path
    states: list[ParamState]
    aliases: Aliases
    model: str = "model.safetensors"
    whole: bool = False  # the folder must hold the complete model, not only what is averaged
    own_buffers: Sequence[str] = ()
    listed: dict[str, dict[str, Any]] | None = None  # size and check sum of its files, if known

    @property
    def asked(self) -> set[str]:
        """The names that the folder must hold."""
        return {
            state.name
            for state in self.states
            if self.whole or state.shadow is not None or state.name in self.own_buffers
        }


def _plan_start(place: _Location, targets: Sequence[LoadTarget]) -> list[_ReadPlan]:
    """Every average starts from the one model; frozen weights and buffers may be in it or not."""
    listed = place.listed if place.manifest or place.listed else None
    folder = Path(place.folder)
    return [
        _ReadPlan(folder, target.states, place.aliases, place.model, listed=listed)
        for target in targets
    ]


def _plan_resume(
    place: _Location, saved: manifest.Manifest, targets: Sequence[LoadTarget], remarks: list[str]
) -> list[_ReadPlan]:
    """Each average gets the saved one with its schedule; the rest are paired in order."""
    path, schedules = Path(place.folder), saved.schedules
    if len(targets) > len(schedules):
        raise ValueError(f"{path} holds {len(schedules)} averages, this EMA has {len(targets)}.")
    plans = []
    for k, target in zip(
        match_schedules(schedules, [t.schedule for t in targets]), targets, strict=True
    ):
        if schedules[k] != target.schedule:
            remarks.append(
                f"{path} was averaged with {from_dict(schedules[k])!r}; this EMA goes on with "
                f"{from_dict(target.schedule)!r}."
            )
        label = saved.labels[k]
        folder = path / "averages" / label if label else path
        listed = saved.files_of(label)
        model = safetensors.INDEX if len(listed) > 1 else "model.safetensors"
        whole = saved.weights == "all" and not k
        own = saved.own_buffers_of(label)
        plans.append(_ReadPlan(folder, target.states, place.aliases, model, whole, own, listed))
    return plans


def match_schedules(saved: Sequence[Any], wanted: Sequence[Any]) -> list[int]:
    """For each wanted schedule the index of the equal saved one, else of the next unmatched one."""
    equal = [saved.index(each) if each in saved else None for each in wanted]
    left = (k for k in range(len(saved)) if k not in equal)
    return [next(left) if k is None else k for k in equal]


@dataclass
class _Differences:
    """How one folder and the model differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    of_another_kind: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)  # which is no difference that matters

    @property
    def _lists(self) -> dict[str, list[str]]:
        return {what: names for what, names in vars(self).items() if what != "passed_over"}

    def text(self) -> str:
        lists = [
            f"{len(names)} {what.replace('_', ' ')} ({some(names, between='; ')})"
            for what, names in self._lists.items()
            if names
        ]
        return ", ".join(lists)

    @property
    def count(self) -> int:
        return sum(map(len, self._lists.values()))

    @property
    def hopeless(self) -> bool:
        return bool(self.reshaped or self.of_another_kind)


class OpenCheckpoint:
    """What `open_checkpoint` found, every file open.

    clock: None where an average starts from it without one.
    """

    def __init__(self, place: _Location, targets: Sequence[LoadTarget]) -> None:
        self.warnings: list[str] = []
        self._place = place
        saved = None if place.manifest is None else manifest.Manifest.from_json(place.manifest)
        self._saved = saved if saved is not None and saved.kind == "ema" else None
        self.clock = None if self._saved is None else self._saved.clock
        self._plans = (
            _plan_start(place, targets)
            if self._saved is None
            else _plan_resume(place, self._saved, targets, self.warnings)
        )
        self._chosen: list[dict[str, _Weight]] = []  # for each plan, by the model's names
        self._reports: list[_Differences] = []
        self._open: dict[Path, OpenFile] = {}

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def open(self) -> int:
        """Open every file and compare it with the model. Returns a hash of the differences."""
        for plan in self._plans:
            chosen, report = _compare(plan, self._table(plan))
            self._chosen.append(chosen)
            self._reports.append(report)
        return digest([vars(report) for report in self._reports])

    def _table(self, plan: _ReadPlan) -> dict[str, _Weight]:
        """Every weight of a folder, under its name and all aliases."""
        files: dict[str, OpenFile] = {}

        def header_of(name: str) -> safetensors.SafetensorsFile:
            path = plan.folder / name
            if path not in self._open:
                self._open[path] = OpenFile(path)
            files[name] = self._open[path]
            return files[name].header

        headers = safetensors.read_model(plan.folder, plan.model, header_of)
        if plan.listed is not None:
            _refuse_unlisted(plan.folder, headers, plan.listed)
        table = {
            name: _Weight(file, name) for file in files.values() for name in file.header.entries
        }
        return _with_aliases(plan.folder / plan.model, table, plan.aliases)

    def judge(self, strict: bool) -> None:
        """Raise ValueError with every difference; with strict=False say those that do no harm."""
        pairs = [(p, r) for p, r in zip(self._plans, self._reports, strict=True) if r.count]
        if any(strict or report.hopeless for _, report in pairs):
            texts = [
                f"{p.folder} and the model disagree on {r.count} weights: {r.text()}"
                for p, r in pairs
            ]
            more = (
                ""
                if any(r.hopeless for _, r in pairs)
                else " Pass strict=False to load what they have in common."
            )
            raise ValueError(f"{' '.join(f'{text}.' for text in dict.fromkeys(texts))}{more}")
        for plan, report in pairs:
            if report.missing:
                self.warnings.append(
                    f"{plan.folder} lacks {some(report.missing, between='; ')}: what is averaged "
                    "starts from the live value there."
                )
            if report.unexpected:
                self.warnings.append(
                    f"{plan.folder} holds {some(report.unexpected, between='; ')}, which the model "
                    "lacks: left out."
                )
        for plan, report in zip(self._plans, self._reports, strict=True):
            if report.passed_over:
                self.warnings.append(
                    f"{plan.folder} holds recalibrated buffers of another shape "
                    f"({some(report.passed_over, between='; ')}): the average uses the model's."
                )
        if self._saved is None:
            self._warn_of_start()
        else:
            self._warn_of_frozen(self._saved)

    def _warn_of_start(self) -> None:
        exported = self._place.manifest is not None
        what = "is an export" if exported else f"comes without {manifest.META}"
        where = Path(self._place.folder, "" if exported else self._place.model)
        self.warnings.append(
            f"{where} {what}: the average starts from it, and its clock at 0. What ema.save() "
            "wrote has a clock to go on with."
        )

    def _warn_of_frozen(self, saved: manifest.Manifest) -> None:
        """Weights that are averaged now and were frozen when they were saved."""
        names = saved.averaged
        averaged = set(names).union(*(saved.aliases.get(name, ()) for name in names))
        frozen = sorted(
            state.name
            for state in self._plans[0].states
            if state.shadow is not None and state.name in self._chosen[0].keys() - averaged
        )
        if frozen:
            self.warnings.append(
                f"{self._place.folder} holds live values of {', '.join(frozen[:5])}, which were "
                "frozen then."
            )

    def contributions(self, ranks: Ranks) -> dict[str, int]:
        return {
            str(path): file.contribution(ranks.rank, ranks.size)
            for path, file in self._open.items()
        }

    def refuse_damaged(self, sums: dict[str, int]) -> None:
        """Raise ValueError for every file whose check sum is not what ema.json says."""
        for plan in self._plans:
            for name, entry in (plan.listed or {}).items():
                path = plan.folder / name
                crc = crc32.check_sum(entry["size"], [sums[str(path)]])
                if crc != entry["crc32"]:
                    raise ValueError(
                        f"{path} is damaged: its CRC-32 is {crc}, {manifest.META} says "
                        f"{entry['crc32']}."
                    )

    def fill(self, ranks: Ranks) -> list[dict[str, Tensor]]:
        """Write the shadows. Returns the own buffers of each average.

        Note:
            *Collective*: if it raises then on all ranks, and the shadows hold a mixture.
        """
        own: list[dict[str, Tensor]] = []
        work = list(zip(self._plans, self._chosen, strict=True))
        ranks.run_on_all("load", lambda: own.extend(_fill(*each) for each in work))
        return own


@contextmanager
def open_checkpoint(
    ranks: Ranks,
    path: str | os.PathLike[str],
    targets: Sequence[LoadTarget],
    *,
    strict: bool,
    verify: bool,
) -> Iterator[OpenCheckpoint]:
    """Check a saved form against the averages that are to be filled, and change nothing.

    Args:
        ranks: all that call this.
        path: a folder that `ema.save` wrote, or any safetensors model.
        targets: the averages, in their order.
        strict: names must agree.
        verify: compare check sums.

    Raises:
        ValueError: the saved form is damaged, or does not fit.

    Note:
        *Collective*. *Cost*: headers on every rank; with verify each rank reads its part of every
        file.
    """
    place = _Location(*ranks.run_on_first("load", lambda: _locate(Path(path))))
    with ExitStack() as stack:
        found = OpenCheckpoint(place, targets)
        stack.callback(found.close)
        _, alike = ranks.run_on_all("load", found.open, combine=_are_alike)
        if not alike:
            raise ValueError(
                f"the ranks see different files in {place.folder}. Is it on a file system that all "
                "of them share?"
            )
        found.judge(strict)
        if verify and place.listed:
            _, sums = ranks.run_on_all(
                "load", lambda: found.contributions(ranks), combine=_combine_sums
            )
            found.refuse_damaged(sums)
        yield found


def _are_alike(messages: list[int]) -> bool:
    """All ranks say the same."""
    return len(set(messages)) == 1


def _combine_sums(messages: list[dict[str, int]]) -> dict[str, int]:
    """Contributions to a check sum add up by exclusive or."""
    sums = dict.fromkeys(messages[0], 0)
    for contributions in messages:
        for name, contribution in contributions.items():
            sums[name] ^= contribution
    return sums


def _refuse_unlisted(
    folder: Path, files: dict[str, safetensors.SafetensorsFile], listed: dict[str, Any]
) -> None:
    """Raise ValueError unless the files of the model are those that were summed, and as long."""
    unlisted = sorted(files.keys() ^ listed.keys())
    if unlisted:
        raise ValueError(
            f"{folder} is damaged: {manifest.META} and the model's files disagree on "
            f"{', '.join(unlisted[:3])}."
        )
    for name, file in files.items():
        if file.size != listed[name]["size"]:
            raise ValueError(
                f"{folder / name} is damaged: it holds {file.size} bytes, {manifest.META} says "
                f"{listed[name]['size']}."
            )


def _with_aliases(where: Path, table: dict[str, Any], aliases: Aliases) -> dict[str, Any]:
    table = dict(table)
    for name, others in aliases.items():
        for other in others if name in table else ():
            if other in table:
                raise ValueError(
                    f"{where} is damaged: {other} is listed as another name of {name}, and is a "
                    "weight itself."
                )
            table[other] = table[name]
    return table


def _compare(plan: _ReadPlan, table: dict[str, _Weight]) -> tuple[dict[str, _Weight], _Differences]:
    """The weights under the model's names, and every difference."""
    chosen, report = {}, _Differences()
    known = {name for state in plan.states for name in (state.name, *state.shard.aliases)}
    report.unexpected += sorted(name for name in table if name not in known)
    asked = plan.asked
    for state in plan.states:
        names = [name for name in (state.name, *state.shard.aliases) if name in table]
        held = list(dict.fromkeys(table[name] for name in names))
        if state.name not in asked and (state.teacher_copy is None or not held):
            continue  # what a teacher holds beside the average is taken where it is
        if not held:
            report.missing.append(state.name)
        elif state.is_copied_buffer and state.name not in plan.own_buffers:
            continue  # the live model's counts, in whatever shape it has
        elif held[0].entry.shape != state.shard.shape:
            what = f"{state.name}: {held[0].entry.shape} on disk, {state.shard.shape} in the model"
            # NOTE: observers and growing banks change their shape after they were recalibrated.
            (report.passed_over if state.is_copied_buffer else report.reshaped).append(what)
        elif not _converts(held[0].dtype, state.average.dtype):
            report.of_another_kind.append(
                f"{state.name}: {held[0].dtype} on disk, {state.average.dtype} in the model"
            )
        else:
            _refuse_untied(state, held)
            chosen[state.name] = held[0]
    return chosen, report


def _converts(there: torch.dtype, here: torch.dtype) -> bool:
    """Floats convert to floats, complex numbers to complex ones, integers to any real dtype."""
    if there.is_complex or here.is_complex:
        return there.is_complex and here.is_complex
    return there.is_floating_point or not here.is_floating_point


def _refuse_untied(state: ParamState, held: Sequence[_Weight]) -> None:
    """Raise ValueError where names that are tied in the model hold different bytes in the file."""
    first, *others = held
    for other in others:
        pairs = zip(_blocks(state, first), _blocks(state, other), strict=True)
        same = first.entry.shape == other.entry.shape and first.dtype == other.dtype
        if not same or not all(
            torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
            for a, b in pairs
        ):
            raise ValueError(
                f"{first.name} and {other.name} are one weight in the model, and differ in "
                f"{first.file.path.parent}."
            )


def _blocks(state: ParamState, weight: _Weight) -> Iterator[Tensor]:
    """What this rank averages of a weight, a window at a time."""
    for box, _ in boxes_with_data(state.shard, state.averaged_region, state.live):
        yield from (data for _, data in weight.file.read(weight.name, box))


def _fill(plan: _ReadPlan, chosen: dict[str, _Weight]) -> dict[str, Tensor]:
    own = {}
    for state in plan.states:
        weight, held = chosen.get(state.name), state.shard.local_region
        if state.shadow is not None and weight is None:
            state.shadow.copy_(state.source)
        elif state.shadow is not None and weight is not None:
            _read(state, state.averaged_region, state.shadow, weight)
        if state.teacher_copy is not None and weight is not None:
            _read(state, held, state.teacher_copy, weight)
        if state.name in plan.own_buffers and weight is not None:
            own[state.name] = state.local.clone()
            _read(state, held, own[state.name], weight)
    return own


def _read(state: ParamState, region: Region, data: Tensor, weight: _Weight) -> None:
    """Fill `data` [region.numel] with the region's elements, in its dtype."""
    for box, view in boxes_with_data(state.shard, region, data):
        for block, values in weight.file.read(weight.name, box):
            view[block.within(box)].copy_(values)


# --- full weights --------------------------------------------------------------------------------


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The complete state_dict of a saved average or of any safetensors model.

    Every alias is restored, so `model.load_state_dict(load_file(path), strict=True)` passes.

    Args:
        path: A folder, or one .safetensors file.

    Raises:
        ValueError: A header, a size or the index is unsound. Sums are not compared
            (`dist-ema verify` does).

    Note:
        *Aliases*: the tensors are pages of the file, copied when they are written to.
    """
    where = atomic.follow(Path(os.path.realpath(path)))
    return atomic.read_one_version(where, _load_file)


def _load_file(path: Path) -> dict[str, Tensor]:
    place = _locate(path)
    folder = Path(place.folder)
    files = safetensors.read_model(folder, place.model)
    if place.manifest is not None:
        _refuse_unlisted(folder, files, place.listed)
    weights = {
        name: tensor for file in files for name, tensor in _mapped(folder / file, files[file])
    }
    return _with_aliases(folder / place.model, weights, place.aliases)


def _mapped(path: Path, file: safetensors.SafetensorsFile) -> Iterable[tuple[str, Tensor]]:
    """Every weight of the file as pages of it."""
    pages = np.memmap(path, np.uint8, "c")
    if len(pages) != file.size:
        raise ValueError(f"{path} became shorter while it was read.")
    for name, entry in file.entries.items():
        start, dtype = len(file.head) + entry.begin, DTYPES[entry.dtype]
        raw = torch.from_numpy(pages[start : start + entry.nbytes])
        # NOTE: other writers pack at any byte, and views of a wider dtype need alignment.
        raw = raw if start % dtype.itemsize == 0 else raw.clone()
        yield (
            name,
            raw.view(dtype).view(entry.shape)
            if entry.nbytes
            else torch.empty(entry.shape, dtype=dtype),
        )
