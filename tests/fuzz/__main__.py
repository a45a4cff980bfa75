"""Every verb on damaged files: python -m tests.fuzz --files 1000 [--seed 0] [--forms ema pt]

Each verb runs in a process of its own with 512 MB of address space (those of torch's libraries come
on top where a verb imports it) and 10 s. A case fails if the verb

- ends by a signal, by an exit code that is none of ours, or prints a traceback,
- starts a process, opens a socket, or writes, renames or removes anything outside OUT,
- leaves anything beside OUT, or changes what it reads,
- exits with 0 although what it says or wrote is not what another reader finds in the file, or
- exits with another code and says nothing, or leaves an OUT.

Files of torch come last, because the limit of the others has no room for torch. `--minutes 10`
looks for such files by coverage in place of chance: see guided.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

from . import damaged
from .cases import FORMS, Case, build, mix, preload, weights_of
from .guided import TARGETS, guide, replay
from .sandbox import in_child, problems, run


def fuzz(root: Path, files: int, seed: int, forms: list[str], verbose: bool) -> int:
    """Run, print every failure, and return their number."""
    failures, outcomes = 0, Counter[str]()
    case = root / "case"
    total = sum(FORMS[name].share for name in forms)
    for name in forms:
        if name == "pt":
            import torch

            torch.set_num_threads(1)
        form, good = FORMS[name], root / "good" / name
        mixed = (weights_of(root / "mixed") or {}) if name == "ema" else {}
        source = case / "from" / "a"
        for label, _ in islice(
            damaged(good, source, seed, form.changes), max(1, files * form.share // total)
        ):
            fuzzed = Case(name, source / form.file, good / form.file, case / "to" / "out", mixed)
            for line in fuzzed.lines():
                shutil.rmtree(case / "to", ignore_errors=True)
                (case / "to").mkdir(parents=True)
                found = list(problems(fuzzed, line, partial(_run_line, line, root, case / "to")))
                outcomes[f"{name} {line[0]}: {'failed' if found else 'held'}"] += 1
                failures += bool(found)
                for problem in found:
                    print(
                        f"{name}, seed {seed}, {label}: {' '.join(line)}\n  {problem}", flush=True
                    )
        if verbose:
            print(f"{name}: done", flush=True)
    for what, count in sorted(outcomes.items()):
        print(f"{count:6} {what}")
    print(f"{files} files, {sum(outcomes.values())} runs, {failures} failures")
    return failures


def _run_line(line: list[str], folder: Path, allowed: Path) -> tuple[int, str, str]:
    from dist_ema.cli import main

    return run(lambda: main(line), folder, allowed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every verb on damaged files.")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--minutes", type=float, help="look by coverage instead; needs atheris")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--keep", action="store_true", help="add what reaches new code to corpus/")
    options = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory)).resolve()
    try:
        in_child(partial(build, root / "good"))
        in_child(partial(mix, root))
        if options.minutes:
            return guide(options.targets, options.minutes, root, options.keep)
        preload()
        for name, target in TARGETS.items():
            if target.form in options.forms:
                in_child(partial(replay, name, root, 1 if options.files >= 100 else 5))
        return fuzz(root, options.files, options.seed, options.forms, options.verbose)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    sys.exit(bool(main()))
