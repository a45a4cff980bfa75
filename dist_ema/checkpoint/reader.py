"""Saved forms, read by ranks: only the slices that each one keeps, and nothing changes before everything is checked.

What is read: a folder that `ema.save` wrote, which is resumed, clock and all; or any safetensors model (an export, a
Hugging Face folder, one file), from which an average starts.

Every file is opened once, and checked, summed and read through that one handle: a save that replaces the folder in between
cannot mix two versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..averaging.clock import Clock
from ..distributed.coordinator import Ranks, digest
from ..schedules import from_dict
from ..sharding.geometry import Box, boxes_with_data, runs, split_box
from ..sharding.ownership import ParamState
from ..sharding.records import Region
from ..text import some
from . import atomic, crc32, manifest, regular_file, safetensors
from .torch_dtypes import DTYPES

__all__ = ["LoadTarget", "OpenCheckpoint", "OpenFile", "load_file", "open_checkpoint"]

WINDOW = 4 << 20  # bytes read at a time

Aliases = dict[str, list[str]]  # name in the file -> further names of the same weight


# --- one file ----------------------------------------------------------------------------------------------------


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
        """The box of a weight in blocks of at most one window. *Aliases*: the next block overwrites this one."""
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
        """What this rank's part of the bytes adds to the check sum of the file ([Note: check sums] in format)."""
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


# --- what is there -----------------------------------------------------------------------------------------------


class _Location(NamedTuple):
    """What lies at a path."""

    folder: str
    model: str  # the index, or the only file
    aliases: Aliases
    meta: dict[str, Any]  # ema.json; {} if there is none, or only a file of its folder is named
    listed: dict[str, Any]  # size and check sum of the model's files, where ema.json has them


def _place(path: Path) -> _Location:
    """Raises ValueError for what is no model, and for an ema.json that is not sound."""
    path = _resolve(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: there is no folder and no file to read an average from."
        )
    if not path.is_dir():
        beside = _meta_beside(path.parent)
        aliases = {} if path.suffix == ".json" else _aliases_of_file(path, beside)
        listed = _listed(beside)
        if path.name != safetensors.INDEX or len(listed) < 2:
            listed = {path.name: listed[path.name]} if path.name in listed else {}
        return _Location(str(path.parent), path.name, aliases, {}, listed)
    meta = _meta_beside(path)
    if not meta and (path / "averages").exists():
        raise ValueError(
            f"{path} holds further averages, and no {manifest.META}: it is not all of what ema.save() wrote."
        )
    return _Location(
        str(path), safetensors.find_model(path), meta.get("aliases", {}), meta, _listed(meta)
    )


def _meta_beside(folder: Path) -> dict[str, Any]:
    """ema.json, tried; {} if there is none."""
    if not os.path.lexists(folder / manifest.META):
        return {}
    meta = manifest.read_meta(folder)
    _refuse_unsound(folder / manifest.META, meta)
    return meta


def _listed(meta: dict[str, Any]) -> dict[str, Any]:
    """Size and check sum of the files in the folder itself."""
    return {name: said for name, said in meta.get("files", {}).items() if "/" not in name}


def _resolve(path: Path) -> Path:
    """Where a name leads: through links, and to what a save that was cut short meant to leave there."""
    path = atomic.follow(Path(os.path.realpath(path)))
    atomic.recover(path)
    return path


def _aliases_of_file(path: Path, meta: dict[str, Any]) -> Aliases:
    """Of one file of a model: exports keep them in its header, folders in the ema.json beside it."""
    header = safetensors.read_header(path)
    known = header.entries
    further = {
        alias: name
        for alias, name in header.metadata.items()
        if name in known and alias not in known
    }
    found = manifest.group_aliases(
        {alias: name for alias, name in further.items() if alias != "format"}
    )
    if path.name in meta.get("files", {}):
        found |= {name: others for name, others in meta["aliases"].items() if name in known}
    return found


def _refuse_unsound(where: Path, meta: dict[str, Any]) -> None:
    """Try what reading takes from ema.json, before anything changes, and that it is what was written."""
    try:
        for said in meta["files"].values():
            _demand(
                type(said["size"]) is int
                and isinstance(said["crc32"], str)
                and len(said["crc32"]) == 8,
                said,
            )
        for others in _sound(meta["aliases"], dict).values():
            _names(others)
        if meta["kind"] != "export":
            _try_averages(meta)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is damaged: {type(error).__name__}: {str(error)[:200]}"
        ) from None
    if manifest.changed(meta):
        raise ValueError(
            f"{where} was changed since dist_ema wrote it. Move it away to start from the weights without clock and schedule."
        )


