"""`Connections`: TCP between ranks: listening, addresses, greetings, sending and receiving.

[Note: files]  Files may be written in the background, and ranks may die or fill a disk meanwhile.
So their bytes do not travel over a process group: a failure here stops no training, and it works
after destroy_process_group(). A connection is made where there are bytes to send, and for one
transfer: a rank sends to one other at a time.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from .coordinator import StoreCoordinator
from .machines import Machines, pack, unpack
from .receiver import ACCEPTED, COUNT, GREETING, Consume, Receiver, Run, Stream

__all__ = ["Connections"]

PATIENCE = 5.0  # seconds until the addresses of a rank are given up, and tried again


class Connections:
    """Connections of one rank to others.

    Args:
        coordinator: Messages among the ranks.
        machines: Who shares a machine.
        token: Known to these ranks alone.
        addresses: The addresses of this machine.
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
        # The port is open to the network, and only these ranks know the token.
        self._token = sha256(token.encode()).digest()
        # One socket for both families, where the system has that.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=dual
        )
        weakref.finalize(self, self._listener.close)
        self._greeting = b""
        self._known: dict[int, dict[int, tuple[int, list[str]]]] = {}  # by column and rank
        self._beats = -1, 0  # the rank that was waited for last, and its heartbeats until then
        self.received = 0  # bytes, in all
        port = self._listener.getsockname()[1]
        # One table on the first rank; the others read the column that they send to.
        coordinator.gather(verb, [port, *addresses], self._publish)

    def _publish(self, ports_and_addresses: list[Any]) -> None:
        """Write the addresses of each column, on the first rank."""
        for number in range(self._machines.width):
            rows = [[rank, *ports_and_addresses[rank]] for rank in self._machines.column(number)]
            self._coordinator.store.set(f"column/{number}", pack(rows))
            self._coordinator.messages.keep(f"column/{number}")

    def _address(self, rank: int) -> tuple[int, list[str]]:
        column = self._machines.columns[rank]
        if column not in self._known:
            rows = unpack(self._coordinator.store.get(f"column/{column}"))
            self._known[column] = {other: (port, addresses) for other, port, *addresses in rows}
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
        peer = rank if relay is None else relay
        try:
            with self._patiently(peer, rank) as connection:
                stream = Stream(connection, lambda moved: self._refuse_stall(peer, moved))
                error = stream.send_windows(runs)
        except OSError as broken:
            raise RuntimeError(self._coordinator.blame(f"({broken})")) from broken
        if error:
            raise RuntimeError(self._coordinator.publish_failure_of(rank, error.decode()))

    def _refuse_stall(self, rank: int, moved: float) -> float:
        """Raise if the transfer has ended. Wait on while the other rank sends heartbeats."""
        beats = self._coordinator.heartbeats_of(rank)
        if self._beats[0] == rank and self._beats[1] != beats:
            moved = time.monotonic()
        self._beats = rank, beats
        self._coordinator.refuse_ended_transfer(moved)
        return moved

    def _patiently(self, rank: int, target: int) -> socket.socket:
        """`connect`, repeated while a rank that does not answer sends heartbeats."""
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
        # All addresses together, or an unreachable interface would cost the whole timeout.
        patience /= len(addresses)
        failures: list[str] = []
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), patience)
            except OSError as error:
                failures.append(f"{address}: {error}")
                continue
            try:
                # Or the small header of a window would wait for the answer to the one before.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._greeting + COUNT.pack(target))
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

    # --- receiving -------------------------------------------------------------------------------

    @contextmanager
    def receiving(self, consume: Consume) -> Iterator[Receiver]:
        """Consume what other ranks send while the block runs, in a thread.

        Note:
            *Collective*: enter it on every rank before any rank sends.
        """
        # The number of the transfer, also where an interrupt kept a rank from an earlier one.
        self._greeting = GREETING.pack(self._token, self._coordinator.number)
        receiver = Receiver(self.connect, consume, self._coordinator)
        greeted = self._listener, self._greeting
        threads = [
            threading.Thread(target=receiver.accept, args=greeted, name="dist_ema accept"),
            threading.Thread(target=receiver.serve, name="dist_ema bytes"),
        ]
        for thread in threads:
            thread.daemon = True
        try:
            # Inside, because an interrupt may come when they have started.
            for thread in threads:
                thread.start()
            yield receiver
        finally:
            receiver.stopped = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            receiver.close()
            self.received += receiver.received
