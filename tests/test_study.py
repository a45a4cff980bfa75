"""launch/study.py: killed and resumed it leaves the same files, and its page says what the numbers
say.

How to read a failure: a study that fails prints the traceback of the cell; `study` raises with all
that it printed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRON = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
ENVIRON |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="workers are found in Linux's /proc"
)


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The modules of launch/studies by name."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    return lambda name: importlib.import_module(f"studies.{name}")


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "study.py"), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRON, cwd=ROOT, start_new_session=True, **pipes)


def study(*words: str, code: int = 0) -> str:
    process = start(*words)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == code, said
    return said


def wait_for(there: Path, process: subprocess.Popen[str]) -> None:
    """Returns once the path exists; fails if the study ends before, or never comes to it."""
    deadline = time.monotonic() + 120
    while not there.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{there} did not appear"
        time.sleep(0.01)


def kill_when(there: Path, *words: str, worker: bool = False) -> tuple[int, str]:
    """SIGKILL to the main process alone, or to one of its workers alone, once the path exists; the
    others must end by themselves. Returns the exit code and what was printed.
    """
    process = start(*words)
    wait_for(there, process)
    os.kill(worker_of(process.pid) if worker else process.pid, signal.SIGKILL)
    said, _ = process.communicate(
        timeout=60
    )  # its output is closed when the last process of the study has ended
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def interrupt_when(there: Path, *words: str) -> tuple[int, str]:
    """Ctrl-C, which reaches all processes of the terminal, once the path exists.

    The exit code and what was printed.
    """
    process = start(*words)
    wait_for(there, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def worker_of(main: int) -> int:
    """A grandchild: workers are forked by a server, which the main process started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return next(pid for pid, parent in parents.items() if parents.get(parent) == main)


def files(out: Path) -> dict[str, str]:
    """Every result but for its seconds; the page; the names of the plots."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".json" and path.name != "study.json":
            found[path.name] = "\n".join(
                line for line in path.read_text().split("\n") if '"seconds"' not in line
            )
        elif path.is_file() and path.suffix != ".json":
            found[path.name] = (
                path.read_text().split("## How to repeat it")[0] if path.suffix == ".md" else ""
            )
    return found


# --- the whole of it ------------------------------------------------------------------------------


@needs_proc
def test_killed_and_resumed(tmp_path: Path) -> None:
    """Every experiment through the real code.

    A rank of the language model killed, the main process killed in the table, and resumed each
    time, the study leaves what an undisturbed one leaves. Guards the order of saving in
    language.keep, the rename of a cell's file, the workers' watch on their parent, and the choice
    among snapshots, of which a kill may leave an unfinished one.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    study("--smoke", "--out", str(whole))
    results, words = broken / "results", ("--smoke", "--out", str(broken))
    code, said = kill_when(results / ".scratch" / "language-0" / "step-000006", *words, worker=True)
    assert (code, "study.py: language-0: the ranks ended with codes" in said) == (1, True), said
    assert not (results / "language-0.json").exists()
    # Whether the kill leaves this depends on its moment, so the test puts it there.
    unfinished = ".0000000009.tmp-0123456789abcdef0123456789abcdef"
    (results / ".scratch" / "language-0" / "snapshots" / unfinished).mkdir()
    code, said = interrupt_when(results / "table-0-0.json", *words)
    assert (code, said.splitlines()[-1][:22]) == (130, "study.py: interrupted;"), said
    assert "Traceback" not in said
    assert not (results / "equivalence-1.json").exists(), "the last cell was begun after Ctrl-C"
    kill_when(results / "table-20-0.json", *words)
    assert not (results / "equivalence-1.json").exists()
    before = (results / "table-20-0.json").stat().st_mtime_ns
    said = study(*words)
    assert (results / "table-20-0.json").stat().st_mtime_ns == before, (
        "what was there was done again"
    )
    assert "21 of 21" not in said
    assert files(broken) == files(whole)
    assert {
        path.name for path in results.iterdir() if path.suffix not in (".json", ".png")
    } == set()
    assert "0 of 12 runs to do" in study("--smoke", "--only", "table", "--out", str(whole))
    assert f"{whole / 'results'} holds results of a smoke study" in study(
        "--quick", "--out", str(whole), code=2
    )


