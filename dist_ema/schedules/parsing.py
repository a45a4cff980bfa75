"""Schedules from what a user's `decay=` or a file gives: a number, a list, a dictionary of JSON."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from inspect import isabstract
from typing import Any

from .decays import SUBCLASSES, Constant, Schedule, plain_number
from .window import BlockMean, Window

__all__ = ["from_dict", "from_text", "schedule", "schedule_list"]


def schedule(decay: float | Schedule) -> Schedule:
    """The schedule that a user's `decay` means; a float is `Constant`. Else raises ValueError."""
    if isinstance(decay, Schedule):
        return decay
    number = plain_number(decay)
    if number is None:
        raise ValueError(
            f"decay must be a float or a schedule (dist_ema.HalfLife(...)), got {decay!r}."
        )
    return Constant(float(number))


def schedule_list(decay: float | Schedule | Sequence[float | Schedule]) -> list[Schedule]:
    """The schedules of one or more averages. Raises ValueError if there is none, or two equal."""
    decays = decay if isinstance(decay, Sequence) and not isinstance(decay, str) else [decay]
    schedules = list(map(schedule, decays))
    if not schedules or len(set(schedules)) < len(schedules):
        raise ValueError(f"decay must name one or more different schedules, got {decay!r}.")
    windows = [window for window in schedules if isinstance(window, Window)]
    for window in windows:
        window.to_dict()  # raises where no file could hold it
    if len({window.block for window in windows}) < len(windows):
        raise ValueError(
            f"{windows} have blocks of one size. Track the longest, and read the others from it by "
            "which=."
        )
    return schedules


def from_dict(spec: dict[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` described. Raises ValueError if there is none such."""
    by_name = {name: kind for name, kind in SUBCLASSES.items() if not isabstract(kind)}
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in by_name:
        names = sorted(by_name.keys() - {BlockMean.__name__})
        raise ValueError(f"no schedule is called {name!r}; known are {', '.join(names)}.")
    try:
        return by_name[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take {arguments}: {error}.") from None


def from_text(text: str) -> Schedule | None:
    """The schedule that a text like `Power(sigma_rel=0.1)` makes; None where it makes none."""
    try:
        call: Any = ast.parse(text, mode="eval").body
        kind: Any = SUBCLASSES[call.func.id]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        made: Schedule = kind(*map(ast.literal_eval, call.args), **named)
    except (AttributeError, LookupError, SyntaxError, TypeError, ValueError):
        return None
    except (MemoryError, RecursionError):  # from the parser, of a text that is nested too deeply
        return None
    return made
