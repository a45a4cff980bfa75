"""`dist-ema reconstruct`: choose the decay after training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..text import printable
from .console import (
    CURVE,
    DTYPES,
    FINE,
    USAGE,
    WIDEST,
    WINDOW,
    Arguments,
    add_arguments,
    columns,
    number,
    progress,
    say,
    show,
    window_of,
    writing,
)

if TYPE_CHECKING:
    from ..posthoc.report import ReconstructReport

__all__ = ["ARGUMENTS", "TEXT", "add_groups", "run"]

TEXT = """\
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
"""
_WORDS = """
residual   how much of the wanted profile is missed; the weights are off by far less
condition  of the stored profiles: how many digits their similarity costs
gain       what rounding in the stored weights is multiplied by"""
MAX_SWEEP = 1000  # models
_sigma = number(
    f"between 0 and {WIDEST:.4f} (the width of the plain mean)", lambda value: 0 < value < WIDEST
)
ARGUMENTS: Arguments = {
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
}


def add_groups(verb: argparse.ArgumentParser) -> None:
    widths: Arguments = {
        "--sigma-rel": {
            "type": _sigma,
            "metavar": "S",
            "help": "width of the average, between 0 and 0.2887",
        },
        "--sweep": {
            "type": _sweep,
            "metavar": "FROM:TO:STEP",
            "help": "one model for each width, under OUT",
        },
        "--curve": CURVE,
    }
    add_arguments(verb.add_mutually_exclusive_group(required=True), widths)


def _sweep(text: str) -> list[float]:
    if text.count(":") != 2:
        raise argparse.ArgumentTypeError(f"must be FROM:TO:STEP, like 0.03:0.15:0.01, got {text!r}")
    begin, end, width = text.split(":")
    first, last = _sigma(begin), _sigma(end)
    try:
        step = float(width)
        count = math.floor((last - first) / step + 1e-9) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count <= MAX_SWEEP:
        raise argparse.ArgumentTypeError(f"must go up in 1 to {MAX_SWEEP} steps, got {text!r}")
    return [round(first + i * step, 12) for i in range(count)]


def run(options: argparse.Namespace) -> int:
    from ..posthoc import report as offline
    from ..schedules import Power

    if options.sweep and options.out and options.out.endswith(".safetensors"):
        return say(
            f"--sweep writes several models: OUT must be a folder, got {options.out}.", USAGE
        )
    window, widths = window_of(options), options.sweep or [options.sigma_rel]
    report = offline.reconstruct(
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
    show(options, report.to_json(), _text(options.snapshots, report))
    for warning in _warnings(report):
        say(warning, FINE)
    return FINE


def _text(where: str, report: ReconstructReport) -> Iterator[str]:
    run = report.snapshots
    kinds = sorted({repr(each.profile.schedule) for each in run.stored})
    moments = [each.profile.now for each in run.stored]
    yield printable(
        f"{where}: {len(run.stored)} stored averages, {len(set(moments))} moments from "
        f"{moments[0]:g} to {moments[-1]:g}"
    )
    yield from (printable(f"  {kind}") for kind in kinds)
    yield f"mixed as of {report.at[0]:g}, after {report.at[1]:,} updates; weights sum to 1"
    yield ""
    rows = [
        (
            each.name,
            f"{each.fit.residual:.2%}",
            f"{each.fit.condition:.3g}",
            f"{each.fit.largest:.3f}",
            f"{each.fit.gain:.3f}",
            str(each.out or "-"),
        )
        for each in report.mixtures
    ]
    yield from columns(
        [("target", "residual", "condition", "largest", "gain", "written to"), *rows]
    )
    yield _WORDS


def _warnings(report: ReconstructReport) -> Iterator[str]:
    poor = [f"{each.name} ({each.fit.residual:.1%})" for each in report.mixtures if each.poor]
    kind = "sigma_rel " if hasattr(report.mixtures[0].target, "sigma_rel") else ""
    if poor:
        yield (
            f"the snapshots do not express {kind}{', '.join(poor)} well: the mixture is "
            "another profile by that much. More snapshots, or stored profiles nearer to it, would."
        )
    if report.snapshots.skipped:
        yield (
            f"up to {report.snapshots.skipped} updates were refused by the device (skipped steps), "
            "and profiles count them as made, so they are off by about that share."
        )