def test_a_failing_cell_ends_the_study(
    studies: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell is named, and what had not begun is not begun."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as `run` sets it
    work, sizes = studies("work"), studies("sizes")
    cells = [sizes.Cell("table", "wrong", 0, 1), *sizes.cells(sizes.SMOKE, "table")]
    with pytest.raises(work.StudyError, match="table-wrong-0: ValueError: invalid literal"):
        work.run(cells, sizes.SMOKE, tmp_path, 1)
    assert (
        len(list(tmp_path.glob("*.json"))) <= 1
    )  # the next one may have been quicker than the news
    assert multiprocessing.active_children() == []


def test_refusals(tmp_path: Path) -> None:
    assert "--page: there are no results in" in study("--page", "--out", str(tmp_path), code=2)
    assert "must be a whole number of 1 or more, got '0'" in study("--workers", "0", code=2)
    file = tmp_path / "file"
    file.touch()
    assert f"study.py: --out {file} cannot be written: Not a directory.\n" == study(
        "--smoke", "--out", str(file), code=2
    )
    said = study("--help")
    assert all(
        word in said for word in ("language", "equivalence", "--quick", "--only", "--workers")
    )


def test_committed_page(studies: Callable[[str], Any]) -> None:
    """docs/results.md is what its files of results say, byte for byte."""
    found = studies("results").Results.read(ROOT / "docs" / "results")
    assert found.size == studies("sizes").FULL
    assert len(found.found) == len(studies("sizes").cells(found.size))
    page = (ROOT / "docs" / "results.md").read_text()
    assert studies("page").text(found) == page
    assert "Not run" not in page
    # "No difference" is said of what it is true of: the weights of a compact shadow are apart, and
    # the sentence says so.
    assert (
        "no difference to way and accuracy: 100.8% of the way, +0.0 ± 0.1 points. Its weights are "
        "14.7%" in " ".join(page.split())
    )
    plots = {word.split("(")[1].rstrip(")") for word in page.split() if word.endswith(".png)")}
    assert plots == {f"results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.png")}


# --- statistics and verdicts ----------------------------------------------------------------------


def test_estimates(studies: Callable[[str], Any]) -> None:
    """Differences are taken seed by seed; more than two standard errors, and never with one
    seed.
    """
    results = studies("results")
    here = results.paired([0.9, 0.8, 0.7], [0.8, 0.6, 0.4])
    assert here.mean == pytest.approx(0.2)
    assert here.error == pytest.approx(0.1 / math.sqrt(3))
    assert here.beyond
    assert here.points() == "+20.0 ± 5.8"
    assert not results.paired([0.9, 0.8, 0.5], [0.8, 0.6, 0.4]).mean < 0
    assert not results.Estimate(0.2, 0.1).beyond
    assert not results.Estimate(-0.9, 0.1).beyond
    assert not results.paired([0.9], [0.1]).beyond


def test_churn_and_fluctuation(studies: Callable[[str], Any]) -> None:
    results = studies("results")
    texts = (("0123", "0123"), ("0124", "0123"), ("0155", "0129"))
    cells = [{"predictions": {"a": a, "b": b}} for a, b in texts]
    assert results.churn(cells, "a") == pytest.approx((0.25 + 0.5 + 0.5) / 3)
    assert results.churn(cells, "b") == pytest.approx((0 + 0.25 + 0.25) / 3)
    # Without one seed after the other each pair of seeds is left, and b is calmer by 0.25 in all of
    # them: without an error, although the churn of either has one.
    here = results.calmer(cells, "b", "a")
    assert (here.mean, here.error) == (pytest.approx(0.25), pytest.approx(0))
    cells[2]["predictions"]["b"] = "0123"
    here, mean = results.calmer(cells, "b", "a"), (0.25 + 0.5 + 0.5) / 3
    assert here.mean == pytest.approx(mean)
    assert here.error == pytest.approx(
        math.sqrt(2 / 3 * (2 * (0.5 - mean) ** 2 + (0.25 - mean) ** 2))
    )
    assert math.isnan(results.calmer(cells[:2], "b", "a").error)
    rows = [
        {"epoch": i, "accuracy": {"a": value}} for i, value in enumerate((0.1, 0.9, 0.5, 0.7, 0.5))
    ]
    assert results.fluctuation({"late": 1, "rows": rows}, "a") == pytest.approx(math.sqrt(0.08))


