"""`Ranks`: the members that hold a model: their process group, messages, machines, connections.

[Note: incarnations]  The store of torchrun outlives the processes that it restarts, and with them
the messages of the killed attempt. So the keys of a coordinator begin with a random id, which the
first rank draws at construction and the process group hands to all. No message of another
attempt, or of another EMA, can be read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from . import job_keys
from .bounded_store import BoundedStore, clone, store_errors
from .connections import Connections
from .construction import together
from .coordinator import StoreCoordinator
from .diagnosis import call_text
from .machines import Machines, addresses, machine_id, numbered, pack, unpack

__all__ = ["Ranks", "refuse_destroyed", "transfer_device"]


class Ranks(StoreCoordinator):
    """The processes that call the collective verbs together. A world of one needs no process group.

    Args:
        members: Global ranks, this process among them.
        group: A process group of exactly these ranks, if there is one.
        open_store: Opens the key-value store of the job under a prefix.
        timeout: Seconds that a rank waits for the others.
        device: The device of the model on this rank, where a group that knows no other sends bytes.
        verb: What the ranks do, for errors.

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
        verb: str = "EMA",
    ) -> None:
        self.members = list(members)
        self.size = len(self.members)
        self.rank = self.members.index(dist.get_rank()) if self.size > 1 else 0
        self.group: dist.ProcessGroup | None = None
        self._device = device
        self._open_store, self._prefixes, self._prefix = open_store, 0, ""
        self._claims = job_keys.Claims(self._open_claims)
        stores: list[BoundedStore] = []
        if self.size > 1:
            # Ranks share no counters yet ([Note: construction] in construction).
            stores = together(
                call_text(verb),
                self.members,
                open_store("dist_ema/construction"),
                timeout,
                lambda: self._assemble(group, timeout),
            )
        self._connect(stores, timeout)

    def _assemble(self, group: dist.ProcessGroup | None, timeout: float) -> list[BoundedStore]:
        if self.size == dist.get_world_size():
            group = dist.group.WORLD
        elif group is None:
            # Other ranks of the job do not come here.
            group = dist.new_group(self.members, use_local_synchronization=True)
        self.group = group
        job_keys.count_leftovers(self._open_store)
        self._prefix = f"dist_ema/{self._incarnation()}"
        job_keys.delete_leftovers(self._open_store)
        store = self._open_store(self._prefix)
        return [BoundedStore(self._open_store(self._prefix), timeout), clone(store, timeout)]

    def _connect(self, stores: Sequence[BoundedStore], timeout: float) -> None:
        """Send messages over the first store, and heartbeats over the second."""
        self._stores = list(stores)
        self._thread = 0  # the one that is inside a verb
        self._machines: Machines | None = None
        self._connections: Connections | None = None
        messages, beats = stores or (None, None)
        super().__init__(messages, self.members, self.rank, timeout, beats)
        if messages is not None:
            job_keys.note_when_gone(self, messages, self._prefix, self.size, self.messages.written)

    def _open_claims(self, timeout: float) -> BoundedStore:
        # NOTE: torchrun keeps the store when it starts anew with more or fewer ranks, which form
        # other groups. As many ranks as before form the same groups.
        return clone(self._open_store(f"dist_ema/claims/{dist.get_world_size()}"), timeout)

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
                # Behind these ranks' own, because the process group may be destroyed by now.
                store = dist.PrefixStore(str(number), self._stores[0].store)
                stores = [clone(store, self.timeout) for _ in range(2)]  # messages, heartbeats
            self._prefixes = number
        other._connect(stores, self.timeout)
        return other

    @contextmanager
    def entering(self, verb: str, exchanges: float = math.inf) -> Iterator[None]:
        """As there, for one thread at a time: ranks know calls by their order alone.

        Raises:
            RuntimeError: Another thread is inside a verb.
        """
        here, inside = threading.get_ident(), self._thread
        if self.size > 1 and inside not in (0, here):
            raise RuntimeError(
                f"{call_text(verb)} was called while {call_text(self.verb)} runs in another "
                "thread. Call the collective verbs from one thread, in the same order on all ranks."
            )
        try:
            self._thread = here
            with super().entering(verb, exchanges):
                yield
        finally:
            self._thread = inside

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
        return transfer_device(self.group, self._device)

    def machines(self, verb: str) -> Machines:
        """Which ranks share a machine. The first call is *collective*, and names its verb."""
        if self._machines is None:
            numbers = self.gather(verb, machine_id(), lambda ids: pack(numbered(ids)))
            self._machines = Machines(unpack(numbers))
        return self._machines

    def connections(self, verb: str) -> Connections:
        """Connections that carry bytes between two ranks. See `machines`."""
        if self._connections is None:
            reached_at = addresses(self._stores[0].store)
            self._connections = Connections(
                self, self.machines(verb), self._prefix, reached_at, verb
            )
        return self._connections

    def broadcast(self, data: Tensor, source: int) -> None:
        """Broadcast from the rank with index `source`, inside `run_transfer`. *Collective*."""
        self.wait_for(dist.broadcast(data, self.members[source], group=self.group, async_op=True))

    def sum(self, data: Tensor) -> None:
        """Sum over all ranks, in place, inside `run_transfer`. *Collective*."""
        self.wait_for(dist.all_reduce(data, group=self.group, async_op=True))


def refuse_destroyed(verb: str, group: dist.ProcessGroup | None) -> None:
    """Raise RuntimeError where a collective over `group` cannot be sent any more."""
    try:
        if group is not None:
            dist.get_rank(group)
    except ValueError:
        raise RuntimeError(
            f"{call_text(verb)} needs the process group of the ranks that hold the weights, and it "
            "was destroyed (a model that was wrapped anew?). Build another EMA; save() and load() "
            "carry the average over."
        ) from None


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
