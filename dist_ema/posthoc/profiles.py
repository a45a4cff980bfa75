"""`Mixer`: profiles of stored averages along a run, and their least-squares mixture. numpy alone.

An average is a weighted sum of the live weights after each update; its *profile* is those weights.
They follow from the schedule and the clock, so nothing has to be measured. Stored averages can be
mixed into one that was not tracked: find the mixture whose profile is nearest (Karras et al. 2023,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).

[Note: cells]  Updates are discrete. So in place of the paper's integrals a profile is one number
per update, and one for the weights that averaging began at. A decay composes ([Note: elapsed] in
schedules), so the share of several updates together is as exact as that of one. Above MOST_CELLS
updates, neighbours share a cell, and only the measure of nearness becomes a little coarser.

[Note: sum]  Every profile sums to 1, the share of the start included. The mixture's weights must
sum to 1 too, so that a weight that never moved comes out unchanged. The sum is a constraint of the
fit, not a correction after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..schedules import Power, Schedule, Window, schedule

__all__ = ["MOST_CELLS", "Fit", "Mixer", "Profile", "Timeline", "coefficients"]

Array: TypeAlias = "NDArray[np.float64]"

MOST_CELLS = 1 << 16
MOST_AT_ONCE = 4096  # cells at a time
CUT = 1e-11  # singular values below this share of the columns' largest are rounding noise


@dataclass(frozen=True)
class Profile:
    """An average at one moment: its schedule, and the clock that it was saved with."""

    schedule: Schedule
    now: float  # units since averaging began
    updates: int  # moves since then
    before: float = 0.0  # units of training before

    def __post_init__(self) -> None:
        counts = all(0 <= count < math.inf for count in (self.updates, self.now, self.before))
        if not counts or (self.updates == 0) != (self.now == 0):
            raise ValueError(f"a profile's clock must count up from 0, got {self}.")


@dataclass(frozen=True)
class Fit:
    """The weights of a mixture, and how near it comes."""

    weights: tuple[float, ...]  # one per stored profile, summing to 1
    residual: float  # |mixed profile - target| / |target|
    condition: float  # of the stored profiles, each scaled to length 1

    @property
    def largest(self) -> float:
        """The largest weight by magnitude: large weights of both signs cancel."""
        return max(map(abs, self.weights))

    @property
    def gain(self) -> float:
        """The factor by which the mixture multiplies rounding errors of the stored weights."""
        return float(np.linalg.norm(self.weights))


class Timeline:
    """The updates of one run in cells ([Note: cells]). Row 0 is the start, row i the i-th cell.

    Args:
        knots: (now, updates) at some moments; between two of them all moves count as equal.
        before: Units of training before averaging began.

    Attributes:
        edges: The clock at the end of each row.
        widths: Updates in each row; the start counts as one.

    Raises:
        ValueError: The clocks cannot be of one run.
    """

    def __init__(self, knots: Sequence[tuple[float, int]], before: float = 0.0) -> None:
        self.before = before
        self._knots = sorted({(0.0, 0), *knots})
        for (now, updates), (later, more) in pairwise(self._knots):
            if later <= now or more <= updates:
                raise ValueError(
                    f"the clocks are not of one run: {updates} updates at {now:g}, but {more} at "
                    f"{later:g}. Was averaging begun again in between (ema.reset), or do the "
                    "snapshots come from two runs?"
                )
        merged = max(1, -(-self._knots[-1][1] // MOST_CELLS))  # updates per cell
        edges, counts = [np.zeros(1)], [np.ones(1)]
        for (now, updates), (later, more) in pairwise(self._knots):
            moves = np.append(np.arange(0.0, more - updates, merged), more - updates)
            inner = now + moves[1:] * ((later - now) / (more - updates))
            inner[-1] = later  # every knot is an edge
            edges.append(inner)
            counts.append(np.diff(moves))
        self.edges, self.widths = np.concatenate(edges), np.concatenate(counts)

    def row(self, now: float) -> int:
        """The row that ends at a knot's clock."""
        return int(np.searchsorted(self.edges, now))

    def nearest(self, now: float) -> tuple[float, int]:
        """(clock, updates) of the last move that is not after `now`.

        Raises ValueError outside of the stored ones.
        """
        first = self._knots[1][0] / self._knots[1][1]
        if now < first * (1 - 1e-12):
            raise ValueError(f"{now:g} is before the first update, which was at {first:g}.")
        for (start, updates), (end, more) in pairwise(self._knots):
            if now <= end:
                step = (end - start) / (more - updates)
                moves = min(int((now - start) / step * (1 + 1e-12)), more - updates)
                whole = moves == more - updates
                return (end, more) if whole else (start + moves * step, updates + moves)
        raise ValueError(
            f"{now:g} is beyond the last snapshot, which was stored at {self._knots[-1][0]:g}."
        )


