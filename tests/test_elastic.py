"""A part of the 64 conversions of `python -m tests.elastic`, with shapes that no world divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock  # torch depends on it

from dist_ema import EMA
from tests import elastic
from tests._models import Net
from tests._ranks import run_ranks
from tests._wrappers import wrap

SAVED = [("none", 1), ("ddp", 2), ("fsdp1 flat", 2), ("fsdp1 orig", 3), ("fsdp2", 3), ("hsdp", 4)]
LOADED = [("none", 1), ("ddp", 3), ("fsdp1 flat", 3), ("fsdp1 orig", 2), ("fsdp2", 2), ("fsdp2", 4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Written once for all workers: the first one to come saves, the others wait at a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "elastic"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for kind, world in SAVED:
            if not (folder / f"{kind}-bf16.pt").exists():
                run_ranks(world, elastic.save_one, kind, str(folder))
    return folder


@pytest.mark.multirank
@pytest.mark.parametrize(("kind", "world"), LOADED)
def test_every_pair_is_exact(
    saved: Path, kind: str, world: int, pytestconfig: pytest.Config
) -> None:
    """6 x 6 pairs: weights, clock, pending interval, and what is saved again.

    A sample takes the fp32 or the bf16 average of each pair, in turns, so that every wrapper saves
    and loads both.
    """
    sources = [source for source, _ in SAVED]
    pairs = [(source, name) for source in sources for name in elastic.NAMES]
    turn = LOADED.index((kind, world)) % 2
    left_out = [] if pytestconfig.getoption("--all") else alternate(sources, turn)
    held = run_ranks(world, elastic.load_all, kind, str(saved), sources, Net, left_out)[0]
    assert len(held) == len(pairs) - len(left_out)
    assert all(held.values()), held
    for source, name in pairs:
        if (source, name) not in left_out:
            again = saved / f"{source}-{name}-from-{kind}-{world}"
            elastic.refuse_other_bytes(saved / f"{source}-{name}", again)


def alternate(sources: list[str], turn: int) -> list[tuple[str, str]]:
    """One average of each source: the other one of its neighbours, and in the other turn."""
    return [(source, elastic.NAMES[(i + turn) % 2]) for i, source in enumerate(sources)]


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
