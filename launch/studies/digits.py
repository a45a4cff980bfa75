"""The task of most experiments: scikit-learn's digits at 16 x 16, on launch/train.py's network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
import train
from torch import Tensor, nn

from dist_ema.recipes.batchnorm import recalibrate

from .sizes import Size

__all__ = [
    "BATCH",
    "LR",
    "Task",
    "accuracy",
    "batches",
    "build",
    "fit",
    "load",
    "predict",
    "resize",
    "restate",
]

BATCH, LR = 32, 0.1
Tick = Callable[[int], None]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """Images between 0 and 1 [N, 1, side, side], labels [N]."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def only(self, classes: range) -> Task:
        """Of these classes alone."""
        here, there = (
            torch.isin(each, torch.tensor(list(classes)))
            for each in (self.labels, self.test_labels)
        )
        return Task(
            self.images[here], self.labels[here], self.test_images[there], self.test_labels[there]
        )

    def with_wrong_labels(self, percent: int) -> Task:
        """That share of the training labels is another digit, the same ones for every seed."""
        generator, n = train.draw(9, percent), len(self.labels)
        wrong = torch.randperm(n, generator=generator)[: n * percent // 100]
        labels = self.labels.clone()
        labels[wrong] = (
            labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)
        ) % 10
        return replace(self, labels=labels)


def load(size: Size, side: int = 16) -> Task:
    digits, n = train.load_digits(torch.device("cpu")), size.tests
    tests = resize(digits.test_images[:n], side)
    return Task(resize(digits.images, side), digits.labels, tests, digits.test_labels[:n])


def resize(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def build(seed: int, width: int = 16, lr: float = LR) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(seed)
    model = train.Net(width)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batches(
    task: Task, seed: int, epoch: int, steps: int, size: int = BATCH, view: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images and labels, drawn from (seed, epoch, step) alone.

    view: the same images, augmented anew.
    """
    order = torch.randperm(len(task.images), generator=train.draw(seed, epoch))
    for step in range(min(steps, len(order) // size)):
        rows = order[step * size : (step + 1) * size]
        yield (
            train.augment(
                task.images[rows], train.draw(seed, epoch, step + 1, *[view] * (view > 0))
            ),
            task.labels[rows],
        )


def plain_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[tuple[Tensor, Tensor]],
    tick: Tick,
    loss: Loss = plain_loss,
) -> None:
    """One step per batch."""
    model.train()
    for images, labels in stream:
        optimizer.zero_grad()
        loss(model, images, labels).backward()
        optimizer.step()  # attached averages move right behind this
        tick(1)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, 10], in evaluation mode; the mode is left as it was."""
    mode = model.training
    model.eval()
    logits: Tensor = model(images)
    model.train(mode)
    return logits


def accuracy(model: nn.Module, task: Task) -> float:
    return float((predict(model, task.test_images).argmax(1) == task.test_labels).double().mean())


def restate(model: nn.Module, task: Task, count: int) -> None:
    """Population statistics for these weights over `count` batches of 64 augmented images."""
    stream = (batch for epoch in range(count) for batch in batches(task, 8, epoch + 1, count, 64))
    recalibrate(model, stream, count, progress=False)
