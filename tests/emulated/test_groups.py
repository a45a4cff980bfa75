"""Process groups of one process on the emulated device: which waits and devices are chosen.

How to read a failure: streams work when they are waited for, and so every run has the same order.
The fake group of torch gathers this rank's shard twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ema.distributed.ranks import transfer_device
from dist_ema.sharding import wrappers

from . import load, needs

pytestmark = needs


@pytest.fixture(autouse=True)
def device() -> None:
    load()


@contextmanager
def group(backend: str, world: int = 1, **options: Any) -> Iterator[dist.ProcessGroup]:
    torch.accelerator.set_device_index(0)
    store = FakeStore() if "fake" in backend else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=world, **options)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        torch.accelerator.synchronize()
        dist.destroy_process_group()


def test_the_next_all_gather_waits_for_what_was_written_to_the_shards() -> None:
    """`set_post_optim_event` makes it wait for the optimizer alone, and a swap writes after that.

    The streams of the all-gather work first, as far as they may.
    """
    with group("emulated:fake", 2) as both, torch.no_grad():
        model = nn.Linear(6, 4, bias=False).to("emulated:0")
        fully_shard(model, mesh=DeviceMesh.from_group(both, "emulated"))
        x = torch.ones(2, 6, device="emulated:0")
        model(x).cpu()
        model.reshard()
        model.set_post_optim_event(torch.accelerator.current_stream().record_event())
        model.weight._local_tensor.fill_(0.5)
        wrappers.reshard([model])
        result = model(x)
        model._get_fsdp_state()._comm_ctx.all_gather_stream.synchronize()
        assert (result.cpu() == 3).all()


def test_the_host_is_asked_for_by_a_device_type() -> None:
    """Not by a part of a name: this group has no backend for host memory."""
    creator = dist.Backend._plugins["EMULATED"].creator_fn
    dist.Backend.register_backend("cpuless", creator, devices=["emulated"])
    with group("emulated:cpuless") as alone:
        assert transfer_device(alone).type == "emulated"
    with group("cpu:gloo,emulated:cpuless") as alone:
        assert transfer_device(alone).type == "cpu"


def test_bytes_of_the_host_go_where_the_group_is_bound() -> None:
    second = torch.device("emulated", 1)
    with group("emulated:emulated", device_id=second) as alone:
        assert torch.accelerator.current_device_index() == 0
        assert transfer_device(alone, torch.device("cpu")) == second
