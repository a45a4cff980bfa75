"""Which ranks write to a path, for averages whose ranks do not know of each other."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence

from .deadlines import BoundedStore

__all__ = ["Claims"]

RECENT = 16  # paths that ranks claim at a time; the keys of earlier ones are deleted


class Claims:
    """Paths that these ranks have claimed in the store of the job.

    Args:
        open_store: Opens a connection to it, with a timeout in seconds.

    Note:
        *Cost*: one connection, from the first claim on.
    """

    def __init__(self, open_store: Callable[[float], BoundedStore]) -> None:
        self._open_store = open_store
        self._store: BoundedStore | None = None
        self._recent: deque[str] = deque()

    def claim(
        self, key: str, members: Sequence[int], value: str, timeout: float
    ) -> tuple[list[int], str]:
        """See `Ranks.claim`."""
        if self._store is None:
            self._store = self._open_store(timeout)
        self._store.timeout = timeout
        own = json.dumps([members, value])
        claimants, found = json.loads(self._store.compare_set(key, "", own))
        if claimants != members:
            return claimants, found
        if found != value:
            self._store.set(key, own)
        if key in self._recent:
            self._recent.remove(key)
        self._recent.append(key)
        if len(self._recent) > RECENT:
            self._store.delete_key(self._recent.popleft())
        return claimants, value
