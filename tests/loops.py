"""What the tests of integrations share: the scripts of the docs, run as a user runs them, killed, and resumed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script_of(page: str, folder: Path) -> Path:
    """The last python block of a page, as a file."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    path = folder / "train.py"
    path.write_text(blocks[-1])
    return path


class Job:
    """torchrun with 2 processes on the CPU, in a process group of its own."""

    def __init__(self, script: Path, run: Path, **environment: str) -> None:
        self.log = run.parent / f"{run.name}.log"
        run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        variables = {"RUN": str(run), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
        variables |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(self.log, "a") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | variables | environment,
                cwd=script.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, made: Path, timeout: float = 150.0) -> str:
        """What it printed, once it has ended; raises with that if it did not come to make `made`.

        NOTE: by what it made, not by its exit code: gloo aborts now and then at the exit, after everything is done.
        """
        try:
            self._process.wait(timeout)
        finally:
            self.kill()
        text = self.log.read_text()
        assert made.exists(), text[-6000:]
        return text

    def kill_when(self, there: Path, timeout: float = 150.0) -> None:
        """SIGKILL to every process of the job, a moment after the path exists."""
        deadline = time.monotonic() + timeout
        while not there.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self._process.poll() is None, f"the job ended before it was killed:\n{self.log.read_text()[-6000:]}"
        self.kill()

    def kill(self) -> None:
        # NOTE: torchrun starts the ranks in sessions of their own, so they are found by their parent.
        for pid in [*_children(self._process.pid), self._process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def same_files(a: Path, b: Path, pattern: str) -> list[str]:
    """The names that match in `a`; asserts that `b` has the same with the same bytes."""
    names = sorted(str(path.relative_to(a)) for path in a.glob(pattern))
    assert names, f"{a} has no {pattern}"
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name} differs"
    return names
