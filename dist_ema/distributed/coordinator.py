"""`Ranks` and `StoreCoordinator`: messages over the store, timeouts, and one error for all ranks.

Messages (who has come, what failed, hashes) go over a `StoreCoordinator`: JSON in the key-value
store of the process group, with a timeout that names who is missing. Bytes go over the process
group, which `transfer` feeds with windows.

[Note: check in]  Exchanges are numbered, alike on every rank. An exchange has these states:

    enter     a rank takes the next number, and writes its message if it has one
    count     it adds one number to one counter, whose bits count ranks, messages and verbs
    publish   the last rank counted combines the messages and writes the answer
    wait      the others poll for the answer and read it

         enter --> count --+--> last: publish ----------------+--> answer on every rank
                           +--> calls differ: publish error --+
                           +--> wait --+----------------------+
                                       +--> silence: publish error

The counter also sums a code of the verb and its arguments, so a rank that passes others is found
without a message. Only then two ranks publish what they passed.

A rank writes once, twice with a message, and reads once. Ranks are looked up one by one only in
`silence`: a rank that waits longer than POLL writes that it is here. After the timeout the lowest
of those publishes the names of the others.

[Note: heartbeat]  A rank that works inside a verb, or in the block of a swap, increments two
counters of the store from a thread: one of its own, and one that all share. So the others can tell
a slow disk or a long evaluation from a dead process: every heartbeat begins the timeout anew. The
thread has a connection of its own, because one that waits is locked.

[Note: bytes]  Bytes travel inside `run_transfer`, in windows. A window that fails, or that does not
arrive within the timeout, ends the transfer on every rank. The rank that notices looks whose
counter stands still, and publishes that as the answer of the exchange that ends the transfer. A
rank that waits for a window looks for that answer every POLL, so all raise the same sentence.

[Note: incarnations]  The store of torchrun outlives the processes that it restarts, and with them
the messages of the killed attempt. So the keys of a coordinator begin with a random id, which the
first rank draws at construction and the process group hands to all. No message of another
attempt, or of another EMA, can be read.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, overload
from uuid import uuid4
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from .deadlines import BoundedStore, store_is_silent, together, within

__all__ = ["GRACE", "Ranks", "StoreCoordinator", "digest", "transfer_device"]

T = TypeVar("T")
Combine = Callable[[list[Any]], Any]
log = logging.getLogger("dist_ema")

GRACE = 2.0  # seconds between the timeout and the search for missing ranks
POLL = 1.0  # seconds between two looks for a heartbeat, at most
FIRST_REMINDER = 10.0  # seconds until the first line about who is awaited
REMIND = 60.0  # seconds between two such lines


class _Exchange(NamedTuple):
    """An exchange: its number, the verb, and how many exchanges of that verb came before it."""

    number: int
    verb: str
    step: int
    arguments: int = 0  # a digest, in the first exchange of a verb

    def key(self, name: str) -> str:
        return f"{self.number}/{name}"

    def code(self, ranks: int) -> int:
        """A hash of the call, of as many bits as the counter has room for in the sum of `ranks`."""
        return digest([self.verb, self.step, self.arguments]) >> (1 + (ranks - 1).bit_length())

    def __str__(self) -> str:
        return _call_text(self.verb)

    @property
    def position(self) -> str:
        return f"step {self.step} of {self}" if self.step else str(self)


class StoreCoordinator:
    """Exchanges of JSON messages among ranks, over a key-value store ([Note: check in]).

    Args:
        store: Holds the messages. None for a world of one.
        members: The global ranks.
        rank: The index of this process in `members`.
        timeout: Seconds that a rank waits for the others to enter a verb, and inside the verb the
            seconds without a heartbeat or a window of bytes. It may be set later.
        heartbeat_store: Another connection to `store`, for heartbeats.
    """

    def __init__(
        self,
        store: dist.Store | BoundedStore | None,
        members: Sequence[int],
        rank: int,
        timeout: float = 300.0,
        heartbeat_store: dist.Store | BoundedStore | None = None,
    ) -> None:
        assert len(members) < 1 << 16, "the counter has 16 bits for the ranks"
        self.members, self.rank, self.size = list(members), rank, len(members)
        self.timeout = timeout
        self._maybe_store = store
        self._number, self._verb, self._step = 0, "", 0
        self._arguments: dict[str, str] = {}
        self._written: list[tuple[int, str]] = []  # (number, key), not deleted yet
        self._heartbeat_store = heartbeat_store or store
        self._transfer: _Exchange | None = None  # the exchange that ends the bytes under way

    @property
    def verb(self) -> str:
        """The verb that was entered last."""
        return self._verb

    @property
    def _store(self) -> dist.Store | BoundedStore:
        assert self._maybe_store is not None, "a world of one exchanges no messages"
        return self._maybe_store

    # --- verbs -----------------------------------------------------------------------------------

    def begin(self, verb: str, arguments: dict[str, Any] | None = None) -> None:
        """Make the next exchange the one by which `verb` is entered.

        Args:
            verb: What the ranks do.
            arguments: What must be the same on every rank, by the names that errors use. The next
                exchange raises ValueError where it is not.
        """
        self._verb, self._step = verb, 0
        self._arguments = {name: _text(value) for name, value in (arguments or {}).items()}

    def all_gather_json(self, verb: str, message: Any = None, combine: Combine = list) -> Any:
        """Combine the messages of all ranks.

        Args:
            verb: What the ranks do, for errors. It must be the same on every rank.
            message: JSON, or None, which costs nothing.
            combine: The same function on every rank. It runs on one of them, and should be short.

        Returns:
            What `combine` makes of the messages in rank order; by default their list.

        Raises:
            RuntimeError: Some ranks did not come in time, or called another verb. It names them,
                and is raised on every rank that waits.

        Note:
            *Collective*. *Cost*: one write, two with a message, and one read.
        """
        if self.size == 1:
            return combine([message])
        exchange = self._next(verb)
        with self._reported(exchange):
            self._post(exchange, message, combine)
            answer = self._await(exchange, self.timeout)
            self._forget(exchange)
        return combine([None] * self.size) if answer is None else answer

    @overload
    def run_on_all(self, verb: str, work: Callable[[], T]) -> tuple[T, list[T]]: ...

    @overload
    def run_on_all(self, verb: str, work: Callable[[], T], combine: Combine) -> tuple[T, Any]: ...

    def run_on_all(
        self, verb: str, work: Callable[[], T], combine: Combine = list
    ) -> tuple[T, Any]:
        """Do `work` on every rank, and wait for all.

        Returns:
            The result of this rank, and what `combine` makes of the results of all (JSON).

        Raises:
            Exception: What `work` raised here.
            RuntimeError: `work` failed on another rank, which is named.

        Note:
            *Collective*. Heartbeats are sent while `work` runs.
        """
        error: Exception | None = None
        result: Any = None
        with self.heartbeats():
            try:
                result = work()
            except Exception as caught:  # the others learn of it first
                error = caught
            except BaseException as caught:  # an interrupt is published, and waits for no rank
                self._publish_failure(self._next(verb), caught)
                raise
        return result, self._agree(verb, error, result, combine)

    def run_transfer(self, verb: str, work: Callable[[], None]) -> None:
        """Do `work`, which waits for bytes by `wait_for`, on every rank ([Note: bytes]).

        Raises:
            Exception: What `work` raised here.
            RuntimeError: It failed on another rank. The rank to blame is named.

        Note:
            *Collective*. An error waits for no rank.
        """
        if self.size == 1:
            work()
            return
        exchange = self._transfer = self._next(verb)
        with _store_errors(exchange.verb):
            try:
                with self.heartbeats():
                    work()
            except BaseException as error:
                self._publish_failure(exchange, error)
                raise
            self._post(exchange, None, list)
            self._await(exchange, self.timeout)
            self._forget(exchange)

    def wait_for(self, transfer: dist.Work) -> None:
        """Wait until a window of bytes has arrived or gone. Only inside `run_transfer`.

        Raises:
            RuntimeError: It failed, or took longer than the timeout, here or on another rank.
        """
        assert self._transfer is not None
        began = time.monotonic()
        while not _completes(transfer, self._interval):
            if self._store.check([self._transfer.key("answer")]):
                self._taken(self._transfer, self._store.get(self._transfer.key("answer")))
            if time.monotonic() - began >= self.timeout:
                raise RuntimeError(self._blame(self._transfer, f"for {self.timeout:g} s"))
        try:
            transfer.wait()  # raises what failed, and orders the stream of an accelerator
        except RuntimeError as error:
            cause = f"({str(error).split('. ')[0]})"  # gloo's first sentence
            raise RuntimeError(self._blame(self._transfer, cause)) from error

    def _error_or(self, combine: Combine) -> Combine:
        """`combine` of the values, or the first error among the messages."""

        def first_error_or_values(messages: list[Any]) -> Any:
            for member, message in zip(self.members, messages, strict=True):
                if message and "error" in message:
                    return {"failed": [member, message["error"]]}
            return {"all": combine([message and message["value"] for message in messages])}

        return first_error_or_values

    def _agree(self, verb: str, error: Exception | None, result: Any, combine: Combine) -> Any:
        """The combined results, or one error on every rank that names the rank that failed."""
        message = {"value": result} if result is not None else None
        if error is not None:
            message = {"error": _error_text(error)}
        try:
            answer = self.all_gather_json(verb, message, combine=self._error_or(combine))
        except RuntimeError as silence:
            raise (silence if error is None else error) from None
        if error is not None:
            raise error
        if "failed" in answer:
            rank, text = answer["failed"]
            raise RuntimeError(f"{_call_text(verb)} failed on rank {rank}: {text}")
        return answer["all"]

    def run_on_first(self, verb: str, work: Callable[[], T], timeout: float | None = None) -> T:
        """Do `work` on the first rank, and return its result (JSON) on every rank.

        Args:
            verb: See `all_gather_json`.
            work: What to do there.
            timeout: Seconds that the others wait without a heartbeat, in place of the usual.

        Raises:
            Exception: What `work` raised, on the first rank.
            RuntimeError: The same on the others.

        Note:
            *Collective*. *Cost*: one write in all, one read each. The first rank waits for no one.
        """
        if self.size == 1:
            return work()
        exchange = self._next(verb)
        with self._reported(exchange):
            if self.rank > 0:
                seconds = self.timeout if timeout is None else timeout
                return self._await(exchange, seconds)  # type: ignore[no-any-return]
            try:
                with self.heartbeats():
                    answer = {"exchange": exchange, "value": work()}
                    published = self._publish(exchange, answer)
            except BaseException as error:
                self._publish_failure(exchange, error)
                raise
            return self._taken(exchange, published)  # type: ignore[no-any-return]

    # --- [Note: check in] ------------------------------------------------------------------------

    def _next(self, verb: str) -> _Exchange:
        if verb != self._verb:
            self.begin(verb)
        arguments = 0 if self._step else digest(sorted(self._arguments.items()))
        exchange = _Exchange(self._number, verb, self._step, arguments)
        self._number, self._step = self._number + 1, self._step + 1
        return exchange

    def _post(self, exchange: _Exchange, message: Any, combine: Combine) -> None:
        """Enter and count: write the message, add this rank to the counter.

        The counter holds the number of ranks in its bits 0 to 15, the number of messages in bits
        16 to 31, and the sum of the calls' codes above. The rank that makes it full publishes.
        """
        has_message = message is not None
        if has_message:
            self._set(exchange, str(self.rank), json.dumps(message))
        code = exchange.code(self.size)
        total = self._store.add(exchange.key("count"), 1 | has_message << 16 | code << 32)
        ranks, messages, codes = total & 0xFFFF, total >> 16 & 0xFFFF, total >> 32
        if codes != ranks * code:
            self._publish(exchange, {"clash": [exchange, self.rank, self._arguments]})
        elif ranks == self.size:
            self._written.append((exchange.number, exchange.key("count")))
            value = combine(self._messages(exchange, messages)) if messages else None
            self._publish(exchange, {"exchange": exchange, "value": value})

    def _messages(self, exchange: _Exchange, count: int) -> list[Any]:
        """The messages in rank order, None of a rank that wrote none."""
        keys = [exchange.key(str(rank)) for rank in range(self.size)]
        if count == self.size:
            return [json.loads(text) for text in self._store.multi_get(keys)]
        return [
            json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys
        ]

    def _set(self, exchange: _Exchange, name: str, text: str) -> None:
        self._store.set(exchange.key(name), text)
        self._written.append((exchange.number, exchange.key(name)))

    def _publish(self, exchange: _Exchange, answer: dict[str, Any], name: str = "answer") -> Any:
        """Write the answer, unless another rank has written one. Returns what was written."""
        self._written.append((exchange.number, exchange.key(name)))
        return self._store.compare_set(exchange.key(name), "", json.dumps(answer))

    def _publish_failure(self, exchange: _Exchange, error: BaseException) -> bool:
        """Publish that `error` was raised here. Returns False if all had agreed to go on."""
        if self.size == 1:
            return True
        rank = self.members[self.rank]
        text = f"{exchange} failed on rank {rank}: {_error_text(error)}"
        answer = json.loads(self._publish(exchange, {"error": text}))
        return "error" in answer or "clash" in answer or "failed" in (answer["value"] or ())

    @contextmanager
    def _reported(self, exchange: _Exchange) -> Iterator[None]:
        """The others, who wait in `exchange`, learn of an interrupt at once."""
        try:
            with _store_errors(exchange.verb):
                yield
        except Exception:
            raise
        except BaseException as interrupt:
            self._publish_failure(exchange, interrupt)
            raise

    @contextmanager
    def entering(self, verb: str) -> Iterator[None]:
        """Enter a verb of two exchanges or more.

        An interrupt before the second one is published in the exchange in which the others wait, so
        the ranks stay in step.
        """
        first = self._number
        try:
            yield
        except Exception:
            raise
        except BaseException as interrupt:
            if self._number == first:
                self._next(verb)
            is_second = self._number == first + 1
            if is_second and not self._publish_failure(_Exchange(first, verb, 0), interrupt):
                self._publish_failure(self._next(verb), interrupt)
            raise

    def _await(self, exchange: _Exchange, timeout: float) -> Any:
        """Wait for the answer and return its value.

        After `timeout` seconds without a heartbeat this rank publishes an error itself, if it is
        the lowest that waits. Should that one have died, any other does so 2 * GRACE later.
        """
        began = heard = time.monotonic()
        remind_at, heartbeats = began + FIRST_REMINDER, None
        while not self._appears(exchange, "answer", self._interval, began):
            now, before = time.monotonic(), heartbeats
            if before is None:
                self._set(exchange, f"here/{self.rank}", json.dumps(exchange))
            heartbeats = self._store.add("heartbeats", 0)
            heard = now if before not in (None, heartbeats) else heard
            silent = now - heard
            if silent >= timeout and (self._is_lowest(exchange) or silent >= timeout + 2 * GRACE):
                time.sleep(GRACE)  # a rank that is a moment late is not named
                self._publish(exchange, {"error": self._silence(exchange, timeout)})
            elif now >= remind_at:
                remind_at = now + REMIND
                if self._is_lowest(exchange):
                    missing = self._missing(exchange)
                    names, hint = self._names(missing), self._usual_cause(exchange, missing)
                    log.warning("%s has waited %.0f s for %s%s", exchange, now - began, names, hint)
        return self._taken(exchange, self._store.get(exchange.key("answer")))

    def _appears(self, exchange: _Exchange, name: str, seconds: float, since: float) -> bool:
        """Wait up to `seconds` for a key. Polls less often the longer this rank has waited."""
        # NOTE: store.wait() would do, but TCPStore writes two lines to stderr at every timeout.
        end = time.monotonic() + seconds
        while not self._store.check([exchange.key(name)]):
            now = time.monotonic()
            if now >= end:
                return False
            time.sleep(min(end - now, max(5e-4, min(POLL / 4, (now - since) / 10))))
        return True

    def _taken(self, exchange: _Exchange, published: str | bytes) -> Any:
        """The value of the published answer.

        Raises:
            RuntimeError: The answer is an error, or belongs to another exchange.
            ValueError: The ranks passed different arguments.
        """
        answer = json.loads(published)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if "clash" in answer:
            raise self._clash(exchange, *answer["clash"])
        decided = _Exchange(*answer["exchange"])
        if decided != exchange:  # the first rank is in run_on_first, this one is not
            raise RuntimeError(self._two_positions((decided, 0), (exchange, self.rank)))
        return answer["value"]

    def _forget(self, exchange: _Exchange) -> None:
        """Delete this rank's keys of earlier exchanges: every rank counted here has read them."""
        for number, key in self._written:
            if number < exchange.number:
                self._store.delete_key(key)
        self._written = [entry for entry in self._written if entry[0] >= exchange.number]

    # --- when ranks disagree or are silent -------------------------------------------------------

    def _silence(self, exchange: _Exchange, timeout: float) -> str:
        """The error that names who is missing."""
        missing = self._missing(exchange)
        if not missing:  # all wait, so they wait for different things
            texts = [self._store.get(exchange.key(f"here/{rank}")) for rank in range(self.size)]
            positions = [_Exchange(*json.loads(text)) for text in texts]
            other = next((i for i, found in enumerate(positions) if found != exchange), self.rank)
            return self._two_positions((exchange, self.rank), (positions[other], other))
        names = self._names(missing)
        if exchange.step:
            return f"{exchange}: {names} gave no sign of life for {timeout:g} s. Dead, or hung?"
        hint = self._usual_cause(exchange, missing)
        return f"{exchange} is collective, and {names} did not enter it within {timeout:g} s{hint}."

    def _usual_cause(self, exchange: _Exchange, missing: list[int]) -> str:
        """A hint where one rank alone has entered a verb."""
        if exchange.step or len(missing) < self.size - 1:
            return ""
        return (
            ". Is it called under a condition like `if rank == 0:`? Call it on every rank, and "
            "leave the rest inside the condition"
        )

    def _clash(
        self, exchange: _Exchange, found: list[Any], finder: int, arguments: dict[str, str]
    ) -> Exception:
        """The error for two calls at once. A rank whose call is not the finder's adds its own."""
        finders = _Exchange(*found)
        if exchange != finders:
            self._publish(exchange, {"clash": [exchange, self.rank, self._arguments]}, "other")
        if not self._appears(exchange, "other", GRACE, time.monotonic()):
            return RuntimeError(
                f"{finders.position} was called on rank {self.members[finder]}, and something else "
                "on other ranks."
            )
        found, rank, others = json.loads(self._store.get(exchange.key("other")))["clash"]
        other = _Exchange(*found)
        if other._replace(arguments=0) != finders._replace(arguments=0):
            return RuntimeError(self._two_positions((finders, finder), (other, rank)))
        (low, first), (high, second) = sorted([(finder, arguments), (rank, others)])
        differences = [
            f"{name} is {first.get(name, 'not given')[:100]} on rank {self.members[low]} and "
            f"{second.get(name, 'not given')[:100]} on rank {self.members[high]}"
            for name in {**first, **second}
            if first.get(name) != second.get(name)
        ]
        return ValueError(
            f"{exchange}: {'; '.join(differences[:5])}. Every rank must pass the same arguments "
            "and take the same steps."
        )

    def _two_positions(self, *positions: tuple[_Exchange, int]) -> str:
        (one, low), (two, high) = sorted(positions, key=lambda position: position[1])
        return (
            f"rank {self.members[low]} is in {one.position} and rank {self.members[high]} in "
            f"{two.position}: every rank must call the collective verbs, in the same order."
        )

    def _is_lowest(self, exchange: _Exchange) -> bool:
        """No rank below this one waits."""
        keys = [exchange.key(f"here/{rank}") for rank in range(self.rank)]
        return not any(self._store.check([key]) for key in keys)

    def _missing(self, exchange: _Exchange) -> list[int]:
        keys = [exchange.key(f"here/{rank}") for rank in range(self.size)]
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    def _blame(self, exchange: _Exchange, cause: str) -> str:
        """Publish and return why bytes did not arrive: the ranks whose heartbeats stand still."""
        before = self._heartbeats_of_each()
        time.sleep(GRACE)
        now = self._heartbeats_of_each()
        # A rank that has sent and taken everything is in the exchange, and not missing there.
        missing = [rank for rank in self._missing(exchange) if rank != self.rank]
        silent = [rank for rank in missing if before[rank] == now[rank]]
        text = f"{exchange}: no bytes arrived {cause}, although every rank gives signs of life."
        if silent:
            text = (
                f"{exchange}: {self._names(silent)} sent and took no bytes {cause}. Dead, or hung?"
            )
        answer: dict[str, str] = json.loads(self._publish(exchange, {"error": text}))
        return answer["error"]

    def _heartbeats_of_each(self) -> list[int]:
        return [self._store.add(f"heartbeats/{rank}", 0) for rank in range(self.size)]

    def _names(self, ranks: list[int]) -> str:
        names = ", ".join(str(self.members[rank]) for rank in ranks)
        return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"

    # --- [Note: heartbeat] -----------------------------------------------------------------------

    @property
    def _interval(self) -> float:
        """Seconds between two heartbeats."""
        return min(POLL, self.timeout / 4)

    @contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Send heartbeats from a thread while the block runs."""
        if self.size == 1:
            yield
            return
        done, store = threading.Event(), self._heartbeat_store
        assert store is not None

        def beat() -> None:
            with suppress(RuntimeError):  # if the store is gone, the next exchange reports it
                while not done.wait(self._interval):
                    store.add(f"heartbeats/{self.rank}", 1)
                    store.add("heartbeats", 1)

        thread = threading.Thread(target=beat, name="dist_ema heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def digest(value: Any) -> int:
    """A hash of numbers, texts, bytes and lists of them, to compare what is too long to send."""
    return crc32(repr(value).encode())


def _text(value: Any) -> str:
    """Equal for arguments that mean the same on two ranks: no address, no order of keys."""
    if isinstance(value, dict):
        entries = sorted(f"{key!r}: {_text(entry)}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _call_text(verb: str) -> str:
    return "EMA(...)" if verb == "EMA" else f"ema.{verb}()"


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _completes(work: dist.Work, seconds: float) -> bool:
    """Wait up to `seconds` for the end of `work`. Polls less often the longer it takes."""
    began, waited = time.monotonic(), 0.0
    while not work.is_completed():
        if waited >= seconds:
            return False
        time.sleep(max(5e-5, min(POLL / 4, waited / 10, seconds - waited)))
        waited = time.monotonic() - began
    return True


@contextmanager
def _store_errors(verb: str) -> Iterator[None]:
    """Name the verb and the usual cause when the store is gone."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(f"{_call_text(verb)}: {store_is_silent(error)}") from error


