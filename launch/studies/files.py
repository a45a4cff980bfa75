"""JSON that appears whole or not at all. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["rounded", "write"]


def write(path: Path, value: Any) -> None:
    """One line per entry of the outermost table, and per row in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(_text(value) + "\n")
    temporary.replace(path)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{\n"
            + ",\n".join(f" {json.dumps(key)}: {_rows(each)}" for key, each in value.items())
            + "\n}"
        )
    return _rows(value)


def _rows(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)


def rounded(value: Any) -> Any:
    """Numbers to six digits: more would be noise in the diffs of committed results."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
