"""Drop-ins that keep lists and tables, beside their originals: the same calls in the same random order, the same numbers.

How to read a failure: sequences are numbered, and the number is the seed of everything in them. Snippets that are no
package are written here in float64. What a drop-in does otherwise than its original is asserted as such.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, Ratio, load_file, shards
from dist_ema.compat import contrib, diffusers, ldm, shadow, torch_ema
from dist_ema.compat.listed import Listed, keep, put_back, source
from dist_ema.engine import HostThread
from dist_ema.recipes.batchnorm import recalibrate
from tests.kit import Collectives, Net, Oracle, Training, raises, run_ranks, same, snapshot, wrap

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SEQUENCES = 200


# --- models and what both sides do to them -----------------------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, a frozen one, a 0-dim one, an integer one, a channels_last one, BatchNorm; dtypes by chance."""

    def __init__(self, pick: random.Random, dtype: torch.dtype | None = None, codes: bool = True) -> None:
        super().__init__()
        dtypes = [dtype or pick.choice([F32, F32, F64, BF16]) for _ in range(3)]
        self.a, self.b = nn.Linear(3, 4, dtype=dtypes[0]), nn.Linear(4, 3, bias=False, dtype=dtypes[0])
        self.tied = self.a if pick.random() < 0.5 else self.b
        self.conv = nn.Conv2d(2, 3, 3, dtype=dtypes[1]).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtypes[2]))
        if codes:
            self.codes = nn.Parameter(torch.arange(5), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtypes[2]), requires_grad=pick.random() < 0.5)
        self.norm = nn.BatchNorm1d(3)


