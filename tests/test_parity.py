"""Every wrapper equals the plain run.

Prints one table: wrappers x checks; a cell holds or the test is red.

How to read a failure: the assertion inside `check_wrapper` names the column; the parameters name
the row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ema import EMA, Warmup, load_file
from tests import _deepspeed
from tests._oracle import Collectives, Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import net

ROWS = [
    ("none", 1), ("ddp", 2), ("ddp", 3), ("ddp whole", 2), ("fsdp1 flat", 2), ("fsdp1 orig", 2),
    ("fsdp1 orig", 3), ("fsdp1 grad_op", 2), ("fsdp1 no_shard", 2), ("fsdp1 hybrid", 4),
    ("fsdp2", 2), ("fsdp2", 3), ("fsdp2 kept", 2), ("fsdp2 offload", 2), ("hsdp", 4),
    ("fsdp2 tp", 4), ("fsdp2 ep", 4),
    ("zero1", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3), ("zero3 kept", 2),
]  # fmt: skip
SCHEDULE = Warmup(0.95)
COLUMNS = [
    "no collective in update", "update = oracle", "swap forward", "restored",
    "restored after raise", "trains on", "file = gather", "load exact", "bytes",
]  # fmt: skip


def check_wrapper(kind: str, folder: str) -> dict[str, Any]:
    """All columns of one row, on one rank."""
    held: dict[str, Any] = {}
    run = Training(kind, lambda: net(kind))
    ema = EMA(run.model, SCHEDULE, split=kind != "ddp whole")
    oracle = Oracle(run.twin, SCHEDULE)
    ema.attach(run.optimizer)
    for _ in range(4):
        run.probe()  # a no_grad forward just before: the root stays unsharded under FSDP
        run.train(1, oracle.update)
    ema.detach()
    with Collectives() as collectives:
        ema.update(1.0)
    oracle.update()
    held["no collective in update"] = collectives.count == 0
    full = ema.gather()
    if dist.get_rank() == 0 or kind == "none":
        held["update = oracle"] = oracle.error(full) < 2e-6

    for verb in (ema.metrics, ema.rescan):
        run.probe()
        verb()  # the weights are their own, though the root shows unsharded copies
    run.probe()
    before = snapshot(run.model)
    with ema.swap():
        seen = run.probe()
    lent = run.twin_with({name: value.float() for name, value in oracle.average.items()})
    held["swap forward"] = bool((seen - lent).abs().max() < 2e-5)
    held["restored"] = same(before, snapshot(run.model))
    with raises(KeyError, "evaluation failed"), ema.swap():
        run.probe()
        raise KeyError("evaluation failed")
    held["restored after raise"] = same(before, snapshot(run.model))

    ema.attach(run.optimizer)
    with ema.swap():
        run.probe()
    run.train(
        2, oracle.update
    )  # at once: taking a snapshot would free the unsharded copies that the probe left
    ema.detach()
    full = ema.gather()
    held["trains on"] = bool((run.probe() - run._probe(run.twin)).abs().max() < 2e-5)
    if full:
        held["trains on"] &= oracle.error(full) < 2e-6
    ema.save(f"{folder}/average")
    if full:
        stored = load_file(f"{folder}/average")
        held["file = gather"] = stored.keys() == full.keys() and all(
            torch.equal(stored[k], full[k]) for k in full
        )
        run.twin.load_state_dict(full, strict=True)
    again = EMA(run.model, SCHEDULE, split=kind != "ddp whole")
    again.load(f"{folder}/average")
    reread = again.gather()
    held["load exact"] = all(torch.equal(reread[k], full[k]) for k in full) and again.now == ema.now
    held["bytes"] = bytes_hold(kind, ema)
    return held


def bytes_hold(kind: str, ema: EMA) -> bool:
    """At most 4 x the elements of this rank's live shard (1/replicas of them + 1 %) + 64 per
    piece.
    """
    slots = ema.weights.averages[0].averaged
    live = sum(slot.shard.local_region.numel for slot in slots if not slot.shard.replicas)
    shared = 0.0
    for slot in slots:
        copies = 1
        for group in slot.shard.replicas:
            copies *= group.size()
        shared += slot.shard.local_region.numel / copies if slot.shard.replicas else 0
    if kind == "ddp whole":
        shared *= dist.get_world_size()
    return bool(ema.metrics()["bytes"] <= 4 * (live + 1.01 * shared) + 64 * len(slots))


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("kind", "world"),
    [
        pytest.param(*row, marks=_deepspeed.needs_deepspeed if "zero" in row[0] else ())
        for row in ROWS
    ],
    ids=lambda value: str(value),
)
def test_parity(
    kind: str, world: int, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    results = run_ranks(world, check_wrapper, kind, str(tmp_path))
    row: dict[str, bool] = {}
    for held in results:
        for column, cell in held.items():
            row[column] = row.get(column, True) and cell
    record_property("parity", [f"{kind} W={world}", row])  # conftest prints the table
    assert all(row.values()), row
    assert list(row) == COLUMNS
