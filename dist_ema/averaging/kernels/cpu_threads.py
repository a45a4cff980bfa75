"""`run_on_threads`: the tasks of a compiled pass, drawn by threads of torch's own OpenMP runtime.

[Note: threads]  Threads draw tasks from one loop, and who moves an element does not change its
bits. They are those of the runtime that torch has loaded, and its loop, through its C interface.
They stay awake for some milliseconds after torch's last kernel, and threads of Python's have to
share the cores with them. None of them waits for the interpreter, which a training loop may hold
for 5 ms at a time. 124 M fp32 weights on two cores, after a kernel, in times of torch's `add_`:

    threads                                  alone           beside a busy Python thread
    torch's, one loop of the runtime         1.00            1.00
    torch's, tasks drawn in Python           1.01 to 1.04    3.1
    Python's                                 1.11 to 1.13

`numba.prange` is not used. It ends the process where one that used it has forked, or where two
threads run it at once on numba's own thread pool.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

__all__ = ["OpenMP", "find_openmp", "run_on_threads"]

PROCESS = os.getpid()


class OpenMP(NamedTuple):
    """A loop of the runtime whose iterations the threads of a team draw, as GCC would call it."""

    parallel_loop: Any  # (function, argument, threads, first, last, step, iterations, flags)
    next_iterations: Any  # (first, last): writes to where they point; whether there were any
    end_loop: Any  # by every thread


@cache
def find_openmp() -> OpenMP | None:
    """The runtime that torch has loaded, or None. LLVM's and Intel's have GCC's functions too."""
    runtime = ctypes.CDLL(None)
    try:
        openmp = OpenMP(
            runtime.GOMP_parallel_loop_dynamic,
            runtime.GOMP_loop_dynamic_next,
            runtime.GOMP_loop_end_nowait,
        )
    except AttributeError:
        return None
    pointer, number, count = ctypes.c_void_p, ctypes.c_long, ctypes.c_uint
    openmp.parallel_loop.argtypes = [pointer, pointer, count, *[number] * 4, count]
    openmp.next_iterations.argtypes, openmp.end_loop.argtypes = [pointer, pointer], []
    openmp.parallel_loop.restype = openmp.end_loop.restype = None
    openmp.next_iterations.restype = ctypes.c_bool
    return openmp


def run_on_threads(move: Any, job: int, tasks: int, threads: int) -> None:
    """Run all tasks of a job, and wait ([Note: threads]). The interpreter is free meanwhile.

    Args:
        move: From `cpu_numba.compile_pass`.
        job: The address of what it reads.
        tasks: How many the job has.
        threads: How many share them.
    """
    if openmp := find_openmp():
        if os.getpid() != PROCESS:
            threads = 1  # a forked process has only this one, and would wait for the others
        openmp.parallel_loop(move.address, job, threads, 0, tasks, 1, 1, 0)
        return
    shares = [tasks * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, last: move.ctypes(job, first, last), shares, shares[1:]))
