"""The code of a compiled pass. Imports numba, so `cpu_plan` imports it when a plan needs one.

Functions here are compiled: `x` and the like are scalars, tables are C pointers, and 16-bit floats
are read and written by their bits. `contract` lets the compiler fuse the product and the sum of a
move into one multiply-add, as torch's lerp does; `eager.passes_same_bits` checks that it did.

[Note: narrow vectors]  Memory is the limit, and a core gets less of it through 512-bit vectors. An
update of 124 M fp32 weights took 1.40 times torch's `add_` with them and 1.21 times with 256 bits
on one thread of an AMD EPYC. numba has no option for it, hence the one intrinsic here.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

__all__ = [
    "compile_pass",
    "is_disabled",
    "mix",
    "prefer_narrow_vectors",
    "read_bfloat16",
    "read_float16",
    "read_float32",
    "write_bfloat16",
    "write_float32",
]

jit = numba.njit(error_model="numpy", fastmath={"contract"})
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
    exponent, rest = bits & 0x7C00, bits & 0x7FFF
    if exponent == 0:  # subnormal
        wide = np.float32(np.float32(rest) * STEP).view(np.uint32)
    else:
        # The bias of the exponent is 112 more in float32; infinite and nan have the largest.
        wide = np.uint32((rest << 13) + (0x38000000 if exponent < 0x7C00 else 0x70000000))
    return np.uint32(wide | (bits & 0x8000) << 16).view(np.float32)


@jit
def write_float32(target: Any, i: int, value: Any, number: Any, seed: Any, key: Any) -> None:
    target[i] = value


@jit
def mix(x: Any) -> Any:
    x = np.uint32(np.uint32(x ^ x >> 16) * 0x7FEB352D)
    x = np.uint32(np.uint32(x ^ x >> 15) * 0x46CA68B5)
    return np.uint32(x ^ x >> 16)


@jit
def write_bfloat16(target: Any, i: int, value: Any, number: Any, seed: Any, key: Any) -> None:
    """[Note: rounding] in rounding. seed: the key and the upper bits of the element's number."""
    noise = mix(np.uint32(mix(np.uint32(number ^ seed)) ^ key >> 7))
    exact = np.float32(value).view(np.uint32)
    # The sum would carry nan into zero; of inf it touches nothing that is kept.
    nan = np.uint32(exact & 0x7FFFFFFF) > 0x7F800000
    rounded = np.uint32(exact + np.uint32(noise >> 16)) >> 16
    target[i] = np.uint16(0x7FC0) if nan else np.uint16(rounded)


READ = {torch.float32: read_float32, torch.bfloat16: read_bfloat16, torch.float16: read_float16}
WRITE = {torch.float32: write_float32, torch.bfloat16: write_bfloat16}


def compile_pass(live: torch.dtype, shadow: torch.dtype) -> Any:
    """Compile the pass for one pair of dtypes.

    Returns:
        A C function that moves the rows from `first` to `last` ([Note: threads] in cpu_plan);
        `ctypes` calls it.
    """
    read, widen, write = READ[live], READ[shadow], WRITE[shadow]

    @jit
    def move(
        live: Any, shadow: Any, n: int, weight: Any, guard: bool,
        key: Any, low: int, high: int, step: int,
    ) -> None:  # fmt: skip
        """Move n elements as torch.lerp does: from the nearer end."""
        prefer_narrow_vectors()
        near = abs(weight) < np.float32(0.5)
        scale = weight if near else weight - np.float32(1)
        seed = np.uint32(key ^ np.uint32(high * 0x9E3779B1))
        for i in range(n):
            old, new = widen(shadow, i), read(live, i)
            if guard and not abs(new) < INFINITE:
                new = old
            moved = scale * (new - old) + (old if near else new)
            write(shadow, i, moved, np.uint32(low + i * step), seed, key)

    def sweep(
        rows: Any, lives: Any, shadows: Any, weights: Any, keys: Any,
        first: int, last: int, averages: int, guard: int,
    ) -> None:  # fmt: skip
        prefer_narrow_vectors()
        for row in range(first, last):
            n, key, low, high, step = (
                rows[5 * row],
                keys[rows[5 * row + 1]],
                rows[5 * row + 2],
                rows[5 * row + 3],
                rows[5 * row + 4],
            )
            for k in range(averages):
                target = shadows[row * averages + k]
                move(lives[row], target, n, weights[k], guard != 0, key, low, high, step)

    pointers = [types.int64, _pointer(live), _pointer(shadow), types.float32, types.uint32]
    tables = [types.CPointer(kind) for kind in pointers]
    return numba.cfunc(types.void(*tables, *[types.int64] * 4))(sweep)


def _pointer(dtype: torch.dtype) -> Any:
    return types.CPointer(types.float32 if dtype == torch.float32 else types.uint16)
