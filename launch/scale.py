"""What each verb costs as the job grows: messages, collectives, and bytes between machines.

    python launch/scale.py                   worlds of 8 to 4,096 ranks, formula and count
    python launch/scale.py --bytes 1GB       4 machines on this one: what each writes and receives
    python launch/scale.py --checks          what a step pays to know that its weights are the same

Messages are counted on real verbs: every rank is a thread with an EMA of its own, all on one
key-value store in memory, which counts operations and bytes. Up to COUNTED ranks run; beyond that
the formula stands alone. Collectives are counted over torch's fake process group. Bytes are those
of real processes, to each of which DIST_EMA_MACHINE gives a machine.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_ema import EMA
from dist_ema.averaging.clock import Clock
from dist_ema.averaging.storage_watch import StorageWatch
from dist_ema.averaging.swap_registry import SwapRegistry
from dist_ema.checkpoint import disk
from dist_ema.distributed import collectives, machines, ranks, receiver, waiting
from dist_ema.distributed.coordinator import FAN_IN, StoreCoordinator
from dist_ema.distributed.ranks import Ranks
from dist_ema.sharding import discovery, ownership
from dist_ema.sharding.geometry import even
from dist_ema.text import size as size_text
from dist_ema.text import size_of

WORLDS = (8, 64, 512, 4096)
COUNTED = 512
PER_MACHINE = 8
# Of each verb: exchanges in which ranks count themselves, whose messages are combined, that the
# first rank answers; and other operations, like the deletion of keys.
EXCHANGES = {
    "save": (3, 1, 1, 0),
    "save wait=False": (4, 1, 1, 0),
    "load": (2, 1, 1, 1),
    "gather": (3, 0, 0, 1),
    "metrics": (0, 1, 0, 1),
    "swap": (3, 0, 0, 1),
    "export": (3, 1, 1, 0),
    "reset": (1, 0, 0, 1),
}
# Verbs that need each other's files are counted in one job. The others have jobs of their own, so
# that one which hundreds of threads in one interpreter cannot do leaves the rest.
JOBS = (("save", "save wait=False", "load"), *((verb,) for verb in list(EXCHANGES)[3:]))
TIMEOUT = 900.0  # seconds: hundreds of threads share one interpreter
VERSION = attrgetter("_version")
MESSAGE = 100  # bytes of a message or an answer, at most


LOCAL = threading.local()  # machine: the name of that on which the thread's rank is


class Store:
    """A connection of one rank to the store, which counts what the rank does.

    A look of a rank that waits is counted apart: how many there are depends on how long it waits.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.operations = self.looks = self.read = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._store, name)

        def call(key: Any, *args: Any) -> Any:
            result = operation(key, *args)
            if name == "check" or args == (0,) or (name == "get" and key.endswith("/count")):
                self.looks += 1
                return result
            self.operations += 1
            values = result if isinstance(result, list) else [result]
            self.read += sum(len(value) for value in values if isinstance(value, bytes))
            return result

        return call


class ThreadRanks(Ranks):
    """A rank that is a thread, on a store in memory."""

    def __init__(self, size: int, rank: int, store: dist.Store) -> None:
        self.members, self.device = list(range(size)), None
        self.size, self.rank, self.group = size, rank, None
        self._base, self._prefixes, self._prefix = store, 0, "job"
        self.stores: list[Store] = []
        self._connect([], TIMEOUT)

    def _connect(self, stores: Sequence[Any], timeout: float) -> None:
        own = dist.PrefixStore(self._prefix, self._base)
        self._stores: Any = [SimpleNamespace(store=own)]  # behind which others are opened
        store = Store(own)
        self.stores.append(store)
        beats = dist.PrefixStore(self._prefix, self._base)
        self._machines, self._connections, self._thread = None, None, 0
        StoreCoordinator.__init__(self, store, self.members, self.rank, timeout, beats)

    def machines(self, verb: str) -> machines.Machines:
        LOCAL.machine = f"host {self.rank // PER_MACHINE}"  # a verb may be in a thread of its own
        return super().machines(verb)

    def _open_bounded(self, prefix: str, timeout: float) -> Any:
        return dist.PrefixStore(prefix, self._base)

    def _open_store(self, prefix: str) -> dist.Store:  # type: ignore[override]
        return dist.PrefixStore(prefix, self._base)

    @property
    def timeout(self) -> float:
        return TIMEOUT

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        pass

    def counts(self) -> tuple[int, int, int]:
        """(operations, bytes read, looks) since the last call."""
        found = tuple(
            sum(getattr(store, name) for store in self.stores)
            for name in ("operations", "read", "looks")
        )
        for store in self.stores:
            store.operations = store.read = store.looks = 0
        return found  # type: ignore[return-value]


class Cost(NamedTuple):
    """Of one verb: of the rank with the most, and of all ranks together."""

    operations: int
    read: int
    all_operations: int
    all_read: int
    looks: int


