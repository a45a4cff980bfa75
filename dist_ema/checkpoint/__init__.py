"""The saved form: safetensors files and ema.json, written by ranks and read by ranks."""

__all__ = ()