def _try_averages(meta: dict[str, Any]) -> None:
    _demand(meta["kind"] == "ema", meta["kind"])
    _demand(meta["weights"] in ("all", "averaged"), meta["weights"])
    _names(meta["averaged"])
    Clock().set(_sound(meta["clock"], dict))
    _demand(type(meta["clock"]["accepted"]) is int, meta["clock"])
    own = [
        _names(each["own_buffers"])
        for each in (meta, *(meta["averages"][label] for label in _labels(meta)))
    ]
    if len(meta["schedules"]) != len(own):
        raise ValueError(f"{len(meta['schedules'])} schedules for {len(own)} averages")
    for spec in meta["schedules"]:
        from_dict(spec)


def _demand(sound: bool, value: Any) -> None:
    if not sound:
        raise ValueError(f"{brief(value)} stands where something else must")


def _sound(value: Any, kind: type) -> Any:
    _demand(isinstance(value, kind), value)
    return value


def _names(value: Any) -> list[str]:
    _demand(isinstance(value, list) and all(isinstance(name, str) for name in value), value)
    return value  # type: ignore[no-any-return]


def _labels(meta: dict[str, Any]) -> list[str]:
    """The further averages in the order of their schedules. NOTE: JSON keeps them by name, '10-...' before '2-...'."""
    return sorted(meta["averages"], key=lambda label: int(label.split("-")[0]))


# --- what is to be read ------------------------------------------------------------------------------------------


class LoadTarget(NamedTuple):
    """An average that is to be filled: the spec of its schedule, and all that the model persists."""

    spec: dict[str, Any]
    slots: list[ParamState]


class _ReadPlan(NamedTuple):
    """Where one average is read from."""

    folder: Path
    slots: list[ParamState]
    aliases: Aliases
    model: str = "model.safetensors"
    whole: bool = False  # the folder must hold the complete model, not only what is averaged
    own_buffers: Sequence[str] = ()
    listed: dict[str, Any] | None = (
        None  # size and check sum of its files, if somebody wrote them down
    )

    @property
    def asked(self) -> list[ParamState]:
        return [
            s
            for s in self.slots
            if self.whole or s.shadow is not None or s.name in self.own_buffers
        ]


def _started(place: _Location, readers: Sequence[LoadTarget]) -> list[_ReadPlan]:
    """Every average starts from the one model; frozen weights and buffers may be in it or not."""
    listed = place.listed if place.meta or place.listed else None
    return [
        _ReadPlan(Path(place.folder), r.slots, place.aliases, place.model, listed=listed)
        for r in readers
    ]


def _resumed(place: _Location, readers: Sequence[LoadTarget], said: list[str]) -> list[_ReadPlan]:
    """For each average the saved one with its schedule; those that are left over follow each other in order."""
    meta, path = place.meta, Path(place.folder)
    saved, labels = meta["schedules"], _labels(meta)
    if len(readers) > len(saved):
        raise ValueError(f"{path} holds {len(saved)} averages, this EMA has {len(readers)}.")
    chosen = [saved.index(reader.spec) if reader.spec in saved else None for reader in readers]
    left = (k for k in range(len(saved)) if k not in chosen)
    sources = []
    for reader, match in zip(readers, chosen, strict=True):
        k = next(left) if match is None else match
        if match is None:
            said.append(
                f"{path} was averaged with {from_dict(saved[k])!r}; this EMA goes on with {from_dict(reader.spec)!r}."
            )
        inside = f"averages/{labels[k - 1]}" if k else ""
        own = (meta["averages"][labels[k - 1]] if k else meta)["own_buffers"]
        listed = {
            Path(name).name: said
            for name, said in meta["files"].items()
            if os.path.dirname(name) == inside
        }
        model = safetensors.INDEX if len(listed) > 1 else "model.safetensors"
        whole = meta["weights"] == "all" and not k
        sources.append(
            _ReadPlan(path / inside, reader.slots, place.aliases, model, whole, own, listed)
        )
    return sources