def job(size: int, rank: int, store: dist.Store) -> EMA:
    """An EMA of a small model, of which this rank saves its part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    ema = EMA(model, 0.5)
    ema._entry.ranks = ThreadRanks(size, rank, store)
    states = ema.weights.averages[0].persistent
    begin, end = even(0, sum(state.local.numel() for state in states), rank, size)
    at = 0
    for state in states:
        n = state.local.numel()
        low, high = (min(max(edge - at, 0), n) for edge in (begin, end))
        state.owned_region = replace(state.averaged_region, begin=low, end=high)
        at += n
    return ema


def verbs(ema: EMA, folder: str) -> dict[str, Callable[[], Any]]:
    def swap() -> None:
        with ema.swap():
            pass

    def save_behind() -> None:
        ema.save(f"{folder}/behind", wait=False)
        ema._saving.finish()

    return {
        "save": lambda: ema.save(f"{folder}/saved"),
        "save wait=False": save_behind,
        "load": lambda: ema.load(f"{folder}/saved"),
        "gather": ema.gather,
        "metrics": ema.metrics,
        "swap": swap,
        "export": lambda: ema.export(f"{folder}/exported"),
        "reset": ema.reset,
    }


def count(size: int, names: Sequence[str] = tuple(EXCHANGES)) -> dict[str, Cost]:
    """The messages of verbs in a job of `size` ranks, 8 to a machine. The second call counts."""
    store = dist.HashStore()
    barrier, failures = threading.Barrier(size), list[BaseException]()
    taken: dict[str, list[Any]] = {name: [None] * size for name in names}

    def work(rank: int, folder: str) -> None:
        try:
            ema = jobs[rank]
            calls = verbs(ema, folder)
            for name in names:
                for _ in range(2):  # what is done once for all is not counted
                    barrier.wait()
                    _counts(ema)
                    calls[name]()
                taken[name][rank] = _counts(ema)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    jobs = [job(size, rank, store) for rank in range(size)]
    with tempfile.TemporaryDirectory() as folder, _machine_of(lambda: LOCAL.machine):
        threads = [threading.Thread(target=work, args=(rank, folder)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return {name: _cost(each) for name, each in taken.items()}


def _counts(ema: EMA) -> tuple[int, int, int]:
    ranks: Any = ema._entry.ranks  # those of a background save share the list of stores
    return ranks.counts()  # type: ignore[no-any-return]


def _cost(counts: list[tuple[int, int, int]]) -> Cost:
    operations, read, looks = zip(*counts, strict=True)
    return Cost(max(operations), max(read), sum(operations), sum(read), max(looks))


@contextmanager
def _machine_of(name: Callable[[], str]) -> Iterator[None]:
    """`machine_id` of the thread that calls it."""
    real, looks, idle = ranks.machine_id, waiting.LOOKS, receiver.IDLE
    ranks.machine_id, waiting.LOOKS = name, 2000  # threads share one interpreter
    receiver.IDLE, reminder = 0.5, waiting.FIRST_REMINDER
    waiting.FIRST_REMINDER = TIMEOUT  # it looks for who is late
    try:
        yield
    finally:
        ranks.machine_id, waiting.LOOKS, receiver.IDLE = real, looks, idle
        waiting.FIRST_REMINDER = reminder


def formula(verb: str, size: int) -> tuple[int, int]:
    """(operations, bytes read) of a rank, at most."""
    alone, combined, first, other = EXCHANGES[verb]
    # An exchange with messages: set, add, multi_get, get, delete_key. A rank that combines none
    # deletes the keys of the exchange instead.
    operations = alone + 5 * combined + first + other
    return operations, MESSAGE * (combined * (min(FAN_IN, size - 1) + 1) + first)


# --- collectives ----------------------------------------------------------------------------------


class Collectives:
    """Counts the collectives of a transfer."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: dist.Work) -> None:
        self.count += 1


