"""`Ranks`: the members that hold a model, their group and store; claimed paths, keys left behind.

[Note: incarnations]  The store of torchrun outlives the processes that it restarts, and with them
the messages of the killed attempt. So the keys of a coordinator begin with a random id, which the
first rank draws at construction and the process group hands to all. No message of another
attempt, or of another EMA, can be read.

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
from copy import copy
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from .connections import Connections
from .coordinator import StoreCoordinator, store_errors
from .deadlines import BoundedStore, together, within
from .machines import Machines, addresses, machine_id, numbered, pack, unpack

__all__ = ["RECENT", "Claims", "Ranks", "transfer_device"]

RECENT = 16  # paths that ranks claim at a time; the keys of earlier ones are deleted
GONE = "gone"  # the ranks that are counted, and size * the ranks that have deleted their keys


class Ranks(StoreCoordinator):
    """The processes that call the collective verbs together. A world of one needs no process group.

    Args:
        members: Global ranks, this process among them.
        group: A process group of exactly these ranks, if there is one.
        open_store: Opens the key-value store of the job under a prefix.
        timeout: Seconds that a rank waits for the others.
        device: The device of the model on this rank, where a group that knows no other sends bytes.

    Raises:
        RuntimeError: Ranks did not come within `timeout`; they are named.

    Note:
        *Collective*: sums 16 bytes, and makes a process group if `group` is not given and
        the ranks are not the whole job.
    """

    def __init__(
        self,
        members: Sequence[int],
        group: dist.ProcessGroup | None,
        open_store: Callable[[str], dist.Store],
        timeout: float = 300.0,
        device: torch.device | None = None,
    ) -> None:
        self.members, self.device = list(members), device
        self.size = len(self.members)
        self.rank = self.members.index(dist.get_rank()) if self.size > 1 else 0
        self.group: dist.ProcessGroup | None = None
        self._open_store, self._prefixes, self._prefix = open_store, 0, ""
        self._claims = Claims(self._open_claims)
        stores: list[BoundedStore] = []
        if self.size > 1:
            counters = open_store("dist_ema/construction")
            # Ranks share no counters yet, so this has deadlines of its own ([Note: construction]).
            stores = together(
                "EMA(...)", self.members, counters, timeout, lambda: self._assemble(group, timeout)
            )
        self._connect(stores, timeout)

    def _assemble(self, group: dist.ProcessGroup | None, timeout: float) -> list[BoundedStore]:
        self.group = self._whole_group(group)
        _count_leftovers(self._open_store)
        self._prefix = f"dist_ema/{self._incarnation()}"
        _delete_leftovers(self._open_store)
        messages = BoundedStore(self._open_store(self._prefix), timeout)
        return [messages, self._open_bounded(self._prefix, timeout)]

    def _connect(self, stores: Sequence[BoundedStore], timeout: float) -> None:
        """Send messages over the first store, and heartbeats over the second."""
        self._stores = list(stores)
        self._machines: Machines | None = None
        self._connections: Connections | None = None
        messages, beats = stores or (None, None)
        super().__init__(messages, self.members, self.rank, timeout, beats)
        if messages is not None:
            messages.add(GONE, 0)  # a store without this key is one of a later process group
            found = _Leftovers(self._prefix, self.size, self.messages.written)
            weakref.finalize(self, _noted.append, found).atexit = False  # [Note: leftovers]

    def _open_bounded(self, prefix: str, timeout: float) -> BoundedStore:
        """Another connection to the store. Raises DistNetworkError if that takes `timeout`."""
        # NOTE: a connection that waits is locked, and another thread would wait with it.
        store: Any = self._open_store(prefix)
        return BoundedStore(within(timeout, store.clone), timeout)

    def _open_claims(self, timeout: float) -> BoundedStore:
        # NOTE: torchrun keeps the store when it starts anew with more or fewer ranks, which form
        # other groups. As many ranks as before form the same groups.
        return self._open_bounded(f"dist_ema/claims/{dist.get_world_size()}", timeout)

    def with_own_messages(self) -> Ranks:
        """The same ranks, with messages over connections of their own.

        Raises:
            RuntimeError: It takes longer than the timeout.
        """
        other, stores = copy(self), list[BoundedStore]()
        if self.size > 1:
            number = self._prefixes + 1  # every rank calls this as often as the others do
            other._prefixes, other._prefix = 0, f"{self._prefix}/{number}"
            with store_errors(self.verb):
                stores = [self._open_bounded(other._prefix, self.timeout) for _ in range(2)]
            self._prefixes = number
        other._connect(stores, self.timeout)
        return other

    def _whole_group(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        if group is None:
            # Other ranks of the job do not come here.
            group = dist.new_group(self.members, use_local_synchronization=True)
        return group

    def _incarnation(self) -> str:
        """A random id, the same on all ranks ([Note: incarnations])."""
        # NOTE: not from torch's generator, whose numbers belong to the training.
        token = list(uuid4().bytes) if self.first else [0] * 16
        data = torch.tensor(token, dtype=torch.uint8, device=self.transfer_device())
        # NOTE: a sum and no broadcast, which a rank may leave before the others have come.
        dist.all_reduce(data, group=self.group)
        return bytes(data.tolist()).hex()

    def claim(self, key: str, value: str) -> tuple[list[int], str]:
        """Put a value into the store of the job, unless other ranks put one there before.

        Returns:
            (ranks, value) that stand there now: these ranks' own, or those of the others.
        """
        if not dist.is_initialized() or self.size == dist.get_world_size():
            return self.members, value
        with store_errors(self.verb):
            return self._claims.claim(key, self.members, value, self.timeout)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def timeout(self) -> float:  # type: ignore[override]
        """Seconds that a rank waits for the others to enter a verb."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        for store in self._stores:
            store.timeout = seconds

    # --- bytes -----------------------------------------------------------------------------------

    def transfer_device(self) -> torch.device:
        """`transfer_device` of the group of these ranks."""
        return transfer_device(self.group, self.device)

    def machines(self, verb: str) -> Machines:
        """Which ranks share a machine. The first call is *collective*, and names its verb."""
        if self._machines is None:
            numbers = self.gather(verb, machine_id(), lambda ids: pack(numbered(ids)))
            self._machines = Machines(unpack(numbers))
        return self._machines

    def connections(self, verb: str) -> Connections:
        """Connections that carry bytes between two ranks. See `machines`."""
        if self._connections is None:
            store = self._open_store(self._prefix)
            self._connections = Connections(
                self, self.machines(verb), self._prefix, addresses(store), verb
            )
        return self._connections

    def broadcast(self, data: Tensor, source: int) -> None:
        """Broadcast from the rank with index `source`, inside `run_transfer`. *Collective*."""
        self.wait_for(dist.broadcast(data, self.members[source], group=self.group, async_op=True))

    def sum(self, data: Tensor) -> None:
        """Sum over all ranks, in place, inside `run_transfer`. *Collective*."""
        self.wait_for(dist.all_reduce(data, group=self.group, async_op=True))


def transfer_device(
    group: dist.ProcessGroup | None, beside: torch.device | None = None
) -> torch.device:
    """The device of sent bytes: the host if the group has a backend for it, else an accelerator.

    That is `beside`, where the bytes lie, or the one that the group is bound to, or the current.
    """
    # The configuration reads "cpu:gloo,cuda:nccl": a device type, then its backend.
    pairs = [] if group is None else dist.get_backend_config(group).split(",")
    if group is None or "cpu" in dict(pair.split(":") for pair in pairs):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    if beside is not None and beside.type == accelerator.type:
        return beside
    bound = group.bound_device_id
    return bound or torch.device(accelerator.type, torch.accelerator.current_device_index())


# --- keys in the store that are no exchange's -----------------------------------------------------


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


def _count_leftovers(open_store: Callable[[str], dist.Store]) -> None:
    """Count this rank among those that have lost an average."""
    for leftovers in list(_noted):
        store = open_store(leftovers.prefix)
        if not store.check([GONE]):
            _noted.remove(leftovers)
        elif not leftovers.counted:
            leftovers.counted = True
            store.add(GONE, 1)


def _delete_leftovers(open_store: Callable[[str], dist.Store]) -> None:
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
