"""Stochastic rounding by a counter-based hash: the same bits on any world size and device."""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

__all__ = [
    "draw_bits",
    "key_prefix",
    "noise",
    "noise_key",
    "round_half_in_place",
    "round_in_place",
    "round_to_bfloat16",
    "upper_bits",
]


_MASK = 0xFFFFFFFF


# --- [Note: rounding] --------------------------------------------------------------------------------------------


def noise(seed: int, update: int, name: str, indices: Tensor) -> Tensor:
    """32 hash bits per element, int64 in [0, 2^32), the same wherever the element lies."""
    return draw_bits(noise_key(seed, update, name), indices, huge=True).to(torch.int64) & _MASK


@lru_cache(maxsize=4096)
def noise_key(seed: int, update: int, name: str) -> int:
    return crc32(f"{key_prefix(seed, update)}{name}".encode())


def key_prefix(seed: int, update: int) -> str:
    """What the keys of all names have in common."""
    return f"{seed}/{update}/"


def draw_bits(key: int, indices: Tensor, huge: bool) -> Tensor:
    """The bits of `noise` as int32: a quarter of the traffic of int64, and multiplication wraps the same."""
    if huge:
        indices = indices ^ (indices >> 32) * 0x9E3779B1
    x = indices.to(torch.int32).bitwise_xor_(_signed(key))
    spare = torch.empty_like(x)
    return _mix(_mix(x, spare).bitwise_xor_(_signed(key >> 7)), spare)


def _mix(x: Tensor, spare: Tensor) -> Tensor:
    """A bijection of 32 bits, in place, in which every input bit reaches every output bit."""
    x.bitwise_xor_(_shift(x, 16, spare)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift(x, 15, spare)).mul_(0x46CA68B5)
    return x.bitwise_xor_(_shift(x, 16, spare))


def _shift(x: Tensor, n: int, out: Tensor) -> Tensor:
    """To the right, filling with zeros: int32 shifts fill with the sign."""
    return torch.bitwise_right_shift(x, n, out=out).bitwise_and_((1 << 32 - n) - 1)


def _signed(word: int) -> int:
    return word - ((word & 1 << 31) << 1)


def upper_bits(bits: Tensor) -> Tensor:
    """The upper 16 hash bits, to be added below the cut. int32, in place."""
    return _shift(bits, 16, bits)


def round_to_bfloat16(wide: Tensor, bits: Tensor) -> Tensor:
    """fp32 to the bfloat16 below or above, by chance in proportion to the distance. bits: see `noise`."""
    return round_in_place(wide.clone(), (bits >> 16).to(torch.int32))


def round_in_place(wide: Tensor, low: Tensor) -> Tensor:
    """Overwrites `wide`."""
    # NOTE: cut by bits, because a cast rounds to nearest; -65536 is 0xFFFF0000 as an int32.
    cut = torch.add(wide.view(torch.int32), low).bitwise_and_(-65536).view(torch.float32)
    # The carry may have made a number of a nan. To add -0.0 changes no bit of any number, and the clamp leaves nan.
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.bfloat16)


def round_half_in_place(wide: Tensor, low: Tensor) -> Tensor:
    """The same to float16, which keeps 10 bits and below 2^-14 counts in steps of 2^-24. Overwrites `wide`."""
    steps = torch.floor(wide * 2.0**24 + low * 2.0**-16) * 2.0**-24
    cut = torch.add(wide.view(torch.int32), low >> 3).bitwise_and_(-8192).view(torch.float32)
    cut = torch.where(wide.abs() < 2.0**-14, steps, cut)
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.float16)
