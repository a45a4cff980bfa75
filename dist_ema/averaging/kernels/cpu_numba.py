"""The code of a compiled pass. Imports numba, so `cpu_plan` imports it when a plan needs one.

Functions are compiled: `x` and the like are scalars, tables are C pointers, and 16-bit floats are
read and written by their bits. `contract` lets the compiler fuse the product and the sum of a move
into one multiply-add, as torch's lerp does; `eager.passes_same_bits` checks that it did.

[Note: narrow vectors]  Memory is the limit, and a core gets less of it through 512-bit vectors. On
one thread of an AMD EPYC an update of 124 M fp32 weights took 1.40 times torch's `add_` with them,
and 1.21 times with 256 bits. numba has no option for it, hence the one intrinsic here.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from .cpu_threads import find_openmp

__all__ = [
    "compile_pass",
    "draw",
    "is_disabled",
    "mix",
    "prefer_narrow_vectors",
    "read_bfloat16",
    "read_float16",
    "read_float32",
    "round_bfloat16",
]

# Python calls none of them, and a wrapper for that takes a fifth of the compiling.
jit = numba.njit(
    error_model="numpy", fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True
)
INFINITE = np.float32(np.inf)
STEP = np.float32(2.0**-24)  # of float16 below 2^-14


def is_disabled() -> bool:
    """NUMBA_DISABLE_JIT=1 is set."""
    return bool(numba.config.DISABLE_JIT)


@intrinsic
def prefer_narrow_vectors(typing_context: Any) -> Any:
    """[Note: narrow vectors] for the function that calls it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # NOTE: the set of attributes accepts only names that llvmlite lists, and lacks this one.
        set.add(builder.function.attributes, '"prefer-vector-width"="256"')
        return context.get_dummy_value()

    return types.void(), emit


@jit
def read_float32(source: Any, i: int) -> Any:
    return source[i]


@jit
def read_bfloat16(source: Any, i: int) -> Any:
    return np.uint32(np.uint32(source[i]) << 16).view(np.float32)


@jit
def read_float16(source: Any, i: int) -> Any:
    bits = np.uint32(source[i])
    exponent, magnitude = bits & 0x7C00, bits & 0x7FFF
    if exponent == 0:  # subnormal
        wide = np.float32(np.float32(magnitude) * STEP).view(np.uint32)
    else:
        # The bias of the exponent is 112 more in float32; infinite and nan have the largest.
        wide = np.uint32((magnitude << 13) + (0x38000000 if exponent < 0x7C00 else 0x70000000))
    return np.uint32(wide | (bits & 0x8000) << 16).view(np.float32)


@jit
def mix(x: Any) -> Any:
    x = np.uint32(np.uint32(x ^ x >> 16) * 0x7FEB352D)
    x = np.uint32(np.uint32(x ^ x >> 15) * 0x46CA68B5)
    return np.uint32(x ^ x >> 16)


@jit
def draw(pair: Any, seed: Any, key: Any) -> Any:
    """[Note: rounding] in rounding. seed: the key and the upper bits of the pair's number."""
    return mix(np.uint32(mix(np.uint32(pair ^ seed)) ^ key >> 7))


@jit
def round_bfloat16(value: Any, noise: Any) -> Any:
    """noise: 16 bits"""
    exact = np.float32(value).view(np.uint32)
    # The sum would carry nan into zero; of inf it touches nothing that is kept.
    nan = np.uint32(exact & 0x7FFFFFFF) > 0x7F800000
    return np.uint16(0x7FC0) if nan else np.uint16(np.uint32(exact + noise) >> 16)


READ = {torch.float32: read_float32, torch.bfloat16: read_bfloat16, torch.float16: read_float16}


