"""Every verb under `torch.set_default_device`: what dist_ema needs on the host lies there.

On the meta device a tensor has no elements, so a verb that forgot to say where it allocates
raises, or returns what cannot be compared.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dist_ema
from dist_ema import EMA

from ._models import Net
from ._ranks import run_ranks


def every_verb(model: nn.Module, folder: Path, **options: Any) -> None:
    """The verbs of an EMA of `model`, whose average is then the oracle's."""
    ema = EMA(model, 0.5, **options)
    want = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    handle = ema.attach(optimizer, guard=True)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25) if p.requires_grad else None
        optimizer.step()
        for name, p in model.named_parameters():
            want[name].lerp_(p.detach().double(), 0.5)
        assert ema.metrics(distance=False)["updates"] > 0
    ema.save(folder / "one", wait=False)
    handle.remove()
    with ema.swap():
        for name, p in model.named_parameters():
            assert torch.allclose(p.double(), want[name], atol=0.02, rtol=0.02)
    ema.save(folder / "two")
    ema.export(folder / "export", dtype=torch.bfloat16)
    files = dist_ema.load_file(folder / "two")
    gathered = ema.gather()
    assert all(torch.equal(value, files[name]) for name, value in gathered.items())
    assert ema.metrics()["distance"] > 0
    state = ema.state_dict()
    assert {state["clock"].device.type} == {"cpu"}
    ema.reset()
    ema.load(folder / "one")
    speaks = not dist.is_initialized() or dist.get_rank() == 0  # for all that would say the same
    with pytest.warns(UserWarning, match="is an export") if speaks else nullcontext():
        ema.load(folder / "export")
    ema.load_state_dict(state)
    ema.rescan()
    ema.to(dtype=torch.float64).update()
    other = copy.deepcopy(model.module if hasattr(model, "module") else model)
    ema.copy_to(other)


def verbs_on_ranks(folder: str) -> None:
    torch.manual_seed(0)
    models = [DistributedDataParallel(Net()) for _ in range(3)]
    options: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16}, {"device": "cpu"}]
    torch.set_default_device("meta")
    for i, (model, chosen) in enumerate(zip(models, options, strict=True)):
        every_verb(model, Path(folder) / str(i), **chosen)


@pytest.mark.multirank
def test_every_verb_among_ranks(tmp_path: Path) -> None:
    run_ranks(2, verbs_on_ranks, str(tmp_path))


def test_every_verb_alone(tmp_path: Path) -> None:
    """Compiled passes too: the weights are large enough for one, where numba is installed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 300), nn.BatchNorm1d(300), nn.Linear(300, 2))
    teacher = copy.deepcopy(model)
    torch.set_default_device("meta")
    try:
        every_verb(model, tmp_path, buffers="average")
        EMA(model, 0.5, into=teacher).update()
    finally:
        torch.set_default_device(None)
