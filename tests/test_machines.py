"""Several machines: what each of them writes and receives, and that the file is one machine's.

How to read a failure: DIST_EMA_MACHINE makes a machine of each rank (or of two) on this one. In
ranks a check is a plain assert and names the case.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.checkpoint import disk
from dist_ema.distributed import connections, machines, ranks, receiver
from dist_ema.distributed.coordinator import StoreCoordinator
from dist_ema.distributed.machines import MACHINE, Machines, Routes
from tests._models import Net
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

WORLD = 4


class Written:
    """The bytes that this rank writes into files while the block runs, by file."""

    def __enter__(self) -> dict[int, int]:
        counted: dict[int, int] = {}
        self._real = real = disk.FileWriter.write

        def write(files: Any, file: int, offset: int, data: memoryview) -> None:
            counted[file] = counted.get(file, 0) + len(data)
            real(files, file, offset, data)

        disk.FileWriter.write = write  # type: ignore[method-assign]
        return counted

    def __exit__(self, *_: object) -> None:
        disk.FileWriter.write = self._real  # type: ignore[method-assign]


def received(ema: EMA) -> int:
    """Bytes, by all saves until now."""
    writer = ema._saving.writer
    several = [ema._entry.ranks, writer._behind if writer else None]
    return sum(ranks.connections("save").received for ranks in several if ranks is not None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return wrap(kind, nn.Sequential(*(nn.Linear(96, 96) for _ in range(8))))


def each_writes_its_part(folder: Path, kind: str) -> None:
    """Of several files each machine writes some, of one file a part. Everything else is the same
    as on one machine, and no rank receives more than its machine's part.
    """
    rank = dist.get_rank()
    os.environ.pop(MACHINE, None)
    EMA(model_of(kind), 0.5).save(folder / "one", max_shard_size=40_000)
    EMA(model_of(kind), 0.5).save(folder / "one-file")
    os.environ[MACHINE] = f"host {rank}"
    ema = EMA(model_of(kind), 0.5)
    for name, size, wait in (
        ("one", 40_000, True),
        ("one", 40_000, False),
        ("one-file", "5GB", True),
    ):
        before = received(ema)
        with Written() as written:
            ema.save(folder / "four", max_shard_size=size, wait=wait)
            ema._saving.finish()

        came = received(ema) - before
        dist.barrier()
        if rank == 0:
            assert contents(folder / "one") == contents(folder / "four") or name != "one"
            assert contents(folder / name) == contents(folder / "four"), (kind, name)
        total = 8 * (96 * 96 + 96) * 4
        assert abs(sum(written.values()) - total / WORLD) < total / WORLD * 0.1, (name, written)
        assert came <= total / WORLD * 1.1, (name, came)
        assert came or kind == "ddp", "where each holds what its machine writes"
        assert len(written) == (1 if name == "one-file" else 2), written
        dist.barrier()


def two_on_each(folder: Path) -> None:
    """Two ranks per machine: a rank sends to its column alone, and `gather` goes through it."""
    os.environ[MACHINE] = f"host {dist.get_rank() // 2}"
    ema = EMA(model_of("fsdp2"), 0.5)
    sent: list[tuple[int, int | None]] = []
    real = connections.Connections.send

    def send(self: Any, rank: int, runs: Any, relay: int | None = None) -> None:
        sent.append((rank, relay))
        real(self, rank, runs, relay)

    connections.Connections.send = send  # type: ignore[method-assign]
    ema.save(folder / "two")
    assert sent == [((dist.get_rank() + 2) % 4, None)]
    sent.clear()
    full = ema.gather()
    assert sent == {0: [], 1: [(0, None)], 2: [(0, None)], 3: [(0, 1)]}[dist.get_rank()]
    connections.Connections.send = real  # type: ignore[method-assign]
    if full:
        stored = load_file(folder / "two")
        assert stored.keys() == full.keys()
        assert all(torch.equal(stored[name], full[name]) for name in full)


def over_ipv6(folder: Path) -> None:
    """A machine that is reached by IPv6 alone, and one whose port does not answer."""
    rank = dist.get_rank()
    os.environ[MACHINE] = f"host {rank}"
    real, ranks.addresses = ranks.addresses, lambda store: ["::1"]
    ema = EMA(model_of("fsdp2"), 0.5, timeout=30)
    ema.save(folder / "ipv6")
    assert contents(folder / "ipv6") == contents(folder / "two")
    ranks.addresses, connections.PATIENCE = real, 1.0
    with socket.create_server(("127.0.0.1", 0), backlog=1) as closed:
        waiting = [socket.socket() for _ in range(3)]  # what comes after them gets no answer
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(closed.getsockname())
        column = ema._entry.ranks.connections("save")._known[0]
        column.update({other: (closed.getsockname()[1], ["127.0.0.1"]) for other in column})
        with raises(RuntimeError, "127.0.0.1: timed out", "GLOO_SOCKET_IFNAME", "ema.save()"):
            ema.save(folder / "ipv6")
        for each in waiting:
            each.close()
    assert contents(folder / "ipv6") == contents(folder / "two")


def one_disk_is_full(folder: Path) -> None:
    """Of a machine that receives: the error names it on every rank, and the save before stays."""
    rank = dist.get_rank()
    os.environ[MACHINE] = f"host {rank}"
    torch.manual_seed(0)
    model = wrap("ddp", nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(4))))
    ema = EMA(model, 0.5, timeout=30)
    ema.save(folder / "kept")
    dist.barrier()
    before, limit = contents(folder / "kept"), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for wait in (True, False):
        dist.barrier()
        if rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
        words = ("File too large",) if rank == 2 else ("ema.save() failed on rank 2", "too large")
        with raises((OSError, RuntimeError), *words):  # type: ignore[arg-type]
            ema.save(folder / "kept", wait=wait)
            ema._saving.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        dist.barrier()
        assert os.listdir(folder) == ["kept"]
    ema.save(folder / "kept")
    assert contents(folder / "kept").keys() == before.keys()


def hosts(folder: str) -> None:
    machines.ALIGN, receiver.WINDOW = 1 << 10, 1 << 14
    for kind in ("ddp", "fsdp2"):
        each_writes_its_part(Path(folder, kind), kind)
    two_on_each(Path(folder))
    if socket.has_dualstack_ipv6():
        over_ipv6(Path(folder))
    one_disk_is_full(Path(folder, "full"))
    ema = EMA(wrap("fsdp2", Net()), 0.5)  # a model of which most machines write nothing
    ema.save(Path(folder, "small"))
    ema.load(Path(folder, "small"))


@pytest.mark.multirank
def test_four_hosts(tmp_path: Path) -> None:
    run_ranks(WORLD, hosts, str(tmp_path))


def dies_among_hosts(folder: str) -> str:
    os.environ[MACHINE] = f"host {dist.get_rank()}"
    ema = EMA(model_of("ddp"), 0.5, timeout=4)
    machines.ALIGN = 1 << 10
    ema.save(Path(folder, "kept"))
    dist.barrier()
    if dist.get_rank() == 1:  # while it writes what others sent
        disk.FileWriter.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    try:
        ema.save(Path(folder, "kept"))
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no rank died")


@pytest.mark.multirank
def test_a_host_dies(tmp_path: Path) -> None:
    """The others name it, in one sentence, and the save before is whole."""
    texts = run_ranks(WORLD, dies_among_hosts, str(tmp_path), allow_dead=True)
    assert texts.pop(1) is None
    assert len(set(texts)) == 1
    assert texts[0].startswith("ema.save(): rank 1 "), texts
    assert os.listdir(tmp_path) == ["kept"]
    assert len(load_file(tmp_path / "kept")) == 16


def test_cuts() -> None:
    """Between files where that is fair, else at a multiple of ALIGN; every byte has one machine."""
    six = Machines([0, 0, 1, 1, 2, 2])
    writers = six.ranks
    for sizes in ([300 << 20] * 3, [100 << 20, 7, 0, 900 << 20], [5], [0, 0], [3 << 20] * 100):
        one = Routes(sizes, six, writers, 3)
        total, starts = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
        assert one.cuts[0] == 0
        assert one.cuts[-1] == total
        assert one.cuts == sorted(one.cuts)
        for cut in one.cuts[1:-1]:
            start = max(start for start in starts if start <= cut)
            assert cut in (*starts, total) or (cut - start) % machines.ALIGN == 0
        parts = [b - a for a, b in zip(one.cuts, one.cuts[1:], strict=False)]
        assert max(parts) <= total / 3 * 1.1 + machines.ALIGN
        assert one.peers == [1, 3, 5]
        assert one.order == [2, 0, 1]
        for file, size in enumerate(sizes):
            if not size:
                continue  # no block lies in it
            clipped = [one.clip(number, file, 0, size) for number in one.ranges(file, 0, size)]
            assert sum(high - low for low, high in clipped) == size
    assert Routes([300] * 3, six, writers, 0).cuts == [0, 300, 600, 900]


def test_what_does_not_greet_is_turned_away() -> None:
    """A port is open to all: what says nothing, half of it or something else is closed, at once or
    after the interval, and the next sender is served. A connection left open would be a warning.
    """
    listener, greeting = (
        socket.create_server(("127.0.0.1", 0)),
        receiver.GREETING.pack(b"t" * 32, 7),
    )
    served = receiver.Receiver(
        lambda *_: socket.socket(), lambda *_: None, StoreCoordinator(None, [0], 0, timeout=0.4)
    )
    thread = threading.Thread(target=served.accept, args=(listener, greeting))
    thread.start()
    with listener:
        for text in (b"", greeting[:-1], greeting, b"?" * 44, greeting[::-1] + b"1234"):
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(text)
                assert stranger.recv(1) == b"", text
        with socket.create_connection(listener.getsockname()) as sender:
            sender.sendall(greeting + receiver.COUNT.pack(0))
            assert sender.recv(1) == receiver.ACCEPTED
        served.stopped = True
        thread.join()
        served.close()


def test_a_sender_that_comes_late() -> None:
    """One that greets when the transfer has ended here is closed, without an error in a thread."""
    listener, greeting = (
        socket.create_server(("127.0.0.1", 0)),
        receiver.GREETING.pack(b"t" * 32, 7),
    )
    served = receiver.Receiver(
        lambda *_: socket.socket(), lambda *_: None, StoreCoordinator(None, [0], 0)
    )
    accepting = threading.Thread(target=served.accept, args=(listener, greeting))
    serving = threading.Thread(target=served.serve)
    with listener, socket.create_connection(listener.getsockname()) as sender:
        accepting.start()
        serving.start()
        sender.sendall(greeting)
        time.sleep(0.1)  # it is waited for
        served.stopped = True
        serving.join()
        sender.sendall(receiver.COUNT.pack(0))
        accepting.join()
        served.close()
        assert sender.recv(2) in (b"", receiver.ACCEPTED)


def test_a_receiver_that_fails() -> None:
    """What is no error of the disk or the network ends no thread: the sender is turned away."""
    listener, greeting = (
        socket.create_server(("127.0.0.1", 0)),
        receiver.GREETING.pack(b"t" * 32, 7),
    )
    served = receiver.Receiver(
        lambda *_: socket.socket(type=1 // 0), lambda *_: None, StoreCoordinator(None, [0], 0)
    )
    threads = [
        threading.Thread(target=served.accept, args=(listener, greeting)),
        threading.Thread(target=served.serve),
    ]
    with listener, socket.create_connection(listener.getsockname(), 20) as sender:
        for thread in threads:
            thread.start()
        sender.sendall(greeting + receiver.COUNT.pack(5))  # for another rank
        assert sender.recv(1) == receiver.ACCEPTED
        sender.sendall(bytes(12))
        with suppress(ConnectionResetError):
            assert sender.recv(1) == b""
        served.stopped = True
        for thread in threads:
            thread.join()
        served.close()
    assert isinstance(served.error, ZeroDivisionError)
