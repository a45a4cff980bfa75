"""Whether files still are what was written: structure, ema.json, check sums, finite values. No torch.

*Cost*: one pass over the bytes, a window of 16 MB at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import atomic, manifest, safetensors
from ..dtypes import FLOATS, Bytes, finite, widen
from ..text import Bar, Tick, sentence, silent
from .report import ModelReport, native, report_on
from .sources import WINDOW, find, open_model, read_at, windows

__all__ = ["SUMS", "Verdict", "verify"]

SUMS = {"crc32": "CRC-32", "sha256": "SHA-256"}


@dataclass
class Verdict:
    """What was found at a path. sums: the kinds of check sums that were compared, so [] where there were none."""

    path: str
    kind: str = "unknown"
    weights: int = 0
    bytes: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # as in ema.json
    sums: list[str] = field(default_factory=list)
    not_finite: dict[str, dict[str, int]] = field(default_factory=dict)  # weight -> {nan, inf}
    sealed: bool = False
    unsealed: str = ""  # why it was not, though it is sound and was asked for
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems


def verify(path: str | Path, *, seal: bool = False, bar: Bar = silent) -> Verdict:
    """Read everything at `path` and list all that is wrong with it.

    seal: add SHA-256 to ema.json, atomically, if nothing is; `Verdict.unsealed` says why it cannot be. Raises
    FileNotFoundError if nothing is there.
    """
    verdict = Verdict(str(path))
    try:
        where = find(path)
        if native(where):
            _verify(where, verdict, seal, bar)
        else:
            _verify_other(where, verdict, seal, bar)
    except FileNotFoundError:
        if not Path(path).exists():
            raise
        verdict.problems.append(f"{path}: a file vanished while it was read.")
    except RecursionError:
        verdict.problems.append(f"{path}: {manifest.META} is nested too deeply.")
    except (OSError, ValueError) as error:
        verdict.problems.append(sentence(error))
    return verdict


def _verify(path: Path, verdict: Verdict, seal: bool, bar: Bar) -> None:
    try:
        report = report_on(path)
    except ValueError as error:
        verdict.problems.append(str(error))
        verdict.problems.extend(text for text in _broken(path) if text != str(error))
        return
    folder = path if path.is_dir() else path.parent
    verdict.kind, sums = report.kind, _sums_of(path, report)
    verdict.weights = sum(len(file.entries) for file in report.files.values())
    verdict.problems.extend(
        f"{path / manifest.META} is not sound: {problem}." for problem in report.problems
    )
    if not report.problems:
        verdict.problems.extend(_strays(path, report))
    verdict.bytes = sum(file.size for file in report.files.values())
    with bar(verdict.bytes) as tick:
        for name, file in report.files.items():
            _verify_file(folder / name, name, file, sums[name], seal, verdict, tick)
    verdict.sums = sorted({kind for recorded in sums.values() for kind in recorded})
    if seal:
        _seal(path, report, verdict)


def _sums_of(path: Path, report: ModelReport) -> dict[str, dict[str, str]]:
    """The sums of each file in ema.json. One file may have them in the ema.json that lies beside it."""
    beside = manifest.read(path.parent) if path.is_file() else None
    return {name: (beside or report.manifest).sums_of(name) for name in report.files}


def _broken(path: Path) -> Iterator[str]:
    """What is wrong with each file of a folder by itself."""
    if not path.is_dir():
        return
    for each in sorted([*path.glob("*.safetensors"), *path.glob("averages/*/*.safetensors")]):
        try:
            safetensors.read_header(each)
        except (OSError, ValueError) as error:
            yield sentence(error)


def _strays(path: Path, report: ModelReport) -> Iterator[str]:
    """Files that another loader would take for the model, or for a part of it."""
    if not path.is_dir():
        return
    for each in sorted([*path.glob("*.safetensors"), *path.glob("averages/*/*.safetensors")]):
        name = each.relative_to(path).as_posix()
        if safetensors.is_model_name(each.name) and name not in report.files:
            yield f"{each} is no part of the model, but some loaders would take it for one. Move it away."
    for average in report.averages if report.has_manifest else ():
        inside = path / "averages" / average.label if average.label else path
        index = safetensors.find_model(inside)
        files = {Path(name).name: file for name, file in average.files.items()}
        if index not in files and (inside / index).read_bytes() != safetensors.index(files):
            yield f"{inside / index} is not what dist_ema wrote."


def _verify_file(
    path: Path,
    name: str,
    file: safetensors.SafetensorsFile,
    recorded: dict[str, str],
    seal: bool,
    verdict: Verdict,
    tick: Tick,
) -> None:
    """One pass over one file: its sums against those `recorded`, its weights' values."""
    crc, sha = (
        zlib.crc32(file.head),
        hashlib.sha256(file.head) if seal or "sha256" in recorded else None,
    )
    tick(len(file.head))
    fd = os.open(path, os.O_RDONLY)
    try:
        for weight, entry in sorted(
            file.entries.items(), key=lambda item: (item[1].begin, item[1].end)
        ):
            count = _Count(entry.dtype)
            for raw in _of_weight(fd, path, len(file.head), entry):
                crc = zlib.crc32(raw.data, crc)
                if sha is not None:
                    sha.update(raw.data)
                count.add(raw)
                tick(len(raw))
            count.into(
                verdict, weight if "/" not in name else f"{Path(name).parent.as_posix()}: {weight}"
            )
    finally:
        os.close(fd)
    found = {"crc32": f"{crc:08x}"} | ({"sha256": sha.hexdigest()} if sha is not None else {})
    verdict.files[name] = {"size": file.size} | found
    verdict.problems.extend(
        f"{path} is damaged: its {SUMS[kind]} is {found[kind]}, {manifest.META} says {value}."
        for kind, value in recorded.items()
        if found[kind] != value
    )


