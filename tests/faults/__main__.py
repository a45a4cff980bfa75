"""`python -m tests.faults`: a table of what came of the faults."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from . import shim


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every fault at every operation")
    parser.add_argument("--only", default="", help="verbs whose name holds this text")
    parser.add_argument("--folder", type=Path, help="on the file system to test")
    parser.add_argument("-v", "--verbose", action="store_true", help="list what was found")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    if not shim.loaded():
        return preload(words)
    return run(options)


def preload(words: list[str]) -> int:
    """Start this command again with the shim in it."""
    if reason := shim.why_not():
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = shim.build(Path(folder))
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults", *words]
        return subprocess.run(command, env=environment).returncode


def run(options: argparse.Namespace) -> int:
    from .verbs import ema_cases
    from .walk import walk

    logging.getLogger("dist_ema").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    default = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=options.folder or default) as name:
        folder = Path(os.path.realpath(name))
        for case in ema_cases(folder / "sources"):
            if options.only not in case.name:
                continue
            found = walk(case, folder / case.name, stride=1 if options.all else 7)
            print(found.case, found.operations, found.faults, *sorted({f.kind for f in found.findings}), flush=True)
            for finding in found.findings if options.verbose else []:
                print("   ", finding)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