class Ranks:
    """The processes that call the collective verbs together. A world of one needs no process group.

    Args:
        members: Global ranks, this process among them.
        group: A process group of exactly these ranks, if there is one.
        open_store: Opens the key-value store of the job under a prefix.
        timeout: Seconds that a rank waits for the others.
        device: Of the model on this rank, where a group that knows no other sends bytes.

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
        stores: list[dist.Store] = []
        if self.size > 1:
            counters = open_store("dist_ema/construction")
            stores = together(
                "EMA(...)", self.members, counters, timeout, lambda: self._assemble(group)
            )
        self._connect(stores, timeout)

    def _assemble(self, group: dist.ProcessGroup | None) -> list[dist.Store]:
        self.group = self._whole_group(group)
        self._prefix = f"dist_ema/{self._incarnation()}"
        return [self._open_store(self._prefix), self._another_connection(self._prefix)]

    def _connect(self, stores: Sequence[dist.Store], timeout: float) -> None:
        """Send messages over the first store, and heartbeats over the second."""
        self._stores = [BoundedStore(store, timeout) for store in stores]
        self._coordinator = coordinator = StoreCoordinator(
            self._stores[0] if self._stores else None,
            self.members,
            self.rank,
            timeout,
            self._stores[-1] if self._stores else None,
        )
        self.begin, self.all_gather_json = coordinator.begin, coordinator.all_gather_json
        self.run_on_all, self.run_on_first = coordinator.run_on_all, coordinator.run_on_first
        self.run_transfer, self.wait_for = coordinator.run_transfer, coordinator.wait_for
        self.heartbeats, self.entering = coordinator.heartbeats, coordinator.entering

    def _another_connection(self, prefix: str) -> dist.Store:
        """NOTE: a connection that waits is locked, and another thread would wait with it."""
        store: Any = self._open_store(prefix)
        return store.clone()  # type: ignore[no-any-return]

    def _new_prefix(self) -> str:
        """A prefix that no other call uses. Every rank calls this as often as the others do."""
        self._prefixes += 1
        return f"{self._prefix}/{self._prefixes}"

    def within_timeout(self, work: Callable[[dist.Store], T]) -> T:
        """Do `work` with a connection to the store that has a prefix of its own.

        Raises:
            RuntimeError: It takes longer than the timeout.

        Note:
            Every rank calls it as often as the others do. It sends nothing.
        """
        prefix = self._new_prefix()
        with _store_errors(self._coordinator.verb):
            return within(self.timeout, lambda: work(self._another_connection(prefix)))

    def with_own_messages(self) -> Ranks:
        """The same ranks, with messages over a connection of their own."""
        other, stores = copy(self), list[dist.Store]()
        if self.size > 1:
            other._prefix, other._prefixes = f"{self._prefix}/{self._prefixes + 1}", 0
            stores = self.within_timeout(
                lambda store: [store, other._another_connection(other._prefix)]
            )
        other._connect(stores, self.timeout)
        return other

    def _whole_group(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        if group is None:
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
        for store in self._stores:
            store.timeout = seconds

    # --- bytes -----------------------------------------------------------------------------------

    def transfer_device(self) -> torch.device:
        """`transfer_device` of the group of these ranks."""
        return transfer_device(self.group, self.device)

    def send(self, data: Tensor, to: int) -> None:
        """Send to the rank with index `to` in `members`, within the timeout."""
        transfer = dist.isend(data, self.members[to], group=self.group)
        assert transfer is not None
        transfer.wait(timedelta(seconds=self.timeout))

    def receive(self, data: Tensor, source: int) -> None:
        """Receive from the rank with index `source`, within the timeout."""
        transfer = dist.irecv(data, self.members[source], group=self.group)
        assert transfer is not None
        transfer.wait(timedelta(seconds=self.timeout))

    def broadcast(self, data: Tensor, source: int) -> None:
        """Broadcast from the rank with index `source`, inside `run_transfer`. *Collective*."""
        self.wait_for(dist.broadcast(data, self.members[source], group=self.group, async_op=True))


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
