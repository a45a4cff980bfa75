"""`dist-ema sweep`: the best width in few evaluations, resumed, with an interval."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_ema import EMA, Power, load_file
from dist_ema.cli import main
from dist_ema.service.sweep import Candidate, SweepReport, sweep

OPTIMUM = 0.12


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "snapshots"
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, [Power(sigma_rel=0.05), Power(sigma_rel=0.10)])
    for step in range(1, 401):
        with torch.no_grad():
            model.weight.fill_(step / 400)
        ema.update()
        ema.snapshot(folder, every=25)
    return folder


def find(snapshots: Path, out: Path, noise: float = 0.0, **options: object) -> SweepReport:
    calls = iter(range(1000))

    def evaluate(path: Path, sigma: float) -> float:
        assert load_file(path)["weight"].item() == pytest.approx(1 - sigma, abs=0.15)
        return math.log(sigma / OPTIMUM) ** 2 + noise * (-1) ** next(calls)

    return sweep(snapshots, out, evaluate, **options)  # type: ignore[arg-type]


def test_the_best_width_is_found(snapshots: Path, tmp_path: Path) -> None:
    """Golden section with 8 evaluations; the interval holds the optimum; noise widens it."""
    found = find(snapshots, tmp_path / "a")
    assert len(found.candidates) == 8
    assert found.best.sigma_rel == pytest.approx(OPTIMUM, rel=0.1)
    assert found.interval[0] < OPTIMUM < found.interval[1]
    assert not found.at_the_edge
    narrow = find(snapshots, tmp_path / "b", low=0.04, high=0.06)
    assert narrow.at_the_edge
    assert narrow.best.sigma_rel > 0.055
    noisy = find(snapshots, tmp_path / "c", noise=0.01)
    assert noisy.interval[0] < OPTIMUM < noisy.interval[1]
    assert noisy.interval[1] / noisy.interval[0] > found.interval[1] / found.interval[0]
    repeated = find(snapshots, tmp_path / "d", noise=2.0, repeats=2)
    assert len(repeated.candidates) == 2, "two points that cannot be told apart end the search"
    assert Candidate(0.1, (1.0, 3.0)).error == pytest.approx(1.0)
    for low in (0.2, 0.0):
        with pytest.raises(ValueError, match="must be below the widest"):
            find(snapshots, tmp_path / "e", low=low, high=0.1)
    state = tmp_path / "a" / "sweep.json"
    for values in ([1], {"x": [1]}, {"0.1": 5}, {"0.1": ["x"]}):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"values": values}))
        with pytest.raises(ValueError, match="is damaged. Remove it"):
            find(snapshots, tmp_path / "a")


def test_the_command(snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted, it goes on; the winner is written; a table, JSON, a plot."""
    script, count = tmp_path / "eval.py", tmp_path / "count"
    script.write_text(
        "import json, math, os, sys\n"
        "path, sigma, count = sys.argv[1], float(sys.argv[2]), sys.argv[3]\n"
        "assert os.path.exists(f'{path}/model.safetensors')\n"
        "open(count, 'a').write('x')\n"
        "if len(open(count).read()) == 3: sys.exit('interrupted')\n"
        f"print(json.dumps({{'score': 1 - math.log(sigma / {OPTIMUM}) ** 2}}))\n"
    )
    command = f"{sys.executable} -S {script} {{path}} {{sigma_rel}} {count}"
    out = tmp_path / "out"
    arguments = ["sweep", str(snapshots), str(out), "--eval", command, "--metric", "score"]
    arguments += ["--mode", "max", "--evaluations", "5"]
    assert main(arguments) == 1
    assert "exit code 1: interrupted" in capsys.readouterr().err
    assert main([*arguments, "--json", "--plot", str(tmp_path / "sweep.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(count.read_text()) == 6, "two were known, one is repeated"
    assert found["best"] == pytest.approx(OPTIMUM, rel=0.25)
    best = load_file(out / "best")["weight"].item()
    assert best == pytest.approx(1 - found["best"], abs=0.15)
    assert sorted(path.name for path in out.iterdir()) == ["best", "sweep.json"]
    assert (tmp_path / "sweep.png").exists()
    assert main(arguments) == 0
    assert "best: sigma_rel" in capsys.readouterr().out
    assert main([*arguments, "--at", "200"]) == 1
    assert "holds another sweep" in capsys.readouterr().err
