"""No version is lost to a failing disk, a kill or a power loss: a short `python -m tests.faults`.

How to read a failure: each line names the verb, the kind of finding, the fault, and the operation
by its number and name. `python -m tests.faults --only VERB -v --all` finds all of one verb.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import shim
from .__main__ import PEERS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(bool(shim.why_not()), reason=shim.why_not() or "has a compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim.build(tmp_path_factory.mktemp("shim"))


def walked(library: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.faults", "--json", "--peers"]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.slow
@pytest.mark.multirank
def test_nothing_is_lost(library: Path) -> None:
    """Of every verb the old or the new version stands, and errors name a path; peers lose both."""
    found = {each["case"]: each for each in walked(library)}
    assert len(found) > 20
    assert all(found[name]["lost"] for name in PEERS), "the harness sees a loss where there is one"
    seen, texts = {}, []
    for name in found.keys() - set(PEERS):
        kinds = {finding["kind"] for finding in found[name]["findings"]}
        kinds |= {"power"} if found[name]["lost"] else set()
        if kinds:
            seen[name] = kinds
        texts += [
            f"{name}: {finding}" for finding in [*found[name]["findings"], *found[name]["lost"]]
        ]
    assert seen == {}, "\n".join(texts)


def shell(library: Path, folder: Path, script: str, **variables: str) -> tuple[int, list[str]]:
    """Exit code of a script under the shim, and the operations that it recorded."""
    folder.mkdir()
    log = folder.parent / "log"
    environment = {"LD_PRELOAD": str(library), "FAULTS_FOLDER": str(folder), "FAULTS_LOG": str(log)}
    code = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=environment | variables,
        cwd=folder,
        stderr=subprocess.DEVNULL,
    ).returncode
    operations = shim.read_log(log)
    return code, [f"{each.name} {Path(each.path).name}" for each in operations]


SCRIPT = """
import os
with open("a", "wb", buffering=0) as file:
    file.write(b"one")
    os.pwrite(file.fileno(), b"two", 3)
    os.pwritev(file.fileno(), [b"th", b"ree"], 6)
    os.posix_fallocate(file.fileno(), 0, 20)
    os.ftruncate(file.fileno(), 11)
    os.fsync(file.fileno())
os.rename("a", "b")
os.link("b", "c")
os.mkdir("d")
os.rmdir("d")
folder = os.open(".", os.O_RDONLY)
os.unlink("c", dir_fd=folder)
os.replace("b", "e", src_dir_fd=folder, dst_dir_fd=folder)
"""
OPERATIONS = [
    *["open a", "write a", "write a", "write a", "fallocate a", "truncate a", "fsync a"],
    *["rename a", "link b", "mkdir d", "rmdir d", "unlink c", "rename b"],
]


def test_shim(library: Path, tmp_path: Path) -> None:
    """Every operation is counted once, by whatever call, and fails when it is its turn."""
    assert shell(library, tmp_path / "0", SCRIPT) == (0, OPERATIONS)
    assert (tmp_path / "0" / "e").read_bytes() == b"onetwothree"
    for at in range(1, len(OPERATIONS) + 1):
        fault = {"FAULTS_AT": str(at), "FAULTS_ERROR": str(errno.EIO)}
        assert shell(library, tmp_path / str(at), SCRIPT, **fault) == (1, OPERATIONS[:at])
    killed = shell(library, tmp_path / "killed", SCRIPT, FAULTS_AT="8", FAULTS_ERROR="-1")
    assert killed == (-signal.SIGKILL, OPERATIONS[:7])
    short = shell(library, tmp_path / "short", SCRIPT, FAULTS_AT="3", FAULTS_ERROR="-2")
    assert short == (0, OPERATIONS)
    assert (tmp_path / "short" / "e").read_bytes() == b"onet\0\0three"
