"""Decay schedules: pure functions of the clock, from `Constant` to `Power`, and their JSON form.

A schedule is called with `now`, the clock *after* the update, and `elapsed`, how far the clock
moved. Both count in the user's units: steps, images or tokens. The first update has
`now == elapsed`. A schedule returns the share of the shadow that survives the update:

    >>> HalfLife(500)(now=500, elapsed=500)
    0.5
    >>> Uniform()(now=1), Uniform()(now=2), Uniform()(now=4)
    (0.0, 0.5, 0.75)

[Note: elapsed]  One call with `elapsed=k` equals k calls with `elapsed=1` on unchanged weights.
`Constant`, `HalfLife`, `Power`, `Uniform` and `Debiased` have closed forms for any real k. `Ratio`,
`Warmup`, `Ramp` and `Cosine` are defined per step. For whole k up to 1024 they take the exact
product; anything else raises ValueError.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = [
    "CURVES",
    "BlockMean",
    "Constant",
    "Cosine",
    "Debiased",
    "HalfLife",
    "Power",
    "Ramp",
    "Ratio",
    "Schedule",
    "Uniform",
    "Warmup",
    "Window",
    "from_dict",
    "gamma_of",
    "schedule",
    "schedule_list",
]

MOST_STEPS = 1024


def _linear(t: float) -> float:
    return 1 - t


def _minus_sqrt(t: float) -> float:
    return 1 - math.sqrt(t)


def _cosine(t: float) -> float:
    return (1 + math.cos(math.pi * t)) / 2


# The decay of a learning rate over a window: from 1 at t = 0 to 0 at t = 1.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "minus-sqrt": _minus_sqrt,
    "cosine": _cosine,
}


class Schedule(ABC):
    """A decay as a function of the clock, immutable and comparable."""

    @abstractmethod
    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        """The share of the shadow that an update keeps.

        Args:
            now: the clock after the update.
            elapsed: how far the update moves the clock, `0 < elapsed <= now`.

        Returns:
            The decay, in [0, 1].

        Raises:
            ValueError: the schedule is defined per step and cannot take `elapsed`.
        """

    @property
    def origin(self) -> str:
        """The clock's origin: 'start' of averaging, or 'training', whose clock is never reset."""
        return "start"

    @property
    def copies_first(self) -> bool:
        """The first update forgets the start, so every update copies until one was accepted."""
        return self.origin == "start" and self(1.0, 1.0) == 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values to rebuild the schedule from: `from_dict(s.to_dict()) == s`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": type(self).__name__} | {
            key: value for key, value in values.items() if value is not None
        }


class _PerStep(Schedule):
    """A schedule that is defined per step ([Note: elapsed])."""

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        if elapsed == 1:
            return self._at(now)
        if elapsed != int(elapsed) or not 1 <= elapsed <= MOST_STEPS:
            raise ValueError(
                f"{self!r} is defined step by step and takes whole elapsed up to {MOST_STEPS}, "
                f"got {elapsed:g}. Use HalfLife to count images or tokens."
            )
        return math.prod(self._at(now - i) for i in range(int(elapsed)))

    @abstractmethod
    def _at(self, n: float) -> float:
        """The decay of step n."""


@dataclass(frozen=True)
class Constant(Schedule):
    """d^elapsed: the same decay in every step."""

    decay: float

    def __post_init__(self) -> None:
        _in_unit("decay", self.decay)

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return float(self.decay**elapsed)


@dataclass(frozen=True)
class HalfLife(Schedule):
    """0.5^(elapsed / units): half of the old average is left after `units` steps or images."""

    units: float

    def __post_init__(self) -> None:
        _positive("units", self.units)

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return float(0.5 ** (elapsed / self.units))


@dataclass(frozen=True)
class Warmup(_PerStep):
    """min(d, 1 - (1 + (n - 1) / inv_gamma)^-power) per step, so the first update copies.

    As in k-diffusion's EMAWarmup, diffusers and ema_pytorch, which count from 0.
    """

    decay: float = 0.9999
    power: float = 2 / 3
    inv_gamma: float = 1.0

    def __post_init__(self) -> None:
        _in_unit("decay", self.decay)
        _positive("power", self.power)
        _positive("inv_gamma", self.inv_gamma)

    def _at(self, n: float) -> float:
        steps = max(0.0, n - 1)
        return float(min(self.decay, 1 - (1 + steps / self.inv_gamma) ** -self.power))