def swap_collectives(size: int) -> tuple[int, int]:
    """(counted, formula: one per window of 4 MB and one more) of DDP's broadcasts in one swap."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(150)])
        shards = discovery.find_shards(model, dist.group.WORLD).shards
        states = ownership.assign(shards, lambda shard: True, split=True)
        ((group, runs),) = ownership.replica_runs(states)
        counted = Collectives()
        collectives.broadcast(runs, group, counted)
        total = sum(state.local.nbytes for state in states)
        return counted.count, math.ceil(total / collectives.WINDOW) + 1
    finally:
        dist.destroy_process_group()


# --- bytes ----------------------------------------------------------------------------------------


def save_on_hosts(folder: str, total: int, hosts: int) -> tuple[int, int, int]:
    """On one rank of `hosts` processes: the bytes that it wrote, received, and its connections."""
    from torch.distributed.fsdp import fully_shard

    rank, written = dist.get_rank(), [0]
    real = disk.FileWriter.write

    def write(files: Any, file: int, offset: int, data: memoryview) -> None:
        written[0] += len(data)
        real(files, file, offset, data)

    width = 1024
    layers = max(1, round(total / 4 / width / width))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    fully_shard(model)
    ema = EMA(model, 0.5)
    size = math.ceil(layers / 16) * 4 * width * width
    ema.save(f"{folder}/one", max_shard_size=size)
    os.environ[machines.MACHINE] = f"host {rank}"
    ema = EMA(model, 0.5)
    disk.FileWriter.write = write  # type: ignore[method-assign, assignment]
    ema.save(f"{folder}/hosts", max_shard_size=size)
    connections = ema._entry.ranks.connections("save")
    if rank == 0:
        names = sorted(os.listdir(f"{folder}/one"))
        same = names == sorted(os.listdir(f"{folder}/hosts")) and all(
            Path(folder, "one", name).read_bytes() == Path(folder, "hosts", name).read_bytes()
            for name in names
        )
        assert same, "the files of one machine and of several differ"
    return written[0], connections.received, hosts - 1


def bytes_of_hosts(total: int, hosts: int = 4) -> list[tuple[int, int, int]]:
    from tests._ranks import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        place = save_on_hosts
        place.__module__ = "launch.scale"
        return run_ranks(hosts, place, folder, total, hosts, timeout=600)


# --- what every step checks -----------------------------------------------------------------------


def check_costs(tensors: int, square: bool, rounds: int = 200) -> list[float]:
    """Microseconds of the fastest rounds, beside `_foreach_lerp_` of the same weights.

    Args:
        tensors: Weights of linear layers without bias.
        square: Their order in memory is looked at too.
        rounds: Each times all five.

    Returns:
        Address checks before an update, version counters after it and before the next step, both
        together, three bare loops over the weights, and the update by torch.
    """
    width = 32 if square else 24
    model = nn.Sequential(*(nn.Linear(width, 32, bias=False) for _ in range(tensors)))
    states = EMA(model, 0.5).weights.averages[0].averaged
    watch = StorageWatch(Clock(), SwapRegistry())
    watch.renew(states, roots=[model])
    live = [state.local for state in states]
    shadows = [each.clone() for each in live]

    def versions() -> None:
        watch.begin_read()
        watch.end_read()

    def together() -> None:
        watch.changed()
        versions()

    def bare() -> None:
        """The least that three looks at every weight cost: nothing is kept or compared."""
        for look in (Tensor.data_ptr, VERSION, VERSION):
            deque(map(look, live), maxlen=0)

    def lerp() -> None:
        torch._foreach_lerp_(shadows, live, 0.1)

    cases = [watch.changed, versions, together, bare, lerp]
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, found in zip(cases, seconds, strict=True):
            start = time.perf_counter()
            case()
            found.append(time.perf_counter() - start)
    return [1e6 * min(found) for found in seconds]


# --- tables ---------------------------------------------------------------------------------------


def message_table(counted: int) -> list[list[str]]:
    rows = []
    for size in WORLDS:
        costs = dict[str, Cost]()
        for names in JOBS if size <= counted else ():
            try:
                costs |= count(size, names)
            except RuntimeError as error:
                print(f"{size} ranks, {', '.join(names)}: not counted: {error}", file=sys.stderr)
        for verb in EXCHANGES:
            operations, read = formula(verb, size)
            cost = costs.get(verb)
            found = ["-"] * 4
            if cost is not None:
                found = list(
                    map(str, (cost.operations, cost.read, cost.all_operations, cost.looks))
                )
            rows.append([str(size), verb, str(operations), found[0], str(read), *found[1:]])
    return rows


HEADS = {
    "messages": (
        "ranks", "verb", "operations of a rank, at most", "counted",
        "bytes read by a rank, at most", "counted", "operations of all", "looks of one that waits",
    ),
    "checks": (
        "weights", "addresses, us", "version counters", "together", "three bare loops",
        "`_foreach_lerp_`",
    ),
    "collectives": ("ranks", "collectives of a swap under DDP, at most", "counted"),
    "bytes": ("host", "bytes written", "of total / hosts", "bytes received", "of total / hosts"),
}  # fmt: skip


def show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    head = HEADS[title]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--bytes",
        type=size_of,
        help="save so many bytes on 4 machines, like 1GB (default: count messages)",
    )
    parser.add_argument(
        "--counted", type=int, default=COUNTED, help="ranks that run, at most (default %(default)s)"
    )
    parser.add_argument("--checks", action="store_true", help="what every step pays")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    if arguments.checks:
        torch.set_num_threads(1)
        rows = []
        for n, square in ((150, False), (1000, False), (150, True), (1000, True)):
            costs = [f"{cost:.0f}" for cost in check_costs(n, square)]
            rows.append([f"{n:,} square" if square else f"{n:,}", *costs])
        show("checks", rows)
        return
    if arguments.bytes:
        total = arguments.bytes
        share = total / 4
        show(
            "bytes",
            [
                [str(host), size_text(w), f"{w / share:.3f}", size_text(r), f"{r / share:.3f}"]
                for host, (w, r, _) in enumerate(bytes_of_hosts(total))
            ],
        )
        return
    show("messages", message_table(arguments.counted))
    swaps = [(size, *swap_collectives(size)) for size in WORLDS]
    show("collectives", [[str(size), str(most), str(found)] for size, found, most in swaps])


if __name__ == "__main__":
    main()
