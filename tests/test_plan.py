"""`dist-ema plan`: conversions checked against replayed averages, costs against the counts they are
made of.
"""

from __future__ import annotations

import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_ema import EMA, Constant, HalfLife, Power, Schedule
from dist_ema.offline.plan import cost, impulse_response, pace, scaled
from tests.conftest import Call


@pytest.fixture
def call(call: Call) -> Call:
    """`dist-ema plan ...` in this process."""

    return partial(call, "plan")


# --- the decay ------------------------------------------------------------------------------------


def test_widths() -> None:
    """Half-life, window and width are what the weights of a replayed average have: median, mean age
    + 1, deviation.
    """
    of = pace(decay=0.99, length=5000)
    ages = np.arange(4000)
    weights = 0.01 * 0.99**ages
    assert weights[: round(of.half_life)].sum() == pytest.approx(0.5, abs=2e-3)
    mean = (weights * ages).sum()
    assert of.window == pytest.approx(mean + 1)
    assert of.width == pytest.approx(math.sqrt((weights * (ages - mean) ** 2).sum()))
    assert of.sigma_rel == pytest.approx(of.width / 5000)
    assert of.start_left == 0.99**5000


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens"])
def test_round_trip(unit: str) -> None:
    """Each of the four words leads back to the same decay, in every unit."""
    shape: dict[str, Any] = {"unit": unit, "batch_size": 256.0, "tokens": 100.0}
    per = {"steps": 1, "samples": 256, "tokens": 25600}[unit]
    length = 200_000 * per
    of = pace(decay=0.9997, length=length, **shape)
    assert of.length == 200_000
    for given in (
        {"half_life": of.half_life * per},
        {"window": of.window * per},
        {"sigma_rel": of.sigma_rel},
    ):
        assert pace(**given, length=length, **shape).decay == pytest.approx(0.9997, rel=1e-12)
    assert pace(half_life=of.half_life * per, **shape).decay == pytest.approx(
        HalfLife(of.half_life * per)(1e9, per), rel=1e-12
    )


def test_power_of_that_width() -> None:
    """The power function that `as Power` names has the width of the constant decay."""
    of = pace(decay=0.999, length=10_000)
    assert of.gamma is not None
    clock = np.arange(1, 10_001)
    weights = np.diff(np.append(0, (clock / 1e4) ** (of.gamma + 1)))
    mean = (weights * clock).sum()
    assert math.sqrt((weights * (clock - mean) ** 2).sum()) == pytest.approx(of.width, rel=1e-3)
    assert pace(decay=0.9999, length=1000).gamma is None


def test_scaling() -> None:
    """At twice the batch half the updates on twice the samples: the same average of weights that
    move with the samples.
    """
    one = pace(half_life=50_000, unit="samples", batch_size=100, length=1e6)
    two = scaled(one, 2)
    assert two.decay == pytest.approx(one.decay**2, rel=1e-12)
    assert two.half_life * two.units["samples"] == pytest.approx(
        one.half_life * one.units["samples"]
    )
    assert (two.units["samples"], two.length) == (200, 5000)
    averages = []
    for of, count in ((one, 4000), (two, 2000)):
        average = 0.0
        for step in range(1, count + 1):
            average = of.decay * average + (1 - of.decay) * math.sin(
                step * of.units["samples"] / 1e5
            )
        averages.append(average)
    assert averages[0] == pytest.approx(averages[1], abs=2e-3)


def test_table(call: Call) -> None:
    """What it prints: numbers by unit, and lines to paste that are what EMA takes."""
    code, out, err = call(
        "--half-life",
        "500k",
        "--unit",
        "samples",
        "--batch-size",
        256,
        "--length",
        "50M",
        "--scale-batch",
        2,
    )
    assert (code, err) == (0, "")
    assert "half-life  1,953    500,000\n" in out
    assert "EMA(model, decay=HalfLife(500000)), attach(optimizer, elapsed=256)" in out
    assert "at 2 times the batch: decay^2" in out
    assert "decay per step        0.99964517  0.99929047" in out
    code, out, _ = call("--sigma-rel", 0.1, "--length", "100k", "--every", 4)
    assert "as Power              EMA(model, decay=Power(sigma_rel=0.1))  (gamma 6.937)" in out
    assert "decay per 4 steps" in out
    code, out, _ = call("--decay", 0.9999, "--length", 5000)
    assert "none: wider than the plain mean" in out
    code, out, _ = call("--decay", 0.9999)
    assert (code, "sigma_rel  " in out, "6,931" in out) == (0, False, True)


def test_decays_that_are_almost_1(call: Call) -> None:
    """The line to paste is not rounded to 1, and has the half-life that was asked for."""
    for half_life in (5e6, 5e9, 5e12):
        out = call("--half-life", half_life)[1]
        decay = float(re.findall(r"decay=([0-9.]+)\)", out)[0])
        assert math.log(0.5) / math.log(decay) == pytest.approx(half_life, rel=1e-3)


def test_json(call: Call) -> None:
    code, out, _ = call(
        "--decay", 0.999, "--batch-size", 8, "--scale-batch", 2, "--params", "1M", "--json"
    )
    values = json.loads(out)
    assert (code, set(values)) == (0, {"pace", "scaled", "cost"})
    assert values["pace"]["half_life_samples"] == pytest.approx(math.log(0.5) / math.log(0.999) * 8)
    assert values["scaled"]["decay"] == pytest.approx(0.998001)
    assert values["cost"]["memory"]["shadows"] == 4_000_000


