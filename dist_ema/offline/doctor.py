"""`dist-ema doctor`: packages, torch, launch, file system, and a self-test in other processes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoint import atomic
from ..text import size

__all__ = [
    "KNOWN",
    "NEEDED",
    "Check",
    "check_folder",
    "check_launch",
    "check_package",
    "check_torch",
    "examine",
    "self_test",
    "version_numbers",
]

# The oldest supported version; '' for packages that are only reported.
NEEDED = {"torch": "2.8", "numpy": "1.26", "ml_dtypes": "0.5", "rich": "13"}
KNOWN = {
    "accelerate": "1.2", "transformers": "4.46", "lightning": "2.4", "pytorch-lightning": "",
    "deepspeed": "", "diffusers": "", "triton": "", "numba": "0.61", "safetensors": "",
    "matplotlib": "3.8",
}  # fmt: skip
_NETWORK = ("nfs", "lustre", "gpfs", "ceph", "beegfs", "smb", "cifs", "fuse", "9p")
_WORLD = 2
_GRACE = 2.0  # seconds
_WORKER = (sys.executable, "-m", "dist_ema.offline.doctor_worker")


@dataclass(frozen=True)
class Check:
    """One line of the report. state: 'ok', 'note' (works, but know this), 'problem'."""

    what: str
    state: str
    text: str


def examine(folder: Path, *, timeout: float = 120.0, test: bool = True) -> Iterator[Check]:
    """Yield every check when it is done. folder: where averages are to be saved."""
    yield Check(
        "python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    for name, least in (NEEDED | KNOWN).items():
        if name in NEEDED or _version(name):
            yield check_package(name, least, name in NEEDED)
    facts = _ask(timeout)
    if isinstance(facts, Check):
        yield facts
    else:
        yield from (*check_torch(facts), *check_launch(facts, os.environ))
    yield from check_folder(folder)
    if test and not isinstance(facts, Check) and facts["gloo"]:
        yield self_test(timeout)


# --- packages -------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_package(name: str, least: str, needed: bool) -> Check:
    installed = _version(name)
    cure = f"pip install '{name}>={least}'"
    if installed is None:
        return Check(name, "problem", f"is not installed: {cure}")
    if least and version_numbers(installed) < version_numbers(least):
        state = "problem" if needed else "note"
        return Check(name, state, f"{installed} is older than {least}: {cure}")
    return Check(name, "ok", installed)


def version_numbers(text: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)"""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", text)[0])))


# --- torch ----------------------------------------------------------------------------------------


