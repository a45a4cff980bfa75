"""A hash of the bits of a tensor, for ranks to compare."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(data: Tensor) -> Tensor:
    """A hash of the bits of a 1-D tensor, int64 [], on its device: equal bits, equal hash, whatever wrote them."""
    bits = data.view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for i, chunk in enumerate(bits.split(1 << 20)):
        # NOTE: byte and place are mixed before the sum; a product of them gives all permutations of rows one hash.
        x = torch.arange(i << 20, (i << 20) + len(chunk), device=data.device) << 8 | chunk
        x = (x ^ x >> 31) * 0x7FB5D329728EA185
        x = (x ^ x >> 27) * 0x2545F4914F6CDD1D
        total += (x ^ x >> 33).sum()
    return total
