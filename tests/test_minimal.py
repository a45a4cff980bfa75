"""launch/minimal_fsdp2.py: short, and it does what it says on two ranks with torchrun's variables.

A rank is judged by what it printed and wrote: gloo processes now and then abort at interpreter
exit.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dist_ema import load_file

from .loops import Launcher

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "minimal_fsdp2.py"


def test_it_is_short() -> None:
    """A newcomer reads it on one screen."""
    assert len(SCRIPT.read_text().splitlines()) <= 40


def test_two_ranks(tmp_path: Path) -> None:
    """Both ranks report a better average than live weights, and the exported file is complete."""
    shutil.copy(SCRIPT, tmp_path)
    made = tmp_path / "runs" / "minimal" / "model.safetensors"
    with Launcher() as launcher:
        log = launcher.start(tmp_path / SCRIPT.name, tmp_path / "log").wait(made)
    errors = re.findall(
        r"rank (\d): error of the live weights ([\d.]+), of the average ([\d.]+)", log
    )
    assert sorted(rank for rank, _, _ in errors) == ["0", "1"], log
    assert all(float(average) < float(live) for _, live, average in errors)
    shipped = load_file(made)
    resumable = load_file(tmp_path / "runs" / "minimal" / "ema-000300")
    shapes = {name: tuple(weight.shape) for name, weight in shipped.items()}
    assert shapes == {"0.weight": (32, 8), "0.bias": (32,), "2.weight": (1, 32), "2.bias": (1,)}
    assert all(resumable[name].equal(weight) for name, weight in shipped.items())
