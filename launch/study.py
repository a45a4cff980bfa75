"""Does averaging weights help? Train, compare, and write a page of results, whatever they say.

    python launch/study.py                everything: 40 minutes on two cores
    python launch/study.py --quick        smaller, three minutes: too small to prove anything
    python launch/study.py --only table   one experiment
    python launch/study.py --page         the page and its plots again, from results that are there

    language      a GPT of a million weights on Python's own source, on two ranks: averages of a
                  constant learning rate against runs that decay it; a sweep over widths afterwards
    table         digits with 0, 20 and 40 % wrong labels: live weights, averages, SWA, with and
                  without new BatchNorm statistics; accuracy, its fluctuation, and how far the
                  predictions of two seeds differ
    forgetting    fine-tune on other digits: what is left of the first ones
    distillation  soft targets and mean teacher, with 150 labels
    resolution    train at 16 pixels, test at others, with and without the FixRes fine-tune
    equivalence   updates every 16 steps, twice the batch, compact shadows

OUT/results/ gets one JSON file per run, plots, and study.json (settings, machine, versions, time).
OUT/results.md is made of them and of nothing else. After an interruption the same command goes on
with the runs that have no results yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studies import files, work
from studies.sizes import EXPERIMENTS, FULL, QUICK, SMOKE, Cell, Size, cells

PACKAGES = ("dist-ema", "torch", "numpy", "scikit-learn")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("study.py", formatter_class=form, description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="fewer seeds and shorter runs: three minutes"
    )
    size.add_argument(
        "--smoke", action="store_true", help="a few steps of everything: does it run at all"
    )
    parser.add_argument(
        "--only", choices=EXPERIMENTS, help="one experiment; the page shows what is there"
    )
    text = (
        "folder for results.md and results/ "
        "(runs/study; with --quick runs/study-quick, with --smoke runs/study-smoke)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "processes beside each other, one thread each; the language model always takes two (2)"
    parser.add_argument("--workers", type=_whole, default=2, metavar="N", help=text)
    parser.add_argument(
        "--page", action="store_true", help="train nothing: write the page from the results"
    )
    args = parser.parse_args(arguments)
    args.size = QUICK if args.quick else SMOKE if args.smoke else FULL
    if args.out is None:
        args.out = Path("runs/study" if args.size is FULL else f"runs/study-{args.size.name}")
    return args


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


class UsageError(ValueError):
    """The study cannot start like this."""


def check(args: argparse.Namespace) -> None:
    for package in ("sklearn", "matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"launch/study.py needs {package}: pip install 'dist-ema[demo]'.")
    facts = read_facts(args.out / "results")
    if args.page and not facts:
        raise UsageError(f"--page: there are no results in {args.out / 'results'}.")
    if facts and not args.page and facts["size"] != asdict(args.size):
        raise UsageError(
            f"{args.out / 'results'} holds results of a {facts['size']['name']} study with other "
            "settings: write to another --out, or remove them."
        )
    try:
        (args.out / "results").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out / "results").close()
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}.") from None


def read_facts(results: Path) -> dict[str, Any]:
    path = results / "study.json"
    return json.loads(path.read_text()) if path.exists() else {}


def new_facts(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, and what it ran on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }
    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
    }
    return {"size": asdict(args.size), "versions": versions, "machine": machine, "sessions": []}


def missing(size: Size, results: Path, only: str | None) -> list[Cell]:
    return [cell for cell in cells(size, only) if not work.result_of(results, cell).exists()]


def study(args: argparse.Namespace) -> None:
    """Do what is missing, and note how long it took."""
    results = args.out / "results"
    facts = read_facts(results) or new_facts(args)
    todo = missing(args.size, results, args.only)
    print(
        f"{len(todo)} of {len(cells(args.size, args.only))} runs to do; results in {results}",
        flush=True,
    )
    if not todo:
        return
    files.write(results / "study.json", facts)
    began = time.monotonic()
    try:
        work.run(todo, args.size, results, args.workers)
    finally:
        left = len(missing(args.size, results, args.only))
        session = {"command": command(args), "workers": args.workers, "runs": len(todo) - left}
        facts["sessions"].append(session | {"seconds": round(time.monotonic() - began)})
        files.write(results / "study.json", facts)


def command(args: argparse.Namespace) -> str:
    words = [
        "python",
        "launch/study.py",
        *([f"--{args.size.name}"] if args.size is not FULL else []),
    ]
    words += ["--only", args.only] if args.only else []
    return shlex.join([*words, "--out", str(args.out)])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        check(args)
        if not args.page:
            study(args)
    except (UsageError, work.StudyError) as refusal:
        print(f"study.py: {refusal}", file=sys.stderr)
        return 2 if isinstance(refusal, UsageError) else 1
    except KeyboardInterrupt:
        print(
            "study.py: interrupted; the same command goes on with what is missing.", file=sys.stderr
        )
        return 130
    from studies import page

    print(page.write(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
