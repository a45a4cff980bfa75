"""Drop-ins that hold a module: each against the package that it stands in for, and on two ranks against the oracle.

How to read a failure: a differential test names its seed, the step and the key; `run(KIND, seed)` repeats it alone. One live
model is shared by the original and by ours, so both see the same weights.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs_swa
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ema.compat import swa_utils as ours_swa
from tests.kit import Net, Oracle, Training, raises, run_ranks, wrap


class Body(nn.Module):
    """A tied pair, a frozen weight, a scalar, BatchNorm (floating and integer buffers), and a buffer that no file holds."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        if tied:
            self.head.weight = self.a.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)))) * self.scale

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x)


class Watch(TorchDispatchMode):
    """Counts how often the host asks a tensor for its value."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def make(draw: random.Random, tied: bool = True) -> Body:
    torch.manual_seed(draw.randrange(1 << 30))
    return Body(tied).to(draw.choice([torch.float32, torch.float32, torch.float64]))


@torch.no_grad()
def train(model: nn.Module, draw: random.Random) -> None:
    """Every trainable weight and every buffer moves."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    for p in model.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 0.3
    for buffer in model.buffers():
        step = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
        buffer += step.to(buffer.dtype) if buffer.is_floating_point() else 1


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str, odd: Callable[[str], bool]) -> None:
    """The same keys in the same order, the same values to 1e-6 but where `odd`."""
    assert list(ours) == list(theirs), where
    for key, want in theirs.items():
        mine = ours[key]
        assert (mine.dtype, mine.shape) == (want.dtype, want.shape), f"{where} {key}"
        if not odd(key):
            assert torch.allclose(mine.double(), want.double(), rtol=0, atol=1e-6), f"{where} {key}: {mine} {want}"


# --- torch.optim.swa_utils ---------------------------------------------------------------------------------------


def halve(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    """A function of the user's, which knows how many models there were."""
    return averaged + (current - averaged) / (count + 2)


def halve_all(averaged: Any, current: Any, count: Any) -> None:
    for mine, live in zip(averaged, current, strict=True):
        mine += (live - mine) / (count + 2)


FUNCTIONS: list[Callable[[Any, float], dict[str, Any]]] = [
    lambda of, d: {},
    lambda of, d: {"avg_fn": of.get_ema_avg_fn(d)},
    lambda of, d: {"multi_avg_fn": of.get_ema_multi_avg_fn(d)},
    lambda of, d: {"avg_fn": of.get_swa_avg_fn()},
    lambda of, d: {"multi_avg_fn": of.get_swa_multi_avg_fn()},
    lambda of, d: {"avg_fn": halve},
    lambda of, d: {"multi_avg_fn": halve_all},
    lambda of, d: {"avg_fn": theirs_swa.get_ema_avg_fn(d)},
]


@pytest.mark.parametrize("part", range(4))
def test_swa_utils_is_torchs(part: int) -> None:
    for seed in range(50 * part, 50 * part + 50):
        run_swa(seed)


def run_swa(seed: int) -> None:
    draw = random.Random(seed)
    live, options = make(draw), {"device": draw.choice([None, "cpu", torch.device("cpu")])}
    function, decay = draw.choice(FUNCTIONS), draw.choice([0.0, 0.5, 0.9, 1.0])
    # NOTE: torch raises for the integer buffers here, unless its function is for one tensor, which truncates them.
    options["use_buffers"] = draw.random() < 0.5 and "avg_fn" in function(theirs_swa, decay)
    theirs = theirs_swa.AveragedModel(live, **options, **function(theirs_swa, decay))
    ours = ours_swa.AveragedModel(live, **options, **function(ours_swa, decay))
    tracked = live.norm.num_batches_tracked.clone()
    for step in range(draw.randrange(4, 10)):
        what = draw.choice(
            ["update"] * 6 + ["load", "both load", "restart", "copy", "another", "bn", "unfreeze", "replace"]
        )
        if what == "update":
            train(live, draw)
            theirs.update_parameters(live)
            ours.update_parameters(live)
            tracked = live.norm.num_batches_tracked.clone()
        elif what == "load":
            saved, fresh = copy.deepcopy(ours.state_dict()), make(draw).to(live.scale.dtype)
            ours = ours_swa.AveragedModel(fresh, **options, **function(ours_swa, decay))
            ours.load_state_dict(saved)
        elif what == "both load":
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            tracked = ours.module.norm.num_batches_tracked.clone()
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        elif what == "restart":
            ours.n_averaged.fill_(0)
            theirs.n_averaged.fill_(0)
        elif what == "copy":
            ours = copy.deepcopy(ours)
        elif what == "another":
            live = copy.deepcopy(live)
        elif what == "unfreeze":
            live.frozen.requires_grad_(True)
        elif what == "replace":
            live.b.weight = nn.Parameter(live.b.weight.detach() + 0.1)
        elif what == "bn" and not options["use_buffers"]:
            x = torch.randn(5, 3, dtype=live.scale.dtype)
            theirs_swa.update_bn([x], theirs)
            ours_swa.update_bn([(x, "label")], ours)
            tracked = ours.module.norm.num_batches_tracked.clone()
        where = f"seed {seed} step {step} {what}"
        compare(ours.state_dict(), theirs.state_dict(), where, lambda key: "tracked" in key)
        assert torch.equal(ours.module.norm.num_batches_tracked, tracked), where
        if what == "update":
            assert torch.equal(ours.module.cache, live.cache), where
        if step % 3 == 0:
            x = torch.randn(5, 3, dtype=live.scale.dtype)
            assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5), where


