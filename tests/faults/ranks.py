"""The walk on two ranks, of which one meets the fault: an error is an error on both."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests._ranks import run_ranks
from tests._wrappers import wrap

from . import shim
from .shim import Fault
from .verbs import Case, rank_cases
from .walk import Finding, Walk, call, held

__all__ = ["walk_on_ranks"]

WORLD = 2
ERRORS = [kind for kind in shim.KINDS if kind.code != -1]


def walk_on_ranks(folder: Path, stride: int) -> list[Walk]:
    """Fail the operations of each rank in each verb; see `walk.walk`."""
    walks: list[Walk] = run_ranks(WORLD, _rank, str(folder), stride, timeout=3600)[0]
    return walks


def _rank(folder: str, stride: int) -> list[Walk]:
    warnings.simplefilter("ignore")
    logging.disable()
    cases = rank_cases(lambda model: wrap("ddp", model))
    return [_walk(case, Path(folder) / case.name, stride) for case in cases]


def _walk(case: Case, folder: Path, stride: int) -> Walk:
    bench = _Bench(case, folder)
    operations = bench.record()
    found = Walk(f"2 ranks: {case.name}", sum(map(len, operations)))
    places = [
        (victim, at, kind)
        for victim, recorded in enumerate(operations)
        for at in range(1, len(recorded) + 1)
        for kind in ERRORS
    ][::stride]
    for found.faults, (victim, at, kind) in enumerate(places, 1):
        operation = f"rank {victim}, {at} ({operations[victim][at - 1]})"
        for what, text in bench.strike(victim, at, kind):
            found.findings.append(Finding(what, kind.name, operation, text))
    return found


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


class _Bench:
    """One rank's side. The first rank prepares the folder and reads it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._rank = case, dist.get_rank()
        self._root, self._before = folder / "root", folder / "before"
        self._log = folder / f"log-{self._rank}"
        self._before.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        for version in case.before:
            case.write(self._before, version)

    def put_back(self) -> None:
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._root, ignore_errors=True)
            shutil.copytree(self._before, self._root)
        dist.barrier()

    def record(self) -> list[list[str]]:
        """What every rank does in a write that meets no fault."""
        for _ in range(2):
            self.put_back()
            shim.arm(self._root, log=self._log)
            self._case.write(self._root, self._case.target)
            shim.disarm()
        return gathered([str(operation) for operation in shim.read_log(self._log)])

    def strike(self, victim: int, at: int, fault: Fault) -> Iterator[tuple[str, str]]:
        """(kind of finding, what was seen) of one fault on one rank, on all ranks."""
        case = self._case
        self.put_back()
        before = held()
        if self._rank == victim:
            shim.arm(self._root, at, fault)
        outcomes = gathered(call(lambda: case.write(self._root, case.target)))
        shim.disarm()
        leaks = gathered(sorted(held() - before))
        kinds = {kind for kind, _ in outcomes}
        yield from (("crash", text) for kind, text in outcomes if kind == "crash")
        if len(kinds) > 1:
            yield "uneven", str(outcomes)
        if "raised" in kinds and any(str(self._root) not in text for _, text in outcomes):
            yield "nameless", str(outcomes)
        if any(leaks):
            yield "leak", str(leaks)
        allowed = {case.target} if kinds == {"returned"} else {case.last, case.target}
        yield from self._look("lost", allowed)
        outcomes = gathered(call(lambda: case.write(self._root, case.following)))
        if {kind for kind, _ in outcomes} != {"returned"}:
            yield "stuck", str(outcomes)
        yield from self._look("stuck", {case.following})
        if left := [each.name for each in self._root.rglob(".*")]:
            yield "left", ", ".join(left)

    def _look(self, what: str, allowed: set[int | None]) -> Iterator[tuple[str, str]]:
        text = ""
        if self._rank == 0:
            text = self._problem(allowed)
        if text := gathered(text)[0]:
            yield what, text

    def _problem(self, allowed: set[int | None]) -> str:
        try:
            version = self._case.newest(self._root)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "" if version in allowed else f"found version {version}"