def table_of(studies: Callable[[str], Any], better: float) -> Any:
    """A complete table in which the average is ahead of live by that much, give or take a little,
    and calmer if ahead.
    """
    size, sizes = studies("sizes").SMOKE, studies("sizes")
    found = {}
    for cell in sizes.cells(size, "table"):
        rows = []
        for epoch in (1, 2, 3):
            jump = 0.02 * (epoch == 2) * (1 + cell.seed / 10)
            live, average = (
                0.8 + jump,
                0.8 + better + 0.001 * cell.seed + (jump if better <= 0 else 0),
            )
            names = {"live/own": live, "live/recalibrated": live}
            names |= {
                f"{name}/{kind}": average
                for name in (*map(str, sizes.DECAYS), "swa")
                for kind in ("copied", "averaged")
            }
            names |= {f"{name}/recalibrated": average for name in (*map(str, sizes.DECAYS), "swa")}
            rows.append({"epoch": epoch, "accuracy": names})
        found[cell.name] = {
            "seconds": 1.0,
            "late": 0,
            "rows": rows,
            "predictions": dict.fromkeys(rows[0]["accuracy"], "0123"),
        }
    return studies("results").Results({}, size, found)


def test_verdicts_follow_the_numbers(studies: Callable[[str], Any]) -> None:
    """The same sentences with the opposite verdict for the opposite numbers; a shortfall is said
    and explained.
    """
    verdicts = studies("verdicts")
    for better, word in ((0.05, "agrees"), (-0.05, "does not agree: the opposite")):
        results = table_of(studies, better)
        said = {verdict.here: verdict.word for verdict in verdicts.of_table(results)}
        ahead = [here for here in said if here.startswith(("20 % wrong, last", "40 % wrong, last"))]
        assert len(ahead) == 4
        assert {said[here] for here in ahead} == {word}
        calmer = {said[here] for here in said if "std of the change" in here}
        assert calmer == {"agrees" if better > 0 else "does not agree: within two standard errors"}
        short = [text for text in verdicts.why(results) if "does **not** beat live" in text]
        assert len(short) == (0 if better > 0 else 3)
        assert all("accuracy and fluctuation" in text for text in short)
    assert {verdict.word for verdict in verdicts.of_table(results) if "churn" in verdict.here} == {
        "too few seeds to say"
    }


def language_of(live: float, average: float, decayed: float) -> dict[str, Any]:
    rows = [
        {
            "step": 4,
            "live": live,
            "window 10": average,
            "window 30": average + 1,
            "sigma_rel 0.15": 9.0,
        }
    ]
    return {"rows": rows, "branches": {"4": [{"step": 4, "live": decayed}]}}


def test_language_verdicts(studies: Callable[[str], Any]) -> None:
    """The share of the gap that the best window closes; no verdict in favour where there is no
    gap.
    """
    verdicts = studies("verdicts")
    for numbers, share, agrees in (
        ((2.0, 1.7, 1.6), "75% of the gap", True),
        ((2.0, 1.9, 1.6), "25% of the gap", False),
        ((2.0, 1.9, 2.1), "no gap", False),
    ):
        (verdict,) = verdicts.of_language(language_of(*numbers))
        assert share in verdict.here
        assert "window 10 " in verdict.here
        assert verdict.agrees is agrees


def test_partial_page(studies: Callable[[str], Any], tmp_path: Path) -> None:
    """One experiment alone gives a page; what is missing is said."""
    results = table_of(studies, 0.05)
    machine = {"cores": 2, "architecture": "x", "system": "y"}
    facts = {
        "size": asdict(results.size),
        "versions": {"torch": "2"},
        "machine": machine,
        "sessions": [],
    }
    page = studies("page").text(studies("results").Results(facts, results.size, results.found))
    assert page.count("Not run, or not complete.") == 5
    assert "too small to prove anything" in page
    assert max(len(line) for line in page.split("\n") if not line.startswith(("|", "!"))) <= 100


def test_results_are_read_back(studies: Callable[[str], Any], tmp_path: Path) -> None:
    """A row per line, six digits, and nothing left beside the file."""
    files = studies("files")
    value = {"rows": [{"a": 1 / 3}, {"a": 2 / 3}], "text": "x", "table": {"b": [0.1234567891]}}
    files.write(tmp_path / "new" / "a.json", files.rounded(value))
    path = tmp_path / "new" / "a.json"
    assert json.loads(path.read_text()) == {
        "rows": [{"a": 0.333333}, {"a": 0.666667}],
        "text": "x",
        "table": {"b": [0.123457]},
    }
    assert path.read_text().count("\n") == 8
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]
