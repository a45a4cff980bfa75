"""One thread per process, the command as a fixture, and the parity table at the end of a run.

A run takes samples of what has a large product of parameters or a random generator. With `--all`
it takes the whole: cases with the marker `rest`, and four times the seeds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_ema.cli import main

Call = Callable[..., tuple[int, str, str]]  # `dist-ema`: exit code, stdout, stderr
Seeds = Callable[[int], range]

torch.set_num_threads(1)  # several processes share the machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case and seed, no samples")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--all`, cases with the marker `rest` are left out."""
    if not config.getoption("--all"):
        rest = [item for item in items if item.get_closest_marker("rest")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if not item.get_closest_marker("rest")]


def pytest_collection_finish() -> None:
    """What is imported stays, so no collection has to look at it: many tests call gc.collect()."""
    gc.freeze()


@pytest.fixture(scope="session")
def seeds(pytestconfig: pytest.Config) -> Seeds:
    """The seeds of a random generator, or the first quarter of them in a sample."""
    whole = pytestconfig.getoption("--all")
    return lambda count: range(count if whole else count // 4)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`dist-ema ...` in this process: exit code, stdout, stderr."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        code: Any
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return command


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Wrappers x checks, as the workers recorded them: + holds, X does not."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    rows = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", [])
        if name == "parity"
    ]
    if not rows:
        return
    columns = list(rows[0][1])
    terminalreporter.section("parity")
    terminalreporter.write_line(" " * 22 + " | ".join(columns))
    for title, cells in sorted(rows):
        marks = " | ".join(
            ("+" if cells.get(column) else "X").center(len(column)) for column in columns
        )
        terminalreporter.write_line(f"{title:<22}{marks}")
