"""JSON as the standard has it: UTF-8, no key twice, finite numbers only, a bounded size."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .disk import open_regular, read_exactly

__all__ = ["MOST_JSON", "dump", "parse_json", "read_json"]


# Bytes of a header, an index or ema.json; the safetensors library accepts as many in a header.
MOST_JSON = 100_000_000


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
    """Parse JSON as the standard has it: UTF-8, unique keys, finite numbers.

    Python's own reader accepts more.
    """
    value = json.loads(
        text.decode(), object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite
    )
    # Half a surrogate pair would fail much later, where it is printed or written.
    if b"\\ud" in text or b"\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        raise ValueError(
            f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice"
        )
    return parsed


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
