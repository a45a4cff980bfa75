"""Elements by their bits, against torch's casts and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_ema.dtypes import FLOATS, finite, fitted, narrow, widen

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_widen(dtype: str) -> None:
    """Every pattern of 8 and 16 bits, random patterns of the others: torch's own values, NaN where
    it has NaN.
    """
    bits = np.random.default_rng(0).integers(0, 256, 1 << 17, dtype=np.uint8)
    if DTYPES[dtype].itemsize <= 2:
        bits = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    theirs = torch.from_numpy(bits).view(DTYPES[dtype])
    wide = torch.float64 if dtype == "F64" else torch.float32
    assert np.array_equal(widen(bits, dtype), theirs.to(wide).numpy(), equal_nan=True)
    # float8 in torch has no isfinite
    assert finite(bits, dtype) == int(theirs.to(wide).isfinite().sum())


def test_widen_unaligned() -> None:
    """Files of other writers may be packed at any byte."""
    values = torch.randn(100)
    packed = np.concatenate([np.zeros(3, np.uint8), raw(values)])
    assert np.array_equal(widen(packed[3:], "F32"), values.numpy())


@pytest.mark.parametrize("dtype", FLOATS)
def test_narrow_from_float32(dtype: str) -> None:
    """float32 is rounded as torch rounds: ties, overflow, subnormal numbers, infinities and signed
    zeros.
    """
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
    every_code = widen(np.arange(1 << 16, dtype=np.uint16).view(np.uint8), "F16")
    codes = np.unique(
        widen(np.arange(256, dtype=np.uint8), "F8_E5M2" if dtype == "F8_E5M2" else "F8_E4M3")
    )
    middles = (codes[1:] + codes[:-1]) / 2
    edges = np.array(
        [0.0, -0.0, np.inf, -np.inf, 448, 464, 465, 57344, 61440, 65504, 65520, 3.4e38], np.float32
    )
    values = np.concatenate([bits.view(np.float32), every_code, middles.astype(np.float32), edges])
    # NOTE: beyond its largest value torch's E4M3 saturates, older versions gave NaN.
    values = values[~np.isnan(values) & ((dtype != "F8_E4M3") | (np.abs(values) <= 464))]
    assert np.array_equal(narrow(values, dtype), raw(torch.from_numpy(values).to(DTYPES[dtype])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_stays(dtype: str) -> None:
    assert np.isnan(widen(narrow(np.array([np.nan, 1.0]), dtype), dtype)).tolist() == [True, False]


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 7), ("F8_E4M3", 3), ("F8_E5M2", 2)])
def test_float64_is_rounded_once(dtype: str, bits: int) -> None:
    """A value 2^-40 beside the middle of two numbers is no tie; rounded to float32 first, it would
    be one.
    """
    middle = 1 + 2.0 ** -(bits + 1)
    above, below = middle + 2.0**-40, middle - 2.0**-40
    values = np.array([above, below, -above, -below, middle])
    upper = 1 + 2.0**-bits
    assert widen(narrow(values, dtype), dtype).tolist() == [upper, 1.0, -upper, -1.0, 1.0]
    assert np.array_equal(
        narrow(np.array([1e300, -1e300]), dtype), narrow(np.array([np.inf, -np.inf]), dtype)
    )


def test_too_large() -> None:
    values = np.array([1e9, -np.inf, 465])
    assert widen(narrow(values, "F8_E4M3"), "F8_E4M3").tolist() == [448, -448, 448]
    assert widen(narrow(values, "F8_E5M2"), "F8_E5M2").tolist() == [np.inf, -np.inf, 448]


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_fitted(dtype: str) -> None:
    """A cast that leaves a dtype is refused in any place of a long row; inf and NaN are none."""
    largest = float(torch.finfo(DTYPES[dtype]).max)
    values = np.tile([1.0, largest, -largest, np.nan, 1e-300], 999)
    assert np.array_equal(fitted("w", values, dtype), narrow(values, dtype))
    if dtype != "F8_E4M3":  # it has no infinity, and takes the largest number
        values[7] = -np.inf
        assert np.array_equal(fitted("w", values, dtype), narrow(values, dtype))
        values[-1] = largest * 1.1
        with pytest.raises(ValueError, match=f"w holds values that are too large for {dtype}"):
            fitted("w", values, dtype)


def test_finite_is_for_floats() -> None:
    assert finite(np.array([1, np.nan, 2, 3], np.float32).view(np.uint8), "C64") == 1
    with pytest.raises(ValueError, match="floating"):
        finite(np.zeros(4, np.uint8), "I32")
