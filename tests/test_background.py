"""Saves behind training: the bytes of the moment of the call, no waiting on training, and every
error on every rank.

How to read a failure: `Held` stops the thread before it writes its first part, so that what happens
meanwhile does happen meanwhile; nothing here depends on who is faster.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.checkpoint import crc32, disk, manifest
from dist_ema.checkpoint.background import BackgroundTask
from dist_ema.distributed import connections, receiver, waiting
from tests._models import Core, Images
from tests._oracle import Training
from tests._ranks import raises, run_ranks

ROOT = Path(__file__).parent.parent


class Held:
    """Stops the writing thread of this rank until `free`."""

    def __init__(self) -> None:
        self._gate = threading.Event()
        self._real = real = disk.FileWriter.write

        def part(writer: Any, *args: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()
            assert self._gate.wait(60), "nobody freed the thread"
            real(writer, *args)

        disk.FileWriter.write = part  # type: ignore[method-assign]

    def free(self) -> None:
        disk.FileWriter.write = self._real  # type: ignore[method-assign]
        self._gate.set()

    def free_soon(self) -> None:
        threading.Timer(0.3, self.free).start()


def whole(folder: Path) -> bool:
    """Every file has the check sum that ema.json says."""
    for name, said in manifest.read(folder).files.items():
        total, data = crc32.RangeSum(said["size"]), (folder / name).read_bytes()
        total.add(0, data)
        assert (len(data), crc32.check_sum(len(data), [total.contribution])) == (
            said["size"],
            said["crc32"],
        )
    return True


# --- ranks ----------------------------------------------------------------------------------------


def training_goes_on(folder: str, kind: str, mode: Any) -> None:
    """The file holds the call's moment: shadows, frozen weights and buffers, however much is
    trained meanwhile, with training's own collectives and those of other verbs in between. Guards
    the copies in BlockPlacer.stage.
    """
    run = Training(kind)
    ema = EMA(run.model, [0.5, 0.9])
    ema.attach(run.optimizer)
    run.train(2)
    want, second, now = ema.gather(), ema.gather(1), ema.now
    path = Path(folder, f"{kind}-{mode}")
    held = Held()
    ema.save(path, mode=mode, wait=False)
    run.train(2)
    with torch.no_grad():
        for p in run.model.parameters():
            p += 1
    with ema.swap():
        run.probe()
    later = ema.gather()
    assert not path.exists(), "it is under way"
    held.free()
    ema.save(f"{path}-later", mode=mode)
    if want:
        assert path.exists(), "a save waits for the one before"
        stored = load_file(path)
        assert stored.keys() == want.keys()
        assert all(torch.equal(stored[name], want[name]) for name in want)
        others = load_file(path / "averages" / "1-Constant")
        assert all(torch.equal(others[name], second[name]) for name in others)
        assert len(others) > 5
        assert {name for name in want if not torch.equal(later[name], want[name])} >= {
            "core.emb.weight",
            "core.seen",
        }
        assert manifest.read(path).clock["now"] == now
        assert whole(path)


def one_at_a_time(folder: str, mode: Any) -> None:
    """A second save, a load and an export wait for what is under way.

    Guards Files.finish in each.
    """
    model = nn.parallel.DistributedDataParallel(Images())
    ema = EMA(model, 0.5)
    for number, verb in enumerate(
        (
            lambda: ema.save(f"{folder}/other", wait=False, mode=mode),
            lambda: ema.export(f"{folder}/other.safetensors"),
            lambda: ema.load(f"{folder}/waited-{mode}"),
        )
    ):
        ema.update()
        held = Held()
        ema.save(f"{folder}/waited-{mode}", mode=mode, wait=False)
        ema.update()
        held.free_soon()
        verb()
        ema.save(f"{folder}/{number}")
        if dist.get_rank() == 0:
            assert whole(Path(folder, f"waited-{mode}"))
            assert manifest.read(Path(folder, f"waited-{mode}")).clock["now"] == 2 * number + 1
    assert ema.now == 2 * number + 1, "what was loaded is what was being written"
    held = Held()
    ema.save(f"{folder}/none", mode=mode, wait=False)
    with ema.swap():
        model.module.norm.running_mean.fill_(5)
    held.free()
    ema._saving.finish()
    held = Held()
    ema.save(f"{folder}/own", mode=mode, wait=False)
    with ema.swap():
        model.module.norm.running_mean.fill_(6)
    held.free()
    ema.save(f"{folder}/own-later")
    if dist.get_rank() == 0:
        kept, later = load_file(f"{folder}/own"), load_file(f"{folder}/own-later")
        assert (kept["norm.running_mean"] == 5).all()
        assert (later["norm.running_mean"] == 6).all()
        said = [manifest.read(Path(folder, name)).own_buffers for name in ("none", "own")]
        statistics = ["num_batches_tracked", "running_mean", "running_var"]
        assert said == [[], [f"norm.{name}" for name in statistics]], "all of the module's"


def disk_full(folder: str) -> None:
    """Behind training, on one rank: told on both at the next save, once, with its cause; the save
    before is intact.
    """
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(*(nn.Linear(600, 600, bias=False) for _ in range(4)))
    )
    receiver.WINDOW = 1 << 20  # rank 1 has two windows to get rid of
    ema = EMA(model, 0.5)
    ema.timeout = 30
    ema.save(f"{folder}/kept")
    before = Path(folder, "kept", "model.safetensors").read_bytes()
    for mode, broken, room in (
        ("direct", 1, 1 << 20),
        ("direct", 0, 1 << 20),
        ("stream", 0, 1 << 20),
        ("stream", 0, 4 << 20),
    ):
        mine = dist.get_rank() == broken
        held, limit = Held(), resource.getrlimit(resource.RLIMIT_FSIZE)
        with torch.no_grad():
            model.module[0].weight += 1
        ema.update()
        ema.save(f"{folder}/kept", mode=mode, wait=False)  # type: ignore[arg-type]
        if mine:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        held.free()
        words = (
            "kept', wait=False) failed behind training",
            "File too large" if mine else f"failed on rank {broken}",
        )
        try:
            ema.save(f"{folder}/never")
        except RuntimeError as error:
            assert all(word in str(error) for word in words), error
            assert error.__cause__ is not None
            # Guards the draining in wire._pour: what rank 1 had to send, it could.
            assert dist.get_rank() == 0 or not isinstance(error.__cause__.__cause__, RuntimeError)
        else:
            raise AssertionError("nothing was raised")
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if dist.get_rank() == 0:
            assert os.listdir(folder) == ["kept"]
            assert Path(folder, "kept", "model.safetensors").read_bytes() == before
        dist.barrier()
    with raises(ValueError if dist.get_rank() == 0 else RuntimeError, "keep must be"):
        ema.save(
            f"{folder}/kept", keep=0, wait=False
        )  # what can be known at the call is said there
    ema.save(f"{folder}/kept", wait=False)
    ema.save(f"{folder}/last")
    assert (
        Path(folder, "kept", "model.safetensors").read_bytes()
        == Path(folder, "last", "model.safetensors").read_bytes()
    )
    assert Path(folder, "kept", "model.safetensors").read_bytes() != before


def line_breaks(folder: str) -> None:
    """A rank that gives no sign of life while it sends: an error on both, and the next save goes
    on over new connections.
    """
    ema = EMA(nn.parallel.DistributedDataParallel(nn.Linear(30, 40)), 0.5)
    ema.save(f"{folder}/a", mode="stream")
    assert ema._saving.writer is not None
    send, beat = connections.Connections.send, waiting.Waiting.send_heartbeat
    if dist.get_rank() == 1:
        connections.Connections.send = lambda *args: (time.sleep(7), send(*args))[1]  # type: ignore[method-assign]
        waiting.Waiting.send_heartbeat = lambda self: None  # type: ignore[method-assign]
    timeout, ema.timeout = ema.timeout, 1.0
    with raises(RuntimeError, "ema.save(): rank 1 gave no sign of life for 1 s"):
        ema.save(f"{folder}/b", mode="stream")
    connections.Connections.send, waiting.Waiting.send_heartbeat = send, beat  # type: ignore[method-assign]
    ema.timeout = timeout
    ema.save(f"{folder}/a", mode="stream")
    if dist.get_rank() == 0:
        assert os.listdir(folder) == ["a"]
        assert whole(Path(folder, "a"))


def behind(folder: str) -> None:
    for name in ("a", "b", "c", "d"):
        Path(folder, name).mkdir(exist_ok=True)
    for mode in ("direct", "stream"):
        for kind in ("ddp", "fsdp2"):
            training_goes_on(f"{folder}/a", kind, mode)
        one_at_a_time(f"{folder}/b", mode)
    disk_full(f"{folder}/c")
    line_breaks(f"{folder}/d")
    plain = EMA(Core(), 0.5)  # nobody wrapped it: the first rank writes
    with torch.no_grad():
        for p in plain.weights.model.parameters():
            p.fill_(3)
    plain.update()
    want = plain.gather()
    plain.save(f"{folder}/plain", wait=False)
    plain.update()
    plain.load(f"{folder}/plain")
    assert all(
        torch.equal(value, want[name]) for name, value in load_file(f"{folder}/plain").items()
    )


def test_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, behind, str(tmp_path))


def dies(folder: str, victim: int, mode: Any, wait: bool) -> str:
    """A rank is killed while it writes or sends; what the others say of it, and when."""
    ema = EMA(nn.parallel.DistributedDataParallel(nn.Linear(300, 400)), 0.5)
    ema.timeout = 4
    ema.save(f"{folder}/kept", mode=mode)
    dist.barrier()
    if dist.get_rank() == victim:

        def kill(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if mode == "direct" or victim == 0:
            disk.FileWriter.write = kill  # type: ignore[method-assign]
        else:
            connections.Connections.send = kill  # type: ignore[method-assign]
    ema.update()
    started = time.monotonic()
    try:
        ema.save(f"{folder}/kept", mode=mode, wait=wait)
        ema.save(f"{folder}/kept", mode=mode)
    except RuntimeError as error:
        assert time.monotonic() - started < 60
        return str(error)
    raise AssertionError("nobody died")


@pytest.mark.parametrize(
    ("victim", "mode", "wait", "words"),
    [
        (
            1,
            "direct",
            False,
            "failed behind training: ema.save(): rank 1 gave no sign of life for 4 s",
        ),
        (1, "stream", True, "ema.save(): rank 1 gave no sign of life for 4 s"),
        (
            0,
            "stream",
            False,
            "failed behind training: ema.save(): rank 0 sent and took no bytes (",
        ),
    ],
)
def test_a_rank_dies(victim: int, mode: str, wait: bool, words: str, tmp_path: Path) -> None:
    """The others raise with its name, in the middle of writing too; what was there is intact, and
    the next save tidies up.
    """
    said = run_ranks(3, dies, str(tmp_path), victim, mode, wait, allow_dead=True)
    assert said.pop(victim) is None
    # Where it died before the others sent to it, they miss the key-value store that it held.
    store = "the process that holds it (rank 0" if victim == 0 else words
    assert all(words in each or store in each for each in said), said
    assert all("failed behind training" in each for each in said) != wait, said
    assert whole(tmp_path / "kept")
    assert manifest.read(tmp_path / "kept").clock["now"] == 0
    left = [name for name in os.listdir(tmp_path) if name != "kept"]
    assert len(left) == (victim == 0), "the first rank removes the temporary, if it lives"
    EMA(nn.Linear(2, 2), 0.5).save(tmp_path / "kept")
    assert os.listdir(tmp_path) == ["kept"]


# --- the end of the program -----------------------------------------------------------------------

PROGRAM = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from dist_ema import EMA

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
port = folder / "port"
if rank == 0:  # which also serves the store, and may end first
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    (folder / "part").write_text(str(store.port))
    (folder / "part").rename(port)
else:
    while not port.exists():
        time.sleep(0.01)
    store = dist.TCPStore("127.0.0.1", int(port.read_text()), 2, False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(300, 400))
ema = EMA(model, 0.5)
ema.save(folder / "average", wait=False)
if rank == 0:
    while not (folder / "average").exists():
        time.sleep(0.01)
    store.set("seen", "")
else:  # NOTE: this keeps the connection of the store for itself, as the making of a group may
    store.wait(["seen"], timedelta(seconds=60))
ema.save(folder / "last", mode="stream", wait=False)
dist.destroy_process_group()
"""


