"""Compiled passes over host memory, where numba is installed: pip install 'dist-ema[cpu]'.

torch has no CPU kernel that reads bfloat16 and moves fp32, and none that rounds stochastically. So
eager code goes over the same elements two to twenty times. A pass reads live once and each shadow
once. Tables that are built once say where:

    rows      int64 [rows, 5]         length, number of the key, number of the first element in the
                                      full weight (low 32 bits, high), step from one to the next
    lives     addresses [rows]
    shadows   addresses [rows, averages]

[Note: threads]  Threads draw tasks from one iterator; who moves an element does not change its
bits. They are those of torch's own OpenMP runtime, through its C interface. They stay awake for
some milliseconds after torch's last kernel, and threads of Python's have to share the cores with
them. 124 M fp32 weights on two cores, after a kernel: 0.98 to 1.04 times torch's `add_` this way,
1.11 to 1.13 with threads of Python's. Those remain for a torch without such a runtime, and for a
forked process. There the runtime would wait for threads that were not forked. `numba.prange` is not
used. It ends the process where one that used it has forked, or where two threads run it at once on
numba's own thread pool.

[Note: no cache]  Compiling takes about a second per process and a tenth per further pair of
dtypes, in the first update. numba could keep the result on disk, as a pickle, which this library
does not read.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .pairs import LIVE, SHADOW, ShadowPair, Weights, merge
from .rounding import key_prefix

__all__ = [
    "ROW",
    "Pass",
    "Ramp",
    "available",
    "cut_tasks",
    "find_openmp",
    "find_pass",
    "is_reachable",
    "plan_passes",
    "ramps",
    "run_on_threads",
]

ROW = 1 << 16  # elements in one row: live stays in the cache between averages
SHARE = 1 << 20  # elements that are worth a thread
DRAWS = 16  # tasks that a thread draws: not more, because each waits for the interpreter
FEW = 16  # elements; ramps that are shorter than that on average are left to eager code

PROCESS = os.getpid()
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Ramp = tuple[int, int, int]  # element numbers: how many, the first, the step to the next


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
    return all(
        t.is_cpu and type(t) in (Tensor, torch.nn.Parameter) for t in (pair.live, *pair.shadows)
    )


def plan_passes(pairs: Sequence[ShadowPair], seed: int) -> tuple[list[Pass], list[ShadowPair]]:
    """One pass per pair of dtypes, and the pairs that none takes."""
    left_pairs: list[ShadowPair] = []
    plain: list[ShadowPair] = []
    rounded: list[tuple[ShadowPair, list[Ramp]]] = []
    for pair in pairs:
        if not is_reachable(pair) or find_pass(pair.live.dtype, pair.shadows[0].dtype) is None:
            left_pairs.append(pair)
        elif not pair.rounds:
            plain.append(pair)
        elif (pair_ramps := ramps(pair.indices, len(pair.live), pair.huge)) is not None:
            rounded.append((pair, pair_ramps))
        else:
            left_pairs.append(pair)
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[ShadowPair, list[Ramp]]]] = {}
    for entry in [*((pair, [(pair.live.numel(), 0, 0)]) for pair in merge(plain)), *rounded]:
        groups.setdefault((entry[0].live.dtype, entry[0].shadows[0].dtype), []).append(entry)
    return [Pass(group, seed) for group in groups.values()], left_pairs


def ramps(indices: Callable[[int, int], Tensor], n: int, huge: bool) -> list[Ramp] | None:
    """Write n element numbers as ramps that do not cross a multiple of 2^32.

    Returns:
        The ramps in order, or None if they are too short to be worth it.

    Note:
        *Cost*: what one eager update spends on element numbers.
    """
    runs_of_numbers: list[Ramp] = []
    for start in range(0, n, 1 << 18):
        numbers = indices(start, min(start + (1 << 18), n)).numpy()
        steps = np.diff(numbers)
        step = int(np.median(steps[:257])) if len(steps) else 0
        breaks = steps != step
        if huge:
            breaks |= np.diff(numbers >> 32) != 0
        ends = np.append(np.flatnonzero(breaks) + 1, len(numbers))
        if len(ends) > 1 + len(numbers) // FEW:
            return None
        starts = np.append(0, ends[:-1])
        runs_of_numbers += [
            (int(b - a), int(numbers[a]), step) for a, b in zip(starts, ends, strict=True)
        ]
    return runs_of_numbers


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
        self.rows, self._lives, self._shadows = _tables(group)
        self._ends = self.rows[:, 0].cumsum()
        self._threads = max(1, len(first.shadows) * int(self._ends[-1]) // SHARE)
        self._keys = np.zeros(len(self.pairs), dtype=np.uint32)
        self._weights = torch.zeros(len(first.shadows), dtype=torch.float32, device="cpu")
        self._places = self._weights.unbind()
        self._sweep = find_pass(first.live.dtype, first.shadows[0].dtype)
        tables = [self.rows, self._lives, self._shadows, self._weights.numpy(), self._keys]
        kinds = self._sweep.ctypes.argtypes
        self._tables = [x.ctypes.data_as(kind) for x, kind in zip(tables, kinds, strict=False)]
        shadows = [shadow for pair in self.pairs for shadow in pair.shadows]
        self._written = list({id(base): base for base in map(_base, shadows)}.values())

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        """Move every shadow towards live; as `UpdatePlan.run`."""
        for place, weight in zip(self._places, weights, strict=True):
            place.copy_(weight) if isinstance(weight, Tensor) else place.fill_(weight)
        if self._names:
            head = crc32(key_prefix(self._seed, update))
            self._keys[:] = [crc32(name, head) for name in self._names]
        # NOTE: these counters tell autograd that a saved tensor was overwritten; torch's kernels
        # move them by themselves.
        torch.autograd.graph.increment_version(self._written)
        sweep, tables, averages = self._sweep.ctypes, self._tables, len(self._places)
        threads = min(torch.get_num_threads(), self._threads)
        starts = cut_tasks(self._ends, 1 if threads == 1 else DRAWS * threads)
        run_on_threads(
            lambda begin, end: sweep(*tables, begin, end, averages, guard), starts, threads
        )


def _tables(group: Sequence[tuple[ShadowPair, list[Ramp]]]) -> Iterator[Any]:
    """rows, lives and shadows. ROW elements at most are one row."""
    ramps = np.array([ramp for _, pair_ramps in group for ramp in pair_ramps], dtype=np.int64)
    lengths, firsts, steps = ramps.T
    pairs = np.repeat(np.arange(len(group)), [len(pair_ramps) for _, pair_ramps in group])
    begins = lengths.cumsum() - lengths
    begins -= begins[np.searchsorted(pairs, pairs)]  # of each ramp in its pair
    rows = -(-lengths // ROW)
    ramp = np.repeat(np.arange(len(ramps)), rows)  # of each row
    starts = ROW * (np.arange(len(ramp)) - (rows.cumsum() - rows)[ramp])
    numbers, sizes = (
        firsts[ramp] + starts * steps[ramp],
        np.minimum(lengths[ramp] - starts, ROW),
    )
    low, high = numbers & 0xFFFFFFFF, numbers >> 32
    yield np.stack([sizes, pairs[ramp], low, high, steps[ramp]], axis=1).copy()
    tensors = [(pair.live, *pair.shadows) for pair, _ in group]
    addresses = np.array([[t.data_ptr() for t in column] for column in tensors], dtype=np.int64)
    addresses = addresses[pairs[ramp]]
    addresses += np.outer(begins[ramp] + starts, [t.element_size() for t in tensors[0]])
    yield addresses[:, 0].copy()
    yield addresses[:, 1:].copy()


def cut_tasks(ends: Any, tasks: int) -> list[int]:
    """Where each of these tasks begins in rows that end there, and where the last one ends."""
    starts = np.searchsorted(ends, ends[-1] * np.arange(tasks + 1) // tasks, side="right")
    return starts.tolist()  # type: ignore[no-any-return]


def _base(tensor: Tensor) -> Tensor:
    """The tensor whose version counter is that of `tensor`."""
    return tensor if tensor._base is None else tensor._base


def run_on_threads(move: Callable[[int, int], None], starts: list[int], threads: int) -> None:
    """Move the rows between consecutive starts on several threads, and wait ([Note: threads]).

    `move(begin, end)` releases the interpreter. Orders: all rows, then what follows in the caller.
    """
    tasks = itertools.pairwise(starts)  # drawing from it is atomic
    raised: list[BaseException] = []

    def draw(_: object = None) -> None:
        try:
            for begin, end in tasks:
                move(begin, end)
        except BaseException as error:  # an interrupt, which would be lost in a call from C
            raised.append(error)

    parallel = find_openmp() if os.getpid() == PROCESS else None
    if threads == 1:
        draw()
    elif parallel is not None:
        parallel(Task(draw), None, threads, 0)
    else:
        others = [threading.Thread(target=draw) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        draw()
        for thread in others:
            thread.join()
    if raised:
        raise raised[0]


@cache
def find_openmp() -> Any:
    """GOMP_parallel(task, argument, threads, flags) of the runtime that torch has loaded, or None.

    It calls the task once on each thread and waits for all. LLVM's and Intel's runtimes have the
    function too.
    """
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = [Task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
    return parallel
