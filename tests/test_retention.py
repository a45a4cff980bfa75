"""Saves side by side: what `keep=` removes, and above all what it never does; and the file that
names the newest.

How to read a failure: `names` are the entries of the run's folder, hidden ones too.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.checkpoint import disk, pointers
from dist_ema.offline.report import report_on
from dist_ema.offline.sources import open_model

HEX = "0123456789abcdef" * 2


@pytest.fixture
def ema() -> EMA:
    return EMA(nn.Linear(3, 2), 0.5)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- what goes ------------------------------------------------------------------------------------


def test_the_last_few_are_kept(ema: EMA, tmp_path: Path) -> None:
    """The highest numbers, compared as numbers: 9 comes before 10, and 0008 is 8."""
    for name in ("ema-7", "ema-0008", "ema-9", "ema-10"):
        ema.save(tmp_path / name, keep=2)
        assert (tmp_path / "latest").read_text() == f"{name}\n"
        ema.update()
    assert names(tmp_path) == ["ema-10", "ema-9", "latest"]
    ema.save(tmp_path / "ema-11", keep=1)
    assert names(tmp_path) == ["ema-11", "latest"]
    ema.save(tmp_path / "ema-11", keep=1)
    assert names(tmp_path) == ["ema-11", "latest"], "the same again"
    ema.save(tmp_path / "ema-12")
    assert names(tmp_path) == ["ema-11", "ema-12", "latest"]
    assert (tmp_path / "latest").read_text() == "ema-11\n", "without keep= neither is touched"


def test_several_averages_go_as_one(tmp_path: Path) -> None:
    """A save of several averages in several files is all ours, and goes as a whole."""
    ema = EMA(nn.Linear(30, 20), [0.5, 0.9])
    for number in range(3):
        ema.save(tmp_path / str(number), keep=1, max_shard_size=100)
    assert names(tmp_path) == ["2", "latest"]


def test_a_rewound_run(ema: EMA, tmp_path: Path) -> None:
    """Numbers beyond the new one stay, and count for nothing; the new one is never removed."""
    for number in (1, 2, 3, 4, 5):
        ema.save(tmp_path / f"ema-{number}")
    ema.save(tmp_path / "ema-2", keep=1)
    assert names(tmp_path) == ["ema-2", "ema-3", "ema-4", "ema-5", "latest"]
    assert (tmp_path / "latest").read_text() == "ema-2\n"
    ema.save(tmp_path / "ema-02", keep=1)
    assert "ema-02" in names(tmp_path)
    assert "ema-2" not in names(tmp_path), "the same number, another name"


def test_what_is_not_ours_stays(ema: EMA, tmp_path: Path) -> None:
    """Only complete averages under the same stem and a number.

    Each of these guards a condition in series.advance.
    """
    run = tmp_path / "run"
    for name in (
        "ema-1",
        "ema-2",
        "ema-4",
        "ema-5",
        "ema-7",
        "xema-1",
        "ema-1x",
        "ema-",
        "ema_1",
        "ema-1-1",
        "ema-\u0663",
    ):
        ema.save(run / name)
    ema.save(tmp_path / "elsewhere")
    (run / "ema-3").symlink_to(tmp_path / "elsewhere")
    (run / "ema-2" / "ema.json").unlink()  # no average
    (run / "ema-4" / "model.safetensors").write_bytes(b"cut")  # not complete
    meta = json.loads((run / "ema-5" / "ema.json").read_text())
    (run / "ema-5" / "ema.json").write_text(
        json.dumps(meta | {"versions": {"other": "1"}})
    )  # not written by us
    (run / "ema-6").write_text("a file")
    ema.save(run / "ema-06")
    os.replace(run / "ema-06" / "model.safetensors", tmp_path / "model")
    (run / "ema-06" / "model.safetensors").symlink_to(tmp_path / "model")
    ema.export(run / "ema-8")
    for name in ("ema-10", "xema-1", "ema-", "ema-7x"):  # a save of those may be under way
        shutil.copytree(run / "ema-7", run / f".{name}.tmp-{HEX}")
    (run / "ema-0").mkdir()
    (run / "ema-0" / "ema.json").write_text(json.dumps(meta | {"files": {}}))
    before = names(run)
    ema.save(run / "ema-9", keep=1)
    assert sorted({*before, "ema-9", "latest"} - {"ema-1", "ema-7"}) == names(run)
    assert load_file(tmp_path / "elsewhere")


def test_folders_with_something_else_in_them_stay(ema: EMA, tmp_path: Path) -> None:
    """A note, a link, a file in a folder of its own: the save is kept, and it is said why."""
    for number, name in enumerate(("notes.txt", "averages/0-X/config.json", "link")):
        folder = tmp_path / str(number)
        ema.save(folder / "ema-1")
        (folder / "ema-1" / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "link":
            (folder / "ema-1" / name).symlink_to(tmp_path)
        else:
            (folder / "ema-1" / name).write_text("mine")
        with pytest.warns(UserWarning, match=f"it holds {name}, which"):
            ema.save(folder / "ema-2", keep=1)
        assert names(folder) == ["ema-1", "ema-2", "latest"]


def test_an_error_while_removing_is_a_warning(ema: EMA, tmp_path: Path) -> None:
    """Here a name so long that its hidden twin cannot be made; the new save stands."""
    long = "ema-" + "0" * 220 + "1"
    ema.save(tmp_path / "ema-1")
    (tmp_path / "ema-1").rename(tmp_path / long)
    with pytest.warns(UserWarning, match="could not be removed: .*File name too long"):
        ema.save(tmp_path / "ema-2", keep=1)
    assert names(tmp_path) == [long, "ema-2", "latest"]
    ema.save(tmp_path / "ema-3", keep=1, wait=False)
    with pytest.warns(UserWarning, match="could not be removed: .*File name too long"):
        ema.save(tmp_path / "other")
    assert names(tmp_path) == [long, "ema-3", "latest", "other"]


def test_half_removed_folders_go(ema: EMA, tmp_path: Path) -> None:
    """What a killed removal or save left, of this stem and no other; and a pointer that was not put
    in place. A save that was killed between two renames is finished.
    """
    (tmp_path / f".latest.tmp-{HEX}").write_text("ema-1\n")
    for name in ("ema-1", "ema-3", "teacher-1"):
        (tmp_path / f".{name}.gone-{HEX}").mkdir()
        (tmp_path / f".{name}.tmp-{HEX}").mkdir()
    for kind in ("old", "tmp"):
        ema.save(tmp_path / f".ema-0.{kind}-{HEX}")
    ema.save(tmp_path / "ema-2", keep=5)
    others = [
        f".{name}.{kind}-{HEX}" for name in ("ema-3", "teacher-1") for kind in ("gone", "tmp")
    ]
    assert names(tmp_path) == [*others, "ema-0", "ema-2", "latest"]


def test_a_removal_is_durable_before_files_go(
    ema: EMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power lost in between would leave a save under its name without some of its files."""
    calls: list[str] = []

    def note(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(f"{name} {' '.join(map(str, args))}")
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    ema.save(tmp_path / "ema-1", keep=1)
    for module, name in ((os, "rename"), (shutil, "rmtree"), (disk, "sync")):
        note(module, name)
    ema.save(tmp_path / "ema-2", keep=1)
    retired = [i for i, call in enumerate(calls) if "gone" in call]
    assert [calls[i].split()[0] for i in retired] == ["rename", "rmtree"]
    assert f"sync {tmp_path}" in calls[retired[0] : retired[1]]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -1, True, 2.0, "3"])
