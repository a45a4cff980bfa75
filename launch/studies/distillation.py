"""Few labels: a small student alone, with a teacher's soft targets, and with its own average."""

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
from dist_ema.recipes.distill import SoftTargetLoss

from . import digits
from .sizes import Cell, Size

__all__ = ["LABELLED", "METHODS", "run"]

LABELLED = 150  # training images whose labels are known; the others are images alone
DECAY = 0.99
METHODS = (
    "teacher",
    "student alone",
    "student + soft targets",
    "mean teacher",
    "student, all labels",
)
Pair = tuple[Tensor, Tensor]


def run(cell: Cell, size: Size, tick: digits.Tick) -> dict[str, Any]:
    """Test accuracy of live weights and of the average, after each training. 8 x 8 pixels."""
    task = digits.load(size, 8)
    few = replace(task, images=task.images[:LABELLED], labels=task.labels[:LABELLED])
    lesson = Lesson(task, few, cell.seed, size, tick)
    teacher, found = lesson.teach(16, lesson.labels)
    result = {"teacher": found}
    result["student alone"] = lesson.teach(8, lesson.labels)[1]
    soft = SoftTargetLoss(temperature=2.0)

    def with_soft_targets(model: nn.Module, pair: Pair) -> Tensor:
        images, _ = pair
        softly: Tensor = soft(model(images), digits.predict(teacher, images))
        return lesson.labels(model, pair) + softly

    result["student + soft targets"] = lesson.teach(8, with_soft_targets)[1]
    result["mean teacher"] = lesson.mean_teacher()
    result["student, all labels"] = lesson.teach(
        8, lambda model, pair: F.cross_entropy(model(pair[0]), pair[1])
    )[1]
    return result


class Lesson:
    """What all trainings share: the images, the labelled ones among them, and how they end."""

    def __init__(
        self, task: digits.Task, few: digits.Task, seed: int, size: Size, tick: digits.Tick
    ) -> None:
        self.task, self.few, self.seed, self.size, self.tick = task, few, seed, size, tick
        self.step = 0

    def labels(self, model: nn.Module, _: Pair) -> Tensor:
        """Cross entropy on 32 labelled images, drawn for this step."""
        generator = train.draw(self.seed, 77, self.step)
        rows = torch.randint(0, len(self.few.labels), (digits.BATCH,), generator=generator)
        return F.cross_entropy(
            model(train.augment(self.few.images[rows], generator)), self.few.labels[rows]
        )

    def stream(self, view: int = 0) -> Iterator[Pair]:
        for epoch in range(1, self.size.distill_epochs + 1):
            for pair in digits.batches(
                self.task, self.seed, epoch, self.size.steps_per_epoch, view=view
            ):
                self.step += 1
                yield pair

    def teach(self, width: int, loss: Any) -> tuple[nn.Module, dict[str, float]]:
        """Train, and return the average as a model, with its accuracy and that of live."""
        self.step = 0
        model, optimizer = digits.build(self.seed, width)
        ema = EMA(model, Debiased(DECAY), buffers="average")
        ema.attach(optimizer)
        digits.fit(
            model,
            optimizer,
            self.stream(),
            self.tick,
            lambda model, images, labels: loss(model, (images, labels)),
        )
        average = copy.deepcopy(model)
        ema.copy_to(average)
        return average, {
            "live": digits.accuracy(model, self.task),
            "average": digits.accuracy(average, self.task),
        }

    def mean_teacher(self) -> dict[str, float]:
        """The student learns from labels and its own average, which sees other augmentations."""
        self.step = 0
        model, optimizer = digits.build(self.seed, 8)
        teacher = copy.deepcopy(model)
        ema = EMA(model, Debiased(DECAY), buffers="average", into=teacher)
        ema.attach(optimizer)
        soft, whole = SoftTargetLoss(), self.size.distill_epochs * self.size.steps_per_epoch

        def loss(model: nn.Module, views: Tensor, labels: Tensor) -> Tensor:
            mine, other = views
            trust = min(1.0, 2 * self.step / whole)  # the average of a beginner knows nothing yet
            consistency: Tensor = soft(model(mine), digits.predict(teacher, other))
            return self.labels(model, (mine, labels)) + trust * consistency

        other = Lesson(self.task, self.few, self.seed, self.size, self.tick).stream(view=1)
        pairs = zip(self.stream(), other, strict=True)
        stream = ((torch.stack([mine, again]), labels) for (mine, labels), (again, _) in pairs)
        digits.fit(model, optimizer, stream, self.tick, loss)
        return {
            "live": digits.accuracy(model, self.task),
            "average": digits.accuracy(teacher, self.task),
        }
