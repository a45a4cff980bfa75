"""`kernels.Plan` on a CPU, in one compiled pass per pair of dtypes, where numba is installed: pip install 'dist-ema[cpu]'.

torch has no CPU kernel that reads bfloat16 and moves fp32, or one that rounds stochastically, so eager code goes over the
same elements two to twenty times. A pass here reads live once and each shadow once. A table, built once, says where:

    rows    int64 [rows, 6 + averages]   live, length, number of its key, number of its first element (low, high), step
                                         from one to the next, address of each shadow; at most CHUNK elements
    tasks   int64 [tasks + 1]            first row of each task: CHUNK elements in small models, up to TASK in large ones

[Note: the team]  The pass runs on the threads that torch's own kernels use: one call of OpenMP's GOMP_parallel with
torch.get_num_threads() threads, so an update that follows a matrix product finds them awake, and the bound of a host thread
holds. They draw tasks from one counter, and who moves an element does not change its bits. Where no OpenMP runtime is found
under that name, threads of Python's do the same.

[Note: no cache]  Compiling takes about a second per process and a tenth per further pair of dtypes, when a plan is made.
numba could keep the result on disk, as a pickle, which this library does not read.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "LIVE", "SHADOW", "Pass", "Piece", "available", "ramps", "ready"]

CHUNK = 1 << 16  # elements in one row: live stays in the cache between averages
TASK = 1 << 20  # elements: a thread that goes on where it was keeps the memory's prefetching going
LIVE = (torch.float32, torch.bfloat16, torch.float16)
SHADOW = (torch.float32, torch.bfloat16)
FEW = 16  # elements; runs that are shorter than that on average are left to eager code


@cache
def available() -> bool:
    """numba is installed, works with this numpy, and is not switched off (NUMBA_DISABLE_JIT=1)."""
    try:
        import numba
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT


@cache
def ready(live: torch.dtype, shadow: torch.dtype) -> bool:
    """There is a pass for this pair of dtypes. *Cost*: compiles it, once per process."""
    if live not in LIVE or shadow not in SHADOW or not available():
        return False
    try:
        _compile(live, shadow)
    except Exception as error:  # a numba that does not know what is said below
        warnings.warn(
            f"numba cannot compile the update of {shadow} averages of {live} weights, eager torch takes over: {error}",
            stacklevel=2,
        )
        return False
    return True


@dataclass
class Piece:
    """Shadows and live elements that lie end to end. Of compact ones also the weight's name and its element numbers, in
    runs of (length, first number, step) that do not cross a multiple of 2^32."""

    shadows: list[Tensor]
    live: Tensor
    name: str = ""
    runs: list[tuple[int, int, int]] = field(default_factory=list)

    def rows(self, key: int) -> Iterator[list[int]]:
        """As `_sweep` reads them."""
        tensors, at = [self.live, *self.shadows], 0
        for length, first, step in self.runs or [(len(self.live), 0, 0)]:
            for start in range(0, length, CHUNK):
                number = first + start * step
                live, *shadows = (t.data_ptr() + (at + start) * t.element_size() for t in tensors)
                yield [
                    live,
                    min(CHUNK, length - start),
                    key,
                    number & 0xFFFFFFFF,
                    number >> 32,
                    step,
                    *shadows,
                ]
            at += length


def ramps(
    numbers: Callable[[int, int], Tensor], n: int, huge: bool
) -> list[tuple[int, int, int]] | None:
    """Element numbers as the runs of a `Piece`; None if they are too short. numbers: (start, stop) -> int64 [stop - start].

    *Cost*: what one eager update spends on element numbers.
    """
    runs: list[tuple[int, int, int]] = []
    for start in range(0, n, 1 << 18):
        found = numbers(start, min(start + (1 << 18), n)).numpy()
        steps = np.diff(found)
        step = int(np.median(steps[:257])) if len(steps) else 0
        breaks = steps != step
        if huge:
            breaks |= np.diff(found >> 32) != 0
        ends = np.append(np.flatnonzero(breaks) + 1, len(found))
        if len(ends) > 1 + len(found) // FEW:
            return None
        starts = np.append(0, ends[:-1])
        runs += [(int(b - a), int(found[a]), step) for a, b in zip(starts, ends, strict=True)]
    return runs


class Pass:
    """One compiled pass over pieces of one pair of dtypes.

    *Aliases*: the table holds addresses, so the pass keeps the tensors. *Cost*: 56 bytes per piece and per 64 K elements;
    compiles when it is made ([Note: no cache]).
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = list(pieces)
        first = self._pieces[0]
        self._names = [piece.name.encode() for piece in pieces] if first.name else []
        self._rows = np.array(
            [row for k, piece in enumerate(pieces) for row in piece.rows(k if piece.name else 0)],
            dtype=np.int64,
        )
        self._tasks = _cut(self._rows[:, 1])
        self._keys = np.zeros(max(1, len(self._names)), dtype=np.uint32)
        self._weights = torch.zeros(len(first.shadows), dtype=torch.float32)
        self._places = self._weights.unbind()
        tables = [
            self._tasks.ctypes.data,
            self._rows.ctypes.data,
            self._weights.data_ptr(),
            self._keys.ctypes.data,
        ]
        # As `_sweep` reads it: next task, tasks, guard, words in a row, averages, and where the rest is.
        counts = [0, len(self._tasks) - 1, 0, self._rows.shape[1], len(first.shadows)]
        self._job = np.array([*counts, *tables], dtype=np.int64)
        self._sweep = _compile(first.live.dtype, first.shadows[0].dtype)
        self._written = list({id(base): base for base in map(_base, self._shadows())}.values())

    def _shadows(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            yield from piece.shadows

    @property
    def nbytes(self) -> int:
        """Of the tables."""
        return int(
            self._rows.nbytes
            + self._tasks.nbytes
            + self._keys.nbytes
            + self._job.nbytes
            + self._weights.nbytes
        )

    def run(self, weights: Sequence[float | Tensor], head: str, guard: bool) -> None:
        """Move every shadow towards live. weights: as `Plan.run` takes them. head: what comes before a name in the key."""
        for place, weight in zip(self._places, weights, strict=True):
            place.copy_(weight) if isinstance(weight, Tensor) else place.fill_(weight)
        if self._names:
            before = crc32(head.encode())
            self._keys[:] = [crc32(name, before) for name in self._names]
        # NOTE: autograd learns from these counters that a saved tensor was overwritten; torch's kernels move them.
        torch.autograd.graph.increment_version(self._written)
        self._job[0], self._job[2] = 0, guard
        _team(self._sweep, self._job.ctypes.data, min(torch.get_num_threads(), int(self._job[1])))


def _cut(lengths: Any) -> Any:
    """Where tasks begin in rows of these lengths, and where the last one ends. int64 [tasks + 1]

    64 of them, or more of TASK elements: enough for every thread to get as much as the others.
    """
    ends = np.cumsum(lengths)
    number = (ends - 1) // min(
        max(CHUNK, ends[-1] // 64), TASK
    )  # the task that a row's last element would fall into
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return np.append(starts, len(lengths)).astype(np.int64)


def _base(tensor: Tensor) -> Tensor:
    """The tensor whose version counter is that of `tensor`."""
    return tensor if tensor._base is None else tensor._base


# --- [Note: the team] --------------------------------------------------------------------------------------------


def _team(sweep: Any, job: int, threads: int) -> None:
    """Call sweep(job) on every one of `threads` threads, and wait for all. The interpreter is free meanwhile."""
    parallel = _openmp()
    if threads <= 1:
        sweep.ctypes(job)
    elif parallel is not None:
        parallel(sweep.address, job, threads, 0)
    else:
        others = [threading.Thread(target=sweep.ctypes, args=(job,)) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        sweep.ctypes(job)
        for thread in others:
            thread.join()


@cache
def _openmp() -> Any:
    """GOMP_parallel of the runtime that torch has loaded, None if there is none: (function, argument, threads, flags)."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes, parallel.restype = (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint],
        None,
    )
    return parallel


# --- the pass: compiled by numba, in whose language the innermost functions are written ---------------------------


@cache
def _compile(live: torch.dtype, shadow: torch.dtype) -> Any:
    """The pass for one pair of dtypes: `ctypes` and `address` of a C function that takes the address of a job."""
    import numba

    reads, array = _reads(), _arrays()
    write = (
        _write_bfloat16(array["uint16"])
        if shadow == torch.bfloat16
        else _write_float32(array["float32"])
    )
    segment = _segment(reads[live], reads[shadow], write)
    return numba.cfunc("void(intp)")(_sweep(array, segment))


def _jit(function: Any) -> Any:
    import numba

    return numba.njit(error_model="numpy", no_cpython_wrapper=True)(function)


def _instruction(signature: Any, emit: Callable[..., Any]) -> Any:
    """A function for compiled code that is a few instructions: emit(builder, type of the result, *arguments)."""
    from numba.extending import intrinsic

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        return emit(builder, context.get_value_type(signature.return_type), *values)

    def one(context: Any, x: Any) -> Any:
        return signature, generate

    def three(context: Any, x: Any, y: Any, z: Any) -> Any:
        return signature, generate

    return intrinsic(one if len(signature.args) == 1 else three)


@cache
def _arrays() -> dict[str, Any]:
    """By dtype: what lies at an address, to be indexed."""
    from numba import types

    kinds = {name: getattr(types, name) for name in ("float32", "int64", "uint16", "uint32")}
    return {
        name: _instruction(
            types.CPointer(kind)(types.intp), lambda builder, kind, x: builder.inttoptr(x, kind)
        )
        for name, kind in kinds.items()
    }


@cache
def _reads() -> dict[torch.dtype, Any]:
    """By dtype: element i at an address, as fp32."""
    from llvmlite import ir
    from numba import float32, uint16, uint32

    floats, halves = _arrays()["float32"], _arrays()["uint16"]
    cast = _instruction(float32(uint32), lambda builder, kind, x: builder.bitcast(x, kind))
    widen = _instruction(
        float32(uint16),
        lambda builder, kind, x: builder.fpext(builder.bitcast(x, ir.HalfType()), kind),
    )

    def single(address: Any, i: Any) -> Any:
        return floats(address)[i]

    def brain(address: Any, i: Any) -> Any:
        return cast(uint32(uint32(halves(address)[i]) << 16))

    def half(address: Any, i: Any) -> Any:
        return widen(halves(address)[i])

    return {torch.float32: _jit(single), torch.bfloat16: _jit(brain), torch.float16: _jit(half)}


def _write_float32(floats: Any) -> Any:
    def write(address: Any, i: Any, value: Any, number: Any, seed: Any, key: Any) -> Any:
        floats(address)[i] = value

    return _jit(write)


def _write_bfloat16(halves: Any) -> Any:
    """[Note: rounding] in kernels. number: of the element, its lower 32 bits; seed: the key and the upper ones."""
    from numba import float32, uint16, uint32

    bits = _instruction(uint32(float32), lambda builder, kind, x: builder.bitcast(x, kind))

    def mix(x: Any) -> Any:
        x = uint32(uint32(x ^ x >> 16) * 0x7FEB352D)
        x = uint32(uint32(x ^ x >> 15) * 0x46CA68B5)
        return uint32(x ^ x >> 16)

    mix = _jit(mix)

    def write(address: Any, i: Any, value: Any, number: Any, seed: Any, key: Any) -> Any:
        noise = mix(uint32(mix(uint32(number ^ seed)) ^ key >> 7))
        exact = bits(value)
        # The sum would carry nan into zero; of inf it touches nothing that is kept.
        nan = uint32(exact & 0x7FFFFFFF) > 0x7F800000
        halves(address)[i] = (
            uint16(0x7FC0) if nan else uint16(uint32(exact + uint32(noise >> 16)) >> 16)
        )

    return _jit(write)


def _segment(read: Any, widen: Any, write: Any) -> Any:
    """Move n elements of one shadow, with the bits of torch.lerp: a fused multiply-add from the nearer end."""
    from numba import float32, uint32

    fma = _instruction(
        float32(float32, float32, float32), lambda builder, _, *x: _narrow(builder).fma(*x)
    )
    infinite = np.float32(np.inf)

    def move(
        live: Any,
        shadow: Any,
        n: Any,
        weight: Any,
        guard: Any,
        key: Any,
        low: Any,
        high: Any,
        step: Any,
    ) -> Any:
        near = abs(weight) < 0.5
        scale = weight if near else float32(weight - 1)
        seed = uint32(key ^ uint32(high * 0x9E3779B1))
        for i in range(n):
            old, new = widen(shadow, i), read(live, i)
            if guard and not abs(new) < infinite:
                new = old
            moved = fma(scale, new - old, old if near else new)
            write(shadow, i, moved, uint32(low + i * step), seed, key)

    return _jit(move)


def _narrow(builder: Any) -> Any:
    """[Note: vectors]  At most 256 bits: memory is the limit, and one core alone gets 9 % less of it through wider ones.

    NOTE: the list of attributes that llvmlite's `add` accepts lacks this one.
    """
    set.add(builder.function.attributes, '"prefer-vector-width"="256"')
    return builder


def _sweep(array: dict[str, Any], move: Any) -> Any:
    """Draw tasks until there are none: what every thread of a team does."""
    from llvmlite import ir
    from numba import int64, intp

    words, floats, keys = array["int64"], array["float32"], array["uint32"]
    step = ir.Constant(ir.IntType(64), 1)
    pointer = ir.IntType(64).as_pointer()
    draw = _instruction(
        int64(intp),
        lambda builder, _, x: builder.atomic_rmw(
            "add", builder.inttoptr(x, pointer), step, "monotonic"
        ),
    )

    def sweep(address: Any) -> Any:
        job = words(address)
        many, guard, width, averages = job[1], job[2] != 0, job[3], job[4]
        tasks, rows, weights = words(job[5]), job[6], floats(job[7])
        while True:
            task = draw(address)
            if task >= many:
                break
            for number in range(tasks[task], tasks[task + 1]):
                row = words(rows + 8 * width * number)
                key = keys(job[8])[row[2]]
                for k in range(averages):
                    move(row[0], row[6 + k], row[1], weights[k], guard, key, row[3], row[4], row[5])

    return sweep
