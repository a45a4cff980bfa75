"""The ranks that hold a model together: checking in with a timeout, agreeing on errors, moving bytes in windows.

Two channels. Messages (who is here, what failed, check sums) go through the key-value store of the process group as
JSON: no collective, no pickle, and a timeout that can name who is missing. Bytes go through the process group (`wire`
packs them into windows).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FOREVER", "GRACE", "Ranks", "wire_device"]

T = TypeVar("T")
log = logging.getLogger("dist_ema")

GRACE = 2.0  # seconds between noticing that somebody is missing and naming who
FOREVER = 1e9
_built: Counter[tuple[int, ...]] = Counter()  # groups so far, so that each has its own keys


class Ranks:
    """`size` processes that call the collective verbs together; a world of one needs no process group.

    `timeout` (seconds, settable) covers entering a verb; inside it, the time without a sign of life ([Note: pulse]).
    """

    def __init__(
        self,
        members: Sequence[int],
        group: dist.ProcessGroup | None,
        open_store: Callable[[str], dist.Store],
        timeout: float = 300.0,
    ) -> None:
        self.members = list(members)
        self.size = len(self.members)
        self.rank = self.members.index(dist.get_rank()) if self.size > 1 else 0
        self.timeout = timeout
        self._calls: Counter[str] = Counter()
        self._previous: str | None = None
        self.group = self._whole_group(group) if self.size > 1 else None
        if self.size > 1:
            _built[tuple(self.members)] += 1
            number = _built[tuple(self.members)]
            self._store = open_store(f"dist_ema/{crc32(str(self.members).encode()):08x}/{number}")

    def _whole_group(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        return group if group is not None else dist.new_group(self.members, use_local_synchronization=True)

    @property
    def first(self) -> bool:
        return self.rank == 0

    # --- messages --------------------------------------------------------------------------------------------

    def exchange(self, verb: str, message: Any = None, timeout: float | None = None) -> list[Any]:
        """Everybody's message (JSON), in rank order. *Collective*. *Cost*: three store operations, no collective.

        Raises RuntimeError, on every rank that waits, with the names of the ranks that did not come in time.
        """
        if self.size == 1:
            return [message]
        key = f"{verb}/{self._calls[verb]}"
        self._calls[verb] += 1
        self._store.set(f"{key}/{self.rank}", json.dumps(message))
        if self._store.add(f"{key}/count", 1) == self.size:
            everyone = self._store.multi_get([f"{key}/{rank}" for rank in range(self.size)])
            self._store.compare_set(f"{key}/all", "", f"[{b','.join(everyone).decode()}]")
            self._forget_previous()
        self._await(verb, key, self.timeout if timeout is None else timeout)
        answer = json.loads(self._store.get(f"{key}/all"))
        self._previous = key
        if isinstance(answer, dict):
            raise RuntimeError(answer["given up"])
        return list(answer)

    def _await(self, verb: str, key: str, timeout: float) -> None:
        """Until everybody has spoken; a rank that is still at work inside the verb ([Note: pulse]) is given time."""
        started, pulse = time.monotonic(), self._pulse()
        while True:
            left = timeout - (time.monotonic() - started)
            try:
                self._store.wait([f"{key}/all"], timedelta(seconds=max(0.1, min(60.0, left))))
                return
            except (dist.DistStoreError, RuntimeError):
                missing = self._missing(key)  # raises too if it is the store that broke
            if self._pulse() != pulse:
                started, pulse = time.monotonic(), self._pulse()
            elif missing and time.monotonic() - started >= timeout:
                time.sleep(GRACE)  # whoever is only a moment late is not named
                names = self._names(self._missing(key) or missing)
                text = f"ema.{verb}() is collective, and {names} did not enter it within {timeout:g} s."
                self._store.compare_set(f"{key}/all", "", json.dumps({"given up": text}))
                return
            log.warning("ema.%s() has waited %.0f s for %s", verb, time.monotonic() - started, self._names(missing))

    def _pulse(self) -> list[int]:
        return [self._store.add(f"pulse/{rank}", 0) for rank in range(self.size)]

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """[Note: pulse]  A thread counts upwards in the store while a rank works, so that the others can tell a slow disk
        from a dead process."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(min(1.0, self.timeout / 4)):
                self._store.add(f"pulse/{self.rank}", 1)

        thread = threading.Thread(target=beat, name="dist_ema pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _missing(self, key: str) -> list[int]:
        return [rank for rank in range(self.size) if not self._store.check([f"{key}/{rank}"])]

    def _forget_previous(self) -> None:
        """Delete the exchange before this one: whoever has come here has read it."""
        if self._previous:
            for name in ("count", "all", *map(str, range(self.size))):
                self._store.delete_key(f"{self._previous}/{name}")

    def _names(self, ranks: list[int]) -> str:
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(self.members[rank]) for rank in ranks)

    def agree(self, verb: str, error: BaseException | None, message: Any = None) -> list[Any]:
        """Everybody's message, or one error on every rank that says whose it was. *Collective*."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        said = self.exchange(verb, {"error": text, "message": message})
        if error is not None:
            raise error
        failed = {self.members[rank]: entry["error"] for rank, entry in enumerate(said) if entry["error"]}
        if failed:
            rank, text = next(iter(failed.items()))
            raise RuntimeError(f"ema.{verb}() failed on rank {rank}: {text}")
        return [entry["message"] for entry in said]

    def attempt(self, verb: str, work: Callable[[], T]) -> tuple[T, list[T]]:
        """Do `work` on every rank; return (mine, everybody's), or raise on all if it failed on one. *Collective*."""
        error: BaseException | None = None
        mine: Any = None
        with self._beating() if self.size > 1 else nullcontext():
            try:
                mine = work()
            except Exception as caught:  # told to the others, then raised
                error = caught
        return mine, self.agree(verb, error, mine)

    def decide(self, verb: str, work: Callable[[], T]) -> T:
        """Do `work` on the first rank and tell the others what came out (JSON). *Collective*."""
        return self.attempt(verb, work if self.first else lambda: None)[1][0]  # type: ignore[return-value, arg-type]

    # --- bytes -----------------------------------------------------------------------------------------------

    def wire_device(self) -> torch.device:
        return wire_device(self.group)

    def send(self, data: Tensor, to: int) -> None:
        dist.send(data, self.members[to], group=self.group)

    def receive(self, data: Tensor, source: int) -> None:
        dist.recv(data, self.members[source], group=self.group)

    def share(self, data: Tensor, source: int) -> None:
        """Broadcast within these ranks."""
        dist.broadcast(data, self.members[source], group=self.group)


def wire_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where bytes must lie to be sent: the host if the group has a CPU backend, else its accelerator."""
    if group is None or "cpu" in str(dist.get_backend_config(group)).lower():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
