"""The fuzzer: a short run of it, and proof that it notices what it looks for.

The long run is `python -m tests.fuzz --files 1000`. A failure names form, seed and number of the
case; `--forms FORM --seed N` makes it again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTICES = """
import json, os, sys, time
from pathlib import Path
from tests.fuzz import sandbox as fuzz

fuzz.SECONDS = 3
folder = Path(sys.argv[1])
(inside := folder / "to").mkdir()


def raises():
    raise KeyError("x")


actions = {
    "fine": lambda: (inside / "x").write_text("x") and 0,
    "writes": lambda: (folder / "x").write_text("x") and 0,
    "makes a folder": lambda: (folder / "y").mkdir() or 0,
    "removes": lambda: os.remove("/nowhere") or 0,
    "renames": lambda: os.replace(inside / "x", folder / "z") or 0,
    "starts": lambda: os.system("true"),
    "raises": raises,
    "memory": lambda: len(bytearray(600 << 20)) and 0,
    "time": lambda: time.sleep(99) or 0,
}
print(json.dumps({name: fuzz.run(action, folder, inside) for name, action in actions.items()}))
"""


def run(*line: str) -> str:
    """What a script of this project prints. NOTE: this process has torch, and threads."""
    done = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_it_notices(tmp_path: Path) -> None:
    """Each kind of misbehaviour is reported, and nothing else is."""
    found = json.loads(run("-c", NOTICES, str(tmp_path)))
    assert found.pop("fine") == [0, "", ""]
    for name, event in (
        ("writes", "open: "), ("makes a folder", "os.mkdir: "), ("removes", "os.remove: "),
        ("renames", "os.rename: "), ("starts", "os.system"),
    ):  # fmt: skip
        assert found.pop(name)[2].startswith(event), name
    assert found.pop("time")[0] == -9
    assert "MemoryError" in found.pop("memory")[1]
    code, err, _ = found.pop("raises")
    assert (code, "Traceback" in err) == (99, True)
    assert found == {}


@pytest.mark.slow
def test_a_short_run() -> None:
    """Every verb on damaged files of every form: see tests/fuzz/__main__.py for what is
    asserted.
    """
    output = run("-W", "ignore", "-m", "tests.fuzz", "--files", "14", "--seed", "7")
    assert re.search(r"1\d files, 1\d\d runs, 0 failures\n$", output), output


def test_security_names_tests() -> None:
    """Every test in the table of SECURITY.md exists."""
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if "::" in line]
    count = 0
    for row in rows:
        file = ""
        for found, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row):
            file = found or file
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
            count += 1
    assert count > 15