@dataclass
class _Differences:
    """How one folder and the model differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    of_another_kind: list[str] = field(default_factory=list)

    def text(self) -> str:
        lists = [
            f"{len(names)} {what.replace('_', ' ')} ({some(names, between='; ')})"
            for what, names in vars(self).items()
            if names
        ]
        return ", ".join(lists)

    @property
    def count(self) -> int:
        return sum(map(len, vars(self).values()))

    @property
    def hopeless(self) -> bool:
        return bool(self.reshaped or self.of_another_kind)


class OpenCheckpoint:
    """What `look` found, every file open. clock: None if an average starts from it without one."""

    def __init__(self, place: _Location, readers: Sequence[LoadTarget]) -> None:
        self.warnings: list[str] = []
        self.clock = place.meta["clock"] if place.meta.get("kind") == "ema" else None
        self._place = place
        resumed = self.clock is not None
        self._sources = (
            _resumed(place, readers, self.warnings) if resumed else _started(place, readers)
        )
        self._chosen: list[dict[str, _Weight]] = []  # for each source, by the model's names
        self._reports: list[_Differences] = []
        self._open: dict[Path, OpenFile] = {}

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def open(self) -> int:
        """Open every file and compare it with the model. Returns a hash of what came out, alike on every rank."""
        for source in self._sources:
            table = self._table(source)
            chosen, report = _compare(source, table)
            self._chosen.append(chosen)
            self._reports.append(report)
        return digest([vars(report) for report in self._reports])

    def _table(self, source: _ReadPlan) -> dict[str, _Weight]:
        """Every weight of a folder, under its name and all aliases."""
        where = source.folder / source.model
        weights = (
            None
            if source.model.endswith(".safetensors")
            else safetensors.read_index(source.folder, source.model)
        )
        paths = {
            name: source.folder / name
            for name in sorted(set(weights.values() if weights else [source.model]))
        }
        for path in paths.values():
            if path not in self._open:
                self._open[path] = OpenFile(path)
        files = {name: self._open[path] for name, path in paths.items()}
        if weights is not None:
            safetensors.refuse_other_index(
                where, weights, {name: file.header for name, file in files.items()}
            )
        if source.listed is not None:
            _refuse_unlisted(
                source.folder, {name: file.header for name, file in files.items()}, source.listed
            )
        table = {
            name: _Weight(file, name) for file in files.values() for name in file.header.entries
        }
        return _with_aliases(where, table, source.aliases)

    def judge(self, strict: bool) -> None:
        """Raise ValueError with every difference; with strict=False say those that do no harm."""
        pairs = [(s, r) for s, r in zip(self._sources, self._reports, strict=True) if r.count]
        if any(strict or report.hopeless for _, report in pairs):
            texts = [
                f"{s.folder} and the model disagree on {r.count} weights: {r.text()}"
                for s, r in pairs
            ]
            more = (
                ""
                if any(r.hopeless for _, r in pairs)
                else " Pass strict=False to load what they have in common."
            )
            raise ValueError(f"{' '.join(f'{text}.' for text in dict.fromkeys(texts))}{more}")
        for source, report in pairs:
            if report.missing:
                self.warnings.append(
                    f"{source.folder} lacks {some(report.missing, between='; ')}: what is averaged starts from the live "
                    "value there."
                )
            if report.unexpected:
                self.warnings.append(
                    f"{source.folder} holds {some(report.unexpected, between='; ')}, which the model lacks: left out."
                )
        self._say_what_else()

    def _say_what_else(self) -> None:
        meta = self._place.meta
        if self.clock is None:
            what = "is an export" if meta else f"comes without {manifest.META}"
            where = Path(self._place.folder, "" if meta else self._place.model)
            self.warnings.append(
                f"{where} {what}: the average starts from it, and its clock at 0. What ema.save() wrote has a clock to go on "
                "with."
            )
        else:
            then = set(meta["averaged"]).union(
                *(meta["aliases"].get(name, ()) for name in meta["averaged"])
            )
            held = {name for chosen in self._chosen[:1] for name in chosen}
            slots = [
                slot
                for slot in self._sources[0].slots
                if slot.shadow is not None and slot.name in held
            ]
            frozen = sorted(slot.name for slot in slots if slot.name not in then)
            if frozen:
                self.warnings.append(
                    f"{self._place.folder} holds live values of {', '.join(frozen[:5])}, which were frozen then."
                )

    def contributions(self, ranks: Ranks) -> dict[str, int]:
        return {
            str(path): file.contribution(ranks.rank, ranks.size)
            for path, file in self._open.items()
        }

    def refuse_damaged(self, sums: dict[str, int]) -> None:
        """Raise ValueError for every file whose check sum is not what ema.json says."""
        for source in self._sources:
            for name, said in (source.listed or {}).items():
                path = source.folder / name
                crc = crc32.check_sum(said["size"], [sums[str(path)]])
                if crc != said["crc32"]:
                    raise ValueError(
                        f"{path} is damaged: its CRC-32 is {crc}, {manifest.META} says {said['crc32']}."
                    )

    def fill(self, ranks: Ranks) -> list[dict[str, Tensor]]:
        """Write the shadows. Returns the own buffers of each average. *Collective*: if it raises then on all ranks, and the
        shadows hold a mixture."""
        own: list[dict[str, Tensor]] = []
        work = list(zip(self._sources, self._chosen, strict=True))
        ranks.run_on_all("load", lambda: own.extend(_fill(*each) for each in work))
        return own


@contextmanager
def open_checkpoint(
    ranks: Ranks,
    path: str | os.PathLike[str],
    readers: Sequence[LoadTarget],
    *,
    strict: bool,
    verify: bool,
) -> Iterator[OpenCheckpoint]:
    """Check a saved form against the averages that are to be filled, and change nothing. *Collective*.

    *Cost*: headers on every rank; with verify each rank reads its part of every file.
    """
    place = _Location(*ranks.run_on_first("load", lambda: _place(Path(path))))
    with ExitStack() as stack:
        found = OpenCheckpoint(place, readers)
        stack.callback(found.close)
        _, (files, options) = ranks.run_on_all(
            "load", lambda: (found.open(), [strict, verify]), combine=_alike
        )
        if not options:
            raise ValueError("ema.load(): strict and verify must be alike on all ranks.")
        if not files:
            raise ValueError(
                f"the ranks see different files in {place.folder}. Is it on a file system that all of them share?"
            )
        found.judge(strict)
        if verify and place.listed:
            _, sums = ranks.run_on_all(
                "load", lambda: found.contributions(ranks), combine=_together
            )
            found.refuse_damaged(sums)
        yield found


def _alike(said: list[Any]) -> list[bool]:
    """For each of several facts."""
    return [all(each == facts[0] for each in facts) for facts in zip(*said, strict=True)]


def _together(said: list[dict[str, int]]) -> dict[str, int]:
    """Contributions to a check sum add up by exclusive or."""
    sums = dict.fromkeys(said[0], 0)
    for each in said:
        for name, contribution in each.items():
            sums[name] ^= contribution
    return sums


def _refuse_unlisted(
    folder: Path, files: dict[str, safetensors.SafetensorsFile], listed: dict[str, Any]
) -> None:
    """The files of the model are those that were summed, and as long."""
    odd = sorted(files.keys() ^ listed.keys())
    if odd:
        raise ValueError(
            f"{folder} is damaged: {manifest.META} and the model's files disagree on {', '.join(odd[:3])}."
        )
    for name, file in files.items():
        if file.size != listed[name]["size"]:
            raise ValueError(
                f"{folder / name} is damaged: it holds {file.size} bytes, {manifest.META} says {listed[name]['size']}."
            )


def _with_aliases(where: Path, table: dict[str, Any], aliases: Aliases) -> dict[str, Any]:
    table = dict(table)
    for name, others in aliases.items():
        for other in others if name in table else ():
            if other in table:
                raise ValueError(
                    f"{where} is damaged: {other} is listed as another name of {name}, and is a weight itself."
                )
            table[other] = table[name]
    return table


def _compare(
    source: _ReadPlan, table: dict[str, _Weight]
) -> tuple[dict[str, _Weight], _Differences]:
    """The weights under the model's names, and every difference."""
    chosen, report = {}, _Differences()
    known = {name for slot in source.slots for name in (slot.name, *slot.shard.aliases)}
    report.unexpected += sorted(name for name in table if name not in known)
    asked = {slot.name for slot in source.asked}
    for slot in source.slots:
        held = list(
            dict.fromkeys(table[name] for name in (slot.name, *slot.shard.aliases) if name in table)
        )
        if slot.name not in asked and (slot.teacher_copy is None or not held):
            continue  # what a teacher holds beside the average is taken where it is
        if not held:
            report.missing.append(slot.name)
        elif slot.is_copied_buffer and slot.name not in source.own_buffers:
            continue  # the live model's counts, in whatever shape it has
        elif held[0].entry.shape != slot.shard.shape:
            report.reshaped.append(
                f"{slot.name}: {held[0].entry.shape} on disk, {slot.shard.shape} in the model"
            )
        elif not _converts(held[0].dtype, slot.average.dtype):
            report.of_another_kind.append(
                f"{slot.name}: {held[0].dtype} on disk, {slot.average.dtype} in the model"
            )
        else:
            _refuse_untied(slot, held)
            chosen[slot.name] = held[0]
    return chosen, report


