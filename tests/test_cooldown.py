"""launch/cooldown.py: the tables in the docs are made of the committed results."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_holds_the_tables_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cell of them is computed here again."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import cooldown

    page = (ROOT / "docs/virtual-cooldown.md").read_text()
    results = json.loads((ROOT / "docs/results/cooldown-quick.json").read_text())
    plan = [cooldown.asdict(runs) for runs in cooldown.PLANS["quick"]]
    assert results["runs"] == json.loads(json.dumps(plan))
    assert "\n".join(cooldown.tables(results)) in page
    rows = [row for row in results["rows"] if (row["task"], row["rate"]) == ("teacher", 0.01)]
    shares = [row["linear"] / row["branch"] - 1 for row in rows]
    assert len(shares) == 4
    mean = sum(shares) / 4
    error = math.sqrt(sum((each - mean) ** 2 for each in shares) / 3 / 4)
    assert f"| {100 * mean:+.2f} ± {100 * error:.2f} |" in page
    sys.modules.pop("cooldown")


def test_a_place_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is trained."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import cooldown

    monkeypatch.setattr(cooldown, "study", lambda *_: pytest.fail("it trained"))
    with pytest.raises(SystemExit):
        cooldown.main(["--smoke", "--out", "/dev/null/x.json"])
    assert "--out /dev/null/x.json cannot be written" in capsys.readouterr().err
    sys.modules.pop("cooldown")
