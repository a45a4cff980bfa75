"""`dist-ema board`: one page, offline, in which nothing that others wrote is markup."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_ema import EMA
from dist_ema.cli import main
from dist_ema.service.follow import open_version
from dist_ema.service.page import build

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []
        self.best: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.best += [tag for pair in attributes if pair == ("class", "best")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with evaluations, rows of the training, a lease, and hostile texts."""
    folder = tmp_path_factory.mktemp("run") / "published"
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    handle = ema.publish(folder, every=1)
    rows = []
    for step in range(1, 4):
        handle.metrics = {"loss": 1.0 / step, HOSTILE: HOSTILE}
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        handle.wait()
        row = {"step": step, "averaging": {"distance": 0.1 * step, "decay": 0.9}}
        rows.append(json.dumps(row | {"live": {"loss": step}, "ema": {"loss": 2}}))
    handle.remove(stop=True)
    (folder.parent / "metrics.jsonl").write_text("\n".join([*rows, '{"half', "[1]"]))
    name = json.dumps(json.dumps({"loss": 0.5, HOSTILE: 1}))
    command = f"{sys.executable} -c 'print({name})'"
    assert main(["watch", str(folder), "--exec", command, "--metric", "loss"]) == 0
    return folder


def test_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What there is: versions, curves, evaluations with the best, leases. Nothing is markup."""
    version = open_version(folder / "version-000002")
    assert version is not None
    capsys.readouterr()
    assert main(["board", str(folder)]) == 0
    where = Path(capsys.readouterr().out.strip())
    assert where == folder.parent / "board.html"
    text = where.read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert "onerror" not in page.attributes
    assert "http:" not in text
    assert "https:" not in text
    assert page.texts.count(HOSTILE) >= 4, "as a name and as a value"
    for wanted in ("version-000001", "averaging.distance", "0.333333", "exec"):
        assert wanted in page.texts
    assert page.tags.count("svg") == 5, "two evaluations; distance, decay and loss of the training"
    assert page.best == ["tr", "tr"], "the version, and its evaluation"
    lease = version.path.name
    assert page.texts.count(lease) == 2, "among the versions and among the leases"
    version.release()
    assert main(["board", str(folder / "nothing")]) == 2
    for option in ("--metrics", "--ledger"):
        assert main(["board", str(folder), option, "nothing"]) == 2, "it was asked for by name"
        assert main(["board", str(folder), option, ""]) == 2, "a variable of the shell without text"
        assert ". is no file" in capsys.readouterr().err
    assert main(["board", str(folder), "--out", "/dev/full"]) == 1
    assert "/dev/full: No space left on device" in capsys.readouterr().err


def test_serving(folder: Path) -> None:
    """Built anew for each request, on this machine alone."""
    command = [sys.executable, "-m", "dist_ema", "board", str(folder), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address) as answer:
                assert "version-000003" in answer.read().decode()
            folder.rename(folder.parent / "moved")
            with pytest.raises(urllib.error.HTTPError, match="503") as refused:
                urllib.request.urlopen(address)
            assert "there is no folder" in refused.value.read().decode()
            (folder.parent / "moved").rename(folder)
        finally:
            server.kill()


def test_odd_files(tmp_path: Path) -> None:
    """A version that was edited is left out, and what no text or number is stops no page."""
    folder = tmp_path / "published"
    ema = EMA(nn.Linear(3, 2), 0.9)
    handle = ema.publish(folder, every=1)
    for _ in range(2):
        ema.update()
        handle.wait()
    saved = folder / "version-000001" / "ema.json"
    text = saved.read_text()
    assert text.count('"metrics": {}') == 1
    saved.write_text(text.replace('"metrics": {}', '"metrics": [1]'))
    rows = ['{"averaging": {"decay": 1%s}}' % ("0" * 400), "[" * 100_000, '{"x.decay": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (folder / "ledger.sqlite").touch()  # as a watcher leaves it for a moment
    page = Page(build(folder))
    assert "version-000002" in page.texts
    assert "version-000001" not in page.texts
    assert page.tags.count("svg") == 1
    saved.write_text(text)
    (folder / "ledger.sqlite").unlink()
    command = """printf '{"\\\\ud800": 1}'"""
    assert main(["watch", str(folder), "--exec", command, "--timeout", "0"]) == 0
    assert "\\ud800" in build(folder).encode().decode()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_in_a_browser(folder: Path) -> None:
    """Chromium draws it: the curves have a place on the page, and no script of others ran."""
    page = folder.parent / "board.html"
    assert main(["board", str(folder), "--out", str(page)]) == 0
    picture = folder.parent / "board.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, capture_output=True, check=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
