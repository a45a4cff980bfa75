"""Elements of safetensors dtypes as numpy sees them: raw bytes to float and back. No torch.

numpy has no bfloat16 and no float8, so these go by their bits. Rounding is to nearest, ties to even, as torch casts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOATS",
    "TORCH",
    "TO_TORCH",
    "Bytes",
    "Floats",
    "finite",
    "fitted",
    "gathered",
    "narrow",
    "widen",
]

Bytes: TypeAlias = "NDArray[np.uint8]"  # 1D
Floats: TypeAlias = "NDArray[Any]"  # 1D, float32 or float64

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TORCH = {  # torch's names -> those of safetensors
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
TO_TORCH = {kind: name for name, kind in TORCH.items()}
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_BITS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}  # exponent, mantissa


def widen(raw: Bytes, dtype: str) -> Floats:
    """The values of a floating dtype: float64 from F64, float32 from all others. *Aliases* raw where nothing changes."""
    if dtype == "BF16":
        return (_view(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in _BITS:
        return _eight_bits(dtype)[raw]
    values = _view(raw, _PLAIN[dtype])
    return values if dtype in ("F64", "F32") else values.astype(np.float32)


def narrow(values: Floats, dtype: str) -> Bytes:
    """float32 or float64 values as the bytes of a floating dtype, rounded once, to nearest even."""
    if dtype == "BF16":
        return _bfloat16(values).view(np.uint8)
    if dtype in _BITS:
        return _to_eight_bits(values, dtype)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(_PLAIN[dtype], copy=False)).view(np.uint8)


def fitted(name: str, values: Floats, dtype: str) -> Bytes:
    """As `narrow`. Raises ValueError where a finite value of the weight `name` would become infinite or NaN."""
    raw = narrow(values, dtype)
    if finite(raw, dtype) != int(np.isfinite(values).sum()):
        raise ValueError(
            f"{name} holds values that are too large for {dtype}. Choose another dtype."
        )
    return raw


def finite(raw: Bytes, dtype: str) -> int:
    """How many elements are finite. Integers and booleans all are; of complex numbers both parts must be."""
    if dtype == "C64":
        return int(np.isfinite(_view(raw, np.float32)).reshape(-1, 2).all(axis=1).sum())
    if dtype not in FLOATS:
        raise ValueError(f"finite() is asked of floating dtypes, got {dtype}.")
    return int(np.isfinite(widen(raw, dtype)).sum())


def gathered(
    storage: Bytes,
    first: int,
    shape: Sequence[int],
    strides: Sequence[int],
    size: int,
    begin: int,
    end: int,
) -> Bytes:
    """Bytes [begin, end) in row-major order of a tensor whose elements of `size` bytes lie in any order in a storage.

    first and strides are in elements. *Cost*: these bytes.
    """
    there = np.ndarray(
        tuple(shape), f"V{size}", storage, first * size, [stride * size for stride in strides]
    )
    return np.ascontiguousarray(there.flat[begin // size : -(-end // size)]).view(np.uint8)[
        begin % size :
    ][: end - begin]


def _view(raw: Bytes, dtype: Any) -> Floats:
    # NOTE: files of other writers may be packed at any byte, and a view needs alignment.
    aligned = raw if raw.ctypes.data % np.dtype(dtype).itemsize == 0 else raw.copy()
    return aligned.view(dtype)


def _bfloat16(values: Floats) -> NDArray[np.uint16]:
    """NOTE: float64 goes through float32 rounded to odd, else a value would be rounded twice."""
    with np.errstate(over="ignore", invalid="ignore"):
        short = np.ascontiguousarray(values, dtype=np.float32)
    bits = short.view(np.uint32)
    if values.dtype == np.float64:
        bits = bits.copy()
        away = np.abs(short.astype(np.float64)) > np.abs(values)
        inexact = short.astype(np.float64) != values
        bits[away & inexact] -= 1  # towards zero: the bits of a float are ordered by magnitude
        bits[inexact] |= 1
    nearest: NDArray[np.uint16] = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(
        np.uint16
    )
    nearest[np.isnan(short)] = 0x7FC0
    return nearest


@lru_cache(maxsize=2)
def _eight_bits(dtype: str) -> NDArray[np.float32]:
    """The values of all 256 codes. E4M3 ("fn") has no infinity, and one NaN per sign."""
    exponent_bits, mantissa_bits = _BITS[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.where(
        exponent == 0, np.ldexp(mantissa, 1 - bias), np.ldexp(1 + mantissa, exponent - bias)
    )
    if dtype == "F8_E5M2":
        values = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values = np.where((codes & 0x7F) == 0x7F, np.nan, values)
    return np.where(codes < 128, values, -values).astype(np.float32)


def _to_eight_bits(values: Floats, dtype: str) -> Bytes:
    """The nearest code, ties to the even one. What is too large becomes infinity, or 448 where there is none (E4M3)."""
    table = _eight_bits(dtype)[:128].astype(np.float64)
    known = table[np.isfinite(table)]
    magnitude = np.abs(values.astype(np.float64))
    middles = (known[1:] + known[:-1]) / 2
    low = np.searchsorted(middles, magnitude, side="left")  # a tie stays below...
    tie = (low < len(middles)) & (magnitude == middles[np.minimum(low, len(middles) - 1)])
    code = np.where(tie & (low % 2 == 1), low + 1, low)  # ...unless the one below is odd
    if dtype == "F8_E5M2":
        code = np.where(magnitude >= known[-1] + (known[-1] - known[-2]) / 2, 0x7C, code)
    code = np.where(np.isnan(values), 0x7F, code)
    return (code + np.where(np.signbit(values), 128, 0)).astype(np.uint8)
