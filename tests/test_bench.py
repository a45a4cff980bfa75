"""launch/bench.py runs and writes what it promises, and what docs/benchmarks.md says of compact
shadows holds.

Nothing here looks at seconds: the machines that run tests are shared.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "launch" / "bench.py")
ENVIRON = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
ENVIRON |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module: it starts in milliseconds where torch is imported."""
    for key in set(os.environ) - set(ENVIRON):
        monkeypatch.delenv(key)
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    yield importlib.import_module("bench")
    sys.modules.pop("bench")


def read(folder: Path) -> dict[str, Any]:
    """The one JSON that a run wrote; its chart must stand beside it."""
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_update(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, dtype: str
) -> None:
    """The bytes of every row, and ratios that follow from them; every fact that a reader needs to
    repeat the run.
    """
    words = ["--model", "tiny", "--repeat", "2", "--no-peers", "--only", "update"]
    script.main([*words, "--dtype", dtype, "--out", str(tmp_path)])
    printed, result = capsys.readouterr().out, read(tmp_path)
    for key in (
        "command",
        "machine",
        "torch",
        "commit",
        "date",
        "load",
        "device",
        "passes",
        "model",
        "repeat",
    ):
        assert result[key] not in ("", None), key
    assert result["command"] in printed
    n, live = result["elements"], 4 if dtype == "float32" else 2
    rows = {row["name"]: row for row in result["update"]}
    moved = {"add": 12 * n, "add_": 12 * n, "copy_": 8 * n}
    moved |= {"ours, fp32 shadow": (8 + live) * n, "ours, bf16 shadow": (4 + live) * n}
    assert {name: round(row["mb_moved"] * 1e6) for name, row in rows.items()} == moved
    for row in rows.values():
        assert row["times_limit"] * row["fraction_of_limit"] == pytest.approx(1)
        assert row["gb_per_s"] == pytest.approx(row["mb_moved"] / row["ms"])


def test_several_averages(script: ModuleType, tmp_path: Path) -> None:
    """Live is read once, however many averages there are."""
    words = ["--averages", "3", "--model", "tiny", "--repeat", "1", "--no-peers"]
    script.main([*words, "--only", "update", "--out", str(tmp_path)])
    result = read(tmp_path)
    (row,) = (row for row in result["update"] if "fp32 shadow" in row["name"])
    assert round(row["mb_moved"] * 1e6) == (4 + 3 * 8) * result["elements"]


def test_step(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--model", "tiny", "--repeat", "1", "--only", "step", "--out", str(tmp_path)])
    names = [row["name"] for row in read(tmp_path)["step"]]
    assert names == ["no average", "inline", "offloaded"]


def test_publish(script: ModuleType, tmp_path: Path) -> None:
    """Each segment that publishes has one version in it, which is asserted there."""
    words = ["--model", "tiny", "--repeat", "3", "--only", "publish", "--out", str(tmp_path)]
    ((part, (row,)),) = script.measure(script.arguments(words))
    assert (part, row.name, row.pairs) == ("publish", "publishing every 50", 6)
    assert row.low <= row.times_plain <= row.high


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux"
)
def test_memory(script: ModuleType, tmp_path: Path) -> None:
    """One row per verb, and for two ranks under two wrappers that save in five ways.

    Nothing else is left in the folder.
    """
    script.main(["--model", "tiny", "--repeat", "1", "--only", "memory", "--out", str(tmp_path)])
    names = [row["name"] for row in read(tmp_path)["memory"]]
    ways = ("ours", "ours-stream", "ours-behind", "torch", "torch-synced")
    assert names[:6] == ["build", "first update", "update", "swap", "gather", "save"]
    assert names[6:] == [f"2 ranks, {w}-{how}" for w in ("ddp", "fsdp2") for how in ways]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "cuda"], "finds no accelerator"),
        (["--device", "gpu"], "argument --device: must be cpu, cuda or cuda:1, got 'gpu'"),
        (["--out", SCRIPT], f"--out {SCRIPT} cannot be written: File exists"),
    ],
)
def test_refusals(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["--model", "tiny", "--out", str(tmp_path), *words])
    assert sentence in capsys.readouterr().err


# --- [Note: rounding] in rounding -----------------------------------------------------------------


def walk(exact: Tensor, live: Tensor, weight: float) -> Tensor:
    """The variance that one rounding adds at the oracle's place: u^2 p (1 - p), p being the share
    of a spacing u that is cut off. What was added before is multiplied by decay^2 in every later
    update.
    """
    _, exponent = torch.frexp(exact)
    spacing = torch.ldexp(torch.ones_like(exact), exponent - 8)
    share = (weight * (live - exact).abs() / spacing).frac()
    return spacing.square() * share * (1 - share)


def test_compact_follows_the_oracle() -> None:
    """Acceptance of the compact shadow at decay 0.9999 over 20,000 updates, with fewer elements
    than in docs/benchmarks.md: no drift, and no more noise than the rounding itself explains.
    Rounded to nearest it would not have moved at all.
    """
    n, updates, decay = 1024, 20_000, 0.9999
    draws = torch.Generator().manual_seed(0)
    start = (torch.randn(n, generator=draws) * 0.02).to(torch.bfloat16)
    target = torch.randn(n, generator=draws) * 0.02
    shadow, live, exact = start.clone(), start.float(), start.double()
    variance = torch.zeros_like(exact)
    plan = UpdatePlan([ShadowPair("w", [shadow], live, torch.arange)])
    for update in range(updates):
        torch.lerp(start.float(), target, min(1.0, 4 * (update + 1) / updates), out=live)
        plan.run([1 - decay], update)
        exact.lerp_(live.double(), 1 - decay)
        variance.mul_(decay**2).add_(walk(exact, live.double(), 1 - decay))
    error, moved = shadow.double() - exact, exact - start.double()
    along = (error * moved.sign()).mean().abs() / moved.abs().mean()
    noise = math.sqrt(error.square().mean() / variance.mean())
    assert along < 0.01
    assert 1 / 1.2 < noise < 1.2
