"""Programs that one statement alone tells apart. `python -m tests.guards` names them beside it.

How to read a failure: the docstring says what the program does. A warning is an error here, so a
program that only calls verbs says that none of them warns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import EMA
from dist_ema.averaging import drop_in_rules
from dist_ema.averaging.swap import WeightSwap
from dist_ema.sharding.discovery import find_shards
from dist_ema.sharding.memory_watch import MemoryWatch
from dist_ema.sharding.ownership import assign


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def train(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def averaged(model: nn.Module, **options: Any) -> EMA:
    """An EMA that has moved three times, so that every update looks as all later ones do."""
    ema = EMA(model, 0.5, **options)
    for _ in range(3):
        train(model)
        ema.update()
    return ema


# --- verbs that warn where the average did not follow -------------------------------------------


def swapped(model: nn.Module, ema: EMA, path: Path) -> None:
    with ema.swap():
        ema.metrics(distance=False)


def swapped_by_another(model: nn.Module, ema: EMA, path: Path) -> None:
    with EMA(model, 0.9).swap():
        pass


def pulled(model: nn.Module, ema: EMA, path: Path) -> None:
    drop_in_rules.pull(ema.weights, 0.5)


def begun_again(model: nn.Module, ema: EMA, path: Path) -> None:
    ema.reset()
    ema.gather()
    train(model)
    ema.reset()


def resumed(model: nn.Module, ema: EMA, path: Path) -> None:
    """Live weights are loaded after the average."""
    ema.save(path / "a")
    ema.load(path / "a")
    train(model)


@pytest.mark.parametrize(
    "program", [swapped, swapped_by_another, pulled, begun_again, resumed], ids=lambda f: f.__name__
)
def test_writes_that_are_no_training(program: Callable[..., None], tmp_path: Path) -> None:
    model = net()
    ema = averaged(model)
    ema.gather()
    program(model, ema, tmp_path)
    ema.gather()


@pytest.mark.parametrize("swaps", [0, 1])
def test_training_that_no_update_follows_is_named(swaps: int) -> None:
    """Since the EMA was built, or since it wrote the weights."""
    model = net()
    ema = EMA(model, 0.5)
    for _ in range(swaps):
        with ema.swap():
            pass
    train(model)
    with pytest.warns(UserWarning, match="no update came"):
        ema.gather()


# --- swaps ----------------------------------------------------------------------------------------


def test_swaps_of_two_averages_in_each_other_write_nothing() -> None:
    """The inner one is no write of the outer block, now or in the next swap."""
    model = net()
    outer, inner = averaged(model), EMA(model, 0.9)
    with outer.swap(), inner.swap():
        pass
    with outer.swap():
        pass


def in_place(weight: Any) -> None:
    with torch.no_grad():
        weight[0, 1] = 3


def before_it_moves(weight: Any) -> None:
    in_place(weight)
    weight.data = weight.data.clone()


def as_it_moves(weight: Any) -> None:
    weight.data = weight.data.clone().index_fill_(1, torch.tensor(1), 3)


@pytest.mark.parametrize("write", [in_place, before_it_moves, as_it_moves])
def test_a_write_into_a_frozen_weight_is_named(write: Callable[[Any], None]) -> None:
    """Of an element that is not among those whose bits are summed."""
    model = nn.Sequential(net(), nn.Linear(40, 40))
    model[1].requires_grad_(False)
    ema = averaged(model)
    with pytest.warns(UserWarning, match=r"^1\.weight is not averaged and was written"), ema.swap():
        write(model[1].weight)


def test_a_swap_that_is_dropped_restores_live_weights() -> None:
    """An interrupt may leave behind every `finally` that would have left the swap."""
    model = net()
    ema = averaged(model)
    live, weights = copy.deepcopy(model.state_dict()), ema.weights
    assert weights.ranks is not None
    swap = WeightSwap(weights, weights.used(0), weights.ranks, leads=True)
    swap.enter()
    del swap
    assert all(map(torch.equal, live.values(), model.state_dict().values()))


def test_a_buffer_that_the_block_removes_is_named() -> None:
    model = net()
    ema = averaged(model)
    with pytest.raises(RuntimeError, match=r"^1\.running_mean is no buffer"), ema.swap():
        model[1].running_mean = None


def test_an_exception_in_the_block_carries_what_was_written() -> None:
    model = net()
    ema = averaged(model)
    with pytest.raises(KeyError) as caught, ema.swap():
        with torch.no_grad():
            model[0].weight.add_(1)
        raise KeyError
    notes = getattr(caught.value, "__notes__", [""])
    assert notes[0].startswith("0.weight was written inside ema.swap()")


class Merging(nn.Module):
    """It merges a delta into its weight in eval mode, and takes it out in training mode."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(2)), inner

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            self.weight.data.add_(-1 if mode else 1)
        return super().train(mode)


def test_a_module_that_trains_in_one_that_does_not_merges_nothing() -> None:
    """The outer one goes to training mode and back, and its `train` reaches the inner one."""
    inner = Merging()
    model = Merging(inner)
    model.eval()
    inner.train()
    ema = EMA(model, 0.5)
    for _ in range(2):
        with ema.swap():
            pass
    assert inner.weight.tolist() == [1, 1]
    assert model.weight.tolist() == [2, 2]


