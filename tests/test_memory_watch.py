"""What an update sees of a model that changed, through the compiled loop and through torch alone.

How to read a failure: "compiled" looks at tables of addresses, "torch" at one weight after the
other. Both must say the same of every edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass
class Way:
    """How weights are looked at, and how often the compiled loop was called."""

    compiled: bool
    calls: int = 0


@pytest.fixture(params=["compiled", "torch"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Small models go through the loop too, or none does."""
    used = Way(request.param == "compiled")
    loop: Any = memory_watch.find_loop() if used.compiled else None
    if used.compiled:
        pytest.importorskip("numba", reason="the loop is compiled by numba")
        assert loop is not None

    def counted(*arguments: int) -> bool:
        used.calls += 1
        return bool(loop(*arguments))

    monkeypatch.setattr(memory_watch, "find_loop", lambda: counted if used.compiled else None)
    if used.compiled:
        monkeypatch.setattr(memory_watch, "MANY", 1)
    return used


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
    """As many modules, one under another name."""
    del model[2][0]
    model[2].last = nn.Linear(6, 3)


EDITS: list[Callable[[Any], None]] = [
    moved, freed, turned, replaced, none, deleted, another_weight, another_child, child_of_none,
    another_module, one_child_less, renamed_child, traded,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_edit_is_seen(edit: Any, way: Way) -> None:
    model = net()
    look = watch(model)
    assert not look.changed()
    with torch.no_grad():
        model[0].weight.add_(1)  # a step
    assert not look.changed()
    assert way.calls == way.compiled  # the first look goes without, and fills the tables
    edit(model)
    assert look.changed()


def test_other_objects_in_the_same_memory_are_no_change(way: Way) -> None:
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
def test_local_tensors_of_dtensors_are_looked_at(way: Way) -> None:
    model = net()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    look = memory_watch.MemoryWatch(find_shards(model).shards)
    weight: Any = model[0].weight
    assert not look.changed()
    weight._local_tensor = weight._local_tensor.view_as(weight._local_tensor)
    assert not look.changed()
    weight._local_tensor = weight._local_tensor.clone()
    assert look.changed()


@pytest.mark.parametrize("number", [10, memory_watch.MANY])
def test_the_loop_is_for_many_weights(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory_watch, "find_loop", lambda: asked.append(number))
    watch(nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(number)])).changed()
    assert bool(asked) == (number == memory_watch.MANY)


def test_the_loop_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMBA_DISABLE_JIT=1 is numba's own switch, and ours."""
    numba = pytest.importorskip("numba", reason="the loop is compiled by numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    assert memory_watch.find_loop.__wrapped__() is None


class Mine(nn.Parameter):
    """A subclass may answer for another memory than its own."""


@pytest.mark.parametrize("kind", [nn.Parameter, Mine])
def test_only_plain_tensors_are_read_by_the_loop(kind: Any, way: Way) -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight = kind(model.weight.data)
    look = watch(model)
    assert not look.changed()
    assert not look.changed()
    assert way.calls == (way.compiled and kind is nn.Parameter)


def test_update_follows_a_move_and_names_a_replaced_weight(way: Way) -> None:
    model = net()
    ema = EMA(model, 0.5)
    before = ema.gather()["0.weight"].clone()
    model[0].weight.data = torch.full_like(model[0].weight, 2.0)
    ema.update()
    torch.testing.assert_close(ema.gather()["0.weight"], (before + 2) / 2)
    model[2][0] = nn.Linear(6, 3)
    with pytest.raises(RuntimeError, match=r"2\.0\.weight"):
        ema.update()
