"""swap, gather and export by one rank alone: `split=False` on replicated weights, and what else.

How to read a failure: `run_ranks` raises with the traceback of the first rank that failed. While a
rank works alone, the other one waits at a key of the store, and takes part in nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.distributed import waiting
from dist_ema.sharding import torch_internals
from tests._models import Images, Net
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap


def alone(rank: int, name: str, work: Callable[[], None]) -> None:
    """Do it on one rank, while the other does nothing."""
    store = torch_internals.side_store("alone")
    if dist.get_rank() == rank:
        try:
            work()
        finally:
            store.set(name, "")
    else:
        store.wait([name])


def trained(model: nn.Module, split: bool) -> EMA:
    ema = EMA(model, 0.5, split=split, timeout=20)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    return ema


def full_copies(folder: str) -> None:
    """The same bits as from an average that is divided, by each rank alone, and by both at once."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Images())
    start = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    ema = trained(model, split=False)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            p.copy_(start[name])
    divided = trained(model, split=True)
    divided.export(f"{folder}/divided")
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    want = {name: p.detach() for name, p in load_file(f"{folder}/divided").items()}

    def verbs() -> None:
        with ema.swap():
            inside = model.module.state_dict()
            assert all(torch.equal(inside[name], want[name]) for name in start)
        assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())
        full = ema.gather()
        assert full.keys() == want.keys()
        assert all(torch.equal(full[name], want[name]) for name in want)
        mine = Path(folder, f"alone-{dist.get_rank()}")
        ema.export(mine)
        names = sorted(path.name for path in mine.iterdir())
        assert "model.safetensors" in names
        whole = Path(folder, "divided", "model.safetensors").read_bytes()
        assert Path(mine, "model.safetensors").read_bytes() == whole
        with raises(ZeroDivisionError), ema.swap():
            assert 1 / 0
        with ema.swap():
            pass

    for rank in (1, 0):
        alone(rank, f"verbs {rank}", verbs)
    for _ in range(5):  # Guards atomic.locked: a sweep for leftovers would take the other's files.
        ema.export(f"{folder}/both")
        ema.export(f"{folder}/both.safetensors")
    dist.barrier()
    stored = load_file(f"{folder}/both.safetensors")
    assert all(torch.equal(stored[name], want[name]) for name in want)
    ema.save(f"{folder}/saved")  # is collective as ever
    ema.load(f"{folder}/saved")


def divided_weights() -> None:
    """Where weights are sharded, split=False changes nothing: every rank is needed."""
    ema = EMA(wrap("fsdp2", Net()), 0.5, split=False, timeout=20)
    full = ema.gather()
    assert bool(full) == (dist.get_rank() == 0)


def under_a_condition() -> None:
    """A divided average, `if rank == 0:`. A line comes first, then an error with cause and cure."""
    ema = EMA(nn.parallel.DistributedDataParallel(Net()), 0.5, timeout=20)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ema").addHandler(handler)
    waiting.FIRST_REMINDER = 0.3

    def swap() -> None:
        ema.timeout = 2.0
        words = ("rank 1 did not enter it within 2 s", "`if rank == 0:`", "Call it on every rank")
        with raises(RuntimeError, "ema.swap() is collective", *words), ema.swap():
            pass
        assert len(lines) == 1
        assert "ema.swap() has waited" in lines[0]
        assert "for rank 1. Is it called under a condition" in lines[0]

    alone(0, "swap", swap)


def verbs_alone(folder: str) -> None:
    full_copies(folder)
    divided_weights()
    under_a_condition()


@pytest.mark.multirank
def test_verbs_by_one_rank_of_two(tmp_path: Path) -> None:
    run_ranks(2, verbs_alone, str(tmp_path))
