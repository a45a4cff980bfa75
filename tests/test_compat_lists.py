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
        noise = 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=F64)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.requires_grad or (tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)):
                    part, noise = noise[: tensor.numel()], noise[tensor.numel() :]
                    tensor += part.view(tensor.shape)
                elif not isinstance(tensor, nn.Parameter):
                    tensor += 1


def near(ours: Any, theirs: Any) -> bool:
    """Equal to 1e-6; to a bfloat16 step, where a weight of that dtype took the value."""
    pairs = list(zip(ours, theirs, strict=True))
    for narrow in (True, False):
        mine = [(a.reshape(-1), b.reshape(-1)) for a, b in pairs if (BF16 in (a.dtype, b.dtype)) == narrow]
        if mine:
            a, b = (torch.cat([each.detach().double() for each in side]) for side in zip(*mine, strict=True))
            if not torch.allclose(a, b, rtol=1e-2 if narrow else 1e-6, atol=1e-2 if narrow else 1e-6):
                return False
    return all(a.shape == b.shape for a, b in pairs)


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


def test_torch_ema_differs() -> None:
    """What is otherwise, on purpose: bfloat16 does not stall, integers are taken as they are, errors change nothing."""
    from torch_ema import ExponentialMovingAverage

    weight = nn.Parameter(torch.ones(4, dtype=BF16))
    theirs = ExponentialMovingAverage([weight], 0.999, use_num_updates=False)
    ours = torch_ema.ExponentialMovingAverage([weight], 0.999, use_num_updates=False)
    weight.data.fill_(1.5)
    for _ in range(100):
        theirs.update()
        ours.update()
    assert theirs.shadow_params[0].eq(1).all(), "the original stalls"
    assert near(ours.shadow_params, [torch.full((4,), 1.5 - 0.5 * 0.999**100)])

    codes = nn.Parameter(torch.arange(3), requires_grad=False)
    pair = [nn.Parameter(torch.ones(3)), codes]
    with pytest.raises(RuntimeError, match="can't be cast"):
        ExponentialMovingAverage(pair, 0.9).update()
    ours = torch_ema.ExponentialMovingAverage(pair, 0.9)
    ours.update()
    assert torch.equal(ours.shadow_params[1], codes)

    before = copy.deepcopy(ours.shadow_params)
    for state, words in (
        (ours.state_dict() | {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        (ours.state_dict() | {"num_updates": 1.0}, "num_updates must be an int or None, got 1.0"),
        (ours.state_dict() | {"shadow_params": before[:1]}, "holds 2 parameters, and 1 were given"),
        (ours.state_dict() | {"shadow_params": [before[0] + 1, torch.ones(4)]}, r"1 is \(4,\), and \(3,\) in the model"),
        (ours.state_dict() | {"collected_params": before[:1]}, "collected_params and shadow_params differ in number"),
    ):
        with pytest.raises(ValueError, match=words):
            ours.load_state_dict(state)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -1"):
        torch_ema.ExponentialMovingAverage(pair, -1)
    with pytest.raises(RuntimeError, match=r"restore\(\) without a store"):
        ours.restore()
    with pytest.raises(ValueError, match="holds 2 parameters, and 1 were given"):
        ours.update([codes])
    assert (ours.decay, same(ours.shadow_params, before)) == (0.9, True)
    ours.store()
    ours.to(dtype=F64)
    assert [kept.dtype for kept in ours.collected_params or []] == [F64, torch.int64]


# --- diffusers ---------------------------------------------------------------------------------------------------


class Diffusers(Play):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        pick = self.pick
        self.settings = {
            "decay": pick.choice([0.0, 0.5, 0.9999]),
            "min_decay": pick.choice([0.0, 0.3]),
            "update_after_step": pick.choice([0, 3]),
            "use_ema_warmup": pick.random() < 0.5,
            "inv_gamma": pick.choice([1, 2.0]),
            "power": pick.choice([2 / 3, 3 / 4, 1]),
            "foreach": False,  # the original's foreach refuses two dtypes in one list
        }
        self.theirs, self.ours = self.originals(), self.dropins()

    def originals(self) -> Any:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(self.its.parameters(), **self.settings)
        ema.to(dtype=F64 if any(parameter.dtype == F64 for parameter in self.its.parameters()) else F32)
        return ema

    def dropins(self) -> diffusers.EMAModel:
        given = self.mine.named_parameters() if self.seed % 2 else self.mine.parameters()
        return diffusers.EMAModel(given, **self.settings)

    def step(self) -> None:
        self.theirs.step(self.its.parameters())
        self.ours.step(self.mine.parameters())
        assert self.ours.cur_decay_value == self.theirs.cur_decay_value

    def evaluate(self) -> None:
        before = snapshot(self.mine)
        for ema, model in ((self.theirs, self.its), (self.ours, self.mine)):
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
        assert near(self.mine.parameters(), self.its.parameters())
        self.theirs.restore(self.its.parameters())
        self.ours.restore(self.mine.parameters())
        assert same(before, snapshot(self.mine))
        assert self.ours.temp_stored_params is None

    def resume(self) -> None:
        state, theirs = self.ours.state_dict(), self.theirs.state_dict()
        assert state.keys() == theirs.keys()
        self.settings |= {"decay": 0.7, "inv_gamma": 3.0}
        self.theirs, self.ours = self.originals(), self.dropins()
        self.theirs.load_state_dict(theirs)
        self.ours.load_state_dict(state if self.pick.random() < 0.5 else theirs)

    def cast(self) -> None:
        for ema in (self.theirs, self.ours):
            ema.to(dtype=F64)

    def check(self) -> None:
        assert near(self.ours.shadow_params, self.theirs.shadow_params)
        theirs = self.theirs.state_dict()
        assert all(theirs[key] == value for key, value in self.ours.state_dict().items() if key != "shadow_params")
        assert [self.ours.get_decay(n) for n in range(9)] == [self.theirs.get_decay(n) for n in range(9)]


def test_diffusers() -> None:
    for seed in range(SEQUENCES):
        play = Diffusers(seed)
        play.run([play.step] * 5 + [play.evaluate, play.resume, play.cast, play.freeze], play.check)


def tiny() -> Any:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Tiny(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

    return Tiny


@pytest.mark.parametrize("writer", ["theirs", "ours"])
def test_diffusers_files(writer: str, tmp_path: Path) -> None:
    """save_pretrained and from_pretrained, and what one writes the other reads."""
    from diffusers.training_utils import EMAModel

    kind = tiny()
    model = kind()
    write, read = (EMAModel, diffusers.EMAModel) if writer == "theirs" else (diffusers.EMAModel, EMAModel)
    ema = write(model.parameters(), decay=0.9, model_cls=kind, model_config=model.config, update_after_step=1)
    for seed in range(4):
        move([model], seed)
        ema.step(model.parameters())
    ema.save_pretrained(str(tmp_path / "ema"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if writer == "ours" else "error", FutureWarning)  # of the original, to itself
        again = read.from_pretrained(str(tmp_path / "ema"), kind)
    assert same(again.shadow_params, ema.shadow_params)
    assert (again.optimization_step, again.decay, again.update_after_step) == (4, 0.9, 1)
    move([model], 9)
    again.step(model.parameters())
    ema.step(model.parameters())
    assert near(again.shadow_params, ema.shadow_params)


def test_diffusers_arguments() -> None:
    """Older names, a module in place of its parameters, and what is refused, without a change."""
    model = nn.Linear(3, 3)
    ema = diffusers.EMAModel(model, max_value=0.8, min_value=0.1, device="cpu")
    assert (ema.decay, ema.min_decay, ema.use_ema_warmup) == (0.8, 0.1, True)
    assert isinstance(ema.average._average.engine, HostThread), "device= is where shadows are averaged"
    move([model], 0)
    ema.step(model)
    ema.step(model.parameters())
    assert near(ema.shadow_params, model.parameters())
    ema.pin_memory()
    with pytest.raises(TypeError, match="EMAModel takes no decays"):
        diffusers.EMAModel(model.parameters(), decays=0.9)
    with pytest.raises(RuntimeError, match=r"restore\(\) without a store"):
        ema.restore(model.parameters())
    with pytest.raises(ValueError, match="needs the model_cls and model_config"):
        ema.save_pretrained("nowhere")
    before, state = copy.deepcopy(ema.shadow_params), ema.state_dict()
    other = [tensor + 1 for tensor in before]
    for odd, words in (
        ({"decay": 2.0}, r"decay must be in \[0, 1\], got 2.0"),
        ({"optimization_step": 1.5}, "optimization_step must be int, got 1.5"),
        ({"use_ema_warmup": 1}, "use_ema_warmup must be bool, got 1"),
        ({"shadow_params": tuple(other)}, "shadow_params must be a list of tensors"),
        ({"shadow_params": [*other, other[0]]}, "holds 2 parameters, and 3 were given"),
        ({"shadow_params": other[::-1]}, "and"),
    ):
        with pytest.raises(ValueError, match=words):
            ema.load_state_dict(state | {"shadow_params": other, "power": 5} | odd)
    assert same(before, ema.shadow_params)
    assert ema.power == 2 / 3
    ema.shadow_params = other
    assert same(ema.shadow_params, other)
