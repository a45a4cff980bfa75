"""Signs of life of ranks at work.

[Note: heartbeat]  A rank that works inside a verb, or in the block of a swap, increments two
counters of the store from a thread: one of its own, and one that all share. So the others can tell
a slow disk or a long evaluation from a dead process: every heartbeat begins the timeout anew. The
thread has a connection of its own, because one that waits is locked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["Heartbeats"]


class Heartbeats:
    """Heartbeats of one rank, and the counters of all ([Note: heartbeat]).

    Args:
        store: A connection for the thread alone.
        readers: The connection by which this rank looks for heartbeats.
        rank: Of this process.
        size: The number of ranks.
    """

    def __init__(self, store: Any, readers: Any, rank: int, size: int) -> None:
        self._store, self._readers, self._rank, self._size = store, readers, rank, size

    @contextmanager
    def sent(self, interval: float) -> Iterator[None]:
        """Send one every `interval` seconds from a thread while the block runs."""
        if self._size == 1:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # if the store is gone, the next exchange reports it
                while not done.wait(interval):
                    self.send()

        thread = threading.Thread(target=beat, name="dist_ema heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def send(self) -> None:
        """Send one."""
        self._store.add(f"heartbeats/{self._rank}", 1)
        self._store.add("heartbeats", 1)

    def of(self, rank: int) -> int:
        return self._readers.add(f"heartbeats/{rank}", 0)  # type: ignore[no-any-return]

    def of_all(self) -> int:
        """The heartbeats of all ranks together."""
        return self._readers.add("heartbeats", 0)  # type: ignore[no-any-return]

    def of_each(self) -> list[int]:
        return [self.of(rank) for rank in range(self._size)]
