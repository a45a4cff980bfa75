"""The saved form, read by ranks: only the slices that each one keeps, and nothing before everything is checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import commit, format
from .clock import Clock
from .layout import DTYPES, Slot, pieces
from .ranks import Ranks
from .schedule import from_spec

__all__ = ["File", "Reader", "Weight", "load", "load_file", "open_model"]

WINDOW = 16 << 20  # bytes read at a time for check sums


class File:
    """One safetensors file, mapped. *Aliases*: tensors read from it are pages of the file."""

    def __init__(self, path: Path) -> None:
        self._file = format.read_header(path)
        self.entries, self.metadata = self._file.entries, self._file.metadata
        self._bytes = np.memmap(path, np.uint8, "c")

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        start = len(self._file.head) + entry.begin
        raw = torch.from_numpy(self._bytes[start : start + entry.nbytes])
        dtype = DTYPES[entry.dtype]
        # NOTE: files of other writers may be packed at any byte; views of a wider dtype need alignment.
        raw = raw if start % dtype.itemsize == 0 else raw.clone()
        return raw.view(dtype).view(entry.shape) if entry.nbytes else torch.empty(entry.shape, dtype=dtype)


class Weight(NamedTuple):
    """A weight in an open file, under the name that the file has for it."""

    file: File
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def read(self) -> Tensor:
        return self.file[self.name]


def open_model(folder: Path, aliases: dict[str, list[str]]) -> dict[str, Weight]:
    """Every weight of a model folder, under its name and all aliases."""
    opened = [File(folder / name) for name in format.read_model(folder)]
    weights = {name: Weight(file, name) for file in opened for name in file.entries}
    for name, others in aliases.items():
        weights |= dict.fromkeys(others, weights[name]) if name in weights else {}
    return weights


def load(
    ranks: Ranks, path: Path, readers: Sequence[Reader], verify: bool
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Fill the shadows of each average. Returns ema.json and the own buffers of each. *Collective*.

    Everything is checked before the first shadow is written.
    """
    meta = ranks.decide("load", lambda: _read_meta(path))
    sources = _sources(path, meta, readers)
    files: list[dict[str, Weight]] = []
    ranks.attempt("load", lambda: files.extend(_matching(*each) for each in sources))
    then = set(meta.get("averaged", []))
    frozen = sorted(slot.name for slot in readers[0].slots if slot.shadow is not None and slot.name not in then)
    if frozen:
        warnings.warn(f"{path} holds live values of {', '.join(frozen[:5])}, which were frozen then.", stacklevel=5)
    if verify:
        _, found = ranks.attempt("load", lambda: _check(path, meta, ranks.rank, ranks.size))
        _verdict(path, meta, found)
    own: list[dict[str, Tensor]] = []
    work = list(zip(files, sources, strict=False))
    ranks.attempt("load", lambda: own.extend(_fill(opened, source) for opened, source in work))
    return meta, own


class Reader(NamedTuple):
    """An average that is to be filled: the spec of its schedule, and all that the model persists."""

    spec: dict[str, Any]
    slots: list[Slot]


class _Source(NamedTuple):
    """Where one average is read from."""

    folder: Path
    slots: list[Slot]
    whole: bool  # the folder holds the complete model, not only what is averaged
    aliases: dict[str, list[str]]
    own_buffers: list[str]


def _sources(path: Path, meta: dict[str, Any], readers: Sequence[Reader]) -> list[_Source]:
    """For each average the saved one with its schedule, else the one at its place."""
    saved, labels = meta["schedules"], ["", *meta.get("averages", {})]
    if len(readers) > len(saved):
        raise ValueError(f"{path} holds {len(saved)} averages, this EMA has {len(readers)}.")
    sources = []
    for i, reader in enumerate(readers):
        k = saved.index(reader.spec) if reader.spec in saved else i
        if reader.spec != saved[k]:
            was, now = from_spec(saved[k]), from_spec(reader.spec)
            warnings.warn(f"{path} was averaged with {was!r}; this EMA goes on with {now!r}.", stacklevel=6)
        own = meta["averages"][labels[k]] if labels[k] else meta
        folder = path / "averages" / labels[k] if labels[k] else path
        whole = meta["weights"] == "all" and not labels[k]
        sources.append(_Source(folder, reader.slots, whole, meta.get("aliases", {}), own["own_buffers"]))
    return sources


