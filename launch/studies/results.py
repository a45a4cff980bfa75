"""What the cells left, and the few statistics that all pages need. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .sizes import NOISES, Size, cells

__all__ = ["Estimate", "Results", "calmer", "churn", "fluctuation", "paired", "spread"]


@dataclass(frozen=True)
class Results:
    """Of one folder: study.json, and the cells that are there."""

    facts: dict[str, Any]
    size: Size
    found: dict[str, dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> Results:
        facts = json.loads((folder / "study.json").read_text())
        size = Size(**facts["size"])
        paths = {cell.name: folder / f"{cell.name}.json" for cell in cells(size)}
        found = {
            name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()
        }
        return Results(facts, size, found)

    def of(self, experiment: str, variant: str = "") -> list[dict[str, Any]]:
        """Its cells in the order of their seeds; [] unless all are there."""
        wanted = [
            cell
            for cell in cells(self.size)
            if (cell.experiment, cell.variant) == (experiment, variant)
        ]
        return (
            [self.found[cell.name] for cell in wanted]
            if all(cell.name in self.found for cell in wanted)
            else []
        )

    @property
    def whole_table(self) -> bool:
        """Every variant of the experiment `table` is there."""
        return all(
            self.of("table", f"{noise}{kind}") for noise in NOISES for kind in ("", "-cosine")
        )


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; nan where there are too few seeds to have one."""

    mean: float
    error: float

    @property
    def beyond(self) -> bool:
        """Above zero by more than two standard errors."""
        return self.mean > 2 * self.error  # False for nan

    def points(self) -> str:
        """As percentage points."""
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def paired(better: Sequence[float], than: Sequence[float]) -> Estimate:
    """The mean of the differences, seed by seed."""
    mean, deviation = spread([a - b for a, b in zip(better, than, strict=True)])
    return Estimate(mean, deviation / math.sqrt(len(better)))


def fluctuation(cell: dict[str, Any], name: str) -> float:
    """The standard deviation of the change of accuracy between epochs, in the last quarter."""
    late = [row["accuracy"][name] for row in cell["rows"] if row["epoch"] > cell["late"]]
    return spread([b - a for a, b in pairwise(late)])[1]


def churn(cells: Sequence[dict[str, Any]], name: str) -> float:
    """The share of test images on which two seeds differ: the mean over all pairs."""
    return _pairs(_differ(cells, name), list(range(len(cells))))


def calmer(cells: Sequence[dict[str, Any]], name: str, than: str) -> Estimate:
    """How much lower the churn of `name` is on the same seeds, with a jackknife standard error."""
    n, one, two = len(cells), _differ(cells, than), _differ(cells, name)

    def lower(seeds: list[int]) -> float:
        return _pairs(one, seeds) - _pairs(two, seeds)

    without = [lower([i for i in range(n) if i != out]) for out in range(n)]
    error = (
        math.sqrt((n - 1) / n * sum((each - fmean(without)) ** 2 for each in without))
        if n > 2
        else math.nan
    )
    return Estimate(lower(list(range(n))), error)


def _differ(cells: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """[seed][seed] -> share of images that they see differently."""
    said = [cell["predictions"][name] for cell in cells]
    return [[fmean(a != b for a, b in zip(one, two, strict=True)) for two in said] for one in said]


def _pairs(differ: list[list[float]], seeds: list[int]) -> float:
    values = [differ[a][b] for a in seeds for b in seeds if a < b]
    return fmean(values) if values else math.nan
