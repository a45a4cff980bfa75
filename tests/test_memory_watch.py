"""What an update sees of a model that changed, through the compiled loop and through torch alone.

How to read a failure: "compiled" looks at tables of addresses, "torch" at one weight after the
other. Both must say the same of every edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ema import EMA
from dist_ema.sharding import memory_watch
from dist_ema.sharding.discovery import find_shards


@pytest.fixture(params=["compiled", "torch"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small models go through the loop too, or none does."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the loop is compiled by numba")
        assert memory_watch._find_loop() is not None
        monkeypatch.setattr(memory_watch, "MANY", 1)
    else:
        monkeypatch.setattr(memory_watch, "_find_loop", lambda: None)
    return str(request.param)


def net() -> Any:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3)), nn.Linear(3, 3, bias=False)
    )


def watch(model: nn.Module) -> memory_watch.MemoryWatch:
    return memory_watch.MemoryWatch(find_shards(model).shards, [model])


def moved(model: Any) -> None:
    model[2][0].bias.data = model[2][0].bias.data.clone()


def traded(model: Any) -> None:
    """The same object with the elements of another."""
    torch.utils.swap_tensors(model[3].weight, nn.Parameter(torch.zeros(3, 3)))


def freed(model: Any) -> None:
    model[0].weight.untyped_storage().resize_(0)


def turned(model: Any) -> None:
    model[3].weight.data = model[3].weight.data.t()


def replaced(model: Any) -> None:
    model[0].bias = nn.Parameter(torch.zeros(6))


def none(model: Any) -> None:
    model[0].bias = None


def deleted(model: Any) -> None:
    del model[0].bias


def another_weight(model: Any) -> None:
    model[0].gain = nn.Parameter(torch.zeros(6))


def another_child(model: Any) -> None:
    model[2].add_module("norm", nn.LayerNorm(3))


def child_of_none(model: Any) -> None:
    model[1].add_module("norm", nn.LayerNorm(3))


def another_module(model: Any) -> None:
    model[2] = nn.Sequential(nn.Linear(6, 3))


def one_child_less(model: Any) -> None:
    del model[3]


def renamed_child(model: Any) -> None:
    """The same modules in the same number, under other names."""
    model[2].last = model[2]._modules.pop("0")
    model[2].last = nn.Linear(6, 3)


EDITS: list[Callable[[Any], None]] = [
    moved, freed, turned, replaced, none, deleted, another_weight, another_child, child_of_none,
    another_module, one_child_less, renamed_child, traded,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_edit_is_seen(edit: Any, way: str) -> None:
    model = net()
    look = watch(model)
    assert (look._table is not None) == (way == "compiled")
    assert not look.changed()
    with torch.no_grad():
        model[0].weight.add_(1)  # a step
    assert not look.changed()
    edit(model)
    assert look.changed()


def test_other_objects_in_the_same_memory_are_no_change(way: str) -> None:
    """A Parameter made anew over the same elements. The next move is seen again."""
    model = net()
    look = watch(model)
    for _ in range(2):
        model[0].weight = nn.Parameter(model[0].weight.data)
        assert not look.changed()
    model[0].weight.data = model[0].weight.data.clone()
    assert look.changed()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_local_tensors_of_dtensors_are_looked_at(way: str) -> None:
    model = net()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    look = memory_watch.MemoryWatch(find_shards(model).shards)
    weight: Any = model[0].weight
    assert not look.changed()
    weight._local_tensor = weight._local_tensor.view_as(weight._local_tensor)
    assert not look.changed()
    weight._local_tensor = weight._local_tensor.clone()
    assert look.changed()


def test_many_weights_are_compiled_and_few_are_not() -> None:
    pytest.importorskip("numba", reason="the loop is compiled by numba")
    for number, compiled in ((10, False), (memory_watch.MANY, True)):
        model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(number)])
        assert (watch(model)._table is not None) == compiled


@pytest.mark.parametrize("subclass", [False, True])
def test_only_plain_tensors_are_read_by_the_loop(subclass: bool, way: str) -> None:
    """A subclass may answer for another memory than its own."""

    class Mine(nn.Parameter):
        pass

    model = nn.Linear(4, 4, bias=False)
    if subclass:
        model.weight = Mine(model.weight.data)
    assert (watch(model)._table is None) == (subclass or way == "torch")


def test_update_follows_a_move_and_names_a_replaced_weight(way: str) -> None:
    model = net()
    ema = EMA(model, 0.5)
    model[0].weight.data = torch.full_like(model[0].weight, 2.0)
    before = ema.gather()["0.weight"].clone()
    ema.update()
    torch.testing.assert_close(ema.gather()["0.weight"], (before + 2) / 2)
    model[2][0] = nn.Linear(6, 3)
    with pytest.raises(RuntimeError, match=r"2\.0\.weight"):
        ema.update()
