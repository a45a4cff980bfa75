"""A schedule from what a user or a file gives: a float, a list, a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .decays import Constant, PerStep, Schedule
from .window import BlockMean, Window

__all__ = ["from_dict", "schedule", "schedule_list"]


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
    every = (*Schedule.__subclasses__(), *PerStep.__subclasses__())
    kinds: dict[str, type[Schedule]] = {
        kind.__name__: kind for kind in every if kind is not PerStep
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