@dataclass(frozen=True)
class Ratio(_PerStep):
    """min(d, (1 + n) / (10 + n)) per step (TensorFlow's ExponentialMovingAverage)."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        _in_unit("decay", self.decay)

    def _at(self, n: float) -> float:
        return min(self.decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Ramp(_PerStep):
    """d * (1 - exp(-n / tau)) per step (the YOLO family's ModelEMA)."""

    decay: float = 0.9999
    tau: float = 2000.0

    def __post_init__(self) -> None:
        _in_unit("decay", self.decay)
        _positive("tau", self.tau)

    def _at(self, n: float) -> float:
        return -self.decay * math.expm1(-n / self.tau)


@dataclass(frozen=True)
class Power(Schedule):
    """(1 - elapsed / now)^(gamma + 1): the profile t^gamma (Karras et al. 2023, eq. 127).

    Args:
        sigma_rel: the profile's standard deviation as a share of the training time, below 0.2887.
        gamma: the exponent itself, in place of `sigma_rel`.
        origin: 'training' counts from step 0 although averaging starts later.
    """

    sigma_rel: float | None = None
    gamma: float | None = None
    origin: str = "start"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError(
                "Power takes one of sigma_rel and gamma, "
                f"got sigma_rel={self.sigma_rel}, gamma={self.gamma}."
            )
        if self.origin not in ("start", "training"):
            raise ValueError(f"Power's origin must be 'start' or 'training', got {self.origin!r}.")
        if self.gamma is not None and not (0 <= self.gamma < math.inf):
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}.")
        if self.sigma_rel is not None:
            gamma_of(self.sigma_rel)

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        gamma = self.gamma if self.sigma_rel is None else gamma_of(self.sigma_rel)
        assert gamma is not None
        return float(max(0.0, 1 - elapsed / now) ** (gamma + 1))


@dataclass(frozen=True)
class Cosine(_PerStep):
    """final - (final - d) * (1 + cos(pi n / total)) / 2 per step, as in BYOL and DINO."""

    decay: float
    total: float
    final: float = 1.0

    def __post_init__(self) -> None:
        _in_unit("decay", self.decay)
        _in_unit("final", self.final)
        _positive("total", self.total)

    def _at(self, n: float) -> float:
        return (
            self.final
            - (self.final - self.decay) * (1 + math.cos(math.pi * min(1.0, n / self.total))) / 2
        )


@dataclass(frozen=True)
class Uniform(Schedule):
    """(n - 1) / n: the plain mean of all weights so far (SWA, Izmailov et al. 2018)."""

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return max(0.0, (now - elapsed) / now)


@dataclass(frozen=True)
class Debiased(Schedule):
    """1 - (1 - d) / (1 - d^n): a constant decay without the weight of the start.

    Adam's bias correction, folded into the decay.
    """

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"decay must be in [0, 1), got {self.decay}. For the plain mean use Uniform()."
            )

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        if elapsed >= now or self.decay == 0:
            return 0.0
        log = math.log(self.decay)
        return float(
            self.decay**elapsed * math.expm1((now - elapsed) * log) / math.expm1(now * log)
        )


