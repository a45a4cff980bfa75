"""`Manifest`: the one schema of ema.json, every problem in it, and reading it. No torch.

`load`, `verify` and `inspect` list the same problems, because all of them call `Manifest.problems`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from ..averaging.clock import Clock
from ..schedules import from_dict
from .manifest_forms import FORMS, OPTIONAL, OWN, SUMS, parse_averages, parse_files
from .safetensors import SafetensorsFile, read_model
from .strict_json import dump, parse_json, read_json

__all__ = [
    "FORMAT",
    "META",
    "Manifest",
    "folder_is_meant",
    "group_aliases",
    "read",
    "read_files",
    "refuse_damaged",
]

FORMAT = 1
META = "ema.json"

Files = Mapping[str, SafetensorsFile]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ema.json. Every field has its type; `damage` lists values of another type.

    kind: 'ema', an average to resume from, or 'export', a model to ship.
    weights: 'all' of the model's, only those that are 'averaged', or an 'adapter' in peft's form,
        with peft's names.
    clock: the counters of `Clock`, and how many updates were accepted; {} where they are not known.
    attach: the arguments of `EMA.attach`, or None.
    rounding: the seed of stochastic rounding, or None.
    schedules: the schedules of every average, the first one first.
    averages: label -> own buffers, of the averages beside the first, in the order of `schedules`.
    averaged: the names of the averaged weights.
    own_buffers: the own buffers of the first average.
    aliases: name in the files -> further names of the same weight.
    dtypes: name -> the dtype that the model has, as torch calls it.
    source: what an offline export was made of.
    files: name -> size and check sums; averages/LABEL/... of a further average.
    other: keys that this version does not know.
    is_changed: since it was written, by its own check sum.
    """

    kind: str = "unknown"
    weights: str = "all"
    clock: dict[str, Any] = field(default_factory=dict)
    attach: dict[str, Any] | None = None
    rounding: dict[str, Any] | None = None
    schedules: list[dict[str, Any]] = field(default_factory=list)
    averages: dict[str, list[str]] = field(default_factory=dict)
    averaged: list[str] = field(default_factory=list)
    own_buffers: list[str] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    is_changed: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Take every value that is sound. Raises ValueError for a format that cannot be read."""
        version = values.get("format")
        if type(version) is not int or version < 1:
            raise ValueError(f"names no format, found {brief(version)}.")
        if version > FORMAT:
            raise ValueError(
                f"holds format {brief(version)}; this dist_ema reads up to {FORMAT}. "
                "Upgrade dist_ema."
            )
        sound_fields: dict[str, Any] = {}
        damage: list[str] = []
        for key, (form, is_sound) in FORMS.items():
            if key in values and is_sound(values[key]):
                sound_fields[key] = values[key]
            elif key in values:
                damage.append(f"{key}: it must be {form}, found {brief(values[key])}")
            elif key not in OPTIONAL:
                damage.append(f"{key}: it is missing")
        for key, parse in (("averages", parse_averages), ("files", parse_files)):
            if key in sound_fields:
                sound_fields[key], problems = parse(sound_fields[key])
                damage += problems
        other = {
            key: value for key, value in values.items() if key not in {*FORMS, "format", "crc32"}
        }
        return cls(**sound_fields, other=other, damage=tuple(damage))

    def to_json(self) -> dict[str, Any]:
        """The values as `from_json` takes them, without the sum that `to_bytes` adds."""
        values = {key: getattr(self, key) for key in FORMS}
        values["averages"] = {label: {OWN: own} for label, own in self.averages.items()}
        if self.source is None:
            del values["source"]
        return self.other | {"format": FORMAT} | values

    def to_bytes(self) -> bytes:
        """The file. Raises ValueError for what JSON cannot hold."""
        try:
            # As it will be read: JSON makes texts of keys, and `dump` sorts those.
            values: dict[str, Any] = parse_json(dump(self.to_json()))
        except (RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{META} cannot hold {brief(self.extra)}: {error}.") from None
        return dump(values | {"crc32": _sum_of(values)})

    @property
    def labels(self) -> list[str]:
        """The labels of all averages; '' is the first one, which lies in the folder itself."""
        return ["", *self.averages]

    def own_buffers_of(self, label: str) -> list[str]:
        """The buffers that this average has for itself, because they were recalibrated."""
        return self.averages.get(label, []) if label else self.own_buffers

    def files_of(self, label: str) -> dict[str, dict[str, Any]]:
        """The files of one average: bare name -> size and check sums."""
        folder = f"averages/{label}" if label else ""
        return {
            os.path.basename(name): entry
            for name, entry in self.files.items()
            if os.path.dirname(name) == folder
        }

    def sums_of(self, name: str) -> dict[str, str]:
        """The check sums of a file, by kind."""
        entry = self.files.get(name, {})
        return {kind: entry[kind] for kind in SUMS if kind in entry}

    # --- what is wrong ---------------------------------------------------------------------------

    def problems(self, files: Files | None = None) -> list[str]:
        """Everything that is wrong, a clause each, as 'KEY: what'.

        Args:
            files: the headers of all files by name, as `read_files` gives them, to compare with.
        """
        problems = [*self.damage, *self._of_clock(), *self._of_schedules(), *self._of_aliases()]
        if self.is_changed:
            problems.append(f"crc32: {META} was changed since dist_ema wrote it")
        if files is not None:
            problems += [*self._of_files(files), *self._of_names(files)]
        return problems

    def _is_damaged(self, *keys: str) -> bool:
        return any(problem.startswith(f"{key}: ") for problem in self.damage for key in keys)

    def _of_clock(self) -> Iterator[str]:
        if self._is_damaged("clock") or (self.kind == "export" and not self.clock):
            return
        try:
            Clock().set(self.clock)
        except ValueError as error:
            yield f"clock: {str(error).rstrip('.')}"
        accepted = self.clock.get("accepted")
        if type(accepted) is not int or not 0 <= accepted < 1 << 63:
            yield f"clock: accepted must be a whole number from 0, found {brief(accepted)}"

    def _of_schedules(self) -> Iterator[str]:
        for spec in self.schedules:
            try:
                from_dict(spec)
            except (TypeError, ValueError) as error:
                yield (
                    f"schedules: a schedule cannot be rebuilt from {brief(spec)}: "
                    f"{str(error).rstrip('.')}"
                )
        # An export of weights from elsewhere has no schedule to name.
        untold = self.kind == "export" and not self.schedules
        count = len(self.labels)
        if len(self.schedules) != count and not untold and not self._is_damaged("schedules"):
            yield f"schedules: it names {len(self.schedules)} schedules for {count} averages"

    def _of_aliases(self) -> Iterator[str]:
        seen: dict[str, str] = {}
        for name, others in self.aliases.items():
            for other in others:
                if seen.setdefault(other, name) != name:
                    yield f"aliases: {other} is listed as another name of {seen[other]} and {name}"

    def _of_files(self, files: Files) -> Iterator[str]:
        if self._is_damaged("files") and not self.files:
            return
        for name, entry in self.files.items():
            if name not in files:
                yield f"files: {name} is listed, but is no part of the model"
            elif "size" in entry and entry["size"] != files[name].size:
                yield (
                    f"files: {name}: it holds {files[name].size} bytes, {META} says "
                    f"{brief(entry['size'])}"
                )
        yield from (f"files: {name} is not listed" for name in files if name not in self.files)

    def _of_names(self, files: Files) -> Iterator[str]:
        """Names that no weight in the files has, and weights that no name explains."""
        held = {label: _weights_of(label, files) for label in self.labels}
        first = held[""]
        for key in ("averaged", "own_buffers", "aliases", "dtypes"):
            yield from _lost(f"{key}: it", getattr(self, key), first)
        for name, others in self.aliases.items():
            for other in first.intersection(others):
                yield (
                    f"aliases: {other} is listed as another name of {name}, and is a weight itself"
                )
        averaged = set(self.averaged)
        for label, own in self.averages.items():
            if not held[label]:
                yield f"averages: averages/{label} holds no files"
            yield from _lost(f"averages: own_buffers of {label}", own, held[label])
            if self.weights == "all":
                yield from _lost(f"averages: {label}", held[label], first)
        unclear = self._is_damaged("averaged", "own_buffers", "averages")
        for label in filter(held.get, self.labels) if not unclear else ():
            extra = sorted(held[label] - averaged - set(self.own_buffers_of(label)))
            if extra and (label or self.weights == "averaged"):
                where = label or "the folder"
                yield f"averaged: it lacks {', '.join(extra[:3])}, which {where} holds"
            if label and averaged - held[label]:
                lacking = ", ".join(sorted(averaged - held[label])[:3])
                yield f"averages: {label} lacks {lacking}, which is averaged"


def _weights_of(label: str, files: Files) -> set[str]:
    folder = f"averages/{label}" if label else ""
    inside = (file for name, file in files.items() if os.path.dirname(name) == folder)
    return {weight for file in inside for weight in file.entries}


def _lost(what: str, names: Iterable[str], weights: set[str]) -> Iterator[str]:
    lost = sorted(set(names) - weights)
    if lost:
        yield f"{what} names {', '.join(lost[:3])}, which the files do not hold"


def _sum_of(values: Mapping[str, Any]) -> str:
    """The CRC-32 of all values but itself, however the JSON is laid out."""
    json = dump({key: value for key, value in values.items() if key != "crc32"})
    return f"{zlib.crc32(json):08x}"


# --- in a folder ---------------------------------------------------------------------------------


def read(folder: Path) -> Manifest | None:
    """ema.json, or None if there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, or is of a later format.
    """
    where = folder / META
    if not os.path.lexists(where):
        return None
    try:
        values = read_json(where)
    except OSError as error:
        raise type(error)(f"{where} cannot be read: {error.strerror}.") from None
    try:
        saved = Manifest.from_json(values)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    try:
        return replace(saved, is_changed=values.get("crc32") != _sum_of(values))
    except RecursionError:  # from Python 3.12 on, JSON is read deeper than it is written
        raise ValueError(f"{where} is nested too deeply.") from None


def read_files(folder: Path, found: Manifest | None) -> dict[str, SafetensorsFile]:
    """The headers of all averages in a folder, by the names that ema.json has for the files.

    Raises:
        ValueError: the files of an average are no model.
    """
    files: dict[str, SafetensorsFile] = {}
    for label in found.labels if found else [""]:
        inside = f"averages/{label}/" if label else ""
        if label and not (folder / inside).is_dir():
            continue  # which `Manifest.problems` names
        try:
            model = read_model(folder / inside)
        except OSError as error:
            where = error.filename or folder / inside
            raise ValueError(f"{where} cannot be read: {error.strerror}.") from None
        files |= {f"{inside}{name}": file for name, file in model.items()}
    return files


def refuse_damaged(folder: Path, found: Manifest, files: Files | None = None) -> None:
    """Raise ValueError with every problem of ema.json; of the files too, if they are given."""
    problems = found.problems(files)
    if problems:
        raise ValueError(
            f"{folder / META} is damaged: {'; '.join(problems)}. Move it away to start from the "
            "weights alone, without clock and schedule."
        )


def folder_is_meant(path: Path) -> ValueError:
    """The error where ema.json or an index is named in place of its folder."""
    return ValueError(f"{path} tells what a folder holds: name the folder, {path.parent}.")


def group_aliases(aliases: Mapping[str, str]) -> dict[str, list[str]]:
    """name -> its further names, in their order, from further name -> name."""
    lists: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        lists.setdefault(name, []).append(alias)
    return lists