def compile_pass(live: torch.dtype, shadow: torch.dtype) -> Any:
    """Compile the pass for one pair of dtypes.

    Returns:
        A C function of a job. It moves tasks until the loop of an OpenMP runtime has none left
        ([Note: threads] in cpu_threads); without one, the tasks from `first` to `last`.
    """
    move_row = _compile_move(live, shadow)

    @jit
    def move_tasks(job: Any, first: int, last: int) -> None:
        prefer_narrow_vectors()
        rows, lives, shadows, weights, keys, starts, averages, guard = job[0]
        for row in range(starts[first], starts[last]):
            n, key, low, high, step = (
                rows[5 * row],
                keys[rows[5 * row + 1]],
                rows[5 * row + 2],
                rows[5 * row + 3],
                rows[5 * row + 4],
            )
            for k in range(averages):
                target = shadows[row * averages + k]
                move_row(lives[row], target, n, weights[k], guard != 0, key, low, high, step)

    # The struct of a job, as `cpu_plan.Pass` fills it: 8 bytes each.
    pointers = [types.int64, _pointer(live), _pointer(shadow), types.float32, types.uint32]
    tables = [types.CPointer(kind) for kind in (*pointers, types.int64)]
    job_type = types.CPointer(types.Tuple([*tables, types.int64, types.int64]))
    openmp = find_openmp()
    if openmp is None:
        return numba.cfunc(types.void(job_type, types.int64, types.int64))(move_tasks.py_func)
    next_iterations, end_loop = openmp.next_iterations, openmp.end_loop

    def draw_tasks(job: Any) -> None:
        bounds = np.empty(2, np.int64)
        while next_iterations(bounds.ctypes, bounds[1:].ctypes):
            move_tasks(job, bounds[0], bounds[1])
        end_loop()

    return numba.cfunc(types.void(job_type))(draw_tasks)


def _pointer(dtype: torch.dtype) -> Any:
    return types.CPointer(types.float32 if dtype == torch.float32 else types.uint16)


def _compile_move(live: torch.dtype, shadow: torch.dtype) -> Any:
    """Compile the move of n elements of one row."""
    read, widen = READ[live], READ[shadow]

    @jit
    def lerp(live: Any, shadow: Any, i: int, weight: Any, guard: bool) -> Any:
        """Interpolate as torch.lerp does, from the nearer end."""
        near = abs(weight) < np.float32(0.5)
        scale = weight if near else weight - np.float32(1)
        old, new = widen(shadow, i), read(live, i)
        if guard and not abs(new) < INFINITE:
            new = old
        return scale * (new - old) + (old if near else new)

    @jit
    def move(
        live: Any, shadow: Any, n: int, weight: Any, guard: bool,
        key: Any, low: int, high: int, step: int,
    ) -> None:  # fmt: skip
        prefer_narrow_vectors()
        for i in range(n):
            shadow[i] = lerp(live, shadow, i, weight, guard)

    @jit
    def move_and_round(
        live: Any, shadow: Any, n: int, weight: Any, guard: bool,
        key: Any, low: int, high: int, step: int,
    ) -> None:  # fmt: skip
        """low, high: the words of the first number; step: to the next one."""
        prefer_narrow_vectors()
        # The number of a pair is that of its even element, halved; this is its upper word.
        seed = np.uint32(key ^ np.uint32((high >> 1) * 0x9E3779B1) ^ np.uint32(high << 31))
        begin = min(n, low & 1) if step == 1 else n
        end = n - (n - begin) % 2
        for i in range(begin, end, 2):
            word = draw(np.uint32((low + i) >> 1), seed, key)
            shadow[i] = round_bfloat16(lerp(live, shadow, i, weight, guard), word & 0xFFFF)
            shadow[i + 1] = round_bfloat16(lerp(live, shadow, i + 1, weight, guard), word >> 16)
        for first, last in ((0, begin), (end, n)):
            for i in range(first, last):
                number = low + i * step
                word = draw(np.uint32(number >> 1), seed, key) >> np.uint32(16 * (number & 1))
                shadow[i] = round_bfloat16(lerp(live, shadow, i, weight, guard), word & 0xFFFF)

    return move if shadow == torch.float32 else move_and_round
