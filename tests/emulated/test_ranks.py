"""Collectives that run on streams, on two devices: what ranks of an accelerator must wait for.

Every rank has its own device, and its streams work unasked after a few milliseconds, as two ranks
wait for each other's streams.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import EMA, load_file
from dist_ema.sharding import wrappers
from tests._ranks import run_ranks

from . import needs

pytestmark = [needs, pytest.mark.multirank]

Wrap = Callable[[nn.Module, dist.ProcessGroup], nn.Module]


def net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).to(device)


def ddp(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def fsdp(model: nn.Module, group: dist.ProcessGroup, **options: Any) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "emulated")
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh, **options)
    return model


def offloaded(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return fsdp(model, group, offload_policy=CPUOffloadPolicy())


def train(wrap: Wrap, group: Any, device: torch.device, folder: Path, **options: Any) -> list[Any]:
    """Numbers of a run: what the model gives inside and after swaps, and the average."""
    model = wrap(net(device), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, **options)
    x = torch.linspace(-1, 1, 12, device=device).view(2, 6)
    seen: list[Tensor] = []

    def look() -> None:
        with torch.no_grad():
            seen.append(model(x).sum().cpu())

    for step in range(4):
        model(x + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if wrap is not ddp:
            # The next all-gather waits for the step alone, if the swap does not see to it.
            model.set_post_optim_event(torch.accelerator.current_stream().record_event())
        with ema.swap():
            look()
        look()
    ema.save(folder)
    files = load_file(folder)
    assert all(torch.equal(v.cpu(), files[k]) for k, v in ema.gather().items())
    return [float(value) for value in seen] + [float(v.sum()) for v in files.values()]


def runs(folder: str) -> dict[str, Any]:
    device = torch.device("emulated", dist.get_rank())
    group = dist.group.WORLD
    found: dict[str, Any] = {}
    for wrap in (ddp, fsdp, offloaded):
        for overlap in (False, True):
            name = f"{wrap.__name__} {overlap}"
            found[name] = train(wrap, group, device, Path(folder) / name, overlap=overlap)
    found["late"] = late(group, device)
    found["far"] = far(group, device)
    return found


@torch.no_grad()
def late(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Shards are written after the event of the optimizer: the next forward waits for both."""
    model, plain = fsdp(net(device), group), net(device)
    x = torch.ones(2, 6, device=device)
    model(x)
    model.set_post_optim_event(torch.accelerator.current_stream().record_event())
    for _ in range(500):  # the writes are later than an all-gather that does not wait for them
        x.add_(0)
    for weight in (*model.parameters(), *plain.parameters()):
        getattr(weight, "_local_tensor", weight).fill_(0.5)
    wrappers.reshard([*model.modules()])
    return torch.equal(model(x).cpu(), plain(x).cpu())


def far(group: dist.ProcessGroup, device: torch.device) -> bool:
    """The current device is not the model's: bytes go where the model lies, as NCCL demands."""
    model = ddp(net(device), group)
    torch.accelerator.set_device_index(0)
    ema = EMA(model, 0.5)
    ema.update()
    with ema.swap():
        pass
    other = net(device)
    ema.copy_to(other)
    return same(other, model.module)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


@pytest.mark.parametrize("backend", ["cpu:gloo,emulated:emulated", "emulated:emulated"])
def test_swaps_among_ranks(tmp_path: Path, backend: str) -> None:
    """Overlapped equals inline, and every wrapper evaluates the average and then live weights."""
    results = run_ranks(2, runs, str(tmp_path), backend=backend)
    for found in results:
        assert found["far"]
        assert found["late"]
        for wrap in ("ddp", "fsdp", "offloaded"):
            assert found[f"{wrap} True"] == found[f"{wrap} False"]
            assert found[f"{wrap} True"] == pytest.approx(found["ddp False"], rel=1e-5)
    assert results[0] == results[1]
