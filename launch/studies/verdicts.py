"""Sentences that follow from the numbers: what was published, what came out here, and whether the
two agree. No torch.

A difference counts if it is more than two standard errors, over the seeds and seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .results import Estimate, Results, calmer, fluctuation, paired
from .sizes import HEADLINE, NOISES

__all__ = [
    "AVERAGE",
    "LIVE",
    "Verdict",
    "final",
    "lasting",
    "of_distillation",
    "of_language",
    "of_resolution",
    "of_table",
    "why",
]

AGREES, DISAGREES = "agrees", "does not agree"
LIVE, AVERAGE = "live/own", f"{HEADLINE}/recalibrated"
Cells = list[dict[str, Any]]
Measure = Callable[[Cells, str], list[float]]


@dataclass(frozen=True)
class Verdict:
    """published: what others saw. here: what came out. word: whether the two agree."""

    published: str
    here: str
    word: str

    @staticmethod
    def by(published: str, here: str, estimate: Estimate) -> Verdict:
        word = AGREES if estimate.beyond else f"{DISAGREES}: within two standard errors"
        if Estimate(-estimate.mean, estimate.error).beyond:
            word = f"{DISAGREES}: the opposite"
        return Verdict(
            published, here, "too few seeds to say" if math.isnan(estimate.error) else word
        )

    @property
    def agrees(self) -> bool:
        return self.word == AGREES


def final(cells: Cells, name: str) -> list[float]:
    """Accuracy after the last epoch, by seed."""
    return [cell["rows"][-1]["accuracy"][name] for cell in cells]


def lasting(cells: Cells, name: str) -> list[float]:
    """Mean accuracy over the epochs of the last quarter, by seed: the expected end of a run."""
    return [
        fmean(row["accuracy"][name] for row in cell["rows"] if row["epoch"] > cell["late"])
        for cell in cells
    ]


def steadiness(cells: Cells, name: str) -> list[float]:
    return [fluctuation(cell, name) for cell in cells]


def gain(cells: Cells, measure: Measure = final) -> Estimate:
    return paired(measure(cells, AVERAGE), measure(cells, LIVE))


MEASURES: dict[Measure, str] = {final: "last epoch", lasting: "last quarter"}


def calm(cells: Cells) -> Estimate:
    """By how much the average fluctuates less."""
    return paired(steadiness(cells, LIVE), steadiness(cells, AVERAGE))


def of_table(results: Results) -> list[Verdict]:
    by_noise = {noise: results.of("table", f"{noise}") for noise in NOISES}
    clean, worst = by_noise[NOISES[0]], by_noise[NOISES[-1]]
    found = []
    text = "With wrong labels the average is better (CIFAR-100N: 55.5 to 65.2 %)"
    for noise in NOISES[1:]:
        for measure, when in MEASURES.items():
            here = gain(by_noise[noise], measure)
            found.append(Verdict.by(text, f"{noise} % wrong, {when}: {here.points()} points", here))
    text = "With clean labels it is better, by less (CIFAR-100, ResNet-18: 77.6 to 78.6 %)"
    for measure, when in MEASURES.items():
        here = gain(clean, measure)
        found.append(Verdict.by(text, f"{when}: {here.points()} points", here))
    text = "The gain grows with the share of wrong labels"
    for measure, when in MEASURES.items():
        here = paired(_gains(worst, measure), _gains(clean, measure))
        found.append(
            Verdict.by(
                text, f"from clean to {NOISES[-1]} % wrong, {when}: {here.points()} points", here
            )
        )
    text = "The average's accuracy changes less from epoch to epoch"
    for noise, cells in by_noise.items():
        here = calm(cells)
        said = f"{noise} % wrong, std of the change, live minus average: {here.points()} points"
        found.append(Verdict.by(text, said, here))
    text = "Two seeds predict alike more often (CIFAR-100: churn 18.8 to 11.7 %)"
    for noise, cells in by_noise.items():
        here = calmer(cells, AVERAGE, LIVE)
        said = f"{noise} % wrong, churn, live minus average: {here.points()} points"
        found.append(Verdict.by(text, said, here))
    here = paired(final(clean, "0.999/recalibrated"), final(clean, "0.999/copied"))
    text = "Large decays fail unless BatchNorm statistics are recomputed"
    found.append(
        Verdict.by(
            text, f"decay 0.999, recomputed against copied from live: {here.points()} points", here
        )
    )
    return found


def _gains(cells: Cells, measure: Measure) -> list[float]:
    return [a - b for a, b in zip(measure(cells, AVERAGE), measure(cells, LIVE), strict=True)]


def why(results: Results) -> list[str]:
    """What the gain is made of at each noise, and its worth beside a decayed learning rate."""
    lines = []
    for noise in NOISES:
        cells, cosine = results.of("table", f"{noise}"), results.of("table", f"{noise}-cosine")
        whole = gain(cells, lasting)
        fresh = paired(lasting(cells, "live/recalibrated"), lasting(cells, LIVE))
        rest = paired(lasting(cells, AVERAGE), lasting(cells, "live/recalibrated"))
        best = max((LIVE, "live/recalibrated"), key=lambda name: fmean(final(cosine, name)))
        beside = paired(final(cells, AVERAGE), final(cosine, best))
        lines.append(
            f"**{noise} % wrong labels**: of {whole.points()} points in the last quarter, "
            f"{fresh.points()} come from fresh BatchNorm statistics, which live weights can have "
            f"too, and {rest.points()} from averaging the weights. A second run whose learning "
            f"rate falls to 0 (cosine, with the better of its two kinds of statistics) ends "
            f"{_beside(beside)}."
        )
        if not (gain(cells).beyond and calm(cells).beyond):
            lines.append(_shortfall(noise, cells))
    return lines


def _beside(beside: Estimate) -> str:
    if beside.beyond:
        return f"behind the average, by {beside.points()[1:]} points"
    if Estimate(-beside.mean, beside.error).beyond:
        return (
            f"ahead of the average, by {Estimate(-beside.mean, beside.error).points()[1:]} points"
        )
    away = f"the average is {beside.points()} points away"
    return f"level with it: {away}, which is within two standard errors"


def _shortfall(noise: int, cells: Cells) -> str:
    """Which of the two is missing, and what the luck of the last epoch has to do with it."""
    lacks = [
        name
        for name, each in (("accuracy", gain(cells)), ("fluctuation", calm(cells)))
        if not each.beyond
    ]
    jumps, steady = fmean(steadiness(cells, LIVE)), gain(cells, lasting)
    live, average = (_range(final(cells, name)) for name in (LIVE, AVERAGE))
    verdict = "more than" if steady.beyond else "not more than"
    return (
        f"At {noise} % the average does **not** beat live by more than two standard errors in "
        f"{' and '.join(lacks)} after the last epoch. Why: live accuracy changes by "
        f"{100 * jumps:.1f} points (standard deviation) from one epoch to the next, so the last "
        f"one is a matter of luck: over {len(cells)} seeds it is {live} %, that of the average "
        f"{average} %. In the mean of the last quarter the average is {steady.points()} points "
        f"ahead, {verdict} two standard errors."
    )


def _range(values: list[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}"


def of_language(cell: dict[str, Any]) -> list[Verdict]:
    """At each end of a branch: the share of live's gap to decayed that the best average closes."""
    found = []
    text = (
        "An average of a constant learning rate comes close to a run that decays it "
        "(Hägele et al. 2024)"
    )
    for end, rows in cell["branches"].items():
        row = next(each for each in cell["rows"] if each["step"] == int(end))
        best = min((name for name in row if name.startswith("window")), key=lambda name: row[name])
        decayed, gap = rows[-1]["live"], row["live"] - rows[-1]["live"]
        closed = (row["live"] - row[best]) / gap if gap > 0 else 0.0
        share = f"{closed:.0%} of the gap" if gap > 0 else "no gap, as decaying did not help"
        losses = f"live {row['live']:.3f}, {best} {row[best]:.3f}, decayed {decayed:.3f}"
        here = f"step {end}: {losses}: {share}"
        found.append(Verdict(text, here, AGREES if closed >= 0.5 else DISAGREES))
    return found


def of_distillation(cells: Cells) -> list[Verdict]:
    found = []
    for name, text in (
        ("student + soft targets", "Soft targets help a small student (Hinton et al. 2015)"),
        ("mean teacher", "So does its own average as a teacher (Tarvainen & Valpola 2017)"),
    ):
        for kind in ("live", "average"):
            here = paired(
                [cell[name][kind] for cell in cells],
                [cell["student alone"][kind] for cell in cells],
            )
            found.append(Verdict.by(text, f"{kind} weights: {here.points()} points", here))
    return found


def of_resolution(cells: Cells, trained: int) -> list[Verdict]:
    def at(side: int, way: str) -> list[float]:
        return [next(row for row in cell["rows"] if row["side"] == side)[way] for cell in cells]

    sides = [row["side"] for row in cells[0]["rows"]]
    larger = max(
        (side for side in sides if side > trained), key=lambda side: fmean(at(side, "as trained"))
    )
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
