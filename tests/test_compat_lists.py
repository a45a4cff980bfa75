"""Drop-ins that keep lists and tables, beside their originals: the same calls in the same random
order, the same numbers.

How to read a failure: sequences are numbered, and the number is the seed of everything in them.
Snippets that are no package are written here in float64. What a drop-in does otherwise than its
original is asserted as such.
"""

from __future__ import annotations

import copy
import pickle
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

from dist_ema import EMA
from dist_ema.averaging.engines import HostThread
from dist_ema.compat import contrib, diffusers, ldm, shadow, torch_ema
from dist_ema.compat._parameter_list import ParameterListAverage
from dist_ema.distributed import collectives
from dist_ema.sharding import wrappers
from tests._models import Net
from tests._oracle import Collectives, Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.conftest import Seeds
from tests.test_compat_modules import Watch

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SEQUENCES = 200  # a quarter of them without `--all`


# --- models and what both sides do to them --------------------------------------------------------


class Odd(nn.Module):
    """Tied weights, a frozen one, a 0-dim one, an integer one, a channels_last one, BatchNorm;
    dtypes by chance.
    """

    def __init__(
        self, pick: random.Random, dtype: torch.dtype | None = None, codes: bool = True
    ) -> None:
        super().__init__()
        dtypes = [dtype or pick.choice([F32, F32, F64, BF16]) for _ in range(3)]
        self.a, self.b = (
            nn.Linear(3, 4, dtype=dtypes[0]),
            nn.Linear(4, 3, bias=False, dtype=dtypes[0]),
        )
        self.tied = self.a if pick.random() < 0.5 else self.b
        self.conv = nn.Conv2d(2, 3, 3, dtype=dtypes[1]).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtypes[2]))
        if codes:
            self.codes = nn.Parameter(torch.arange(5), requires_grad=False)
        self.frozen = nn.Parameter(
            torch.randn(3, dtype=dtypes[2]), requires_grad=pick.random() < 0.5
        )
        self.norm = nn.BatchNorm1d(3)


def move(models: list[nn.Module], seed: int) -> None:
    """What training does: the same step on both sides, to what floats; and the buffers go on."""
    for model in models:
        noise = 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=F64)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.requires_grad or (
                    tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
                ):
                    part, noise = noise[: tensor.numel()], noise[tensor.numel() :]
                    tensor += part.view(tensor.shape)
                elif not isinstance(tensor, nn.Parameter):
                    tensor += 1


def near(ours: Any, theirs: Any) -> bool:
    """Equal to 1e-6; to a bfloat16 step, where a weight of that dtype took the value."""
    pairs = list(zip(ours, theirs, strict=True))
    for narrow in (True, False):
        mine = [
            (a.reshape(-1), b.reshape(-1))
            for a, b in pairs
            if (BF16 in (a.dtype, b.dtype)) == narrow
        ]
        if mine:
            a, b = (
                torch.cat([each.detach().double() for each in side])
                for side in zip(*mine, strict=True)
            )
            if not torch.allclose(
                a, b, rtol=1e-2 if narrow else 1e-6, atol=1e-2 if narrow else 1e-6
            ):
                return False
    return all(a.shape == b.shape for a, b in pairs)


def align(to: nn.Module, model: nn.Module) -> None:
    """The live weights of both sides may be apart by a rounding now; from here on they are the same
    again.
    """
    assert near(model.state_dict().values(), to.state_dict().values())
    to.load_state_dict(model.state_dict())


class Play:
    """Two copies of a model, the original on one and the drop-in on the other, and random calls on
    both.
    """

    ours: Any
    theirs: Any

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

    def cast(self) -> None:
        for ema in (self.theirs, self.ours):
            ema.to(dtype=F64)

    def run(
        self, calls: list[Callable[[], None]], check: Callable[[], None], length: int = 8
    ) -> None:
        for _ in range(length):
            self.move()
            self.pick.choice(calls)()
            check()


# --- torch_ema ------------------------------------------------------------------------------------


