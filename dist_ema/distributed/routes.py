"""Which machine writes which bytes of the files.

[Note: routes]  Two NFS clients that write neighbouring bytes of one page can lose one of them. So
the files are laid end to end and cut into equal ranges, one for each machine. A cut lies between
two files where that leaves the machines within a tenth of each other, else at a multiple of ALIGN
in a file, which no page crosses. All ranks of a machine write its range; who sends to whom is told
by [Note: columns].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from .machines import Machines

__all__ = ["Routes"]

ALIGN = 1 << 20  # bytes; a multiple of the pages of every system
SNAP = 20  # a cut moves by at most one part in so many of a machine's range


class Routes:
    """Where this rank sends the bytes of files.

    Args:
        sizes: Of the files in bytes, numbered alike on all ranks.
        machines: Who shares a machine.
        writers: The ranks that write, for each machine that has some.
        rank: Of this process.

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
        """What of the bytes [begin, end) of a file lies in a range. May be empty."""
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
