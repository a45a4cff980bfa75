"""Random programs: side stream and host thread give the bits of the inline update.

How to read a failure: the seed of the program is part of the test's name. `schedule(random=...)`
uses the same seed, and None of it means as late as waits allow.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA, Power

from . import load, needs, schedule

pytestmark = [needs, pytest.mark.filterwarnings("ignore:ema..*no update came")]

ACTIONS = ["step"] * 5 + ["skip", "clamp", "swap", "gather", "save", "later", "load", "update"]
ACTIONS += ["reset", "metrics", "stream", "allocate", "state", "place"]
OPTIONS: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16}, {"device": "cpu"}]


class Program:
    """One model, one EMA and all that could be seen of them, on the device until the end."""

    def __init__(self, seed: int, overlap: bool, folder: Path, options: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        self.device = torch.device("emulated", 0)
        layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)]
        self.model = nn.Sequential(*layers).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, fused=True)
        self.ema = EMA(self.model, [Power(gamma=1.0), 0.9], buffers="average", **options)
        self.ema.attach(self.optimizer, every=1 + seed % 2, guard=seed % 3 == 0, overlap=overlap)
        self.folder, self.seen, self.saved = folder, list[Any](), False
        self.streams = [torch.accelerator.current_stream(), torch.Stream(self.device)]
        self.noise: list[Tensor] = []

    def run(self, action: str, number: int) -> None:
        x = torch.linspace(-1, 1, 30, device=self.device).view(5, 6) + number
        if action in ("step", "skip", "clamp"):
            self.optimizer.found_inf = torch.tensor(float(action == "skip"), device=self.device)
            self.optimizer.grad_scale = None
            with torch.no_grad():
                self.model(x)  # moves the statistics
            for p in self.model.parameters():
                p.grad = (p.detach() * (number + 1)).sin()
            self.optimizer.step()
            if action == "clamp":
                self.ema.weights.settle()
                with torch.no_grad():
                    for p in self.model.parameters():
                        p.clamp_(-0.5, 0.5)
        elif action == "swap":
            with self.ema.swap(number % 2):
                self.seen += [p.detach().clone() for p in self.model.parameters()]
                self.seen.append(self.model.eval()(x).detach())
                self.model.train()
        elif action == "gather":
            self.seen += self.ema.gather(number % 2).values()
        elif action in ("save", "later"):
            self.ema.save(self.folder / "average", wait=action == "save")
            self.saved = True
        elif action == "load" and self.saved:
            self.ema.load(self.folder / "average")
        elif action == "update":
            self.ema.update(2.0)
        elif action == "reset":
            self.ema.reset()
        elif action == "metrics":
            self.seen.append(self.ema.metrics()["distance"])
        elif action == "state":
            averages = self.ema.state_dict()["averages"]
            self.seen += [v.clone() for v in averages["average_0"]["weights"].values()]
        elif action == "stream":
            before, after = self.streams
            after.wait_stream(before)
            torch.accelerator.set_stream(after)
            self.streams = [after, before]
        elif action == "allocate":
            size = 9 * 6 if number % 2 else 4 * 9
            self.noise = [torch.full((size,), float(number), device=self.device) for _ in range(4)]
        elif action == "place":
            self.model[number % 3].float()  # walks every parameter, and moves none
        self.seen += [p.detach().clone() for p in self.model.parameters()]


def play(seed: int, overlap: bool, folder: Path, options: dict[str, Any]) -> list[Any]:
    start = torch.accelerator.current_stream(torch.device("emulated", 0))
    chance, program = random.Random(seed), Program(seed, overlap, folder, options)
    try:
        for number in range(20):
            program.run(chance.choice(ACTIONS), number)
        program.seen += program.ema.gather().values()
        program.ema.detach()
        torch.accelerator.synchronize()
        return [v.cpu() if isinstance(v, Tensor) else v for v in program.seen]
    finally:
        torch.accelerator.set_stream(start)


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        pytest.param(seed, options, marks=[pytest.mark.rest] if (i + j) % 2 else [])
        for i, seed in enumerate([0, 4, 5])
        for j, options in enumerate(OPTIONS)
    ],
    ids=str,
)
def test_twenty_random_actions(seed: int, options: dict[str, Any], tmp_path: Path) -> None:
    load()
    want = play(seed, False, tmp_path / "inline", options)
    assert all(v.isfinite().all() for v in want if isinstance(v, Tensor))
    assert same(want, play(seed, True, tmp_path / "late", options))
    with schedule(random=0.1, seed=seed):
        assert same(want, play(seed, True, tmp_path / "random", options))
