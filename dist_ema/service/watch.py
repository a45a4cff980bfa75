"""`Watch`: a command for every published version, once, over restarts and several watchers.

A watcher leases a version, claims it in the ledger, runs its work, records the outcome, and only
then releases it ([Note: claims] in ledger). No torch.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from ..checkpoint import versions
from ..offline import plotting
from ..text import printable
from .follow import POLL, Version, open_version
from .ledger import RUNNING, Ledger, Outcome, Record, curves, finite_numbers

__all__ = ["Watch", "Work", "plot", "run_command", "run_shell"]

_PASSED_OVER = ""  # the id of a version that cannot be opened: retired, damaged, another's
Work: TypeAlias = Callable[[Version], Outcome]


def run_command(command: str, version: Version) -> Outcome:
    """Run a shell command for a version; {path}, {step} and {version} in it are replaced."""
    return run_shell(
        command, {"path": version.path, "step": version.step, "version": version.number}
    )


def run_shell(command: str, facts: Mapping[str, object]) -> Outcome:
    """Run a shell command, and read its metrics from its last line of JSON.

    Args:
        command: Names of `facts` in braces are replaced by their values, quoted.
        facts: By name.
    """
    # `str.format` would stumble over the braces of a shell or of JSON. All names at once, because a
    # path may hold another one.
    known = "|".join(map(re.escape, facts))
    done = subprocess.run(
        re.sub(f"{{({known})}}", lambda found: shlex.quote(str(facts[found[1]])), command),
        shell=True,
        stdin=subprocess.DEVNULL,  # a command that asks would wait for ever
        capture_output=True,
        text=True,
        errors="replace",  # what a command prints must not end the watcher
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        why = f": {printable(last[0])[:500]}" if last else ""
        return Outcome(error=f"exit code {done.returncode}{why}")
    return Outcome(_metrics_of(done.stdout))


def _metrics_of(text: str) -> dict[str, float]:
    """The numbers in the last line that is a JSON object; {} if there is none."""
    # Commands print progress first, and their result last.
    for line in reversed(text.splitlines()):
        with suppress(RecursionError, ValueError):
            values = json.loads(line)
            if isinstance(values, dict):
                return finite_numbers(values)
    return {}


class Watch:
    """One watcher.

    Args:
        folder: The folder of published versions; it need not exist yet.
        work: What to do with a version. Threads call it.
        ledger: Where outcomes are recorded.
        newest: Pass over versions that are not the newest when a job is free.
        jobs: How many versions are worked on at the same time.
        retries: How often work that failed is repeated.
        timeout: Seconds without a new version after which the watcher ends; None waits for ever.
        expiry: The expiry of leases and claims, in seconds.
        poll: Seconds between two looks.
        report: Receives each record of this watcher.
    """

    def __init__(
        self,
        folder: Path,
        work: Work,
        ledger: Ledger,
        *,
        newest: bool = False,
        jobs: int = 1,
        retries: int = 2,
        timeout: float | None = None,
        expiry: float = 60.0,
        poll: float = POLL,
        report: Callable[[Record], None] = lambda record: None,
    ) -> None:
        versions.refuse_model(folder)
        self._folder, self._work, self._ledger = folder, work, ledger
        self._newest, self._jobs, self._retries = newest, jobs, retries
        self._timeout = math.inf if timeout is None else timeout
        self._expiry, self._poll, self._report = expiry, poll, report
        self._over = threading.Event()
        self._known: dict[tuple[str, int], str] = {}  # (name, time of change) -> id
        self._changed, self._seen = time.monotonic(), 0  # the newest version in the last listing

    def run(self) -> None:
        """Watch until the stop file or the timeout, and until no version is left undone."""
        running: list[Future[None]] = []
        with self._heartbeats(), ThreadPoolExecutor(self._jobs) as pool:
            try:
                while True:
                    for job in [job for job in running if job.done()]:
                        running.remove(job)
                        # Raises what ended the job, in the thread that watches.
                        job.result()
                    states = self._ledger.states()
                    undone = RUNNING in states.values()  # here, or by another watcher
                    candidates = self._candidates()
                    if undone:
                        # Or a watcher would wait for ever for what a dead one claimed and `keep=`
                        # removed.
                        self._ledger.give_up_lost(candidates)
                    for path in candidates.values():
                        if states.get(self._id(path) or "", RUNNING) != RUNNING:
                            continue
                        undone = True
                        if len(running) < self._jobs and (version := self._take(path)):
                            running.append(pool.submit(self._run, version))
                    idle = time.monotonic() - self._changed > self._timeout
                    over = idle or versions.is_stopped(self._folder, self._seen)
                    if over and not running and not undone:
                        return
                    time.sleep(self._poll)
            except BaseException:
                # The pool waits for its jobs, which would go on to retry.
                self._over.set()
                raise

    @contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Claims and leases stay alive while the block runs; those that it leaves are given up."""

        def beat() -> None:
            # Some may be late before another watcher takes the row over.
            while not self._over.wait(self._expiry / 4):
                with suppress(OSError):  # the next one comes before the expiry
                    self._ledger.beat()

        thread = threading.Thread(target=beat, name="dist_ema ledger", daemon=True)
        try:
            thread.start()
            yield
        finally:
            self._over.set()
            if thread.ident is not None:
                thread.join()
            self._ledger.give_back()

    def _candidates(self) -> dict[int, Path]:
        numbered = list(versions.numbered(self._folder).items())[-1 if self._newest else 0 :]
        self._seen = max((number for number, _ in numbered), default=0)
        return {number: path for number, path in numbered if self._id(path) != _PASSED_OVER}

    def _id(self, path: Path) -> str | None:
        """The id of a version that was opened before, else None."""
        with suppress(OSError):
            return self._known.get((path.name, path.stat().st_mtime_ns))
        return _PASSED_OVER  # it is gone

    def _take(self, path: Path) -> Version | None:
        """The version, leased and claimed; None where there is nothing to do."""
        version, new = open_version(path, self._expiry), self._id(path) is None
        with suppress(OSError):
            self._known[path.name, path.stat().st_mtime_ns] = (
                _PASSED_OVER if version is None else str(version.metadata["id"])
            )
        if version is None:
            return None
        if new:
            self._changed = time.monotonic()
        if self._ledger.claim(version):
            return version
        # Another watcher has it, and holds a lease of its own.
        version.release()
        return None

    def _run(self, version: Version) -> None:
        began = time.monotonic()
        with version:
            for attempt in range(1, self._retries + 2):
                outcome = self._work(version)
                last = not outcome.error or attempt > self._retries
                # A longer wait after each failure: what fails at once is often a busy file system.
                if last or self._over.wait(min(attempt, 30) * self._poll):
                    break
            if outcome.error and self._over.is_set():
                return  # the interrupt stopped the command too
            record = self._ledger.finish(version, outcome, attempt, time.monotonic() - began)
        self._changed = time.monotonic()
        if record is not None:
            self._report(record)


def plot(path: str, records: Sequence[Record], metric: str) -> None:
    """A PNG of a metric over the steps: of the average, and of live where it is reported."""
    average, live = curves(records, metric)
    if not average:
        raise ValueError(f"no version has the metric {metric!r} yet.")
    with plotting.panels(path, 1) as (axes,):
        axes.plot(*zip(*sorted(average), strict=True), marker="o", label="average")
        if live:
            axes.plot(*zip(*sorted(live), strict=True), marker="o", label="live")
        axes.set(xlabel="step", ylabel=metric)
        axes.legend()
