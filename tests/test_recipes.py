"""docs/recipes.md runs from top to bottom, and its averages are what it says they are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel

from dist_ema import EMA, HalfLife, Uniform, load_file
from dist_ema.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
LOADER = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(5)]


def test_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every python block in one namespace, and every command; then LAWA's mean is the mean of what
    was kept, and the brake has let go of the share that was asked.
    """
    monkeypatch.chdir(tmp_path)
    place: dict[str, Any] = {"__name__": "recipes"}
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), place)
            continue
        words = code.split()
        where = words.index("run/live-*")
        words[where : where + 1] = sorted(map(str, Path("run").glob("live-*")))
        assert words[:2] == ["dist-ema", "average"]
        assert main(words[1:]) == 0
    kept = sorted(Path("run").glob("live-*"))
    assert [path.name for path in kept] == ["live-003", "live-004", "live-005"]
    mean = load_file("run/lawa")
    for name in ("0.weight", "3.bias"):
        exact = torch.stack([load_file(path)[name].double() for path in kept]).mean(0)
        torch.testing.assert_close(mean[name].double(), exact, rtol=1e-6, atol=1e-7)
    assert place["brake"](now=200.0, elapsed=200.0) == pytest.approx(0.2)
    assert round(place["brake"].units) == 86
    assert "# 86 steps" in PAGE.read_text()
    assert place["ema"].now == 200
    # As the comment beside `start` says: the means of epochs 5 to 8.
    assert place["swa"].metrics(distance=False)["updates"] == 4


def small() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x, y in LOADER:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_swa_is_torchs() -> None:
    """Uniform() with start= and every= beside SWALR is torch's AveragedModel, updated after each
    epoch from then on.
    """
    model, optimizer = small()
    ema = EMA(model, decay=Uniform())
    ema.attach(optimizer, start=2 * len(LOADER), every=len(LOADER))
    theirs, rate = AveragedModel(model), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for epoch in range(6):
        one_epoch(model, optimizer)
        if epoch >= 2:
            theirs.update_parameters(model)
            rate.step()
    assert int(theirs.n_averaged) == 4
    mine, live = ema.gather(), model[0].weight
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(mine[name], weight.detach())
    assert not torch.allclose(mine["0.weight"], live)


@pytest.mark.parametrize("left", [0.1, 0.5])
def test_brake(left: float) -> None:
    """The share of the old weights that is left after the fine-tuning is the one that the half-life
    was chosen for.
    """
    steps = 40
    model = nn.Linear(2, 2, bias=False)
    old, new = torch.ones(2, 2), torch.full((2, 2), 5.0)
    write(model, old)
    ema = EMA(model, decay=HalfLife(steps * math.log(0.5) / math.log(left)))
    write(model, new)
    for _ in range(steps):
        ema.update()
    torch.testing.assert_close(ema.gather()["weight"], left * old + (1 - left) * new)


def write(model: nn.Linear, value: Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(value)
