"""FixRes: train on random crops at one resolution, test on whole images at others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import train
from torch import Tensor, nn

from dist_ema import EMA, Debiased
from dist_ema.recipes.batchnorm import recalibrate
from dist_ema.recipes.fixres import freeze_for_resolution

from . import digits
from .sizes import Cell, Size

__all__ = ["SIDES", "TRAINED", "run"]

TRAINED = 16
SIDES = (10, 12, 16, 20, 24, 32)
TUNED_EPOCHS, TUNED_RATE = 3, 0.01


def run(cell: Cell, size: Size, tick: digits.Tick) -> dict[str, Any]:
    """Test accuracy by side: the average as trained, with new BatchNorm statistics, fine-tuned."""
    sharp = digits.load(size, 32)
    model, optimizer = digits.build(cell.seed)
    ema = EMA(model, Debiased(0.99), buffers="average")
    ema.attach(optimizer)
    for epoch in range(1, size.resolution_epochs + 1):
        digits.fit(model, optimizer, crops(sharp, cell.seed, epoch, size.steps_per_epoch), tick)
    ema.detach()
    ema.copy_to(model)
    rows = []
    for side in SIDES:
        there = replace(
            sharp,
            images=digits.resize(sharp.images, side),
            test_images=digits.resize(sharp.test_images, side),
        )
        rows.append({"side": side, **at(model, there, cell.seed, size)})
        tick(size.resolution_epochs * size.steps_per_epoch // len(SIDES))
    return {"rows": rows}


def at(model: nn.Module, task: digits.Task, seed: int, size: Size) -> dict[str, float]:
    """Accuracy at one resolution, three times."""
    found = {"as trained": digits.accuracy(model, task)}
    other = copy.deepcopy(model)
    whole = [(task.images[i : i + 64], None) for i in range(0, len(task.images), 64)]
    recalibrate(other, whole, size.recalibrate, progress=False)
    found["recalibrated"] = digits.accuracy(other, task)
    tuned = copy.deepcopy(model)
    with freeze_for_resolution(tuned, classifier="5", norm="2.1") as frozen:
        optimizer = torch.optim.SGD(frozen.parameters(), lr=TUNED_RATE, momentum=0.9)
        for epoch in range(1, TUNED_EPOCHS + 1):
            order = torch.randperm(len(task.images), generator=train.draw(seed, 55, epoch)).split(
                digits.BATCH
            )
            stream = (
                (task.images[rows], task.labels[rows]) for rows in order[: size.steps_per_epoch]
            )
            digits.fit(tuned, optimizer, stream, lambda _: None)
    found["fine-tuned"] = digits.accuracy(tuned, task)
    return found


def crops(task: digits.Task, seed: int, epoch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of half to the whole side, at random places, at TRAINED pixels a side, with noise."""
    order = torch.randperm(len(task.images), generator=train.draw(seed, epoch)).split(digits.BATCH)
    for step, rows in enumerate(order[:steps]):
        generator, n = train.draw(seed, epoch, step + 1), len(rows)
        scale = 0.5 + 0.5 * torch.rand(n, generator=generator)
        shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale[:, None])
        zero = torch.zeros(n)
        first, second = (
            torch.stack([scale, zero, shift[:, 0]], 1),
            torch.stack([zero, scale, shift[:, 1]], 1),
        )
        grid = F.affine_grid(
            torch.stack([first, second], 1), [n, 1, TRAINED, TRAINED], align_corners=False
        )
        images = F.grid_sample(task.images[rows], grid, align_corners=False)
        yield images + 0.2 * torch.randn(images.shape, generator=generator), task.labels[rows]
