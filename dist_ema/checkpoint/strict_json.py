"""JSON as the standard has it: UTF-8, no key twice, finite numbers only, a bounded size."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .regular_file import open_regular, read_exactly

__all__ = ["MOST_JSON", "dump", "parse_json", "read_json"]


MOST_JSON = 100_000_000  # bytes of a header, which is what the safetensors library accepts, of an index or of ema.json


def dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_JSON:
            raise ValueError(f"{path} is larger than {MOST_JSON} bytes.")
        text = read_exactly(file, MOST_JSON)
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, found {type(value).__name__}.")
    return value


def parse_json(text: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no key twice, only finite numbers. Python's own reader is not so strict."""
    value = json.loads(
        text.decode(), object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite
    )
    if (
        b"\\ud" in text or b"\\uD" in text
    ):  # half a character would fail much later, where it is printed or written
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(
            f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands twice"
        )
    return result


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