def _ask(timeout: float) -> dict[str, Any] | Check:
    """The facts about torch, from a process of its own: importing it can crash."""
    try:
        done = subprocess.run(
            [*_WORKER, "facts"],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Check("torch", "problem", f"did not answer within {timeout:g} s of being imported")
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts
    except (IndexError, ValueError):
        return Check(
            "torch",
            "problem",
            f"cannot be imported: {_last(done.stderr) or f'exit code {done.returncode}'}",
        )


def _environment() -> dict[str, str]:
    """The environment of a child, which must find this dist_ema."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def check_torch(facts: Mapping[str, Any]) -> Iterator[Check]:
    kind = facts["accelerator"]
    devices = ", ".join(sorted(set(facts["devices"])))
    builds = {"CUDA": facts["cuda"], "ROCm": facts["hip"]}
    built = next((f"{name} {version}" for name, version in builds.items() if version), "CPU only")
    if kind:
        yield Check(
            "accelerator", "ok", f"{len(facts['devices']) or ''} {kind} {devices} ({built})".strip()
        )
    elif any(builds.values()):
        yield Check(
            "accelerator",
            "note",
            f"none found, though torch is built for {built}: is the driver there?",
        )
    else:
        yield Check("accelerator", "ok", f"none ({built})")
    if not facts["gloo"]:
        yield Check(
            "backends",
            "problem",
            "torch is built without gloo: saving and check-in need it on the host",
        )
    elif kind == "cuda" and not facts["nccl"]:
        yield Check("backends", "note", "gloo, but no NCCL: ranks on several GPUs will be slow")
    else:
        yield Check("backends", "ok", "gloo, NCCL" if facts["nccl"] else "gloo")


def check_launch(facts: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Check]:
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in (
        "1", "true", "yes", "on", "y", "t",
    )  # fmt: skip
    if not facts["accelerator"] and _version("accelerate") and not on_cpu:
        yield Check(
            "accelerate",
            "note",
            "without a GPU `accelerate launch --cpu --num_processes 2` silently starts one "
            "process; two are `ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 script.py`, and "
            "without that variable they would be two unrelated runs",
        )


# --- the folder -----------------------------------------------------------------------------------


def check_folder(folder: Path) -> Iterator[Check]:
    """Try the folder out, inside a temporary one that is removed."""
    try:
        with tempfile.TemporaryDirectory(prefix=".dist-ema-doctor-", dir=folder) as inside:
            yield _free(folder)
            if atomic.exchanges(Path(inside)):
                yield Check("replacing", "ok", "two folders can be exchanged in one step")
            else:
                yield Check(
                    "replacing",
                    "note",
                    "no atomic exchange here: saving over an average takes two renames, which only "
                    "dist_ema can finish",
                )
            yield _reserve(Path(inside))
    except OSError as error:
        yield Check("folder", "problem", f"{folder} cannot be written to: {error.strerror}")


def _free(folder: Path) -> Check:
    free, kind = shutil.disk_usage(folder).free, _file_system(folder)
    text = f"{folder}: {kind or 'unknown file system'}, {size(free)} free"
    if kind.startswith(_NETWORK):
        return Check(
            "folder",
            "note",
            f"{text}; shared by hosts, so keep the default mode of saving (not mode='direct')",
        )
    if free < 1 << 30:
        return Check(
            "folder",
            "note",
            f"{text}; a new version is written beside the old one, so both must fit",
        )
    return Check("folder", "ok", text)


def _file_system(folder: Path) -> str:
    """The type of the file system; '' where it is unknown."""
    mount, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, its_kind, *_ = line.split()
            place = place.encode().decode("unicode_escape")
            # The longest mount point that leads to the folder is the one that holds it.
            if folder.resolve().is_relative_to(place) and len(place) >= len(mount):
                mount, kind = place, its_kind
    return kind


def _reserve(inside: Path) -> Check:
    if hasattr(os, "posix_fallocate"):
        with open(inside / "reserve", "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
            return Check("reserving", "ok", "space is reserved before anything is written")
    return Check(
        "reserving", "note", "space cannot be reserved here: a full disk is found while writing"
    )


# --- the self-test --------------------------------------------------------------------------------


def self_test(timeout: float) -> Check:
    """Two ranks over gloo that train, average, save and load.

    Names the rank and the step that failed or hung.
    """
    with tempfile.TemporaryDirectory(prefix="dist-ema-doctor-") as folder:
        until = time.monotonic() + timeout
        ranks = [_start(rank, Path(folder)) for rank in range(_WORLD)]
        try:
            codes = _wait(ranks, until)
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()  # so that none is left as a zombie
        failures = list(_failures(codes, Path(folder), timeout))
    if failures:
        return Check("self-test", "problem", "; ".join(failures))
    return Check("self-test", "ok", "2 ranks over gloo: FSDP2 and DDP, average, save and load")


def _start(rank: int, folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / f"rank-{rank}.txt", "wb") as errors:
        return subprocess.Popen(
            [*_WORKER, "rank", str(rank), str(_WORLD), str(folder)],
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], until: float) -> list[int | None]:
    """Exit codes; None for a rank that still runs.

    After a failure the others have a moment to report theirs.
    """
    while time.monotonic() < until:
        codes = [rank.poll() for rank in ranks]
        if None not in codes:
            return codes
        # The first error is often that of the rank which waited, not of the one to blame.
        if any(codes):
            until = min(until, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return [rank.poll() for rank in ranks]


def _failures(codes: list[int | None], folder: Path, timeout: float) -> Iterator[str]:
    """The ranks that failed; where none did, those that have not finished."""
    steps = {path.stem: path.read_text() for path in folder.glob("rank-*.step")}
    came_to = [steps.get(f"rank-{rank}", "start Python") for rank in range(_WORLD)]
    unfinished = [rank for rank in range(_WORLD) if came_to[rank] != "done"]
    failed = [rank for rank in unfinished if codes[rank]]
    for rank in failed:
        error = _last((folder / f"rank-{rank}.txt").read_text())
        yield f"rank {rank} at '{came_to[rank]}': {error or f'died with exit code {codes[rank]}'}"
    for rank in unfinished if not failed else ():
        yield f"rank {rank} was still at '{came_to[rank]}' after {timeout:g} s"
