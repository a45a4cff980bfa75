"""`run_on_threads`: the rows of a compiled pass cut into tasks, on torch's own threads or Python's.

[Note: threads]  Threads draw tasks from one iterator; who moves an element does not change its
bits. They are those of torch's own OpenMP runtime, through its C interface. They stay awake for
some milliseconds after torch's last kernel, and threads of Python's have to share the cores with
them. 124 M fp32 weights on two cores, after a kernel: 0.98 to 1.04 times torch's `add_` this way,
1.11 to 1.13 with threads of Python's. Those remain for a torch without such a runtime, and for a
forked process. There the runtime would wait for threads that were not forked. `numba.prange` is not
used. It ends the process where one that used it has forked, or where two threads run it at once on
numba's own thread pool.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

__all__ = ["DRAWS", "cut_tasks", "find_openmp", "run_on_threads"]

DRAWS = 16  # tasks that a thread draws: not more, because each waits for the interpreter

PROCESS = os.getpid()
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def cut_tasks(ends: Any, tasks: int) -> list[int]:
    """Where each of these tasks begins in rows that end there, and where the last one ends."""
    starts = np.searchsorted(ends, ends[-1] * np.arange(tasks + 1) // tasks, side="right")
    return starts.tolist()  # type: ignore[no-any-return]


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
