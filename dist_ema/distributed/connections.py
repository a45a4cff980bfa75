"""Runs of bytes from rank to rank, over TCP and in windows.

[Note: files]  Files may be written in the background, and ranks may die or fill a disk meanwhile.
So their bytes do not travel over a process group: a failure here stops no training, and it works
after destroy_process_group(). A connection is made where there are bytes to send, and for one
transfer: a rank sends to one other at a time.

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
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from .coordinator import StoreCoordinator
from .diagnosis import error_text
from .machines import Machines, pack, unpack

__all__ = ["WINDOW", "Connections", "Consume", "Receiver", "Run", "Stream", "windows"]

WINDOW = 16 << 20  # bytes that a receiver holds at once
MOST_RUNS = 1 << 16  # in one window

ACCEPTED = b"1"
PATIENCE = 5.0  # seconds until the addresses of a rank are given up, and tried again
IDLE = 0.02  # seconds between two looks whether a transfer has ended

_GREETING, _HEAD, _COUNT = struct.Struct("<32sQ"), struct.Struct("<IQ"), struct.Struct("<I")


class Run(NamedTuple):
    """Contiguous bytes of a buffer, in transit."""

    buffer: int
    offset: int
    data: memoryview


Consume = Callable[[int, int, memoryview], None]  # takes the fields of a Run


class Connections:
    """Connections of one rank to others.

    Args:
        coordinator: Messages among the ranks.
        machines: Who shares a machine.
        token: Known to these ranks alone.
        addresses: Of this machine.
        verb: What the ranks do, for errors.

    Note:
        *Collective*. *Cost*: a listening socket; the first rank reads the address of every rank,
        once, and the others those of one rank per machine.
    """

    def __init__(
        self,
        coordinator: StoreCoordinator,
        machines: Machines,
        token: str,
        addresses: Sequence[str],
        verb: str,
    ) -> None:
        self._coordinator, self._machines = coordinator, machines
        self._token = sha256(token.encode()).digest()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=dual
        )
        self._number = 0
        self._known: dict[int, dict[int, tuple[int, list[str]]]] = {}  # by column and rank
        self.received = 0  # bytes, in all
        port = self._listener.getsockname()[1]
        coordinator.gather(verb, [port, *addresses], self._publish)

    def close(self) -> None:
        self._listener.close()

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.close()

    def _publish(self, table: list[Any]) -> None:
        """On the first rank: write the addresses of each column."""
        for number in range(self._machines.width):
            column = self._machines.column(number)
            text = pack([[rank, *table[rank]] for rank in column])
            self._coordinator.store.set(f"column/{number}", text)
            self._coordinator.messages.keep(f"column/{number}")

    def _address(self, rank: int) -> tuple[int, list[str]]:
        column = self._machines.columns[rank]
        if column not in self._known:
            table = unpack(self._coordinator.store.get(f"column/{column}"))
            self._known[column] = {other: (port, addresses) for other, port, *addresses in table}
        return self._known[column][rank]

    # --- sending ---------------------------------------------------------------------------------

    def send(self, rank: int, runs: Iterable[Run], relay: int | None = None) -> None:
        """Send runs to a rank that is `receiving`, and wait until all are consumed.

        Inside `run_transfer` only.

        Args:
            rank: Who consumes them.
            runs: Read once.
            relay: Who passes them on, if not sent straight.

        Raises:
            RuntimeError: The other rank died, or failed to consume; or the transfer has ended.
        """
        error, peer = b"", rank if relay is None else relay
        try:
            with self._patiently(peer, rank) as connection:
                stream = Stream(connection, lambda moved: self._refuse_stall(peer, moved))
                for window in windows(runs):
                    sizes = [len(run.data) for run in window]
                    stream.send(_HEAD.pack(len(window), sum(sizes)))
                    table = [[run.buffer, run.offset, len(run.data)] for run in window]
                    stream.send(np.array(table, np.uint64).tobytes())
                    for run in window:
                        stream.send(run.data)
                stream.send(_HEAD.pack(0, 0))
                error = stream.receive(*_COUNT.unpack(stream.receive(_COUNT.size)))
        except OSError as broken:
            raise RuntimeError(self._coordinator.blame(f"({broken})")) from broken
        if error:
            raise RuntimeError(self._coordinator.publish_failure_of(rank, error.decode()))

    def _refuse_stall(self, rank: int, moved: float) -> float:
        """Raise if the transfer has ended. A rank that gives signs of life is waited for."""
        beats = self._coordinator.beats.of(rank)
        if self._beats[0] == rank and self._beats[1] != beats:
            moved = time.monotonic()
        self._beats = rank, beats
        self._coordinator.refuse_ended_transfer(moved)
        return moved

    _beats = (-1, 0)

    def _patiently(self, rank: int, target: int) -> socket.socket:
        """`connect`, again while a rank that does not answer gives signs of life."""
        moved = time.monotonic()
        while True:
            try:
                return self.connect(rank, target)
            except TimeoutError:
                moved = self._refuse_stall(rank, moved)

    def connect(self, rank: int, target: int) -> socket.socket:
        """A connection to a rank, for bytes that `target` consumes.

        Raises:
            OSError: The rank is not there.
        """
        port, addresses = self._address(rank)
        patience = max(self._coordinator.interval, min(PATIENCE, self._coordinator.timeout / 4))
        patience /= len(addresses)
        failures: list[str] = []
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), patience)
            except OSError as error:
                failures.append(f"{address}: {error}")
                continue
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._greeting + _COUNT.pack(target))
                if connection.recv(1) == ACCEPTED:
                    connection.settimeout(self._coordinator.interval)
                    addresses.sort(key=address.__ne__)  # the next connection tries it first
                    return connection
                failures.append(f"{address}: another process answered")
            except ConnectionError as error:
                failures.append(f"{address}: {error}")
            except TimeoutError:
                connection.close()
                raise
            connection.close()
        raise ConnectionError(
            f"rank {rank} is not reached at port {port} of {', '.join(failures)}. A firewall? "
            "GLOO_SOCKET_IFNAME names the interface, and mode='direct' needs no connections"
        )

    @property
    def _greeting(self) -> bytes:
        return _GREETING.pack(self._token, self._number)

    # --- receiving -------------------------------------------------------------------------------

    @contextmanager
    def receiving(self, consume: Consume) -> Iterator[Receiver]:
        """Consume what other ranks send while the block runs, in a thread.

        Note:
            *Collective*: enter it on every rank before any rank sends.
        """
        # The number of the transfer, also where an interrupt kept a rank from an earlier one.
        self._number = self._coordinator.number
        receiver = Receiver(self, consume, self._coordinator)
        threads = [
            threading.Thread(target=work, name="dist_ema bytes", daemon=True)
            for work in (lambda: receiver.accept(self._listener, self._greeting), receiver.serve)
        ]
        for thread in threads:
            thread.start()
        try:
            yield receiver
        finally:
            receiver.stopped = True
            for thread in threads:
                thread.join()
            self.received += receiver.received


class Receiver:
    """Serves all who send to this rank, one window at a time.

    Attributes:
        error: What `consume` raised. The rest is dropped, and the senders learn of it.
        received: Bytes of runs that this rank consumed.
        stopped: The block of `receiving` has ended, whatever is under way.
    """

    def __init__(
        self, connections: Connections, consume: Consume, coordinator: StoreCoordinator
    ) -> None:
        self._connections, self._consume, self._coordinator = connections, consume, coordinator
        self._selector = selectors.DefaultSelector()
        self._buffer = bytearray()
        self._beaten = 0.0
        self.error: Exception | None = None
        self.received, self.stopped = 0, False

    def watched(self, runs: Iterable[Run]) -> Iterator[Run]:
        """The runs, until this receiver has failed. Raises its error then."""
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
                connection.settimeout(self._coordinator.interval)
                # NOTE: a port is open to all; what does not greet is turned away, and so are
                # senders of a transfer that has failed.
                found = connection.recv(len(greeting) + _COUNT.size, socket.MSG_WAITALL)
                if found[: len(greeting)] == greeting:
                    connection.sendall(ACCEPTED)
                    target = _COUNT.unpack(found[len(greeting) :])[0]
                    self._selector.register(connection, selectors.EVENT_READ, target)
                else:
                    connection.close()

    def serve(self) -> None:
        """Take what comes over the connections."""
        while not self.stopped:
            if not self._selector.get_map():
                time.sleep(IDLE / 10)
            for key, _ in self._selector.select(IDLE):
                connection: Any = key.fileobj
                try:
                    ended = self._take(connection, key.data)
                except (OSError, _StoppedError):  # the sender notices too, and says whom it lost
                    ended = True
                if ended:
                    self._selector.unregister(connection)
                    connection.close()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _take(self, connection: socket.socket, target: int) -> bool:
        """Consume one window, or pass on all. Returns whether the sender has come to its end."""
        stream = Stream(connection, self._refuse_stopped)
        if target == self._coordinator.rank:
            return self._window(stream, None)
        with self._connections.connect(target, target) as onward:
            while not self._window(stream, Stream(onward, self._refuse_stopped)):
                pass
        return True

    def _refuse_stopped(self, moved: float) -> float:
        if self.stopped:
            raise _StoppedError
        return moved

    def _window(self, stream: Stream, onward: Stream | None) -> bool:
        """Consume one window or pass it on. Returns whether it was the end."""
        head = stream.receive(_HEAD.size)
        count, size = _HEAD.unpack(head)
        self._beat()
        if onward is not None:
            onward.send(head)
        if not count:
            error = b"" if self.error is None else error_text(self.error).encode()
            if onward is not None:
                error = onward.receive(*_COUNT.unpack(onward.receive(_COUNT.size)))
            stream.send(_COUNT.pack(len(error)) + error)
            return True
        entries = stream.receive(count * 24)
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        stream.receive_into(view)
        if onward is not None:
            onward.send(entries)
            onward.send(view)
            return False
        self.received += size
        at = 0
        for buffer, offset, length in np.frombuffer(entries, np.uint64).reshape(-1, 3).tolist():
            if self.error is None:
                try:
                    self._consume(buffer, offset, view[at : at + length])
                except Exception as error:
                    self.error = error
            at += length
        return False

    def _beat(self) -> None:
        """This rank may wait for others meanwhile, and moves bytes all the same."""
        if time.monotonic() - self._beaten > self._coordinator.interval:
            self._beaten = time.monotonic()
            with suppress(RuntimeError):
                self._coordinator.beats.send()


class _StoppedError(Exception):
    """The block of `receiving` has ended."""


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
