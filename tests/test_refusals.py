"""Refusals of models and arguments that need no second process.

A group of one rank, or a fake one, shows EMA what a job of several ranks would.
"""

from __future__ import annotations

import re
import threading
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ema import EMA
from dist_ema.averaging import executors
from dist_ema.sharding import ownership
from dist_ema.sharding.discovery import find_shards

CPU = torch.device("cpu")


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


@pytest.fixture
def alone() -> Iterator[Any]:
    """A mesh of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def fake() -> Iterator[None]:
    """Four ranks, of which the others do nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chooser", [True, ["weight"], "["])
def test_names_are_chosen_by_text_or_a_function(chooser: Any) -> None:
    text = re.escape(f"a regex or a predicate, got {chooser!r}.")
    with pytest.raises(ValueError, match=f"^buffers must be 'copy', 'average', {text}"):
        EMA(linear(), buffers=chooser)
    with pytest.raises(ValueError, match=f"^only must be {text}"):
        EMA(linear(), only=chooser)


def test_models_that_differ_take_no_copy() -> None:
    with pytest.raises(ValueError, match="the models differ in 0.weight, weight"):
        EMA(linear()).copy_to(nn.Sequential(linear()))


def test_stages_that_hold_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="no trainable floating-point weights"):
        EMA([linear().requires_grad_(False)])


def test_stages_have_no_whole_model() -> None:
    ema = EMA([linear()])
    for verb in (lambda: ema.copy_to(linear()), lambda: list(ema.tensors())):
        with pytest.raises(RuntimeError, match="of the stages of a pipeline"):
            verb()


def test_averages_of_what_is_frozen_now_are_passed_over(tmp_path: Path) -> None:
    model = nn.Sequential(linear(), linear())
    EMA(model, 0.5).save(tmp_path / "a")
    model[0].requires_grad_(False)
    ema = EMA(model, 0.5)
    with pytest.warns(UserWarning, match=r"0\.weight"):
        ema.load(tmp_path / "a")


# --- threads --------------------------------------------------------------------------------------


def fail(*_: Any) -> None:
    raise KeyError("in the thread")


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(KeyError):
        executors.run_shielded(fail, [CPU], 1.0)


class Ticket(threading.Event):
    """Nobody sets it. It ends a wait that goes on all the same."""

    looks = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.looks += 1
        return self.looks > 3


def test_a_thread_that_is_gone_is_named() -> None:
    """As after a fork: the child has the ticket, and no thread that will ever set it."""
    with pytest.raises(RuntimeError, match="was this process forked"):
        executors.Worker().wait(Ticket())


# --- tensors --------------------------------------------------------------------------------------


def partial_sum(mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])


def other_size(mesh: DeviceMesh) -> DTensor:
    tensor = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    tensor._local_tensor = torch.ones(3, 4)
    return tensor


def strided(mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(torch.ones(4, 8)[:, ::2], mesh, [Replicate()], run_check=False)


DTENSORS: dict[str, tuple[Callable[[DeviceMesh], DTensor], str]] = {
    "partial": (partial_sum, "weight has placements .* Redistribute it"),
    "another size": (other_size, r"weight: .* should leave \(4, 4\) here, found \(3, 4\)"),
    "strided": (strided, r"weight: the local tensor has shape \(4, 4\) and strides \(8, 2\)"),
}


@pytest.mark.parametrize(("make", "words"), DTENSORS.values(), ids=DTENSORS)
def test_dtensors_that_cannot_be_averaged(alone: DeviceMesh, make: Any, words: str) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(make(alone))
    with pytest.raises(ValueError, match=words):
        EMA(model)


def test_weights_on_ranks_that_do_not_contain_each_other(fake: None) -> None:
    model = nn.Sequential(linear(), linear())
    for place, ranks in enumerate(([0, 1], [0, 2])):
        fully_shard(model[place], mesh=DeviceMesh("cpu", ranks))
    with pytest.raises(ValueError, match=r"live on ranks \[0, 1\] and on ranks \[0, 2\]"):
        find_shards(model)


def test_a_model_that_is_sharded_after_its_average(fake: None) -> None:
    model = linear()
    weights = EMA(model).weights
    fully_shard(model, mesh=DeviceMesh("cpu", [0, 1]))
    with pytest.raises(RuntimeError, match=r"weight is held by ranks \[0, 1\] now"):
        weights.adopt(weights.find())


# --- FSDP1 ----------------------------------------------------------------------------------------

OF_ONE_RANK = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")


@OF_ONE_RANK
def test_fsdp1_over_dtensors(alone: DeviceMesh) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model = linear()
    model.weight = nn.Parameter(distribute_tensor(model.weight, mesh["tensor"], [Shard(0)]))
    wrapped = FullyShardedDataParallel(model, device_mesh=mesh["data"], device_id=CPU)
    with pytest.raises(ValueError, match="weight is a DTensor inside FSDP1"):
        EMA(wrapped)


@OF_ONE_RANK
def test_fsdp1_on_the_meta_device(alone: DeviceMesh) -> None:
    """FSDP1 itself refuses to wrap a model there, where there is no accelerator."""
    wrapped = FullyShardedDataParallel(linear(), use_orig_params=False, device_id=CPU)
    with pytest.raises(ValueError, match="weight is on the meta device. Pass param_init_fn"):
        EMA(wrapped.to("meta"))


@OF_ONE_RANK
def test_parameters_of_fsdp1(alone: DeviceMesh) -> None:
    model = FullyShardedDataParallel(linear(), device_id=CPU)
    with pytest.raises(ValueError, match="belongs to FSDP1, which moves"):
        EMA(model.named_parameters())


# --- DeepSpeed ------------------------------------------------------------------------------------


def taken_over(model: nn.Linear, start: int = 0) -> nn.Linear:
    """As DeepSpeed marks a weight of which this rank holds masters."""
    fragment = types.SimpleNamespace(
        lp_fragment_address=types.SimpleNamespace(start=start, numel=16), hp_fragment=torch.ones(16)
    )
    weight: Any = model.weight
    weight._hp_mapping, weight._dp_group = fragment, dist.group.WORLD
    return model


def test_a_layout_that_is_not_known(alone: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=r"weight is cut by DeepSpeed at \(4, 20\) on rank 0"):
        EMA(taken_over(linear(), start=4))


def test_masters_are_stepped_by_the_engine(alone: DeviceMesh) -> None:
    model = taken_over(linear())
    ema = EMA(model)
    with pytest.raises(ValueError, match="weight has fp32 masters at DeepSpeed, and its optimizer"):
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="weight of the teacher has fp32 masters at DeepSpeed"):
        EMA(linear(), into=model)
    shard = find_shards(model).shards[0]
    with pytest.raises(ValueError, match="weight has fp32 masters that DeepSpeed divides"):
        ownership.assign([shard], lambda _: True, split=False)


def test_a_weight_that_deepspeed_took_over(alone: DeviceMesh) -> None:
    model = linear()
    ema = EMA(model)
    taken_over(model).weight.data = model.weight.data.clone()
    with pytest.raises(RuntimeError, match="weight belongs to DeepSpeed now"):
        ema.update()


class DeepSpeedEngine:
    """What EMA looks at to know an engine."""

    step = was_step_applied = partial(bool, True)


DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"


def test_16_bits_without_masters() -> None:
    model, engine = linear().to(torch.bfloat16), cast(Any, DeepSpeedEngine())
    with pytest.raises(ValueError, match="weight is kept in 16 bits here, and DeepSpeed without"):
        EMA(model).attach(engine)
