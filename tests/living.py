"""What the tests of living models share: a naive average, and the only two outcomes that are
allowed.

How to read a failure: "silent" is a wrong number without a word, and the difference follows. "does
not name" is an error that leaves the user searching. A program is marked red in the table beside
it, with what was seen; remove its entry when the program is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA, load_file

DECAY = 0.75
State = dict[str, Tensor]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """All names of trainable weights, aliases too."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if p.requires_grad and p.is_floating_point()}


class Naive:
    """A float64 copy made anew from `state_dict()` at every update; what is not trained is
    live's.
    """

    def __init__(self, model: nn.Module, decay: float = DECAY) -> None:
        self.model, self.decay = model, decay
        self._seen: dict[str, nn.Parameter] = {}
        self.average: State = {}
        self.rescan()

    def rescan(self) -> None:
        """Names whose Parameter is another one begin with its value; names that are gone are
        dropped.

        Tied names hold one average.
        """
        found, state = trained(self.model), self.state()
        kept = {id(p): self.average[name] for name, p in found.items() if self._seen.get(name) is p}
        self.average = {name: kept.get(id(p), state[name]) for name, p in found.items()}
        self._seen = found

    def state(self) -> State:
        return {
            name: value.detach().to(torch.float64).clone() if value.is_floating_point() else value
            for name, value in self.model.state_dict().items()
            if isinstance(value, Tensor)
        }

    def update(self, decay: float | None = None) -> None:
        decay, state = self.decay if decay is None else decay, self.state()
        for name in self.average.keys() & state.keys():
            old, live = self.average[name], state[name]
            self.average[name] = (
                decay * old + (1 - decay) * live if old.shape == live.shape else live
            )

    def full(self) -> State:
        return self.state() | {
            name: self.average[name] for name in self.average.keys() & self.state().keys()
        }

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """The largest difference to these weights; inf where a name or a shape differs."""
        return distance(self.full(), weights)


def distance(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest absolute difference; inf where names or shapes differ."""
    if want.keys() != got.keys() or any(want[name].shape != got[name].shape for name in want):
        return math.inf
    values = [
        float((want[name].double() - got[name].double()).abs().nan_to_num(math.inf).max())
        for name in want
        if want[name].numel()
    ]
    return max(values, default=0.0)


def outcome(
    program: Callable[[], float], names: Iterable[str] = (), tolerance: float = 2e-5
) -> str:
    """'equal' or 'raised'; anything else fails: a silent difference, or an error that names no
    weight.
    """
    names = list(names)
    try:
        off = program()
    except (RuntimeError, ValueError) as error:
        message = str(error)
        assert any(name in message for name in names), f"does not name one of {names}: {message}"
        return "raised"
    assert off <= tolerance, f"silent: off by {off:.4g}"
    return "equal"


def parts(weights: Mapping[str, Tensor]) -> list[str]:
    """Names that an error may use."""
    return sorted(weights)


def programs(table: Mapping[str, Any], red: Mapping[str, str]) -> Any:
    """Parametrize over a table of programs; those of `red` are expected to fail, with what was
    seen.
    """
    assert red.keys() <= table.keys(), f"no such program: {red.keys() - table.keys()}"
    return [
        pytest.param(
            value,
            id=name,
            marks=[pytest.mark.xfail(strict=True, reason=red[name])] if name in red else [],
        )
        for name, value in table.items()
    ]


def random_step(optimizer: torch.optim.Optimizer) -> None:
    """A step with random gradients for all weights of the optimizer, whether or not a forward
    reaches them.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


class Program:
    """A model, its optimizer, an attached EMA and the naive average beside it."""

    def __init__(
        self, model: nn.Module, decay: float = DECAY, lr: float = 0.1, **options: Any
    ) -> None:
        torch.manual_seed(1)
        self.model, self.lr = model, lr
        self.naive, self.ema = Naive(model, decay), EMA(model, decay, **options)
        self.renew()

    def renew(self) -> None:
        """A new optimizer over what is trained now."""
        self.ema.detach()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(weights, lr=self.lr)
        self.ema.attach(self.optimizer)

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            random_step(self.optimizer)
            self.naive.update()

    def gather(self) -> float:
        return self.naive.error(self.ema.gather())

    def swap(self) -> float:
        """What the block sees, and what is there after it."""
        want, before = self.naive.full(), self.naive.state()
        with self.ema.swap():
            seen = self.naive.state()
        return max(distance(want, seen), distance(before, self.naive.state()))

    def export(self, folder: Path) -> float:
        self.ema.export(folder / "export")
        return self.naive.error(load_file(folder / "export"))

    def save(self, folder: Path) -> float:
        self.ema.save(folder / "save")
        return self.naive.error(load_file(folder / "save"))

    def verbs(self, folder: Path) -> dict[str, Callable[[], float]]:
        return {
            "gather": self.gather,
            "swap": self.swap,
            "export": lambda: self.export(folder),
            "save": lambda: self.save(folder),
        }