def test_keep_is_a_number_of_saves(keep: Any, ema: EMA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be a whole number"):
        ema.save(tmp_path / "ema-1", keep=keep)
    assert names(tmp_path) == []


def test_a_name_without_a_number(ema: EMA, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="needs a name that ends in a number, like ema-001000, got best"
    ):
        ema.save(tmp_path / "best", keep=3)
    assert names(tmp_path) == []


def test_latest_of_somebody_else(ema: EMA, tmp_path: Path) -> None:
    """DeepSpeed keeps a file of that name, others a link or a folder: refused before anything is
    written.
    """
    pointer = tmp_path / "pointer"
    pointer.write_text("ema-1\n")
    for number, make in enumerate(
        [
            lambda latest: latest.write_text("global_step1000"),
            lambda latest: latest.write_text("teacher-1\n"),
            lambda latest: latest.write_bytes(b"\xff\xfe"),
            lambda latest: latest.write_text("ema-1\n" * 1000),
            lambda latest: latest.mkdir(),
            lambda latest: latest.symlink_to("ema-1"),
            lambda latest: latest.symlink_to("nowhere"),
            lambda latest: latest.symlink_to(pointer),
        ]
    ):
        run = tmp_path / str(number)
        run.mkdir()
        make(run / "latest")
        with pytest.raises(
            ValueError, match="latest exists and names no ema-NUMBER: it is not ours to replace"
        ):
            ema.save(run / "ema-2", keep=1)
        assert names(run) == ["latest"]
    with pytest.raises(ValueError, match="latest is a file"):
        ema.save(tmp_path / "0" / "latest")


# --- the pointer ----------------------------------------------------------------------------------


def test_readers_follow_it(ema: EMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "ema-1", keep=1)
    with torch.no_grad():
        next(iter(ema.weights.model.parameters())).add_(1)
    ema.update()
    ema.save(tmp_path / "ema-2", keep=2)
    (tmp_path / "run").symlink_to(tmp_path)
    want = ema.gather()
    for latest in (tmp_path / "latest", tmp_path / "run" / "latest"):
        other = EMA(nn.Linear(3, 2), 0.5)
        other.load(latest)
        assert (other.now, torch.equal(other.gather()["weight"], want["weight"])) == (1, True)
        assert torch.equal(load_file(latest)["weight"], want["weight"])
        assert report_on(latest).manifest.clock["now"] == 1
        with open_model(latest) as model:
            assert model.entries.keys() == want.keys()
    (tmp_path / "ema-2").rename(tmp_path / f".ema-2.old-{HEX}")  # an overwrite that was cut short
    assert torch.equal(load_file(tmp_path / "latest")["weight"], want["weight"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "..",
        ".",
        "../x",
        "/x",
        "x/y",
        "x/",
        "latest",
        "ema-1\nema-2",
        "ema-1\0",
        ".hidden",
        "link",
        "x" * 2000,
    ],
)
def test_it_leads_nowhere_else(text: str, ema: EMA, tmp_path: Path) -> None:
    """Only to a folder beside it. Guards commit.named and the link in commit.follow."""
    run = tmp_path / "run"
    ema.save(run / "ema-1")
    ema.save(tmp_path / "x")
    (run / "link").symlink_to(tmp_path / "x")
    (run / "latest").write_text(text)
    for read in (load_file, ema.load, report_on, open_model):
        with pytest.raises(ValueError, match="latest must name one folder beside it"):
            read(run / "latest")


def test_other_files_and_folders_called_latest(ema: EMA, tmp_path: Path) -> None:
    """A folder or a link of that name is what it is."""
    ema.save(tmp_path / "latest")
    assert pointers.follow(tmp_path / "latest") == tmp_path / "latest"
    ema.load(tmp_path / "latest")
    ema.save(tmp_path / "run" / "ema-1")
    (tmp_path / "run" / "latest").symlink_to("ema-1")
    assert load_file(tmp_path / "run" / "latest").keys() == ema.gather().keys()
    assert pointers.follow(tmp_path / "missing" / "latest") == tmp_path / "missing" / "latest"
