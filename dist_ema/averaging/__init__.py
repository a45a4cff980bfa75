"""The averages: how they are kept, moved, swapped in and measured."""

from __future__ import annotations

__all__ = ()
