"""`dist-ema plan`: `Pace`, a decay as half-life, window and sigma_rel; `Cost` of averaging.

Arithmetic alone, before training.

[Note: widths]  An average with a constant decay d weighs the weights of k updates ago with
(1 - d) d^k. Half of it is younger than the half-life log(0.5) / log(d). The mean age plus one,
1 / (1 - d), is known as the window. The standard deviation of the ages is sqrt(d) / (1 - d). By the
length of the training that is the relative width, the sigma_rel of Karras et al. 2023. A
power-function average of that width forgets as fast at the end of training, and faster before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..schedules import Constant, Power, Schedule, gamma_of
from . import plotting

__all__ = [
    "BANDWIDTH",
    "Cost",
    "Memory",
    "Pace",
    "cost",
    "impulse_response",
    "pace",
    "plot",
    "scaled",
]

BANDWIDTH = {"gpu": 2000.0, "cpu": 50.0, "link": 25.0}  # GB/s, by default
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
SCRATCH = 8 << 20


@dataclass(frozen=True)
class Pace:
    """A constant decay per optimizer step, in other terms."""

    decay: float
    units: Mapping[str, float]  # how many a step takes: steps 1, and samples and tokens where known
    length: float | None = None  # steps of training

    @property
    def half_life(self) -> float:
        return math.log(0.5) / math.log(self.decay)

    @property
    def window(self) -> float:
        return 1 / (1 - self.decay)

    @property
    def width(self) -> float:
        """[Note: widths]"""
        return math.sqrt(self.decay) / (1 - self.decay)

    @property
    def sigma_rel(self) -> float | None:
        return None if self.length is None else self.width / self.length

    @property
    def gamma(self) -> float | None:
        """The exponent of the power function of that width; None if none is so wide."""
        sigma = self.sigma_rel
        return None if sigma is None or not 0 < sigma < math.sqrt(1 / 12) else gamma_of(sigma)

    @property
    def start_left(self) -> float | None:
        """The share of the first weights in the average at the end of training."""
        return None if self.length is None else self.decay**self.length

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("decay", "length", "sigma_rel", "gamma")}
        for unit, count in self.units.items():
            facts[f"half_life_{unit}"] = self.half_life * count
            facts[f"window_{unit}"] = self.window * count
        return facts | {"start_left": self.start_left}


def pace(
    *,
    decay: float | None = None,
    half_life: float | None = None,
    window: float | None = None,
    sigma_rel: float | None = None,
    unit: str = "steps",
    length: float | None = None,
    batch_size: float | None = None,
    tokens: float | None = None,
) -> Pace:
    """Build a `Pace` from a decay, a half-life, a window or a sigma_rel.

    Args:
        decay: Per step.
        half_life: In `unit`.
        window: In `unit`.
        sigma_rel: As a share of `length`.
        unit: Steps, or with a batch size samples, or with `tokens` too tokens.
        length: The length of the training, in `unit`; sigma_rel needs it.
        batch_size: Samples per step.
        tokens: Tokens per sample.

    Raises:
        ValueError: The decay rounds to 0 or 1, or a number that follows is infinite.
    """
    units = {"steps": 1.0}
    if batch_size is not None:
        units["samples"] = batch_size
        if tokens is not None:
            units["tokens"] = batch_size * tokens
    steps = None if length is None else length / units[unit]
    if half_life is not None:
        decay = float(0.5 ** (units[unit] / half_life))
    elif window is not None:
        decay = 1 - units[unit] / window
    elif decay is None:
        assert sigma_rel is not None, "one of them is given"
        assert steps is not None, "the command asks for the length"
        deviation = sigma_rel * steps  # = sqrt(d) / (1 - d), solved for 1 - d
        decay = 1 - 2 / (1 + math.hypot(1, 2 * deviation))
    return _sound(Pace(decay, units, steps))


def _sound(of: Pace) -> Pace:
    """The same, if its decay has not rounded to 0 or 1, and no number in it is infinite."""
    # A decay of 1 - 1e-17 is 1 in float64, and every number below would divide by 0.
    if not 0 < of.decay < 1:
        raise ValueError(
            f"these numbers make a decay of {of.decay:g} per step; it must lie between 0 and 1."
        )
    infinite = [
        name
        for name, value in of.to_json().items()
        if value is not None and not math.isfinite(value)
    ]
    if infinite:
        raise ValueError(
            f"these numbers are too large to compute with: {', '.join(infinite)} is infinite."
        )
    return of


def scaled(of: Pace, factor: float) -> Pace:
    """The same average at `factor` times the batch: decay^factor, over fewer steps.

    Busbridge et al. 2023, "How to Scale Your EMA". In samples nothing changes: HalfLife with
    elapsed=batch_size stays.
    """
    units = {unit: count if unit == "steps" else count * factor for unit, count in of.units.items()}
    return _sound(Pace(of.decay**factor, units, None if of.length is None else of.length / factor))


@dataclass(frozen=True)
class Memory:
    """The memory that averaging takes on one rank, in bytes."""

    shadows: int
    window: int  # of live weights on their way to host memory
    scratch: int
    place: str  # 'gpu' or 'cpu'


@dataclass(frozen=True)
class Cost:
    """The memory, traffic and time that averaging takes on each rank."""

    elements: int
    memory: Memory
    moved: int  # bytes read and written by one update
    copied: int  # bytes over the link to the host
    seconds: float  # at the full bandwidth, a lower bound
    saved: int  # bytes of one artifact, of all ranks together
    copies: int  # bytes on each rank of a full copy in fp32

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cost(
    params: float,
    *,
    world: int = 1,
    wrapper: str = "ddp",
    dtype: str = "fp32",
    weights: str = "fp32",
    device: str = "gpu",
    averages: int = 1,
    bandwidth: float | None = None,
    link: float | None = None,
) -> Cost:
    """Cost of `averages` averages of `params` parameters.

    Every wrapper leaves 1/world of the average on a rank: ddp because replicated weights are
    divided, fsdp and hsdp because a rank holds no more (hsdp divides it further over its replicas).
    Without a wrapper a rank has all of it.
    """
    elements = math.ceil(params / (world if wrapper != "none" else 1))
    live, shadow = SIZE[weights], SIZE[dtype] * averages
    moved = elements * (live + 2 * shadow)
    copied = elements * live if device == "cpu" else 0
    seconds = (
        moved / (bandwidth or BANDWIDTH[device]) / 1e9 + copied / (link or BANDWIDTH["link"]) / 1e9
    )
    return Cost(
        elements,
        Memory(elements * shadow, copied, SCRATCH, device),
        moved,
        copied,
        seconds,
        saved=math.ceil(params) * shadow,
        copies=math.ceil(params) * 4 * averages,
    )


def plot(path: str, of: Pace, other: Pace | None = None) -> None:
    """Draw the impulse response (the share of an update, by its age) and the decay, as a PNG."""
    with plotting.panels(path, 2) as (left, right):
        length = of.length or 12 * of.half_life  # after which 0.02 % of the start is left
        lines: list[tuple[str, Schedule]] = [(f"constant {of.decay:.6g}", Constant(of.decay))]
        if of.gamma is not None:
            lines.append((f"power, sigma_rel {of.sigma_rel:.3g}", Power(gamma=of.gamma)))
        if other is not None:
            lines.append((f"constant {other.decay:.6g}", Constant(other.decay)))
        ages = [min(length, 8 * of.half_life) * i / 400 for i in range(400)]
        clock = [max(1.0, length * i / 400) for i in range(1, 401)]
        for label, schedule in lines:
            left.plot(ages, [impulse_response(schedule, length, age) for age in ages], label=label)
            right.plot(clock, [1 - schedule(now, 1.0) for now in clock], label=label)
        if len(lines) == 1:
            # NOTE: matplotlib warns of a range that is one value.
            right.set_ylim((1 - of.decay) / 2, (1 - of.decay) * 2)
        left.axvline(of.half_life, color="grey", lw=0.8, ls=":")
        left.set(
            xlabel="age in steps (dotted: the half-life)",
            ylabel="share in the average",
            title="impulse response",
        )
        right.set(xlabel="step", ylabel="1 - decay", yscale="log", title="decay")
        left.legend()
        right.legend()


def impulse_response(of: Schedule, now: float, age: float) -> float:
    """The share of the update of `age` steps ago."""
    then = now - age
    if then < 1:
        return 0.0
    return (1 - of(then, 1.0)) * (of(now, age) if age > 0 else 1.0)
