"""Ranks: messages over the store, bytes over the process group."""

from __future__ import annotations

__all__ = ()
