"""`Ledger`: what was done with each version, in SQLite, so that it is done once. No torch.

[Note: claims]  A row is a task and a version, and the primary key lets one watcher insert it. The
owner of a row that runs increments its beat. A watcher that sees a beat stand still for `expiry`
seconds of its own clock takes the row over, which fails if another was faster. A result is recorded
by the owner alone. So a version is recorded once, whatever dies; its command runs again where a
watcher died in it.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoint import disk, pointers
from .follow import Version

__all__ = [
    "DONE",
    "FAILED",
    "NAME",
    "RUNNING",
    "Ledger",
    "Outcome",
    "Points",
    "Record",
    "best_of",
    "curves",
    "finite_numbers",
    "read_records",
]

NAME = "ledger.sqlite"
RUNNING, DONE, FAILED = "running", "done", "failed"
Points: TypeAlias = Sequence[tuple[float, float]]
PATIENCE = 60.0  # seconds that SQLite waits for another's lock
_TABLE = """\
CREATE TABLE IF NOT EXISTS records (
    task TEXT, id TEXT, version INTEGER, step INTEGER, live TEXT, state TEXT, owner TEXT,
    beat INTEGER, attempts INTEGER, seconds REAL, metrics TEXT, error TEXT,
    PRIMARY KEY (task, id)
)"""
_LOST = "the watcher died, and no other can take the version over: it is retired, or not the newest"
_COLUMNS = "task, id, version, step, live, state, attempts, seconds, metrics, error"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a version: numbers by name, or an error."""

    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Record:
    """A row. live: the metrics that the publisher gave with the version."""

    task: str
    id: str
    version: int
    step: int
    live: dict[str, Any]
    state: str
    attempts: int
    seconds: float
    metrics: dict[str, float]
    error: str


def curves(records: Sequence[Record], metric: str) -> tuple[Points, Points]:
    """A metric over the steps, of the average and of the live weights.

    The latter is live_METRIC of the command, or METRIC of the publisher.
    """
    with_live = [(record, finite_numbers(record.live)) for record in records]
    values = [
        (record.step, record.metrics.get(f"live_{metric}", live.get(metric)))
        for record, live in with_live
    ]
    average = [
        (record.step, record.metrics[metric]) for record in records if metric in record.metrics
    ]
    return average, [(step, value) for step, value in values if value is not None]


