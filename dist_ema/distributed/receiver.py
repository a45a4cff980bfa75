"""`Receiver`, `Stream`: the end of a connection that takes windows, and consumes or relays them.

    greeting   token, number of the transfer, rank    --> 1
    window     count, (buffer, offset, length) * count, the bytes of all
    end        count 0                                --> length of an error, its text

A run goes into one of several buffers, numbered alike on all ranks: files, or tensors in memory.
A rank that is greeted for another one passes on what it receives, one sender at a time.

The receiver answers the end when all has been consumed. So once every rank has come to the end,
every byte is in place, and no rank needs to know who sends to it.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from .coordinator import StoreCoordinator
from .diagnosis import error_text

__all__ = [
    "ACCEPTED",
    "COUNT",
    "GREETING",
    "WINDOW",
    "Consume",
    "Receiver",
    "Run",
    "Stream",
    "windows",
]

WINDOW = 16 << 20  # bytes that a receiver holds at once
MOST_RUNS = 1 << 16  # in one window

ACCEPTED = b"1"
IDLE = 0.02  # seconds between two looks whether a transfer has ended

GREETING, _HEAD, COUNT = struct.Struct("<32sQ"), struct.Struct("<IQ"), struct.Struct("<I")


class Run(NamedTuple):
    """Contiguous bytes of a buffer, in transit."""

    buffer: int
    offset: int
    data: memoryview


Consume = Callable[[int, int, memoryview], None]  # takes the fields of a Run


class Receiver:
    """Serves all who send to this rank, one window at a time.

    Args:
        connect: Opens a connection to a rank, for bytes that another one consumes.
        consume: Takes the runs.
        coordinator: Messages among the ranks.

    Attributes:
        error: What `consume` raised. The rest is dropped, and the senders learn of it.
        received: Bytes of runs that this rank consumed.
        stopped: The block of `receiving` has ended, whatever is under way.
    """

    def __init__(
        self,
        connect: Callable[[int, int], socket.socket],
        consume: Consume,
        coordinator: StoreCoordinator,
    ) -> None:
        self._connect, self._consume, self._coordinator = connect, consume, coordinator
        self._selector = selectors.DefaultSelector()
        self._buffer = bytearray()
        self._beaten = 0.0
        self.error: Exception | None = None
        self.received, self.stopped = 0, False

    def watched(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Pass the runs on, and raise the error of this receiver once it has failed."""
        for run in runs:
            if self.error is not None:
                raise self.error
            yield run

    def accept(self, listener: socket.socket, greeting: bytes) -> None:
        """Take connections, in a thread of its own: who connects is answered at once."""
        listener.settimeout(IDLE)
        while not self.stopped:
            with suppress(OSError):
                connection, _ = listener.accept()
                if not self._is_greeted(connection, greeting):
                    connection.close()

    def _is_greeted(self, connection: socket.socket, greeting: bytes) -> bool:
        """Whether a sender of this transfer is at the other end, which is served then.

        A port is open to all. What greets otherwise, too slowly or in part is turned away, and so
        are senders of a transfer that has failed.
        """
        with suppress(OSError):
            connection.settimeout(self._coordinator.interval)
            head = connection.recv(len(greeting) + COUNT.size, socket.MSG_WAITALL)
            if head[: -COUNT.size] == greeting:
                connection.sendall(ACCEPTED)
                target = COUNT.unpack(head[-COUNT.size :])[0]
                self._selector.register(connection, selectors.EVENT_READ, target)
                return True
        return False

    def serve(self) -> None:
        """Take what comes over the connections."""
        while not self.stopped:
            if not self._selector.get_map():
                time.sleep(IDLE / 10)
            for key, _ in self._selector.select(IDLE):
                connection: Any = key.fileobj
                try:
                    ended = self._take(connection, key.data)
                except OSError:  # the sender notices too, and says whom it lost
                    ended = True
                except Exception as error:  # or the senders would wait for this thread
                    self.error, ended = self.error or error, True
                if ended:
                    self._selector.unregister(connection)
                    connection.close()

    def close(self) -> None:
        """Close what is open, once `accept` and `serve` have ended: both use the selector."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _take(self, connection: socket.socket, target: int) -> bool:
        """Consume one window, or pass on all. Returns whether the sender has come to its end."""
        stream = Stream(connection, self._refuse_stopped)
        # One window at a time, so that all senders are served in turn.
        if target == self._coordinator.rank:
            return self._window(stream, None)
        with self._connect(target, target) as onward:
            while not self._window(stream, Stream(onward, self._refuse_stopped)):
                pass
        return True

    def _refuse_stopped(self, moved: float) -> float:
        if self.stopped:
            raise ConnectionAbortedError(103, "the block of `receiving` has ended")
        return moved

    def _window(self, stream: Stream, onward: Stream | None) -> bool:
        """Consume one window or pass it on. Returns whether it was the end."""
        head = stream.receive(_HEAD.size)
        count, size = _HEAD.unpack(head)
        self._beat()
        if onward is not None:
            onward.send(head)
        if not count:
            error = b"" if self.error is None else error_text(self.error).encode(errors="replace")
            if onward is not None:
                error = onward.receive_error()
            stream.send(COUNT.pack(len(error)) + error)
            return True
        # Three numbers of 8 bytes for each run.
        run_table = stream.receive(count * 24)
        # Kept for the next window: fresh pages cost as much as the bytes.
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        stream.receive_into(view)
        if onward is not None:
            onward.send(run_table)
            onward.send(view)
            return False
        self.received += size
        at = 0
        for buffer, offset, length in np.frombuffer(run_table, np.uint64).reshape(-1, 3).tolist():
            if self.error is None:
                try:
                    self._consume(buffer, offset, view[at : at + length])
                except Exception as error:
                    self.error = error
            at += length
        return False

    def _beat(self) -> None:
        """Send a heartbeat, as this rank moves bytes while another thread of it may wait."""
        if time.monotonic() - self._beaten > self._coordinator.interval:
            self._beaten = time.monotonic()
            with suppress(RuntimeError):
                self._coordinator.send_heartbeat()


class Stream:
    """A connection with a time limit on every call; `stalled` takes and gives when bytes moved."""

    def __init__(self, connection: socket.socket, stalled: Callable[[float], float]) -> None:
        self._connection, self._stalled = connection, stalled
        self._moved = time.monotonic()

    def send(self, data: bytes | memoryview) -> None:
        self._move(self._connection.send, memoryview(data).cast("B"))

    def receive(self, size: int) -> bytes:
        data = bytearray(size)
        self.receive_into(memoryview(data))
        return bytes(data)

    def send_windows(self, runs: Iterable[Run]) -> bytes:
        """Send runs and the end. Returns the error with which the receiver answers, if any."""
        for window in windows(runs):
            run_table = [[run.buffer, run.offset, len(run.data)] for run in window]
            self.send(_HEAD.pack(len(window), sum(length for *_, length in run_table)))
            self.send(np.array(run_table, np.uint64).tobytes())
            for run in window:
                self.send(run.data)
        self.send(_HEAD.pack(0, 0))
        return self.receive_error()

    def receive_error(self) -> bytes:
        return self.receive(*COUNT.unpack(self.receive(COUNT.size)))

    def receive_into(self, view: memoryview) -> None:
        self._move(self._connection.recv_into, view)

    def _move(self, operation: Callable[[memoryview], int], view: memoryview) -> None:
        """Repeat `operation`, which moves some bytes, until it has moved all of the view."""
        while view:
            try:
                count = operation(view)
            except TimeoutError:
                self._moved = self._stalled(self._moved)
                continue
            if not count:
                raise ConnectionResetError(104, "Connection closed")
            view, self._moved = view[count:], time.monotonic()


def windows(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs of at most one window together; long ones are cut."""
    window: list[Run] = []
    free = WINDOW
    for buffer, offset, data in runs:
        while len(data):
            part = data[:free]
            window.append(Run(buffer, offset, part))
            data, offset, free = data[len(part) :], offset + len(part), free - len(part)
            if not free or len(window) == MOST_RUNS:
                yield window
                window, free = [], WINDOW
    if window:
        yield window
