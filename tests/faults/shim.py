"""The library of `shim.c`: built where a compiler is, preloaded, and driven by ctypes."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "KINDS",
    "Disk",
    "Fault",
    "Operation",
    "arm",
    "build",
    "disarm",
    "loaded",
    "read_log",
    "why_not",
]

SOURCE = Path(__file__).with_name("shim.c")
_HEAD = struct.Struct("16sqqqiiii")


@dataclass(frozen=True)
class Fault:
    """What an operation meets.

    code: An errno, -1 for SIGKILL, or -2 for a write that moves half of its bytes.
    sticky: All later operations that such a state of the disk reaches fail too.
    """

    name: str
    code: int
    sticky: bool = False


@dataclass(frozen=True)
class Disk:
    """What a file system can do.

    exchange: RENAME_EXCHANGE, which NFS refuses.
    fixed: What lies in the armed folder can be written to, and neither made, renamed nor removed.
    """

    exchange: bool = True
    fixed: bool = False


KINDS = (
    Fault("EIO", errno.EIO),
    Fault("ENOSPC", errno.ENOSPC),
    Fault("EDQUOT", errno.EDQUOT),
    Fault("disk full", errno.ENOSPC, sticky=True),
    Fault("read-only", errno.EROFS, sticky=True),
    Fault("short write", -2),
    Fault("SIGKILL", -1),
)


@dataclass(frozen=True)
class Operation:
    """One operation as it was recorded.

    offset, size: Bytes; of an open, whether the file was there, and the flags.
    code: 0, or the errno that it returned.
    time: When it had ended, in ns.
    rank: Who did it.
    """

    name: str
    path: str
    second: str
    offset: int
    size: int
    code: int
    data: bytes
    time: int = 0
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.name} {Path(self.path).name}" + (
            f" -> {Path(self.second).name}" if self.second else ""
        )


def why_not() -> str:
    """Why no shim can be built here; '' where it can."""
    if not sys.platform.startswith("linux"):
        return f"LD_PRELOAD on Linux is needed, this is {sys.platform}"
    return "" if _compiler() else "no C compiler (cc, gcc, clang)"


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def build(folder: Path) -> Path:
    """Compile the shim into a folder; returns the library to preload."""
    library = folder / "shim.so"
    command = [_compiler() or "cc", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


def loaded() -> bool:
    return hasattr(ctypes.CDLL(None), "faults_arm")


def arm(
    folder: Path,
    at: int = 0,
    fault: Fault = KINDS[0],
    log: Path | None = None,
    disk: Disk | None = None,
    reads: bool = False,
) -> None:
    """Count the operations under `folder` from now on, and fail the `at`-th (from 1; 0: none).

    Args:
        folder: A real path, without links.
        at: The number of the operation.
        fault: What it meets.
        log: A file outside of the folder that receives every operation.
        disk: What it can do; None: everything.
        reads: Opens for reading and reads, in place of what changes the disk.
    """
    disk = disk or Disk()
    library = ctypes.CDLL(None)
    library.faults_fix(os.fsencode(folder) if disk.fixed else b"")
    library.faults_refuse_exchange(int(not disk.exchange))
    library.faults_watch_reads(int(reads))
    library.faults_arm(
        os.fsencode(folder),
        ctypes.c_long(at),
        fault.code,
        int(fault.sticky),
        None if log is None else os.fsencode(log),
    )


def disarm() -> int:
    """Let everything through; returns how many operations came."""
    library = ctypes.CDLL(None)
    library.faults_disarm.restype = ctypes.c_long
    library.faults_refuse_exchange(0)
    library.faults_watch_reads(0)
    library.faults_fix(b"")
    count: int = library.faults_disarm()
    return count


def read_log(path: Path) -> list[Operation]:
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw):
        name, time, offset, size, code, *lengths = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        parts = []
        for length in lengths:
            parts.append(raw[at : at + length])
            at += length
        first, second, data = parts
        found.append(
            Operation(
                name.rstrip(b"\0").decode(),
                os.fsdecode(first),
                os.fsdecode(second),
                offset,
                size,
                code,
                data,
                time,
            )
        )
    return found
