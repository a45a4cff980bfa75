"""`dist-ema doctor`: is this machine fit, and what is worth knowing of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..text import printable
from .console import (
    FINE,
    JSON,
    PROBLEM,
    Arguments,
    number,
    out,
    out_json,
)

__all__ = ["ARGUMENTS", "TEXT", "run"]

TEXT = """\
check this machine: versions, file system, and a self-test on two ranks

Check Python, torch, its accelerators and backends, the packages that dist_ema works with, and the
folder for averages. Then two processes on this host train, average, save and load a tiny model
under FSDP2 and DDP. A note is worth knowing; a problem keeps dist_ema from working.

examples:
  dist-ema doctor                      everything, for the current folder
  dist-ema doctor /mnt/checkpoints     for another one
  dist-ema doctor --no-self-test       a second instead of ten
  dist-ema doctor --json               what to put into a bug report
"""

MARKS = {"ok": "  ok     ", "note": "  note   ", "problem": "  PROBLEM"}


ARGUMENTS: Arguments = {
    "folder": {
        "metavar": "DIR",
        "nargs": "?",
        "type": Path,
        "default": Path(),
        "help": "where averages go (default: here)",
    },
    "--no-self-test": {"action": "store_true", "help": "leave out the two processes"},
    "--timeout": {
        "type": number("a number of seconds", lambda seconds: 0 < seconds < 1e6),
        "default": 120.0,
        "metavar": "S",
        "help": "of the self-test (default 120 s)",
    },
    **JSON,
}


def run(options: argparse.Namespace) -> int:
    from ..offline.doctor import examine

    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder} is no folder.")
    checks = []
    for check in examine(options.folder, timeout=options.timeout, test=not options.no_self_test):
        checks.append(check)
        if not options.json:
            out([printable(f"{MARKS[check.state]}  {check.what}: {check.text}")])
    problems = [check for check in checks if check.state == "problem"]
    if options.json:
        out_json({"sound": not problems, "checks": [asdict(check) for check in checks]})
    elif not problems:
        out(["dist_ema can work here."])
    return PROBLEM if problems else FINE
