"""Counts n through the operations of a verb, and has the n-th one fail.

After every fault the old or the new version is whole, the next write works, and nothing is left.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import shim
from .shim import Fault
from .verbs import Case

__all__ = ["KINDS_OF_FINDINGS", "Finding", "Walk", "call", "forked", "held", "report", "walk"]

KINDS_OF_FINDINGS = {
    "lost": "neither the old version nor the new one can be read",
    "silent": "the verb returned, and the new version is not there",
    "stuck": "the next write fails",
    "uneven": "one rank raised, and another returned",
    "left": "a temporary is left after the next write",
    "leak": "a thread or a descriptor is left open",
    "nameless": "the error names no path",
    "crash": "an error that is none of OSError, RuntimeError and ValueError",
}


@dataclass(frozen=True)
class Finding:
    kind: str
    fault: str
    operation: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.fault} at {self.operation}: {self.text}"


@dataclass
class Walk:
    """What came of all faults in one verb."""

    case: str
    operations: int
    faults: int = 0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.case}: {self.operations} operations, {self.faults} faults"
        return "\n  ".join([f"{head}, {len(self.findings)} findings", *map(str, self.findings)])

    def count(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)


def report(text: str) -> None:
    """Print what is known by now, beside the table or the JSON of the end."""
    print(text, file=sys.stderr, flush=True)


def walk(case: Case, folder: Path, kinds: Sequence[Fault] = shim.KINDS, stride: int = 1) -> Walk:
    """Try the faults at the operations of a verb.

    Args:
        case: The verb.
        folder: An empty folder, by its real path.
        kinds: The faults.
        stride: 1 tries every fault at every operation; k every k-th of these pairs.
    """
    bench = _Bench(case, folder)
    operations = bench.record()
    found = Walk(case.name, len(operations))
    pairs = [(at, kind) for at in range(1, len(operations) + 1) for kind in kinds][::stride]
    for found.faults, (at, kind) in enumerate(pairs, 1):
        operation = f"{at} ({operations[at - 1]})"
        found.findings += [
            Finding(what, kind.name, operation, text) for what, text in bench.strike(at, kind)
        ]
    return found


class _Bench:
    """A folder with the versions that are there before, put back for every fault."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self._root, self._before = folder / "root", folder / "before"
        self._log = folder / "log"
        self._normal: set[str] = set()  # hidden files after a write that meets no fault
        self._before.mkdir(parents=True)
        for version in case.before:
            case.write(self._before, version)

    def put_back(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(self._before, self._root)

    def record(self) -> list[shim.Operation]:
        """The operations of a write that meets no fault."""
        for log in (None, self._log):  # the first one may open and import what stays
            self.put_back()
            shim.arm(self._root, log=log, disk=self._case.disk)
            try:
                self._case.write(self._root, self._case.target)
            finally:
                shim.disarm()
            assert self._case.newest(self._root) == self._case.target
        self._case.write(self._root, self._case.following)
        assert self._case.newest(self._root) == self._case.following
        self._normal = self._hidden()
        return shim.read_log(self._log)

    def strike(self, at: int, fault: Fault) -> Iterator[tuple[str, str]]:
        """(kind of finding, what was seen) of one fault."""
        case = self._case
        self.put_back()
        before = held()
        outcome, text = (self._fork if fault.code == -1 else self._call)(at, fault)
        if outcome == "crash":
            yield "crash", text
        if outcome == "raised" and str(self._root) not in text:
            yield "nameless", text
        if leaked := held() - before:
            yield "leak", ", ".join(sorted(leaked))
        try:
            version = case.newest(self._root)
        except Exception as error:
            yield "lost", f"{type(error).__name__}: {error}"
        else:
            if outcome == "returned" and version != case.target:
                yield "silent", f"found version {version}"
            elif version not in (case.last, case.target):
                yield "lost", f"found version {version}"
        yield from self._go_on()

    def _go_on(self) -> Iterator[tuple[str, str]]:
        case = self._case
        try:
            shim.arm(self._root, disk=case.disk)
            case.write(self._root, case.following)
            version = case.newest(self._root)
        except Exception as error:
            yield "stuck", f"{type(error).__name__}: {error}"
            return
        finally:
            shim.disarm()
        if version != case.following:
            yield "stuck", f"the next write left version {version}"
        if left := self._hidden() - self._normal:
            yield "left", ", ".join(sorted(left))

    def _hidden(self) -> set[str]:
        return {each.name for each in self._root.rglob(".*")}

    def _call(self, at: int, fault: Fault) -> tuple[str, str]:
        """The write in this process, with an error at an operation."""
        shim.arm(self._root, at, fault, disk=self._case.disk)
        try:
            return call(lambda: self._case.write(self._root, self._case.target))
        finally:
            shim.disarm()

    def _fork(self, at: int, fault: Fault) -> tuple[str, str]:
        """The write in a copy of this process, which is killed at an operation."""

        def write() -> None:
            shim.arm(self._root, at, fault, disk=self._case.disk)
            self._case.write(self._root, self._case.target)

        return forked(write), ""


def forked(write: Callable[[], None]) -> str:
    """'killed', 'returned' or 'raised' in a copy of this process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return "raised" if status else "returned"


def call(write: Callable[[], None]) -> tuple[str, str]:
    """'returned', 'raised' or 'crash', and the error."""
    try:
        write()
    except (OSError, RuntimeError, ValueError) as error:
        return "raised", f"{type(error).__name__}: {error}"
    except BaseException as error:
        return "crash", f"{type(error).__name__}: {error}"
    return "returned", ""


def held() -> set[str]:
    """The threads and descriptors of this process, without those that only garbage holds."""
    gc.collect(0)
    fds = {f"descriptor {fd}" for fd in os.listdir("/proc/self/fd")}
    return fds | {f"thread {each.name} {each.ident}" for each in threading.enumerate()}
