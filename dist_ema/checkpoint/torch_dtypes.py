"""The dtypes of safetensors as torch has them."""

from __future__ import annotations

import torch

from ..dtypes import TO_TORCH

__all__ = ["DTYPES", "KINDS"]

DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in TO_TORCH.items()}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
