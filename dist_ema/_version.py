"""The version, where the build and the library read it."""

from __future__ import annotations

__all__ = ["VERSION"]


VERSION = "0.1.0"
