"""The clock of an average: how far training has moved, and how far the average has followed.

steps     optimizer steps seen by attach()
now       the clock of the schedule, in the user's units, from where averaging began
pending   units gone by since the last update (inside an every=N interval)
updates   moves of the shadow so far, skipped ones included
started   the average is a thing of its own; before, it simply is the live weights
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .schedule import Schedule

__all__ = ["Clock"]


@dataclass
class Clock:
    """Host-side counters; nothing here is ever read back from a device."""

    now: float = 0.0
    steps: int = 0
    updates: int = 0
    pending: float = 0.0
    started: bool = True

    def move(self, schedule: Schedule, elapsed: float) -> float:
        """Advance by `elapsed` and return the decay for the move. Raises ValueError and stays if it cannot."""
        if not 0 < elapsed < math.inf:
            raise ValueError(f"elapsed must be positive and finite, got {elapsed}.")
        decay = schedule(self.now + elapsed, elapsed)
        self.now += elapsed
        self.updates += 1
        self.pending = 0.0
        return decay

    def tick(self, elapsed: float) -> None:
        """One optimizer step went by."""
        self.steps += 1
        self.pending += elapsed

    def start(self, schedule: Schedule) -> None:
        """Averaging begins here, seeded from live."""
        self.now = self.now + self.pending if schedule.origin == "training" else 0.0
        self.pending = 0.0
        self.started = True

    def spec(self) -> dict[str, Any]:
        return asdict(self)

    def set(self, spec: dict[str, Any]) -> None:
        """Take the counters of a saved clock. Raises ValueError if they are not sound."""
        for name, kind in (("now", float), ("steps", int), ("updates", int), ("pending", float), ("started", bool)):
            if not isinstance(spec.get(name), (int, float)):
                raise ValueError(f"the saved clock has no sound {name!r}: {spec}.")
            setattr(self, name, kind(spec[name]))
