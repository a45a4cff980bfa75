"""The saved form: safetensors files and ema.json, written by ranks and read by ranks."""

from __future__ import annotations

__all__ = ()
