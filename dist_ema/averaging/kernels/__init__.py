"""shadow += weight * (live - shadow), on lists of plain 1-D tensors."""

from __future__ import annotations

__all__ = ()