def move(models: list[nn.Module], seed: int) -> None:
    """What training does: the same step on both sides, to what floats; and the buffers go on."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                noise = torch.randn(tensor.shape, generator=generator, dtype=F64)
                if tensor.requires_grad or (tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)):
                    tensor += (0.1 * noise).to(tensor.dtype)
                elif not isinstance(tensor, nn.Parameter):
                    tensor += 1


def near(ours: Any, theirs: Any, narrow: torch.dtype | None = None) -> bool:
    """Equal to 1e-6 (to half a bfloat16 step, where a weight of that dtype took the value)."""
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(
        torch.allclose(a.double(), b.double(), *((1e-2, 1e-2) if narrow or BF16 in (a.dtype, b.dtype) else (1e-6, 1e-6)))
        for a, b in zip(ours, theirs, strict=True)
    )


def align(to: nn.Module, model: nn.Module) -> None:
    """The live weights of both sides may be apart by a rounding now; from here on they are the same again."""
    assert near(model.state_dict().values(), to.state_dict().values())
    to.load_state_dict(model.state_dict())


class Play:
    """Two copies of a model, the original on one and the drop-in on the other, and random calls on both."""

    def __init__(self, seed: int, **options: Any) -> None:
        self.pick = random.Random(seed)
        torch.manual_seed(seed)
        self.seed, self.count = seed, 0
        self.mine = Odd(self.pick, **options)
        self.its = copy.deepcopy(self.mine)

    def move(self) -> None:
        self.count += 1
        move([self.mine, self.its], 1000 * self.seed + self.count)

    def freeze(self) -> None:
        """What loops with a discriminator do: on and off at any time."""
        name = self.pick.choice(["frozen", "scale"])
        for model in (self.mine, self.its):
            getattr(model, name).requires_grad_(not getattr(model, name).requires_grad)

    def run(self, calls: list[Callable[[], None]], check: Callable[[], None], length: int = 8) -> None:
        for _ in range(length):
            self.move()
            self.pick.choice(calls)()
            check()


# --- torch_ema ---------------------------------------------------------------------------------------------------


class TorchEma(Play):
    def __init__(self, seed: int) -> None:
        super().__init__(seed, codes=False)  # the original raises at integers
        self.decay, self.counts = self.pick.choice([0.0, 0.5, 0.9, 0.999]), self.pick.random() < 0.7
        self.theirs, self.ours = self.originals(self.its), self.dropins(self.mine)

    def originals(self, model: nn.Module) -> Any:
        from torch_ema import ExponentialMovingAverage

        ema = ExponentialMovingAverage(model.parameters(), self.decay, self.counts)
        ema.shadow_params = [shadow.to(self.wide()) if shadow.is_floating_point() else shadow for shadow in ema.shadow_params]
        return ema  # NOTE: of what is to be compared, that is the one difference: bfloat16 shadows stall

    def wide(self) -> torch.dtype:
        return F64 if any(parameter.dtype == F64 for parameter in self.mine.parameters()) else F32

    def dropins(self, model: nn.Module) -> torch_ema.ExponentialMovingAverage:
        given = self.pick.choice([model.parameters, model.named_parameters, lambda: model, lambda: [*model.parameters()]])
        return torch_ema.ExponentialMovingAverage(given(), self.decay, self.counts)

    def update(self) -> None:
        given = self.pick.random() < 0.5
        self.theirs.update(self.its.parameters() if given else None)
        self.ours.update(self.mine.parameters() if given else None)

    def evaluate(self) -> None:
        before = snapshot(self.mine)
        with self.ours.average_parameters(), self.theirs.average_parameters():
            assert near(self.mine.parameters(), self.its.parameters())
        assert same(before, snapshot(self.mine))

    def borrow(self) -> None:
        """In three calls, and with a step between."""
        before = snapshot(self.mine)
        for ema, model in ((self.theirs, self.its), (self.ours, self.mine)):
            ema.store(model.parameters() if self.seed % 2 else None)
            ema.copy_to(model.parameters() if self.seed % 2 else None)
        assert near(self.mine.parameters(), self.its.parameters())
        self.move()
        self.theirs.restore()
        self.ours.restore()
        floats = [i for i, parameter in enumerate(self.mine.parameters()) if parameter.is_floating_point()]
        after = [*self.mine.parameters()]
        assert near([after[i] for i in floats], [before[i].view_as(after[i]) if after[i].dim() < 4 else after[i] for i in floats])

    def hand_over(self) -> None:
        """copy_to another model, and update from one."""
        mine, its = copy.deepcopy(self.mine), copy.deepcopy(self.its)
        move([mine, its], self.seed)
        self.theirs.copy_to(its.parameters())
        self.ours.copy_to(mine.parameters())
        assert near(mine.parameters(), its.parameters())
        align(its, mine)
        self.theirs.update(its.parameters())
        self.ours.update(mine.parameters())

    def resume(self) -> None:
        kept = self.theirs.collected_params  # with graphs, so that the original cannot load what it saved after a store()
        self.theirs.collected_params = kept and [tensor.detach() for tensor in kept]
        state, theirs = copy.deepcopy(self.ours.state_dict()), copy.deepcopy(self.theirs.state_dict())
        assert state.keys() == theirs.keys()
        self.theirs, self.ours = self.originals(self.its), self.dropins(self.mine)
        self.theirs.load_state_dict(theirs)
        self.theirs.shadow_params = [t.to(self.wide()) if t.is_floating_point() else t for t in theirs["shadow_params"]]
        self.ours.load_state_dict(state if self.pick.random() < 0.5 else theirs)

    def cast(self) -> None:
        for ema in (self.theirs, self.ours):
            ema.to(dtype=F64)

    def check(self) -> None:
        assert near(self.ours.shadow_params, self.theirs.shadow_params)
        assert (self.ours.num_updates, self.ours.decay) == (self.theirs.num_updates, self.theirs.decay)
        assert [t.shape for t in self.ours.shadow_params] == [t.shape for t in self.theirs.shadow_params]


def test_torch_ema() -> None:
    for seed in range(SEQUENCES):
        play = TorchEma(seed)
        calls = [play.update] * 4 + [play.evaluate, play.borrow, play.hand_over, play.resume, play.cast, play.freeze]
        play.run(calls, play.check)
