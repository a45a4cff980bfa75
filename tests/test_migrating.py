"""The table "their arguments, our schedule" of docs/migrating/index.md: every row is run.

How to read a failure: the parameter is the row's first column. Both sides average one float64
weight that jumps in every step. What no package is installed for is written here, in float64, from
its formula.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import EMA, schedules
from tests.test_compat_modules import timms

PAGE = Path(__file__).parent.parent / "docs" / "migrating" / "index.md"
START, STEPS = 5.0, 160


def rows() -> Iterator[tuple[str, str, str]]:
    """Their call, our schedule and when it updates, as the page has them."""
    section = PAGE.read_text().split("## Their arguments, our schedule")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            theirs, ours, when = cells[0].strip("`"), cells[1].strip("`"), cells[2].strip("`")
            yield theirs, ours, when


ROWS = list(rows())


def live(step: int) -> float:
    return float(step * step % 7) + step / 10


def ours(schedule: str, when: str) -> dict[int, float]:
    """The average after every step from which on it is an average of its own."""
    model, seen = weight(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ema = EMA(model, eval(schedule, vars(schedules)), dtype=torch.float64)
    by_hand = re.fullmatch(r"ema.update\(\)` at steps (\d+), (\d+), ...", when)
    first, then = map(int, by_hand.groups()) if by_hand else (1, 2)
    if not by_hand:
        eval(when, {"ema": ema, "optimizer": optimizer})
    for step in range(1, STEPS + 1):
        nn.init.constant_(model.weight, live(step))
        optimizer.step()
        if by_hand and (step < first or (step - first) % (then - first)):
            continue
        if by_hand:
            ema.update()
        seen[step] = float(ema.gather()["weight"])
    return seen


def weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, START)
    return model


class Formula:
    """average = decay * average + (1 - decay) * live, by the decay of update 1, 2, ..."""

    def __init__(self, decay: Callable[[int], float]) -> None:
        self.decay, self.average = decay, START

    def update(self, step: int, value: float) -> float:
        decay = self.decay(step)
        self.average = decay * self.average + (1 - decay) * value
        return self.average


class Snippet:
    """Originals that are no installed package: what their code computes."""

    @staticmethod
    def k_diffusion(
        inv_gamma: float = 1.0, power: float = 1.0, max_value: float = 1.0, start_at: int = 0
    ) -> Formula:
        """EMAWarmup: get_value(), and step() after it."""

        def value(step: int) -> float:
            epoch = max(0, step - 1 - start_at)
            return min(max_value, 1 - (1 + epoch / inv_gamma) ** -power)

        return Formula(value)

    @staticmethod
    def yolo(_: nn.Module, decay: float, tau: float) -> Formula:
        return Formula(lambda step: decay * (1 - math.exp(-step / tau)))

    @staticmethod
    def ldm(_: nn.Module, decay: float, use_num_upates: bool = True) -> Formula:
        return Formula(lambda n: min(decay, (1 + n) / (10 + n)) if use_num_upates else decay)

    @staticmethod
    def swa(_: Any, swa_start: int, swa_freq: int) -> Formula:
        """torchcontrib: buffer += (weight - buffer) / (n + 1) in some of the steps; n counts
        them.
        """

        def kept(step: int) -> float:
            if step <= swa_start:
                return 0.0  # the average means nothing yet, and ours is the live weight
            n = step // swa_freq - swa_start // swa_freq - 1
            return 1.0 if step % swa_freq or n < 0 else n / (n + 1)

        return Formula(kept)


def names(model: nn.Module) -> dict[str, Any]:
    """What a row may call, each with how it is updated and read."""
    import ema_pytorch
    from diffusers.training_utils import EMAModel
    from torch_ema import ExponentialMovingAverage

    return {
        "p": [*model.parameters()],
        "model": model,
        "optimizer": None,
        "EMAModel": EMAModel,
        "EMA": ema_pytorch.EMA,
        "ExponentialMovingAverage": ExponentialMovingAverage,
        "AveragedModel": AveragedModel,
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "ModelEmaV2": timms().ModelEmaV2,
        "ModelEmaV3": timms().ModelEmaV3,
        "EMAWarmup": Snippet.k_diffusion,
        "ModelEMA": Snippet.yolo,
        "LitEma": Snippet.ldm,
        "SWA": Snippet.swa,
    }


def update(average: Any, model: nn.Linear, step: int) -> float:
    """One update of the original, and what it holds then."""
    match type(average).__name__:
        case "Formula":
            return float(average.update(step, live(step)))
        case "EMAModel":
            average.step(model.parameters())
            return float(average.shadow_params[0])
        case "ExponentialMovingAverage":
            average.update(model.parameters())
            return float(average.shadow_params[0])
        case "EMA":
            average.update()
            return float(average.ema_model.weight)
        case "AveragedModel":
            average.update_parameters(model)
        case "ModelEmaV2":
            average.update(model)
        case "ModelEmaV3":
            average.update(model, step=step)
    return float(average.module.weight)


def test_the_table_is_there() -> None:
    """Every package that has schedules stands in it; guards the parsing of the page."""
    packages = {theirs.split("(")[0] for theirs, *_ in ROWS}
    assert packages == names(weight()).keys() - {"p", "model", "optimizer", "get_ema_multi_avg_fn"}


@pytest.mark.parametrize(("theirs", "schedule", "when"), ROWS, ids=[row[0] for row in ROWS])
def test_row(theirs: str, schedule: str, when: str) -> None:
    model = weight()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the originals, about themselves
        average, original = eval(theirs, names(model)), {}
        for step in range(1, STEPS + 1):
            nn.init.constant_(model.weight, live(step))
            original[step] = update(average, model, step)
    here = ours(schedule, when)
    assert here == pytest.approx({step: original[step] for step in here}, rel=1e-6)
