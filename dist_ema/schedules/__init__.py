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

from .decays import (
    Constant,
    Cosine,
    Debiased,
    HalfLife,
    Power,
    Ramp,
    Ratio,
    Schedule,
    Uniform,
    Warmup,
    gamma_of,
    plain_number,
)
from .parsing import from_dict, from_text, schedule, schedule_list
from .window import CURVES, BlockMean, Window

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
    "from_text",
    "gamma_of",
    "plain_number",
    "schedule",
    "schedule_list",
]
