"""The ranks that hold a model together: checking in with a timeout, agreeing on errors, moving bytes.

Two channels. Messages (who is here, what failed, check sums) go over a `Board`: the key-value store of the process group,
as JSON, with no collective, no pickle, and a timeout that can name who is missing. Bytes go through the process group
(`wire` packs them into windows).

[Note: check in]  Exchanges are numbered, alike on every rank. Each rank adds one number to one counter, whose bits count
who came, count who left a message, and sum a code of the verb. So the last one to come knows that all are here, whether
there is anything to read, and whether all called the same verb; it combines the messages and publishes what came out. One
write per rank, and nobody else reads what the others wrote. Names are looked up only when somebody waits: a rank that has
waited for LOOK seconds says that it is here, and after the timeout the lowest of those names the ones who did not.

[Note: pulse]  While a rank works inside a verb it counts upwards in the store, so that the others can tell a slow disk
from a dead process. Any sign of life begins the timeout anew.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, overload
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FOREVER", "GRACE", "Ranks", "StoreCoordinator", "digest", "wire_device"]

T = TypeVar("T")
Combine = Callable[[list[Any]], Any]
log = logging.getLogger("dist_ema")

GRACE = 2.0  # seconds between noticing that somebody is missing and naming who
LOOK = 1.0  # seconds between two looks for a sign of life, at most
SAY = 60.0  # seconds between two lines about who is awaited
FOREVER = 1e9
_built: Counter[tuple[int, ...]] = Counter()  # boards so far, so that each has its own keys


class _Call(NamedTuple):
    """An exchange: its number, the verb, and how many exchanges of that verb came before it."""

    number: int
    verb: str
    step: int

    def key(self, name: str) -> str:
        return f"{self.number}/{name}"

    @property
    def code(self) -> int:
        return crc32(f"{self.verb} {self.step}".encode()) & 0x7FFF

    def __str__(self) -> str:
        return _called(self.verb)

    @property
    def place(self) -> str:
        return f"step {self.step} of {self}" if self.step else str(self)


class StoreCoordinator:
    """Messages among `members`, of which this process is number `rank`, on a key-value store; none for a world of one.

    `timeout` (seconds, settable) covers entering a verb; inside it, the time without a sign of life.
    """

    def __init__(
        self, store: dist.Store | None, members: Sequence[int], rank: int, timeout: float = 300.0
    ) -> None:
        assert len(members) < 1 << 16, "the counter has 16 bits for the ranks"
        self.members, self.rank, self.size = list(members), rank, len(members)
        self.timeout = timeout
        self._maybe_store = store
        self._number, self._verb, self._step = 0, "", 0
        self._ours: list[tuple[int, str]] = []  # (number, key) of what others may still read
        self._beaten = 0.0

    @property
    def _store(self) -> dist.Store:
        assert self._maybe_store is not None, "a world of one has nobody to speak to"
        return self._maybe_store

    # --- verbs -----------------------------------------------------------------------------------------------

    def begin(self, verb: str) -> None:
        """The next exchange is the one by which the verb is entered."""
        self._verb, self._step = verb, 0

    def all_gather_json(
        self, verb: str, message: Any = None, timeout: float | None = None, combine: Combine = list
    ) -> Any:
        """`combine` of everybody's message (JSON) in rank order, by default all of them. *Collective*.

        *Cost*: one write, two with a message, and one read. `combine` must be the same function on every rank; it runs on
        one of them and all read what it returns, so let that be short.

        Raises RuntimeError on every rank that waits if some did not come in time or called another verb, with their names.
        """
        if self.size == 1:
            return combine([message])
        call = self._next(verb)
        with _telling(call):
            self._post(call, message, combine)
            said = self._await(call, self.timeout if timeout is None else timeout)
            self._forget(call)
        return combine([None] * self.size) if said is None else said

    @overload
    def run_on_all(self, verb: str, work: Callable[[], T]) -> tuple[T, list[T]]: ...

    @overload
    def run_on_all(self, verb: str, work: Callable[[], T], combine: Combine) -> tuple[T, Any]: ...

    def run_on_all(
        self, verb: str, work: Callable[[], T], combine: Combine = list
    ) -> tuple[T, Any]:
        """Do `work` on every rank; return (mine, `combine` of everybody's), or raise on all if it failed on one.
        *Collective*."""
        error: Exception | None = None
        mine: Any = None
        with self._heartbeats():
            try:
                mine = work()
            except Exception as caught:  # told to the others, then raised
                error = caught
            except BaseException as caught:  # told too, but an interrupt waits for nobody
                if self.size > 1:
                    self._post(self._next(verb), {"error": _said(caught)}, self._judge(combine))
                raise
        return mine, self._agree(verb, error, mine, combine)

    def _judge(self, combine: Combine) -> Combine:
        def judge(said: list[Any]) -> Any:
            failed = [
                (self.members[i], each["error"])
                for i, each in enumerate(said)
                if each and "error" in each
            ]
            return (
                {"failed": failed[:1]}
                if failed
                else {"all": combine([each and each["value"] for each in said])}
            )

        return judge

    def _agree(self, verb: str, error: Exception | None, mine: Any, combine: Combine) -> Any:
        """What comes of everybody's results, or one error on every rank that says whose it was."""
        message = {"value": mine} if mine is not None else None
        if error is not None:
            message = {"error": _said(error)}
        try:
            said = self.all_gather_json(verb, message, combine=self._judge(combine))
        except RuntimeError as silence:
            raise (silence if error is None else error) from None
        if error is not None:
            raise error
        for rank, text in said.get("failed", ()):
            raise RuntimeError(f"{_called(verb)} failed on rank {rank}: {text}")
        return said["all"]

    def run_on_first(self, verb: str, work: Callable[[], T]) -> T:
        """Do `work` on the first rank and tell the others what came out (JSON). *Collective*. *Cost*: one write in all,
        one read each; the first rank waits for nobody."""
        if self.size == 1:
            return work()
        call = self._next(verb)
        with _telling(call):
            if self.rank > 0:
                return self._await(call, self.timeout)  # type: ignore[no-any-return]
            try:
                with self._heartbeats():
                    text = json.dumps({"of": call, "said": work()})
            except BaseException as error:
                self._publish(
                    call, {"refused": f"{call} failed on rank {self.members[0]}: {_said(error)}"}
                )
                raise
            self._set(call, "done", text)
            return json.loads(text)["said"]  # type: ignore[no-any-return]

    # --- [Note: check in] ------------------------------------------------------------------------------------

    def _next(self, verb: str) -> _Call:
        if verb != self._verb:
            self.begin(verb)
        call = _Call(self._number, verb, self._step)
        self._number, self._step = self._number + 1, self._step + 1
        return call

    def _post(self, call: _Call, message: Any, combine: Combine) -> None:
        """Leave the message and be counted; the last one to come publishes."""
        speaks = message is not None
        if speaks:
            self._set(call, str(self.rank), json.dumps(message))
        total = self._store.add(call.key("count"), 1 | speaks << 16 | call.code << 32)
        came, spoke, codes = total & 0xFFFF, total >> 16 & 0xFFFF, total >> 32
        if codes != came * call.code:
            self._publish(call, {"clash": [call, self.rank]})
        elif came == self.size:
            self._ours.append((call.number, call.key("count")))
            self._publish(
                call, {"of": call, "said": combine(self._collect(call, spoke)) if spoke else None}
            )

    def _collect(self, call: _Call, spoke: int) -> list[Any]:
        keys = [call.key(str(rank)) for rank in range(self.size)]
        if spoke == self.size:
            return [json.loads(text) for text in self._store.multi_get(keys)]
        return [
            json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys
        ]

    def _set(self, call: _Call, name: str, text: str) -> None:
        self._store.set(call.key(name), text)
        self._ours.append((call.number, call.key(name)))

    def _publish(self, call: _Call, answer: dict[str, Any]) -> None:
        """Unless somebody else has."""
        self._store.compare_set(call.key("done"), "", json.dumps(answer))
        self._ours.append((call.number, call.key("done")))

    def _await(self, call: _Call, timeout: float) -> Any:
        """What was published. Gives up when nobody has shown a sign of life for `timeout` seconds."""
        began = heard = said = time.monotonic()
        pulse = None
        while not self._comes(call, "done", min(LOOK, timeout / 4), began):
            now, before = time.monotonic(), pulse
            if before is None:
                self._set(call, f"here/{self.rank}", json.dumps(call))
            pulse = self._store.add("pulse", 0)
            heard = now if before not in (None, pulse) else heard
            # The lowest of those who wait speaks for all; if it has died, anybody does.
            if now - heard >= timeout and (
                self._lowest(call) or now - heard >= timeout + 5 * GRACE
            ):
                time.sleep(GRACE)  # whoever is only a moment late is not named
                self._publish(call, self._silence(call, timeout))
            elif now - said >= SAY:
                said = now
                if self._lowest(call):
                    log.warning(
                        "%s has waited %.0f s for %s",
                        call,
                        now - began,
                        self._names(self._missing(call)),
                    )
        return self._taken(call)

    def _comes(self, call: _Call, name: str, seconds: float, since: float) -> bool:
        """Whether somebody has set the key, or does so within `seconds`. Looks more seldom the longer it has waited.

        NOTE: store.wait() would do, but TCPStore writes two lines to stderr whenever it times out.
        """
        end = time.monotonic() + seconds
        while not self._store.check([call.key(name)]):
            now = time.monotonic()
            if now >= end:
                return False
            time.sleep(min(end - now, max(5e-4, min(LOOK / 4, (now - since) / 10))))
        return True

    def _taken(self, call: _Call) -> Any:
        answer = json.loads(self._store.get(call.key("done")))
        if "refused" in answer:
            raise RuntimeError(answer["refused"])
        if "clash" in answer:
            raise RuntimeError(self._clash(call, *answer["clash"]))
        if _Call(*answer["of"]) != call:  # the first rank decided something else
            raise RuntimeError(self._two_places((_Call(*answer["of"]), 0), (call, self.rank)))
        return answer["said"]

    def _forget(self, call: _Call) -> None:
        """Delete our keys of earlier exchanges: everybody has been counted here, so everybody has read them."""
        for number, key in self._ours:
            if number < call.number:
                self._store.delete_key(key)
        self._ours = [each for each in self._ours if each[0] >= call.number]

    # --- when something is wrong -----------------------------------------------------------------------------

    def _silence(self, call: _Call, timeout: float) -> dict[str, str]:
        missing = self._missing(call)
        if not missing:  # all wait, so not all for the same thing
            places = [
                _Call(*json.loads(self._store.get(call.key(f"here/{rank}"))))
                for rank in range(self.size)
            ]
            other = next((rank for rank, place in enumerate(places) if place != call), self.rank)
            return {"refused": self._two_places((call, self.rank), (places[other], other))}
        if call.step:
            return {
                "refused": f"{call}: {self._names(missing)} gave no sign of life for {timeout:g} s. Dead, or hung?"
            }
        return {
            "refused": f"{call} is collective, and {self._names(missing)} did not enter it within {timeout:g} s."
        }

    def _clash(self, call: _Call, found: list[Any], finder: int) -> str:
        """Two verbs at once. Those who wait in the other one than the finder's say which it is."""
        if call != _Call(*found):
            self._store.compare_set(call.key("other"), "", json.dumps([call, self.rank]))
            self._ours.append((call.number, call.key("other")))
        if not self._comes(call, "other", GRACE, time.monotonic()):
            return f"{_Call(*found).place} was called on rank {self.members[finder]}, and something else on other ranks."
        other, rank = json.loads(self._store.get(call.key("other")))
        return self._two_places((_Call(*found), finder), (_Call(*other), rank))

    def _two_places(self, *places: tuple[_Call, int]) -> str:
        (one, low), (two, high) = sorted(places, key=lambda place: place[1])
        return (
            f"rank {self.members[low]} is in {one.place} and rank {self.members[high]} in {two.place}: every rank must call "
            "the collective verbs, in the same order."
        )

    def _lowest(self, call: _Call) -> bool:
        """No rank below this one waits."""
        return not any(self._store.check([call.key(f"here/{rank}")]) for rank in range(self.rank))

    def _missing(self, call: _Call) -> list[int]:
        return [
            rank for rank in range(self.size) if not self._store.check([call.key(f"here/{rank}")])
        ]

    def _names(self, ranks: list[int]) -> str:
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(
            str(self.members[rank]) for rank in ranks
        )

    # --- [Note: pulse] ---------------------------------------------------------------------------------------

    @contextmanager
    def _heartbeats(self) -> Iterator[None]:
        if self.size == 1:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # if the store is gone, the next exchange says so
                while not done.wait(min(LOOK, self.timeout / 4)):
                    self._store.add("pulse", 1)

        thread = threading.Thread(target=beat, name="dist_ema pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def heartbeat(self) -> None:
        """A sign of life from work outside `attempt`."""
        now = time.monotonic()
        if self.size > 1 and now - self._beaten >= min(LOOK, self.timeout / 4):
            self._beaten = now
            self._store.add("pulse", 1)


def digest(value: Any) -> int:
    """Of numbers, texts, bytes and lists of them: for ranks to compare what is too long to send."""
    return crc32(repr(value).encode())


def _called(verb: str) -> str:
    return "EMA(...)" if verb == "EMA" else f"ema.{verb}()"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _telling(call: _Call) -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"{call}: the key-value store of the process group is gone; did the process that holds it (rank 0) die? {error}"
        ) from error


class Ranks:
    """`size` processes that call the collective verbs together; a world of one needs no process group."""

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
        self.group = self._whole_group(group) if self.size > 1 else None
        self._coordinator = StoreCoordinator(
            self._store(open_store), self.members, self.rank, timeout
        )
        self.begin, self.all_gather_json = (
            self._coordinator.begin,
            self._coordinator.all_gather_json,
        )
        self.run_on_all, self.run_on_first = (
            self._coordinator.run_on_all,
            self._coordinator.run_on_first,
        )

    def _whole_group(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        return (
            group
            if group is not None
            else dist.new_group(self.members, use_local_synchronization=True)
        )

    def _store(self, open_store: Callable[[str], dist.Store]) -> dist.Store | None:
        if self.size == 1:
            return None
        _built[tuple(self.members)] += 1
        return open_store(
            f"dist_ema/{crc32(str(self.members).encode()):08x}/{_built[tuple(self.members)]}"
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def timeout(self) -> float:
        """Seconds that a rank waits for the others to enter a verb."""
        return self._coordinator.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._coordinator.timeout = seconds

    # --- bytes -----------------------------------------------------------------------------------------------

    def wire_device(self) -> torch.device:
        return wire_device(self.group)

    def send(self, data: Tensor, to: int) -> None:
        self._coordinator.heartbeat()
        dist.send(data, self.members[to], group=self.group)

    def receive(self, data: Tensor, source: int) -> None:
        self._coordinator.heartbeat()
        dist.recv(data, self.members[source], group=self.group)

    def share(self, data: Tensor, source: int) -> None:
        """Broadcast within these ranks."""
        self._coordinator.heartbeat()
        dist.broadcast(data, self.members[source], group=self.group)


def wire_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where bytes must lie to be sent: the host if the group has a CPU backend, else its accelerator."""
    if group is None or "cpu" in str(dist.get_backend_config(group)).lower():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
