"""Keys in the store of averages that are gone.

[Note: leftovers]  The ranks read the last exchange of an average at different times, so none of
them may delete its keys when it leaves. A rank notes when the garbage collector has taken the
average. When it builds the next one it counts itself, and deletes its own keys of the dead one
once all its ranks are counted. Nothing of this happens in an update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from .coordinator import StoreCoordinator
from .deadlines import BoundedStore

__all__ = ["count", "delete", "note_when_gone"]

GONE = "gone"  # the ranks that are counted, and size * the ranks that have deleted their keys


@dataclass
class _Leftovers:
    prefix: str
    size: int
    keys: list[tuple[int, str]]
    counted: bool = False


_noted: list[_Leftovers] = []


def note_when_gone(coordinator: StoreCoordinator, prefix: str, store: BoundedStore) -> None:
    """Note the keys of a coordinator when it is collected. store: Its own, under the prefix."""
    store.add(GONE, 0)  # a store without this key is another one, of a later process group
    found = _Leftovers(prefix, coordinator.size, coordinator.messages.written)
    weakref.finalize(coordinator, _noted.append, found).atexit = False


def count(open_store: Callable[[str], dist.Store]) -> None:
    """Count this rank among those that have lost an average."""
    for each in list(_noted):
        store = open_store(each.prefix)
        if not store.check([GONE]):
            _noted.remove(each)
        elif not each.counted:
            each.counted = True
            store.add(GONE, 1)


def delete(open_store: Callable[[str], dist.Store]) -> None:
    """Delete this rank's keys of averages that all their ranks have lost."""
    for each in list(_noted):
        store = open_store(each.prefix)
        if store.add(GONE, 0) >= each.size:
            _noted.remove(each)
            for _, key in each.keys:
                store.delete_key(key)
            if store.add(GONE, each.size) == each.size * (each.size + 1):
                store.delete_key(GONE)
