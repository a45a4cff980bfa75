"""Sentences that follow from the numbers: what was published, what came out here, and whether the two agree. No torch.

A difference counts if it is more than two standard errors, over the seeds and seed by seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .results import Estimate, Results, churn, fluctuation, paired
from .sizes import HEADLINE, NOISES

__all__ = ["AVERAGE", "LIVE", "Verdict", "final", "of_distillation", "of_language", "of_resolution", "of_table", "why"]

LIVE, AVERAGE = "live/own", f"{HEADLINE}/recalibrated"
Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """published: what others saw. here: what came out. agrees: None where there are too few seeds to say."""

    published: str
    here: str
    agrees: bool | None

    @staticmethod
    def by(published: str, here: str, estimate: Estimate) -> Verdict:
        return Verdict(published, here, None if math.isnan(estimate.error) else estimate.beyond)

    @property
    def word(self) -> str:
        return {True: "agrees", False: "does not agree", None: "too few seeds to say"}[self.agrees]


def final(cells: Cells, name: str) -> list[float]:
    """Accuracy after the last epoch, by seed."""
    return [cell["rows"][-1]["accuracy"][name] for cell in cells]


def steadiness(cells: Cells, name: str) -> list[float]:
    return [fluctuation(cell, name) for cell in cells]


def gain(cells: Cells) -> Estimate:
    return paired(final(cells, AVERAGE), final(cells, LIVE))


def calm(cells: Cells) -> Estimate:
    """By how much the average fluctuates less."""
    return paired(steadiness(cells, LIVE), steadiness(cells, AVERAGE))


def agreement(cells: Cells) -> Estimate:
    """By how much the predictions of two seeds differ less. The two errors are added as if they were independent."""
    (live, one), (average, two) = churn(cells, LIVE), churn(cells, AVERAGE)
    return Estimate(live - average, math.hypot(one, two))


def of_table(results: Results) -> list[Verdict]:
    by_noise = {noise: results.of("table", f"{noise}") for noise in NOISES}
    clean, worst = by_noise[NOISES[0]], by_noise[NOISES[-1]]
    found = []
    text = "With wrong labels the average is better (CIFAR-100N: 55.5 to 65.2 %)"
    for noise in NOISES[1:]:
        here = gain(by_noise[noise])
        found.append(Verdict.by(text, f"{noise} % wrong: {here.points()} points", here))
    here = gain(clean)
    text = "With clean labels it is better, by less (CIFAR-100, ResNet-18: 77.6 to 78.6 %)"
    found.append(Verdict.by(text, f"{here.points()} points", here))
    grows = paired(_gains(worst), _gains(clean))
    text = "The gain grows with the share of wrong labels"
    found.append(Verdict.by(text, f"from clean to {NOISES[-1]} % wrong by {grows.points()} points", grows))
    for noise, cells in by_noise.items():
        here = calm(cells)
        text = "The average's accuracy changes less from epoch to epoch"
        found.append(
            Verdict.by(text, f"{noise} % wrong, std of the change, live minus average: {here.points()} points", here)
        )
    here = agreement(clean)
    text = "Two seeds predict alike more often (CIFAR-100: churn 18.8 to 11.7 %)"
    found.append(Verdict.by(text, f"clean, churn of live minus that of the average: {here.points()} points", here))
    here = paired(final(clean, "0.999/recalibrated"), final(clean, "0.999/copied"))
    text = "Large decays fail unless BatchNorm statistics are recomputed"
    found.append(Verdict.by(text, f"decay 0.999, recomputed against copied from live: {here.points()} points", here))
    return found


def _gains(cells: Cells) -> list[float]:
    return [a - b for a, b in zip(final(cells, AVERAGE), final(cells, LIVE), strict=True)]


def why(results: Results) -> list[str]:
    """What the gain is made of, noise by noise, and what it is worth beside a decayed learning rate."""
    lines = []
    for noise in NOISES:
        cells, cosine = results.of("table", f"{noise}"), results.of("table", f"{noise}-cosine")
        whole, fresh = gain(cells), paired(final(cells, "live/recalibrated"), final(cells, LIVE))
        rest = paired(final(cells, AVERAGE), final(cells, "live/recalibrated"))
        best = max((LIVE, "live/recalibrated"), key=lambda name: fmean(final(cosine, name)))
        beside = paired(final(cells, AVERAGE), final(cosine, best))
        verdict = _beside(beside)
        lines.append(
            f"**{noise} % wrong labels**: of {whole.points()} points, {fresh.points()} come from fresh BatchNorm statistics, "
            f"which live weights can have too, and {rest.points()} from averaging the weights. A second run whose learning "
            f"rate falls to 0 (cosine, with the better of its two kinds of statistics) ends {verdict}."
        )
        if not (whole.beyond and calm(cells).beyond):
            lines.append(_shortfall(noise, whole, calm(cells), results))
    return lines


def _beside(beside: Estimate) -> str:
    if beside.beyond:
        return f"behind the average, by {beside.points()[1:]} points"
    if Estimate(-beside.mean, beside.error).beyond:
        return f"ahead of the average, by {Estimate(-beside.mean, beside.error).points()[1:]} points"
    return f"level with it: the average is {beside.points()} points away, which is within two standard errors"


def _shortfall(noise: int, whole: Estimate, calmer: Estimate, results: Results) -> str:
    image, steps = 100 / results.size.tests, results.size.epochs * results.size.steps_per_epoch
    lacks = " and ".join(name for name, each in (("accuracy", whole), ("fluctuation", calmer)) if not each.beyond)
    return (
        f"At {noise} % the average does **not** beat live by more than two standard errors in {lacks}. One test image "
        f"is {image:.2f} points and there are {results.size.seeds} seeds, so this study sees differences above about "
        f"{200 * max(whole.error, calmer.error):.1f} points; a run of {steps} steps is {steps * (1 - HEADLINE):.0f} windows "
        f"of decay {HEADLINE} long."
    )


def of_language(cell: dict[str, Any]) -> list[Verdict]:
    """At each end of a branch: the share of the gap between live and decayed that the best average closes."""
    found = []
    text = "An average of a constant learning rate comes close to a run that decays it (Hägele et al. 2024)"
    for end, rows in cell["branches"].items():
        row = next(each for each in cell["rows"] if each["step"] == int(end))
        best = min((name for name in row if name.startswith("window")), key=lambda name: row[name])
        decayed, gap = rows[-1]["live"], row["live"] - rows[-1]["live"]
        closed = (row["live"] - row[best]) / gap if gap > 0 else 0.0
        share = f"{closed:.0%} of the gap" if gap > 0 else "no gap, as decaying did not help"
        here = f"step {end}: live {row['live']:.3f}, {best} {row[best]:.3f}, decayed {decayed:.3f}: {share}"
        found.append(Verdict(text, here, closed >= 0.5))
    return found


def of_distillation(cells: Cells) -> list[Verdict]:
    found = []
    for name, text in (
        ("student + soft targets", "Soft targets help a small student (Hinton et al. 2015)"),
        ("mean teacher", "So does its own average as a teacher (Tarvainen & Valpola 2017)"),
    ):
        for kind in ("live", "average"):
            here = paired([cell[name][kind] for cell in cells], [cell["student alone"][kind] for cell in cells])
            found.append(Verdict.by(text, f"{kind} weights: {here.points()} points", here))
    return found


def of_resolution(cells: Cells, trained: int) -> list[Verdict]:
    def at(side: int, way: str) -> list[float]:
        return [next(row for row in cell["rows"] if row["side"] == side)[way] for cell in cells]

    sides = [row["side"] for row in cells[0]["rows"]]
    larger = max((side for side in sides if side > trained), key=lambda side: fmean(at(side, "as trained")))
    here = paired(at(larger, "as trained"), at(trained, "as trained"))
    text = "Without fine-tuning, a test resolution above that of training is best"
    found = [Verdict.by(text, f"side {larger} against {trained}: {here.points()} points", here)]
    best = max(sides, key=lambda side: fmean(at(side, "fine-tuned")))
    here = paired(at(best, "fine-tuned"), at(best, "as trained"))
    text = "Fine-tuning classifier and last norm at the resolution of the test helps"
    found.append(Verdict.by(text, f"side {best}, the best: {here.points()} points", here))
    here = paired(at(larger, "fine-tuned"), at(trained, "as trained"))
    text = "Fine-tuned, the larger resolution beats that of training as it was"
    found.append(Verdict.by(text, f"side {larger} against {trained}: {here.points()} points", here))
    return found
