"""`Messages`: what ranks write into the store for an exchange ([Note: check in] in coordinator)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .diagnosis import Exchange

__all__ = ["ANSWERED", "FLAG", "Count", "Messages"]

KEPT = 1 << 62  # the number of keys that are no exchange's
FLAG, ANSWERED, CODE = 1 << 15, 1 << 30, 1 << 35


class Count(NamedTuple):
    """What the counter of an exchange says ([Note: check in] in coordinator)."""

    ranks: int
    flags: int
    answers: int
    codes: int

    @classmethod
    def of(cls, total: int) -> Count:
        return cls(total % FLAG, total // FLAG % FLAG, total // ANSWERED % 8, total // CODE)


class Messages:
    """The keys of exchanges, and the counter of each.

    Args:
        store: Holds the messages.
        rank: Of this process.
        size: The number of ranks.

    Attributes:
        written: (number of the exchange, key) that this rank has to delete. The same list for ever.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.written: list[tuple[int, str]] = []

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

    def add(self, exchange: Exchange, n: int) -> Count:
        return Count.of(self._store.add(exchange.key("count"), n))

    def count(self, exchange: Exchange, flag: bool = False) -> None:
        """Count this rank, unless there is an answer already."""
        own = 1 + flag * FLAG + exchange.code(self._size) * CODE
        if self.add(exchange, own).answers:
            self.add(exchange, -own)  # too late: the answer holds

    def counted(self, exchange: Exchange) -> Count:
        # NOTE: get() waits where no rank has been counted.
        key = exchange.key("count")
        return Count.of(int(self._store.get(key)) if self._store.check([key]) else 0)

    def is_full(self, exchange: Exchange, count: Count) -> bool:
        """All ranks came, with the same call."""
        codes = self._size * exchange.code(self._size)
        return count.ranks == self._size and count.codes == codes

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
