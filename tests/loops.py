"""What the tests of scripts share: a launcher of ranks, and the scripts of the docs, run, killed,
and resumed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests._ranks import PRELOAD

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def script_of(page: str, folder: Path) -> Path:
    """The last python block of a page, as a file."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL
    )
    path = folder / "train.py"
    path.write_text(blocks[-1])
    return path


class Launcher:
    """Starts ranks as torchrun does, with its variables, from one process that has imported
    `modules` before.

    Importing takes ten times as long as the scripts themselves. The process is forked from the
    server of the ranks, so torch is there. torchrun itself is run by tests/test_train.py.
    """

    def __init__(self, *modules: str, **environment: str) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._jobs, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, modules, environment))
        self._process.start()
        other.close()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self._jobs.close()
        self._process.join()

    def start(
        self, script: Path, run: Path, *arguments: str, ranks: int = 2, **environment: str
    ) -> Job:
        """The script finds the folder of its run in RUN, and as what it is given in `arguments`."""
        run.mkdir(parents=True, exist_ok=True)
        log = run.parent / f"{run.name}.log"
        job = {"script": str(script), "arguments": arguments, "ranks": ranks, "log": str(log)}
        job["environment"] = {"RUN": str(run)} | environment
        self._jobs.send(job)
        return Job(self._jobs.recv(), log)


class Job:
    """The ranks of one run of a script."""

    def __init__(self, pids: list[int], log: Path) -> None:
        self._pids, self.log = pids, log

    def wait(self, made: Path, timeout: float = 150.0) -> str:
        """What it printed, once it has ended; raises with that if it did not come to make `made`.

        NOTE: by what it made, not by its exit code: gloo aborts now and then at the exit, after
        everything is done.
        """
        deadline = time.monotonic() + timeout
        while self._alive and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        text = self.log.read_text()
        assert made.exists(), text[-6000:]
        return text

    def kill_when(self, there: Path, timeout: float = 150.0) -> None:
        """SIGKILL to every process of the job, a moment after the path exists."""
        deadline = time.monotonic() + timeout
        while not there.exists() and self._alive and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self._alive, f"the job ended before it was killed:\n{self.log.read_text()[-6000:]}"
        self.kill()

    def kill(self) -> None:
        # NOTE: the ranks are one process group, with the workers of their data loaders.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pids[0], signal.SIGKILL)
        while self._alive:
            time.sleep(0.01)

    @property
    def _alive(self) -> list[int]:
        return [pid for pid in self._pids if Path(f"/proc/{pid}").exists()]


def serve(jobs: Connection, modules: tuple[str, ...], environment: dict[str, str]) -> None:
    """The process of a `Launcher`: forks the ranks of each job, and sends their ids.

    A forked rank returns when it is done.
    """
    for key in list(os.environ):
        if key.startswith(("PYTEST", "ACCELERATE_")):
            del os.environ[key]
    os.environ |= QUIET | {"PYTHONPATH": str(ROOT)} | environment
    torch.set_num_threads(1)
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ended ones vanish by themselves
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids: list[int] = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                _rank(job, rank, pids[0] if pids else 0, port)
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        jobs.send(pids)


def _rank(job: dict[str, Any], rank: int, leader: int, port: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(PermissionError):
        os.setpgid(0, leader)
    with open(job["log"], "ab") as log, open(os.devnull) as nothing:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.dup2(nothing.fileno(), 0)
    places = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": job["ranks"],
        "LOCAL_WORLD_SIZE": job["ranks"],
    }
    places |= {
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    os.environ |= {key: str(value) for key, value in places.items()} | job["environment"]
    script = Path(job["script"])
    sys.argv = [str(script), *job["arguments"]]
    sys.path.insert(0, str(script.parent))
    os.chdir(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            _fall(end)
    except BaseException as error:
        _fall(error)
    atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def _fall(error: BaseException) -> None:
    """Like torchrun: a rank that fails takes the others with it."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def same_files(a: Path, b: Path, pattern: str) -> list[str]:
    """The names that match in `a`; asserts that `b` has the same with the same bytes."""
    names = sorted(str(path.relative_to(a)) for path in a.glob(pattern))
    assert names, f"{a} has no {pattern}"
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name} differs"
    return names
