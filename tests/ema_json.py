"""ema.json by hand: damaged on purpose, with a check sum that agrees."""

from __future__ import annotations

import json
import zlib
from typing import Any

__all__ = ["stamped", "text_of"]


def text_of(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def stamped(values: dict[str, Any]) -> bytes:
    """ema.json with a check sum that agrees, so that only the damage is left to find."""
    rest = {key: value for key, value in values.items() if key != "crc32"}
    return text_of(rest | {"crc32": f"{zlib.crc32(text_of(rest)):08x}"})
