"""`StoreCoordinator`: exchanges of a verb over the store, and one error for all ranks.

[Note: check in]  Exchanges are numbered, alike on every rank. Each has a counter in the store
([Note: counter] in messages):

    run_on_all       each rank counts itself, with a flag if it failed, and waits for all
    run_and_reduce   each rank counts itself and writes one message. Ranks form a tree: a rank waits
                     for the messages of at most FAN_IN others, and combines them with its own. The
                     first rank publishes what came out.
    run_on_first     the first rank publishes an answer

So what a rank reads and does in an exchange does not grow with the number of ranks.

An answer is published once, by `compare_set`, and then counted. In `run_on_all` an answer is an
error. If it meets the last rank, whichever was counted first holds: the other takes its count back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from . import diagnosis
from .bounded_store import store_errors
from .diagnosis import Exchange, error_text
from .waiting import Waiting

__all__ = ["Combine", "StoreCoordinator"]

T = TypeVar("T")
Combine = Callable[[list[Any]], Any]

FAN_IN = 8  # messages that one rank combines with its own


class StoreCoordinator(Waiting):
    """Exchanges of JSON messages among ranks, over a key-value store ([Note: check in]).

    Args:
        store: Holds the messages. None for a world of one.
        members: The global ranks.
        rank: The index of this process in `members`.
        timeout: Seconds to wait for the others to enter a verb. Inside it they count from the last
            heartbeat or window of bytes. May be set later.
        heartbeat_store: Another connection to `store`, for heartbeats.

    Attributes:
        verb: The one that was entered last.
        number: That of the next exchange.
    """

    def __init__(
        self,
        store: Any,
        members: Sequence[int],
        rank: int,
        timeout: float = 300.0,
        heartbeat_store: Any = None,
    ) -> None:
        super().__init__(store, members, rank, timeout, heartbeat_store)
        self.number, self.verb, self._step = 0, "", 0
        self._arguments = 0  # a digest that the next exchange compares
        self._last = Exchange(0, "", 0)

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
        texts = {name: diagnosis.argument_text(value) for name, value in arguments.items()}
        self.messages.arguments = texts
        self._arguments = diagnosis.digest(sorted(texts.items()))

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
        """Whether `value` equals the first one that a rank posted under the name `about`.

        Call it in the work of the next exchange, on any ranks. *Cost*: one operation of the store.
        """
        if self.size == 1:
            return True
        key, own = f"{self.number}/same/{about}", f"{value}@{self.rank}"
        first = self.store.compare_set(key, "", own).decode()
        if first == own:
            self.messages.written.append((self.number, key))
        return bool(first.rpartition("@")[0] == str(value))

    def run_and_reduce(
        self,
        verb: str,
        work: Callable[[], T],
        combine: Combine,
        conclude: Callable[[Any], Any] = lambda combined: combined,
        fan_in: int = FAN_IN,
    ) -> tuple[T, Any]:
        """Do `work` on every rank, and combine the results (JSON).

        Args:
            verb: See `run_on_all`.
            work: See `run_on_all`.
            combine: Makes one message of several, associative and commutative.
            conclude: What the first rank makes of the combined message.
            fan_in: Messages that one rank combines with its own.

        Returns:
            The result of this rank, and what the first rank made of all.

        Raises:
            Exception: What `work` raised here, or `conclude` on the first rank.
            RuntimeError: The same on other ranks; see `run_on_all`.

        Note:
            *Collective*. *Cost*: five operations of the store, `fan_in` messages read.
        """
        result, error = self._attempt(verb, work)
        if self.size == 1:
            if error is not None:
                raise error
            return result, conclude(combine([result]))  # type: ignore[return-value]
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

    def gather(self, verb: str, message: Any, conclude: Combine) -> Any:
        """What `conclude` makes of the messages (JSON) of all ranks, in rank order.

        Note:
            *Collective*. *Cost*: the first rank reads a message of every rank. So this is for what
            is done once, or where something failed.
        """
        return self.run_and_reduce(verb, lambda: message, list, conclude, fan_in=self.size)[1]

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
        """Do `work`, which waits for bytes, on every rank ([Note: bytes] in waiting).

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

    # --- [Note: check in] ------------------------------------------------------------------------

    def _next(self, verb: str, ends_when_full: bool = False) -> Exchange:
        if verb != self.verb:
            self.begin(verb)
        exchange = Exchange(self.number, verb, self._step, self._arguments)
        begun = self.number + 1, self._step + 1, 0, exchange, ends_when_full
        # NOTE: one statement without a call, so that an interrupt finds all of it or nothing.
        self.number, self._step, self._arguments, self._last, self.messages.ends_when_full = begun
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
        """Wait until all are counted. Returns how many have the flag; raises if a rank failed."""
        messages = self.messages
        with self._reported(exchange):
            if error is not None:
                messages.will_delete(exchange, "error")
                text = json.dumps([self.members[self.rank], error_text(error)])
                messages.set_first(exchange, "error", text)
            # Counted after the error is written, so that who sees the flag finds the text.
            messages.count(exchange, flag or error is not None)
            try:
                count = self._await(exchange)
            except RuntimeError as silence:
                raise (silence if error is None else error) from None
            if count.flags and error is None and messages.has(exchange, "error"):
                raise RuntimeError(diagnosis.failed(exchange, *messages.get(exchange, "error")))
            messages.forget(exchange)
        return count.flags  # type: ignore[no-any-return]

    def _climb(
        self,
        exchange: Exchange,
        message: dict[str, Any],
        combine: Combine,
        conclude: Callable[[Any], Any],
        fan_in: int,
    ) -> Any:
        """The answer, after this rank has combined the messages of those above it in the tree."""
        # Counted before it waits, or a rank in the middle of the tree would look absent.
        self.messages.count(exchange)
        above = range(fan_in * self.rank + 1, min(self.size, fan_in * (self.rank + 1) + 1))
        keys = [exchange.key(str(rank)) for rank in above]
        if keys:
            self._await(exchange, lambda _: self.store.check(keys))  # type: ignore[no-any-return]
            messages = [message, *map(json.loads, self.store.multi_get(keys))]
            errors = [message["error"] for message in messages if "error" in message]
            if errors:
                message = {"error": min(errors)}  # of the lowest rank
            else:
                message = {"value": combine([message["value"] for message in messages])}
        if self.rank > 0:
            self.messages.set(exchange, str(self.rank), message)
            return self._await(exchange)
        if "error" in message:
            return self._conclude(exchange, lambda: {"failed": message["error"]})
        return self._conclude(exchange, lambda: {"all": conclude(message["value"])})

    def _conclude(self, exchange: Exchange, work: Callable[[], Any]) -> Any:
        """Publish on the first rank what `work` returned, or that it failed."""
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
            exchanges: How many the verb has; after them an interrupt is not reported here.
        """
        first = self.number
        try:
            yield
        except Exception:
            raise
        except BaseException as interrupt:
            done = self.number - first
            if done <= exchanges:
                # Where the others wait or come to next, so that the ranks stay in step.
                exchange = self._last if done else self._next(verb, ends_when_full=True)
                while not self.messages.publish_failure(exchange, interrupt):
                    exchange = self._next(verb, ends_when_full=True)
            raise
