"""The dtypes of safetensors as torch names them."""

from __future__ import annotations

import torch

from ..dtypes import TO_TORCH

__all__ = ["DTYPES"]


DTYPES: dict[str, torch.dtype] = {
    kind: getattr(torch, name) for kind, name in TO_TORCH.items()
}  # of safetensors
