"""`dist-ema sweep`: which decay is best, after training."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import printable
from .console import DTYPES, FINE, JSON, WIDEST, Arguments, columns, number, say, show

if TYPE_CHECKING:
    from ..service.sweep import SweepReport

__all__ = ["ARGUMENTS", "TEXT", "run"]

TEXT = """\
which decay is best, after training: reconstruct averages, evaluate them, narrow it down

Mix averages of several widths from what ema.snapshot(folder, every=...) stored, run a command for
each, and search for the width with the best metric by golden section: 8 evaluations find it within
a few percent. The command prints JSON on its last line, like {"loss": 0.31}; {path} and {sigma_rel}
in it are replaced. Say --repeats 3 where the metric is noisy. The best average is written to
OUT/best. An interrupted sweep goes on from OUT/sweep.json.

examples:
  dist-ema sweep run/snapshots out --eval 'python eval.py {path}' --metric loss
  dist-ema sweep run/snapshots out --eval 'python eval.py {path}' --metric accuracy --mode max
  dist-ema sweep run/snapshots out --eval 'sh eval.sh {path}' --metric loss --from 0.05 --to 0.2
"""
_sigma = number(f"between 0 and {WIDEST:.4f}", lambda value: 0 < value < WIDEST)
ARGUMENTS: Arguments = {
    "snapshots": {"metavar": "SNAPSHOTS", "help": "the folder given to ema.snapshot"},
    "out": {"metavar": "OUT", "help": "a folder: candidates, sweep.json, and the best"},
    "--eval": {"metavar": "COMMAND", "required": True, "help": "a shell command"},
    "--metric": {"metavar": "NAME", "required": True, "help": "of its last line of JSON"},
    "--mode": {
        "choices": ("min", "max"),
        "default": "min",
        "help": "which value is best (default min)",
    },
    "--from": {
        "type": _sigma,
        "dest": "low",
        "metavar": "S",
        "help": "the narrowest width (default: what the snapshots express)",
    },
    "--to": {"type": _sigma, "dest": "high", "metavar": "S", "help": "the widest"},
    "--evaluations": {
        "type": number("a whole number from 2", lambda value: value >= 2, parse=int),
        "default": 8,
        "metavar": "N",
        "help": "widths to try at most (default 8)",
    },
    "--repeats": {
        "type": number("a whole number from 1", lambda value: value >= 1, parse=int),
        "default": 1,
        "metavar": "N",
        "help": "evaluations of each width (default 1)",
    },
    "--at": {"type": float, "metavar": "CLOCK", "help": "of the moment; default: the last"},
    "--dtype": {
        "choices": DTYPES,
        "metavar": "TYPE",
        "help": "of floating weights: bf16, fp16, fp32 or fp64 (default: the model's own)",
    },
    "--plot": {"metavar": "PNG", "help": "the metric over the width, and the interval"},
    **JSON,
}


def run(options: argparse.Namespace) -> int:
    from ..offline import plotting
    from ..service import sweep

    if options.plot:
        plotting.refuse(options.plot)
    found = sweep.sweep(
        options.snapshots,
        options.out,
        partial(_evaluate, options.eval, options.metric),
        what=f"{options.metric} of {options.eval}",
        sign=-1 if options.mode == "max" else 1,
        low=options.low,
        high=options.high,
        evaluations=options.evaluations,
        repeats=options.repeats,
        at=options.at,
        dtype=DTYPES.get(options.dtype),
    )
    show(options, found.to_json(), _text(options.out, options.metric, found))
    if found.at_the_edge:
        say("the best lies at the edge of the widths: --from and --to allow others.", FINE)
    if options.plot:
        sweep.plot(options.plot, found, options.metric)
    return FINE


def _evaluate(command: str, metric: str, path: Path, sigma: float) -> float:
    from ..service.watch import run_shell

    outcome = run_shell(command, {"path": path, "sigma_rel": sigma})
    if metric not in outcome.metrics:
        raise ValueError(
            f"the command gave no {metric!r} for sigma_rel {sigma:g}: "
            f"{outcome.error or outcome.metrics or 'its output has no line of JSON'}."
        )
    return outcome.metrics[metric]


def _text(where: str, metric: str, found: SweepReport) -> Iterator[str]:
    rows = [
        (
            f"{each.sigma_rel:g}" + (" best" if each is found.best else ""),
            f"{each.mean:g}",
            f"{each.error:.2g}" if each.values[1:] else "-",
        )
        for each in found.candidates
    ]
    yield from columns([("sigma_rel", metric, "error"), *rows])
    low, high = found.interval
    yield printable(
        f"best: sigma_rel {found.best.sigma_rel:g} in {where}/best; the least value lies between "
        f"{low:.3g} and {high:.3g}"
    )
