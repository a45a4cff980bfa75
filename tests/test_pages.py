"""Pages of the docs: their python blocks run, and their commands print what the pages show."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_ema import EMA, Power
from tests.conftest import Call

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("name", ["schedules.md"])
def test_it_runs(name: str) -> None:
    """What a page asserts is true."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": "page"})


def sessions(verb: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each command after `dist-ema` on the pages, and the lines that it prints."""
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"^```\n(\$ .*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for part in re.split(r"^\$ dist-ema ", block, flags=re.MULTILINE)[1:]:
                line, *printed = part.rstrip().split("\n")
                if line.split()[0] == verb:
                    yield shlex.split(line), printed


def test_plans(call: Call) -> None:
    """`dist-ema plan` prints the lines of the page; `...` stands for any number of lines."""
    found = list(sessions("plan"))
    assert len(found) == 2
    for words, wanted in found:
        code, out, _ = call(*words)
        lines = iter(out.rstrip().split("\n"))
        assert code == 0
        for line, before in zip(wanted, [None, *wanted], strict=False):
            if line != "...":
                passed = lines if before == "..." else itertools.islice(lines, 1)
                assert line in passed, line


def test_tables(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the other verbs have the columns that the pages show."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    ema = EMA(model, [Power(sigma_rel=0.05), Power(sigma_rel=0.1)])
    for step in range(1, 41):
        with torch.no_grad():
            model.weight += 1
        ema.update()
        ema.snapshot("snapshots", every=4)
        if step % 20 == 0:
            ema.save(f"ema-{step}")
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": ema.gather()}, "last.pth.tar")
    for words in (
        ["inspect", "ema-40"],
        ["diff", "ema-20", "ema-40"],
        ["convert", "last.pth.tar", "--list"],
        ["reconstruct", "snapshots", "--sigma-rel", "0.07"],
    ):
        shown = [line.split() for _, printed in sessions(words[0]) for line in printed]
        out = call(*words)[1]
        head, *_ = re.findall(r"^(?:weight  .*|key  .*|target  .*)$", out, re.MULTILINE)
        assert head.split() in shown, words
