"""The clock of an average: how far training has moved, and how far the average has followed.

steps     optimizer steps seen by attach()
now       the clock of the schedule, in the user's units, from where averaging began
pending   units gone by since the last update (inside an every=N interval)
updates   moves of the shadow so far, skipped ones included
started   the average is a thing of its own; before, it simply is the live weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from reprlib import repr as brief
from typing import Any

from ..schedules import Schedule

__all__ = ["Clock"]


@dataclass
class Clock:
    """Host-side counters; nothing here is ever read back from a device."""

    now: float = 0.0
    before: float = 0.0
    steps: int = 0
    updates: int = 0
    pending: float = 0.0
    started: bool = True

    def at(self, schedule: Schedule) -> float:
        """The clock as this schedule counts: since averaging began, or since training began."""
        return self.now + self.before if schedule.origin == "training" else self.now

    def decays(self, schedules: Sequence[Schedule], elapsed: float) -> list[float]:
        """The decay of each schedule for a move by `elapsed`. Raises ValueError if one has none."""
        if not 0 < elapsed < math.inf:
            raise ValueError(f"elapsed must be positive and finite, got {elapsed}.")
        return [schedule(self.at(schedule) + elapsed, elapsed) for schedule in schedules]

    def move(self, schedules: Sequence[Schedule], elapsed: float) -> list[float]:
        """Advance by `elapsed`, and return the decay of each schedule for the move.

        Raises:
            ValueError: a schedule gives no decay; the clock has not advanced then.
        """
        # All decays come before the first counter moves: a schedule may refuse the clock.
        decays = self.decays(schedules, elapsed)
        self.now += elapsed
        self.updates += 1
        return decays

    def tick(self, elapsed: float) -> None:
        """One optimizer step went by. Raises ValueError if its units are none; nothing moved."""
        if not 0 <= elapsed < math.inf:
            raise ValueError(f"elapsed must be positive and finite, got {elapsed}.")
        self.steps += 1
        self.pending += elapsed

    def start(self) -> None:
        """Averaging begins here, seeded from live."""
        # Units that went by until now count for schedules that begin with the training.
        self.before += self.now + self.pending
        self.now, self.pending = 0.0, 0.0
        self.started = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def set(self, spec: dict[str, Any]) -> None:
        """Take the counters of a saved clock. Raises ValueError if they are not sound."""
        for field in fields(self):
            value, kind = spec.get(field.name), type(getattr(self, field.name))
            # NOTE: a negation refuses NaN too, which compares as False with any number.
            if (
                not isinstance(value, (int, float))
                or not 0 <= value < 1 << 63
                or kind(value) != value
            ):
                raise ValueError(f"the saved clock has no sound {field.name!r}: {brief(spec)}.")
            setattr(self, field.name, kind(value))
