"""`dist-ema doctor`: is this machine fit, and what is worth knowing of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..text import printable
from .console import FINE, PROBLEM, add_verb, out, out_json

__all__ = ["add"]

MARKS = {"ok": "  ok     ", "note": "  note   ", "problem": "  PROBLEM"}


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "doctor",
        "check this machine: versions, file system, and a self-test on two ranks",
        "Check Python, torch, its accelerators and backends, the packages that dist_ema works with, and the folder\n"
        "that averages are to be saved into; then let two processes on this host train, average, save and load a\n"
        "tiny model under FSDP2 and DDP. Notes are worth knowing; a problem keeps dist_ema from working.",
        "  dist-ema doctor                      everything, for the current folder\n"
        "  dist-ema doctor /mnt/checkpoints     for another one\n"
        "  dist-ema doctor --no-self-test       a second instead of ten\n"
        "  dist-ema doctor --json               what to put into a bug report",
        _doctor,
    )
    verb.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path(),
        help="where averages go (default: here)",
    )
    verb.add_argument("--no-self-test", action="store_true", help="leave out the two processes")
    verb.add_argument(
        "--timeout",
        type=_seconds,
        default=120.0,
        metavar="S",
        help="for the self-test (default 120 s)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def _doctor(options: argparse.Namespace) -> int:
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
