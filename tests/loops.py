"""What the tests of scripts share: a launcher of ranks, and the scripts of the docs, run, killed,
and resumed.

    python -m tests.loops torch sklearn.datasets

is what a `Launcher` starts. It imports the modules, then forks for each line of stdin.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

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

    Importing takes ten times as long as the scripts themselves. torchrun itself is run by
    tests/test_train.py.
    """

    def __init__(self, *modules: str, **environment: str) -> None:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTEST", "ACCELERATE_"))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.loops", *modules],
            env=clean | QUIET | {"PYTHONPATH": str(ROOT)} | environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.communicate()

    def start(
        self, script: Path, run: Path, *arguments: str, ranks: int = 2, **environment: str
    ) -> Job:
        """The script finds the folder of its run in RUN, and as what it is given in `arguments`."""
        run.mkdir(parents=True, exist_ok=True)
        log = run.parent / f"{run.name}.log"
        job = {"script": str(script), "arguments": arguments, "ranks": ranks, "log": str(log)}
        job["environment"] = {"RUN": str(run)} | environment
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Job(json.loads(self._process.stdout.readline()), log)


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


def serve(modules: list[str]) -> None:
    """What a `Launcher` starts: forks the ranks of each job that stdin names.

    A forked rank returns when it is done.
    """
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ended ones vanish by themselves
    for line in sys.stdin:
        job = json.loads(line)
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
        print(json.dumps(pids), flush=True)


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
    sys.argv, sys.path[0] = [str(script), *job["arguments"]], str(script.parent)
    os.chdir(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if not end.code:
            raise
        _fall(end)
    except BaseException as error:
        _fall(error)


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


if __name__ == "__main__":
    serve(sys.argv[1:])
