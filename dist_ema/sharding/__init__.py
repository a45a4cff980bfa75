"""What PyTorch did to the model, dissolved into one record per weight."""

from __future__ import annotations

__all__ = ()
