"""Keys of the store that no exchange owns: `Claims` to paths, and leftovers of dead averages.

[Note: leftovers]  The ranks read the last exchange of an average at different times, so none of
them may delete its keys when it leaves. A rank notes when the garbage collector has taken the
average. When it builds the next one it counts itself, and deletes its own keys of the dead one
once all its ranks are counted. Nothing of this happens in an update.
"""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from .bounded_store import BoundedStore

__all__ = ["RECENT", "Claims", "count_leftovers", "delete_leftovers", "note_when_gone"]

RECENT = 16  # paths that ranks claim at a time; the keys of earlier ones are deleted
GONE = "gone"  # the ranks that are counted, and size * the ranks that have deleted their keys


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
        key = json.dumps(key)  # a path may hold bytes that are no text, which no store takes
        own = json.dumps([members, value])
        claimants, claimed = json.loads(self._store.compare_set(key, "", own))
        if claimants != members:
            return claimants, claimed
        # These ranks' own claim, of an average with other weights that is gone by now.
        if claimed != value:
            self._store.set(key, own)
        if key in self._recent:
            self._recent.remove(key)
        self._recent.append(key)
        if len(self._recent) > RECENT:
            self._store.delete_key(self._recent.popleft())
        return claimants, value


@dataclass
class _Leftovers:
    prefix: str
    size: int
    keys: list[tuple[int, str]]
    counted: bool = False


_noted: list[_Leftovers] = []


def note_when_gone(
    owner: Any, store: BoundedStore, prefix: str, size: int, keys: list[tuple[int, str]]
) -> None:
    """Note these keys of `size` ranks once the garbage collector has taken their owner."""
    store.add(GONE, 0)  # a store without this key is one of a later process group
    weakref.finalize(owner, _noted.append, _Leftovers(prefix, size, keys)).atexit = False


def count_leftovers(open_store: Callable[[str], dist.Store]) -> None:
    """Count this rank among those that have lost an average."""
    for leftovers in list(_noted):
        store = open_store(leftovers.prefix)
        if not store.check([GONE]):
            _noted.remove(leftovers)
        elif not leftovers.counted:
            leftovers.counted = True
            store.add(GONE, 1)


def delete_leftovers(open_store: Callable[[str], dist.Store]) -> None:
    """Delete this rank's keys of averages that all their ranks have lost."""
    for leftovers in list(_noted):
        store = open_store(leftovers.prefix)
        if store.add(GONE, 0) >= leftovers.size:
            _noted.remove(leftovers)
            for _, key in leftovers.keys:
                store.delete_key(key)
            # The last rank that has deleted its keys deletes the counter too.
            if store.add(GONE, leftovers.size) == leftovers.size * (leftovers.size + 1):
                store.delete_key(GONE)
