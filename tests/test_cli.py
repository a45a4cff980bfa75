"""The command line: what it says of sound and unsound artifacts, its exit codes, and that it stays
light.

How to read a failure: `command` starts a real process, `call` runs `main` in this one; both give
(code, stdout, stderr).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_ema import EMA, HalfLife, Power, cli
from dist_ema.checkpoint.manifest import META
from dist_ema.checkpoint.safetensors import INDEX
from dist_ema.cli import main
from dist_ema.foreign import torch_dcp
from dist_ema.offline import sources
from dist_ema.offline.report import report_on
from tests._models import Tied
from tests.conftest import Call
from tests.ema_json import stamped
from tests.fuzz import damaged


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved average (in one file and in two), an averaged part, two exports, and files of other
    writers.
    """
    folder = tmp_path_factory.mktemp("shop")
    torch.manual_seed(0)
    model = Tied()
    ema = EMA(model, Power(sigma_rel=0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    ema.attach(optimizer, every=2)
    for _ in range(5):
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with ema.swap():
        model(torch.arange(7))
    ema.save(folder / "ema", extra={"epoch": 3})
    ema.save(folder / "sharded", max_shard_size=100)
    EMA(model, only="emb").save(folder / "part")
    ema.export(folder / "out", dtype=torch.bfloat16)
    ema.export(folder / "one.safetensors")
    (folder / "hf").mkdir()
    save_file(
        {f"layer.{i:02}.w": torch.ones(2, i) for i in range(30)},
        folder / "hf" / "model.safetensors",
    )
    save_file(
        {"w": torch.ones(3).half(), "n": torch.tensor(3)},
        folder / "lone.safetensors",
        {"format": "pt", "by": "them"},
    )
    return folder


def command(*arguments: Any, **options: Any) -> tuple[int, str, str]:
    """`python -m dist_ema ...` as a process of its own."""
    line = [sys.executable, "-m", "dist_ema", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


def facts(out: str) -> list[tuple[str, str]]:
    """The summary as (word, what is said of it)."""
    rows = [line.split("  ", 1) for line in out.split("\n\n")[1].splitlines()]
    return [(word, rest.strip()) for word, rest in rows]


# --- what it says ---------------------------------------------------------------------------------


def test_saved(call: Call, shop: Path) -> None:
    """A folder from ema.save: every fact of ema.json and every weight, each with its part in the
    average.
    """
    code, out, err = call("inspect", shop / "ema")
    assert (code, err) == (0, "")
    assert out.startswith(f"{shop / 'ema'}: an average to resume from (format 1)\n")
    meta = json.loads((shop / "ema" / META).read_text())
    size = (shop / "ema" / "model.safetensors").stat().st_size
    assert facts(out) == [
        ("clock", "now 4, accepted 2, before 0, pending 1, steps 5, updates 2"),
        ("schedule", "Power(origin='start', sigma_rel=0.1)"),
        ("attach", "elapsed 1, every 2, start 0"),
        ("extra", "epoch"),
        ("versions", f"dist_ema {meta['versions']['dist_ema']}, torch {torch.__version__}"),
        ("averaged", "3 weights"),
        ("own buffers", "norm.num_batches_tracked, norm.running_mean, norm.running_var"),
        ("alias", "head.weight is emb.weight"),
        ("in all", "weights 7, parameters 48, bytes 196"),
        ("F32", "weights 6, parameters 47, bytes 188"),
        ("I64", "weights 1, parameters 1, bytes 8"),
        (
            "file",
            f"model.safetensors: {size} bytes, crc32 {meta['files']['model.safetensors']['crc32']}",
        ),
    ]
    assert [line.split() for line in out.split("\n\n")[2].splitlines()] == [
        ["weight", "dtype", "shape", "role"],
        ["emb.weight", "F32", "[7,", "4]", "averaged"],
        ["frozen", "F32", "[3]"],
        ["norm.bias", "F32", "[4]", "averaged"],
        ["norm.num_batches_tracked", "I64", "[]", "own", "buffer"],
        ["norm.running_mean", "F32", "[4]", "own", "buffer"],
        ["norm.running_var", "F32", "[4]", "own", "buffer"],
        ["norm.weight", "F32", "[4]", "averaged"],
    ]


def test_columns_line_up(call: Call, shop: Path) -> None:
    """Plain aligned text: every dtype of the table stands in one column, and no line ends in
    spaces.
    """
    _, out, _ = call("inspect", shop / "ema")
    table = out.split("\n\n")[2].splitlines()
    places = {
        next(line.index(f" {dtype} ") for dtype in ("dtype", "F32", "I64") if f" {dtype} " in line)
        for line in table
    }
    assert len(places) == 1
    assert out == "\n".join(line.rstrip() for line in out.split("\n"))


def test_other_kinds(call: Call, shop: Path) -> None:
    """Several files, an average of a part, exports, a foreign folder, a lone file: each is called
    by its name.
    """
    found = {
        name: call("inspect", shop / name)
        for name in ("sharded", "part", "out", "one.safetensors", "hf", "lone.safetensors")
    }
    assert {(code, err) for code, _, err in found.values()} == {(0, "")}
    says = {
        name: (out.splitlines()[0].split(": ")[1], dict(facts(out)))
        for name, (_, out, _) in found.items()
    }
    assert says["sharded"][0] == "an average to resume from (format 1)"
    assert [
        value.split(":")[0] for word, value in facts(found["sharded"][1]) if word == "file"
    ] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert (
        says["part"][1]["averaged"] == "1 weight; frozen weights and buffers are not in the files"
    )
    assert says["part"][1]["attach"] == "updated by hand"
    assert call("export", shop / "hf", shop / "hf-out")[0] == 0
    assert "attach" not in dict(facts(call("inspect", shop / "hf-out")[1])), "nothing is known"
    assert says["out"][0] == "a model to ship, exported by dist_ema (format 1)"
    assert says["out"][1]["BF16"] == "weights 6, parameters 47, bytes 94"
    assert says["one.safetensors"][0] == "a safetensors file"
    assert says["one.safetensors"][1]["alias"] == "head.weight is emb.weight"
    assert says["hf"][0] == "a safetensors model, not written by dist_ema"
    assert says["hf"][1]["in all"] == "weights 30, parameters 870, bytes 3,480"
    assert set(says["lone.safetensors"][1]) == {"in all", "F16", "I64", "file"}
    assert says["lone.safetensors"][1]["file"].endswith("no check sum")


def test_not_started(call: Call, tmp_path: Path) -> None:
    """An average that waits for attach(start=) says so."""
    model = nn.Linear(2, 2)
    ema = EMA(model)
    ema.attach(torch.optim.SGD(model.parameters(), 0.1), start=10)
    ema.save(tmp_path / "ema")
    assert dict(facts(call("inspect", tmp_path / "ema")[1]))["clock"].endswith(
        "updates 0, not started"
    )


@pytest.mark.parametrize(
    ("asked", "shown"),
    [(None, 20), ("0", 0), ("3", 3), ("29", 29), ("30", 30), ("99", 30), ("all", 30)],
)
def test_weights(asked: str | None, shown: int, call: Call, shop: Path) -> None:
    """--weights N limits the table (20 if nothing is said), and what is left out is counted."""
    _, out, _ = call("inspect", shop / "hf", *([] if asked is None else ["--weights", asked]))
    assert sum(line.startswith("layer.") for line in out.splitlines()) == shown
    assert ("weight  " in out) == (shown > 0)
    rest = f"... and {30 - shown} of 30 more: --weights all"
    assert (rest in out.splitlines()) == (shown < 30)


def test_json(call: Call, shop: Path) -> None:
    """--json: everything that the text says, as values, all weights included."""
    code, out, err = call("inspect", shop / "sharded", "--json")
    values, meta = json.loads(out), json.loads((shop / "sharded" / META).read_text())
    assert (code, err, values["problems"]) == (0, "", [])
    for key in (
        "format",
        "clock",
        "schedules",
        "attach",
        "rounding",
        "averaged",
        "own_buffers",
        "aliases",
        "files",
    ):
        assert values[key] == meta[key], key
    assert (values["kind"], values["holds"], values["versions"]) == ("ema", "all", meta["versions"])
    assert values["total"] == {"weights": 7, "parameters": 48, "bytes": 196}
    assert values["dtypes"]["I64"] == {"weights": 1, "parameters": 1, "bytes": 8}
    assert values["weights"]["emb.weight"] == {
        "dtype": "F32",
        "shape": [7, 4],
        "file": "model-00001-of-00002.safetensors",
    }
    assert len(values["weights"]) == 7
    for name in ("hf", "lone.safetensors"):
        other = json.loads(call("inspect", shop / name, "--json", "--weights", "1")[1])
        assert (other["format"], other["clock"], len(other["weights"])) == (None, {}, 1)


# --- what is wrong --------------------------------------------------------------------------------


def copy(shop: Path, name: str, to: Path) -> Path:
    to.mkdir()
    for each in (shop / name).iterdir():
        (to / each.name).write_bytes(each.read_bytes())
    return to


CLOCK = {
    "now": 1.0,
    "steps": 1,
    "updates": 1,
    "pending": 0.0,
    "started": True,
}  # without what was accepted
META_BREAKS: dict[str, tuple[dict[str, Any], str]] = {
    "a file that is not there": (
        {"files": {"gone.safetensors": {"size": 5, "crc32": "00000000"}}},
        "gone.safetensors is listed",
    ),
    "another size": (
        {"files": {"model.safetensors": {"size": 5, "crc32": "00000000"}}},
        "bytes, ema.json says 5",
    ),
    "files of no size": (
        {"files": {"model.safetensors": 7}},
        "model.safetensors must have a size and a CRC-32 of 8 digits, listed is 7",
    ),
    "no files": ({"files": {}}, "model.safetensors is not listed"),
    "averages lost": (
        {"averaged": ["emb.weight", "lost.weight"]},
        "averaged: it names lost.weight, which the files do not hold",
    ),
    "buffers lost": (
        {"own_buffers": [["x"]]},
        "own_buffers: it must be a list of names, found [['x']]",
    ),
    "aliases lost": ({"aliases": {"lost": ["x"]}}, "aliases: it names lost, which"),
    "alias of itself": (
        {"aliases": {"emb.weight": ["frozen"]}},
        "frozen is listed as another name of emb.weight, and is a weight itself",
    ),
    "aliases of no list": (
        {"aliases": {"emb.weight": 7}, "clock": []},
        "clock: it must be an object, found []",
    ),
    "no clock": ({"clock": None}, "clock: it must be an object, found None"),
    "a clock of words": ({"clock": {"now": "late"}}, "the saved clock has no sound 'now'"),
    "a clock that lost a hand": (
        {"clock": CLOCK},
        "clock: accepted must be a whole number from 0, found None",
    ),
    "an unknown schedule": ({"schedules": [{"name": "Cubic"}]}, "no schedule is called 'Cubic'"),
    "a schedule of nothing": ({"schedules": [None, 7]}, "a schedule cannot be rebuilt from None"),
    "no schedule": ({"schedules": []}, "it names 0 schedules for 1 averages"),
    "schedules of no list": ({"schedules": "Ratio"}, "schedules: it must be a list, found 'Ratio'"),
    "an unknown kind": ({"kind": ["ema"]}, "kind: it must be 'ema' or 'export', found"),
    "odd everything": (
        dict.fromkeys(("versions", "extra", "attach", "rounding", "averaged", "weights"), 7),
        "averaged: it must be a list",
    ),
}


@pytest.mark.parametrize("what", META_BREAKS)
def test_problems(what: str, call: Call, shop: Path, tmp_path: Path) -> None:
    """ema.json that contradicts the files, or that ema.load would refuse: the report, a sentence,
    and code 1.
    """
    change, message = META_BREAKS[what]
    folder = copy(shop, "ema", tmp_path / "ema")
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | change))
    code, out, err = call("inspect", folder)
    assert code == 1
    assert message in err
    assert all(
        line.startswith(f"dist-ema: {folder}: ema.json is not sound: ") for line in err.splitlines()
    )
    assert "emb.weight" in out  # what can be said is said
    code, out, _ = call("inspect", folder, "--json")
    assert code == 1
    assert any(message in problem for problem in json.loads(out)["problems"])


def test_no_problem_is_made_up(shop: Path) -> None:
    """Every sound artifact of the shop has no problem."""
    assert [path.name for path in shop.iterdir() if report_on(path).problems] == []


def broken(tmp_path: Path, shop: Path) -> dict[str, tuple[Path, str]]:
    """Paths from which no weights can be told."""
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((shop / "one.safetensors").read_bytes()[:-1])
    (tmp_path / "text").write_text("hello, this is not a model")
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_a.safetensors", "adapter_b.safetensors"):
        (adapter / name).write_bytes((shop / "one.safetensors").read_bytes())
    newer = copy(shop, "ema", tmp_path / "newer")
    (newer / META).write_text(json.dumps({"format": 99, "files": {}}))
    odd = copy(shop, "ema", tmp_path / "odd")
    (odd / META).write_text("{")
    missing = copy(shop, "sharded", tmp_path / "missing")
    (missing / "model-00002-of-00002.safetensors").unlink()
    escape = copy(shop, "sharded", tmp_path / "escape")
    (escape / INDEX).write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    (tmp_path / "run").mkdir()
    copy(shop, "ema", tmp_path / "run" / "ema-2")
    copy(shop, "ema", tmp_path / "run" / "ema-1")
    folder = tmp_path / "folder"
    (folder / "model.safetensors").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    return {
        "cut": (cut, "cut short or damaged"),
        "text": (tmp_path / "text", "is no safetensors file"),
        "empty": (tmp_path / "empty", "holds no model.safetensors and no"),
        "adapter": (adapter, "It does hold adapter_a.safetensors, adapter_b.safetensors: name"),
        "run": (tmp_path / "run", "Folders in it do, ema-2 for one: name the one to read."),
        "newer": (newer, "holds format 99; this dist_ema reads up to 1. Upgrade dist_ema."),
        "odd": (odd, "is not valid JSON"),
        "json": (copy(shop, "ema", tmp_path / "json") / META, "name the folder, "),
        "missing": (missing, "model-00002-of-00002.safetensors"),
        "escape": (escape, "no sound weight_map"),
        "folder": (folder, "model.safetensors"),
        "pipe": (tmp_path / "pipe", "is neither a folder nor a file"),
    }


def test_unreadable(call: Call, shop: Path, tmp_path: Path) -> None:
    """What is no artifact, or is damaged: one sentence to stderr that names it, nothing to stdout,
    code 1.
    """
    for what, (path, message) in broken(tmp_path, shop).items():
        code, out, err = call("inspect", path)
        assert (code, out) == (1, ""), what
        assert message in err, what
        assert err.startswith("dist-ema: "), what
        assert err.count("\n") == 1, what
        assert "[Errno" not in err, what


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: dist-ema"),
        (("inspect",), "required: PATH"),
        (("inspect", "nowhere/at-all"), "dist-ema: nowhere/at-all does not exist."),
        (("inspect", "a", "b"), "unrecognized arguments: b"),
        (("inspect", "a", "--weigths", "3"), "usage: dist-ema inspect"),
        (("inspect", "a", "--weights", "-1"), "must be a whole number or 'all', got '-1'"),
        (("inspect", "a", "--weights", "many"), "must be a whole number or 'all', got 'many'"),
        (("dissect", "a"), "invalid choice: 'dissect'"),
        (("--wrong",), "--wrong"),
        (("convert", "a", "b", "--max-shard-size", "much"), "max_shard_size must be"),
        (("convert", "a", "b", "--max-size", "much"), "--max-size: SIZE must be"),
        (
            ("reconstruct", "a", "b", "--sigma-rel", "0.1", "--max-shard-size", "0"),
            "max_shard_size must be",
        ),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, call: Call) -> None:
    """Wrong usage is code 2 and a sentence to stderr; a path that does not exist is one."""
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_names_cannot_write_to_the_terminal(call: Call, tmp_path: Path) -> None:
    """Control characters in names of a file are shown as escapes."""
    names = ["clear\x1b[2J", "two\nlines", "\u202eback"]
    text = json.dumps(
        {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    code, out, _ = call("inspect", tmp_path / "a.safetensors")
    assert code == 0
    for shown in ("clear\\x1b[2J", "two\\nlines", "\\u202eback"):
        assert shown in out
    assert "\x1b" not in out
    assert set(
        json.loads(call("inspect", tmp_path / "a.safetensors", "--json")[1])["weights"]
    ) == set(names)


def test_deep_extra(call: Call, shop: Path, tmp_path: Path) -> None:
    """Values nested as deeply as a reader takes them do not end in a traceback."""
    folder = copy(shop, "ema", tmp_path / "ema")
    meta = json.loads((folder / META).read_text())
    codes = set()
    for depth in (*range(700, 1000, 25), 5000):
        deep = '{"a":' * depth + "1" + "}" * depth
        text = json.dumps(meta | {"extra": 0}).replace('"extra": 0', f'"extra": {deep}')
        with suppress(RecursionError):
            text = stamped(json.loads(text)).decode()
        (folder / META).write_text(text)
        codes.add(call("inspect", folder, "--json")[0])
    assert codes == {0, 1}


# --- whatever is asked ----------------------------------------------------------------------------

NONSENSE = [
    "", " ", ".", "..", "~", "*", "-", "--", "-1", "0", "1", "7", "1e309", "nan", "5GB", "all",
    "none", "bf16", "int8",
    "Constant", "\0", "a\0b", "x" * 5000, "d/" * 3000, "\ud800", "größe/\U0001f600", "\x1b[2J",
    "%s%n", "{0}", "-x", "=",
    "--unknown", "--json", "--force", "--help", "/dev/null", "/dev/zero", "/proc/self/mem",
    "/dev/null/x", "nowhere", "nowhere/x.safetensors",
]  # fmt: skip
# They run processes, wait for versions, or write beside a folder, and have tests of their own.
BESIDES = {"board", "doctor", "sweep", "watch"}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every verb's parser."""
    (verbs,) = [
        action
        for action in cli.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(verbs.choices)


def arguments(rng: random.Random, verb: str, paths: list[str]) -> tuple[list[str], list[str]]:
    """A random argument list for a verb, and which of its words may be written to."""
    line, targets = [verb], []
    for action in parsers()[verb]._actions:
        if isinstance(action, argparse._HelpAction) or (
            action.option_strings and rng.random() < 0.6
        ):
            continue
        line += rng.sample(action.option_strings, 1) if action.option_strings else []
        if action.nargs != 0:
            words = [
                rng.choice(paths if rng.random() < 0.7 else NONSENSE)
                for _ in range(rng.choice([1, 1, 1, 2]))
            ]
            words = words if action.nargs in ("+", "*") else words[:1]
            targets += words if action.dest == "out" or "PNG" in str(action.metavar) else []
            line += words
    while rng.random() < 0.2:
        line.insert(rng.randrange(len(line) + 1), rng.choice(NONSENSE))
    return line, targets


def tree(folder: Path) -> dict[Path, bytes | str | None]:
    """Everything in a folder: the content of files, where links lead, None for folders."""
    found: dict[Path, bytes | str | None] = {}
    for path in folder.rglob("*"):
        found[path] = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
    return found


def written(before: dict[Path, Any], folder: Path, targets: list[str]) -> list[Path]:
    """What changed outside the targets. Folders on the way to a target may appear."""
    after = tree(folder)
    real = [
        Path(os.path.realpath(target))
        for target in targets
        if "\0" not in target and "\ud800" not in target
    ]
    changed = [path for path in {*before, *after} if before.get(path, 0) != after.get(path, 0)]
    may = {path for target in real for path in (target, *target.parents)}
    return [
        path
        for path in changed
        if path not in may
        and not any(target in path.parents for target in real if target != folder)
    ]


def test_random_arguments(
    call: Call, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 random argument lists over all verbs: never a traceback, exit code 0, 1 or 2, never a
    write outside OUT.
    """
    rng, codes, home = random.Random(20), Counter[int](), tmp_path / "home"
    for i in range(100):
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(shop, home)
        (home / "link").symlink_to("ema")
        (home / "loop").symlink_to("loop")
        torch.save({"w": torch.ones(1)}, home / "pickled.pt")
        os.mkfifo(home / "pipe")
        monkeypatch.chdir(home)
        paths = [
            *(path.name for path in home.iterdir()),
            "ema/x",
            "new",
            "new/deep/x.safetensors",
            str(home / "ema"),
            "../home/hf",
        ]
        before = tree(home)
        line, targets = arguments(rng, rng.choice(sorted(set(parsers()) - BESIDES)), paths)
        code, _, err = call(*line)
        assert code in (0, 1, 2), (i, line)
        assert "Traceback" not in err, (i, line)
        assert (err != "") == (code == 2) or code == 1 or line[0] == "diff" or "--help" in line, (
            i,
            line,
            code,
            err,
        )
        outside = [
            path
            for path in written(before, home, targets)
            if not ("--seal" in line and path.name == META)
        ]
        assert outside == [], (i, line)
        codes[code] += 1
    assert min(codes[code] for code in (0, 1, 2)) >= 5, codes


def links_followed(folder: Path) -> dict[str, Any]:
    """What a reader finds under each name; a pipe or a device is as good as nothing."""
    return {
        path.relative_to(folder).as_posix(): _values(path) or path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _values(path: Path) -> Any:
    """Of ema.json, which may be laid out in another way."""
    with suppress(ValueError, RecursionError):
        return json.loads(path.read_bytes()) if path.name == META else None


@pytest.mark.parametrize("seed", [11, pytest.param(12, marks=pytest.mark.rest)])
def test_damaged_artifacts(seed: int, call: Call, shop: Path, tmp_path: Path) -> None:
    """Whatever is done to an artifact: no traceback, no write outside OUT, and verify passes no
    changed byte.
    """
    ema = EMA(Tied(), [0.5, HalfLife(3.0)])
    ema.save(good := tmp_path / "good", max_shard_size=100)
    want = links_followed(good)
    assert call("verify", good)[0] == 0
    for label, folder in islice(damaged(good, tmp_path / "case" / "a", seed), 100):
        before = tree(folder.parent)
        for line in (
            ["verify", folder],
            ["inspect", folder],
            ["diff", folder, good],
            ["export", folder, tmp_path / "out"],
        ):
            code, _, err = call(*line)
            assert code in (0, 1, 2), (label, line)
            assert "Traceback" not in err, (label, line)
            assert len(err) < 10_000, (label, line)
            assert code == 0 or err or line[0] == "diff", (label, line)
            if line[0] == "verify":
                assert code == 1 or links_followed(folder) == want, label
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert tree(folder.parent) == before, label
        assert {path.name for path in tmp_path.iterdir()} == {"good", "case"}, label


# --- how it runs ----------------------------------------------------------------------------------


def test_never_imports_torch(shop: Path, tmp_path: Path) -> None:
    """The command is for machines without a GPU or time: torch (1.6 s) is not imported, whatever is
    looked at.

    Nor is numpy (0.1 s) before a verb has work for it.
    """
    lines = [
        [verb, str(shop / name)]
        for verb in ("inspect", "verify")
        for name in ("ema", "out", "hf", "lone.safetensors")
    ]
    lines += [
        ["diff", str(shop / "ema"), str(shop / "ema")],
        ["export", str(shop / "ema"), str(tmp_path / "new")],
    ]
    code = (
        "import sys; from dist_ema import cli; cli.build_parser(); early = 'numpy' in "
        "sys.modules\n"
        f"codes = [cli.main(line) for line in {lines}]\n"
        "print(early, codes, sorted({'torch', 'safetensors', 'rich'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"False {[0] * len(lines)} []"


def test_inspect_is_light(tmp_path: Path) -> None:
    """1,000 tensors: nothing is imported that the answer does not need, so it comes within half a
    second.

    NOTE: no seconds are asserted, because machines differ; modules and what they cost do not.
    """
    save_file(
        {f"layers.{i}.weight": torch.ones(2) for i in range(1000)},
        path := tmp_path / "a.safetensors",
    )
    code = (
        "import sys; from dist_ema.cli import main; main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "weights 1,000, parameters 2,000" in done.stdout
    heavy = {
        "torch",
        "safetensors",
        "rich",
        "asyncio",
        "email",
        "http",
        "multiprocessing",
        "scipy",
        "matplotlib",
        "pydoc",
    }
    assert heavy & set(done.stderr.split()) == set()


def test_several_averages(call: Call, tmp_path: Path) -> None:
    """Each average with its schedule, its place, its weights and its own buffers, in text and in
    JSON.
    """
    model = Tied()
    ema = EMA(model, [0.5, HalfLife(3.0)])
    with ema.swap(1):
        model(torch.arange(7))
    ema.save(tmp_path / "ema")
    code, out, err = call("inspect", tmp_path / "ema")
    assert (code, err) == (0, "")
    said = facts(out)
    rows = [value for word, value in said if word.startswith("average ")]
    assert rows[0].startswith("Constant(decay=0.5), in the folder itself: weights 7")
    assert rows[0].endswith("own buffers none")
    assert rows[1].startswith("HalfLife(units=3.0), averages/1-HalfLife: weights 6")
    assert rows[1].endswith(
        "own buffers norm.num_batches_tracked, norm.running_mean, norm.running_var"
    )
    assert [value.split(":")[0] for word, value in said if word == "file"] == [
        "model.safetensors",
        "averages/1-HalfLife/model.safetensors",
    ]
    values = json.loads(call("inspect", tmp_path / "ema", "--json")[1])
    further = values["averages"]["1-HalfLife"]
    assert further["own_buffers"] == [
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
    ]
    assert further["total"]["weights"] == len(further["weights"]) == 6
    assert len(values["files"]) == 2
    meta = json.loads((tmp_path / "ema" / META).read_text())
    (tmp_path / "ema" / META).write_text(json.dumps(meta | {"schedules": meta["schedules"][:1]}))
    code, _, err = call("inspect", tmp_path / "ema")
    assert (code, "it names 1 schedules for 2 averages" in err) == (1, True)


def test_another_source(
    call: Call, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another form is shown as whatever `source.open_model` makes of it."""
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / torch_dcp.META).touch()
    there = sources.open_model(shop / "one.safetensors")
    monkeypatch.setattr("dist_ema.offline.sources.open_model", lambda path: there)
    code, out, err = call("inspect", tmp_path / "dcp")
    assert (code, err) == (0, "")
    assert "a checkpoint of another form" in out
    assert ("alias", "head.weight is emb.weight") in facts(out)
    assert "weights 7, parameters 48" in out


def test_as_a_process(shop: Path) -> None:
    """`python -m dist_ema` hands the exit code to the shell, and leaves no traceback."""
    assert command("inspect", shop / "ema")[0] == 0
    code, out, err = command("inspect", shop / "nothing")
    assert (code, out, err) == (2, "", f"dist-ema: {shop / 'nothing'} does not exist.\n")


def test_console_script() -> None:
    """pyproject.toml gives the command `dist-ema` to cli.main."""
    (found,) = importlib.metadata.entry_points(group="console_scripts", name="dist-ema")
    assert found.load() is main


def test_ascii_terminal(tmp_path: Path) -> None:
    """A terminal that cannot show a name gets an escape, not a UnicodeEncodeError."""
    save_file({"größe": torch.ones(1)}, tmp_path / "a.safetensors")
    code, out, err = command(
        "inspect", tmp_path / "a.safetensors", env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (code, err) == (0, "")
    assert "gr\\xf6\\xdfe" in out


def test_head(shop: Path) -> None:
    """`dist-ema inspect ... | head -1` ends without a word about broken pipes."""
    assert len(command("inspect", shop / "hf", "--json")[1]) > 2000
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "dist_ema", "inspect", str(shop / "hf"), "--json"]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_full(shop: Path) -> None:
    """`dist-ema ... > /dev/full` is one sentence without numbers of the system, and code 1."""
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "dist_ema", "inspect", str(shop / "ema")]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "dist-ema: No space left on device.\n")


def test_closed(shop: Path) -> None:
    """`dist-ema ... >&-` and `2>&-`: the same exit code and no traceback; what goes to the other is
    the same.
    """
    for verb, path, code in (
        ("inspect", "ema", 0),
        ("verify", "ema", 0),
        ("inspect", "nothing", 2),
    ):
        line = [sys.executable, "-m", "dist_ema", verb, str(shop / path)]
        open_out, open_err = command(verb, shop / path)[1:]
        for closed, wanted in ((">&-", ("", open_err)), ("2>&-", (open_out, ""))):
            done = subprocess.run(
                ["sh", "-c", f'"$@" {closed}', "sh", *line],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (done.returncode, done.stdout, done.stderr) == (code, *wanted), (verb, closed)


def test_bar_for_those_who_look(shop: Path) -> None:
    """A terminal gets a bar on stderr; stdout is the same with and without one. At 80 columns a
    path that is longer than that is shortened in its middle, and the bar keeps its place.
    """
    folder = shop / "[a long name]".ljust(80, "x")
    shutil.copytree(shop / "ema", folder)
    ours, theirs = os.openpty()
    environ = {**os.environ, "COLUMNS": "80"}
    line = [sys.executable, "-m", "dist_ema", "verify", str(folder)]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60, env=environ
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert re.search(r"verify /\S+\.\.\.x+ .*━.*716/716 bytes", shown), shown
    assert (done.returncode, done.stdout) == command("verify", folder)[:2]


def test_version(call: Call) -> None:
    """--version: the installed version, on one line."""
    assert call("--version") == (0, f"dist-ema {importlib.metadata.version('dist-ema')}\n", "")


def test_help(call: Call) -> None:
    """--help teaches: the verbs with what they do, and for each verb examples, which parse, and its
    exit codes.
    """
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    parser = parsers()
    for verb in parser:
        assert re.search(rf"^    {verb}\b", out, re.MULTILINE), verb
        code, text, err = call(verb, "--help")
        assert (code, err) == (0, "")
        assert "exit code: 0 " in text
        examples = re.findall(rf"^  dist-ema {verb} (.*?)(?:  .*)?$", text, re.MULTILINE)
        assert examples, verb
        for line in examples:
            parser[verb].parse_args(shlex.split(line))


def test_looks_after_a_cut_save(call: Call, shop: Path, tmp_path: Path) -> None:
    """A save that was cut short between its two renames: looking finds the whole version, and
    renames nothing.
    """
    new = copy(shop, "ema", tmp_path / f".ema.tmp-{'0' * 32}")
    copy(shop, "part", tmp_path / f".ema.old-{'0' * 32}")
    before = sorted(os.listdir(tmp_path))
    code, out, _ = call("inspect", tmp_path / "ema")
    assert code == 0
    assert "part" not in out
    assert sorted(os.listdir(tmp_path)) == before
    assert new.exists()