# --- what the model is now ------------------------------------------------------------------------


def test_a_weight_that_was_unfrozen_is_named_by_every_verb() -> None:
    model = net()
    model[2].requires_grad_(False)
    ema = averaged(model)
    model[2].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^2\.weight, 2\.bias became trainable"):
        ema.gather()


def test_a_tie_under_an_earlier_name_keeps_its_average() -> None:
    model = net()
    ema = averaged(model)
    old = ema.gather()["2.weight"]
    model[0].weight = model[2].weight
    ema.rescan()
    assert torch.equal(ema.gather()["0.weight"], old)


def test_a_buffer_that_no_longer_persists_is_in_no_file() -> None:
    model = net()
    model.register_buffer("steps", torch.zeros(2))
    ema = averaged(model)
    model.register_buffer("steps", torch.zeros(2), persistent=False)
    assert "steps" not in ema.gather()


def test_an_averaged_buffer_that_is_assigned_is_followed() -> None:
    model = net()
    ema = averaged(model, buffers="average")
    ema.update()
    for value in (1.0, 2.0):
        model[1].running_mean = torch.full((4,), value)
        ema.update()
    assert torch.equal(ema.gather()["1.running_mean"], torch.full((4,), 1.25))


def test_frozen_strided_weights_are_read_as_they_are() -> None:
    """Their elements are copied, so that no address tells of a write."""
    base = torch.zeros(2, 4)
    model = net()
    model.register_parameter("strided", nn.Parameter(base[:, ::2], requires_grad=False))
    teacher = copy.deepcopy(model)
    for options in ({}, {"into": teacher}):
        ema = averaged(model, **options)
        base.add_(3)
        assert torch.equal(ema.gather()["strided"], base[:, ::2])
    assert torch.equal(teacher.strided, base[:, ::2])


def test_a_strided_weight_is_read_anew_wherever_its_copy_lies() -> None:
    """The next copy may lie where the last one did: here it always does."""
    memory = torch.zeros(2, 2)
    base = nn.Parameter(torch.zeros(2, 4)[:, ::2], requires_grad=False)
    (shard,) = find_shards(nn.ParameterList([base])).shards
    (state,) = assign([replace(shard, local_tensor=lambda: memory)], lambda _: False, split=False)
    assert not shard.dense
    assert state.moved


def test_masters_that_lie_elsewhere_are_noticed() -> None:
    masters = [torch.zeros(16)]
    shard = replace(find_shards(nn.Linear(4, 4, bias=False)).shards[0], master=lambda: masters[0])
    watch = MemoryWatch([shard])
    assert not watch.changed()
    masters[0] = torch.zeros(16)
    assert watch.changed()


# --- teachers -------------------------------------------------------------------------------------


def test_reset_copies_frozen_weights_that_the_teacher_has_otherwise() -> None:
    model = net()
    model[2].requires_grad_(False)
    teacher = copy.deepcopy(model)
    ema = averaged(model, into=teacher)
    teacher[2].weight.data.add_(1)
    ema.reset()
    assert torch.equal(teacher[2].weight, model[2].weight)


def test_a_late_start_copies_what_was_frozen_and_written_before() -> None:
    """Through `.data`, which no counter counts: a merge of adapters for one."""
    model = net()
    model[2].requires_grad_(False)
    teacher = copy.deepcopy(model)
    ema = EMA(model, 0.5, into=teacher)
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    ema.attach(optimizer, start=2)
    for number in range(1, 4):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        if number == 1:
            teacher(torch.randn(4, 4))  # the live model so far, so all of it is copied
            model[2].weight.data.add_(1)
    assert ema.now == 1
    assert torch.equal(teacher.state_dict()["2.weight"], model[2].weight)


# --- FSDP2 ----------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_in_one_process(mesh: Any) -> None:
    """The root keeps its unsharded copy after a forward; swaps must not read or leave it stale."""
    model: Any = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh)
    rows = torch.eye(4)
    ema = averaged(model)
    live = model(rows)
    with ema.swap():
        inside = model(rows)
        assert not torch.equal(inside, live)
    assert torch.equal(model(rows), live)


def test_a_local_tensor_that_fsdp2_replaces_is_followed(mesh: Any) -> None:
    """CPU offload pins it anew."""
    model: Any = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh)
    ema = averaged(model)
    before: Tensor = ema.gather()["weight"]
    model.weight._local_tensor = model.weight._local_tensor + 2
    live = model.weight.full_tensor().detach()
    ema.update()
    torch.testing.assert_close(ema.gather()["weight"], (before + live) / 2)


def test_a_layer_under_fsdp2_that_was_unfrozen_is_named_by_the_update(mesh: Any) -> None:
    model: Any = net()
    model[2].requires_grad_(False)
    fully_shard(model, mesh=mesh)
    ema = averaged(model)
    model[2].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^2\.weight, 2\.bias became trainable"):
        ema.update()
