"""`python -m tests.faults`: a table of what came of the faults and of losing power."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from . import shim

if TYPE_CHECKING:
    from .power import Loss
    from .walk import Walk

STRIDE = 37  # prime to the number of kinds, so that a short walk meets all of them
STATES = 6  # after a power loss, that a short walk reads
PEERS = ("dcp.save over", "torch.save over", "safetensors save_file over")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every fault at every operation")
    parser.add_argument("--peers", action="store_true", help="dcp.save, torch.save, save_file too")
    parser.add_argument("--only", default="", help="verbs whose name holds this text")
    parser.add_argument("--folder", type=Path, help="on the file system to test")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="list all findings")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    if shim.loaded():
        return run(options)
    if reason := shim.why_not():
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = shim.build(Path(folder))
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.faults", *words]
        return subprocess.run(command, env=environment).returncode


def run(options: argparse.Namespace) -> int:
    """Walk, lose power, and print each verb as it ends.

    Returns 1 where anything was found in a verb of dist_ema.
    """
    from .power import Loss, lose_power
    from .verbs import ema_cases
    from .walk import report, walk

    logging.disable()  # errors are expected
    warnings.simplefilter("ignore")
    gc.freeze()  # what is imported need not be looked at in every collection
    default = "/dev/shm" if os.path.isdir("/dev/shm") else None
    results = []
    stride, limit = (1, None) if options.all else (STRIDE, STATES)
    with tempfile.TemporaryDirectory(dir=options.folder or default) as name:
        folder = Path(os.path.realpath(name))
        cases = ema_cases(folder / "sources")
        if options.peers:
            from .peers import peer_cases

            cases += peer_cases()
        for case in cases:
            if options.only in case.name:
                walked = walk(case, folder / case.name / "walk", stride=stride)
                report(str(walked))
                loss = lose_power(case, folder / case.name / "power", limit=limit)
                report(f"{case.name}: {loss}")
                results.append((walked, loss))
        if options.only in "reads":
            from .reads import reading_walks

            walks = reading_walks(folder / "sources", folder / "out", stride)
            results += [(each, Loss()) for each in walks]
        from .ranks import walk_on_ranks

        results += walk_on_ranks(folder / "ranks", stride, limit, options.only)
    if options.json:
        print(json.dumps([dataclasses.asdict(a) | dataclasses.asdict(b) for a, b in results]))
    else:
        print_table(results, options.verbose)
    own = [(walked, loss) for walked, loss in results if walked.case not in PEERS]
    return int(any(walked.findings or loss.lost for walked, loss in own))


def print_table(results: list[tuple[Walk, Loss]], verbose: bool) -> None:
    from .walk import KINDS_OF_FINDINGS

    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("verb")
    for column in ("operations", "faults", *KINDS_OF_FINDINGS, "states", "power"):
        table.add_column(column, justify="right")
    for walked, loss in results:
        numbers = [walked.operations, walked.faults, *map(walked.count, KINDS_OF_FINDINGS)]
        table.add_row(walked.case, *map(str, [*numbers, loss.states, len(loss.lost)]))
    out.print(table)
    for kind, meaning in KINDS_OF_FINDINGS.items():
        out.print(f"{kind:<10} {meaning}")
    out.print(f"{'states':<10} different contents of the disk after power was lost")
    out.print(f"{'power':<10} states that hold no whole version, or after the return the old one")
    for walked, loss in results if verbose else []:
        texts = [*map(str, walked.findings), *(f"power: {text}" for text in loss.lost)]
        for text in texts:
            out.print(f"{walked.case}: {text}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
