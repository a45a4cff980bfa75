"""Stochastic rounding of shadows to bfloat16 and float16, by a hash of the element number.

[Note: rounding]  A bf16 shadow at decay 0.999 never moves when it is rounded to nearest. Here the
bits that are cut off decide by chance: a hash of (seed, update, name, element number in the full
weight) is added below the cut. There is no generator and no state, so the bits are the same on any
world size, wrapper and device. The key of the hash is the CRC-32 of "seed/update/name". A hash has
32 bits and a rounding needs 16, so elements 2k and 2k + 1 of the full weight share the hash of k:
the even one takes the lower half, the odd one the upper half.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["ROUND", "draw_bits", "draw_bits_of_pairs", "key_prefix", "noise_key", "signed"]


@lru_cache(maxsize=4096)
def noise_key(seed: int, update: int, name: str) -> int:
    """The key of a weight's noise in one update."""
    return crc32(name.encode(), crc32(key_prefix(seed, update)))


def key_prefix(seed: int, update: int) -> bytes:
    """The beginning of the keys of all names in one update."""
    return f"{seed}/{update}/".encode()


def draw_bits(key: int, indices: Tensor, huge: bool) -> Tensor:
    """16 bits per element, as int32: half the traffic of int64, and its products wrap alike."""
    shift = indices.to(torch.int32).bitwise_and_(1).mul_(16)
    return _hash(key, indices >> 1, huge).bitwise_right_shift_(shift).bitwise_and_(0xFFFF)


def draw_bits_of_pairs(key: int, pairs: Tensor, huge: bool) -> Tensor:
    """The bits of both elements of each pair, with half the work. pairs: half the even numbers."""
    # Viewed as int16, a hash is its lower half and then its upper one.
    return _hash(key, pairs, huge).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)


def _hash(key: int, pairs: Tensor, huge: bool) -> Tensor:
    if huge:
        pairs = pairs ^ (pairs >> 32) * 0x9E3779B1
    x = pairs.to(torch.int32).bitwise_xor_(signed(key))
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


def _round_to_bfloat16(wide: Tensor, low: Tensor) -> Tensor:
    """The bfloat16 below or above, by chance in proportion to the distance. Overwrites `wide`."""
    # NOTE: cut by bits, because a cast rounds to nearest; -65536 is 0xFFFF0000 as an int32.
    cut = torch.add(wide.view(torch.int32), low).bitwise_and_(-65536).view(torch.float32)
    # The carry may have made a number of a nan. Adding -0.0 changes no number; clamp keeps nan.
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.bfloat16)


def _round_to_float16(wide: Tensor, low: Tensor) -> Tensor:
    """Round to float16 alike: 10 bits of mantissa, and steps of 2^-24 below 2^-14."""
    steps = torch.floor(wide * 2.0**24 + low * 2.0**-16) * 2.0**-24
    cut = torch.add(wide.view(torch.int32), low >> 3).bitwise_and_(-8192).view(torch.float32)
    cut = torch.where(wide.abs() < 2.0**-14, steps, cut)
    return cut.add_(wide.clamp_(-0.0, -0.0)).to(torch.float16)


# The dtypes of shadows that round: fp32 [n], which is overwritten, and its 16 bits -> [n].
ROUND = {torch.bfloat16: _round_to_bfloat16, torch.float16: _round_to_float16}
