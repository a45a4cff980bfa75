"""`Pass`: compiled code over host memory, where numba is installed: pip install 'dist-ema[cpu]'.

torch has no CPU kernel that reads bfloat16 and moves fp32, and none that rounds stochastically. So
eager code goes over the same elements two to twenty times. A pass reads live once and each shadow
once. Tables that are built once (`cpu_tables`) say where.

[Note: no cache]  Compiling takes about a second per process and a tenth per further pair of
dtypes, in the first update. numba could keep the result on disk, as a pickle, which this library
does not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .cpu_tables import Ramp, cut_tasks, ramps, row_tables
from .cpu_threads import run_on_threads
from .pairs import LIVE, SHADOW, ShadowPair, Weights, merge
from .rounding import key_prefix

__all__ = [
    "SHARE",
    "WORTH",
    "Pass",
    "available",
    "find_pass",
    "is_reachable",
    "is_worth_it",
    "passes_same_bits",
    "plan_passes",
]

SHARE = 1 << 20  # elements that are worth a thread
WORTH = 1 << 17  # elements; compiling for less takes longer than it ever saves


@cache
def available() -> bool:
    """numba is installed, works with this numpy, and is not disabled (NUMBA_DISABLE_JIT=1)."""
    try:
        from . import cpu_numba
    except ImportError:
        return False
    return not cpu_numba.is_disabled()


@cache
def find_pass(live: torch.dtype, shadow: torch.dtype) -> Any:
    """The compiled code for a pair of dtypes, None if there is none.

    *Cost*: compiles it, once per process ([Note: no cache]).
    """
    if live not in LIVE or shadow not in SHADOW or not available():
        return None
    from . import cpu_numba

    try:
        return cpu_numba.compile_pass(live, shadow)
    except Exception as error:  # an older or newer numba that refuses our code
        warnings.warn(
            f"numba cannot compile the update of {shadow} averages of {live} weights, eager torch "
            f"takes over: {error}",
            stacklevel=2,
        )
        return None


def is_reachable(pair: ShadowPair) -> bool:
    """All tensors lie in host memory, and none is a subclass that may hold something else."""
    return all(t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) for t in pair.tensors)


def is_worth_it(pairs: Sequence[ShadowPair]) -> bool:
    """Compiling pays, and does not change a bit."""
    sizes = accumulate(len(pair) for pair in pairs if is_reachable(pair))
    return any(size >= WORTH for size in sizes) and available() and passes_same_bits()


@cache
def passes_same_bits() -> bool:
    """A pass rounds as torch's lerp does ([Note: the same bits] in eager), tried on some numbers.

    Each of these products is rounded when it is not fused with the addition.
    """
    ramp = torch.arange(1003, device="cpu")
    start, end = ((ramp * factor % 1009 - 504).float() / 1009 for factor in (71, 917))
    for weight in (11 / 32 + 2.0**-20, 23 / 32 + 2.0**-20):  # on either side of 0.5
        shadow = start.clone()
        passes, _ = plan_passes([ShadowPair("", [shadow], end, torch.arange)], 0)
        for compiled_pass in passes:
            compiled_pass.run([weight], 0, False)
        if not torch.equal(shadow, torch.lerp(start, end, weight)):
            return False
    return True


def plan_passes(pairs: Sequence[ShadowPair], seed: int) -> tuple[list[Pass], list[ShadowPair]]:
    """One pass per pair of dtypes, and the pairs that none takes."""
    left_pairs: list[ShadowPair] = []
    plain: list[ShadowPair] = []
    rounded: list[tuple[ShadowPair, list[Ramp]]] = []
    for pair in pairs:
        if not is_reachable(pair) or find_pass(*pair.dtypes) is None:
            left_pairs.append(pair)
        elif not pair.rounds:
            plain.append(pair)
        elif (pair_ramps := ramps(pair.indices, len(pair), pair.huge)) is not None:
            rounded.append((pair, pair_ramps))
        else:
            left_pairs.append(pair)
    # Without rounding no element number is read: one ramp of zeros is as long as the pair.
    taken = [*((pair, [(len(pair), 0, 0)]) for pair in merge(plain)), *rounded]
    by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[tuple[ShadowPair, list[Ramp]]]] = {}
    for pair, pair_ramps in taken:
        by_dtypes.setdefault(pair.dtypes, []).append((pair, pair_ramps))
    return [Pass(group, seed) for group in by_dtypes.values()], left_pairs


class Pass:
    """One compiled pass over pairs of one pair of dtypes, with their element numbers.

    Note:
        *Aliases*: the tables hold addresses, so the pass keeps the tensors. *Cost*: 56 bytes per
        pair and per 64 K elements; compiles when it is made ([Note: no cache]).
    """

    def __init__(self, group: Sequence[tuple[ShadowPair, list[Ramp]]], seed: int) -> None:
        self.pairs, self._seed = [pair for pair, _ in group], seed
        first = self.pairs[0]
        self._names = [pair.name.encode() for pair in self.pairs] if first.rounds else []
        self.rows, lives, shadows = row_tables(group)
        starts = cut_tasks(self.rows[:, 0].cumsum())
        self._keys = np.zeros(len(self.pairs), dtype=np.uint32)
        self._weights = torch.zeros(len(first.shadows), dtype=torch.float32, device="cpu")
        self._places = self._weights.unbind()
        self._tables = [self.rows, lives, shadows, self._weights.numpy(), self._keys, starts]
        # What the compiled code reads, last `guard`; it holds addresses, so the tables are kept.
        addresses = [table.ctypes.data for table in self._tables]
        self._job = np.array([*addresses, len(first.shadows), 0], dtype=np.int64)
        self._tasks = len(starts) - 1
        self._threads = max(1, len(first.shadows) * int(self.rows[:, 0].sum()) // SHARE)
        self._move = find_pass(*first.dtypes)
        # A view has the version counter of its base.
        bases = [
            shadow if shadow._base is None else shadow._base
            for pair in self.pairs
            for shadow in pair.shadows
        ]
        self._written = list({id(base): base for base in bases}.values())

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        """Move every shadow towards live; as `UpdatePlan.run`."""
        for place, weight in zip(self._places, weights, strict=True):
            place.fill_(weight)
        if self._names:
            head = crc32(key_prefix(self._seed, update))
            self._keys[:] = [crc32(name, head) for name in self._names]
        # NOTE: these counters tell autograd that a saved tensor was overwritten; torch's kernels
        # move them by themselves.
        torch.autograd.graph.increment_version(self._written)
        self._job[-1] = guard
        threads = min(torch.get_num_threads(), self._threads)
        run_on_threads(self._move, self._job.ctypes.data, self._tasks, threads)