class TorchEma(Play):
    def __init__(self, seed: int) -> None:
        super().__init__(seed, codes=False)  # the original raises at integers
        self.decay, self.counts = self.pick.choice([0.0, 0.5, 0.9, 0.999]), self.pick.random() < 0.7
        self.theirs, self.ours = self.originals(self.its), self.dropins(self.mine)

    def originals(self, model: nn.Module) -> Any:
        from torch_ema import ExponentialMovingAverage

        ema = ExponentialMovingAverage(model.parameters(), self.decay, self.counts)
        ema.shadow_params = [
            shadow.to(self.wide()) if shadow.is_floating_point() else shadow
            for shadow in ema.shadow_params
        ]
        return ema  # NOTE: the one difference of what is compared: bfloat16 shadows stall

    def wide(self) -> torch.dtype:
        return F64 if any(parameter.dtype == F64 for parameter in self.mine.parameters()) else F32

    def dropins(self, model: nn.Module) -> torch_ema.ExponentialMovingAverage:
        given = self.pick.choice(
            [model.parameters, model.named_parameters, lambda: model, lambda: [*model.parameters()]]
        )
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
        floats = [
            i for i, parameter in enumerate(self.mine.parameters()) if parameter.is_floating_point()
        ]
        after = [*self.mine.parameters()]
        assert near(
            [after[i] for i in floats],
            [before[i].view_as(after[i]) if after[i].dim() < 4 else after[i] for i in floats],
        )

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
        kept = (
            self.theirs.collected_params
        )  # with graphs, so that the original cannot load what it saved after a store()
        self.theirs.collected_params = kept and [tensor.detach() for tensor in kept]
        state, theirs = (
            copy.deepcopy(self.ours.state_dict()),
            copy.deepcopy(self.theirs.state_dict()),
        )
        assert state.keys() == theirs.keys()
        self.theirs, self.ours = self.originals(self.its), self.dropins(self.mine)
        self.theirs.load_state_dict(theirs)
        self.theirs.shadow_params = [
            t.to(self.wide()) if t.is_floating_point() else t for t in theirs["shadow_params"]
        ]
        self.ours.load_state_dict(state if self.pick.random() < 0.5 else theirs)

    def check(self) -> None:
        assert near(self.ours.shadow_params, self.theirs.shadow_params)
        assert (self.ours.num_updates, self.ours.decay) == (
            self.theirs.num_updates,
            self.theirs.decay,
        )
        assert [t.shape for t in self.ours.shadow_params] == [
            t.shape for t in self.theirs.shadow_params
        ]


def test_torch_ema(seeds: Seeds) -> None:
    for seed in seeds(SEQUENCES):
        play = TorchEma(seed)
        calls = [play.update] * 4 + [
            play.evaluate,
            play.borrow,
            play.hand_over,
            play.resume,
            play.cast,
            play.freeze,
        ]
        play.run(calls, play.check)


