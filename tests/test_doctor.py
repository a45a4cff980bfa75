"""doctor: sound here, and what it says of a torch that cannot be imported, ranks that fail or hang,
and a bad folder.

How to read a failure: `fault` puts a sitecustomize.py before the child processes, so that something
really breaks in them.
"""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ema.checkpoint import atomic
from dist_ema.offline import doctor
from tests.conftest import Call


@pytest.fixture
def call(call: Call) -> Call:
    return partial(call, "doctor")


def fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, name: str = "sitecustomize.py"
) -> None:
    """Code that every child of doctor runs first."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_knows_what_is_needed() -> None:
    """The versions of pyproject.toml, of dependencies and of extras."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)\]", project, re.MULTILINE)
    assert required is not None
    assert dict(re.findall(r'"(\w+)>=([\d.]+)"', required[1])) == doctor.NEEDED
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', project))
    for name, known in doctor.KNOWN.items():
        assert not known or known == least[name], name


def test_sound(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here everything works, also inside somebody's job; nothing is left behind; every check has a
    line.
    """
    for key, value in (
        ("RANK", "3"),
        ("WORLD_SIZE", "8"),
        ("MASTER_ADDR", "nowhere"),
        ("TORCHELASTIC_RUN_ID", "x"),
    ):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    code, out, err = call(tmp_path, "--json")
    said = json.loads(out)
    checks = {check["what"]: check for check in said["checks"]}
    assert (code, err, said["sound"]) == (0, "", True)
    assert checks["torch"] == {"what": "torch", "state": "ok", "text": version("torch")}
    assert checks["self-test"]["text"] == "2 ranks over gloo: FSDP2 and DDP, average, save and load"
    assert checks["backends"]["text"].startswith("gloo")
    assert {
        "python",
        "numpy",
        "safetensors",
        "accelerator",
        "folder",
        "replacing",
        "reserving",
    } <= set(checks)
    assert list(tmp_path.iterdir()) == []
    if not torch.accelerator.is_available():
        assert "silently starts one process" in checks["accelerate"]["text"]


def test_torch_that_cannot_be_imported(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken torch is a problem with its own last words; no self-test, no traceback, code 1."""
    fault(
        tmp_path,
        monkeypatch,
        "raise ImportError('libcudart.so.99: no such file')",
        "torch/__init__.py",
    )
    code, out, err = call()
    assert (code, err) == (1, "")
    assert (
        "  PROBLEM  torch: cannot be imported: ImportError: libcudart.so.99: no such file\n" in out
    )
    assert "self-test" not in out
    assert "can work here" not in out


def test_ranks_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank, the step and the reason; or how a rank died that could not say."""
    fault(
        tmp_path,
        monkeypatch,
        "import sys\nif 'rank' in sys.orig_argv: sys.modules['torch'] = None\n",
    )
    check = doctor.self_test(60)
    assert check.state == "problem"
    for i in range(2):
        assert (
            f"rank {i} at 'import torch and dist_ema': ModuleNotFoundError: import of torch halted"
            in check.text
        )
    fault(tmp_path, monkeypatch, "import sys, os\nif 'rank' in sys.orig_argv: os._exit(7)\n")
    check = doctor.self_test(60)
    assert check.text == "; ".join(
        f"rank {i} at 'start Python': died with exit code 7" for i in range(2)
    )
    # One that would wait for ever for the other: without the grace in doctor._wait this takes ten
    # minutes.
    one = "os._exit(7) if sys.orig_argv[-3] == '1' else time.sleep(600)"
    one = f"import sys, os, time\nif sys.orig_argv[-2:-1] == ['2']: {one}\n"
    fault(tmp_path, monkeypatch, one)
    assert doctor.self_test(600).text == "rank 1 at 'start Python': died with exit code 7"


def test_rank_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never starts, within the timeout: it is named, and so is whoever waits for it; both
    are ended.
    """
    fault(
        tmp_path,
        monkeypatch,
        "import sys, time\nif sys.orig_argv[-3:-1] == ['1', '2']: time.sleep(60)\n",
    )
    check = doctor.self_test(3)
    assert check.state == "problem"
    assert "rank 1 was still at 'start Python' after 3 s" in check.text


def test_folder(call: Call, tmp_path: Path) -> None:
    """A folder that cannot be written is a problem, one that is none is wrong usage; the file
    system is tried out.
    """
    code, out, _ = call("/proc", "--no-self-test")
    assert code == 1
    assert "PROBLEM  folder: /proc cannot be written to" in out
    assert call(tmp_path / "nothing")[0] == 2
    for path in (a := tmp_path / "a", b := tmp_path / "b"):
        path.write_text(path.name)
    can = atomic.exchange(a, b)
    assert (a.read_text() == "b") == can
    assert atomic.exchanges(tmp_path) == can
    checks = {check.what: check for check in doctor.check_folder(tmp_path)}
    assert checks["replacing"].state == ("ok" if can else "note")
    assert "free" in checks["folder"].text


def test_versions() -> None:
    """What is too old or missing is a problem where it is needed, a note elsewhere; local parts of
    versions do not count.
    """
    assert doctor.check_package("torch", "99.1", True).state == "problem"
    assert doctor.check_package("pytest", "99.1", False).state == "note"
    assert doctor.check_package("pytest", "1", False).state == "ok"
    missing = doctor.check_package("no-such-package", "1.2", True)
    assert missing.text == "is not installed: pip install 'no-such-package>=1.2'"
    assert doctor.version_numbers("2.13.0+cu128") == (2, 13, 0)
    assert doctor.version_numbers("2.8.0a0+git1234") < doctor.version_numbers("2.10")


@pytest.mark.parametrize(
    ("kind", "set_", "warned"),
    [
        (None, "", True),
        (None, "0", True),
        (None, "1", False),
        (None, "true", False),
        ("cuda", "", False),
    ],
)
def test_launch(kind: str | None, set_: str, warned: bool) -> None:
    """The trap of accelerate on machines without a GPU is told where it can snap."""
    said = list(doctor.check_launch({"accelerator": kind}, {"ACCELERATE_USE_CPU": set_}))
    assert [check.state for check in said] == ["note"] * warned


@pytest.mark.parametrize(
    ("facts", "what", "state"),
    [
        (
            {"accelerator": "cuda", "devices": ["H"] * 8, "cuda": "12.8", "nccl": True},
            "accelerator",
            "ok",
        ),
        ({"accelerator": None, "cuda": "12.8", "nccl": True}, "accelerator", "note"),
        (
            {"accelerator": "cuda", "devices": ["H"], "cuda": "12.8", "nccl": False},
            "backends",
            "note",
        ),
        ({"accelerator": None, "gloo": False}, "backends", "problem"),
    ],
)
def test_torch_facts(facts: dict[str, Any], what: str, state: str) -> None:
    """Drivers and backends that are missing."""
    known = {"devices": [], "cuda": None, "hip": None, "gloo": True, "nccl": False} | facts
    assert {check.what: check.state for check in doctor.check_torch(known)}[what] == state


def test_help(call: Call) -> None:
    """--help teaches; a timeout must be a time."""
    assert "dist-ema doctor /mnt/checkpoints" in call("--help")[1]
    for wrong in ("soon", "-1", "nan"):
        code, _, err = call("--timeout", wrong)
        assert code == 2
        assert f"must be a number of seconds, got {wrong!r}" in err