def _of_weight(fd: int, path: Path, base: int, entry: safetensors.Entry) -> Iterator[Bytes]:
    for begin in range(entry.begin, entry.end, WINDOW):
        yield read_at(fd, path, base + begin, base + min(begin + WINDOW, entry.end))


class _Count:
    """NaN and infinite values of one weight."""

    def __init__(self, dtype: str) -> None:
        self._dtype, self.nan, self.inf = dtype, 0, 0

    def add(self, raw: Bytes) -> None:
        if self._dtype not in (*FLOATS, "C64"):
            return
        if finite(raw, self._dtype) == len(raw) // safetensors.ITEMSIZE[self._dtype]:
            return
        values = widen(raw, "F32" if self._dtype == "C64" else self._dtype)
        self.nan += int(np.isnan(values).sum())
        self.inf += int(np.isinf(values).sum())

    def into(self, verdict: Verdict, weight: str) -> None:
        if self.nan or self.inf:
            verdict.not_finite[weight] = {"nan": self.nan, "inf": self.inf}
            verdict.problems.append(
                f"{verdict.path}: {weight} holds {self.nan:,} NaN and {self.inf:,} infinite values."
            )


def _seal(path: Path, report: ModelReport, verdict: Verdict) -> None:
    """Put the SHA-256 of every file into ema.json."""
    if verdict.problems:
        return
    if not report.manifest.files:
        verdict.unsealed = (
            f"{path} has no {manifest.META} to seal: export it first, or keep the sums yourself."
        )
        return
    where, found = path / manifest.META, manifest.read(path)
    if found != report.manifest:
        raise ValueError(f"{path} was written anew while it was read. Run verify again.")
    sealed = {
        name: entry | {"sha256": verdict.files[name]["sha256"]}
        for name, entry in report.manifest.files.items()
    }
    try:
        _replace(where, replace(report.manifest, files=sealed).to_bytes())
    except OSError as error:
        verdict.unsealed = (
            f"{path} could not be sealed: {error.filename or where}: {error.strerror}."
        )
        return
    verdict.sealed = True


def _replace(where: Path, content: bytes) -> None:
    atomic.remove_leftovers(where)
    new = atomic.temporary_sibling(where)
    try:
        new.write_bytes(content)
        atomic.sync(new)
        atomic.publish(new, where)
    finally:
        with contextlib.suppress(OSError):  # it says what the first error says
            new.unlink()


def _verify_other(path: Path, verdict: Verdict, seal: bool, bar: Bar) -> None:
    """Not safetensors: nothing was summed, so values are all that can be looked at."""
    with open_model(path) as model:
        verdict.kind, verdict.weights = "other", len(model.entries)
        verdict.bytes = sum(entry.nbytes for entry in model.entries.values())
        with bar(verdict.bytes) as tick:
            for name, entry in model.entries.items():
                count = _Count(entry.dtype)
                for raw in windows(model, name):
                    count.add(raw)
                    tick(len(raw))
                count.into(verdict, name)
    if seal and verdict.sound:
        verdict.unsealed = f"{path} has no {manifest.META} to seal: export it first."
