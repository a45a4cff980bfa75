"""`dist-ema reconstruct` and `sweep`: options, and tables of widths, residuals and metrics."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural, printable
from .console import (
    CURVE,
    DTYPES,
    FINE,
    JSON,
    MODE,
    USAGE,
    WIDEST,
    WINDOW,
    Verb,
    columns,
    number,
    progress,
    say,
    show,
    whole_from,
    window_of,
    writing,
)

if TYPE_CHECKING:
    from ..posthoc.mixtures import ReconstructReport
    from ..service.sweep import SweepReport

__all__ = ["RECONSTRUCT", "SWEEP"]

# --- reconstruct ----------------------------------------------------------------------------------


_WORDS = """
residual   how much of the wanted profile is missed; the weights are off by far less
condition  of the stored profiles: how many digits their similarity costs
gain       what rounding in the stored weights is multiplied by"""
MAX_SWEEP = 1000  # models
_sigma = number(
    f"between 0 and {WIDEST:.4f} (the width of the plain mean)", lambda value: 0 < value < WIDEST
)


def _widths(text: str) -> list[float]:
    if text.count(":") != 2:
        raise argparse.ArgumentTypeError(f"must be FROM:TO:STEP, like 0.03:0.15:0.01, got {text!r}")
    begin, end, width = text.split(":")
    first, last = _sigma(begin), _sigma(end)
    try:
        step = float(width)
        # The last width counts, although its division may round down.
        count = math.floor((last - first) / step + 1e-9) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count <= MAX_SWEEP:
        raise argparse.ArgumentTypeError(f"must go up in 1 to {MAX_SWEEP} steps, got {text!r}")
    # Rounded, because 0.05 + 2 * 0.05 is not 0.15 in floats, and folders are named after it.
    return [round(first + i * step, 12) for i in range(count)]


def _reconstruct(options: argparse.Namespace) -> int:
    from ..posthoc import mixtures
    from ..schedules import Power

    if options.sweep and options.out and options.out.endswith(".safetensors"):
        return say(
            f"--sweep writes several models: OUT must be a folder, got {options.out}.", USAGE
        )
    window, widths = window_of(options), options.sweep or [options.sigma_rel]
    report = mixtures.reconstruct(
        options.snapshots,
        options.out,
        [window] if window else [Power(sigma_rel=sigma) for sigma in widths],
        folders=bool(options.sweep),
        at=options.at,
        dtype=DTYPES.get(options.dtype),
        max_shard_size=options.max_shard_size,
        force=options.force,
        plot=options.plot,
        progress=progress,
    )
    show(options, report.to_json(), _text_of_reconstruct(options.snapshots, report))
    _warn(report)
    return FINE


def _text_of_reconstruct(where: str, report: ReconstructReport) -> Iterator[str]:
    profiles = [average.profile for average in report.snapshots.stored]
    yield printable(
        f"{where}: {len(profiles)} stored averages, {len({p.now for p in profiles})} moments from "
        f"{profiles[0].now:g} to {profiles[-1].now:g}"
    )
    yield from (printable(f"  {text}") for text in sorted({repr(p.schedule) for p in profiles}))
    updates = plural(report.at[1], "update")
    yield f"mixed as of {report.at[0]:g}, after {updates}; weights sum to 1"
    yield ""
    rows = [
        (
            mixture.name,
            f"{mixture.fit.residual:.2%}",
            f"{mixture.fit.condition:.3g}",
            f"{mixture.fit.largest:.3f}",
            f"{mixture.fit.gain:.3f}",
            str(mixture.out or "-"),
        )
        for mixture in report.mixtures
    ]
    yield from columns(
        [("target", "residual", "condition", "largest", "gain", "written to"), *rows]
    )
    yield _WORDS


def _warn(report: ReconstructReport) -> None:
    """What a mixture is not, on stderr: the exit code stays."""
    poor = [f"{mix.name} ({mix.fit.residual:.1%})" for mix in report.mixtures if mix.poor]
    if poor:
        names_a_width = hasattr(report.mixtures[0].target, "sigma_rel")
        say(
            f"the snapshots do not express {'sigma_rel ' * names_a_width}{', '.join(poor)} well: "
            "the mixture is another profile by that much. More snapshots, or stored profiles "
            "nearer to it, would.",
            FINE,
        )
    if report.snapshots.skipped:
        say(
            f"up to {report.snapshots.skipped} updates were refused by the device (skipped steps), "
            "and profiles count them as made, so they are off by about that share.",
            FINE,
        )


RECONSTRUCT = Verb(
    "reconstruct",
    """\
