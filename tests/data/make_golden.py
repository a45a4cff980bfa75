"""Writes the golden folders: `python tests/data/make_golden.py OUT`.

The folders in `golden/` were written at commit 1ee8245. Later versions must load them bit for bit
and must write the same bytes again, which `tests/test_golden.py` checks. So this file uses the
public API only, and it must not change what it writes.

All numbers are dyadic and short: every product and sum is exact in float32. The bytes do therefore
not depend on the processor, the kernel, the wrapper or the number of ranks.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, Constant, Power, Uniform

WORLD = 2


class Net(nn.Module):
    """Tied weights, a frozen layer, BatchNorm, and rows that two ranks cannot divide."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm = nn.Embedding(7, 3), nn.BatchNorm1d(3)
        self.up, self.gate = nn.Linear(3, 5), nn.Linear(3, 1)
        self.frozen, self.head = nn.Linear(2, 2), nn.Linear(3, 7, bias=False)
        self.head.weight = self.emb.weight
        self.frozen.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """What is averaged and how far.

    moves: the elapsed of each update by hand. steps: optimizer steps under `attach`, instead.
    own: the averages whose BatchNorm buffers are recalibrated. half: the model is bfloat16.
    """

    decay: Sequence[Any] = (0.5,)
    options: dict[str, Any] = field(default_factory=dict)
    moves: Sequence[float] = (1, 1, 2)
    attach: dict[str, Any] | None = None
    steps: int = 0
    own: Sequence[int] = ()
    save: dict[str, Any] = field(default_factory=dict)
    half: bool = False


CASES = {
    "one": Case(save={"extra": {"epoch": 3, "words": ["äöü", None, 0.5]}}),
    "several": Case([0.5, 0.75, Power(gamma=1.0)], moves=(1, 1, 2, 4), own=(0, 2)),
    "eleven": Case([Constant(0.5 + k / 32) for k in range(11)], {"only": "gate"}, moves=(1, 1)),
    "only": Case([0.5, 0.75], {"only": "up|norm"}, own=(1,)),
    "own": Case(own=(0,)),
    "buffers": Case(options={"buffers": "average"}),
    "compact": Case([0.5, Uniform()], {"dtype": torch.bfloat16}, moves=(1, 1, 2, 4)),
    "half": Case(half=True),
    "shards": Case([0.5, 0.75], save={"max_shard_size": 100}),
    "attach": Case(
        [0.5, 0.75], attach={"every": 3, "start": 2, "elapsed": 2.0}, steps=6, own=(0, 1),
        save={"max_shard_size": 200, "extra": {"epoch": 1}},
    ),
    "waiting": Case(attach={"every": 1, "start": 9}, steps=2),
}  # fmt: skip
PROFILES = Case([Power(gamma=1.0), Uniform()], moves=(1, 1, 2, 4))  # of the snapshots
ON_RANKS = ("several", "compact", "attach")  # the cases that every wrapper writes


def model_of(case: Case) -> nn.Module:
    """The model before its first step."""
    model = Net()
    with torch.no_grad():
        for k, value in enumerate([*model.parameters(), *model.buffers()]):
            numbers = ((torch.arange(value.numel()) * 29 + 13 * k) % 127 - 63).view(value.shape)
            value.copy_(numbers / 64 if value.requires_grad or value.dim() == 2 else numbers.abs())
    return model.bfloat16() if case.half else model


def ema_of(case: Case, model: nn.Module) -> EMA:
    decay = case.decay if len(case.decay) > 1 else case.decay[0]
    return EMA(model, decay, **case.options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Halve every weight."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = p.detach().clone()
    optimizer.step()


def averaged(case: Case, model: nn.Module, after: Callable[[EMA], Any] = lambda ema: None) -> EMA:
    """The average after all steps of the case. `after` is called behind every update by hand."""
    ema, optimizer = ema_of(case, model), optimizer_of(model)
    if case.attach is not None:
        ema.attach(optimizer, **case.attach)
    for _ in range(case.steps):
        step(model, optimizer)
    for elapsed in () if case.attach is not None else case.moves:
        step(model, optimizer)
        ema.update(elapsed)
        after(ema)
    for which in case.own:
        with ema.swap(which), torch.no_grad():
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer += 0.25 * (which + 1)
    return ema


# --- wrappers ------------------------------------------------------------------------------------


def wrap_fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap_fsdp1(model: nn.Module) -> nn.Module:
    """Flat parameters; the frozen layer has its own, which cannot be half frozen."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    model.frozen = FullyShardedDataParallel(model.frozen, use_orig_params=False, device_id=device)
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=device)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp2": wrap_fsdp2,
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp1": wrap_fsdp1,
}


# --- what is written -----------------------------------------------------------------------------


def write_plain(out: Path) -> None:
    """Every case, the exports and the snapshots, in one process."""
    for name, case in CASES.items():
        averaged(case, model_of(case)).save(out / "plain" / name, **case.save)
    several = averaged(CASES["several"], model_of(CASES["several"]))
    several.export(out / "export" / "first", max_shard_size=100)
    several.export(out / "export" / "third", which=2, dtype=torch.bfloat16)
    several.export(out / "export" / "one.safetensors", which=1)
    for name, dtype in (("snapshots", None), ("snapshots-half", torch.bfloat16)):
        _snapshots(out / name, dtype)


def _snapshots(folder: Path, dtype: torch.dtype | None) -> None:
    model = model_of(PROFILES)
    averaged(PROFILES, model, lambda ema: ema.snapshot(folder, every=2, dtype=dtype))


def write_on_ranks(out: Path) -> None:
    """The cases of `ON_RANKS` and an export under every wrapper; a DCP folder. *Collective*."""
    import torch.distributed.checkpoint as dcp

    for wrapper, wrap in WRAPPERS.items():
        for name in ON_RANKS:
            case = CASES[name]
            ema = averaged(case, wrap(model_of(case)))
            ema.save(out / wrapper / name, **case.save)
            if name == "several":
                ema.export(out / wrapper / "export", which=1)
            if (wrapper, name) == ("fsdp2", "attach"):
                with _inside(out):  # DCP writes the path into its table
                    dcp.save({"ema": ema}, checkpoint_id="dcp")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _rank(rank: int, out: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    write_on_ranks(Path(out))
    dist.barrier()
    os._exit(0)  # gloo aborts now and then in a normal exit, after everything passed


if __name__ == "__main__":
    import torch.multiprocessing

    write_plain(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_rank, (sys.argv[1], f"{place}/store"), nprocs=WORLD)
