"""One update per optimizer step that really happened, and the clock that counts them."""

from __future__ import annotations

import gc
import json
import math
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
)

from dist_ema import EMA, Debiased, HalfLife, Power, Ratio, Uniform, Warmup
from tests._ranks import raises, run_ranks


class Toy:
    """One weight that every step moves by 1: averages can be said in closed form."""

    def __init__(self, schedule: Any = 0.5, optimizer: Any = None, **attach: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.model.weight.zero_()
        self.optimizer = (
            optimizer(self.model.parameters())
            if optimizer
            else torch.optim.SGD(self.model.parameters(), 1.0)
        )
        self.ema = EMA(self.model, schedule)
        self.handle = self.ema.attach(self.optimizer, **attach)

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.model.weight.grad = -torch.ones(1, 1)
            self.optimizer.step()

    @property
    def average(self) -> float:
        return self.ema.gather()["weight"].item()


def test_updates_by_hand_after_each_attached_one_are_named_once() -> None:
    """Now and then is a choice of the loop, and no mistake."""
    toy = Toy()

    def play(*steps: int) -> None:
        for n in steps:
            toy.step(n)
            toy.ema.update()

    play(1, 1, 2, 1, 1, 3, 1, 1, 2)
    with pytest.warns(UserWarning, match="each step moves the average twice") as caught:
        play(1, 1, 1, 1, 1, 1)
    assert len(caught) == 1


def test_one_update_per_step() -> None:
    toy = Toy(Uniform())
    toy.step(4)
    assert toy.average == 2.5
    assert toy.ema.now == 4
    toy.handle.remove()
    toy.handle.remove()
    toy.step()
    with pytest.warns(UserWarning, match="no update came") as caught, toy.ema.swap():
        pass
    assert caught[0].filename == __file__, "it points at the user's line"
    assert toy.average == 2.5
    toy.ema.attach(toy.optimizer)
    with pytest.raises(RuntimeError, match="called before"):
        toy.ema.attach(toy.optimizer)
    toy.ema.detach()
    toy.ema.attach(toy.optimizer)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("form", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_accumulation_and_forms(make: Any, form: dict[str, bool]) -> None:
    toy = Toy(optimizer=lambda p: make(p, lr=0.1, **form))
    for micro in range(6):
        toy.model(torch.ones(1, 1)).sum().backward()
        if micro % 3 == 2:
            toy.optimizer.step()
    assert toy.ema.metrics()["updates"] == 2


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # torch 2.8, inside LBFGS
def test_closures_and_steps_that_raise() -> None:
    toy = Toy(optimizer=lambda p: torch.optim.LBFGS(p, max_iter=4))

    def closure() -> torch.Tensor:
        toy.optimizer.zero_grad()
        loss = (toy.model(torch.ones(1, 1)) - 1).square().sum()
        loss.backward()
        return loss

    toy.optimizer.step(closure)
    toy.optimizer.step(closure)
    assert toy.ema.metrics()["updates"] == 2

    def broken() -> torch.Tensor:
        raise KeyError("data")

    with pytest.raises(KeyError):
        toy.optimizer.step(broken)
    assert toy.ema.metrics()["updates"] == 2


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_under_a_scaler(fused: bool) -> None:
    """A fused optimizer's hook fires for a skipped step too (fact 16): weight 0, taken from
    found_inf on the device.
    """
    toy = Toy(0.5, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    for gradient in (1.0, float("inf"), 1.0):
        toy.optimizer.zero_grad()
        toy.model.weight.grad = None
        scaler.scale(-gradient * toy.model(torch.ones(1, 1)).sum()).backward()
        toy.model.weight.grad.nan_to_num_(posinf=float("inf"), neginf=-float("inf"))
        scaler.step(toy.optimizer)
        scaler.update(1.0)
    assert toy.model.weight.item() == 2
    assert toy.average == 0.5 * 0.5 + 0.5 * 2
    metrics = toy.ema.metrics()
    assert (metrics["updates"], metrics["skipped"]) == ((3, 1) if fused else (2, 0))
    assert toy.ema.now == metrics["updates"]


@pytest.mark.parametrize("schedule", [Uniform(), Debiased(0.9), Power(gamma=2.0)])
def test_a_skipped_first_update_does_not_keep_the_start(schedule: Any) -> None:
    """Schedules whose first decay is 0 go on copying until one update was accepted.

    Guards Gate.weigh's where().
    """
    toy = Toy(schedule, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=True))
    toy.optimizer.found_inf = torch.tensor(1.0)
    with torch.no_grad():
        toy.model.weight -= 5
    toy.step()
    toy.optimizer.found_inf = torch.tensor(0.0)
    toy.step()
    assert toy.average == toy.model.weight.item()
    toy.step()
    assert toy.average != toy.model.weight.item()
    del toy.optimizer.found_inf
    assert toy.ema.metrics()["skipped"] == 1


def test_non_finite_live_weights_are_kept_out() -> None:
    """guard=True keeps the shadow element by element; a weight of 0 would not (fact 15: 0 * NaN is
    NaN).
    """
    for guard in (True, False):
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        ema = EMA(model, 0.5)
        start = ema.gather()["weight"].clone()
        ema.attach(optimizer, guard=guard)
        model.weight.grad = torch.tensor([[float("nan"), float("inf"), 0.0]])
        optimizer.step()
        got = ema.gather()["weight"]
        assert torch.equal(got[0, 2], start[0, 2])
        assert torch.equal(got, start) == guard


def test_every_uses_the_whole_interval() -> None:
    for schedule in (
        HalfLife(3.0),
        Uniform(),
        Power(gamma=1.5),
        Debiased(0.8),
        Ratio(0.9),
        Warmup(0.9),
    ):
        often, seldom = Toy(schedule), Toy(schedule, every=4)
        with torch.no_grad():
            for toy in (often, seldom):
                toy.model.weight.fill_(8.0)
                toy.optimizer.param_groups[0]["lr"] = 0.0
                toy.step(12)
        assert seldom.ema.metrics()["updates"] == 3
        assert seldom.ema.now == often.ema.now == 12
        assert abs(seldom.average - often.average) < 1e-5, schedule


def test_elapsed_counts_images() -> None:
    sizes = iter([4.0, 8.0, 2.0])
    toy = Toy(HalfLife(10.0), elapsed=lambda: next(sizes))
    toy.step(3)
    assert toy.ema.now == 14
    assert toy.ema.metrics()["half_life"] == pytest.approx(10.0)
    for bad in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="elapsed must be positive"):
            toy.ema.update(bad)
    assert toy.ema.now == 14
    with pytest.raises(ValueError, match="HalfLife"):
        Toy(Ratio()).ema.update(0.5)


def test_start_seeds_the_shadow() -> None:
    toy = Toy(Uniform(), start=3)
    toy.step(2)
    assert toy.average == 2.0, "until averaging starts, the average is the live model"
    toy.step(1)
    assert (toy.ema.now, toy.average) == (0, 3.0)
    toy.step(2)
    assert (toy.ema.now, toy.average) == (2, 4.5), "Uniform's first update copies"
    late = Toy(Power(gamma=1.0, origin="training"), start=3)
    late.step(4)
    assert late.ema.now == 4
    assert late.average == pytest.approx(3 + (1 - (1 - 1 / 4) ** 2))


def test_several_optimizers() -> None:
    """One update, after the last-listed one; void only if all of them were skipped."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    a, b = (torch.optim.SGD(part.parameters(), 1.0, fused=True) for part in model)
    ema = EMA(model, 0.5)
    ema.attach(a, b)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    start = ema.gather()["0.weight"].item()
    a.step()
    assert ema.metrics()["updates"] == 0
    b.found_inf = torch.tensor(1.0)
    b.step()
    assert ema.metrics()["updates"] == 1
    assert ema.gather()["0.weight"].item() == pytest.approx(start - 0.5)
    a.found_inf = torch.tensor(1.0)
    kept = ema.gather()["0.weight"].item()
    a.step()
    b.step()
    assert ema.gather()["0.weight"].item() == kept
    assert ema.metrics()["skipped"] == 1


def test_an_optimizer_that_is_given_twice_steps_once() -> None:
    """Else the round would wait for its second place for ever."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, optimizer)
    optimizer.step()
    assert ema.now == 1


@pytest.mark.parametrize("elapsed", [-1.0, math.nan, math.inf])
def test_units_that_are_none_move_no_clock(elapsed: float) -> None:
    """With `every=2` they came into the sum of an interval, where nothing notices them."""
    units = iter([4.0, elapsed, 4.0, 4.0])
    toy = Toy(HalfLife(10.0), every=2, elapsed=lambda: next(units))
    toy.step(1)
    with pytest.raises(ValueError, match="elapsed must be positive and finite, got"):
        toy.step(1)
    toy.step(1)
    assert toy.ema.now == 8


def test_bad_arguments_name_themselves() -> None:
    ema = EMA(nn.Linear(1, 1), 0.5)
    optimizer = torch.optim.SGD(ema.weights.model.parameters(), 1.0)
    for arguments, options, words in [
        ((), {}, "needs the optimizers"),
        ((optimizer,), {"every": 0}, "every must be 1 or more"),
        ((optimizer,), {"start": -1}, "start 0 or more"),
        ((optimizer,), {"every": 2.5}, "every must be a whole number of steps, got 2.5"),
        ((optimizer,), {"elapsed": 0}, "elapsed must be positive and finite, got 0"),
        ((optimizer,), {"elapsed": None}, "elapsed must be positive and finite, got None"),
        ((optimizer,), {"overlap": None}, "overlap must be True, False or a share"),
        ((optimizer,), {"overlap": 1.5}, "overlap must be True, False or a share"),
        ((ema,), {}, "cannot hook EMA: it takes torch optimizers"),
    ]:
        with pytest.raises(ValueError, match=words):
            ema.attach(*arguments, **options)
    with pytest.raises(ValueError, match=r"^Ratio\(.* takes whole elapsed up to 1024, got 3000"):
        EMA(ema.model, Ratio()).attach(optimizer, every=1500, elapsed=2)
    optimizer.step()
    assert ema.metrics()["updates"] == 0, "a refused attach leaves no hook"


def test_numbers_of_any_kind(tmp_path: Path) -> None:
    """Of numpy and torch too: the clock and the attachment go into ema.json, where only Python's
    do.
    """
    toy = Toy(HalfLife(10.0), every=np.int64(2), start=torch.tensor(1), elapsed=np.float32(4.0))
    toy.step(3)
    toy.ema.update(torch.tensor(3))
    toy.ema.save(tmp_path / "a")
    meta = json.loads((tmp_path / "a" / "ema.json").read_text())
    assert (meta["attach"], meta["clock"]["now"]) == (
        {"every": 2, "start": 1, "elapsed": 4.0},
        11.0,
    )


def hooks_on(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_an_ema_that_is_dropped_is_freed() -> None:
    """The optimizer does not keep it: shadows go, and the next step says so, once.

    Guards `WeakMethod` in _StepHook.
    """
    toy = Toy()
    average, shadow = (
        weakref.ref(toy.ema.weights),
        weakref.ref(toy.ema.weights.averages[0].averaged[0].shadow),
    )
    handle = toy.handle
    del toy.ema, toy.handle
    gc.collect()
    toy.step()
    assert average().clock.updates == 1, "whoever holds the handle holds the average"
    del handle
    gc.collect()
    assert average() is None
    assert shadow() is None
    with pytest.warns(UserWarning, match="attached to this optimizer is gone") as caught:
        toy.step(3)
    assert len(caught) == 1
    assert hooks_on(toy.optimizer) == 1, "the one that said so"
    again = EMA(toy.model, 0.5)
    again.attach(toy.optimizer)
    assert hooks_on(toy.optimizer) == 2, "the spent one came off, or each EMA would leave one"
    toy.step(2)
    assert again.now == 2


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_ema_that_is_collected_within_a_step(everywhere: bool) -> None:
    """torch iterates over the optimizer's hooks, and over those of all optimizers, meanwhile."""
    toy = Toy()
    ring: list[Any] = [toy.ema, toy.handle]
    ring.append(ring)
    del toy.ema, toy.handle, ring

    def collect(*_: Any) -> None:
        gc.collect()

    register = (
        register_optimizer_step_post_hook if everywhere else toy.optimizer.register_step_post_hook
    )
    handle = register(collect)
    beside = Toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        toy.step(2)
    beside.step()
    handle.remove()
    assert beside.ema.now == 1
    again = EMA(toy.model, 0.5)
    again.attach(toy.optimizer)
    hooks: Any = list(_global_optimizer_post_hooks.values())
    assert all(hook.method() for hook in hooks), "the dead ones came off"


def test_a_detached_ema_is_silent() -> None:
    toy = Toy()
    toy.ema.detach()
    del toy.ema, toy.handle
    gc.collect()
    toy.step()


def test_detach_in_the_middle() -> None:
    """Of an interval: time that went by is not lost.

    Of a swap, after a refusal: the loan is taken back all the same.
    """
    toy = Toy(Uniform(), every=3)
    toy.step(2)
    toy.ema.detach()
    toy.step()
    toy.ema.attach(toy.optimizer, every=2)
    toy.step(2)
    assert (toy.ema.now, toy.ema.metrics()["updates"]) == (4, 1), "of the four steps that were seen"
    before = toy.model.weight.item()
    with toy.ema.swap():
        with pytest.raises(RuntimeError, match="optimizer.step"):
            toy.step()
        toy.ema.detach()
    assert toy.model.weight.item() == before
    toy.step()
    assert toy.ema.now == 4


def test_update_twice_and_beside_the_hooks() -> None:
    """Each call is a move of the clock, with or without a step between."""
    toy = Toy(Uniform())
    toy.step()
    toy.ema.update()
    toy.ema.update()
    assert (toy.ema.now, toy.average) == (3, 1.0)
    toy.step()
    assert (toy.ema.now, toy.average) == (4, 1.25)
    with toy.ema.swap(), pytest.raises(RuntimeError, match=r"ema.update\(\) inside"):
        toy.ema.update()
    assert toy.ema.now == 4


def accelerated_and_zero() -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # accelerate asks for them, and does not use them
    from accelerate import Accelerator
    from torch.distributed.optim import ZeroRedundancyOptimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(
        nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    )
    optimizer.optimizer.param_groups[0]["params"] = list(model.parameters())
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(2, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.metrics()["updates"] == 3

    ddp = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    zero = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.5)
    ema = EMA(ddp, 0.5, split=False)
    start = [p.detach().clone() for p in ddp.parameters()]
    ema.attach(zero)
    ddp(torch.randn(2, 4)).sum().backward()
    zero.step()
    assert ema.metrics()["updates"] == 1
    for slot, p, first in zip(
        ema.weights.averages[0].averaged, ddp.parameters(), start, strict=True
    ):
        assert torch.equal(slot.shadow.view_as(p), first.lerp(p.detach(), 0.5)), (
            "after the broadcast, on every rank"
        )
    assert dist.get_world_size() == 2
    with raises(ValueError, "torch optimizers"):
        ema.detach()
        ema.attach(ddp)


@pytest.mark.multirank
def test_accelerated_and_zero_redundancy_optimizers() -> None:
    run_ranks(2, accelerated_and_zero)


def test_an_update_by_hand_guards_as_attach_was_asked_to() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    handle = ema.attach(optimizer, guard=True)
    before = ema.gather()["weight"].clone()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    ema.update()
    assert torch.equal(ema.gather()["weight"], before)
    handle.remove()
    ema.update(guard=True)
    assert torch.equal(ema.gather()["weight"], before)
    ema.update()
    assert ema.gather()["weight"].isnan().all()