def test_torch_ema_differs() -> None:
    """What is otherwise, on purpose: bfloat16 does not stall, integers are taken as they are,
    errors change nothing.
    """
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
        (
            ours.state_dict() | {"shadow_params": [before[0] + 1, torch.ones(4)]},
            r"1 is \(4,\), and \(3,\) in the model",
        ),
        (
            ours.state_dict() | {"collected_params": before[:1]},
            "collected_params and shadow_params differ in number",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            ours.load_state_dict(state)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -1"):
        torch_ema.ExponentialMovingAverage(pair, -1)
    with pytest.raises(RuntimeError, match=r"call store\(\) first"):
        ours.restore()
    with pytest.raises(ValueError, match="holds 2 parameters, and 1 were given"):
        ours.update([codes])
    assert (ours.decay, same(ours.shadow_params, before)) == (0.9, True)
    ours.store()
    ours.to(dtype=F64)
    assert [kept.dtype for kept in ours.collected_params or []] == [F64, torch.int64]


def test_torch_ema_blocks_may_be_nested() -> None:
    """Each block gives back what it found; the original leaves the average in the model."""
    weight = nn.Parameter(torch.zeros(3))
    ours = torch_ema.ExponentialMovingAverage([weight], 0.5, use_num_updates=False)
    with torch.no_grad():
        weight += 8
    ours.update()
    state = ours.state_dict()
    with ours.average_parameters():
        with ours.average_parameters():
            assert weight.eq(4).all()
        assert weight.eq(4).all()
        ours.load_state_dict(state)
    assert weight.eq(8).all()


def test_torch_ema_in_float16() -> None:
    """Shadows take the dtype as the original's do, go on in it, and keep it in copies and after a
    cast of the weights.
    """
    from torch_ema import ExponentialMovingAverage

    model = nn.Linear(11, 3)
    both = [
        of(model.parameters(), 0.9, False)
        for of in (ExponentialMovingAverage, torch_ema.ExponentialMovingAverage)
    ]
    for ema in both:
        ema.to(dtype=torch.float16)
    theirs, ours = both
    assert [t.dtype for t in ours.shadow_params] == [t.dtype for t in theirs.shadow_params]
    assert {t.dtype for t in ours.shadow_params} == {torch.float16}
    want = model.weight.detach().double()
    for seed in range(20):
        move([model], seed)
        for ema in both:
            ema.update()
        want = 0.9 * want + 0.1 * model.weight.detach().double()
    assert torch.allclose(ours.shadow_params[0].double(), want, rtol=0, atol=2e-3)
    kept = ours.shadow_params[0].clone()
    twin, again = copy.deepcopy((model, ours))
    assert torch.equal(again.shadow_params[0], kept)
    twin.double()
    again.update(twin.parameters())
    assert {t.dtype for t in again.shadow_params} == {torch.float16}
    ours.shadow_params[0].zero_()
    assert ours.shadow_params[0].eq(0).all(), "the list is the average, in this dtype too"
    ours.to(dtype=F64)
    assert {t.dtype for t in ours.shadow_params} == {F64}
    with pytest.raises(ValueError, match="dtype must be"):
        ours.to(dtype=torch.int8)


# --- diffusers ------------------------------------------------------------------------------------


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
        ema.to(
            dtype=F64 if any(parameter.dtype == F64 for parameter in self.its.parameters()) else F32
        )
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

    def check(self) -> None:
        assert near(self.ours.shadow_params, self.theirs.shadow_params)
        theirs = self.theirs.state_dict()
        assert all(
            theirs[key] == value
            for key, value in self.ours.state_dict().items()
            if key != "shadow_params"
        )
        assert [self.ours.get_decay(n) for n in range(9)] == [
            self.theirs.get_decay(n) for n in range(9)
        ]


def test_diffusers(seeds: Seeds) -> None:
    for seed in seeds(SEQUENCES):
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
    write, read = (
        (EMAModel, diffusers.EMAModel) if writer == "theirs" else (diffusers.EMAModel, EMAModel)
    )
    ema = write(
        model.parameters(),
        decay=0.9,
        model_cls=kind,
        model_config=model.config,
        update_after_step=1,
    )
    for seed in range(4):
        move([model], seed)
        ema.step(model.parameters())
    ema.save_pretrained(str(tmp_path / "ema"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore" if writer == "ours" else "error", FutureWarning
        )  # of the original, to itself
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
    assert isinstance(ema.average.weights.updates.engine, HostThread), (
        "device= is where shadows are averaged"
    )
    move([model], 0)
    ema.step(model)
    ema.step(model.parameters())
    assert near(ema.shadow_params, model.parameters())
    ema.pin_memory()
    with pytest.raises(TypeError, match="EMAModel takes no decays"):
        diffusers.EMAModel(model.parameters(), decays=0.9)
    with pytest.raises(RuntimeError, match=r"call store\(\) first"):
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


# --- snippets, in float64 -------------------------------------------------------------------------


class Table:
    """What the snippets compute: a float64 number for each element of what `chosen` yields."""

    def __init__(
        self, model: nn.Module, chosen: Callable[[nn.Module], list[tuple[str, Tensor]]]
    ) -> None:
        self._model, self._chosen = model, chosen
        self.values = {name: tensor.detach().double().clone() for name, tensor in chosen(model)}

    def move(self, decay: float) -> None:
        for name, tensor in self._chosen(self._model):
            if name in self.values:
                self.values[name] = (
                    decay * self.values[name] + (1 - decay) * tensor.detach().double()
                )

    def equals(self, table: dict[str, Tensor]) -> bool:
        return table.keys() == self.values.keys() and near(
            [table[name] for name in self.values], self.values.values()
        )


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = [
        (name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()
    ]
    return trained(model) + buffers


@pytest.mark.parametrize("counted", [True, False])
def test_lit_ema(counted: bool, seeds: Seeds) -> None:
    """decay and num_updates as buffers, shadows under names without dots; saved, loaded, lent,
    given back.
    """
    for seed in seeds(SEQUENCES // 2):
        play = Play(seed, codes=False)
        model, decay = play.mine, play.pick.choice([0.0, 0.5, 0.9, 0.9999])
        ema, table, n = ldm.LitEma(model, decay, counted), Table(model, trained), 0
        for _ in range(5):
            play.move()
            call = play.pick.choice(["forward", "forward", "lend", "resume", "cast", "reset"])
            if call == "forward":
                ema(model)
                n += 1
                table.move(min(decay, (1 + n) / (10 + n)) if counted else decay)
            elif call == "lend":
                lend_and_restore(ema, model, table)
            elif call == "resume":
                state = copy.deepcopy(ema.state_dict())
                ema = ldm.LitEma(model, 0.25, use_num_updates=not counted)
                ema.load_state_dict(state, assign=play.pick.random() < 0.5)
            elif call == "cast":
                ema.half() if play.pick.random() < 0.5 else ema.to("cpu", F64)
            elif counted:
                ema.reset_num_updates()
                n = 0
            assert (int(ema.num_updates), ema.decay.dtype) == (n if counted else -1, F32)
            shown = dict(ema.named_buffers())
            assert table.equals({name: shown[short] for name, short in ema.m_name2s_name.items()})
            assert list(ema.state_dict())[:3] == [
                "decay",
                "num_updates",
                next(iter(ema.m_name2s_name.values())),
            ]


def lend_and_restore(ema: ldm.LitEma, model: nn.Module, table: Table) -> None:
    before, other = snapshot(model), copy.deepcopy(model)
    ema.copy_to(other)
    assert same([*other.buffers()], [*model.buffers()])
    ema.store(model.parameters())
    ema.copy_to(model)
    assert table.equals(dict(trained(model)))
    assert same(snapshot(other), snapshot(model))
    ema.restore(model.parameters())
    assert same(before, snapshot(model))


def test_lit_ema_inside_a_module() -> None:
    """Saved and loaded with what is around it, under the original's keys; nothing of the model is
    in there twice.
    """

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.model_ema = ldm.LitEma(self.model, 0.9)

    around = Around()
    assert len([*around.parameters()]) == 4
    move([around.model], 0)
    around.model_ema(around.model)
    keys = ["0weight", "0bias", "1weight", "1bias"]
    state = around.state_dict()
    assert [k for k in state if k.startswith("model_ema.")] == [
        f"model_ema.{k}" for k in ("decay", "num_updates", *keys)
    ]
    again = Around()
    again.load_state_dict(state)
    move([again.model], 1)
    again.model_ema(again.model)
    assert int(again.model_ema.num_updates) == 2
    assert near(
        [again.model_ema.average.gather()["0.bias"]],
        [state["model_ema.0bias"] * 0.25 + again.model[0].bias * 0.75],
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(
            {key: value for key, value in state.items() if key != "model_ema.0bias"}
        )


def test_lit_ema_asks_the_device_once() -> None:
    """The count is read when somebody else wrote it, and not at every update. Guards `Count`."""
    model = nn.Linear(2, 2)
    ema = ldm.LitEma(model, 0.9)
    ema(model)
    with Watch() as watch:
        ema(model)
    assert watch.reads == 0
    ema.num_updates.fill_(7)
    with Watch() as watch:
        ema(model)
    assert (watch.reads, int(ema.num_updates)) == (1, 8)


def test_lit_ema_refuses() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    ema = ldm.LitEma(model)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        ldm.LitEma(model, 2)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match="the model and the average differ in 1.weight, 1.bias"):
        ema(model)
    with pytest.raises(ValueError, match=r"differ in 0\.weight"):
        ema(model[0])
    for name in ("decay", "num_updates"):
        odd = nn.ParameterDict({"a_b": torch.ones(1), name: torch.ones(1)})
        with pytest.raises(ValueError, match=f"{name}: without dots the name is taken"):
            ldm.LitEma(odd)
    twice = nn.ModuleDict({"a": nn.ParameterDict({"b": torch.ones(1)})})
    twice.register_parameter("ab", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"ab, a\.b: without dots"):
        ldm.LitEma(twice)


def test_shadow(seeds: Seeds) -> None:
    """register, update, apply_shadow, restore; and the shadow table saved and put back."""
    for seed in seeds(SEQUENCES):
        play = Play(seed, codes=False)
        model, decay = play.mine, play.pick.choice([0.0, 0.5, 0.9, 0.9999])
        ema = shadow.EMA(model, decay)
        assert ema.shadow == {}
        ema.register()
        table = Table(model, trained)
        for _ in range(5):
            play.move()
            call = play.pick.choice(["update", "update", "apply", "resume", "register"])
            if call == "update":
                ema.update()
                table.move(decay)
            elif call == "apply":
                before, objects = snapshot(model), [*model.parameters()]
                ema.apply_shadow()
                assert table.equals(dict(trained(model)))
                assert ema.backup.keys() == ema.shadow.keys()
                ema.restore()
                assert same(before, snapshot(model))
                assert ema.backup == {}
                assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
            elif call == "resume":
                kept = copy.deepcopy(ema.shadow)
                ema = shadow.EMA(model, decay)
                ema.shadow = kept
            else:
                ema.register()
                table = Table(model, trained)
            assert table.equals(ema.shadow)


def test_shadow_of_a_state(seeds: Seeds) -> None:
    """ModelEMA averages buffers too, and leaves integers and frozen weights to the model."""
    for seed in seeds(SEQUENCES):
        play = Play(seed)
        model, decay = play.mine, play.pick.choice([0.0, 0.5, 0.9, 0.9999])
        ema, table = shadow.ModelEMA(model, decay), Table(model, floating)
        for _ in range(4):
            play.move()
            call = play.pick.choice(["update", "update", "apply", "resume"])
            if call == "update":
                ema.update()
                table.move(decay)
            elif call == "apply":
                before = snapshot(model)
                ema.apply()
                assert table.equals(dict(floating(model)))
                ema.restore()
                assert same(before, snapshot(model))
            else:
                kept = copy.deepcopy(ema.shadow)
                ema = shadow.ModelEMA(model, decay)
                ema.shadow = kept
            averaged = dict(ema.shadow)
            rest = {name: averaged.pop(name) for name in list(averaged) if name not in table.values}
            assert table.equals(averaged)
            state = model.state_dict()
            assert rest.keys() >= {"codes", "norm.num_batches_tracked"}
            assert all(torch.equal(value, state[name]) for name, value in rest.items())


def test_shadow_refuses() -> None:
    model = nn.Linear(2, 2)
    ema = shadow.EMA(model, 0.9)
    for call in (ema.update, ema.apply_shadow, lambda: ema.average):
        with pytest.raises(RuntimeError, match=r"call register\(\) first"):
            call()
    ema.register()
    with pytest.raises(RuntimeError, match=r"restore\(\) found no backup"):
        ema.restore()
    model.bias.requires_grad_(False)
    ema.register()
    model.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="differ in bias"):
        ema.update()


# --- torchcontrib ---------------------------------------------------------------------------------


class Groups:
    """SWA's formulas for two groups of parameters in float64: buffer += (weight - buffer) / (n +
    1).
    """

    def __init__(self, groups: list[list[Tensor]]) -> None:
        self._groups = groups
        self.n, self.means = (
            [0, 0],
            [[torch.zeros_like(p, dtype=F64) for p in group] for group in groups],
        )

    def update(self, i: int) -> None:
        for mean, weight in zip(self.means[i], self._groups[i], strict=True):
            mean += (weight.detach().double() - mean) / (self.n[i] + 1)
        self.n[i] += 1


@pytest.mark.parametrize("automatic", [True, False])
def test_swa(automatic: bool, seeds: Seeds) -> None:
    for seed in seeds(SEQUENCES // 2):
        play = Play(seed, codes=False)
        pick, model = play.pick, play.mine
        groups = [[model.a.weight, model.a.bias, model.scale], [model.b.weight, model.conv.weight]]
        start, freq, lr = (
            (pick.choice([0, 2]), pick.choice([1, 2]), pick.choice([None, 0.5]))
            if automatic
            else (None,) * 3
        )
        settings = [{"params": group, "lr": 0.1} for group in groups]
        opt, means, steps = (
            contrib.SWA(torch.optim.SGD(settings, momentum=0.5), start, freq, lr),
            Groups(groups),
            0,
        )
        for _ in range(8):
            call = pick.choice(["step", "step", "step", "update", "group", "swap", "resume"])
            if call == "step":
                for parameter in model.parameters():
                    parameter.grad = (
                        torch.randn_like(parameter) if parameter.requires_grad else None
                    )
                steps += 1
                assert opt.step(lambda: torch.tensor(3.0)) == 3
                for i in range(2) if automatic and steps > start and steps % freq == 0 else ():
                    means.update(i)
                assert opt.param_groups[1]["lr"] == (
                    lr if automatic and lr and steps > start else 0.1
                )
            elif call in ("update", "group"):
                opt.update_swa() if call == "update" else opt.update_swa_group(opt.param_groups[1])
                for i in range(2) if call == "update" else (1,):
                    means.update(i)
            elif call == "swap" and all(means.n):
                before = snapshot(model)
                opt.swap_swa_sgd()
                assert all(near(groups[i], means.means[i]) for i in range(2))
                opt.swap_swa_sgd()
                assert same(before, snapshot(model))
            elif call == "resume":
                state = copy.deepcopy(opt.state_dict())
                opt = contrib.SWA(
                    torch.optim.SGD([{"params": g, "lr": 0.1} for g in groups], momentum=0.5),
                    start,
                    freq,
                    lr,
                )
                opt.load_state_dict(state)
            assert [group["n_avg"] for group in opt.param_groups] == means.n
            for i in range(2):
                kept = [
                    opt.state[p]["swa_buffer"] for p in groups[i] if "swa_buffer" in opt.state[p]
                ]
                assert near(kept, means.means[i] if means.n[i] else [])


def test_swa_as_an_optimizer() -> None:
    """A scheduler, hooks, a group added late, what is saved while the mean is in the model, and
    what is refused.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inner = torch.optim.SGD(model[0].parameters(), 0.1)
    opt, seen = contrib.SWA(inner), []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    opt.add_param_group({"params": [*model[1].parameters()]})
    opt.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    schedule.step()
    assert (seen, inner.param_groups[0]["lr"], len(inner.param_groups)) == (
        [1],
        pytest.approx(0.01),
        2,
    )
    with pytest.warns(UserWarning, match="SWA wasn't applied to param Parameter") as caught:
        opt.swap_swa_sgd()
    assert len(caught) == 4
    opt.update_swa_group(opt.param_groups[0])
    move([model], 0)
    live = snapshot(model)
    with pytest.warns(UserWarning, match="wasn't applied") as caught:
        opt.swap_swa_sgd()
    assert len(caught) == 2
    for call in (opt.step, opt.update_swa):
        with pytest.raises(RuntimeError, match="while the means are in the model"):
            call()
    state = opt.state_dict()
    assert near([state["swa_state"][0]["swa_buffer"]], [live[0].view(2, 2)]), (
        "the weights, as in the original"
    )
    opt.load_state_dict(copy.deepcopy(state))
    with pytest.warns(UserWarning, match="wasn't applied") as caught:
        opt.swap_swa_sgd()
    assert len(caught) == 2
    assert same(live, snapshot(model))
    assert [ema is None for ema in opt.averages] == [False, True]


def test_swa_leaves_a_loaded_state_alone() -> None:
    """torch's own optimizers keep the tensors of a state that they load, and step in them."""
    model = nn.Linear(2, 2)
    opt = contrib.SWA(torch.optim.SGD(model.parameters(), 0.1, momentum=0.5))
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    buffer = state["opt_state"][0]["momentum_buffer"]
    before = buffer.clone()
    opt.load_state_dict(state)
    opt.step()
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("swapped", [False, True])
def test_copies_of_swa_go_on_alone(again: Any, swapped: bool) -> None:
    """With the means, and with the weights that they replaced."""
    model = nn.Linear(2, 2)
    opt = contrib.SWA(torch.optim.SGD(model.parameters(), 0.1, momentum=0.5), 0, 1, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    opt.step()
    if swapped:
        opt.swap_swa_sgd()
    model_copy, opt_copy = again((model, opt))
    before = snapshot(model)
    for one, of in ((opt, model), (opt_copy, model_copy)):
        if swapped:
            one.swap_swa_sgd()
        one.zero_grad()
        of(torch.ones(1, 2)).sum().backward()
        one.step()
        one.swap_swa_sgd()
    assert same(snapshot(model), snapshot(model_copy))
    assert not same(snapshot(model), before)


def test_swa_says_what_the_original_says() -> None:
    """Scripts filter warnings and match errors by their texts: these are torchcontrib's."""
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    for bad, text in (
        ((-1, 1, 0.1), "Invalid swa_start: -1"),
        ((1, 0, 0.1), "Invalid swa_freq: 0"),
        ((1, 1, -0.1), "Invalid SWA learning rate: -0.1"),
    ):
        with pytest.raises(ValueError, match=f"^{text}$"):
            contrib.SWA(inner, *bad)
    for given in ({"swa_start": 1}, {"swa_freq": 1}):
        with pytest.warns(
            UserWarning, match="^Some of swa_start, swa_freq is None, ignoring other$"
        ):
            opt = contrib.SWA(inner, **given)
        assert (opt.swa_start, opt.swa_freq) == (None, None)
    with pytest.warns(UserWarning, match="^Some of swa_start, swa_freq is None, ignoring swa_lr$"):
        assert contrib.SWA(inner, swa_lr=1.0).swa_lr is None
    with pytest.warns(UserWarning, match="^Casting swa_start, swa_freq to int$"):
        assert contrib.SWA(inner, 1, 2.5).swa_freq == 2  # type: ignore[arg-type]


def test_bn_update() -> None:
    """The statistics of all batches, of tensors or of lists; a model without BatchNorm is left
    alone.
    """
    torch.manual_seed(0)
    model, loader = nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(5, 3) + i for i in range(4)]
    together = torch.cat(loader)
    contrib.SWA.bn_update([[batch, None] for batch in loader], model, device="cpu")
    assert near([model[0].running_mean, model[0].running_var], [together.mean(0), together.var(0)])
    other = nn.Sequential(nn.BatchNorm1d(3))
    contrib.SWA.bn_update(loader, other)
    assert same([*model.buffers()][:2], [*other.buffers()][:2])
    contrib.SWA.bn_update(loader, nn.Linear(3, 3))


# --- parameters that become others ----------------------------------------------------------------


def test_parameters_that_move() -> None:
    """The same weights in another dtype, order or object go on with their average.

    Guards `ParameterListAverage.follow`.

    (Another device is followed the same way: dtype and device are compared together.)
    """
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 3)
    ema, twin = (
        torch_ema.ExponentialMovingAverage(model.parameters(), 0.5, False),
        copy.deepcopy(model),
    )
    table = Table(twin, trained)

    def both(seed: int) -> None:
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                a.copy_(b.add_(torch.randn(b.shape, generator=torch.Generator().manual_seed(seed))))
        ema.update(model.parameters())
        table.move(0.5)
        assert near(ema.shadow_params, [*table.values.values()])

    both(0)
    first = ema.average
    both(1)
    assert ema.average is first
    model.to(memory_format=torch.channels_last)
    both(2)
    assert ema.shadow_params[0].is_contiguous(memory_format=torch.channels_last)
    model.double()
    both(3)
    model = copy.deepcopy(model)
    both(4)
    assert ema.average.now == 5
    model.weight.data = model.weight.data.clone()
    same_one = ema.average
    both(5)
    assert ema.average is same_one, "the same elements elsewhere are followed as they are"
    before = copy.deepcopy(ema.shadow_params)
    with pytest.raises(
        ValueError, match=r"does not fit what was given: 0 is \(3, 2, 3, 3\).*, \(3,\) in"
    ):
        ema.update([*model.parameters()][::-1])
    assert same(before, ema.shadow_params)


def test_another_model_is_refused() -> None:
    """A list over a module names what another module lacks.

    Guards `ParameterListAverage._move_to`.
    """
    average = ParameterListAverage(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="the average and what was given differ in bias"):
        average.update(0.5, nn.Linear(2, 2, bias=False))


def test_tied_in_a_list() -> None:
    """The same parameter twice in the list is averaged once, and shown twice."""
    weight = nn.Parameter(torch.ones(3))
    ema = torch_ema.ExponentialMovingAverage([weight, weight], 0.5, False)
    weight.data += 1
    ema.update([weight, weight])
    assert near(ema.shadow_params, [torch.full((3,), 1.5)] * 2)
    assert len(ema.average) == 1
    with ema.average_parameters():
        assert weight[0] == 1.5


def test_copies_and_pickles() -> None:
    """Of model and average together, as loops and spawned processes make them: each pair goes on by
    itself, from the same state, in the same buffers and tables. Guards
    `ParameterListAverage.__getstate__` and `LitEma.__setstate__`.
    """
    makes: dict[str, Callable[[nn.Module], Any]] = {
        "torch_ema": lambda model: torch_ema.ExponentialMovingAverage(model.parameters(), 0.5),
        "diffusers": lambda model: diffusers.EMAModel(model.parameters(), 0.5, min_decay=0.2),
        "ldm": lambda model: ldm.LitEma(model, 0.5),
        "state": lambda model: shadow.ModelEMA(model, 0.5),
    }

    def step(name: str, model: nn.Module, ema: Any, seed: int) -> list[Tensor]:
        """What the table says after a move."""
        move([model], seed)
        if name == "diffusers":
            ema.step(model.parameters())
        elif name == "ldm":
            ema(model)
        else:
            ema.update()
        return table(name, ema)

    def table(name: str, ema: Any) -> list[Tensor]:
        if name == "ldm":
            return [ema.get_buffer(short) for short in ema.m_name2s_name.values()]
        return list(ema.shadow.values()) if name == "state" else ema.shadow_params

    for name, make in makes.items():
        model = Odd(random.Random(1), F32)
        ema = make(model)
        if name == "diffusers":
            ema.pin_memory()
        for seed in range(2):
            step(name, model, ema, seed)
        pairs = [copy.deepcopy((model, ema)), pickle.loads(pickle.dumps((model, ema)))]
        mine = [value.clone() for value in step(name, model, ema, 2)]
        for other, its in pairs:
            assert its.average.now == 2
            assert same(step(name, other, its, 2), mine), name
            step(name, other, its, 3)
        assert same(table(name, ema), mine), f"a copy of {name} moved the original"


def test_refused_while_lent() -> None:
    """Inside a swap of `.average` the shadows are the weights: nobody may read or fill them."""
    ema = torch_ema.ExponentialMovingAverage(nn.Linear(2, 2).parameters(), 0.5)
    state = copy.deepcopy(ema.state_dict())
    with ema.average.swap():
        for call in (lambda: ema.shadow_params, ema.update, lambda: ema.load_state_dict(state)):
            with pytest.raises(RuntimeError, match=r"inside ema.swap\(\)"):
                call()


# --- ranks ----------------------------------------------------------------------------------------

DECAY = 0.9


class Loop:
    """A drop-in in a training loop: how it is built and called, and its table of full weights by
    name.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.run, self.kind = Training(kind), kind
        model = self.run.model
        self.names = [
            wrappers.canonical(name).removeprefix("module.") for name, _ in model.named_parameters()
        ]
        whole = kind.startswith("fsdp1")
        given = model if whole else None
        self.name, self.ema = name, self.build(name, given)
        self.after: Callable[[], Any] = {
            "torch_ema": lambda: self.ema.update(given or model.parameters()),
            "diffusers": lambda: self.ema.step(given or model.parameters()),
            "ldm": lambda: self.ema(model),
            "contrib": lambda: None,  # its step does it
        }.get(name, lambda: self.ema.update())

    def build(self, name: str, given: nn.Module | None) -> Any:
        model = self.run.model
        if name == "torch_ema":
            return torch_ema.ExponentialMovingAverage(given or model.parameters(), DECAY)
        if name == "diffusers":
            ema = diffusers.EMAModel(given or model.parameters(), DECAY, min_decay=0.2)
            ema.use_ema_warmup = False  # which a module would turn on
            return ema
        if name == "contrib":
            self.run.optimizer = contrib.SWA(self.run.optimizer, 0, 1)
            return self.run.optimizer
        if name == "shadow":
            ema = shadow.EMA(model, DECAY)
            ema.register()
            return ema
        return ldm.LitEma(model, DECAY) if name == "ldm" else shadow.ModelEMA(model, DECAY)

    def schedule(self, now: float, elapsed: float) -> float:
        """Written out: what each original says of its update number `now`."""
        ratio = min(DECAY, (1 + now) / (10 + now))
        late = 0.0 if now < 2 else max(0.2, min(DECAY, now / (9 + now)))
        return {
            "torch_ema": ratio, "diffusers": late, "ldm": min(DECAY, ratio), "shadow": DECAY,
            "state": DECAY, "contrib": (now - 1) / now,
        }[self.name]  # fmt: skip

    def table(self) -> dict[str, Tensor]:
        """Full weights by name, whatever the form in which this rank holds them. *Collective*."""
        if self.kind.startswith("fsdp1"):
            return self.ema.average.gather()
        if self.name in ("torch_ema", "diffusers"):
            parts = dict(zip(self.names, self.ema.shadow_params, strict=True))
        elif self.name == "ldm":
            shown = dict(self.ema.named_buffers())
            parts = {name: shown[short] for name, short in self.ema.m_name2s_name.items()}
        elif self.name == "contrib":
            parts = {
                wrappers.canonical(name).removeprefix("module."): self.ema.state[p]["swa_buffer"]
                for name, p in self.run.model.named_parameters()
                if p in self.ema.state
            }
        else:
            parts = self.ema.shadow
        return {
            name: part.full_tensor() if hasattr(part, "full_tensor") else part
            for name, part in parts.items()
        }

    @contextmanager
    def lent(self) -> Iterator[None]:
        model = self.run.model
        given = model if self.kind.startswith("fsdp1") else None
        if self.name == "torch_ema":
            with self.ema.average_parameters(given or model.parameters()):
                yield
            return
        if self.name in ("diffusers", "ldm"):
            self.ema.store(given or model.parameters())
            self.ema.copy_to(model if self.name == "ldm" else given or model.parameters())
            yield
            self.ema.restore(given or model.parameters())
            return
        start, stop = {
            "shadow": ("apply_shadow", "restore"), "state": ("apply", "restore"),
            "contrib": ("swap_swa_sgd",) * 2
        }[self.name]  # fmt: skip
        getattr(self.ema, start)()
        yield
        getattr(self.ema, stop)()


def on_ranks(folder: str) -> None:
    for kind in ("ddp", "fsdp2", "fsdp2 kept", "fsdp1 orig"):
        for name in ("torch_ema", "diffusers", "ldm", "shadow", "state", "contrib"):
            if not (kind.startswith("fsdp1") and name == "contrib"):
                try:
                    in_a_loop(kind, name, folder)
                except BaseException as error:
                    raise AssertionError(f"{kind}, {name}") from error
    copied_in_place()
    becomes_sharded()


def in_a_loop(kind: str, name: str, folder: str) -> None:
    """Four steps, each behind a no_grad forward that leaves FSDP's root unsharded: the float64
    oracle; the model evaluates and trains on; what each rank saved it loads again.
    """
    torch.manual_seed(0)
    run = (loop := Loop(kind, name)).run
    oracle = Oracle(run.twin, loop.schedule)
    for _ in range(4):
        run.probe()
        run.train(1, loop.after)
        oracle.update()
    full = loop.table()
    assert oracle.error(full) < 2e-6 if full else kind.startswith("fsdp1")
    run.probe()
    before = snapshot(run.model)
    with loop.lent():
        seen = run.probe()
    lent = run.twin_with({key: value.float() for key, value in oracle.average.items()})
    assert (seen - lent).abs().max() < 2e-5
    assert same(before, snapshot(run.model))
    if name in ("torch_ema", "diffusers", "ldm", "contrib"):
        saved_and_loaded(loop, f"{folder}/{kind}-{name}-{dist.get_rank()}.pt")
    if kind == "ddp":
        on_one_rank(loop)
    run.train(1, loop.after)
    assert (run.probe() - run._probe(run.twin)).abs().max() < 2e-5


def saved_and_loaded(loop: Loop, path: str) -> None:
    """Each rank its own file, as the original's users save it, into a drop-in that has gone
    elsewhere since.
    """
    before = shadows_of(loop)
    torch.save(loop.ema.state_dict(), path)
    if loop.name == "contrib":
        loop.ema.update_swa()
    else:
        for _ in range(2):
            loop.after()
    loop.ema.load_state_dict(torch.load(path, weights_only=False))
    assert same(before, shadows_of(loop))


def shadows_of(loop: Loop) -> list[Tensor]:
    averages = loop.ema.averages if loop.name == "contrib" else [loop.ema.average]
    return [
        slot.shadow.clone()
        for ema in averages
        for slot in ema.weights.states
        if slot.shadow is not None
    ]


def on_one_rank(loop: Loop) -> None:
    """Loops that validate on the main process only: under DDP nothing here waits for another
    rank.
    """
    if dist.get_rank() == 0:
        with loop.lent():
            loop.run.model.module.eval()(loop.run.data(1, 0)[0])
            loop.run.model.train()
    dist.barrier()


def copied_in_place() -> None:
    """copy_to a model that is cut alike sends only what nobody divides.

    Guards `_cut_otherwise` in gather.
    """
    for kind in ("fsdp2", "fsdp1 flat"):
        torch.manual_seed(1)
        ema, other = EMA(wrap(kind, Net()), 0.5), wrap(kind, Net())
        full = ema.gather()
        whole = collectives.STREAM
        collectives.STREAM = 40  # bytes, so that each weight takes its own
        with Collectives() as few:
            ema.copy_to(other)
        with Collectives() as many:
            ema.copy_to(wrap("none", Net()))
        collectives.STREAM = whole
        assert few.count < many.count, (few.count, many.count)
        arrived = EMA(other, 0.5).gather()
        assert all(torch.equal(arrived[name], full[name]) for name in full)


def becomes_sharded() -> None:
    """Built before the model was wrapped, as scripts do that call `prepare` late: the average goes
    on on the shards.
    """
    torch.manual_seed(0)
    model = Net()
    ema = diffusers.EMAModel(model.parameters(), 0.5)
    twin = copy.deepcopy(model)
    original = diffusers.EMAModel(twin.parameters(), 0.5)
    sharded = wrap("fsdp2", model)
    for seed in range(3):
        values = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            for p in twin.parameters()
        ]
        with torch.no_grad():
            for parameter, value in zip(twin.parameters(), values, strict=True):
                parameter.copy_(value)
        ema.temp_stored_params = values
        ema.restore(sharded.parameters())
        ema.step(sharded.parameters())
        original.step(twin.parameters())
    full = [
        part.full_tensor() if hasattr(part, "full_tensor") else part for part in ema.shadow_params
    ]
    assert near(full, original.shadow_params)
    assert sum(slot.averaged_region.numel for slot in ema.average.weights.states) < sum(
        p.numel() for p in twin.parameters()
    )
    target = Net()
    ema.copy_to(target.parameters())
    assert near(target.parameters(), original.shadow_params)
    with raises(ValueError, "does not fit what was given", "is gathered by copy_to"):
        ema.step(target.parameters())
    with raises(RuntimeError, "cannot be copied or pickled"):
        copy.deepcopy(ema)


@pytest.mark.multirank
def test_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, str(tmp_path))