@dataclass(frozen=True)
class Window(Schedule):
    """What decaying the learning rate over the last `length` units would have given.

    For a curve w that falls from 1 to 0 over the window, the weights after an update that moves
    from a to b of it get the share w(a) - w(b): a sum of c_j = w_j - w_(j+1) times weights is the
    run whose every step was scaled by w (WSM, arXiv 2507.17634). "linear" is the plain mean of the
    window.

    Every update is averaged, into the mean of one of `blocks` blocks ([Note: ring] in
    averaging.window_ring says where they lie). The window consists of whole blocks, and of what the
    block under way holds: it is `length` long when a block ends, else up to a block shorter. Within
    a block all updates count alike. That is exact for "linear"; for other curves `error` bounds it.

    Args:
        length: Of the window, in units of the clock.
        curve: "linear", "minus-sqrt" (1 - sqrt(t)), "cosine", or a function on [0, 1] with w(0) = 1
            and w(1) = 0. A function cannot be tracked, as files cannot hold it: read it from a
            tracked window by `which=`.
        blocks: Of the window.
        ring: A folder on a local disk, where full blocks lie in temporary files; None: host memory.

    Called like any schedule, it gives the decay of the mean of the block under way.
    """

    length: float
    curve: str | Callable[[float], float] = "linear"
    blocks: int = 16
    ring: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _positive("length", self.length)
        if isinstance(self.blocks, bool) or self.blocks != int(self.blocks) or self.blocks < 1:
            raise ValueError(f"blocks must be a whole number from 1, got {self.blocks}.")
        if isinstance(self.curve, str) and self.curve not in CURVES:
            known = ", ".join(CURVES)
            raise ValueError(f"curve must be {known} or a function, got {self.curve!r}.")
        ends = self.scale(0.0), self.scale(1.0)
        if max(abs(ends[0] - 1), abs(ends[1])) > 1e-9:
            raise ValueError(f"curve must fall from 1 to 0, got {ends[0]:g} and {ends[1]:g}.")

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        # The clock stands at multiples of `elapsed`: at the last one before this block.
        begin = math.floor(self.block_at(now) * self.block / elapsed + 1e-9) * elapsed
        return max(0.0, (now - elapsed - begin) / (now - begin))

    @property
    def block(self) -> float:
        """Units of the clock in one block."""
        return self.length / self.blocks

    def block_at(self, now: float) -> int:
        """The number of the block that an update at `now` belongs to."""
        return math.ceil(now / self.block - 1e-9) - 1

    def scale(self, t: float) -> float:
        """The curve at t in [0, 1] of the window."""
        return CURVES[self.curve](t) if isinstance(self.curve, str) else self.curve(t)

    def shares(self, begin: float, ends: Sequence[float]) -> list[float]:
        """The share of each part of a window that begins at `begin`, by where the parts end."""
        length = ends[-1] - begin
        at = [1.0, *(self.scale((end - begin) / length) for end in ends[:-1]), 0.0]
        return [before - after for before, after in pairwise(at)]

    def spans(self, other: Window) -> bool:
        """`other` can be mixed from the blocks of this one."""
        return self.blocks >= other.blocks and abs(self.block - other.block) < 1e-9 * self.block

    def error(self, updates: int) -> float:
        """How far block means are from the exact curve, as half the sum of |share - exact share|.

        No element of the average is further off than this times the spread of that element over
        the window.

        Args:
            updates: In a full window; a multiple of `blocks`.
        """
        each = updates // self.blocks
        exact = self.shares(0, [float(i + 1) for i in range(updates)])
        means = self.shares(0, [float((i + 1) * each) for i in range(self.blocks)])
        return sum(abs(share - means[i // each] / each) for i, share in enumerate(exact)) / 2

    def to_dict(self) -> dict[str, Any]:
        if not isinstance(self.curve, str):
            raise ValueError(
                f"{self!r}: files cannot hold a function. Track a window with a named curve "
                f"({', '.join(CURVES)}), and read this one by which=."
            )
        return {key: value for key, value in super().to_dict().items() if key != "ring"}

    def __repr__(self) -> str:
        curve = self.curve if isinstance(self.curve, str) else self.curve.__qualname__
        return f"Window({self.length:g}, {curve!r}, blocks={self.blocks})"


@dataclass(frozen=True)
class BlockMean(Schedule):
    """A block of a saved window: the mean of the weights after each update in (begin, end].

    Args:
        size: Units of the clock in a full block.
        begin: The clock before the first update.
        end: The clock after the last one.
    """

    size: float
    begin: float
    end: float

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return max(0.0, (now - elapsed) / now)


def schedule(decay: float | Schedule) -> Schedule:
    """The schedule that a user's `decay` means; a float is `Constant`. Else raises ValueError."""
    if isinstance(decay, Schedule):
        return decay
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise ValueError(
            f"decay must be a float or a schedule (dist_ema.HalfLife(...)), got {decay!r}."
        )
    return Constant(float(decay))


def schedule_list(decay: float | Schedule | Sequence[float | Schedule]) -> list[Schedule]:
    """The schedules of one or more averages. Raises ValueError if there is none, or two equal."""
    given = decay if isinstance(decay, Sequence) else [decay]
    schedules = [schedule(each) for each in given]
    if not schedules or len(set(schedules)) < len(schedules):
        raise ValueError(f"decay must name one or more different schedules, got {decay!r}.")
    windows = [each for each in schedules if isinstance(each, Window) and each.to_dict()]
    if len({window.block for window in windows}) < len(windows):
        raise ValueError(
            f"{windows} have blocks of one size. Track the longest, and read the others from it by "
            "which=."
        )
    return schedules


def from_dict(spec: dict[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` described. Raises ValueError if there is none such."""
    every = (*Schedule.__subclasses__(), *_PerStep.__subclasses__())
    kinds: dict[str, type[Schedule]] = {
        kind.__name__: kind for kind in every if kind is not _PerStep
    }
    values = dict(spec)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        known = sorted(kinds.keys() - {BlockMean.__name__})
        raise ValueError(f"no schedule is called {name!r}; known are {', '.join(known)}.")
    try:
        return kinds[name](**values)
    except TypeError as error:
        raise ValueError(f"{name} does not take {values}: {error}.") from None


@lru_cache(maxsize=64)
def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power profile with that relative width (Karras et al. 2023, appendix C).

    It is the largest real root of x^3 + 7x^2 + (16 - s^-2)x + (12 - s^-2).
    """
    if not 1e-150 < sigma_rel < math.sqrt(1 / 12):  # the square of a smaller one is 0
        raise ValueError(
            "sigma_rel must be between 0 and 0.2887 (the width of the plain mean), "
            f"got {sigma_rel}."
        )
    t = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t])
    return float(roots[np.abs(roots.imag) < 1e-6].real.max())


def _in_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}.")
