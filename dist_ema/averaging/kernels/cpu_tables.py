"""Ramps of element numbers, and the numpy tables of rows, tasks and addresses of a CPU pass.

rows      int64 [rows, 5]         length, number of the key, number of the first element in the
                                  full weight (low 32 bits, high), step from one to the next
lives     addresses [rows]
shadows   addresses [rows, averages]
starts    int64 [tasks + 1]       the first row of each task, and where the last one ends
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .pairs import ShadowPair

__all__ = ["FEW", "ROW", "TASK", "Ramp", "cut_tasks", "ramps", "row_tables"]

ROW = 1 << 16  # elements in one row: live stays in the cache between averages
TASK = 1 << 20  # elements in one task: a thread that goes on where it was reads ahead
TASKS = 64  # at least, so that all threads end at about the same time
FEW = 16  # elements; ramps that are shorter than that on average are left to eager code

Ramp = tuple[int, int, int]  # element numbers: how many, the first, the step to the next


def ramps(indices: Callable[[int, int], Tensor], n: int, huge: bool) -> list[Ramp] | None:
    """Write n element numbers as ramps that do not cross a multiple of 2^32.

    Returns:
        The ramps in order, or None if they are too short to be worth it.

    Note:
        *Cost*: what one eager update spends on element numbers.
    """
    found_ramps: list[Ramp] = []
    for start in range(0, n, 1 << 18):
        numbers = indices(start, min(start + (1 << 18), n)).numpy()
        steps = np.diff(numbers)
        step = int(np.median(steps[:257])) if len(steps) else 0
        ramp_ends = steps != step
        if huge:  # a pass computes the low 32 bits of a number, and takes the others from its row
            ramp_ends |= np.diff(numbers >> 32) != 0
        bounds = [0, *(np.flatnonzero(ramp_ends) + 1).tolist(), len(numbers)]
        if len(bounds) > 2 + len(numbers) // FEW:
            return None
        found_ramps += [(b - a, int(numbers[a]), step) for a, b in itertools.pairwise(bounds)]
    return found_ramps


def row_tables(group: Sequence[tuple[ShadowPair, list[Ramp]]]) -> tuple[Any, Any, Any]:
    """rows, lives and shadows. ROW elements at most are one row."""
    ramps = np.array([ramp for _, pair_ramps in group for ramp in pair_ramps], dtype=np.int64)
    lengths, firsts, steps = ramps.T
    pairs = np.repeat(np.arange(len(group)), [len(pair_ramps) for _, pair_ramps in group])
    begins = lengths.cumsum() - lengths
    begins -= begins[np.searchsorted(pairs, pairs)]  # of each ramp in its pair
    rows = -(-lengths // ROW)
    ramp = np.repeat(np.arange(len(ramps)), rows)  # of each row
    starts = ROW * (np.arange(len(ramp)) - (rows.cumsum() - rows)[ramp])
    numbers, sizes = firsts[ramp] + starts * steps[ramp], np.minimum(lengths[ramp] - starts, ROW)
    columns = [sizes, pairs[ramp], numbers & 0xFFFFFFFF, numbers >> 32, steps[ramp]]
    pointers = [[t.data_ptr() for t in pair.tensors] for pair, _ in group]
    itemsizes = [t.element_size() for t in group[0][0].tensors]
    addresses = np.array(pointers, dtype=np.int64)[pairs[ramp]]
    addresses += np.outer(begins[ramp] + starts, itemsizes)
    # Copies, because C reads each table as one array without gaps.
    return np.stack(columns, axis=1).copy(), addresses[:, 0].copy(), addresses[:, 1:].copy()


def cut_tasks(ends: Any) -> Any:
    """starts, for rows that end at these elements."""
    tasks = min(len(ends), max(TASKS, int(ends[-1]) // TASK))
    starts = np.searchsorted(ends, ends[-1] * np.arange(tasks + 1) // tasks, side="right")
    return starts.astype(np.int64)
