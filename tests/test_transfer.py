"""Bytes between ranks: every window arrives whole, and their number does not grow with the world.

How to read a failure: in ranks a check is a plain assert and names the case. Numbers are counts of
collectives or of calls, never seconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ema import EMA
from dist_ema.distributed import collectives
from dist_ema.sharding import discovery, geometry, ownership
from tests._oracle import Collectives
from tests._ranks import run_ranks

# Bytes that a sum as numbers would change: the bits of NaNs, -0.0, and a bool that is no 1.
BITS = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def runs_of(rank: int) -> list[tuple[int, Tensor]]:
    """Pieces of many dtypes and sources; what is not the rank's own holds other bytes."""
    dtypes = [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int16]
    runs = []
    for i, (source, n) in enumerate([(0, 16), (0, 3), (1, 1), (2, 5), (2, 0), (1, 2), (0, 64)]):
        n = n if n < 64 else 64 * 8  # longer than a window, so a part travels in place
        right = BITS.repeat(64)[i : i + 8 * n]
        dtype = torch.uint8 if i == 2 else dtypes[i % len(dtypes)]
        data = (right if source == rank else torch.full_like(right, 7)).clone()
        runs.append((source, data[: len(data) // 16 * 16].view(dtype) if n > 1 else data))
    return runs


def whole_windows() -> None:
    for collectives.WINDOW in (40, 96, 1 << 20):
        runs = runs_of(dist.get_rank())
        with Collectives() as counted:
            collectives.broadcast(runs, dist.group.WORLD)
        for i, (source, run) in enumerate(runs):
            right = dict(enumerate(runs_of(source)))[i][1]
            assert torch.equal(run.view(torch.uint8), right.view(torch.uint8)), i
        total = sum(run.nbytes for _, run in runs)
        assert counted.count == math.ceil(total / collectives.WINDOW)
    collectives.WINDOW = 4 << 20


def nested_replicas() -> None:
    """Two replicate dimensions, one beside a shard, and a weight with fewer elements than ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    model = nn.Module()
    torch.manual_seed(0)
    for name, n, placements in [
        ("both", 7, [Replicate(), Replicate()]),
        ("rows", 6, [Replicate(), Shard(0)]),
        ("columns", 6, [Shard(0), Replicate()]),
        ("few", 1, [Replicate(), Replicate()]),
    ]:
        local = torch.randint(9, (n, 3)).float()
        for cut in placements:
            local = local[: n // 2] if isinstance(cut, Shard) else local
        weight = DTensor.from_local(local, mesh, placements, run_check=False)
        model.register_parameter(name, nn.Parameter(weight))
    ema = EMA(model, 0.5)
    before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(2.0)
    ema.update()
    sizes = [
        len(state.shadow) for state in ema.weights.averages[0].averaged if state.shard.replicas
    ]
    shares: list[int] = [0] * 4
    dist.all_gather_object(shares, sum(sizes))
    assert sum(shares) == (7 + 1 + 6 + 6) * 3, shares
    assert max(shares) - min(shares) <= 4, shares  # one element per sequence and depth
    with ema.swap():
        for name, p in model.named_parameters():
            assert torch.equal(p.detach().to_local(), before[name][: len(p.to_local())] + 1), name


@pytest.mark.multirank
def test_broadcast_on_ranks() -> None:
    """Windows of one source and of several arrive bit for bit, and replicas of replicas too."""
    run_ranks(3, whole_windows)
    run_ranks(4, nested_replicas)


@pytest.fixture(params=[8, 512, 4096])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    """A world of which only rank 3 exists."""
    dist.init_process_group("fake", rank=3, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_swap_scales(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap sends 2 P / 4 MB + 2 collectives, and looks at no rank whose range holds nothing of a
    weight: neither grows with the world."""
    divisions = 0
    divide = geometry.even

    def even(*args: int) -> tuple[int, int]:
        nonlocal divisions
        divisions += 1
        return divide(*args)

    monkeypatch.setattr(geometry, "even", even)
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(150)])
    model.append(nn.Linear(1100, 1000))
    shards = discovery.find_shards(model, dist.group.WORLD).shards
    states = ownership.assign(shards, lambda shard: True, split=True)
    total = sum(state.local.nbytes for state in states)
    divisions = 0
    ((group, runs),) = ownership.replica_runs(states)
    assert len(runs) <= len(states) + world
    assert divisions <= 2 * len(runs)
    assert sum(run.nbytes for _, run in runs) == total
    mine = [run for source, run in runs if source == 3]
    assert sum(map(len, mine)) == sum(state.averaged_region.numel for state in states)
    with Collectives() as counted:
        collectives.broadcast(runs, group)
    assert counted.count <= total / collectives.WINDOW + 1


class ThreadRanks:
    """A rank that is a thread. Its collectives meet those of the others, and are counted."""

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, slots: list[Tensor]
    ) -> None:
        self.rank, self.size, self.count = rank, size, 0
        self._barrier, self._slots = barrier, slots

    def transfer_device(self) -> torch.device:
        return torch.device("cpu")

    def run_transfer(self, verb: str, work: Callable[[], None]) -> None:
        work()

    def sum(self, data: Tensor) -> None:
        self._meet(data, lambda: torch.stack(self._slots).sum(0, dtype=data.dtype))

    def broadcast(self, data: Tensor, source: int) -> None:
        self._meet(data, lambda: self._slots[source].clone())

    def _meet(self, data: Tensor, result: Callable[[], Tensor]) -> None:
        self.count += 1
        self._slots[self.rank] = data
        self._barrier.wait(300)
        found = result()
        self._barrier.wait(300)
        data.copy_(found)


@pytest.mark.parametrize("size", [3, 48])
def test_streams_to_all_scale(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank takes every block, in collectives that grow with the bytes and not with ranks."""
    monkeypatch.setattr(collectives, "STREAM", 1 << 10)
    wanted = {
        (number, row): torch.full((1, 5), row * 1.5 + number, dtype=dtype)
        for number, dtype in enumerate((torch.float64, torch.bfloat16, torch.uint8))
        for row in range(96)
    }
    barrier, slots = threading.Barrier(size), [torch.empty(0)] * size
    ranks = [ThreadRanks(rank, size, barrier, slots) for rank in range(size)]

    def work(own: ThreadRanks) -> dict[tuple[int, int], Tensor]:
        blocks = [
            collectives.Block(number, (row, 0), data)
            for (number, row), data in wanted.items()
            if row % size == own.rank and own.rank != 1  # one rank has nothing
        ]
        found: dict[tuple[int, int], Tensor] = {}

        def take(number: int, offsets: tuple[int, ...], data: Tensor) -> None:
            found[number, offsets[0]] = data.clone()

        dtypes = [torch.float64, torch.bfloat16, torch.uint8]
        collectives.stream_to_all(own, "copy_to", dtypes, [2, 2, 2], blocks, take)  # type: ignore[arg-type]
        return found

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, ranks))
    sent = {key: data for key, data in wanted.items() if key[1] % size != 1}
    for found in results:
        assert found.keys() == sent.keys()
        assert all(torch.equal(found[key], data) for key, data in sent.items())
    total = sum(data.nbytes for data in sent.values())
    assert {each.count for each in ranks} == {ranks[0].count}
    assert ranks[0].count <= 3 * total / collectives.STREAM + 3
