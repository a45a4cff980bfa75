"""What should make no difference: every 16th step, twice the batch, two bytes instead of four."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dist_ema import EMA

from . import digits
from .sizes import Cell, Size

__all__ = ["DECAY", "EVERY", "LONG", "run"]

EVERY, DECAY, LONG = 16, 0.99, 0.999
RATE, MOMENTUM = 0.05, 0.9  # of the batch of 32


def run(cell: Cell, size: Size, tick: digits.Tick) -> dict[str, Any]:
    """One run with all averages of batch 32, one of batch 64; both go on from a trained one."""
    task = digits.load(size)
    model, optimizer = digits.build(cell.seed)
    for epoch in range(1, size.equivalence_epochs // 2 + 1):
        digits.fit(
            model,
            optimizer,
            digits.batches(task, cell.seed + 100, epoch, size.steps_per_epoch),
            tick,
        )
    one = Watched(cell, size, task, copy.deepcopy(model), digits.BATCH, tick)
    two = Watched(cell, size, task, copy.deepcopy(model), 2 * digits.BATCH, tick)
    return {"shadows": one.shadows, "small": one.rows, "large": two.rows, "apart": apart(one, two)}


def apart(one: Watched, two: Watched) -> dict[str, float]:
    """The distance between the averages of both batches, as shares of the smaller one's way."""
    there = one.averages[LONG]
    way = float((there - one.start).norm())
    found = {
        str(decay): float((average - there).norm()) / way for decay, average in two.averages.items()
    }
    return found | {"live": float((two.live - one.live).norm()) / way}


class Watched:
    """A run, and what its averages were like."""

    def __init__(
        self,
        cell: Cell,
        size: Size,
        task: digits.Task,
        model: nn.Module,
        batch: int,
        tick: digits.Tick,
    ) -> None:
        self.task, self.size, self.model = task, size, model
        self.start = flat(self.model.parameters())
        larger = batch > digits.BATCH
        optimizer = scaled(self.model, batch // digits.BATCH)
        decays = [LONG**2, LONG] if larger else [DECAY, LONG]
        exact = EMA(self.model, decay=decays, buffers="average")
        exact.attach(optimizer)
        others = {} if larger else self.others(optimizer)
        self.rows: list[dict[str, float]] = []
        steps = size.steps_per_epoch * digits.BATCH // batch
        for epoch in range(1, size.equivalence_epochs + 1):
            digits.fit(
                self.model, optimizer, digits.batches(task, cell.seed, epoch, steps, batch), tick
            )
            self.rows += [
                {"epoch": epoch, "decay": decay, **self.look(exact, i)}
                for i, decay in enumerate(decays)
            ]
        self.live = flat(self.model.parameters())
        self.averages = {
            decay: self.weights(exact, number)[0] for number, decay in enumerate(decays)
        }
        self.shadows = [] if larger else self.compare(exact, others)

    def others(self, optimizer: torch.optim.Optimizer) -> dict[str, EMA]:
        """The same decays, another way."""
        rare = EMA(self.model, decay=[DECAY, LONG])
        rare.attach(optimizer, every=EVERY)
        compact = EMA(self.model, decay=[DECAY, LONG], dtype=torch.bfloat16)
        compact.attach(optimizer)
        self.nearest = Nearest(self.model, optimizer)
        return {f"every={EVERY}, decay corrected": rare, "bf16, stochastic rounding": compact}

    def look(self, ema: EMA, number: int) -> dict[str, float]:
        """The average's test loss, and how far it has come from where it began."""
        probe = copy.deepcopy(self.model)
        ema.copy_to(probe, number)
        loss = F.cross_entropy(digits.predict(probe, self.task.test_images), self.task.test_labels)
        return {"loss": float(loss), "gone": float((flat(probe.parameters()) - self.start).norm())}

    def compare(self, exact: EMA, others: dict[str, EMA]) -> list[dict[str, Any]]:
        """Every shadow against the fp32 one that was updated in each step, as shares of its way."""
        rows = []
        for number, decay in enumerate((DECAY, LONG)):
            reference, right = self.weights(exact, number)
            way = float((reference - self.start).norm())
            found = {name: self.weights(ema, number) for name, ema in others.items()}
            found["bf16, rounded to nearest"] = self.nearest.weights(self, number)
            live, live_right = flat(self.model.parameters()), self.right(copy.deepcopy(self.model))
            rows.append(
                {
                    "decay": decay,
                    "shadow": "fp32, every step",
                    "distance": 0.0,
                    "way": 1.0,
                    "accuracy": right,
                }
            )
            for name, (weights, accuracy) in (found | {"live": (live, live_right)}).items():
                apart, gone = (
                    float((weights - reference).norm()) / way,
                    float((weights - self.start).norm()) / way,
                )
                rows.append(
                    {
                        "decay": decay,
                        "shadow": name,
                        "distance": apart,
                        "way": gone,
                        "accuracy": accuracy,
                    }
                )
        return rows

    def weights(self, ema: EMA, number: int) -> tuple[Tensor, float]:
        """The averaged weights as one vector, and their accuracy with recalibrated statistics."""
        probe = copy.deepcopy(self.model)
        ema.copy_to(probe, number)
        return flat(probe.parameters()), self.right(probe)

    def right(self, probe: nn.Module) -> float:
        digits.restate(probe, self.task, self.size.recalibrate)
        return digits.accuracy(probe, self.task)


class Nearest:
    """What a shadow in bf16 does without stochastic rounding, by hand."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.shadows = [
            [p.detach().to(torch.bfloat16) for p in model.parameters()] for _ in (DECAY, LONG)
        ]
        optimizer.register_step_post_hook(lambda *_: self.update())

    @torch.no_grad()
    def update(self) -> None:
        for decay, shadows in zip((DECAY, LONG), self.shadows, strict=True):
            for shadow, p in zip(shadows, self.model.parameters(), strict=True):
                shadow.copy_(shadow.float().lerp(p, 1 - decay))

    @torch.no_grad()
    def weights(self, watched: Watched, number: int) -> tuple[Tensor, float]:
        probe = copy.deepcopy(watched.model)
        for p, shadow in zip(probe.parameters(), self.shadows[number], strict=True):
            p.copy_(shadow)
        return flat(probe.parameters()), watched.right(probe)


def scaled(model: nn.Module, times: int) -> torch.optim.SGD:
    """SGD for a batch that many times as large.

    Momentum is a decay too, and the sum of all steps grows with the batch.
    """
    momentum = MOMENTUM**times
    return torch.optim.SGD(
        model.parameters(), lr=times * RATE * (1 - momentum) / (1 - MOMENTUM), momentum=momentum
    )


def flat(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters]).double()
