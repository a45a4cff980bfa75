"""`Messages`: the keys and the counter of an exchange in the store: answers, failures, the roll.

[Note: counter]  The counter of an exchange ([Note: check in] in coordinator) is one integer:

    bits   0-14              15-29           30-32     from 35 on
    count  ranks that came   with a flag     answers   the sum of a code of each rank's call

The code is of the verb and its arguments, so a rank that passes others is found in the counter.
Only then two ranks publish what they passed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import diagnosis
from .diagnosis import Exchange, error_text

__all__ = ["ANSWERED", "FLAG", "CounterState", "Messages"]

log = logging.getLogger("dist_ema")

KEPT = 1 << 62  # the number of keys that are no exchange's
FLAG, ANSWERED, CODE = 1 << 15, 1 << 30, 1 << 35
GRACE = 2.0  # seconds that a rank has to say what it called instead


class CounterState(NamedTuple):
    """The fields of the counter of an exchange ([Note: counter])."""

    ranks: int
    flags: int
    answers: int
    codes: int

    @classmethod
    def of(cls, total: int) -> CounterState:
        return cls(total % FLAG, total // FLAG % FLAG, total // ANSWERED % 8, total // CODE)


class Messages:
    """The keys of exchanges, and the counter of each.

    Args:
        store: Holds the messages.
        members: The global ranks.
        rank: The index of this process in `members`.

    Attributes:
        written: (number of the exchange, key) that this rank has to delete. The list object never
            changes.
        ends_when_full: The current exchange needs no answer.
        arguments: The arguments of the verb that was entered last, as texts.
    """

    def __init__(self, store: Any, members: Sequence[int], rank: int) -> None:
        self._store, self._members, self._rank = store, members, rank
        self._size = len(members)
        assert self._size < FLAG, "the counter has 15 bits for the ranks"
        self.written: list[tuple[int, str]] = []
        self.ends_when_full = False
        self.arguments: dict[str, str] = {}

    def has(self, exchange: Exchange, name: str) -> bool:
        return bool(self._store.check([exchange.key(name)]))

    def get(self, exchange: Exchange, name: str) -> Any:
        """The message. Waits for it."""
        return json.loads(self._store.get(exchange.key(name)))

    def set(self, exchange: Exchange, name: str, message: Any) -> None:
        self._store.set(exchange.key(name), json.dumps(message, separators=(",", ":")))
        self.will_delete(exchange, name)

    def set_first(self, exchange: Exchange, name: str, text: str) -> str:
        """Write a text, unless another rank has. Returns what is written now."""
        return str(self._store.compare_set(exchange.key(name), "", text).decode())

    # --- the counter -----------------------------------------------------------------------------

    def add(self, exchange: Exchange, n: int) -> CounterState:
        return CounterState.of(self._store.add(exchange.key("count"), n))

    def count(self, exchange: Exchange, flag: bool = False) -> None:
        """Count this rank, unless there is an answer already."""
        own = 1 + flag * FLAG + exchange.code(self._size) * CODE
        if self.add(exchange, own).answers:
            self.add(exchange, -own)  # too late: the answer holds

    def counted(self, exchange: Exchange) -> CounterState:
        # NOTE: get() waits where no rank has been counted.
        key = exchange.key("count")
        return CounterState.of(int(self._store.get(key)) if self._store.check([key]) else 0)

    def _settled(self, exchange: Exchange) -> CounterState:
        """The count once no rank must take itself or an answer back, at the latest after GRACE."""
        end = time.monotonic() + GRACE
        while True:
            count = self.counted(exchange)
            moving = count.answers and self.is_full(exchange, count)
            if not moving or time.monotonic() >= end:
                return count
            time.sleep(GRACE / 1000)

    def is_full(self, exchange: Exchange, count: CounterState) -> bool:
        """All ranks came, with the same call, to an exchange that needs no answer."""
        codes = self._size * exchange.code(self._size)
        return self.ends_when_full and count.ranks == self._size and count.codes == codes

    # --- deleting --------------------------------------------------------------------------------

    def will_delete(self, exchange: Exchange, name: str) -> None:
        """This rank deletes the key when it is not read any more."""
        self.written.append((exchange.number, exchange.key(name)))

    def keep(self, *keys: str) -> None:
        """Leave keys that this rank writes in the store until all ranks are gone."""
        self.written += [(KEPT, key) for key in keys]

    def take_turns(self, exchange: Exchange, names: Sequence[str], spared: int) -> None:
        """Choose the ranks that delete these keys, none of the first `spared` ones."""
        for i, name in enumerate(names):
            turn = (2 * exchange.number + i) % (self._size - spared)
            if spared + turn == self._rank:
                self.will_delete(exchange, name)

    def forget(self, exchange: Exchange) -> None:
        """Delete this rank's keys of earlier exchanges: every rank counted here has read them."""
        for number, key in self.written:
            if number < exchange.number:
                self._store.delete_key(key)
        self.written[:] = [entry for entry in self.written if entry[0] >= exchange.number]

    # --- answers ---------------------------------------------------------------------------------

    def publish(self, exchange: Exchange, answer: dict[str, Any], name: str = "answer") -> Any:
        """Write the answer, unless another rank has written one. Returns what is written now."""
        text = json.dumps(answer)
        if "value" not in answer:  # an exchange that succeeds has no such key
            self.will_delete(exchange, name)
        published = self.set_first(exchange, name, text)
        if name == "answer" and published == text:
            self.count_answer(exchange)
        return json.loads(published)

    def count_answer(self, exchange: Exchange) -> bool:
        """Count the answer that is written. Returns whether it holds."""
        late = self.is_full(exchange, self.add(exchange, ANSWERED))
        if late:  # all have come
            self.add(exchange, -ANSWERED)
        return not late

    def publish_failure(self, exchange: Exchange, error: BaseException) -> bool:
        """Publish that `error` was raised here. Returns False if all had agreed to go on."""
        if self._size == 1:
            return True
        text = diagnosis.failed(exchange, self._members[self._rank], error_text(error))
        answer = self.publish(exchange, {"error": text})
        if not self.counted(exchange).answers:  # an interrupt came after it was written
            self.count_answer(exchange)
        count = self._settled(exchange)
        if self.is_full(exchange, count) and not count.answers:
            return self.has(exchange, "error")
        return "value" not in answer or "failed" in (answer["value"] or ())

    def publish_error(self, exchange: Exchange, text: str) -> str:
        """Publish an error, unless one is known. Returns the one that all ranks raise."""
        return str(self.publish(exchange, {"error": text})["error"])

    def answer_of(self, exchange: Exchange) -> Any:
        """The value of the answer, which is waited for. See `value_of`."""
        return self.value_of(exchange, self.get(exchange, "answer"))

    def value_of(self, exchange: Exchange, answer: Any) -> Any:
        """The value of the published answer.

        Raises:
            RuntimeError: The answer is an error, or belongs to another exchange.
            ValueError: The ranks passed different arguments.
        """
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if "clash" in answer:
            raise self._clash(exchange, *answer["clash"])
        decided = Exchange(*answer["exchange"])
        if decided != exchange:  # the first rank is in run_on_first, this one is not
            here = exchange, self._members[self._rank]
            raise RuntimeError(diagnosis.two_positions((decided, self._members[0]), here))
        return answer["value"]

    def _clash(
        self,
        exchange: Exchange,
        finders_exchange: list[Any],
        finder: int,
        arguments: dict[str, str],
    ) -> Exception:
        """The error for two calls at once. A rank whose call is not the finder's adds its own."""
        finders = Exchange(*finders_exchange)
        if exchange != finders:
            self.publish(exchange, {"clash": [exchange, self._rank, self.arguments]}, "other")
        end = time.monotonic() + GRACE
        while not self.has(exchange, "other"):
            if time.monotonic() >= end:
                return RuntimeError(
                    f"{finders.position} was called on rank {self._members[finder]}, and something "
                    "else on other ranks."
                )
            time.sleep(GRACE / 100)
        other_exchange, other_rank, other_arguments = self.get(exchange, "other")["clash"]
        calls = [
            (self._members[finder], finders, arguments),
            (self._members[other_rank], Exchange(*other_exchange), other_arguments),
        ]
        return diagnosis.clash(*sorted(calls, key=lambda call: call[0]))

    # --- the roll, called rank by rank where some are silent -------------------------------------

    def call_roll(self, exchange: Exchange) -> bool:
        """Ask who is here. Returns whether this rank was the first to."""
        self.will_delete(exchange, "speaker")
        rank = str(self._rank)
        return self.set_first(exchange, "speaker", rank) == rank

    def answer_roll(self, exchange: Exchange) -> bool:
        """Say that this rank is here, if the roll is called. Returns whether it is."""
        if not self.has(exchange, "speaker"):
            return False
        self.set(exchange, f"here/{self._rank}", exchange)
        return True

    def missing(self, exchange: Exchange) -> list[int]:
        """The global ranks that have not answered."""
        return [
            member
            for rank, member in enumerate(self._members)
            if rank != self._rank and not self.has(exchange, f"here/{rank}")
        ]

    def silence(self, exchange: Exchange, timeout: float) -> str:
        """The error that names who is missing."""
        missing, members = self.missing(exchange), self._members
        if missing:
            return diagnosis.silence(exchange, missing, self._size, timeout)
        # All wait, so they wait for different things.
        for rank in range(self._size):
            if rank != self._rank:
                other = Exchange(*self.get(exchange, f"here/{rank}"))
                if other != exchange:
                    break
        return diagnosis.two_positions((exchange, members[self._rank]), (other, members[rank]))

    def remind(self, exchange: Exchange, seconds: float) -> None:
        """Log who is awaited."""
        missing = self.missing(exchange)
        log.warning(
            "%s has waited %.0f s for %s%s",
            exchange,
            seconds,
            diagnosis.names(missing),
            diagnosis.usual_cause(exchange, len(missing), self._size),
        )
