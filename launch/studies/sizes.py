"""What is run: cells, and how long each is. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DECAYS",
    "EXPERIMENTS",
    "FULL",
    "HEADLINE",
    "NOISES",
    "QUICK",
    "SMOKE",
    "Cell",
    "Size",
    "cells",
]

EXPERIMENTS = ("language", "table", "forgetting", "distillation", "resolution", "equivalence")
NOISES = (0, 20, 40)  # % of wrong training labels
DECAYS = (0.99, 0.995, 0.999)
HEADLINE = 0.995  # the average of the verdicts: chosen before the run, not the luckiest after it


@dataclass(frozen=True)
class Size:
    """How much of everything. Results of different sizes do not mix."""

    name: str
    seeds: int = 5
    epochs: int = 60  # of a run of the table
    steps_per_epoch: int = 42  # all training images, at a batch size of 32
    tests: int = 450  # images
    recalibrate: int = 16  # batches of 64 for BatchNorm statistics
    forget_epochs: int = 20  # on the first five digits
    forget_steps: int = 600  # on the other five
    distill_epochs: int = 40
    resolution_epochs: int = 20
    equivalence_epochs: int = 20
    gpt_steps: int = 1200
    gpt_decay: int = 200  # steps of a branch in which the learning rate falls to 0
    gpt_every: int = 50  # steps between evaluations, snapshots and checkpoints
    gpt_batch: int = 16  # windows of all ranks together
    gpt_width: int = 128
    gpt_layers: int = 5
    gpt_windows: int = 128  # of validation

    @property
    def gpt_ends(self) -> list[int]:
        """Where the decayed branches end: thirds of the run, on the grid of evaluations."""
        last = self.gpt_steps // self.gpt_every
        return [
            self.gpt_every * max(self.gpt_decay // self.gpt_every + 1, last * part // 3)
            for part in (1, 2, 3)
        ]


FULL = Size("full")
QUICK = Size(
    "quick",
    seeds=2,
    epochs=8,
    recalibrate=8,
    forget_epochs=6,
    forget_steps=120,
    distill_epochs=4,
    resolution_epochs=6,
    equivalence_epochs=4,
    gpt_steps=150,
    gpt_decay=25,
    gpt_every=25,
    gpt_windows=32,
)
SMOKE = Size(
    "smoke",
    seeds=2,
    epochs=3,
    steps_per_epoch=2,
    tests=40,
    recalibrate=1,
    forget_epochs=1,
    forget_steps=3,
    distill_epochs=1,
    resolution_epochs=1,
    equivalence_epochs=2,
    gpt_steps=9,
    gpt_decay=3,
    gpt_every=3,
    gpt_batch=4,
    gpt_width=32,
    gpt_layers=1,
    gpt_windows=4,
)


@dataclass(frozen=True)
class Cell:
    """One experiment in one variant with one seed: one file of results."""

    experiment: str
    variant: str
    seed: int
    cost: int  # in training steps of the digits task, for the progress bar

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.experiment, self.variant, str(self.seed)) if part)


def cells(size: Size, only: str | None = None) -> list[Cell]:
    """All cells of a study, or those of one experiment.

    The language model comes first: it takes two processes.
    """
    epoch, some = size.steps_per_epoch, range(size.seeds)
    branches = len(set(size.gpt_ends)) * size.gpt_decay
    found = [Cell("language", "", 0, GPT_COST * (size.gpt_steps + branches))]
    for noise in NOISES:
        found += [Cell("table", f"{noise}", seed, 2 * size.epochs * epoch) for seed in some]
        found += [Cell("table", f"{noise}-cosine", seed, size.epochs * epoch) for seed in some]
    found += [
        Cell("forgetting", "", seed, size.forget_epochs * epoch // 2 + size.forget_steps)
        for seed in some
    ]
    found += [Cell("distillation", "", seed, 5 * size.distill_epochs * epoch) for seed in some]
    found += [Cell("resolution", "", seed, 2 * size.resolution_epochs * epoch) for seed in some]
    found += [Cell("equivalence", "", seed, 2 * size.equivalence_epochs * epoch) for seed in some]
    return [cell for cell in found if only in (None, cell.experiment)]


GPT_COST = 20
