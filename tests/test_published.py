"""Published averages: shares against the recursion of the paper, to 1e-12, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.cli import main
from dist_ema.posthoc import published
from dist_ema.schedules import CURVES

N = 40
PATH = np.random.default_rng(0).normal(size=N + 1).cumsum()  # the weights, the start first


def _ema() -> float:
    average = PATH[0]
    for weight in PATH[1:]:
        average = 0.9 * average + 0.1 * weight
    return float(average)


def _tail() -> float:
    average = 0.0
    for count, weight in enumerate(PATH[26:], 1):
        average += (weight - average) / count
    return float(average)


def _lawa() -> float:
    queue: list[float] = []
    for step in range(1, N + 1):
        if step % 7 == 0:
            queue = [*queue, PATH[step]][-3:]
    return sum(queue) / len(queue)


def _cooldown() -> float:
    """The run whose last 16 steps are scaled by the curve: the meaning of the shares."""
    weight = PATH[N - 16]
    for j, step in enumerate(np.diff(PATH)[-16:]):
        weight += (1 - math.sqrt(j / 16)) * step
    return float(weight)


def _bema() -> float:
    average = PATH[0]
    for t, weight in enumerate(PATH[1:], 1):
        beta = (10 + 2 * t) ** -0.7
        average = (1 - beta) * average + beta * weight
    return float(average + (10 + 2 * N) ** -0.3 * (PATH[-1] - PATH[0]))


CASES: list[tuple[NDArray[np.float64], Callable[[], float]]] = [
    (published.ema(N, 0.9), _ema),
    (published.tail(N, 25), _tail),
    (published.lawa(N, 7, 3), _lawa),
    (published.cooldown(N, 16, "minus-sqrt"), _cooldown),
    (published.bema(N, 0.7, 0.3, 10, 2), _bema),
]


@pytest.mark.parametrize(("shares", "recursion"), CASES)
def test_recursion(shares: NDArray[np.float64], recursion: Callable[[], float]) -> None:
    assert shares.shape == (N + 1,)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert shares @ PATH == pytest.approx(recursion(), abs=1e-12)


def test_closed_forms() -> None:
    """Shares, and what is left of a step that one update had made."""
    shares = published.ema(N, 0.9)
    for j in (1, 7, N):
        assert shares[j] == pytest.approx(0.1 * 0.9 ** (N - j), abs=1e-12)
        assert shares[j:].sum() == pytest.approx(1 - 0.9 ** (N - j + 1), abs=1e-12)
    assert shares[0] == pytest.approx(0.9**N, abs=1e-12)
    assert published.tail(N, 25)[26:] == pytest.approx(np.full(15, 1 / 15), abs=1e-12)
    assert published.tail(N, 25)[:26].sum() == 0
    assert np.flatnonzero(published.lawa(N, 7, 3)).tolist() == [21, 28, 35]
    assert np.flatnonzero(published.lawa(15, 7, 3)).tolist() == [7, 14]
    linear = published.cooldown(N, 16)
    assert linear == pytest.approx(published.tail(N, N - 16), abs=1e-12)
    for curve in ("linear", "minus-sqrt", "cosine"):
        left = published.cooldown(N, 16, curve)[::-1].cumsum()[::-1][-16:]
        function = CURVES[curve]
        expected = [function(j / 16) for j in range(16)]
        assert left == pytest.approx(expected, abs=1e-12)
    drift = np.arange(N + 1.0)  # BEMA takes back a part of the lag of its EMA
    lag = N - published._recursive(1 - (10 + np.arange(1, N + 1.0)) ** -0.5) @ drift
    assert N - published.bema(N) @ drift == pytest.approx(lag - (10 + N) ** -0.2 * N, abs=1e-10)


@pytest.mark.parametrize(
    ("average", "arguments", "named"),
    [
        (published.ema, (-1, 0.9), "n must be a whole number from 0, got -1"),
        (published.tail, (3, 3), "start must be a whole number from 0 to 2, got 3"),
        (published.tail, (3, -1), "start must be a whole number from 0 to 2, got -1"),
        (published.lawa, (3, 5, 1), "every must be a whole number from 1 to 3, got 5"),
        (published.lawa, (3, 1, 0), "k must be a whole number from 1, got 0"),
        (published.cooldown, (3, 5), "length must be a whole number from 1 to 3, got 5"),
        (published.cooldown, (3, 2, "sqrt"), "curve must be linear, minus-sqrt, cosine or a"),
        (published.bema, (0,), "n must be a whole number from 1, got 0"),
    ],
)
def test_what_is_no_average_is_refused(
    average: Callable[..., Any], arguments: tuple[Any, ...], named: str
) -> None:
    """Shares that would sum to less than 1, or divide by 0."""
    with pytest.raises(ValueError, match=named):
        average(*arguments)


def test_bema_is_that_of_trl() -> None:
    """The rates of TRL's callback, with its defaults."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    callback = callbacks.BEMACallback(update_freq=1, min_ema_multiplier=0.0)
    average = PATH[0]
    for t, weight in enumerate(PATH[1:], 1):
        average += callback._ema_beta(t) * (weight - average)
    expected = average + callback._bema_alpha(N) * (PATH[-1] - PATH[0])
    assert published.bema(N) @ PATH == pytest.approx(expected, abs=1e-12)


def test_bema_by_files(tmp_path: Path) -> None:
    """An EMA with the rates of the paper, and its correction from the files of live and start."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([PATH[0]]))
    ema = EMA(model, dtype=torch.float64)
    live = EMA(model, 0.0, dtype=torch.float64)
    live.save(tmp_path / "start")
    for t, weight in enumerate(PATH[1:], 1):
        with torch.no_grad():
            model.w.fill_(weight)
        ema.update(decay=1 - (10 + t) ** -0.5)
    live.update()
    ema.save(tmp_path / "ema")
    live.save(tmp_path / "live")
    alpha = (10 + N) ** -0.2
    paths = [str(tmp_path / each) for each in ("ema", "live", "start", "out")]
    assert main(["average", *paths, f"--weights=1,{alpha},{-alpha}"]) == 0
    average = load_file(tmp_path / "out")["w"].item()
    assert average == pytest.approx(published.bema(N) @ PATH, abs=1e-12)
