"""A long run: thousands of random verbs on two ranks, after which nothing has grown.

    python -m tests.soak                          20,000 verbs under DDP, about ten minutes
    python -m tests.soak --wrapper fsdp2 --seed 3

After every verb that shows the average it equals a float64 recursion. Memory, descriptors, threads
and the keys in the store are counted every so often; the second half may not hold more than the
first.

How to read a failure: the error names the number of the verb; the same seed repeats the run.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, HalfLife, Uniform, load_file
from dist_ema.distributed.bounded_store import BoundedStore
from tests._ranks import run_ranks
from tests._wrappers import wrap

WORLD = 2
LR = 0.1
EVERY = 100  # verbs between two counts
SLACK = 16 << 20  # bytes by which the resident set may differ; allocators keep some
WEIGHTS = {
    "step": 40,
    "swap": 6,
    "gather": 6,
    "save": 4,
    "save_behind": 4,
    "save_keep": 4,
    "load": 6,
    "export": 4,
    "snapshot": 4,
    "metrics": 4,
    "copy_to": 3,
    "round_trip": 3,
    "attach": 4,
    "reset": 1,
    "rescan": 2,
    "another": 2,
}


@dataclass
class Counts:
    """What a process, the store and the folder hold at one moment."""

    memory: int
    descriptors: int
    threads: int
    keys: int
    files: int

    @classmethod
    def now(cls, store: dist.Store, folder: Path) -> Counts:
        gc.collect()
        stores = sum(type(each) is BoundedStore for each in gc.get_objects())
        for _ in range(1000):  # the thread of one that is gone ends a moment later
            names = [thread.name for thread in threading.enumerate()]
            if names.count("dist_ema store") == stores:
                break
            time.sleep(0.01)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGESIZE"),
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            len(store.list_keys()) - len(_of_slow_verbs(store)),
            sum(1 for _ in folder.rglob("*")),
        )


def _of_slow_verbs(store: dist.Store) -> list[str]:
    """Counters that a rank writes once a verb has taken a second: 2 x size + 1 of an EMA at most.

    So they depend on the load of the machine. Each EMA has them once, whatever it does.
    """
    names = (str(key).rpartition("dist_ema/")[2] for key in store.list_keys())
    return [name for name in names if re.search(r"(^construction/\d+|/heartbeats(/\d+)?)$", name)]


@dataclass
class Reference:
    """The averages in float64, on every rank in full."""

    schedules: list[Any]
    averages: list[dict[str, Tensor]] = field(default_factory=list)
    now: float = 0.0

    def begin(self, live: dict[str, Tensor]) -> None:
        self.now = 0.0
        self.averages = [{name: p.double() for name, p in live.items()} for _ in self.schedules]

    def update(self, live: dict[str, Tensor], elapsed: float) -> None:
        self.now += elapsed
        for schedule, average in zip(self.schedules, self.averages, strict=True):
            decay = schedule(self.now, elapsed)
            for name, p in live.items():
                average[name] = decay * average[name] + (1 - decay) * p.double()

    def copy(self) -> Reference:
        averages = [{name: p.clone() for name, p in each.items()} for each in self.averages]
        return Reference(self.schedules, averages, self.now)

    def check(self, which: int, weights: dict[str, Tensor]) -> None:
        for name, want in self.averages[which].items():
            off = (weights[name].double() - want).abs().max().item()
            assert off < 2e-5, f"average {which} of {name} is off by {off}"


class Soak:
    """One rank. All draw the same verbs."""

    def __init__(self, folder: Path, wrapper: str, seed: int, store: dist.Store) -> None:
        self.folder, self.store, self.draw = folder, store, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, bias=False))
        self.live = {name: p.detach().clone() for name, p in plain.named_parameters()}
        self.other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, bias=False))
        self.model = wrap(wrapper, plain)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        schedules = [HalfLife(20), Uniform()]
        self.ema = EMA(self.model, schedules)
        self.reference = Reference(schedules)
        self.reference.begin(self.live)
        self.handle: Any = None
        self.saved: dict[Path, Reference] = {}
        self.count = self.epoch = 0
        self.another()

    def verb(self) -> str:
        """Do one verb, the same on every rank; returns its name."""
        name = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        self.count += 1
        getattr(self, name)()
        return name

    def step(self) -> None:
        """A step of the optimizer with known gradients, and an update, by hand or by the hook."""
        sharded = dict(self.model.named_parameters())
        for name, p in self.live.items():
            gradient = torch.randn(p.shape, generator=self.generator)
            p.add_(gradient, alpha=-LR)
            target = next(each for key, each in sharded.items() if key.endswith(name))
            target.grad = _as(target, gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        elapsed = 1.0
        if self.handle is None:
            elapsed = float(self.draw.randint(1, 3))
            self.ema.update(elapsed=elapsed)
        self.reference.update(self.live, elapsed)

    def swap(self) -> None:
        which = self.draw.randrange(2)
        with self.ema.swap(which):
            self._check_model(self.reference.averages[which])
        self._check_model(self.live)

    def _check_model(self, wanted: dict[str, Tensor]) -> None:
        for key, p in self.model.named_parameters():
            name = next(name for name in wanted if key.endswith(name))
            off = (_local(p).double() - _local(_as(p, wanted[name])).double()).abs()
            assert not off.numel() or off.max() < 2e-5, f"{key} is off by {off.max()}"

    def gather(self) -> None:
        which = self.draw.randrange(2)
        weights = self.ema.gather(which)
        if dist.get_rank() == 0:
            self.reference.check(which, weights)

    def save(self) -> None:
        self._save("over")

    def save_behind(self) -> None:
        self._save("behind", wait=False)

    def save_keep(self) -> None:
        path = self._save(f"kept-{self.count}", keep=2)
        for old in [each for each in self.saved if each.name.startswith("kept-")][:-2]:
            del self.saved[old]
        assert path in self.saved

    def _save(self, name: str, **options: Any) -> Path:
        path = self.folder / name
        self.ema.save(path, **options)
        self.saved[path] = self.reference.copy()
        return path

    def load(self) -> None:
        if self.saved:
            path = self.draw.choice(list(self.saved))
            self.ema.load(path)
            self.reference = self.saved[path].copy()
            self.epoch += 1

    def export(self) -> None:
        which = self.draw.randrange(2)
        path = self.folder / self.draw.choice(["out", "model.safetensors"])
        size = self.draw.choice([100, "5GB"])
        self.ema.export(
            path, which=which, **({"max_shard_size": size} if path.suffix == "" else {})
        )
        self.reference.check(which, load_file(path))

    def snapshot(self) -> None:
        """Into a new folder whenever the clock may have gone back."""
        folder = self.folder / f"snapshots-{self.epoch}"
        self.ema.snapshot(folder, every=10)
        if dist.get_rank() == 0:
            for old in self.folder.glob("snapshots-*"):
                if old != folder or len(os.listdir(old)) > 2:
                    shutil.rmtree(old)

    def metrics(self) -> None:
        assert self.ema.metrics(self.draw.randrange(2))["now"] == self.reference.now

    def copy_to(self) -> None:
        which = self.draw.randrange(2)
        self.ema.copy_to(self.other, which)
        self.reference.check(which, dict(self.other.state_dict()))

    def round_trip(self) -> None:
        self.ema.load_state_dict(self.ema.state_dict())

    def attach(self) -> None:
        """On, or off again."""
        if self.handle is None:
            self.handle = self.ema.attach(self.optimizer, overlap=self.draw.choice([True, False]))
        else:
            self.handle.remove()
            self.handle = None

    def reset(self) -> None:
        self.ema.reset()
        self.reference.begin(self.live)
        self.epoch += 1

    def rescan(self) -> None:
        self.ema.rescan()

    def another(self) -> None:
        """A second average of the same model, which lives for a moment."""
        other = EMA(self.model, 0.5)
        other.update()
        other.gather()
        other.export(self.folder / "other")


def _as(target: Tensor, full: Tensor) -> Tensor:
    """A full tensor, placed like a parameter."""
    if not hasattr(target, "device_mesh"):
        return full.to(target.dtype)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(target.dtype), target.device_mesh, target.placements)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def rank(folder: str, verbs: int, wrapper: str, seed: int, every: int = EVERY) -> list[Counts]:
    """Run the verbs; returns the counts, one after every so many verbs."""
    warnings.simplefilter("ignore", UserWarning)
    store = _tcp_store(Path(folder) / "port")
    root = Path(folder) / "run"
    root.mkdir(exist_ok=True)
    soak, counts, began, name = Soak(root, wrapper, seed, store), [], time.monotonic(), ""
    for number in range(1, verbs + 1):
        try:
            name = soak.verb()
        except Exception as error:
            raise AssertionError(f"verb {number} ({name} came before), seed {seed}") from error
        if number % every == 0:
            soak.save()  # waits for one that is in flight
            gc.collect()
            EMA(soak.model, 0.5)  # deletes what dead ones have left, and leaves as much each time
            gc.collect()
            dist.barrier()
            for _ in range(50):  # connections of the other rank are closed a moment later
                found = Counts.now(store, root)
                if not counts or not grown([*counts, *[found] * (len(counts) + 1)]):
                    break
                time.sleep(0.1)
            counts.append(found)
            dist.barrier()
            if dist.get_rank() == 0 and verbs > 1000 and number % 1000 == 0:
                print(f"{number} verbs, {time.monotonic() - began:.0f} s, {counts[-1]}", flush=True)
    return counts


def _tcp_store(port: Path) -> dist.Store:
    """A group over a TCPStore, as under torchrun; a FileStore grows by nature."""
    first, world = dist.get_rank() == 0, dist.get_world_size()
    number = dist.get_rank()
    dist.destroy_process_group()
    if first:
        store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        os.rename(port.with_suffix(".new"), port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), world)
    dist.init_process_group("gloo", store=store, rank=number, world_size=world)
    return store


def grown(counts: list[Counts]) -> dict[str, tuple[int, int]]:
    """What the second half holds more of than the first: name -> the largest numbers of both."""
    half = len(counts) // 2
    found: dict[str, tuple[int, int]] = {}
    measure: Callable[[Counts, str], int] = getattr
    for name in Counts.__dataclass_fields__:
        first, second = (
            max(measure(each, name) for each in part) for part in (counts[:half], counts[half:])
        )
        if second > first + (SLACK if name == "memory" else 0):
            found[name] = (first, second)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--verbs", type=int, default=20_000)
    parser.add_argument("--wrapper", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(
            WORLD, rank, folder, options.verbs, options.wrapper, options.seed, timeout=6 * 3600
        )
    for number, counts in enumerate(ranks):
        print(f"rank {number}: first {counts[0]}, last {counts[-1]}, grown: {grown(counts)}")


if __name__ == "__main__":
    main()