def test_plot(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG, with and without a length and a second batch size; refused where matplotlib is
    missing.
    """
    for name, more in (
        ("a", []),
        ("b", ["--length", "5k"]),
        ("c", ["--length", "5k", "--scale-batch", "2"]),
    ):
        assert call("--decay", 0.99, "--plot", tmp_path / f"{name}.png", *more)[0] == 0
        assert call("--decay", 0.9, "--plot", tmp_path / f"{name}.png", *more)[0] == 0
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (tmp_path / "full.png").symlink_to("/dev/full")
    code, _, err = call("--decay", 0.99, "--plot", tmp_path / "full.png")
    assert (code, "full.png: No space left on device" in err) == (1, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("--decay", 0.99, "--plot", tmp_path / "d.png")
    assert (code, "pip install 'dist-ema[plot]'" in err) == (1, True)


# --- the cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype: torch.dtype) -> None:
    """What EMA itself says that it holds."""
    ema = EMA(nn.Linear(100, 50), [0.9, 0.99], dtype=dtype)
    said = cost(5050, dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], averages=2)
    assert said.memory.shadows == ema.metrics()["bytes"]


def test_cost() -> None:
    """By hand: 1000 parameters on 8 ranks."""
    one = cost(1000, world=8, wrapper="fsdp", weights="bf16", bandwidth=2.0)
    assert (one.elements, one.memory.shadows, one.moved, one.copied, one.saved, one.copies) == (
        125,
        500,
        1250,
        0,
        4000,
        4000,
    )
    assert one.seconds == pytest.approx(1250 / 2e9)
    whole = cost(1000, world=8, wrapper="none", averages=2)
    assert (whole.elements, whole.memory.shadows, whole.moved, whole.copies) == (
        1000,
        8000,
        20_000,
        8000,
    )
    host = cost(1000, world=4, wrapper="ddp", dtype="bf16", device="cpu", bandwidth=1.0, link=0.5)
    assert (host.memory.window, host.copied, host.moved, host.memory.place) == (
        1000,
        1000,
        2000,
        "cpu",
    )
    assert host.seconds == pytest.approx(2000 / 1e9 + 1000 / 0.5e9)


def test_cost_table(call: Call) -> None:
    code, out, err = call(
        "--params",
        "7B",
        "--world",
        64,
        "--wrapper",
        "fsdp",
        "--weights",
        "bf16",
        "--bandwidth",
        3350,
    )
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "109,375,000" in rows["elements on a rank"]
    assert "438 MB" in rows["average, in gpu memory"]
    assert "0.3265 ms" in rows["time of an update"]
    assert "at 3350 GB/s;" in rows["time of an update"]
    code, out, _ = call("--params", "7B", "--world", 64, "--device", "cpu")
    assert "50 GB/s (assumed), link 25 GB/s (assumed)" in out


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "nothing to plan"),
        (["--params", "1B", "--plot", "x.png"], 2, "--plot and --scale-batch need"),
        (["--decay", "1"], 2, "must be between 0 and 1"),
        (["--decay", "0.9", "--half-life", "3"], 2, "not allowed with"),
        (["--half-life", "five"], 2, "like 500k or 7B"),
        (["--half-life", "-3"], 2, "a number above 0"),
        (["--half-life", "1e999"], 2, "like 500k or 7B"),
        (["--params", "1B", "--world", "1.5"], 2, "whole number"),
        (["--sigma-rel", "0.29"], 2, "below 0.2887, the width of the plain mean"),
        (["--sigma-rel", "0.1"], 2, "--sigma-rel needs --length"),
        (["--half-life", "9", "--unit", "samples"], 2, "--unit samples needs --batch-size"),
        (
            ["--half-life", "9", "--unit", "tokens"],
            2,
            "--unit tokens needs --batch-size and --tokens-per-sample",
        ),
        (["--window", "0.5"], 1, "a decay of -1 per step"),
        (["--half-life", "1e30"], 1, "a decay of 1 per step"),
        (["--sigma-rel", "1e-300", "--length", "1"], 1, "a decay of 0 per step"),
        (["--sigma-rel", "0.1", "--length", "1e300"], 1, "a decay of 1 per step"),
        (["--decay", "0.99", "--scale-batch", "1e9"], 1, "a decay of 0 per step"),
        (["--decay", "0.99", "--scale-batch", "1e-18"], 1, "a decay of 1 per step"),
        (["--decay", "0.99", "--length", "1e300"], 1, "sigma_rel must be"),
        (
            ["--decay", "0.99", "--batch-size", "1e300", "--tokens-per-sample", "1e9"],
            1,
            "half_life_tokens",
        ),
        (["--params", "7B", "--averages", "1e300"], 1, "too large to compute with"),
        (["--params", "7B", "--bandwidth", "1e-320", "--json"], 1, "not JSON"),
    ],
    ids=str,
)
def test_refused(arguments: list[str], code: int, words: str, call: Call) -> None:
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert words in err


@pytest.mark.parametrize("of", [Constant(0.9), Power(gamma=3.0)], ids=repr)
def test_impulse_response(of: Schedule) -> None:
    """What the plot shows: the shares of all updates, which sum to what is not of the start."""
    shares, kept = (
        [impulse_response(of, 60.0, age) for age in range(60)],
        math.prod(of(now) for now in range(1, 61)),
    )
    assert sum(shares) == pytest.approx(1 - kept, abs=1e-12)
    assert shares[0] == pytest.approx(1 - of(60))
    assert impulse_response(of, 60.0, 59.5) == 0


def test_power_is_known() -> None:
    """sigma_rel means the same here and in the schedule."""
    of = pace(sigma_rel=0.1, length=1e5)
    assert of.gamma == pytest.approx(-1 + math.log(Power(sigma_rel=0.1)(1e5, 5e4)) / math.log(0.5))
