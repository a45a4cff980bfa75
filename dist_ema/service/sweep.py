"""`sweep`: golden-section search for the best sigma_rel after training, by evaluations. No torch.

[Note: search]  The metric is taken as a function of log(sigma_rel) with one least value. Golden
section narrows it down with one evaluation a step: of two inner points the worse becomes an end.
Points whose means differ by less than twice their standard error cannot be told apart, and the
search ends there. The interval is at least what was left. A parabola through the nearest points
widens it, to where it has risen by twice the scatter of the points around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import atomic, disk, strict_json
from ..offline import plotting
from ..posthoc.snapshots import WARNED, Snapshots, reconstruct
from ..schedules import Power

__all__ = ["BEST", "STATE", "Candidate", "SweepReport", "expressible", "plot", "sweep"]

GOLDEN = (math.sqrt(5) - 1) / 2
NEAREST = 7  # points that the parabola goes through
STATE = "sweep.json"
BEST = "best"

Evaluate = Callable[[Path, float], float]


@dataclass(frozen=True)
class Candidate:
    """A width and its metric, once for each repeat."""

    sigma_rel: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean, 0 where there is one value."""
        return (
            float(np.std(self.values, ddof=1) / len(self.values) ** 0.5) if self.values[1:] else 0.0
        )


@dataclass(frozen=True)
class SweepReport:
    """The evaluated widths, the best one, and the interval of the least value."""

    candidates: list[Candidate]
    best: Candidate
    interval: tuple[float, float]
    at_the_edge: bool  # of the widths that were allowed

    def to_json(self) -> dict[str, Any]:
        return {
            "best": self.best.sigma_rel,
            "interval": list(self.interval),
            "at_the_edge": self.at_the_edge,
            "candidates": [
                {"sigma_rel": candidate.sigma_rel, "mean": candidate.mean, "error": candidate.error}
                | {"values": list(candidate.values)}
                for candidate in self.candidates
            ],
        }


def expressible(run: Snapshots, at: float | None = None) -> tuple[float, float]:
    """The narrowest and the widest average that the snapshots express well.

    Raises:
        ValueError: The snapshots express no width well.
    """
    fine = [
        sigma
        for sigma in map(float, np.geomspace(0.01, 0.28, 40))
        if run.fit(Power(sigma_rel=sigma), at).residual <= WARNED
    ]
    if not fine:
        raise ValueError(
            f"no width can be mixed from these snapshots within {WARNED:.0%}. Store more of them, "
            "or averages nearer to what you look for."
        )
    return fine[0], fine[-1]


def sweep(
    snapshots: str | Path,
    out: str | Path,
    evaluate: Evaluate,
    *,
    what: str = "",
    sign: int = 1,
    low: float | None = None,
    high: float | None = None,
    evaluations: int = 8,
    repeats: int = 1,
    at: float | None = None,
    dtype: str | None = None,
) -> SweepReport:
    """Find the best width, and write that average to out/best.

    What was evaluated before is taken from out/sweep.json, so an interrupted sweep goes on.

    Args:
        snapshots: The folder given to `ema.snapshot`.
        out: A folder.
        evaluate: Called with the folder of a candidate and its width; returns the metric.
        what: Which evaluation the values are of; a sweep goes on from its own alone.
        sign: 1 looks for the least value, -1 for the greatest.
        low: The narrowest average to try; None takes what the snapshots express.
        high: The widest.
        evaluations: How many widths to try at most.
        repeats: How often each is evaluated, where the metric is noisy.
        at: The clock of the moment, by default of the last snapshot.
        dtype: The dtype of floating weights, by default the model's own.

    Raises:
        ValueError: The widths are wrong, the snapshots express none, or an evaluation failed.
    """
    run, out = Snapshots(snapshots), Path(out)
    run.refuse_place(out / BEST)
    narrowest, widest = expressible(run, at)
    low, high = narrowest if low is None else low, widest if high is None else high
    if not 0 < low < high:
        raise ValueError(f"the narrowest width must be below the widest, got {low} and {high}.")
    moment = run.moment(at)
    origin = [what, str(Path(snapshots).absolute()), list(moment), dtype]
    write = partial(reconstruct, snapshots, at=moment[0], dtype=dtype, force=True)
    known = _read(out, origin)

    def rate(position: float) -> Candidate:
        """The candidate at log(sigma_rel), written, evaluated, recorded and removed."""
        # Rounded, so that a sweep that goes on finds it among what was evaluated.
        sigma = float(f"{math.exp(position):.4g}")
        place, values = out / f"candidate-{sigma:g}", known.get(sigma, ())
        if len(values) < repeats:
            write(place, sigma_rel=sigma)
            for _ in range(repeats - len(values)):
                known[sigma] = (*known.get(sigma, ()), evaluate(place, sigma))
                # After every value: an interrupted sweep repeats none.
                table = {str(width): list(candidate) for width, candidate in known.items()}
                disk.ensure(out)
                atomic.replace_file(
                    out / STATE, strict_json.dump({"origin": origin, "values": table})
                )
            disk.remove(place)
        return Candidate(sigma, known[sigma])

    limits = math.log(low), math.log(high)
    bracket, tried = _search(rate, *limits, evaluations, sign)
    best = min(tried, key=lambda candidate: sign * candidate.mean)
    write(out / BEST, sigma_rel=best.sigma_rel)
    return SweepReport(
        sorted(tried, key=lambda candidate: candidate.sigma_rel),
        best,
        _interval(tried, bracket, limits, sign),
        at_the_edge=bracket[0] == limits[0] or bracket[1] == limits[1],
    )


