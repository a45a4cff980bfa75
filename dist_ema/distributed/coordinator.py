"""`StoreCoordinator`: messages over the store, timeouts, and one error for all ranks.

[Note: check in]  Exchanges are numbered, alike on every rank. Each has a counter in the store:

    bits   0-14              15-29           30-32     from 35 on
    count  ranks that came   with a flag     answers   the sum of a code of each rank's call

    run_on_all       each rank counts itself, with a flag if it failed, and waits until all are
                     counted
    run_and_reduce   each rank counts itself and writes one message. Ranks form a tree: a rank waits
                     for the messages of at most FAN_IN others, and combines them with its own. The
                     first rank publishes what came out.
    run_on_first     the first rank publishes an answer

So what a rank reads and does in an exchange does not grow with the number of ranks. The code is of
the verb and its arguments, so a rank that passes others is found in the counter. Only then two
ranks publish what they passed.

An answer is published once, by `compare_set`, and then counted. In `run_on_all` an answer is an
error. If it meets the last rank, whichever was counted first holds: the other takes its count back.

Ranks are looked up one by one only where some are silent. A rank that has waited for the timeout
calls the roll, by writing that it speaks. The others that wait write that they are here, and after
GRACE the speaker publishes the names of the rest.

[Note: bytes]  Bytes travel inside `run_transfer`. A window that fails, or that does not arrive
within the timeout, ends the transfer on every rank. The rank that notices looks whose heartbeats
stand still, and publishes that as the answer of the exchange that ends the transfer. A rank that
waits for a window looks for that answer, so all raise the same sentence.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from . import deadlines, diagnosis
from .diagnosis import Exchange, call_text, error_text
from .messages import FLAG, Count, Heartbeats, Messages

__all__ = ["GRACE", "Combine", "StoreCoordinator", "completes", "store_errors"]

T = TypeVar("T")
Combine = Callable[[list[Any]], Any]
log = logging.getLogger("dist_ema")

GRACE = 2.0  # seconds between the timeout and the search for missing ranks
POLL = 1.0  # seconds between two looks for a heartbeat, at most
FIRST_REMINDER = 10.0  # seconds until the first line about who is awaited
REMIND = 60.0  # seconds between two such lines
FAN_IN = 8  # messages that one rank combines with its own
LOOKS = 50_000  # at the counters, of all ranks together in a second, at most


def _same(value: Any) -> Any:
    return value


class StoreCoordinator:
    """Exchanges of JSON messages among ranks, over a key-value store ([Note: check in]).

    Args:
        store: Holds the messages. None for a world of one.
        members: The global ranks.
        rank: The index of this process in `members`.
        timeout: Seconds that a rank waits for the others to enter a verb, and inside the verb the
            seconds without a heartbeat or a window of bytes. It may be set later.
        heartbeat_store: Another connection to `store`, for heartbeats.

    Attributes:
        verb: The one that was entered last.
        beats: Heartbeats of these ranks.
        messages: Their keys in the store.
    """

    def __init__(
        self,
        store: Any,
        members: Sequence[int],
        rank: int,
        timeout: float = 300.0,
        heartbeat_store: Any = None,
    ) -> None:
        assert len(members) < FLAG, "the counter has 15 bits for the ranks"
        self.members, self.rank, self.size = list(members), rank, len(members)
        self.timeout = timeout
        self.store = store
        self._number, self.verb, self._step = 0, "", 0
        self._is_compared = False
        self.messages = Messages(store, self.members, rank)
        self.beats = Heartbeats(heartbeat_store or store, store, rank, self.size)
        self.messages.keep(f"heartbeats/{rank}", *["heartbeats"] * (rank == 0))
        self._last = self._transfer = Exchange(0, "", 0)  # the latter ends the bytes under way
        self._lost_one = False  # a rank died after its answer: the next wait need not be long

    # --- verbs -----------------------------------------------------------------------------------

    def begin(self, verb: str, arguments: dict[str, Any] | None = None, step: int = 0) -> None:
        """Make the next exchange the one by which `verb` is entered.

        Args:
            verb: What the ranks do.
            arguments: What must be the same on every rank, by the names that errors use. The next
                exchange raises ValueError where it is not.
            step: 1 where the ranks have entered the verb by other messages.
        """
        self.verb, self._step = verb, step
        self.compare(arguments or {})

    def compare(self, arguments: dict[str, Any]) -> None:
        """Have the next exchange raise ValueError where the arguments differ between ranks."""
        self.messages.arguments, self._is_compared = diagnosis.texts(arguments), False

    def run_on_all(self, verb: str, work: Callable[[], T]) -> T:
        """Do `work` on every rank, and wait for all.

        Args:
            verb: What the ranks do, for errors. It must be the same on every rank.
            work: What each of them does. Heartbeats are sent while it runs.

        Returns:
            The result of this rank.

        Raises:
            Exception: What `work` raised here.
            RuntimeError: It failed on another rank; or some ranks did not come in time, or called
                another verb. The rank is named, and every rank that waits raises.

        Note:
            *Collective*. *Cost*: one operation of the store.
        """
        return self._check_in(verb, work, counts=False)[0]

    def count_on_all(self, verb: str, work: Callable[[], bool]) -> int:
        """`run_on_all`, and the number of ranks whose `work` returned True."""
        return self._check_in(verb, work, counts=True)[1]

    def is_same(self, about: str, value: Any) -> bool:
        """Whether the first rank that said something `about` this said the same.

        Call it in the work of the next exchange, on any ranks. *Cost*: one operation of the store.
        """
        if self.size == 1:
            return True
        key, own = f"{self._number}/same/{about}", f"{value}@{self.rank}"
        first = self.store.compare_set(key, "", own).decode()
        if first == own:
            self.messages.written.append((self._number, key))
        return bool(first.rpartition("@")[0] == str(value))

    def run_and_reduce(
        self,
        verb: str,
        work: Callable[[], T],
        combine: Combine,
        conclude: Callable[[Any], Any] = _same,
    ) -> tuple[T, Any]:
        """Do `work` on every rank, and combine the results (JSON).

        Args:
            verb: See `run_on_all`.
            work: See `run_on_all`.
            combine: Makes one message of several, associative and commutative.
            conclude: What the first rank makes of the combined message, by default that itself.

        Returns:
            The result of this rank, and what the first rank made of all.

        Raises:
            Exception: What `work` raised here, or `conclude` on the first rank.
            RuntimeError: The same on other ranks, which name the rank; see `run_on_all`.

        Note:
            *Collective*. *Cost*: five operations of the store, FAN_IN messages read.
        """
        return self._reduce(verb, work, combine, conclude, FAN_IN)

    def gather(self, verb: str, message: Any, conclude: Combine) -> Any:
        """What `conclude` makes of the messages (JSON) of all ranks, in rank order.

        Note:
            *Collective*. *Cost*: the first rank reads a message of every rank. So this is for what
            is done once, or where something failed.
        """

        def concatenate(messages: list[Any]) -> Any:
            return [each for some in messages for each in some]

        return self._reduce(verb, lambda: [message], concatenate, conclude, self.size)[1]

    def run_on_first(self, verb: str, work: Callable[[], T]) -> T:
        """Do `work` on the first rank, and return its result (JSON) on every rank.

        Raises:
            Exception: What `work` raised, on the first rank.
            RuntimeError: The same on the others.

        Note:
            *Collective*. *Cost*: one read each. The first rank waits for no one.
        """
        if self.size == 1:
            return work()
        exchange = self._next(verb)
        with self._reported(exchange):
            if self.rank > 0:
                return self._await(exchange)  # type: ignore[no-any-return]
            return self._conclude(exchange, work)  # type: ignore[no-any-return]

    def run_transfer(self, verb: str, work: Callable[[], None]) -> None:
        """Do `work`, which waits for bytes, on every rank ([Note: bytes]).

        Raises:
            Exception: What `work` raised here.
            RuntimeError: It failed on another rank. The rank to blame is named.

        Note:
            *Collective*. An error waits for no rank.
        """
        if self.size == 1:
            work()
            return
        exchange = self._transfer = self._next(verb, ends_when_full=True)
        with store_errors(exchange.verb):
            try:
                with self.heartbeats():
                    work()
                self._lost_one = False
            except BaseException as error:
                self.messages.publish_failure(exchange, error)
                raise
        self._meet(exchange, None)

    def wait_for(self, transfer: dist.Work) -> None:
        """Wait until a window of bytes has arrived or gone. Only inside `run_transfer`.

        Raises:
            RuntimeError: It failed, or took longer than the timeout, here or on another rank.
        """
        began = time.monotonic()
        while not completes(transfer, self.interval):
            self.refuse_ended_transfer(began)
        try:
            transfer.wait()  # raises what failed, and orders the stream of an accelerator
        except RuntimeError as error:
            cause = f"({str(error).split('. ')[0]})"  # gloo's first sentence
            raise RuntimeError(self.blame(cause)) from error

    def refuse_ended_transfer(self, moved: float) -> None:
        """Raise if the transfer under way has ended, or no byte has moved since `moved`."""
        if self.messages.has(self._transfer, "answer"):
            self.messages.value_of(self._transfer, self.messages.get(self._transfer, "answer"))
        if time.monotonic() - moved >= (2 * self.interval if self._lost_one else self.timeout):
            raise RuntimeError(self.blame(f"for {self.timeout:g} s"))

    @property
    def number(self) -> int:
        """Of the next exchange."""
        return self._number

    # --- [Note: check in] ------------------------------------------------------------------------

    def _next(self, verb: str, ends_when_full: bool = False) -> Exchange:
        if verb != self.verb:
            self.begin(verb)
        exchange = Exchange(self._number, verb, self._step)
        if not self._is_compared:
            self._is_compared = True
            exchange = exchange._replace(
                arguments=diagnosis.digest(sorted(self.messages.arguments.items()))
            )
        begun = self._number + 1, self._step + 1, exchange, ends_when_full
        # NOTE: one statement without a call, so that an interrupt finds all of it or nothing.
        self._number, self._step, self._last, self.messages.ends_when_full = begun
        combining = (self.size - 2) // FAN_IN + 1  # the others delete
        keys = ("count",) if ends_when_full else ("count", "answer")
        self.messages.take_turns(exchange, keys, combining)
        return exchange

    def _attempt(self, verb: str, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        with self.heartbeats():
            try:
                return work(), None
            except Exception as error:  # the others learn of it first
                return None, error
            except BaseException as error:  # an interrupt is published, and waits for no rank
                self.messages.publish_failure(self._next(verb, ends_when_full=True), error)
                raise

    def _check_in(self, verb: str, work: Callable[[], T], counts: bool) -> tuple[T, int]:
        """The result of this rank, and how many ranks returned something true."""
        result, error = self._attempt(verb, work)
        flag = counts and bool(result)
        count = int(flag)
        if self.size > 1:
            count = self._meet(self._next(verb, ends_when_full=True), error, flag)
        if error is not None:
            raise error
        return result, count  # type: ignore[return-value]

    def _meet(self, exchange: Exchange, error: Exception | None, flag: bool = False) -> int:
        """Wait until all ranks are counted, and return how many have the flag.

        Raises:
            RuntimeError: One of them failed.
        """
        messages = self.messages
        with self._reported(exchange):
            if error is not None:
                messages.will_delete(exchange, "error")
                text = json.dumps([self.members[self.rank], error_text(error)])
                messages.set_first(exchange, "error", text)
            messages.count(exchange, flag or error is not None)
            try:
                count = self._await(exchange)
            except RuntimeError as silence:
                raise (silence if error is None else error) from None
            if count.flags and error is None and messages.has(exchange, "error"):
                failure = messages.get(exchange, "error")
                raise RuntimeError(diagnosis.failed(exchange, *failure))
            messages.forget(exchange)
        return count.flags  # type: ignore[no-any-return]

    def _reduce(
        self,
        verb: str,
        work: Callable[[], T],
        combine: Combine,
        conclude: Callable[[Any], Any],
        fan_in: int,
    ) -> tuple[T, Any]:
        result, error = self._attempt(verb, work)
        if self.size == 1:
            if error is not None:
                raise error
            return result, conclude(result)  # type: ignore[return-value]
        exchange = self._next(verb)
        message: dict[str, Any] = {"value": result}
        if error is not None:
            message = {"error": [self.members[self.rank], error_text(error)]}
        with self._reported(exchange):
            try:
                answer = self._climb(exchange, message, combine, conclude, fan_in)
            except RuntimeError as silence:
                raise (silence if error is None else error) from None
            if error is not None:
                raise error
            if "failed" in answer:
                raise RuntimeError(diagnosis.failed(exchange, *answer["failed"]))
            self.messages.forget(exchange)
        return result, answer["all"]  # type: ignore[return-value]

    def _climb(
        self,
        exchange: Exchange,
        message: dict[str, Any],
        combine: Combine,
        conclude: Callable[[Any], Any],
        fan_in: int,
    ) -> Any:
        """The answer, after this rank has combined the messages of those above it in the tree."""
        self.messages.count(exchange)
        above = range(fan_in * self.rank + 1, min(self.size, fan_in * (self.rank + 1) + 1))
        keys = [exchange.key(str(rank)) for rank in above]
        if keys:
            self._await(exchange, lambda _: self.store.check(keys))  # type: ignore[no-any-return]
            others = [json.loads(text) for text in self.store.multi_get(keys)]
            message = _first_error_or(combine, [message, *others])
        if self.rank > 0:
            self.messages.set(exchange, str(self.rank), message)
            return self._await(exchange)
        if "error" in message:
            return self._conclude(exchange, lambda: {"failed": message["error"]})
        return self._conclude(exchange, lambda: {"all": conclude(message["value"])})

    def _conclude(self, exchange: Exchange, work: Callable[[], Any]) -> Any:
        """On the first rank: the answer is what `work` returns, or that it failed."""
        try:
            with self.heartbeats():
                value = work()
            published = self.messages.publish(exchange, {"exchange": exchange, "value": value})
            return self.messages.value_of(exchange, published)
        except BaseException as error:
            self.messages.publish_failure(exchange, error)
            raise

    @contextmanager
    def _reported(self, exchange: Exchange) -> Iterator[None]:
        """The others, who wait in `exchange`, learn of an interrupt at once."""
        try:
            with store_errors(exchange.verb):
                yield
        except Exception:
            raise
        except BaseException as interrupt:
            self.messages.publish_failure(exchange, interrupt)
            raise

    @contextmanager
    def entering(self, verb: str, exchanges: float = math.inf) -> Iterator[None]:
        """Report an interrupt of a verb, also one that comes between its exchanges.

        Args:
            verb: What the ranks do.
            exchanges: Of the verb, after which an interrupt is not reported here.
        """
        first = self._number
        try:
            yield
        except Exception:
            raise
        except BaseException as interrupt:
            done = self._number - first
            if done <= exchanges:
                # Where the others wait or come to next, so that the ranks stay in step.
                exchange = self._last if done else self._next(verb, ends_when_full=True)
                while not self.messages.publish_failure(exchange, interrupt):
                    exchange = self._next(verb, ends_when_full=True)
            raise

    def _await(self, exchange: Exchange, ready: Callable[[Count], bool] | None = None) -> Any:
        """Wait for the answer and return its value; or the count once it is full or `ready`.

        After the timeout without a heartbeat this rank publishes an error itself, if it speaks.
        Should that one have died, any other does so 2 * GRACE later.
        """
        began = heard = time.monotonic()
        if self._lost_one:
            heard -= self.timeout - 2 * self.interval
            self._lost_one = False
        remind_at, heartbeats, is_here, speaks = began + FIRST_REMINDER, None, False, False
        while True:
            ended, value = self._look(exchange, ready, began)
            if ended:
                return value
            now, before = time.monotonic(), heartbeats
            heartbeats = self.beats.of_all()
            heard = now if before not in (None, heartbeats) else heard
            is_here = is_here or self.messages.answer_roll(exchange)
            silent = now - heard
            if silent >= self.timeout or now >= remind_at:
                called, speaks = speaks, speaks or self.messages.call_roll(exchange)
                is_due = speaks or silent >= self.timeout + 2 * GRACE
                if silent >= self.timeout and is_due:
                    if not self.messages.has(exchange, "answer"):
                        # A rank that is a moment late is not named.
                        time.sleep(GRACE + 2 * self.interval)
                        text = self.messages.silence(exchange, self.timeout)
                        self.messages.publish(exchange, {"error": text})
                    count = self.messages.counted(exchange)
                    if not count.answers:
                        # An answer is there, and the rank that published it died at once; or the
                        # last rank has come meanwhile.
                        self._lost_one = self.messages.count_answer(exchange)
                    elif self.messages.is_full(exchange, count):
                        time.sleep(GRACE)
                        if self.messages.counted(exchange) == count:
                            # Both are counted, and the rank that had to take one back is dead.
                            answer = self.messages.get(exchange, "answer")
                            return self.messages.value_of(exchange, answer)
                elif called:
                    remind_at = now + REMIND
                    self.messages.remind(exchange, now - began)
                else:  # the others answer the roll call until then
                    remind_at = now + 2 * self.interval if speaks else float("inf")

    def _look(
        self, exchange: Exchange, ready: Callable[[Count], bool] | None, since: float
    ) -> tuple[bool, Any]:
        """Look at the counter for the time between two heartbeats. Returns (ended, value).

        Looks come less often the longer this rank has waited, and the more ranks there are.
        """
        # NOTE: store.wait() would do, but TCPStore writes two lines to stderr at every timeout.
        end = time.monotonic() + self.interval
        while True:
            count = self.messages.counted(exchange)
            full = self.messages.is_full(exchange, count)
            if count.codes != count.ranks * exchange.code(self.size) and not count.answers:
                self.messages.publish(
                    exchange, {"clash": [exchange, self.rank, self.messages.arguments]}
                )
            elif count.answers and not full:
                return True, self.messages.value_of(exchange, self.messages.get(exchange, "answer"))
            elif not count.answers and (full or (ready is not None and ready(count))):
                return True, count
            now = time.monotonic()
            if now >= end:
                return False, None
            least, most = max(5e-4, self.size / LOOKS), max(POLL / 4, 5 * self.size / LOOKS)
            time.sleep(min(end - now, max(least, min(most, (now - since) / 10))))

    def blame(self, cause: str) -> str:
        """Publish and return why bytes did not arrive: the ranks whose heartbeats stand still."""
        exchange, everyone = self._transfer, range(self.size)
        before = [self.beats.of(rank) for rank in everyone]
        self.messages.call_roll(exchange)  # a rank that has sent and taken everything answers
        time.sleep(GRACE + 2 * self.interval)
        now = [self.beats.of(rank) for rank in everyone]
        silent = [rank for rank in self.messages.missing(exchange) if before[rank] == now[rank]]
        text = f"{exchange}: no bytes arrived {cause}, although every rank gives signs of life."
        if silent:
            names = diagnosis.names(self.members, silent)
            text = f"{exchange}: {names} sent and took no bytes {cause}. Dead, or hung?"
        return self.messages.publish_error(exchange, text)

    def publish_failure_of(self, rank: int, text: str) -> str:
        """Publish, as the answer to the transfer under way, what failed on another rank."""
        text = diagnosis.failed(self._transfer, self.members[rank], text)
        return self.messages.publish_error(self._transfer, text)

    # --- [Note: heartbeat] -----------------------------------------------------------------------

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats: many ranks send as many in all as a thousand."""
        return min(POLL * max(1.0, self.size / 1000), self.timeout / 4)

    def heartbeats(self) -> AbstractContextManager[None]:
        """Send heartbeats from a thread while the block runs."""
        return self.beats.sent(self.interval)


def _first_error_or(combine: Combine, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of the lowest rank, or what `combine` makes of the values."""
    errors = [message["error"] for message in messages if "error" in message]
    if errors:
        return {"error": min(errors)}
    return {"value": combine([message["value"] for message in messages])}


def completes(work: dist.Work, seconds: float) -> bool:
    """Wait up to `seconds` for the end of `work`. Polls less often the longer it takes."""
    began, waited = time.monotonic(), 0.0
    while not work.is_completed():
        if waited >= seconds:
            return False
        time.sleep(max(5e-5, min(POLL / 4, waited / 10, seconds - waited)))
        waited = time.monotonic() - began
    return True


@contextmanager
def store_errors(verb: str) -> Iterator[None]:
    """Name the verb and the usual cause when the store is gone."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(f"{call_text(verb)}: {deadlines.store_is_silent(error)}") from error