def _converts(there: torch.dtype, here: torch.dtype) -> bool:
    """Only what floats may become something that floats, and complex numbers stay complex; other weights are not read."""
    if there.is_complex or here.is_complex:
        return there.is_complex and here.is_complex
    return there.is_floating_point or not here.is_floating_point


def _refuse_untied(slot: ParamState, held: Sequence[_Weight]) -> None:
    """One weight here, several in the file: they must be the same, or reading one would lose the others."""
    first, *others = held
    for other in others:
        pairs = zip(
            _blocks(slot, slot.averaged_region, first),
            _blocks(slot, slot.averaged_region, other),
            strict=True,
        )
        same = first.entry.shape == other.entry.shape and first.dtype == other.dtype
        if not same or not all(
            torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
            for a, b in pairs
        ):
            raise ValueError(
                f"{first.name} and {other.name} are one weight in the model, and differ in {first.file.path.parent}."
            )


def _blocks(slot: ParamState, region: Region, weight: _Weight) -> Iterator[Tensor]:
    for box, _ in boxes_with_data(slot.shard, region, slot.local_view(region)):
        yield from (data for _, data in weight.file.read(weight.name, box))


def _fill(source: _ReadPlan, chosen: dict[str, _Weight]) -> dict[str, Tensor]:
    own = {}
    for slot in source.slots:
        weight = chosen.get(slot.name)
        if slot.shadow is not None:
            slot.shadow.copy_(slot.live) if weight is None else _read(
                slot, slot.averaged_region, slot.shadow, weight
            )
        if slot.teacher_copy is not None and weight is not None:
            _read(slot, slot.shard.local_region, slot.teacher_copy, weight)
        if slot.name in source.own_buffers and weight is not None:
            own[slot.name] = slot.local.clone()
            _read(slot, slot.shard.local_region, own[slot.name], weight)
    return own