class _Track:
    """One schedule along a timeline."""

    def __init__(self, of: Schedule, line: Timeline) -> None:
        times = line.edges + (line.before if of.origin == "training" else 0.0)
        elapsed = np.diff(line.edges)
        if isinstance(of, Power):
            # In closed form over the array: a call for each cell would take 30 times as long.
            power = of.exponent + 1
            with np.errstate(divide="ignore"):  # log 0: the first update copies
                self._logs = power * np.log(times)
                self._gained = np.append(1.0, -np.expm1(power * np.log1p(-elapsed / times[1:])))
            self._copies = np.zeros(len(times), np.int64)
            return
        decays = np.array([1.0, *map(of, times[1:].tolist(), elapsed.tolist())])
        self._gained = np.append(1.0, 1 - decays[1:])
        self._logs = -np.cumsum(np.log(np.where(decays > 0, decays, 1.0)))
        self._copies = np.cumsum(decays == 0)

    def shares(self, end: int, rows: slice) -> Array:
        """The share of each row in the average at the end of row `end`."""
        numbers = np.arange(rows.start, rows.stop)
        with np.errstate(invalid="ignore", over="ignore"):
            kept = np.exp(np.minimum(self._logs[rows] - self._logs[end], 0.0))
        kept[numbers == end] = 1.0  # also where both logs are -inf: the start of a Power
        alive = (self._copies[rows] == self._copies[end]) & (numbers <= end)
        return np.where(alive, self._gained[rows] * kept, 0.0)


def _of_window(window: Window, line: Timeline) -> Array:
    """The shares of a window that ends with the timeline, as if each update were a block."""
    begin = max(0.0, line.edges[-1] - window.length)
    at = np.clip((line.edges - begin) / (line.edges[-1] - begin), 0.0, 1.0)
    scales = np.array([window.scale(t) for t in at.tolist()])
    return np.append(0.0, scales[:-1] - scales[1:])


def coefficients(profiles: Sequence[Profile], target: Schedule, at: float | None = None) -> Fit:
    """Find the mixture of `profiles` that is nearest to what `target` would have tracked.

    Nearest by the sum of squares over updates, weights summing to 1 ([Note: sum]), solved by
    orthogonal transformations in float64: normal equations would square the condition number.

    Args:
        profiles: The profiles of one run. Those after `at` get no weight.
        target: The schedule to imitate. Of a `Window` the exact curve, not its blocks.
        at: The clock at the end of the imitated average, by default of the last profile.

    Raises:
        ValueError: The clocks contradict each other, or a schedule cannot take the moves.

    Note:
        *Cost*: a few MB, however long the run.
    """
    return Mixer(profiles, at).fit(schedule(target))


