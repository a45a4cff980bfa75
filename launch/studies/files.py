"""JSON that appears whole or not at all. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write"]


def write(path: Path, value: Any) -> None:
    """Rows of numbers take one line each; the rest is indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
