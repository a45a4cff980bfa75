"""`Lease`: a reader keeps a published version from removal; `LeaseWatch`: a publisher asks for it.

    published/.leases/version-000007.ID      a reader's file: {"host", "pid", "expiry", "renewed"}
    published/.leases/retired                the versions that take no new readers, a JSON list

[Note: leases]  A reader says which version it has open, and `keep=` leaves that one alone. It
writes its lease first, and then looks whether the version is retired or gone. A publisher retires
versions first, and then looks for leases. So one of the two sees the other, and no version is
removed under a reader. Both write into one folder, because a client of a network file system that
has changed a folder lists it anew; files are opened, which it also checks with the server.

[Note: expiry]  Clocks of hosts differ, so no time is compared with a time of another host. A reader
changes its lease every quarter of `expiry` seconds. A lease that a publisher has seen unchanged for
`expiry` seconds of its own clock is dead, and its file is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import finalize

from . import atomic, disk

__all__ = ["EXPIRY", "LEASES", "RETIRED", "Lease", "LeaseWatch", "lease_facts", "read_all"]

LEASES = ".leases"
RETIRED = "retired"
EXPIRY = 60.0  # seconds
MOST_RETIRED = 1000  # names
LONGEST = 3600.0  # seconds that a lease may ask for


class Lease:
    """Keeps a version from being removed, until `release`, the end of the process, or its death.

    Args:
        path: The version's folder.
        expiry: Seconds after the last sign of life until a publisher takes it for dead.

    Raises:
        FileNotFoundError: The version is retired or gone.
        OSError: This process may not write beside it.
    """

    def __init__(self, path: Path, expiry: float = EXPIRY) -> None:
        file, released = path.parent / LEASES / f"{path.name}.{uuid.uuid4().hex}", threading.Event()
        try:
            file.parent.mkdir(exist_ok=True)
            _write(file, expiry, 0)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise type(error)(
                error.errno,
                f"{error.strerror}: a reader leaves a lease here, so that the version that it has "
                "open is not removed. Let it write into this folder",
                os.fspath(file.parent),
            ) from error
        # It also runs when the interpreter ends.
        self.release = finalize(self, _release, file, released)
        # Asked after the lease was written ([Note: leases]).
        if path.name in _read_retired(path.parent) or not path.is_dir():
            self.release()
            raise FileNotFoundError(f"{path} is retired: newer versions took its place.")
        # NOTE: the thread does not hold the lease, whose end it waits for.
        threading.Thread(
            target=_renew, args=(file, expiry, released), name="dist_ema lease", daemon=True
        ).start()


def _renew(file: Path, expiry: float, released: threading.Event) -> None:
    renewed = 0
    while not released.wait(expiry / 4):
        renewed += 1
        with contextlib.suppress(OSError):  # the next renewal comes before the expiry
            _write(file, expiry, renewed)


def _write(file: Path, expiry: float, renewed: int) -> None:
    reader = {"host": socket.gethostname(), "pid": os.getpid()}
    file.write_text(json.dumps(reader | {"expiry": expiry, "renewed": renewed}))


def _release(file: Path, released: threading.Event) -> None:
    released.set()
    with contextlib.suppress(OSError):
        file.unlink()


def _read_retired(folder: Path) -> list[str]:
    """The versions that take no new readers."""
    try:
        names = json.loads((folder / LEASES / RETIRED).read_text())
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) else []


def read_all(folder: Path) -> dict[Path, bytes]:
    """The content of every lease, dead ones too."""
    leases = {}
    with contextlib.suppress(OSError):
        for path in sorted((folder / LEASES).iterdir()):
            if path.name != RETIRED and not path.name.startswith("."):
                with contextlib.suppress(OSError):  # it was released since
                    leases[path] = path.read_bytes()
    return leases


class LeaseWatch:
    """A publisher's memory of the leases in a folder ([Note: expiry])."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[bytes, float]] = {}  # what a lease held, and since when

    def retire(self, names: Sequence[str]) -> set[str]:
        """Close versions to new readers. Returns those of them that must stay for now."""
        mark = self._folder / LEASES / RETIRED
        disk.ensure(mark.parent)
        # NOTE: those that are gone too, which a stale cache of a reader may still hold.
        retired = [name for name in _read_retired(self._folder) if name not in names]
        atomic.replace_file(mark, json.dumps([*retired, *names][-MOST_RETIRED:]).encode())
        # Asked after the mark was written ([Note: leases]).
        return self._leased().intersection(names)

    def begin_anew(self) -> None:
        """The folder holds no version: names that were retired may come again."""
        disk.remove(self._folder / LEASES / RETIRED)

    def _leased(self) -> set[str]:
        now, leases = time.monotonic(), read_all(self._folder)
        before, self._seen = self._seen, {}
        for path, content in leases.items():
            # A lease that was not seen before is alive from now on ([Note: expiry]).
            known, since = before.get(path, (b"", now))
            self._seen[path] = (content, now if content != known else since)
            if content == known and now - since > _expiry(content):
                del self._seen[path]
                disk.remove(path)
        return {path.name.rpartition(".")[0] for path in self._seen}


def lease_facts(content: bytes) -> dict[str, Any]:
    """The content of a lease; {} where it is torn, because its reader died while writing."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _expiry(content: bytes) -> float:
    """The seconds that a lease asks for, else the default."""
    try:
        return min(max(float(lease_facts(content)["expiry"]), 0.0), LONGEST)
    except (KeyError, TypeError, ValueError):
        return EXPIRY