def test_the_end_of_the_program_waits(tmp_path: Path) -> None:
    """It ends right after the call, with the process group destroyed: the save is whole, and nobody
    complains. And the thread needs nothing that the program may be waiting with: guards clone() in
    artifact.
    """
    command = [sys.executable, "-c", PROGRAM]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environ, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert not [line for text in said for line in text.splitlines() if "ema.save" in line], said
    assert [rank.returncode for rank in ranks].count(0) > 0, (
        said
    )  # gloo aborts now and then in a normal exit
    assert whole(tmp_path / "last")
    assert sorted(os.listdir(tmp_path)) == ["average", "last", "port"]


# --- the thread -----------------------------------------------------------------------------------


def test_an_error_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """And logged at once: there may be no next call."""
    behind, done = BackgroundTask(), []
    assert behind.finish() == []
    behind.start("a", lambda: ["remark"])
    assert behind.finish() == ["remark"]
    assert behind.finish() == []
    behind.start("writing b", lambda: done.append(1) or [][1])  # type: ignore[func-returns-value]
    with pytest.raises(
        RuntimeError, match="writing b failed behind training: list index out of range"
    ) as caught:
        behind.finish()
    assert isinstance(caught.value.__cause__, IndexError)
    assert behind.finish() == []
    assert "writing b failed behind training: list index out of range" in caplog.text
    behind.start("c", list)
    assert (behind.finish(), done) == ([], [1])


def test_a_thread_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the save, and the next one works."""
    ema, start = EMA(nn.Linear(2, 2)), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "dist_ema files":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new"):
        patch.setattr(threading.Thread, "start", refuse)
        ema.save(tmp_path / "a", wait=False)
    assert not list(tmp_path.iterdir())
    ema.save(tmp_path / "a", wait=False)
    ema.load(tmp_path / "a")


def test_a_world_of_one(tmp_path: Path) -> None:
    """Without a process group, and from inside inference mode."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    start = model.weight.detach().clone()
    with torch.inference_mode():
        ema.save(tmp_path / "a", wait=False, extra={"epoch": 1})
    with torch.no_grad():
        model.weight += 1
    ema.update()
    want = ema.gather()
    ema.save(tmp_path / "b", wait=False)
    ema.load(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "ema.json").read_text())["extra"] == {"epoch": 1}
    assert torch.equal(load_file(tmp_path / "a")["weight"], start)
    assert torch.equal(load_file(tmp_path / "b")["weight"], want["weight"])
    assert not torch.equal(want["weight"], start)
    with raises(ValueError, "is a file"):
        (tmp_path / "file").touch()
        ema.save(tmp_path / "file", wait=False)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "file"]
