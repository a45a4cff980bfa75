"""`fingerprint`, `bit_sums`: 64-bit hashes of the bits of tensors, to compare ranks and times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["bit_sums", "fingerprint", "fingerprints"]

WINDOW = 1 << 16  # words of 4 bytes that are hashed at once
MULTIPLIER = 0x2545F4914F6CDD1D


def fingerprint(data: Tensor) -> Tensor:
    """Hash the bits of a 1-D tensor of any dtype.

    The hash is a sum of 4-byte words times odd pseudo-random factors, modulo 2^64. The sums of
    the windows are the digits of a polynomial, so that windows cannot change places unnoticed.

    Returns:
        int64 [], on the device of `data`. It depends on the bytes and their number alone.

    Note:
        *Cost*: one read of `data`, and two buffers of 512 KB.
    """
    bits = data.view(torch.uint8)
    factors = _factors(min(WINDOW, -(-len(bits) // 4)), data.device)
    products = torch.empty_like(factors)
    total = torch.full((), len(bits), dtype=torch.int64, device=data.device)
    for window in bits.split(4 * WINDOW):
        if len(window) % 4 or window.storage_offset() % 4:  # torch refuses to view these as words
            window = torch.cat([window, window.new_zeros(-len(window) % 4)])
        words = window.view(torch.int32)
        hashed = products[: len(words)].copy_(words).mul_(factors[: len(words)])
        total.mul_(MULTIPLIER).add_(hashed.sum())
    return total


def fingerprints(data: Sequence[Tensor]) -> list[int]:
    """Hash 1-D tensors on any devices, each for itself. Waits for the devices."""
    return _to_host(map(fingerprint, data))


def bit_sums(data: Iterable[Tensor]) -> list[int]:
    """Sum the bits of 1-D tensors as 8-byte words, to notice that one was written.

    Note:
        *Cost*: one read at the bandwidth of the memory, a sixth of a fingerprint on a CPU. Words
        that change places leave the sum as it is.
    """
    return _to_host(map(_bit_sum, data))


def _bit_sum(data: Tensor) -> Tensor:
    bits = data.view(torch.uint8)
    begin = min(-bits.storage_offset() % 8, len(bits))  # torch views words at multiples of 8 only
    end = len(bits) - (len(bits) - begin) % 8
    parts = [bits[:begin], bits[end:]]
    if end > begin:
        parts.append(bits[begin:end].view(torch.int64))
    return torch.stack([part.sum() for part in parts]).sum()


def _to_host(hashes: Iterable[Tensor]) -> list[int]:
    """Waits once for all of a device."""
    sums = list(hashes)
    devices = dict.fromkeys(value.device for value in sums)
    hashes_there = {
        device: iter(torch.stack([value for value in sums if value.device == device]).tolist())
        for device in devices
    }
    return [next(hashes_there[value.device]) for value in sums]


def _factors(n: int, device: torch.device) -> Tensor:
    """Odd numbers that look random and are the same on every device. int64 [n]"""
    # NOTE: factors that grow evenly would give all permutations of equal rows one hash.
    x = torch.arange(1, n + 1, device=device).mul_(MULTIPLIER)
    x.bitwise_xor_(x >> 29).mul_(0x7FB5D329728EA185)
    return x.bitwise_xor_(x >> 32).bitwise_or_(1)
