"""The loop of `memory_watch` over tables of objects and addresses, compiled with numba.

It is imported for many weights only. It calls C functions of CPython's stable interface, and the
one of torch's that the code of torch.compile asks where a tensor lies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numba
from numba import types

__all__ = ["compile_loop"]

WORD = ctypes.c_uint64  # an address


def compile_loop(read: int) -> Callable[..., bool]:
    """Compile the question whether anything is another object or lies elsewhere.

    Args:
        read: The address of torch's C function, which takes a tensor as a Python object.

    Returns:
        A function of the addresses of three tables, and of four counts:

            objects    [rows, 3] a dictionary, a key, and the value that was there: weights, then
                       modules; after them [locals] further tensors
            addresses  [weights + locals] of the elements
            sizes      [closed, 2] a dictionary and its length
            counts     weights, rows, locals, closed

        Python objects are given by their `id`. Whoever calls it keeps them alive.

    Raises:
        ImportError: NUMBA_DISABLE_JIT=1 is set.
    """
    if numba.config.DISABLE_JIT:
        raise ImportError("NUMBA_DISABLE_JIT=1 is set")
    address_of = _function(read, 1)
    value_of = _function(ctypes.pythonapi.PyDict_GetItemWithError, 2)
    length_of = _function(ctypes.pythonapi.PyDict_Size, 1)

    def differs(
        objects: Any, addresses: Any, sizes: Any,
        weights: int, rows: int, locals_: int, closed: int,
    ) -> bool:  # fmt: skip
        for i in range(closed):
            if length_of(sizes[2 * i]) != sizes[2 * i + 1]:
                return True
        for i in range(rows):
            if value_of(objects[3 * i], objects[3 * i + 1]) != objects[3 * i + 2]:
                return True
        for i in range(weights):
            if address_of(objects[3 * i + 2]) != addresses[i]:
                return True
        for i in range(locals_):
            if address_of(objects[3 * rows + i]) != addresses[weights + i]:
                return True
        return False

    table = types.CPointer(types.uint64)
    code = numba.cfunc(types.boolean(table, table, table, *[types.int64] * 4))(differs)
    # NOTE: this type of function keeps the interpreter's lock, so nothing is replaced meanwhile.
    call = ctypes.PYFUNCTYPE(ctypes.c_bool, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4)
    loop = call(code.address)
    loop.code = code  # type: ignore[attr-defined]  # which must live as long
    return loop


def _function(place: Any, arguments: int) -> Any:
    """A C function of so many words, as compiled code can call it."""
    return ctypes.cast(place, ctypes.CFUNCTYPE(WORD, *[WORD] * arguments))
