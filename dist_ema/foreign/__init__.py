"""Checkpoints that other tools wrote. No torch."""

from __future__ import annotations

__all__ = ()
