"""`RollCall`: who is here, asked rank by rank where some are silent ([Note: check in])."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import diagnosis
from .diagnosis import Exchange
from .messages import Messages

__all__ = ["RollCall"]

log = logging.getLogger("dist_ema")


class RollCall:
    """Looks for ranks that are missing from an exchange.

    Args:
        messages: Of these ranks.
        members: The global ranks.
        rank: The index of this process in `members`.
    """

    def __init__(self, messages: Messages, members: Sequence[int], rank: int) -> None:
        self._messages, self._members, self._rank = messages, members, rank

    def speak(self, exchange: Exchange) -> bool:
        """Call the roll. Returns whether this rank was the first to."""
        self._messages.will_delete(exchange, "speaker")
        rank = str(self._rank)
        return self._messages.set_first(exchange, "speaker", rank) == rank

    def answer(self, exchange: Exchange) -> bool:
        """Say that this rank is here, if the roll is called. Returns whether it is."""
        if not self._messages.has(exchange, "speaker"):
            return False
        self._messages.set(exchange, f"here/{self._rank}", exchange)
        return True

    def missing(self, exchange: Exchange) -> list[int]:
        """Who has not answered."""
        others = [rank for rank in range(len(self._members)) if rank != self._rank]
        return [rank for rank in others if not self._messages.has(exchange, f"here/{rank}")]

    def silence(self, exchange: Exchange, timeout: float) -> str:
        """The error that names who is missing."""
        missing, members = self.missing(exchange), self._members
        if missing:
            names = diagnosis.names(members, missing)
            return diagnosis.silence(exchange, names, len(missing), len(members), timeout)
        here = {self._rank: exchange}  # all wait, so they wait for different things
        for rank in set(range(len(members))) - {self._rank}:
            here[rank] = Exchange(*self._messages.get(exchange, f"here/{rank}"))
        other = next((rank for rank in sorted(here) if here[rank] != exchange), self._rank)
        positions = (exchange, members[self._rank]), (here[other], members[other])
        return diagnosis.two_positions(*positions)

    def remind(self, exchange: Exchange, seconds: float) -> None:
        """Log who is awaited."""
        missing = self.missing(exchange)
        names = diagnosis.names(self._members, missing)
        hint = diagnosis.usual_cause(exchange, len(missing), len(self._members))
        log.warning("%s has waited %.0f s for %s%s", exchange, seconds, names, hint)
