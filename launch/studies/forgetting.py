"""Fine-tune on other classes: the average keeps the old ones longer, learns the new ones later."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dist_ema import EMA, Debiased, HalfLife

from . import digits
from .sizes import Cell, Size

__all__ = ["HALF_LIVES", "run"]

HALF_LIVES = (10, 30, 100, 300)  # steps
RATE, EVERY = 0.02, 15


def run(cell: Cell, size: Size, tick: digits.Tick) -> dict[str, Any]:
    """Accuracy on the test images of the first five digits and of the other five, among all ten
    answers.

    The averages begin as the model that knows the first five; nothing of those is seen again,
    BatchNorm's statistics are averaged with the weights.
    """
    task = digits.load(size)
    old, new = task.only(range(5)), task.only(range(5, 10))
    model, optimizer = digits.build(cell.seed)
    first = EMA(model, Debiased(0.99), buffers="average")
    first.attach(optimizer)
    for epoch in range(1, size.forget_epochs + 1):
        digits.fit(
            model, optimizer, digits.batches(old, cell.seed, epoch, size.steps_per_epoch), tick
        )
    first.detach()
    first.copy_to(model)
    _, optimizer = digits.build(cell.seed)
    optimizer = type(optimizer)(model.parameters(), lr=RATE, momentum=0.9)
    ema = EMA(model, decay=[HalfLife(each) for each in HALF_LIVES], buffers="average")
    ema.attach(optimizer)
    rows = [{"step": 0, **both(model, ema, old, new)}]
    epoch, steps = 0, 0
    while steps < size.forget_steps:
        epoch += 1
        for batch in digits.batches(new, cell.seed + 100, epoch, size.forget_steps - steps):
            digits.fit(model, optimizer, iter([batch]), tick)
            steps += 1
            if steps % EVERY == 0 or steps == size.forget_steps:
                rows.append({"step": steps, **both(model, ema, old, new)})
    return {"rows": rows}


def both(model: nn.Module, ema: EMA, old: digits.Task, new: digits.Task) -> dict[str, Any]:
    """[accuracy on the first five, on the other five] of live and of every average."""
    probe = copy.deepcopy(model)
    found = {"live": [digits.accuracy(probe, old), digits.accuracy(probe, new)]}
    for number, half in enumerate(HALF_LIVES):
        ema.copy_to(probe, number)
        found[f"half-life {half}"] = [digits.accuracy(probe, old), digits.accuracy(probe, new)]
    return found
