"""`python -m tests.chaos`: publish and read while everything is killed, then see what came of it.

A trainer publishes; followers, two watchers with one ledger, and a server that is notified read;
each is killed with SIGKILL and restarted, the trainer from its last checkpoint, so that its steps
are rewound. `--network` runs all of them under the rules of a network file system: folders cannot
be exchanged, and a listing shows what others changed only after a while.

How to read a failure: `reports` has one file per process and incarnation, with a line for each
version that it read and the problems that it found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dist_ema.checkpoint import atomic, leases, pointers, versions
from dist_ema.offline.verify import verify
from dist_ema.service import ledger, notify, watch
from dist_ema.service.follow import Version, follow
from tests._ranks import PRELOAD

EVERY = 2  # steps between two versions
KEEP = 3
CHECKPOINT = 20  # steps between two checkpoints of the trainer
EXPIRY = 4.0  # of leases and claims
STALE = 0.5  # seconds for which a listing on a network file system may be old
ROLES = ("follower", "follower-slow", "follower-newest", "watcher-1", "watcher-2", "server")


# --- the processes -------------------------------------------------------------------------------


def use_network_rules() -> None:
    """Listings are as old as STALE, but for folders that this process has changed since."""
    known: dict[str, tuple[float, list[str]]] = {}
    real = os.listdir

    def listdir(path: Any = ".") -> list[str]:
        key = os.path.abspath(path)
        at, names = known.get(key, (0.0, []))
        if time.monotonic() - at > STALE:
            names = real(path)
            known[key] = time.monotonic(), names
        return list(names)

    def changing(call: Callable[..., Any]) -> Callable[..., Any]:
        def changes(*paths: Any, **options: Any) -> Any:
            for path in paths:
                if isinstance(path, (str, os.PathLike)):
                    known.pop(os.path.dirname(os.path.abspath(path)), None)
            return call(*paths, **options)

        return changes

    os.listdir = listdir  # type: ignore[assignment]
    for name in ("rename", "replace", "link", "mkdir", "rmdir", "unlink", "remove"):
        setattr(os, name, changing(getattr(os, name)))
    atomic.exchange = lambda a, b: False


def read(version: Version, report: Path) -> ledger.Outcome:
    """Verify every byte; the version must be there before and after."""
    problems = verify(version.path).problems
    problems += [] if version.path.is_dir() else [f"{version.path} is gone"]
    with report.open("a") as file:
        line = {"id": version.metadata["id"], "version": version.number, "problems": problems}
        file.write(json.dumps(line) + "\n")
    return ledger.Outcome({"loss": float(version.number % 17)})


def run_follower(folder: Path, report: Path, name: str) -> None:
    for version in follow(folder, every=name != "follower-newest", poll=0.05):
        read(version, report)
        time.sleep(0.2 if name == "follower-slow" else 0.0)


def run_watcher(folder: Path, report: Path) -> None:
    book = ledger.Ledger(folder.parent / ledger.NAME, "eval", EXPIRY, metric="loss")

    def work(version: Version) -> ledger.Outcome:
        time.sleep(0.05)
        return read(version, report)

    watch.Watch(folder, work, book, jobs=2, expiry=EXPIRY, poll=0.05).run()


def run_server(folder: Path, report: Path) -> None:
    """A server that reads what it is told, and the watcher that tells it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            problems = verify(body["model_path"]).problems
            with report.open("a") as file:
                line = {"version": int(body["weight_version"]), "problems": problems}
                file.write(json.dumps(line) + "\n")
            answer = json.dumps({"success": not problems, "message": str(problems)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/update_weights_from_disk"
        book = ledger.Ledger(folder.parent / ledger.NAME, "server", EXPIRY)

        def work(version: Version) -> ledger.Outcome:
            return notify.notify(url, version)

        watch.Watch(folder, work, book, newest=True, expiry=EXPIRY, poll=0.05).run()
        server.shutdown()


def run_trainer(folder: Path, steps: int, publishes: bool) -> None:
    """Train, checkpoint, publish; go on from the last checkpoint."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from dist_ema import EMA

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    if world > 1:
        store = os.environ["RENDEZVOUS"]
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = EMA(model, 0.9)
    ema.attach(optimizer)
    state = folder.parent / "state"
    begin = 0
    if (state / pointers.LATEST).exists():
        saved = pointers.follow(state / pointers.LATEST)
        ema.load(saved)
        begin = int(saved.name.rpartition("-")[2])
        model.load_state_dict(torch.load(state / f"{begin}-{rank}.pt", weights_only=False))
    handle = ema.publish(folder, every=EVERY, keep=KEEP, keep_at_most=1000) if publishes else None
    for step in range(begin + 1, steps + 1):
        torch.manual_seed(step)
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None and step % 5:
            handle.wait()  # so that most of the versions are written; others are skipped
        if step % CHECKPOINT == 0 or step == steps:
            torch.save(model.state_dict(), state / f"{step}-{rank}.pt")
            if world > 1:
                dist.barrier()
            ema.save(state / f"ema-{step}", keep=2)
    if handle is not None:
        handle.remove(stop=rank == 0)
    os._exit(0)  # gloo aborts now and then in a normal exit


# --- the run -------------------------------------------------------------------------------------


def play(role: str, place: Path, report: Path, steps: int, options: dict[str, Any]) -> None:
    """One process of the run; options: its environment, `network`, `publishes`."""
    os.environ |= options["environment"]
    if options["network"]:
        use_network_rules()
    folder = place / "published"
    if role == "trainer":
        run_trainer(folder, steps, options["publishes"])
    elif role == "server":
        run_server(folder, report)
    elif role.startswith("watcher"):
        run_watcher(folder, report)
    else:
        run_follower(folder, report, role)


class Processes:
    """Everything that runs, by role; each may be killed and started again."""

    def __init__(self, place: Path, ranks: int, steps: int, network: bool) -> None:
        self.place, self.ranks, self.steps, self.network = place, ranks, steps, network
        self.running: dict[str, list[Any]] = {}
        self.incarnations = Counter[str]()
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        for name in ("reports", "state"):
            (place / name).mkdir(parents=True)

    def start(self, role: str, publishes: bool = True) -> None:
        self.incarnations[role] += 1
        report = self.place / "reports" / f"{role}.{self.incarnations[role]}"
        world = self.ranks if role == "trainer" else 1
        rendezvous = f"file://{self.place}/rendezvous-{self.incarnations[role]}"
        options: dict[str, Any] = {"network": self.network, "publishes": publishes}
        self.running[role] = []
        for rank in range(world):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "RENDEZVOUS": rendezvous}
            arguments = (role, self.place, report, self.steps)
            arguments += (options | {"environment": environment},)
            process = self.context.Process(target=play, args=arguments, daemon=True)
            process.start()
            self.running[role].append(process)

    def kill(self, role: str) -> None:
        for process in self.running[role]:
            process.kill()
        for process in self.running[role]:
            process.join()

    def is_over(self, role: str) -> bool:
        return all(process.exitcode is not None for process in self.running[role])

    def finish(self, role: str) -> None:
        for process in self.running[role]:
            process.join()
        codes = [process.exitcode for process in self.running[role]]
        assert codes == [0] * len(codes), f"{role} ended with {codes}"


class Bound:
    """How far the folder was ever beyond keep, what is leased, the best, and one in flight.

    What a lease or the pointer has kept goes with the next version, so those of the last two
    versions count too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.excess = folder, 0
        self._held: dict[int, set[str]] = {}

    def look(self) -> None:
        before = leases.read_all(self.folder)
        found = versions.numbered(self.folder)
        leased = before.keys() | leases.read_all(self.folder).keys()
        held = self._held.setdefault(max(found, default=0), set())
        held |= {path.name.rpartition(".")[0] for path in leased}
        held.add(pointers.named(self.folder / pointers.BEST) or "")
        recent = set().union(*list(self._held.values())[-3:])
        older = list(found.values())[:-KEEP]
        self.excess = max(self.excess, sum(path.name not in recent for path in older) - 1)


def run(place: Path, *, ranks: int, count: int, kills: int, network: bool, seed: int) -> str:
    """All of it, and what is asserted. Returns a summary."""
    draw = random.Random(seed)
    folder, steps = place / "published", count * EVERY * 5 // 4
    calm = Processes(place / "calm", ranks, steps, False)
    calm.start("trainer", publishes=False)
    calm.finish("trainer")
    live = Processes(place / "live", ranks, steps, network)
    folder = live.place / "published"
    for role in ("trainer", *ROLES):
        live.start(role)
    killed, bound = Counter[str](), Bound(folder)
    while not live.is_over("trainer") or killed.total() < kills:
        done = count if live.is_over("trainer") else versions.highest(folder)
        behind = done < count * killed.total() // kills
        if killed.total() < kills and not behind:
            role = draw.choice(("trainer", *ROLES))
            live.kill(role)
            live.start(role)
            killed[role] += 1
        if folder.is_dir():
            bound.look()
        time.sleep(0.02)
    for role in ("trainer", *ROLES):
        live.finish(role)
    published = versions.highest(folder)
    text = check(live, published, bound.excess)
    averages = [
        each.place / "state" / f"ema-{steps}" / "model.safetensors" for each in (calm, live)
    ]
    assert averages[0].read_bytes() == averages[1].read_bytes(), "the average is another one"
    return f"{published} versions, kills: {dict(killed)}; {text}"


def lines(folder: Path, role: str) -> Iterator[list[dict[str, Any]]]:
    """What each incarnation of a role read; a kill may have torn the last line."""
    for path in sorted(folder.glob(f"{role}.*")):
        found = []
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        yield found


def check(live: Processes, published: int, most: int) -> str:
    folder, reports = live.place / "published", live.place / "reports"
    reads = Counter[str]()
    for role in ROLES:
        for incarnation in lines(reports, role):
            problems = [each for each in incarnation if each["problems"]]
            assert not problems, f"{role}: {problems[:3]}"
            numbers = [each["version"] for each in incarnation]
            if role.startswith("follower"):
                assert numbers == sorted(set(numbers)), f"{role}: each once, in order: {numbers}"
            reads[role] += len(numbers)
    records = ledger.read_records(live.place / ledger.NAME)
    evaluated = [each for each in records if each.task == "eval"]
    taken = {
        each["id"]
        for role in ("watcher-1", "watcher-2")
        for incarnation in lines(reports, role)
        for each in incarnation
    }
    recorded = [each.id for each in evaluated]
    assert len(recorded) == len(set(recorded)), "once"
    assert taken <= set(recorded), "each version that a watcher took is in the ledger"
    states = Counter(each.state for each in evaluated)
    assert not states[ledger.RUNNING], "nothing is left undone"
    present = {each.version: each.state for each in evaluated}
    record = folder / ".leases" / leases.RETIRED
    retired = json.loads(record.read_text()) if record.exists() else []
    for number, path in versions.numbered(folder).items():
        # A retired version takes no new readers: no watcher may begin it, or do it again after a
        # kill. It lies there while somebody who opened it before holds a lease.
        lost = path.name in retired and present.get(number) in (ledger.FAILED, None)
        assert lost or present.get(number) == ledger.DONE, f"{number}: {retired}, {present}"
    assert not most, f"{most} versions more than keep + leases + 1"
    names = [str(each) for each in live.place.rglob("*") if ".tmp-" in str(each)]
    names += [str(each) for each in live.place.rglob("*") if ".gone-" in str(each)]
    assert not names, f"temporaries are left: {names[:3]}"
    assert published in {each.version for each in records if each.task == "server"}
    return f"reads: {dict(reads)}, ledger: {dict(states)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--versions", type=int, default=200, metavar="N")
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="of the trainer")
    parser.add_argument(
        "--network", action="store_true", help="under a network file system's rules"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        text = run(
            Path(place),
            ranks=given.ranks,
            count=given.versions,
            kills=given.kills,
            network=given.network,
            seed=given.seed,
        )
    print(f"{text}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
