"""Live weights against averages, with clean and wrong labels, from one training run each."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dist_ema import EMA, Debiased, Uniform

from . import digits
from .sizes import DECAYS, Cell, Size

__all__ = ["run"]


def run(cell: Cell, size: Size, tick: digits.Tick) -> dict[str, Any]:
    """Test accuracy of every kind of weights and BatchNorm statistics, and the last predictions as
    a string of digits.

    Every epoch of the last quarter is evaluated, in which fluctuation is measured, and every fifth
    before.
    """
    noise, _, cosine = cell.variant.partition("-")
    task = digits.load(size).with_wrong_labels(int(noise))
    model, optimizer = digits.build(cell.seed)
    late = size.epochs - max(3, size.epochs // 4)  # SWA averages what comes after that
    averages = Averages(model, optimizer, late, size.steps_per_epoch) if not cosine else None
    rows: list[dict[str, Any]] = []
    for epoch in range(1, size.epochs + 1):
        if cosine:
            rate = 0.5 + 0.5 * math.cos(math.pi * (epoch - 1) / size.epochs)
            optimizer.param_groups[0]["lr"] = digits.LR * rate
        stream = digits.batches(task, cell.seed, epoch, size.steps_per_epoch)
        digits.fit(model, optimizer, stream, tick)
        if epoch > late or epoch % 5 == 0:
            found = {
                name: digits.predict(each, task.test_images).argmax(1)
                for name, each in all_of(model, averages, task, size)
            }
            right = {
                name: float((said == task.test_labels).double().mean())
                for name, said in found.items()
            }
            rows.append({"epoch": epoch, "accuracy": right})
        if averages is not None:
            tick(size.steps_per_epoch)  # evaluation costs about as much as training
    said = {name: "".join(map(str, each.tolist())) for name, each in found.items()}
    return {"late": late, "rows": rows, "predictions": said}


class Averages:
    """Several decays in one pass, and the mean of the last quarter as an EMA that starts late."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, late: int, steps: int
    ) -> None:
        self.ema = EMA(model, decay=[Debiased(decay) for decay in DECAYS], buffers="average")
        self.ema.attach(optimizer)
        self.swa = EMA(model, decay=Uniform(), buffers="average")
        self.swa.attach(optimizer, start=late * steps, every=steps)

    def into(self, probe: nn.Module) -> Iterator[str]:
        """Write each average into `probe`, with averaged BatchNorm statistics; yields its name."""
        for number, decay in enumerate(DECAYS):
            self.ema.copy_to(probe, number)
            yield str(decay)
        if self.swa.now:
            self.swa.copy_to(probe)
            yield "swa"


def all_of(
    model: nn.Module, averages: Averages | None, task: digits.Task, size: Size
) -> Iterator[tuple[str, nn.Module]]:
    """(weights/statistics, the model that has them). copied: from live weights at that moment."""
    probe = copy.deepcopy(model)
    yield "live/own", probe
    digits.restate(probe, task, size.recalibrate)
    yield "live/recalibrated", probe
    for name in () if averages is None else averages.into(probe):
        yield f"{name}/averaged", probe
        copy_buffers(model, probe)
        yield f"{name}/copied", probe
        digits.restate(probe, task, size.recalibrate)
        yield f"{name}/recalibrated", probe


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    there: dict[str, Tensor] = dict(target.named_buffers())
    for name, buffer in source.named_buffers():
        there[name].copy_(buffer)
