"""`Waiting` in an exchange or for bytes: polls, timeouts, heartbeats, and which ranks are silent.

[Note: roll call]  Ranks are looked up one by one only where some are silent. A rank that has waited
for the timeout calls the roll, by writing that it speaks. The others that wait write that they are
here, and after GRACE the speaker publishes the names of the rest.

[Note: bytes]  Bytes travel inside `run_transfer`. A window that fails, or that does not arrive
within the timeout, ends the transfer on every rank. The rank that notices looks whose heartbeats
stand still, and publishes that as the answer of the exchange that ends the transfer. A rank that
waits for a window looks for that answer, so all raise the same sentence.

[Note: heartbeat]  A rank that works inside a verb, or in the block of a swap, increments two
counters of the store from a thread: one of its own, and one that all share. So the others can tell
a slow disk or a long evaluation from a dead process: every heartbeat begins the timeout anew. The
thread has a connection of its own, because one that waits is locked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from . import diagnosis
from .diagnosis import Exchange
from .messages import CounterState, Messages

__all__ = ["GRACE", "Waiting", "completes"]

GRACE = 2.0  # seconds between the timeout and the search for missing ranks
POLL = 1.0  # seconds between two looks for a heartbeat, at most
FIRST_REMINDER = 10.0  # seconds until the first line about who is awaited
REMIND = 60.0  # seconds between two such lines
LOOKS = 50_000  # at the counters, of all ranks together in a second, at most


class Waiting:
    """Waits for messages and windows while the other ranks send heartbeats.

    Args:
        store: Holds the messages. None for a world of one.
        members: The global ranks.
        rank: The index of this process in `members`.
        timeout: Seconds without a heartbeat or a window of bytes. It may be set later.
        heartbeat_store: Another connection to `store`, for heartbeats.

    Attributes:
        messages: Their keys in the store.
    """

    def __init__(
        self,
        store: Any,
        members: Sequence[int],
        rank: int,
        timeout: float,
        heartbeat_store: Any = None,
    ) -> None:
        self.members, self.rank, self.size = list(members), rank, len(members)
        self.timeout = timeout
        self.messages = Messages(store, self.members, rank)
        self.store, self._heartbeat_store = store, heartbeat_store or store
        self.messages.keep(f"heartbeats/{rank}", *["heartbeats"] * (rank == 0))
        self._transfer = Exchange(0, "", 0)  # ends the bytes under way
        self._lost_one = False  # a rank died after its answer: the next wait need not be long

    def _await(
        self, exchange: Exchange, ready: Callable[[CounterState], bool] | None = None
    ) -> Any:
        """Wait for the answer and return its value; or the count once it is full or `ready`.

        After the timeout without a heartbeat this rank publishes an error itself, if it speaks.
        Should that one have died, any other does so 2 * GRACE later.
        """
        began = heard = time.monotonic()
        if self._lost_one:
            # A rank died in the exchange before, so this wait ends after two heartbeats.
            heard -= self.timeout - 2 * self.interval
            self._lost_one = False
        remind_at, heartbeats, is_here, speaks = began + FIRST_REMINDER, None, False, False
        while True:
            ended, value = self._poll(exchange, ready, began)
            if ended:
                return value
            now, before = time.monotonic(), heartbeats
            heartbeats = self.heartbeats_of()
            # Any heartbeat begins the timeout anew, whichever rank sent it.
            heard = now if before not in (None, heartbeats) else heard
            is_here = is_here or self.messages.answer_roll(exchange)
            silent = now - heard
            if silent >= self.timeout or now >= remind_at:
                called, speaks = speaks, speaks or self.messages.call_roll(exchange)
                # The speaker first; if it has died, any other.
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
                            return self.messages.answer_of(exchange)
                elif called:
                    remind_at = now + REMIND
                    self.messages.remind(exchange, now - began)
                else:  # the others answer the roll call until then
                    remind_at = now + 2 * self.interval if speaks else float("inf")

    def _poll(
        self, exchange: Exchange, ready: Callable[[CounterState], bool] | None, since: float
    ) -> tuple[bool, Any]:
        """Look at the counter for the time between two heartbeats. Returns (ended, value).

        Looks come less often the longer this rank has waited, and the more ranks there are.
        """
        # NOTE: store.wait() would do, but TCPStore writes two lines to stderr at every timeout.
        end = time.monotonic() + self.interval
        while True:
            count = self.messages.counted(exchange)
            full = self.messages.is_full(exchange, count)
            # A sum of other codes: some rank called something else.
            if count.codes != count.ranks * exchange.code(self.size) and not count.answers:
                self.messages.publish(
                    exchange, {"clash": [exchange, self.rank, self.messages.arguments]}
                )
            elif count.answers and not full:
                return True, self.messages.answer_of(exchange)
            elif not count.answers and (full or (ready is not None and ready(count))):
                return True, count
            now = time.monotonic()
            if now >= end:
                return False, None
            least, most = max(5e-4, self.size / LOOKS), max(POLL / 4, 5 * self.size / LOOKS)
            time.sleep(min(end - now, max(least, min(most, (now - since) / 10))))

    # --- [Note: bytes] ---------------------------------------------------------------------------

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
            self.messages.answer_of(self._transfer)
        if time.monotonic() - moved >= (2 * self.interval if self._lost_one else self.timeout):
            raise RuntimeError(self.blame(f"for {self.timeout:g} s"))

    def blame(self, cause: str) -> str:
        """Publish and return why bytes did not arrive: the ranks whose heartbeats stand still."""
        exchange = self._transfer
        before = [self.heartbeats_of(rank) for rank in range(self.size)]
        # Heartbeats are read before and after, because a hung rank may have sent some long ago.
        self.messages.call_roll(exchange)  # a rank that has sent and taken everything answers
        time.sleep(GRACE + 2 * self.interval)
        now = [self.heartbeats_of(rank) for rank in range(self.size)]
        still = [rank for rank, a, b in zip(self.members, before, now, strict=True) if a == b]
        silent = [rank for rank in self.messages.missing(exchange) if rank in still]
        text = f"{exchange}: no bytes arrived {cause}, although every rank gives signs of life."
        if silent:
            names = diagnosis.names(silent)
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

    @contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Send heartbeats from a thread while the block runs."""
        if self.size == 1:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # if the store is gone, the next exchange reports it
                while not done.wait(self.interval):
                    self.send_heartbeat()

        thread = threading.Thread(target=beat, name="dist_ema heartbeat", daemon=True)
        try:
            # Inside, because an interrupt may come when it has started: it would beat for ever.
            thread.start()
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def send_heartbeat(self) -> None:
        self._heartbeat_store.add(f"heartbeats/{self.rank}", 1)
        self._heartbeat_store.add("heartbeats", 1)

    def heartbeats_of(self, rank: int | None = None) -> int:
        """How many a rank has sent; None: all ranks together."""
        key = "heartbeats" if rank is None else f"heartbeats/{rank}"
        return self.store.add(key, 0)  # type: ignore[no-any-return]


def completes(work: dist.Work, seconds: float) -> bool:
    """Wait up to `seconds` for the end of `work`. Polls less often the longer it takes."""
    began, waited = time.monotonic(), 0.0
    while not work.is_completed():
        if waited >= seconds:
            return False
        time.sleep(max(5e-5, min(POLL / 4, waited / 10, seconds - waited)))
        waited = time.monotonic() - began
    return True
