"""`Machines`, `Routes`: ranks of one machine, its addresses, and who sends bytes of files to whom.

[Note: columns]  Rank i of a machine sends to rank i of every other machine, which writes or passes
on. So a rank has one connection per machine, and not one per rank:

    machine 0   rank 0   rank 1   rank 2   rank 3
                  |        |        |        |        columns
    machine 1   rank 4   rank 5   rank 6   rank 7

[Note: routes]  Two NFS clients that write neighbouring bytes of one page can lose one of them. So
the files are laid end to end and cut into equal ranges, one for each machine. A cut lies between
two files where that leaves the machines within a tenth of each other. Else it lies at a multiple of
ALIGN, which no page crosses. All ranks of a machine write its range; who sends to whom is told by
[Note: columns].
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import socket
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

__all__ = ["MACHINE", "Machines", "Routes", "addresses", "machine_id", "numbered", "pack", "unpack"]

MACHINE = "DIST_EMA_MACHINE"  # an environment variable that overrides the machine's identity
_ADDRESS_OF = 0x8915  # SIOCGIFADDR


class Machines:
    """The ranks of each machine.

    Args:
        numbers: For each rank the number of its machine; they are numbered as they appear.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self.ranks: list[list[int]] = [[] for _ in range(max(numbers) + 1)]
        self.columns = [0] * len(numbers)  # of each rank: its place among those of its machine
        for rank, number in enumerate(numbers):
            self.columns[rank] = len(self.ranks[number])
            self.ranks[number].append(rank)

    @property
    def width(self) -> int:
        """The number of columns."""
        return max(map(len, self.ranks))

    def column(self, number: int) -> list[int]:
        """One rank of each machine ([Note: columns])."""
        return [ranks[number % len(ranks)] for ranks in self.ranks]


def machine_id() -> str:
    """An id of the running kernel, which containers of one machine share with its page cache."""
    if MACHINE in os.environ:
        return os.environ[MACHINE]
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def numbered(ids: Sequence[str]) -> list[int]:
    """The ids as numbers, in the order in which they appear."""
    order = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    return [order[name] for name in ids]


def pack(value: Any) -> str:
    """JSON, compressed: a table of machines repeats itself."""
    return base64.b64encode(zlib.compress(json.dumps(value).encode(), 9)).decode()


def unpack(text: str | bytes) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def addresses(store: Any) -> list[str]:
    """Addresses at which others may reach this machine, the likeliest first.

    That is the interface named by GLOO_SOCKET_IFNAME, the one that leads to the key-value store,
    and what the host's name stands for.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    addresses_here = [
        *_of_interface(os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]),
        *_towards(getattr(store, "host", "")),
        *(place[0] for _, place in _resolved(socket.gethostname())),
        "127.0.0.1",
        "::1",
    ]
    return list(dict.fromkeys(addresses_here))


def _of_interface(name: str) -> Iterator[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        # OSError: there is no such interface, none was named, or it has no address of IPv4
        reply = fcntl.ioctl(probe.fileno(), _ADDRESS_OF, struct.pack("256s", name.encode()))
        yield socket.inet_ntoa(reply[20:24])


def _towards(host: str) -> Iterator[str]:
    """The addresses of this machine's interfaces that lead to `host`. Sends nothing."""
    for family, place in _resolved(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(place)
            yield probe.getsockname()[0]


def _resolved(host: str) -> list[tuple[int, Any]]:
    """The addresses of IPv4 and IPv6 that a name stands for, each with its family."""
    try:
        resolved = socket.getaddrinfo(host or None, 9, type=socket.SOCK_DGRAM)
    except OSError:  # the name has none
        return []
    return [(family, place) for family, _, _, _, place in resolved]


# --- [Note: routes] -------------------------------------------------------------------------------


ALIGN = 1 << 20  # bytes; a multiple of the pages of every system
SNAP = 20  # a cut moves by at most one part in so many of a machine's range


class Routes:
    """The ranks to which this one sends the bytes of files.

    Args:
        sizes: The sizes of the files in bytes, numbered alike on all ranks.
        machines: Who shares a machine.
        writers: The ranks that write, for each machine that has some.
        rank: The index of this process.

    Attributes:
        peers: For each range the rank that takes bytes of it from this rank, maybe itself.
        order: The ranges, in the order in which this rank sends to them: another one on each
            machine, so that all are served at once.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        machines: Machines,
        writers: Sequence[Sequence[int]],
        rank: int,
    ) -> None:
        self._starts = [0, *accumulate(sizes)]
        self.cuts = _cuts(self._starts, len(writers))
        column, number = machines.columns[rank], machines.numbers[rank]
        self.peers = [rank if rank in ranks else ranks[column % len(ranks)] for ranks in writers]
        count = len(writers)
        self.order = [(number + 1 + step) % count for step in range(count)]

    def ranges(self, file: int, begin: int, end: int) -> range:
        """The ranges that the bytes [begin, end) of a file may meet."""
        start = self._starts[file]
        first = bisect_right(self.cuts, start + begin) - 1
        return range(first, max(first, bisect_right(self.cuts, start + end - 1) - 1) + 1)

    def clip(self, number: int, file: int, begin: int, end: int) -> tuple[int, int]:
        """The part of the bytes [begin, end) of a file in a range. May be empty."""
        start = self._starts[file]
        low = max(begin, self.cuts[number] - start)
        return low, max(low, min(end, self.cuts[number + 1] - start))


def _cuts(starts: Sequence[int], count: int) -> list[int]:
    """Where the range of each of `count` machines begins, and the end."""
    total, cuts = starts[-1], [0]
    for number in range(1, count):
        ideal = total * number // count
        file = min(bisect_right(starts, ideal) - 1, len(starts) - 2)
        low, high = starts[file], starts[file + 1]
        near = low if ideal - low < high - ideal else high
        cut = min(high, low - (low - ideal) // ALIGN * ALIGN)
        if abs(near - ideal) * SNAP * count <= total:
            cut = near
        cuts.append(max(cuts[-1], cut))
    return [*cuts, total]
