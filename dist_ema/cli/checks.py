"""`dist-ema verify` and `doctor`: options, verdicts and checks as lines, exit codes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural, printable, size
from .console import FINE, JSON, PROBLEM, USAGE, Verb, number, out, out_json, progress, say

if TYPE_CHECKING:
    from ..offline.verify import Verdict

__all__ = ["DOCTOR", "VERIFY"]

# --- verify ---------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    from ..offline.verify import verify

    verdicts, code = [], FINE
    for path in options.paths:
        try:
            verdict = verify(path, seal=options.seal, bar=partial(progress, f"verify {path}"))
        except FileNotFoundError as error:  # the others are looked at all the same
            code = max(code, say(str(error), USAGE))
            continue
        verdicts.append(verdict)
        if not options.json:
            out([printable(_line(verdict))])
        for problem in filter(None, (*verdict.problems, verdict.unsealed)):
            code = max(code, say(problem, PROBLEM))
    if options.json:
        out_json([asdict(verdict) | {"sound": verdict.sound} for verdict in verdicts])
    return code


def _line(verdict: Verdict) -> str:
    if not verdict.sound:
        return f"{verdict.path} is not sound: {plural(len(verdict.problems), 'problem')}"
    contents = f"{plural(verdict.weights, 'weight')}, {size(verdict.bytes)}, all values finite"
    if not verdict.sums:
        return (
            f"{verdict.path} is sound as far as can be told: {contents}; there are no check sums "
            "to compare"
        )
    from ..offline.verify import SUMS

    sums = " and ".join(SUMS[kind] for kind in verdict.sums)
    verb = "agrees" if len(verdict.sums) == 1 else "agree"
    return f"{verdict.path} is sound: {contents}; {sums} {verb}" + (
        "; sealed with SHA-256" if verdict.sealed else ""
    )


VERIFY = Verb(
    "verify",
    """\
read everything and list all that is damaged, missing or not finite

Read saved averages, exports, Hugging Face folders or .safetensors files to the last byte: headers,
sizes, index, aliases, ema.json against the files, CRC-32 and SHA-256 where ema.json has them, and
NaN or infinite values by weight. Every problem is listed on stderr, not only the first. Files that
dist_ema did not write have no sums to compare; the verdict says so.

examples:
  dist-ema verify run/ema-001000          before you resume from it, or delete the older one
  dist-ema verify run/ema-*               all of them
  dist-ema verify out/ --seal             sound? then add SHA-256 of every file to ema.json
  dist-ema verify out/ --json             the verdict for programs
""",
    {
        "paths": {"metavar": "PATH", "nargs": "+", "help": "folders, or .safetensors files"},
        "--seal": {
            "action": "store_true",
            "help": "add SHA-256 to ema.json where everything is sound",
        },
        "--json": {"action": "store_true", "help": "print JSON: a list with one verdict per path"},
    },
    _verify,
)


# --- doctor ---------------------------------------------------------------------------------------


MARKS = {"ok": "  ok     ", "note": "  note   ", "problem": "  PROBLEM"}


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


DOCTOR = Verb(
    "doctor",
    """\
check this machine: versions, file system, and a self-test on two ranks

Check Python, torch, its accelerators and backends, the packages that dist_ema works with, and the
folder for averages. Then two processes on this host train, average, save and load a tiny model
under FSDP2 and DDP. A note is worth knowing; a problem keeps dist_ema from working.

examples:
  dist-ema doctor                      everything, for the current folder
  dist-ema doctor /mnt/checkpoints     for another one
  dist-ema doctor --no-self-test       a second instead of ten
  dist-ema doctor --json               what to put into a bug report
""",
    {
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
    },
    _doctor,
)
