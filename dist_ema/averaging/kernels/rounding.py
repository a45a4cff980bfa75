"""Stochastic rounding by a counter-based hash.

[Note: rounding]  A bf16 shadow at decay 0.999 never moves when it is rounded to nearest. Here the
bits that are cut off decide by chance: a hash of (seed, update, name, element number in the full
weight) is added below the cut. There is no generator and no state, so the bits are the same on any
world size, wrapper and device. The key of the hash is the CRC-32 of "seed/update/name".
"""

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
    "signed",
    "upper_bits",
]


def noise(seed: int, update: int, name: str, indices: Tensor) -> Tensor:
    """32 hash bits per element, as int64 in [0, 2^32)."""
    return draw_bits(noise_key(seed, update, name), indices, True).to(torch.int64) & 0xFFFFFFFF


@lru_cache(maxsize=4096)
def noise_key(seed: int, update: int, name: str) -> int:
    """The key of a weight's noise in one update."""
    return crc32(name.encode(), crc32(key_prefix(seed, update)))


def key_prefix(seed: int, update: int) -> bytes:
    """What the keys of all names begin with."""
    return f"{seed}/{update}/".encode()


def draw_bits(key: int, indices: Tensor, huge: bool) -> Tensor:
    """The bits of `noise` as int32: a quarter of the traffic of int64, and products wrap alike."""
    if huge:
        indices = indices ^ (indices >> 32) * 0x9E3779B1
    x = indices.to(torch.int32).bitwise_xor_(signed(key))
    spare = torch.empty_like(x)
    return _mix(_mix(x, spare).bitwise_xor_(signed(key >> 7)), spare)


def _mix(x: Tensor, spare: Tensor) -> Tensor:
    """A bijection of 32 bits, in place, in which every input bit reaches every output bit."""
    x.bitwise_xor_(_shift(x, 16, spare)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift(x, 15, spare)).mul_(0x46CA68B5)
    return x.bitwise_xor_(_shift(x, 16, spare))


def _shift(x: Tensor, n: int, out: Tensor) -> Tensor:
    """Shift right and fill with zeros: int32 shifts fill with the sign."""
    return torch.bitwise_right_shift(x, n, out=out).bitwise_and_((1 << 32 - n) - 1)


def signed(word: int, size: int = 32) -> int:
    """`size` bits as a signed integer of that size."""
    return word - ((word & 1 << size - 1) << 1)


def upper_bits(bits: Tensor) -> Tensor:
    """The upper 16 hash bits, to be added below the cut. int32, in place."""
    return _shift(bits, 16, bits)


def round_to_bfloat16(wide: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to the bfloat16 below or above, by chance in proportion to the distance.

    Args:
        wide: fp32 [n].
        bits: What `noise` returns, int64 [n].
    """
    return round_in_place(wide.clone(), (bits >> 16).to(torch.int32))


def round_in_place(wide: Tensor, low: Tensor) -> Tensor:
    """As `round_to_bfloat16`, from `upper_bits`. Overwrites `wide`."""
    # NOTE: cut by bits, because a cast rounds to nearest; -65536 is 0xFFFF0000 as an int32.
    cut = torch.add(wide.view(torch.int32), low).bitwise_and_(-65536).view(torch.float32)
    # The carry may have made a number of a nan. Adding -0.0 changes no number; clamp keeps nan.
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.bfloat16)


def round_half_in_place(wide: Tensor, low: Tensor) -> Tensor:
    """The same to float16: 10 bits of mantissa, and steps of 2^-24 below 2^-14."""
    steps = torch.floor(wide * 2.0**24 + low * 2.0**-16) * 2.0**-24
    cut = torch.add(wide.view(torch.int32), low >> 3).bitwise_and_(-8192).view(torch.float32)
    cut = torch.where(wide.abs() < 2.0**-14, steps, cut)
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.float16)