def _search(
    rate: Callable[[float], Candidate], low: float, high: float, evaluations: int, sign: int
) -> tuple[tuple[float, float], list[Candidate]]:
    """Returns what is left of the range, and what was tried ([Note: search])."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = rate(left), rate(right)
    tried = [at_left, at_right]
    while len(tried) < evaluations:
        # One of the two inner points of a step is an inner point of the next.
        apart = sign * (at_right.mean - at_left.mean)
        if apart == 0 or abs(apart) < 2 * math.hypot(at_left.error, at_right.error):
            break
        if apart > 0:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = rate(left)
            tried.append(at_left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = rate(right)
            tried.append(at_right)
    return (low, high), tried


def _interval(
    tried: Sequence[Candidate],
    bracket: tuple[float, float],
    limits: tuple[float, float],
    sign: int,
) -> tuple[float, float]:
    """Where the least value may lie ([Note: search])."""
    low, high = bracket
    best = min(tried, key=lambda candidate: sign * candidate.mean)
    distances = {
        abs(math.log(candidate.sigma_rel / best.sigma_rel)): candidate for candidate in tried
    }
    nearest = [distances[distance] for distance in sorted(distances)][:NEAREST]
    # A parabola goes through three points exactly, and leaves no scatter to measure.
    if len(nearest) > 3:
        x = np.log([candidate.sigma_rel for candidate in nearest])
        y = sign * np.array([candidate.mean for candidate in nearest])
        curve, slope, _ = fit = np.polyfit(x, y, 2)
        scatter = math.sqrt(np.square(y - np.polyval(fit, x)).sum() / (len(nearest) - 3))
        if curve > 0:
            least, half = -slope / (2 * curve), math.sqrt(2 * scatter / curve)
            low, high = min(low, least - half), max(high, least + half)
    return math.exp(max(low, limits[0])), math.exp(min(high, limits[1]))


def _read(out: Path, origin: list[Any]) -> dict[float, tuple[float, ...]]:
    path = out / STATE
    if not path.exists():
        return {}
    state = strict_json.read_json(path)
    if state.get("origin") != origin:
        raise ValueError(
            f"{path} holds another sweep, of {state.get('origin')}. Name another folder, or remove "
            "that file."
        )
    try:
        known = {float(sigma): tuple(map(float, x)) for sigma, x in state["values"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged. Remove it to begin the sweep anew.") from None
    return known


def plot(path: str, report: SweepReport, metric: str) -> None:
    """A PNG of the metric over the width, with the best and the interval."""
    with plotting.panels(path, 1) as (axes,):
        axes.axvspan(*report.interval, alpha=0.15, label="interval")
        axes.errorbar(
            [candidate.sigma_rel for candidate in report.candidates],
            [candidate.mean for candidate in report.candidates],
            [2 * candidate.error for candidate in report.candidates],
            marker="o",
        )
        axes.axvline(report.best.sigma_rel, color="C1", label=f"best, {report.best.sigma_rel:g}")
        axes.set(xlabel="sigma_rel", ylabel=metric, xscale="log")
        axes.legend()
