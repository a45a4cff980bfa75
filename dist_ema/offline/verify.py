"""`dist-ema verify`: files read to the last byte against their sums, NaN counted, ema.json sealed.

*Cost*: one pass over the bytes, a window of 4 MB at a time. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import atomic, disk, manifest, safetensors
from ..dtypes import FLOATS, Bytes, finite, view, widen
from ..text import Bar, Tick, sentence, silent
from . import sources, sums
from .report import ModelReport, report_on

__all__ = ["SUMS", "Verdict", "verify"]

SUMS = {"crc32": "CRC-32", "sha256": "SHA-256"}


@dataclass
class Verdict:
    """The findings at a path.

    sums: The kinds of check sums that were compared; [] where there were none.
    """

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

    Args:
        path: Whatever `sources.open_model` opens.
        seal: Add SHA-256 to ema.json, atomically, if nothing is wrong. `Verdict.unsealed` says why
            it could not be added.
        bar: Shows the progress.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    verdict = Verdict(str(path))
    try:
        _verify(sources.find(path), verdict, seal, bar)
    # The path itself is the caller's mistake, a file in it is a finding.
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
        verdict.problems += dict.fromkeys([str(error), *_broken(path)])
        return
    verdict.kind = report.kind
    verdict.problems.extend(
        f"{path / manifest.META} is not sound: {problem}." for problem in report.problems
    )
    # Where ema.json and the files disagree already, strays would repeat it.
    if not report.problems:
        verdict.problems.extend(_strays(path, report))
    totals = [average.total for average in report.averages]
    verdict.weights = sum(total.weights for total in totals)
    verdict.bytes = sum(file.size for file in report.files.values()) or totals[0].bytes
    with bar(verdict.bytes) as tick:
        if report.kind == "other":
            _verify_values(path, verdict, tick)
        else:
            _verify_files(path, report, verdict, seal, tick)
    if seal and verdict.sound:
        _seal(path, report, verdict)


def _verify_values(path: Path, verdict: Verdict, tick: Tick) -> None:
    """Look at the values of a model that is not safetensors, which has no sums."""
    with sources.open_model(path) as model:
        for name, entry in model.entries.items():
            not_finite = Counter[str]()
            for raw in sources.windows(model, name):
                not_finite += _count_not_finite(raw, entry.dtype)
                tick(len(raw))
            _note(verdict, name, not_finite)


def _verify_files(
    path: Path, report: ModelReport, verdict: Verdict, seal: bool, tick: Tick
) -> None:
    """Compare each file with its sums in ema.json; for one file, in the one that lies beside it."""
    beside = manifest.read(path.parent) if path.is_file() else None
    folder, kinds = path if path.is_dir() else path.parent, set[str]()
    for name, file in report.files.items():
        recorded = (beside or report.manifest).sums_of(name)
        kinds.update(recorded)
        _verify_file(folder / name, name, file, recorded, seal, verdict, tick)
    verdict.sums = sorted(kinds)


def _weight_files(path: Path) -> list[Path]:
    """Every .safetensors file where averages lie in a folder."""
    return sorted([*path.glob("*.safetensors"), *path.glob("averages/*/*.safetensors")])


def _broken(path: Path) -> Iterator[str]:
    """A sentence about each file of a folder that is unsound by itself."""
    for file in _weight_files(path):
        try:
            safetensors.read_header(file)
        except (OSError, ValueError) as error:
            yield sentence(error)


def _strays(path: Path, report: ModelReport) -> Iterator[str]:
    """Files that another loader would take for the model, or for a part of it."""
    for file in _weight_files(path):
        name = file.relative_to(path).as_posix()
        if safetensors.is_model_name(file.name) and name not in report.files:
            yield (
                f"{file} is no part of the model, but some loaders would take it for one. Move it "
                "away."
            )
    for average in report.averages if report.has_manifest else ():
        inside = path / "averages" / average.label if average.label else path
        index = safetensors.find_model(inside)
        files = {Path(name).name: file for name, file in average.files.items()}
        with disk.disk_errors(inside / index):
            # One file needs no index, and is found by its own name.
            written = index in files or (inside / index).read_bytes() == safetensors.index(files)
        if not written:
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
    # SHA-256 costs most of the time, so only where it is compared or kept.
    with (
        open(path, "rb") as handle,
        sums.FileSums(file.head, seal or "sha256" in recorded) as file_sums,
    ):
        tick(len(file.head))
        base = len(file.head)
        for weight in safetensors.in_order(file.entries):
            entry, not_finite = file.entries[weight], Counter[str]()
            for begin, end in sources.ranges(entry.begin, entry.end):
                raw = sources.read_at(handle.fileno(), path, base + begin, base + end)
                file_sums.add(sums.FileWindow(raw))
                not_finite += _count_not_finite(raw, entry.dtype)
                tick(len(raw))
            inside = name.rpartition("/")[0]
            _note(verdict, f"{inside}: {weight}" if inside else weight, not_finite)
        actual = file_sums.to_json()
    verdict.files[name] = {"size": file.size} | actual
    verdict.problems.extend(
        f"{path} is damaged: its {SUMS[kind]} is {actual[kind]}, {manifest.META} says {value}."
        for kind, value in recorded.items()
        if actual[kind] != value
    )


def _count_not_finite(raw: Bytes, dtype: str) -> Counter[str]:
    # Finite windows are the common case: the fast pass answers them.
    itemsize = safetensors.ITEMSIZE[dtype]
    if dtype not in (*FLOATS, "C64") or finite(raw, dtype) * itemsize == len(raw):
        return Counter()
    values = view(raw, dtype) if dtype == "C64" else widen(raw, dtype)
    nan = np.isnan(values)  # of a complex number, one part
    return Counter(nan=int(nan.sum()), inf=int((np.isinf(values) & ~nan).sum()))


def _note(verdict: Verdict, weight: str, not_finite: Counter[str]) -> None:
    if not_finite:
        nan, inf = not_finite["nan"], not_finite["inf"]
        verdict.not_finite[weight] = {"nan": nan, "inf": inf}
        verdict.problems.append(
            f"{verdict.path}: {weight} holds {nan:,} NaN and {inf:,} infinite values."
        )


def _seal(path: Path, report: ModelReport, verdict: Verdict) -> None:
    """Put the SHA-256 of every file into ema.json."""
    if not report.manifest.files:
        verdict.unsealed = (
            f"{path} has no {manifest.META} to seal: export it first, or keep the sums yourself."
        )
        return
    # A training may have saved again while the files were read.
    if manifest.read(path) != report.manifest:
        raise ValueError(f"{path} was written anew while it was read. Run verify again.")
    where = path / manifest.META
    sealed = {
        name: entry | {"sha256": verdict.files[name]["sha256"]}
        for name, entry in report.manifest.files.items()
    }
    try:
        atomic.replace_file(where, replace(report.manifest, files=sealed).to_bytes())
    except OSError as error:
        verdict.unsealed = f"{path} could not be sealed: {where}: {error.strerror}."
    else:
        verdict.sealed = True
