"""Saved under one wrapper and world, loaded under another: the same bits, the same clock, the same
file again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock  # torch depends on it

from dist_ema import EMA, Power
from tests._models import Net
from tests._oracle import Training
from tests._ranks import run_ranks
from tests._wrappers import wrap

SAVED = [("none", 1), ("ddp", 2), ("fsdp1 flat", 2), ("fsdp1 orig", 3), ("fsdp2", 3), ("hsdp", 4)]
LOADED = [("none", 1), ("ddp", 3), ("fsdp1 flat", 3), ("fsdp1 orig", 2), ("fsdp2", 2), ("fsdp2", 4)]
SCHEDULE = Power(gamma=2.0)
EVERY = 4


def averages(run: Training) -> dict[str, EMA]:
    """A plain one and a compact one; both end inside an interval."""
    return {
        "fp32": EMA(run.model, SCHEDULE),
        "bf16": EMA(run.model, SCHEDULE, dtype=torch.bfloat16),
    }


def save_one(kind: str, folder: str) -> None:
    run = Training(kind)
    found = averages(run)
    for ema in found.values():
        ema.attach(run.optimizer, every=EVERY, elapsed=3.0)
    run.train(6)
    with found["fp32"].swap():
        for buffer in run.model.buffers():
            if buffer.is_floating_point():
                buffer += 0.25 * (dist.get_rank() + 1)  # recalibrated, differently on every rank
    for name, ema in found.items():
        ema.save(f"{folder}/{kind}-{name}", max_shard_size=600, extra={"epoch": 6})
        full = ema.gather()
        if full:
            torch.save(full, f"{folder}/{kind}-{name}.pt")


def load_all(kind: str, folder: str) -> dict[str, bool]:
    held = {}
    for source, _ in SAVED:
        run = Training(kind)
        for name, ema in averages(run).items():
            path = f"{folder}/{source}-{name}"
            ema.load(path)
            assert (ema.now, ema.metrics()["updates"]) == (12.0, 1)
            assert (ema.weights.clock.steps, ema.weights.clock.pending) == (
                6,
                6.0,
            )
            full = ema.gather()
            ema.save(
                f"{path}-from-{kind}-{dist.get_world_size()}",
                max_shard_size=600,
                extra={"epoch": 6},
            )
            if full:
                want = torch.load(f"{path}.pt")
                held[f"{source} {name}"] = full.keys() == want.keys() and all(
                    torch.equal(full[k], want[k]) for k in ema.names()
                )
            ema.attach(run.optimizer, every=EVERY, elapsed=3.0)
            run.train(1)
            assert ema.metrics()["updates"] == 1
            run.train(1)
            assert ema.metrics()["updates"] == 2
            assert ema.now == 24.0
            ema.detach()
    return held


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Written once for all workers: the first one to come saves, the others wait at a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "elastic"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for kind, world in SAVED:
            if not (folder / f"{kind}-bf16.pt").exists():
                run_ranks(world, save_one, kind, str(folder))
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize(("kind", "world"), LOADED)
def test_every_pair_is_exact(saved: Path, kind: str, world: int) -> None:
    """6 x 6 pairs, each with an fp32 and a bf16 average: weights, clock, pending interval, and what
    is saved again.
    """
    held = run_ranks(world, load_all, kind, str(saved))[0]
    assert len(held) == 2 * len(SAVED)
    assert all(held.values()), held
    for source, _ in SAVED:
        for name in ("fp32", "bf16"):
            first = saved / f"{source}-{name}"
            again = saved / f"{source}-{name}-from-{kind}-{world}"
            shards = sorted(path.name for path in first.glob("*.safetensors"))
            assert len(shards) > 1
            for shard in shards:
                if any(
                    word in (first / shard).read_bytes().decode("latin1")
                    for word in ('"core.frozen', '"core.seen')
                ):
                    continue  # holds what is taken from the live model, which is another one here
                assert (first / shard).read_bytes() == (again / shard).read_bytes(), shard


def follow_a_fixed_path(kind: str) -> dict[str, Any]:
    """A bf16 average of weights that move the same way everywhere, bit for bit."""
    torch.manual_seed(0)
    source, model = Net(), wrap(kind, Net())
    writer = EMA(source, decay=0.0)
    ema = EMA(model, 0.9, dtype=torch.bfloat16)
    writer.copy_to(model) if dist.get_world_size() == 1 else copy_from_plain(source, model)
    ema.reset()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in source.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        copy_from_plain(source, model)
        ema.update()
    return ema.gather()


@torch.no_grad()
def copy_from_plain(source: torch.nn.Module, model: torch.nn.Module) -> None:
    """Write a plain model's weights into the shards of a wrapped one, by the regions that the
    shards name.
    """
    from dist_ema.sharding import discovery, geometry

    weights = source.state_dict()
    for shard in discovery.find_shards(model).shards:
        for box, view in geometry.boxes_with_data(shard, shard.local_region, shard.read()):
            view.copy_(weights[shard.name][box.slices])


@pytest.mark.multirank
def test_stochastic_rounding_does_not_depend_on_the_cut() -> None:
    """The same bits under any wrapper and world: the hash speaks of names and element numbers, not
    of ranks.
    """
    want = run_ranks(1, follow_a_fixed_path, "none")[0]
    moved = Net().state_dict()
    assert any(not torch.equal(want[name].float(), moved[name]) for name in moved)
    for kind, world in [("ddp", 3), ("fsdp1 flat", 2), ("fsdp2", 3)]:
        full = run_ranks(world, follow_a_fixed_path, kind)[0]
        assert [name for name in want if not torch.equal(want[name], full[name])] == []
