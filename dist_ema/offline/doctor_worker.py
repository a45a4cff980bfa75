"""The child processes of `doctor`: facts about torch, and one rank of the self-test.

    python -m dist_ema.offline.doctor_worker facts
    python -m dist_ema.offline.doctor_worker rank R W FOLDER

A rank writes the step that it is at to FOLDER/rank-R.step, so that an error can name it. The error
itself is the last line on stderr. A rank does what a user's script does, so it names wrappers, as
`sharding` does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["facts", "rank"]


def facts() -> dict[str, Any]:
    """The facts about torch and this machine."""
    import torch
    import torch.distributed as dist

    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    kind = accelerator.type if accelerator is not None else None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "accelerator": kind,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if kind == "cuda"
        else [],
        "distributed": dist.is_available(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def rank(number: int, world: int, folder: Path) -> None:
    """One rank of the self-test under FSDP2 and DDP. *Collective*.

    It trains, averages, saves, loads, and compares with full weights.
    """
    begin = partial(_begin, folder / f"rank-{number}")
    begin("import torch and dist_ema")
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    begin("join the group (gloo)")
    where = f"file://{folder.resolve()}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=where, rank=number, world_size=world, timeout=timedelta(seconds=60)
    )
    for name, wrap in (("FSDP2", _shard), ("DDP", DistributedDataParallel)):
        _round(begin, name, wrap, folder)
    begin("done")
    dist.barrier()


def _begin(file: Path, step: str) -> None:
    file.with_suffix(".new").write_text(step)
    os.replace(file.with_suffix(".new"), file.with_suffix(".step"))


def _round(
    begin: Callable[[str], None], name: str, wrap: Callable[[Any], Any], folder: Path
) -> None:
    import torch

    from ..ema import EMA

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    want = {key: value.detach().clone() for key, value in module.named_parameters()}
    begin(f"{name}: wrap a model")
    model = wrap(module)
    ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema.attach(optimizer)
    begin(f"{name}: train and average")
    torch.manual_seed(1)
    for _ in range(3):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # A new average holds the live weights, and gathers them whole on the first rank.
        live = EMA(model, 0.5).gather()
        want = {key: value.lerp(live[key], 0.5) if live else value for key, value in want.items()}
    begin(f"{name}: compare with full weights")
    _same(ema.gather(), want)
    begin(f"{name}: save and load")
    ema.save(folder / f"average-{name}")
    before = ema.gather()
    ema.reset()
    ema.load(folder / f"average-{name}")
    _same(ema.gather(), before, exact=True)


def _shard(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # NOTE: the host is tested: with an accelerator, the default mesh would be of that.
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    # torch 2.8: gloo sums where FSDP asks for an average
    if hasattr(sharded, "set_force_sum_reduction_for_comms"):
        sharded.set_force_sum_reduction_for_comms(True)
    return sharded


def _same(found: dict[str, Any], want: dict[str, Any], exact: bool = False) -> None:
    """Raise ValueError where weights differ. Only the first rank has any in `found`."""
    import torch

    for name, value in found.items():
        other = want[name]
        near = torch.allclose(value, other, rtol=1e-5, atol=1e-6)
        if not (torch.equal(value, other) if exact else near):
            raise ValueError(f"{name} is off by {(value - other).abs().max().item():.3g}")


def _main(arguments: list[str]) -> None:
    if arguments[0] == "facts":
        print(json.dumps(facts()))
        return
    code = 0
    try:
        rank(int(arguments[1]), int(arguments[2]), Path(arguments[3]))
    except BaseException as error:
        code, text = 1, " ".join(str(error).split())[:500]
        print(f"{type(error).__name__}: {text}", file=sys.stderr, flush=True)
    os._exit(code)  # gloo sometimes aborts in a normal exit, after everything passed


if __name__ == "__main__":
    _main(sys.argv[1:])
