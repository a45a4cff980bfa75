"""The dtypes of safetensors: their names elsewhere, their elements in numpy, casts. No torch.

Rounding is to nearest, ties to even, as torch casts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FLOATS",
    "NUMPY",
    "TORCH",
    "TO_TORCH",
    "Bytes",
    "Floats",
    "cast",
    "finite",
    "fitted",
    "float_dtype",
    "gathered",
    "narrow",
    "view",
    "widen",
]

Bytes: TypeAlias = "NDArray[np.uint8]"  # 1D
Floats: TypeAlias = "NDArray[Any]"  # 1D, float32 or float64

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
TORCH = {  # torch's names -> those of safetensors
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
TO_TORCH = {kind: name for name, kind in TORCH.items()}
NUMPY: dict[str, np.dtype[Any]] = {
    kind: np.dtype(getattr(ml_dtypes, name, name)) for name, kind in TORCH.items()
}
_LARGEST_E4M3 = 448.0
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}  # their bits, all of which infinity and NaN have


def widen(raw: Bytes, dtype: str) -> Floats:
    """Return the values of a floating dtype: float64 from F64, float32 from any other.

    Note:
        *Aliases* raw for F64 and F32.
    """
    return view(raw, dtype).astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def narrow(values: Floats, dtype: str) -> Bytes:
    """Return float32 or float64 values as bytes of a floating dtype, rounded once.

    A value that is too large becomes infinite; in E4M3, which has no infinity, the largest number,
    as in torch.
    """
    if values.dtype == np.float64 and dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
        values = _with_sticky_bit(values)
    if dtype == "F8_E4M3":
        values = values.clip(-_LARGEST_E4M3, _LARGEST_E4M3)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(NUMPY[dtype], copy=False)).view(np.uint8)


def fitted(name: str, values: Floats, dtype: str, out: Bytes | None = None) -> Bytes:
    """As `narrow`, for the weight `name`.

    Raises:
        ValueError: A finite value would become infinite or NaN.
    """
    out = np.empty(len(values) * NUMPY[dtype].itemsize, np.uint8) if out is None else out
    if dtype == "F32":
        # The processor says whether its cast overflowed. To look at the result takes as long again.
        with suppress(FloatingPointError), np.errstate(over="raise", invalid="ignore"):
            np.copyto(out.view(np.float32), values, casting="same_kind")
            return out
    else:
        out[:] = narrow(values, dtype)
        held = finite(out, dtype) if NUMPY[dtype].itemsize < values.itemsize else len(values)
        if held == len(values) or held == np.count_nonzero(np.isfinite(values)):
            return out
    raise ValueError(f"{name} holds values that are too large for {dtype}. Choose another dtype.")


def float_dtype(have: str, want: str | None) -> str:
    """The dtype of a weight that is written: floats alone are cast."""
    return want if want in FLOATS and have in FLOATS else have


def cast(name: str, raw: Bytes, was: str, now: str) -> Bytes:
    """The bytes of weight `name` in another floating dtype; raw itself where it is the same.

    Raises:
        ValueError: A finite value would become infinite or NaN.
    """
    return raw if was == now else fitted(name, widen(raw, was), now)


def finite(raw: Bytes, dtype: str) -> int:
    """Count the finite elements of a floating or complex dtype.

    Both parts of a complex number must be finite.
    """
    if dtype not in (*FLOATS, "C64"):
        raise ValueError(f"finite() counts elements of floating dtypes, got {dtype}.")
    values, exponent = view(raw, dtype), _EXPONENTS.get(dtype)
    if exponent is not None:  # ml_dtypes takes eight times as long, and holds the lock
        bits = values.view(f"u{values.itemsize}")
        return int(np.count_nonzero((bits & exponent) != exponent))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return int(np.count_nonzero(np.isfinite(values)))


def gathered(
    storage: Bytes,
    first: int,
    shape: Sequence[int],
    strides: Sequence[int],
    size: int,
    begin: int,
    end: int,
) -> Bytes:
    """Return bytes [begin, end), in row-major order, of a tensor whose elements lie in any order.

    Args:
        storage: The bytes that hold the elements.
        first: Where the first element lies, in elements.
        shape: The shape of the tensor.
        strides: In elements.
        size: The size of an element, in bytes.
        begin: In bytes.
        end: In bytes.
    """
    elements = np.ndarray(
        tuple(shape), f"V{size}", storage, first * size, [stride * size for stride in strides]
    )
    return np.ascontiguousarray(elements.flat[begin // size : -(-end // size)]).view(np.uint8)[
        begin % size :
    ][: end - begin]


def view(raw: Bytes, dtype: str) -> NDArray[Any]:
    """Return the elements of a dtype. *Aliases* raw, unless it is misaligned."""
    # NOTE: files of other writers may be packed at any byte, and arithmetic needs alignment.
    values = raw.view(NUMPY[dtype])
    return values if values.flags.aligned else raw.copy().view(NUMPY[dtype])


def _with_sticky_bit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 as float32 whose last bit says that something was cut off.

    ml_dtypes casts float64 through float32, which rounds twice: what float32 rounds to the middle
    of two bfloat16 is a tie for the second rounding. An odd last bit is never a tie.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        short = values.astype(np.float32)
    wanted, rounded = np.abs(values), np.abs(short).astype(np.float64)
    above, below = rounded > wanted, rounded < wanted  # neither, where it is NaN
    bits = short.view(np.uint32)
    bits -= above  # towards zero
    bits |= above | below
    return short
