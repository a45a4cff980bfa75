"""The walk on two ranks that write one version together, of which one meets the fault.

An error is an error on both. A rank that is killed is a copy of its process (a fork), so the two
ranks go on: with averages of their own, as after a restart, they write the next version.
"""

from __future__ import annotations

import gc
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_ema.distributed import waiting
from dist_ema.distributed.bounded_store import BoundedStore
from tests._ranks import run_ranks
from tests._wrappers import wrap

from . import shim
from .power import Loss, lose_power
from .shim import Fault, Operation
from .verbs import Case, rank_cases
from .walk import Finding, Walk, call, forked, held, report

__all__ = ["walk_on_ranks"]

WORLD = 2
ERRORS = [kind for kind in shim.KINDS if kind.code != -1]
KILL = next(kind for kind in shim.KINDS if kind.code == -1)
GRACE, TIMEOUT = 0.3, 1.0  # seconds in which a rank that outlives a kill gives up


def walk_on_ranks(
    folder: Path,
    stride: int,
    limit: int | None = None,
    only: str = "",
) -> list[tuple[Walk, Loss]]:
    """Fail the operations of each rank in each verb, and lose power. See `walk` and `lose_power`.

    A machine that loses power may be that of one rank: where the ranks are on machines of their
    own, an fsync reaches what its own rank wrote.

    Args:
        folder: An empty folder, by its real path.
        stride: Of the errors. Beyond 1 few operations meet a kill.
        limit: Of the states after a power loss.
        only: A part of the names of the verbs.
    """
    chosen = [i for i, case in enumerate(rank_cases(lambda model: model)) if only in name_of(case)]
    if not chosen:
        return []
    found = run_ranks(WORLD, _rank, str(folder), chosen, stride, timeout=7200, server=True)
    results = []
    for number, first, second in zip(chosen, *found, strict=True):
        case = rank_cases(lambda model: model)[number]
        operations = [
            replace(operation, rank=rank)
            for rank, (_, each) in enumerate((first, second))
            for operation in each
        ]
        operations.sort(key=lambda operation: operation.time)
        loss = lose_power(case, folder / case.name / "power", limit, operations=operations)
        report(f"{first[0].case}: {loss}")
        results.append((first[0], loss))
    return results


def name_of(case: Case) -> str:
    return f"2 ranks: {case.name}"


def _rank(folder: str, chosen: list[int], stride: int) -> list[tuple[Walk, list[Operation]]]:
    warnings.simplefilter("ignore")
    logging.disable()
    results = []
    for number in chosen:
        results.append(_walk(number, Path(folder), stride))
        if dist.get_rank() == 0:
            report(str(results[-1][0]))
    return results


def _cases() -> list[Case]:
    return rank_cases(lambda model: wrap("ddp", model))


def _walk(number: int, folder: Path, stride: int) -> tuple[Walk, list[Operation]]:
    bench = _Bench(number, folder)
    recorded = bench.record()
    operations = gathered([str(operation) for operation in recorded])
    found = Walk(name_of(bench.case), sum(map(len, operations)))
    places = [(rank, at) for rank, each in enumerate(operations) for at in range(1, len(each) + 1)]
    errors = [(place, kind) for place in places for kind in ERRORS][::stride]
    kills = [(place, KILL) for place in places]
    if stride > 1:  # a kill takes two seconds
        kills = kills[number :: len(kills)] if number % 3 == 0 else []
    for found.faults, ((victim, at), kind) in enumerate([*errors, *kills], 1):
        operation = f"rank {victim}, {at} ({operations[victim][at - 1]})"
        for what, text in bench.strike(victim, at, kind):
            found.findings.append(Finding(what, kind.name, operation, text))
    return found, recorded


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


class _Bench:
    """One rank's side. The first rank prepares the folder and reads it."""

    def __init__(self, number: int, folder: Path) -> None:
        self._number, self._rank = number, dist.get_rank()
        self.case = case = _cases()[number]
        self._root, self._before = (folder / case.name / name for name in ("root", "before"))
        self._power = folder / case.name / "power"
        self._before.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        for version in case.before:
            case.write(self._before, version)

    def put_back(self, root: Path) -> None:
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(self._before, root)
        dist.barrier()

    def record(self) -> list[Operation]:
        """What this rank does in a write that meets no fault, left for `lose_power`."""
        log = self._power / f"log-{self._rank}"
        self.put_back(self._power / "before")
        for _ in range(2):
            self.put_back(self._power / "root")
            shim.arm(self._power / "root", log=log)
            self.case.write(self._power / "root", self.case.target)
            shim.disarm()
        return shim.read_log(log)

    def strike(self, victim: int, at: int, fault: Fault) -> Iterator[tuple[str, str]]:
        """(kind of finding, what was seen) of one fault on one rank, on all ranks."""
        case = self.case
        self.put_back(self._root)
        before = held()
        strike = self._kill if fault is KILL else self._fail
        outcomes = gathered(strike(victim == self._rank, at, fault))
        leaks = gathered(sorted(held() - before)) if fault is not KILL else []
        kinds = {kind for kind, _ in outcomes} - {"killed"}
        yield from (("crash", text) for kind, text in outcomes if kind == "crash")
        if len(kinds) > 1:
            yield "uneven", str(outcomes)
        if fault is KILL:
            self.case = case = _cases()[self._number]
        elif "raised" in kinds and any(str(self._root) not in text for _, text in outcomes):
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

    def _fail(self, is_victim: bool, at: int, fault: Fault) -> tuple[str, str]:
        if is_victim:
            shim.arm(self._root, at, fault)
        try:
            return call(self._write)
        finally:
            shim.disarm()

    def _kill(self, is_victim: bool, at: int, fault: Fault) -> tuple[str, str]:
        """A copy of the victim writes and is killed; who waits for it raises soon."""
        grace, waiting.GRACE = waiting.GRACE, GRACE
        self.case.set_timeout(TIMEOUT)

        def write() -> None:
            _revive_stores()
            shim.arm(self._root, at, fault)
            self._write()

        try:
            return (forked(write), "") if is_victim else call(self._write)
        finally:
            waiting.GRACE = grace

    def _write(self) -> None:
        self.case.write(self._root, self.case.target)

    def _look(self, what: str, allowed: set[int | None]) -> Iterator[tuple[str, str]]:
        text = ""
        if self._rank == 0:
            text = self._problem(allowed)
        if text := gathered(text)[0]:
            yield what, text

    def _problem(self, allowed: set[int | None]) -> str:
        try:
            version = self.case.newest(self._root)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "" if version in allowed else f"found version {version}"


def _revive_stores() -> None:
    """In a copy of a process: threads are not copied, and connections are the original's too."""
    for each in gc.get_objects():
        if type(each) is BoundedStore:
            each.__init__(each.store.clone(), each.timeout)  # type: ignore[misc, attr-defined]