class Ledger:
    """One watcher's access.

    Args:
        path: The file, made if it is not there.
        task: What is done with versions: each version once for each task.
        expiry: Seconds without a beat until a row is taken over.
        metric: What the pointer `best` beside the versions goes by; None leaves it alone.
        mode: 'min' or 'max'.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        expiry: float = 60.0,
        metric: str | None = None,
        mode: str = "min",
    ) -> None:
        self._path, self._task, self._expiry = path, task, expiry
        self._metric, self._sign = metric, 1 if mode == "min" else -1
        self._owner = uuid.uuid4().hex
        self._beats: dict[str, tuple[Any, float]] = {}  # (owner, beat) of others, and since when
        disk.ensure(path.parent)
        with _transaction(path) as db:
            db.execute(_TABLE)

    def claim(self, version: Version) -> bool:
        """Make a version ours to work on. False where it is done, or another works on it."""
        key, facts = str(version.metadata["id"]), version.metadata
        live = json.dumps(facts.get("metrics", {}))
        with _transaction(self._path) as db:
            # The primary key lets one watcher in.
            added = db.execute(
                "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, 0, 0, 0, '{}', '')",
                (self._task, key, version.number, version.step, live, RUNNING, self._owner),
            ).rowcount
            if added:
                return True
            state, *beat = db.execute(
                "SELECT state, owner, beat FROM records WHERE task = ? AND id = ?",
                (self._task, key),
            ).fetchone()
            # Done, ours, or of a watcher that lives.
            if state != RUNNING or beat[0] == self._owner or not self._stands_still(key, beat):
                return False
            db.execute(
                "UPDATE records SET owner = ?, beat = beat + 1 WHERE task = ? AND id = ?",
                (self._owner, self._task, key),
            )
        return True

    def _stands_still(self, key: str, beat: Any) -> bool:
        now = time.monotonic()
        known, since = self._beats.get(key, (None, now))
        self._beats[key] = beat, (since if beat == known else now)
        return now - self._beats[key][1] > self._expiry

    def states(self) -> dict[str, str]:
        """id -> state, of this task."""
        with _transaction(self._path, "DEFERRED") as db:
            rows = db.execute("SELECT id, state FROM records WHERE task = ?", (self._task,))
            return dict(rows.fetchall())

    def give_up_lost(self, candidates: Collection[int]) -> None:
        """Record as failed what a dead watcher claimed and no other will take over.

        Args:
            candidates: The numbers of the versions that one would take.
        """
        with _transaction(self._path) as db:
            rows = db.execute(
                "SELECT id, version, owner, beat FROM records "
                "WHERE task = ? AND state = ? AND owner != ?",
                (self._task, RUNNING, self._owner),
            ).fetchall()
            for key, number, *beat in rows:
                # What is a candidate is taken over by `claim`, and done again.
                if number not in candidates and self._stands_still(key, beat):
                    db.execute(
                        "UPDATE records SET state = ?, owner = ?, error = ? "
                        "WHERE task = ? AND id = ?",
                        (FAILED, self._owner, _LOST, self._task, key),
                    )

    def beat(self) -> None:
        """Show that the owner of these rows lives."""
        with _transaction(self._path) as db:
            db.execute(
                "UPDATE records SET beat = beat + 1 WHERE owner = ? AND state = ?",
                (self._owner, RUNNING),
            )

    def give_back(self) -> None:
        """Give up all claims: other watchers, or a later one, do what was running."""
        with _transaction(self._path) as db:
            db.execute("DELETE FROM records WHERE owner = ? AND state = ?", (self._owner, RUNNING))

    def finish(
        self, version: Version, outcome: Outcome, attempts: int, seconds: float
    ) -> Record | None:
        """Record the outcome and move the pointer. None where another has taken the row over."""
        key = str(version.metadata["id"])
        result = FAILED if outcome.error else DONE, attempts, seconds, json.dumps(outcome.metrics)
        with _transaction(self._path) as db:
            changed = db.execute(
                "UPDATE records SET state = ?, attempts = ?, seconds = ?, metrics = ?, error = ? "
                "WHERE task = ? AND id = ? AND owner = ? AND state = ?",
                (*result, outcome.error, self._task, key, self._owner, RUNNING),
            ).rowcount
            if not changed:
                return None
            records = [record for record in _records(db) if record.task == self._task]
            best = best_of(records, self._metric, self._sign)
            # NOTE: inside the transaction, which keeps other watchers out.
            if best is not None and best.id == key:
                pointers.point(version.path, pointers.BEST)
            return next(record for record in records if record.id == key)


def best_of(records: list[Record], metric: str | None, sign: int) -> Record | None:
    """The record with the least sign x metric; of equal ones the newest."""
    return min(
        (record for record in records if record.state == DONE and metric in record.metrics),
        key=lambda record: (sign * record.metrics[str(metric)], -record.version),
        default=None,
    )


def read_records(path: Path) -> list[Record]:
    """All rows of a ledger, by task and version; none if there is none, or it is being made."""
    if not path.exists() or not path.stat().st_size:
        return []
    with _transaction(path, "DEFERRED") as db:
        return _records(db)


def _records(db: sqlite3.Connection) -> list[Record]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM records ORDER BY task, version").fetchall()
    tables = (dict(zip(_COLUMNS.split(", "), row, strict=True)) for row in rows)
    return [
        Record(**table | {name: json.loads(table[name]) for name in ("live", "metrics")})
        for table in tables
    ]


@contextmanager
def _transaction(path: Path, lock: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    """A connection that commits at the end of the block. IMMEDIATE locks out other writers.

    Raises:
        OSError: The file is no ledger, or the disk refuses it.
    """
    try:
        # NOTE: a connection for each transaction, because network file systems flush at close.
        # isolation_level: sqlite3 would begin by itself, without the lock that is asked for.
        with closing(sqlite3.connect(path, PATIENCE, isolation_level=None)) as db:
            db.execute(f"BEGIN {lock}")
            yield db
            db.execute("COMMIT")
    except sqlite3.Error as error:
        raise OSError(f"the ledger {path} cannot be used: {error}.") from error


def finite_numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a JSON object, by name."""
    return {
        str(key): value
        for key, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        # `math.isfinite` raises for an integer that no float holds.
        and abs(value) <= sys.float_info.max
    }
