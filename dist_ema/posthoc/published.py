"""Averages from papers (EMA, tail, LAWA, WSM, BEMA) as arrays of every update's share. numpy alone.

A function takes the number of updates n and returns an array [n + 1]: entry 0 is the share of the
weights at the start, entry j that of the weights after update j. Each sums to 1. It is the impulse
response of the average: what is left after update n of a step that update j alone had made is the
sum of the entries from j on.

| Average | Here | Online, by `EMA` |
| --- | --- | --- |
| constant decay | `ema` | `Constant(decay)` |
| tail averaging, SWA | `tail` | `Uniform()` with `attach(start=)` |
| LAWA | `lawa` | `Window(k * every, blocks=k)` with `attach(every=)` |
| a decay of the learning rate (WSM) | `cooldown` | `Window(length, curve)` |
| BEMA | `bema` | `ema.update(decay=1 - beta)`, then `dist-ema average --weights=1,a,-a` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..schedules import Window

__all__ = ["bema", "cooldown", "ema", "lawa", "tail"]

Array: TypeAlias = "NDArray[np.float64]"


def _recursive(decays: Array) -> Array:
    """Shares of a_j = d_j a_(j-1) + (1 - d_j) w_j, where a_0 is the start."""
    kept = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # what survives from update j on
    return np.asarray(np.append(1.0, 1 - decays) * kept)


def _refuse_outside(least: int, most: float = math.inf, **counts: int) -> None:
    """Raise ValueError for numbers of updates or checkpoints that give no average."""
    for name, count in counts.items():
        if not least <= count <= most:
            limits = f"from {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name} must be a whole number {limits}, got {count!r}.")


def ema(n: int, decay: float) -> Array:
    """d^n for the start, (1 - d) d^(n - j) for update j: the exponential moving average.

    Args:
        n: The number of updates.
        decay: The share of the average that an update keeps, d.
    """
    _refuse_outside(0, n=n)
    return _recursive(np.full(n, decay))


def tail(n: int, start: int) -> Array:
    """1 / (n - start) for every update after `start` (Polyak and Juditsky 1992; SWA, 2018).

    Args:
        n: The number of updates.
        start: The last update that the mean leaves out.
    """
    _refuse_outside(1, n=n)
    _refuse_outside(0, n - 1, start=start)
    return np.where(np.arange(n + 1) > start, 1 / (n - start), 0.0)


def lawa(n: int, every: int, k: int) -> Array:
    """1 / k for each of the last k checkpoints, made every `every` updates (LAWA, 2209.14981).

    With fewer than k so far it is the mean of those.

    Args:
        n: The number of updates.
        every: Updates from one checkpoint to the next.
        k: The number of checkpoints in the mean.
    """
    _refuse_outside(1, n=n, k=k)
    _refuse_outside(1, n, every=every)
    steps = np.arange(n + 1)
    made = (steps > 0) & (steps % every == 0)
    chosen = made & (steps > (n // every - k) * every)
    return np.asarray(chosen / max(1, chosen.sum()))


def cooldown(n: int, length: int, curve: str | Callable[[float], float] = "linear") -> Array:
    """w_j - w_(j+1) for a curve w over the last `length` updates (WSM, 2507.17634).

    Entry j of the array is a difference of w, which is 1 at the first of these updates and 0 after
    the last: their sum is where a run ends whose every step was scaled by w. "linear" gives equal
    entries, "minus-sqrt" sqrt(i / length) - sqrt((i - 1) / length) to the i-th of them.

    Args:
        n: The number of updates.
        length: The number of updates in the window.
        curve: The name of a curve of `Window`, or a function on [0, 1].
    """
    _refuse_outside(1, n=n)
    _refuse_outside(1, n, length=length)
    window = Window(length, curve)
    scales = np.array([window.scale(j / length) for j in range(length + 1)])
    return np.append(np.zeros(n + 1 - length), scales[:-1] - scales[1:])


def bema(
    n: int, kappa: float = 0.5, eta: float = 0.2, lag: float = 10.0, gamma: float = 1.0
) -> Array:
    """EMA_n + alpha_n (w_n - w_0), with alpha_t = (lag + gamma t)^-eta (BEMA, 2508.00180).

    The EMA moves by beta_t = (lag + gamma t)^-kappa. The correction takes back the lag of the EMA
    behind a drift; the start needs its own copy for that.

    Args:
        n: The number of updates.
        kappa: The exponent of the EMA's weight.
        eta: The exponent of the correction.
        lag: The offset of both.
        gamma: The rate of both.
    """
    _refuse_outside(1, n=n)
    rate = lag + gamma * np.arange(1, n + 1)
    shares = _recursive(np.asarray(1 - rate**-kappa, np.float64))
    alpha = rate[-1] ** -eta
    shares[0] -= alpha
    shares[-1] += alpha
    return shares