def _read(slot: ParamState, region: Region, data: Tensor, weight: _Weight) -> None:
    """Fill `data` [region.numel] with the region's elements, in its dtype."""
    for box, view in boxes_with_data(slot.shard, region, data):
        for block, values in weight.file.read(weight.name, box):
            view[block.within(box)].copy_(values)


# --- full weights ------------------------------------------------------------------------------------------------


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The complete state_dict of a saved average or any safetensors model: a folder, or one .safetensors file.

    Every alias is back, so `model.load_state_dict(load_file(path), strict=True)` passes. Headers, sizes and the index are
    checked, sums are not (`dist-ema verify`). *Aliases*: pages of the file, copied when written to.
    """
    place = _place(Path(path))
    folder, where = Path(place.folder), Path(place.folder, place.model)
    index = None if where.suffix == ".safetensors" else safetensors.read_index(folder, place.model)
    files = {
        name: safetensors.read_header(folder / name)
        for name in sorted(set(index.values() if index else [place.model]))
    }
    if index is not None:
        safetensors.refuse_other_index(where, index, files)
    if place.meta:
        _refuse_unlisted(folder, files, place.listed)
    weights = {
        name: tensor for file in files for name, tensor in _mapped(folder / file, files[file])
    }
    return _with_aliases(where, weights, place.aliases)


def _mapped(path: Path, file: safetensors.SafetensorsFile) -> Iterable[tuple[str, Tensor]]:
    """Every weight of the file as pages of it."""
    pages = np.memmap(path, np.uint8, "c")
    if len(pages) != file.size:
        raise ValueError(f"{path} became shorter while it was read.")
    for name, entry in file.entries.items():
        start, dtype = len(file.head) + entry.begin, DTYPES[entry.dtype]
        raw = torch.from_numpy(pages[start : start + entry.nbytes])
        # NOTE: files of other writers may be packed at any byte; views of a wider dtype need alignment.
        raw = raw if start % dtype.itemsize == 0 else raw.clone()
        yield (
            name,
            raw.view(dtype).view(entry.shape)
            if entry.nbytes
            else torch.empty(entry.shape, dtype=dtype),
        )