class Mixer:
    """Stored profiles on their common timeline, to mix into any target."""

    def __init__(self, profiles: Sequence[Profile], at: float | None = None) -> None:
        last = max((profile.now for profile in profiles), default=0.0)
        if last == 0:
            raise ValueError(
                f"{len(profiles)} profiles without a single update were given: nothing can be "
                "mixed."
            )
        befores = sorted({profile.before for profile in profiles})
        if len(befores) > 1:
            moments = ", ".join(f"{before:g}" for before in befores)
            raise ValueError(
                f"averaging began at different moments ({moments}): the profiles are not of one "
                "run."
            )
        knots = [(profile.now, profile.updates) for profile in profiles]
        self.now, self.updates = Timeline(knots).nearest(last if at is None else at)
        self._used = [number for number, (now, _) in enumerate(knots) if now <= self.now]
        if not self._used:
            first = min(profile.now for profile in profiles)
            raise ValueError(
                f"nothing was stored until {self.now:g}; the first snapshot is of {first:g}. Ask "
                "for a later moment."
            )
        self._count, self._profiles = len(profiles), [profiles[number] for number in self._used]
        self._line = Timeline(
            [*(knots[i] for i in self._used), (self.now, self.updates)], befores[0]
        )
        self._track = lru_cache(maxsize=None)(partial(_Track, line=self._line))

    def fit(self, target: Schedule) -> Fit:
        """The weights of the nearest mixture ([Note: sum])."""
        triangle = self._reduced(target)
        stored, wanted = triangle[:, :-1], triangle[:, -1]
        lengths = np.linalg.norm(stored, axis=0)
        # The weights are z / lengths, so sums @ z must be 1. The columns of `free` keep that sum.
        scaled, sums = stored / lengths, 1 / lengths
        first = sums / (sums @ sums)
        free = np.linalg.qr(sums[:, None], mode="complete")[0][:, 1:]
        # Of the columns themselves: what is left of equal ones by `free` is noise alone.
        noise = CUT * np.linalg.norm(scaled, 2)
        left, values, right = np.linalg.svd(scaled @ free, full_matrices=False)
        inverse = np.where(values > noise, 1 / np.maximum(values, noise), 0.0)
        steps = right.T @ (inverse * (left.T @ (wanted - scaled @ first)))
        weights = (first + free @ steps) / lengths
        missed = np.linalg.norm(stored @ weights - wanted) / np.linalg.norm(wanted)
        all_weights = np.zeros(self._count)
        all_weights[self._used] = weights
        # More profiles than updates depend on each other: ema.json cannot hold an infinity.
        condition = min(np.linalg.cond(scaled), 1 / np.finfo(np.float64).eps)
        return Fit(tuple(all_weights.tolist()), float(missed), float(condition))

    def shape(self, target: Schedule, fit: Fit, points: int = 400) -> tuple[Array, Array, Array]:
        """Points to plot: the clock, and the share of an update there in target and mixture."""
        edges, widths = self._line.edges, self._line.widths
        weights = np.array(fit.weights)[self._used]
        bins = np.unique(
            np.linspace(1, len(edges), min(points, len(edges) - 1) + 1).astype(np.int64)
        )
        shares = np.array(
            [
                self._columns(target, slice(begin, end)).sum(axis=0) / widths[begin:end].sum()
                for begin, end in pairwise(bins.tolist())
            ]
        )
        return edges[bins[1:] - 1], shares[:, -1], shares[:, :-1] @ weights

    def _columns(self, target: Schedule, rows: slice) -> Array:
        """One column per profile, and the target's."""
        line = self._line
        columns = [
            self._track(profile.schedule).shares(line.row(profile.now), rows)
            for profile in self._profiles
        ]
        if isinstance(target, Window):
            wanted = _of_window(target, line)[rows]
        else:
            wanted = self._track(target).shares(line.row(self.now), rows)
        return np.stack([*columns, wanted], axis=1)

    def _reduced(self, target: Schedule) -> Array:
        """The triangle R of QR of all columns, weighted by the cells' widths.

        R'R holds all their inner products.
        """
        widths, triangle = self._line.widths, np.zeros((0, len(self._profiles) + 1))
        for begin in range(0, len(widths), MOST_AT_ONCE):
            rows = slice(begin, min(begin + MOST_AT_ONCE, len(widths)))
            scaled = self._columns(target, rows) / np.sqrt(widths[rows, None])
            triangle = np.asarray(np.linalg.qr(np.vstack([triangle, scaled]), mode="r"))
        return triangle
