"""launch/cooldown.py: the table in the docs is made of the committed results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_holds_the_table_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import cooldown

    results = json.loads((ROOT / "docs/results/cooldown-quick.json").read_text())
    assert results["plan"] == json.loads(json.dumps(cooldown.asdict(cooldown.QUICK)))
    page = (ROOT / "docs/virtual-cooldown.md").read_text()
    assert "\n".join(cooldown.table(results)) in page
    rows = [row for row in results["rows"] if row["window"] == 80]
    means = [
        sum(row["linear"] / row["branch"] - 1 for row in rows if row["seed"] == seed) / 3
        for seed in range(3)
    ]
    mean = sum(means) / 3
    error = math.sqrt(sum((each - mean) ** 2 for each in means) / 2 / 3)
    assert f"| {100 * mean:+.2f} ± {100 * error:.2f} |" in page
    sys.modules.pop("cooldown")
