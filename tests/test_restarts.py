"""Ranks that torchrun restarts: what a killed attempt left in the store harms no later one.

How to read a failure: torchrun's log, the ranks' lines included, is in the message. Each attempt
notes in `joined-N-RANK` that a rank came through init_process_group, and in `killed-N` that it is
about to kill itself. gloo's addresses lie in the same store, and gloo hangs when it meets those of
a killed attempt, with or without an average. So each attempt removes them first, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, load_file
from tests._ranks import run_program, run_ranks

STEPS, EVERY, KILLS = 24, 4, 3
ROOT = Path(__file__).resolve().parent.parent


def plan(kill: int) -> tuple[int, int, bool]:
    """The rank that is killed after `kill` others, the step, and whether inside a save."""
    chosen = random.Random(f"kill {kill}")
    begin = 6 * kill + 5
    step = chosen.randrange(begin, begin + 6)
    return chosen.randrange(2), step - step % EVERY if kill == 1 else step, kill == 1


def train(folder: str, die: Callable[[int], None] = lambda step: None) -> None:
    """A loop that goes on where its last save was, with two averages of one model."""
    torch.manual_seed(0)
    rank, root = dist.get_rank(), Path(folder)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    fast, slow = EMA(model, 0.5, timeout=30), EMA(model, 0.9, timeout=30)
    fast.attach(optimizer)
    step = 0
    if (root / "slow" / "latest").exists():
        slow.load(root / "slow" / "latest")
        step = int(slow.now)
        fast.load(root / "fast" / f"{step:04}")
        live = torch.load(root / f"live-{step:04}-{rank}.pt")
        model.load_state_dict(live["model"])
        optimizer.load_state_dict(live["optimizer"])
    slow.attach(optimizer)
    while step < STEPS:
        step += 1
        data = torch.Generator().manual_seed(1000 * step + rank)
        model(torch.randn(6, 9, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        die(step)
        if step % EVERY == 0:
            live = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(live, root / f"live-{step:04}-{rank}.pt")
            fast.save(root / "fast" / f"{step:04}", mode="stream", keep=9, wait=False)
            fast.gather()
            fast.load(root / "fast" / f"{step:04}")  # waits: `latest` names a step that is whole
            slow.save(root / "slow" / f"{step:04}", keep=9)
    with slow.swap():
        assert model(torch.zeros(2, 9)).isfinite().all()


def forget_addresses(rank: int, number: str) -> None:
    """Delete what torch itself left in the store, before any rank reads it. *Collective*."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, False)
    if rank == 0:
        for key in store.list_keys():
            if "dist_ema" not in key:
                store.delete_key(key)
        store.set(f"dist_ema test {number}", "")
    store.wait([f"dist_ema test {number}"])


def attempt(folder: str) -> None:
    """One attempt, as torchrun starts it: it kills one of its ranks until KILLS were killed."""
    rank, number = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    forget_addresses(rank, number)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    Path(folder, f"joined-{number}-{rank}").touch()
    killed = len(list(Path(folder).glob("killed-*")))
    dist.barrier()

    def kill() -> None:
        Path(folder, f"killed-{killed}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def die(step: int) -> None:
        if killed < KILLS and plan(killed)[:2] == (rank, step):
            if plan(killed)[2]:
                write = os.pwrite

                def killed_while_writing(*args: Any) -> int:
                    kill()
                    return write(*args)

                os.pwrite = killed_while_writing
            else:
                kill()

    train(folder, die)
    Path(folder, f"done-{rank}").touch()
    with contextlib.suppress(Exception):
        dist.barrier()


AGENT = """
import multiprocessing, sys
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from tests.test_restarts import attempt, torchrun_options

multiprocessing.set_forkserver_preload(["tests.test_restarts", "torch._dynamo"])
options = parse_args([*torchrun_options(), "--rdzv-backend", "c10d", "unused"])
config, _, _ = config_from_args(options)
config.rdzv_endpoint, config.start_method = "localhost:0", "forkserver"
elastic_launch(config, attempt)(sys.argv[1])
"""


def torchrun_options() -> list[str]:
    return ["--nproc-per-node", "2", "--max-restarts", str(KILLS)]


def agent(folder: str) -> str:
    """torchrun's agent, rendezvous and store, with ranks that are forked: what it printed."""
    return run_program(AGENT, folder, timeout=280)


def torchrun(folder: str) -> str:
    """The command itself, which starts an interpreter for each rank: what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun_options()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    result = subprocess.run(
        [*command, "--module", "tests.test_restarts", folder],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-9000:]}"
    return result.stderr


@pytest.mark.multirank
@pytest.mark.skipif(not hasattr(dist.TCPStore, "list_keys"), reason="torch cannot list keys")
@pytest.mark.parametrize(
    "launch", [agent, pytest.param(torchrun, marks=pytest.mark.rest)], ids=["agent", "torchrun"]
)
def test_three_kills_under_torchrun_resume_bit_for_bit(
    tmp_path: Path, launch: Callable[[str], str]
) -> None:
    """Guards the random id in front of a coordinator's keys ([Note: incarnations]).

    A sample has torchrun's agent fork the ranks; with `--all` its command starts them too.
    """
    (tmp_path / "whole").mkdir()
    run_ranks(2, train, str(tmp_path / "whole"))
    (tmp_path / "killed").mkdir()
    printed = launch(str(tmp_path / "killed"))
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    log = f"{sorted(names)}\n{printed[-9000:]}"
    assert {"killed-0", "killed-1", "killed-2", "done-0", "done-1"} <= names, log
    for average in ("fast", "slow"):
        whole = load_file(tmp_path / "whole" / average / f"{STEPS:04}")
        resumed = load_file(tmp_path / "killed" / average / f"{STEPS:04}")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


if __name__ == "__main__":
    attempt(sys.argv[1])
    os._exit(0)  # gloo aborts now and then in a normal exit, after everything passed
