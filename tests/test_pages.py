"""Pages of the docs whose python blocks stand by themselves run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("name", ["schedules.md"])
def test_it_runs(name: str) -> None:
    """What a page asserts is true."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": "page"})