choose the decay after training: mix stored snapshots into an average that was not tracked

Mix the averages that ema.snapshot(folder, every=...) stored into the one that Power(sigma_rel=S)
would have tracked (post-hoc EMA, Karras et al. 2023). The weights follow from the clocks and
schedules in ema.json; no training data and no GPU are needed. sigma_rel is the width of the average
as a share of the training so far. Or mix them into a virtual cooldown: every update of the last
--window units of the clock, weighted by the decay of a learning rate (WSM, arXiv 2507.17634).

examples:
  dist-ema reconstruct run/snapshots out --sigma-rel 0.07
  dist-ema reconstruct run/snapshots out --sigma-rel 0.07 --at 50000       as of an earlier step
  dist-ema reconstruct run/snapshots out --sweep 0.03:0.15:0.01            out/sigma-0.030 ...
  dist-ema reconstruct run/snapshots --sweep 0.03:0.25:0.02 --plot fit.png  only report
  dist-ema reconstruct run/snapshots out --curve linear --window 5000
""",
    {
        "snapshots": {"metavar": "SNAPSHOTS", "help": "the folder given to ema.snapshot"},
        "out": {
            "metavar": "OUT",
            "nargs": "?",
            "help": "folder to write, or a name ending in .safetensors; none: only report",
        },
        "--at": {
            "type": float,
            "metavar": "CLOCK",
            "help": "steps (images, tokens) that the ema counted; default: the last",
        },
        "--plot": {
            "metavar": "PNG",
            "help": "target and mixture, and the residual (needs matplotlib)",
        },
        **WINDOW,
        **writing("the model's own"),
    },
    _reconstruct,
    one_of={
        "--sigma-rel": {
            "type": _sigma,
            "metavar": "S",
            "help": "width of the average, between 0 and 0.2887",
        },
        "--sweep": {
            "type": _widths,
            "metavar": "FROM:TO:STEP",
            "help": "one model for each width, under OUT",
        },
        "--curve": CURVE,
    },
    one_is_required=True,
)


# --- sweep ----------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace) -> int:
    from ..offline import plotting
    from ..service import sweep

    if options.plot:
        plotting.refuse(options.plot)
    report = sweep.sweep(
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
    show(options, report.to_json(), _text_of_sweep(options.out, options.metric, report))
    if report.at_the_edge:
        say("the best lies at the edge of the widths: --from and --to allow others.", FINE)
    if options.plot:
        sweep.plot(options.plot, report, options.metric)
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


def _text_of_sweep(where: str, metric: str, report: SweepReport) -> Iterator[str]:
    rows = [
        (
            f"{candidate.sigma_rel:g}" + (" best" if candidate is report.best else ""),
            f"{candidate.mean:g}",
            f"{candidate.error:.2g}" if candidate.values[1:] else "-",
        )
        for candidate in report.candidates
    ]
    yield from columns([("sigma_rel", metric, "error"), *rows])
    low, high = report.interval
    yield printable(
        f"best: sigma_rel {report.best.sigma_rel:g} in {where}/best; the least value lies between "
        f"{low:.3g} and {high:.3g}"
    )


SWEEP = Verb(
    "sweep",
    """\
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
""",
    {
        "snapshots": {"metavar": "SNAPSHOTS", "help": "the folder given to ema.snapshot"},
        "out": {"metavar": "OUT", "help": "a folder: candidates, sweep.json, and the best"},
        "--eval": {"metavar": "COMMAND", "required": True, "help": "a shell command"},
        "--metric": {"metavar": "NAME", "required": True, "help": "of its last line of JSON"},
        **MODE,
        "--from": {
            "type": _sigma,
            "dest": "low",
            "metavar": "S",
            "help": "the narrowest width (default: what the snapshots express)",
        },
        "--to": {"type": _sigma, "dest": "high", "metavar": "S", "help": "the widest"},
        "--evaluations": {
            "type": whole_from(2),
            "default": 8,
            "metavar": "N",
            "help": "widths to try at most (default 8)",
        },
        "--repeats": {
            "type": whole_from(1),
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
    },
    _sweep,
)
