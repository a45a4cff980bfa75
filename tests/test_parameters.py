"""An EMA over parameters that came without their module: plain, DDP, FSDP2; what cannot be held is
refused by name.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, Constant, Ramp, Ratio, Uniform, Warmup, load_file
from tests._models import Net
from tests._oracle import Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

SCHEDULE = Warmup(0.9)


def bits(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


# --- one process ----------------------------------------------------------------------------------


def test_list_equals_the_model() -> None:
    """A list averages what the model does, under 0, 1, ...; pairs keep the names, and `only=`
    searches them.
    """
    model = Net()
    whole = EMA(model, 0.5)
    bare, named = EMA(model.parameters(), 0.5), EMA(model.named_parameters(), 0.5, only="blocks")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    for ema in (whole, bare, named):
        ema.update()
    trained = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
    assert bare.names() == [str(i) for i in trained]
    assert named.names() == [name for name in whole.names() if "blocks" in name]
    full, by_place, by_name = whole.gather(), bare.gather(), named.gather()
    for i, (name, p) in enumerate(model.named_parameters()):
        assert torch.equal(by_place[str(i)], full[name])
        assert torch.equal(by_name[name], full[name] if name in named.names() else p)


def test_verbs_take_lists(tmp_path: Path) -> None:
    model = Net()
    ema = EMA([*model.parameters()], 0.5, dtype=torch.float64)
    with torch.no_grad():
        model.scale.fill_(3.0)
    ema.update()
    before = snapshot(model)
    with ema.swap():
        assert float(model.scale.detach()) == pytest.approx((0.7 + 3) / 2)
    assert same(before, snapshot(model))
    other = copy.deepcopy(model)
    ema.copy_to(other.parameters())
    assert float(other.scale.detach()) == pytest.approx((0.7 + 3) / 2)
    with pytest.warns(UserWarning, match="came without names"):
        ema.save(tmp_path / "average")
    with pytest.warns(UserWarning, match="came without names"):
        ema.export(tmp_path / "out")
    again = EMA(other.parameters(), 0.5, dtype=torch.float64)
    again.load(tmp_path / "average")
    assert all(torch.equal(value, again.gather()[name]) for name, value in ema.gather().items())
    EMA(model.named_parameters()).save(tmp_path / "named")  # no warning: they are errors here
    assert load_file(tmp_path / "named").keys() == dict(model.named_parameters()).keys()


def test_names_of_pairs() -> None:
    """Canonical like a model's; the same parameter under two names is averaged once."""
    net = torch.compile(nn.Linear(2, 2), backend="eager")
    assert EMA(net.named_parameters()).names() == ["weight", "bias"]
    tied = Net().named_parameters(remove_duplicate=False)
    full = EMA(tied).gather()
    assert torch.equal(full["core.head.weight"], full["core.emb.weight"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.Parameter(torch.zeros(3)), "pairs of a name and a parameter, got Parameter"),
        ("weights", "got str"),
        (7, "got int"),
        (dict(nn.Linear(2, 2).named_parameters()), "got str as number 0"),
        ([{"params": []}], "got dict as number 0"),
        ([(1, nn.Parameter(torch.zeros(3)))], "got tuple as number 0"),
        (
            [("a", nn.Parameter(torch.zeros(3))), ("a", nn.Parameter(torch.zeros(3)))],
            "two parameters are called a",
        ),
        ([], "no trainable floating-point weights in Parameters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_list_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EMA(given)


def test_split_takes_a_group() -> None:
    with pytest.raises(ValueError, match="split must be True, False or a process group, got 'yes'"):
        EMA(nn.Linear(2, 2), split="yes")  # type: ignore[arg-type]


# --- what loops bring along -----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Warmup(0.95), Ratio(), Ramp(tau=3.0), Uniform()], ids=repr)
def test_a_decay_for_one_update(schedule: Any) -> None:
    """`update(decay=...)` in place of the schedule's, which is asked in vain; the clock moves all
    the same.
    """
    model = nn.Linear(3, 3)
    scheduled, given = EMA(model, schedule), EMA(model, Constant(0.123))
    for now in range(1, 6):
        with torch.no_grad():
            model.weight += 1
        scheduled.update()
        given.update(decay=schedule(now))
        assert torch.equal(scheduled.gather()["weight"], given.gather()["weight"])
        assert given.metrics()["decay"] == schedule(now)
    given.update(2.0, decay=0.5)
    assert (given.now, given.metrics()["decay"]) == (7, 0.25), "a decay is per unit of elapsed"
    given.update(decay=0)
    assert torch.equal(given.gather()["weight"], model.weight)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        given.update(decay=1.5)
    assert given.now == 8


def test_a_decay_for_several_averages() -> None:
    model = nn.Linear(3, 3)
    ema = EMA(model, [0.5, Uniform()])
    with torch.no_grad():
        model.weight += 1
    ema.update(decay=0.9)
    assert torch.equal(ema.gather(0)["weight"], ema.gather(1)["weight"])


def test_swap_in_two_calls() -> None:
    """store and restore of other packages: an ExitStack holds the swap open."""
    model = nn.Linear(3, 3)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    before, lent = snapshot(model), ExitStack()
    lent.enter_context(ema.swap())
    assert not same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="inside ema.swap"):
        ema.update()
    lent.close()
    assert same(before, snapshot(model))


# --- ranks ----------------------------------------------------------------------------------------


def trained(kind: str, build: Any) -> tuple[Training, EMA, Oracle]:
    """Four steps, each behind a no_grad forward that leaves FSDP's root unsharded."""
    run = Training(kind)
    run.probe()
    ema = build(run.model)
    oracle = Oracle(run.twin, SCHEDULE)
    ema.attach(run.optimizer)
    for _ in range(4):
        run.probe()
        run.train(1, oracle.update)
    ema.detach()
    return run, ema, oracle


def check_error(ema: EMA, oracle: Oracle, run: Training, nameless: bool) -> None:
    names = {str(i): name for i, (name, _) in enumerate(run.twin.named_parameters())}
    full = ema.gather()
    if full:
        assert (
            oracle.error(
                {names[k] if nameless else k.removeprefix("module."): v for k, v in full.items()}
            )
            < 2e-6
        )


def check_swap(run: Training, ema: EMA, oracle: Oracle) -> None:
    """The root is warm on both sides: without the resharding both forwards would read stale
    copies.
    """
    run.probe()
    before = bits(
        shard._local_tensor if hasattr(shard, "_local_tensor") else shard
        for shard in ema_tensors(ema)
    )
    with ema.swap():
        seen = run.probe()
    lent = run.twin_with({name: value.float() for name, value in oracle.average.items()})
    assert (seen - lent).abs().max() < 2e-5
    assert same(before, bits(getattr(t, "_local_tensor", t) for t in ema_tensors(ema)))
    run.train(1)
    assert (run.probe() - run._probe(run.twin)).abs().max() < 2e-5


def ema_tensors(ema: EMA) -> list[Tensor]:
    return [slot.shard.tensor for slot in ema.weights.states]


def on_ranks(folder: str) -> None:
    for kind, nameless in (("fsdp2", True), ("fsdp2 kept", False), ("ddp", True)):
        make = (
            (lambda model: model.parameters())
            if nameless
            else (lambda model: model.named_parameters())
        )
        run, ema, oracle = trained(kind, lambda model, make=make: EMA(make(model), SCHEDULE))
        check_error(ema, oracle, run, nameless)
        check_swap(run, ema, oracle)
        share(kind, ema)
    files(f"{folder}/fsdp2")
    divided(f"{folder}/ddp")
    refused()


def share(kind: str, ema: EMA) -> None:
    """FSDP2's DTensors tell how they are cut.

    Nothing tells that DDP's parameters are replicas: each rank holds all.
    """
    held = sum(slot.averaged_region.numel for slot in ema.weights.averages[0].averaged)
    total = sum(p.numel() for p in Net().parameters() if p.requires_grad)
    assert (held == total) == (kind == "ddp")
    assert ema._entry.ranks.size == (1 if kind == "ddp" else 2)


def files(path: str) -> None:
    """Taken by name from one model, an average goes on under a list of another, in the same
    files.
    """
    run = Training("fsdp2")
    ema = EMA(run.model.named_parameters(), 0.5)
    ema.attach(run.optimizer)
    run.train(2)
    ema.save(path)
    again = EMA(wrap("ddp", Net()).module.named_parameters(), 0.5, split=dist.group.WORLD)
    again.load(path)
    first, second = ema.gather(), again.gather()
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    other = Net()
    ema.copy_to(other.named_parameters())
    copied = dict(other.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in ema.names() if first)
    assert all(torch.equal(copied[name], first[name]) for name in first)


def divided(path: str) -> None:
    """split=group: cut like DDP's, half of it on each rank, and equal to the EMA of the DDP
    model.
    """
    run = Training("ddp")
    whole, parts = (
        EMA(run.model, SCHEDULE),
        EMA(run.model.module.named_parameters(), SCHEDULE, split=dist.group.WORLD),
    )
    whole.attach(run.optimizer)
    parts.attach(run.optimizer)
    run.train(3)
    assert parts.metrics()["bytes"] == whole.metrics()["bytes"]
    a, b = whole.gather(), parts.gather()
    assert all(torch.equal(a[name], b[name]) for name in b)
    before = snapshot(run.model)
    with whole.swap():
        lent = snapshot(run.model)
    with parts.swap():
        assert same(lent, snapshot(run.model))
    assert same(before, snapshot(run.model))
    parts.save(path)
    torch.manual_seed(dist.get_rank())
    with raises(ValueError, "differ between ranks 0 and 1"):
        EMA(nn.Linear(3, 3).parameters(), split=dist.group.WORLD)


def refused() -> None:
    for kind in ("fsdp1 flat", "fsdp1 orig"):
        model = wrap(kind, Net())
        with raises(ValueError, "belongs to FSDP1", "pass the model"):
            EMA(model.parameters())


@pytest.mark.multirank
def test_lists_on_ranks(tmp_path: Path) -> None:
    """Red without `Parameters._find_owners`: FSDP2 would evaluate, and train on, copies that no
    swap reaches.
    """
    run_ranks(2, on_ranks, str(tmp_path))
    assert load_file(tmp_path / "fsdp2").keys() == load_file(tmp_path / "ddp").keys()