def test_bfloat16_does_not_stall() -> None:
    """torch's average of bf16 weights never moves at this decay."""
    live = nn.Linear(40, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        live.weight.fill_(1.0)
    both = [of.AveragedModel(live, avg_fn=of.get_ema_avg_fn(0.999)) for of in (ours_swa, theirs_swa)]
    for average in both:
        average.update_parameters(live)
    with torch.no_grad():
        live.weight.fill_(2.0)
    for average in both * 400:
        average.update_parameters(live)
    ours, theirs = (average.module.weight.float().mean().item() for average in both)
    assert theirs == 1.0
    assert abs(ours - (2 - 0.999**400)) < 0.02


def test_the_model_may_change() -> None:
    """Wrapped later, cast, the copy cast: the average goes on where it was; what is the same model builds nothing anew."""
    live = Body()
    average = ours_swa.AveragedModel(live, avg_fn=ours_swa.get_ema_avg_fn(0.5))
    average.update_parameters(live)
    first = average.average
    average.update_parameters(torch.compile(live, backend="eager"))
    assert average.average is first
    want = average.module.scale.item()
    for change in (live.double, average.double, live.float, live.double):
        change()
        with torch.no_grad():
            live.scale.add_(1)
        average.update_parameters(live)
        want = 0.5 * want + 0.5 * live.scale.item()
        assert average.module.scale.item() == pytest.approx(want, abs=1e-6)
    assert (average.module.scale.dtype, average.average.now) == (torch.float64, 6)
    again = pickle.loads(pickle.dumps(average))
    with torch.no_grad():
        live.scale.add_(1)
    again.update_parameters(live)
    assert again.module.scale.item() == pytest.approx(0.5 * want + 0.5 * live.scale.item())
    assert average.module.scale.item() == pytest.approx(want), "the copy of an average is an average of its own"


def test_checkpoints_of_wrapped_models() -> None:
    """torch writes DDP's and torch.compile's prefixes into the keys; here they are taken off at load."""
    live = Body()
    average = ours_swa.AveragedModel(live)
    state = {key: value + 1 for key, value in average.state_dict().items()}
    for put in ("module.module.", "module._orig_mod.", "module.module._orig_mod."):
        fresh = ours_swa.AveragedModel(live)
        fresh.load_state_dict({key.replace("module.", put, 1): value for key, value in state.items()})
        compare(dict(fresh.state_dict()), state, put, lambda _: False)
    state["module.nothing"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="module.nothing"):
        fresh.load_state_dict(state)


def test_counts_are_not_read_back() -> None:
    live = Body()
    average = ours_swa.AveragedModel(live)
    average.update_parameters(live)
    with Watch() as watch:
        average.update_parameters(live)
    assert watch.reads == 0
    average.n_averaged.fill_(0)
    with Watch() as watch:
        average.update_parameters(live)
    assert watch.reads == 1


def test_swa_utils_refuses() -> None:
    with pytest.raises(ValueError, match="one of avg_fn and multi_avg_fn, got both"):
        ours_swa.AveragedModel(Body(), avg_fn=halve, multi_avg_fn=halve_all)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        ours_swa.get_ema_avg_fn(1.5)
    assert ours_swa.SWALR is theirs_swa.SWALR


def test_update_bn_is_of_all_data() -> None:
    """The variance over all batches, where torch takes the mean of the batches' own; models without BatchNorm pass."""
    live = Body()
    average = ours_swa.AveragedModel(live)
    batches = [torch.randn(4, 3) + i for i in range(3)]
    ours_swa.update_bn(batches, average, device=torch.device("cpu"))
    seen = torch.cat([average.module.a(batch) for batch in batches])
    assert torch.allclose(average.module.norm.running_mean, seen.mean(0), atol=1e-5)
    assert torch.allclose(average.module.norm.running_var, seen.var(0), atol=1e-5)
    assert torch.equal(live.norm.running_mean, torch.zeros(4))
    ours_swa.update_bn(batches, live)
    assert not torch.equal(live.norm.running_mean, torch.zeros(4))
    ours_swa.update_bn(batches, nn.Linear(3, 3))


# --- two ranks ---------------------------------------------------------------------------------------------------


def swa(model: nn.Module, **options: Any) -> nn.Module:
    return ours_swa.AveragedModel(model, multi_avg_fn=ours_swa.get_ema_multi_avg_fn(0.8), **options)


def custom(model: nn.Module, **options: Any) -> nn.Module:
    return ours_swa.AveragedModel(model, avg_fn=halve, **options)


# what builds it, what updates it, the decay of each of its moves
DROP_INS: dict[str, tuple[Callable[..., Any], Callable[[Any, nn.Module], Any], Callable[[float, float], float]]] = {
    "swa": (swa, lambda mine, model: mine.update_parameters(model), lambda now, _: 0.0 if now == 1 else 0.8),
    "custom": (custom, lambda mine, model: mine.update_parameters(model), lambda n, _: 0.0 if n == 1 else n / (n + 1)),
}


def equals_the_oracle(kind: str, name: str, with_module: bool) -> None:
    """Equal to full weights in one process; evaluated, saved and loaded with no loss."""
    build, update, decay = DROP_INS[name]
    options: dict[str, Any] = {"module_fn": lambda: wrap(kind, Net())} if with_module else {}
    training = Training(kind)
    average = build(training.model, **options)
    oracle = Oracle(training.twin, decay)

    def both() -> None:
        oracle.update()
        update(average, training.model)

    for _ in range(4):
        training.train(1, both)
        training.probe()  # leaves FSDP's roots unsharded
    check(average, oracle, training, kind, with_module)
    saved = io.BytesIO()
    state = average.state_dict() if isinstance(average, nn.Module) else average.ema.state_dict()
    torch.save(state, saved)
    saved.seek(0)
    again = Training(kind)
    second = build(again.model, **options)
    target = second if isinstance(second, nn.Module) else second.ema
    target.load_state_dict(torch.load(saved, weights_only=False))
    check(second, oracle, again, kind, with_module)
    training.train(2, both)
    check(average, oracle, training, kind, with_module)


def check(average: Any, oracle: Oracle, training: Training, kind: str, with_module: bool) -> None:
    weights = average.average.gather()
    assert not weights or oracle.error(weights) < 1e-6, kind
    want = training.twin_with({name: each.float() for name, each in oracle.average.items()})
    tokens = training.data(10_000, 0)[0]
    if kind == "ddp" or with_module:
        module = average.ema if hasattr(type(average), "ema") else getattr(average, average.child)
        with torch.no_grad():
            assert torch.allclose(module.eval()(tokens), want, atol=1e-5), kind
        return
    with raises(RuntimeError, "sharded by FSDP and cannot be copied", "module_fn="):
        _ = average.ema if hasattr(type(average), "ema") else getattr(average, average.child)
    with average.average.swap():
        assert torch.allclose(training.probe(), want, atol=1e-5), kind


def on_two_ranks() -> None:
    for name in DROP_INS:
        for kind, with_module in [
            ("ddp", False),
            ("fsdp2", False),
            ("fsdp2", True),
            ("fsdp1 orig", False),
            ("fsdp1 orig", True),
        ]:
            try:
                equals_the_oracle(kind, name, with_module)
            except Exception as error:
                raise AssertionError(f"{name} under {kind}, module_fn={with_module}") from error


def test_two_ranks() -> None:
    run_ranks(2, on_two_ranks)