def _read_meta(path: Path) -> dict[str, Any]:
    commit.recover(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder with an average saved by ema.save().")
    meta = format.read_meta(path)
    if meta.get("kind") != "ema":
        raise ValueError(
            f"{path} is an export, rounded and without a clock of its own: resume from what ema.save() wrote."
        )
    _refuse_unsound(path / format.META, meta)
    return meta


def _refuse_unsound(where: Path, meta: dict[str, Any]) -> None:
    """Try what resuming takes from ema.json, before anything changes: the file has no check sum of its own."""
    try:
        Clock().set(meta["clock"])
        for spec in meta["schedules"]:
            from_spec(spec)
        said_own = [meta["own_buffers"], *(each["own_buffers"] for each in meta["averages"].values())]
        said = [(meta["clock"]["accepted"], int), (meta["weights"], str), (meta["aliases"], dict)]
        said += [(own, list) for own in said_own]
        if len(meta["schedules"]) != len(said_own):
            raise ValueError(f"{len(meta['schedules'])} schedules for {len(said_own)} averages")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {type(error).__name__}: {error}") from None
    odd = [value for value, kind in said if not isinstance(value, kind)]
    if odd:
        raise ValueError(f"{where} is damaged: {odd[0]!r} stands where something else must.")


def _matching(
    folder: Path, slots: list[Slot], whole: bool, aliases: dict[str, list[str]], own: list[str]
) -> dict[str, Weight]:
    """The weights under the model's names. Raises ValueError with every difference."""
    files = open_model(folder, aliases)
    asked = {slot.name: slot for slot in slots if whole or slot.shadow is not None or slot.name in own}
    known = set(asked) | {alias for slot in asked.values() for alias in slot.shard.aliases}
    said = [f"{name} is missing" for name in asked if name not in files]
    said += [f"{name} is not in the model" for name in sorted(files) if name not in known]
    for name, slot in asked.items():
        if name in files and files[name].shape != slot.shard.shape:
            said.append(f"{name}: {files[name].shape} on disk, {slot.shard.shape} in the model")
    if said:
        more = f", and {len(said) - 10} more" if len(said) > 10 else ""
        raise ValueError(f"{folder} and the model disagree on {len(said)} weights: {'; '.join(said[:10])}{more}.")
    return files


def _fill(files: dict[str, Weight], source: _Source) -> dict[str, Tensor]:
    own = {}
    for slot in source.slots:
        if slot.shadow is not None and slot.own.numel:
            full = files[slot.name].read()
            for box, view in pieces(slot.shard, slot.own, slot.shadow):
                view.copy_(full[box.slices])
        if slot.name in source.own_buffers:
            own[slot.name] = slot.local.clone()
            for box, view in pieces(slot.shard, slot.shard.held, own[slot.name]):
                view.copy_(files[slot.name].read()[box.slices])
    return own


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The complete state_dict of a saved average or an exported model: a folder, or one .safetensors file.

    Every alias is back, so `model.load_state_dict(load_file(path), strict=True)` passes. *Aliases*: pages of the file,
    copied when written to.
    """
    path = Path(path)
    commit.recover(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.is_dir():
        meta = format.read_meta(path) if (path / format.META).exists() else {}
        return {name: weight.read() for name, weight in open_model(path, meta.get("aliases", {})).items()}
    file = File(path)
    weights = {name: file[name] for name in file.entries}
    aliases = {alias: name for alias, name in file.metadata.items() if name in weights}
    if (path.parent / format.META).exists():
        for name, others in format.read_meta(path.parent).get("aliases", {}).items():
            aliases |= dict.fromkeys(others, name) if name in weights else {}
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def _check(folder: Path, meta: dict[str, Any], rank: int, size: int) -> dict[str, list[Any]]:
    """This rank's part of the check sums: {file: [size on disk, contribution]}. Combine with `_verdict`."""
    result = {}
    for name in meta["files"]:
        n = os.path.getsize(folder / name)
        begin, end = n * rank // size, n * (rank + 1) // size
        total = format.Sum(n)
        with open(folder / name, "rb") as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(WINDOW, end - begin))
                if not data:
                    raise ValueError(f"{folder / name} was cut short while it was read.")
                total.add(begin, data)
                begin += len(data)
        result[name] = [n, total.contribution]
    return result


def _verdict(folder: Path, meta: dict[str, Any], found: list[dict[str, list[Any]]]) -> None:
    """Raise ValueError for every file whose size or check sum is not what ema.json says."""
    for name, said in meta["files"].items():
        size = found[0][name][0]
        crc = format.check_sum(size, [part[name][1] for part in found])
        if (size, crc) != (said.get("size"), said.get("crc32")):
            raise ValueError(
                f"{folder / name} is damaged: {size} bytes with CRC-32 {crc}, "
                f"{format.META} says {said.get('size')} bytes with {said.get('crc32')}."
            )
