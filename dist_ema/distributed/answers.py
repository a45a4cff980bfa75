"""`Answers`: the answers that end exchanges ([Note: check in] in coordinator)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from . import diagnosis
from .diagnosis import Exchange, error_text
from .messages import ANSWERED, Messages

__all__ = ["Answers"]

GRACE = 2.0  # seconds that a rank has to say what it called instead


class Answers:
    """Publishes and reads the answers of exchanges.

    Args:
        messages: Of these ranks.
        members: The global ranks.
        rank: The index of this process in `members`.

    Attributes:
        ends_when_full: The current exchange needs no answer.
        arguments: Of the verb that was entered last, as texts.
    """

    def __init__(self, messages: Messages, members: Sequence[int], rank: int) -> None:
        self._messages, self._members, self._rank = messages, members, rank
        self.ends_when_full = False
        self.arguments: dict[str, str] = {}

    def publish(self, exchange: Exchange, answer: dict[str, Any], name: str = "answer") -> Any:
        """Write the answer, unless another rank has written one. Returns what is written now."""
        messages, text = self._messages, json.dumps(answer)
        if "value" not in answer:  # an exchange that succeeds has no such key
            messages.will_delete(exchange, name)
        published = messages.set_first(exchange, name, text)
        if name == "answer" and published == text:
            self._count(exchange)
        return json.loads(published)

    def _count(self, exchange: Exchange) -> None:
        total = self._messages.add(exchange, ANSWERED)
        if self.ends_when_full and self._messages.is_full(exchange, total):
            self._messages.add(exchange, -ANSWERED)  # too late: all have come

    def publish_failure(self, exchange: Exchange, error: BaseException) -> bool:
        """Publish that `error` was raised here. Returns False if all had agreed to go on."""
        if len(self._members) == 1:
            return True
        text = diagnosis.failed(exchange, self._members[self._rank], error_text(error))
        answer = self.publish(exchange, {"error": text})
        messages = self._messages
        if not messages.counted(exchange).answers:  # an interrupt came after it was written
            self._count(exchange)
        if self.ends_when_full and messages.is_full(exchange, messages.counted(exchange)):
            return messages.has(exchange, "error")
        return "value" not in answer or "failed" in (answer["value"] or ())

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
            positions = (decided, self._members[0]), (exchange, self._members[self._rank])
            raise RuntimeError(diagnosis.two_positions(*positions))
        return answer["value"]

    def _clash(
        self, exchange: Exchange, found: list[Any], finder: int, arguments: dict[str, str]
    ) -> Exception:
        """The error for two calls at once. A rank whose call is not the finder's adds its own."""
        finders = Exchange(*found)
        if exchange != finders:
            self.publish(exchange, {"clash": [exchange, self._rank, self.arguments]}, "other")
        end = time.monotonic() + GRACE
        while not self._messages.has(exchange, "other"):
            if time.monotonic() >= end:
                return RuntimeError(
                    f"{finders.position} was called on rank {self._members[finder]}, and something "
                    "else on other ranks."
                )
            time.sleep(GRACE / 100)
        found, rank, others = self._messages.get(exchange, "other")["clash"]
        calls = [
            (self._members[finder], finders, arguments),
            (self._members[rank], Exchange(*found), others),
        ]
        return diagnosis.clash(*sorted(calls, key=lambda call: call[0]))

    def publish_error(self, exchange: Exchange, text: str) -> str:
        """Publish an error, unless one is known. Returns the one that all ranks raise."""
        return str(self.publish(exchange, {"error": text})["error"])
