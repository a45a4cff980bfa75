"""`Schedule` and its formulas of the clock: constant, half-life, warmup, power, cosine, means."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = [
    "SUBCLASSES",
    "Constant",
    "Cosine",
    "Debiased",
    "HalfLife",
    "PerStep",
    "Power",
    "Ramp",
    "Ranged",
    "Ratio",
    "Schedule",
    "Uniform",
    "Warmup",
    "gamma_of",
    "plain_number",
    "take_number",
]

MOST_STEPS = 1024
# What an argument of that name must be, whichever schedule of ours takes it.
IN_UNIT = {"decay", "final"}
POSITIVE = {"inv_gamma", "length", "power", "tau", "total", "units"}
# By name; a user's own are here too once their module was imported, so files may name them.
SUBCLASSES: dict[str, type[Schedule]] = {}


class Schedule(ABC):
    """A decay as a function of the clock, immutable and comparable."""

    def __init_subclass__(cls) -> None:
        SUBCLASSES[cls.__name__] = cls

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


class Ranged(Schedule):
    """A schedule whose arguments must be as IN_UNIT and POSITIVE say."""

    def __post_init__(self) -> None:
        for name in [name for name in vars(self) if name in IN_UNIT | POSITIVE]:
            value = take_number(self, name)
            if name in IN_UNIT and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
            if name in POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}.")


def plain_number(value: Any) -> float | None:
    """A number, numpy's too, as an int or float, because files hold it; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, Real):  # True would be 1
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def take_number(schedule: Schedule, name: str) -> float:
    """Make an argument an int or float, because files hold it. Raises ValueError for another."""
    number = plain_number(getattr(schedule, name))
    if number is None:
        raise ValueError(f"{name} must be a number, got {getattr(schedule, name)!r}.")
    object.__setattr__(schedule, name, number)  # it is frozen
    return number


class PerStep(Ranged):
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
class Constant(Ranged):
    """d^elapsed: the same decay in every step."""

    decay: float

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return float(self.decay**elapsed)


@dataclass(frozen=True)
class HalfLife(Ranged):
    """0.5^(elapsed / units): half of the old average is left after `units` steps or images."""

    units: float

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return float(0.5 ** (elapsed / self.units))


@dataclass(frozen=True)
class Warmup(PerStep):
    """min(d, 1 - (1 + (n - 1) / inv_gamma)^-power) per step, so the first update copies.

    As in k-diffusion's EMAWarmup, diffusers and ema_pytorch, which count from 0.
    """

    decay: float = 0.9999
    power: float = 2 / 3
    inv_gamma: float = 1.0

    def _at(self, n: float) -> float:
        steps = max(0.0, n - 1)
        return float(min(self.decay, 1 - (1 + steps / self.inv_gamma) ** -self.power))


@dataclass(frozen=True)
class Ratio(PerStep):
    """min(d, (1 + n) / (10 + n)) per step (TensorFlow's ExponentialMovingAverage)."""

    decay: float = 0.9999

    def _at(self, n: float) -> float:
        return min(self.decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class Ramp(PerStep):
    """d * (1 - exp(-n / tau)) per step (the YOLO family's ModelEMA)."""

    decay: float = 0.9999
    tau: float = 2000.0

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
        if self.sigma_rel is not None:
            gamma_of(take_number(self, "sigma_rel"))
        elif not 0 <= take_number(self, "gamma") < math.inf:
            raise ValueError(f"gamma must be 0 or more, got {self.gamma}.")

    @property
    def exponent(self) -> float:
        """The exponent of the profile t^gamma, however it was given."""
        return gamma_of(self.sigma_rel) if self.gamma is None else self.gamma  # type: ignore

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return float(max(0.0, 1 - elapsed / now) ** (self.exponent + 1))


@dataclass(frozen=True)
class Cosine(PerStep):
    """final - (final - d) * (1 + cos(pi n / total)) / 2 per step, as in BYOL and DINO."""

    decay: float
    total: float
    final: float = 1.0

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
        if not 0 <= take_number(self, "decay") < 1:
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
