"""Checkpoints with something wrong: cut, flipped, edited, linked elsewhere.

Readers are tried on them.

    for label, folder in itertools.islice(damaged(good, tmp_path / "case" / "a", seed), 300): ...

The same seed gives the same changes. What links lead to is made beside the folder, under names that
begin with 'outside'. `python -m tests.fuzz --files 1000` tries every verb on such files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

__all__ = ["BYTES", "CHANGES", "MODEL", "damaged", "mutations"]

Change = Callable[[Path], None]
Draw = Callable[[random.Random, Path], None]

ODD: list[Any] = [
    None, True, -1, 0, 1, 3.5, 1e308, 1 << 62, 1 << 63, 10**30, "", "x", "../x", "../x.safetensors",
    "/etc/passwd", [], {}, ["x"], [None], {"x": 1}, {"x": ["y"]}, [[[]]], "\ud800", "a\0b",
    "y" * 5000, [1] * 70,
]  # fmt: skip
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 4000,
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
    "nul",
    "'x'",
]


def damaged(
    good: Path, at: Path, seed: int, changes: Mapping[str, Draw] | None = None
) -> Iterator[tuple[str, Path]]:
    """(what was done, the copy of `good` to which it was done), one after the other at one place.

    The copy is alone in its folder.
    """
    for label, change in mutations(seed, changes):
        shutil.rmtree(at.parent, ignore_errors=True)
        shutil.copytree(good, at)
        change(at)
        yield label, at


def mutations(seed: int, changes: Mapping[str, Draw] | None = None) -> Iterator[tuple[str, Change]]:
    """(what was done, function that does it to a folder), without end.

    changes: To choose from, by default those of a folder that dist_ema saved.
    """
    known = CHANGES if changes is None else changes
    for i in count():
        draw = random.Random(f"{seed} {i}")
        name = draw.choice(list(known))
        yield f"{i} {name}", partial(known[name], draw)


def _files(folder: Path, *suffixes: str) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in found if not suffixes or path.name.endswith(suffixes)]


def _weights(folder: Path) -> list[Path]:
    return _files(folder, ".safetensors")


# --- bytes ----------------------------------------------------------------------------------------


def _cut(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    os.truncate(
        path, draw.choice([0, 1, 7, 8, draw.randrange(path.stat().st_size)]) % path.stat().st_size
    )


def _append(draw: random.Random, folder: Path) -> None:
    with open(draw.choice(_files(folder)), "ab") as file:
        file.write(draw.randbytes(draw.choice([1, 8, 1000])))


def _flip(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_weights(folder) + _files(folder))
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 20])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _blank(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_weights(folder))
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    length = draw.choice([1, 16, 4096])
    data[start : start + length] = draw.choice([b"\0", b"\xff"]) * len(data[start : start + length])
    path.write_bytes(data)


def _exchange_files(draw: random.Random, folder: Path) -> None:
    one, two = draw.sample(_files(folder), 2)
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def _remove(draw: random.Random, folder: Path) -> None:
    draw.choice(_files(folder)).unlink()


def _replace(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    path.write_bytes(
        draw.choice(
            [b"", b"\x80\x04N.", b"PK\x03\x04" + bytes(40), draw.randbytes(200), b"\xff" * 64]
        )
    )


def _length(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_weights(folder))
    length = draw.choice(
        [
            0,
            1,
            7,
            100_000_001,
            (1 << 31) - 1,
            1 << 32,
            (1 << 63) - 1,
            (1 << 64) - 1,
            path.stat().st_size,
        ]
    )
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


# --- headers and JSON -----------------------------------------------------------------------------


def _edit_header(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_weights(folder))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    names = sorted(table)
    name, other = draw.choice(names), draw.choice(names)
    begin, end = table[name]["data_offsets"]
    entries: list[Any] = [
        {"data_offsets": [-8, begin]}, {"data_offsets": [begin, end + 4]},
        {"data_offsets": [end, begin]}, {"data_offsets": [begin + (1 << 40), end + (1 << 40)]},
        {"data_offsets": [0, end - begin]}, {"data_offsets": table[other]["data_offsets"]},
        {"data_offsets": [float(begin), end]}, {"data_offsets": []},
        {"shape": [*table[name]["shape"], 1]}, {"shape": table[name]["shape"][::-1]},
        {"shape": [0, 1 << 62, 1 << 62]}, {"shape": [-1]}, {"shape": [1] * 100}, {"dtype": "F16"},
        {"dtype": "I32"}, {"dtype": "F4"}, {"dtype": draw.choice(ODD)}, {"shape": draw.choice(ODD)},
        {"data_offsets": draw.choice(ODD)},
    ]  # fmt: skip
    what = draw.choice(
        ["entry", "entry", "entry", "swap", "rename", "drop", "twice", "raw", "metadata", "odd"]
    )
    if what == "entry":
        table[name] = table[name] | draw.choice(entries)
    elif what == "swap":
        table[name], table[other] = table[other], table[name]
    elif what == "rename":
        table[draw.choice([name + "x", "", "\ud800", other])] = table.pop(name)
    elif what == "drop":
        del table[name]
    elif what == "metadata":
        table["__metadata__"] = draw.choice([*ODD, {name: other}, {"format": "pt", other: name}])
    elif what == "odd":
        table[name] = draw.choice(ODD)
    text = json.dumps(table)
    if what == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(table[other])}}}"
    if what == "raw":
        text = draw.choice([*RAW, text[:-1] + f', "x": {draw.choice(RAW)}}}'])
    head = text.encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield from _places(value[key], (*path, key))


def _edit_json(draw: random.Random, folder: Path, name: str) -> None:
    path = draw.choice(_files(folder, name) or _files(folder, ".json"))
    table = json.loads(path.read_text())
    *above, key = draw.choice(list(_places(table)))
    at = table
    for step in above:
        at = at[step]
    what = draw.choice(["odd", "odd", "odd", "drop", "rename", "twice", "raw", "exchange"])
    if what == "odd":
        at[key] = draw.choice(ODD)
    elif what == "drop":
        del at[key]
    elif what == "rename" and isinstance(at, dict):
        at[draw.choice(["", "..", "../x.safetensors", "/x", "x", "\ud800"])] = at.pop(key)
    elif what == "exchange":
        other = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at[key], at[other] = at[other], at[key]
    text = json.dumps(table, indent=2)
    if what == "twice":
        text = text[:-2] + ',\n "format": 1, "format": 1, "weight_map": {}, "weight_map": {}}'
    if what == "raw":
        at[key] = "HERE"
        text = json.dumps(table).replace('"HERE"', draw.choice(RAW))
    path.write_text(text)


def _meta(draw: random.Random, folder: Path) -> None:
    _edit_json(draw, folder, "ema.json")


def _index(draw: random.Random, folder: Path) -> None:
    _edit_json(draw, folder, ".index.json")


def _clock(draw: random.Random, folder: Path) -> None:
    path = folder / "ema.json"
    table = json.loads(path.read_text())
    table["clock"][draw.choice(sorted(table["clock"]))] = "HERE"
    path.write_text(
        json.dumps(table).replace(
            '"HERE"', draw.choice([*RAW[:6], "-1", "true", '"1"', "null", "1e300", "0.5"])
        )
    )


def _another_file(draw: random.Random, folder: Path) -> None:
    """The index points to a file that nobody summed: the same weights with other bytes."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        _flip(draw, folder)
        return
    table = json.loads(index.read_text())
    name = draw.choice(sorted(set(table["weight_map"].values())))
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / "other.safetensors").write_bytes(data)
    table["weight_map"] = {
        k: "other.safetensors" if v == name else v for k, v in table["weight_map"].items()
    }
    index.write_text(json.dumps(table))


# --- places ---------------------------------------------------------------------------------------


def _link(draw: random.Random, folder: Path) -> None:
    """A file becomes a link: to its like outside, to a changed one, to itself, to nothing, to what
    is no file.
    """
    path = draw.choice(_files(folder))
    outside = folder.parent / f"outside-{draw.randrange(1 << 60):x}"
    what = draw.choice(["same", "changed", "itself", "nothing", "endless", "folder"])
    data = bytearray(path.read_bytes())
    path.unlink()
    if what in ("same", "changed"):
        data[-1] ^= what == "changed"
        outside.write_bytes(data)
    targets = {
        "itself": path.name,
        "nothing": outside,
        "endless": "/dev/zero",
        "folder": folder.parent,
    }
    os.symlink(targets.get(what, outside), path)


def _no_file(draw: random.Random, folder: Path) -> None:
    path = draw.choice(_files(folder))
    path.unlink()
    path.mkdir() if draw.random() < 0.5 else os.mkfifo(path)


def _folders(draw: random.Random, folder: Path) -> None:
    """An average's folder is gone, or leads elsewhere."""
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    if not inner:
        _remove(draw, folder)
        return
    path = draw.choice(inner)
    shutil.rmtree(path)
    if draw.random() < 0.5:
        os.symlink(draw.choice(["/", "..", path.name]), path)


CHANGES: dict[str, Draw] = {
    "cut": _cut, "append": _append, "flip": _flip, "flip again": _flip, "blank": _blank,
    "exchange": _exchange_files, "remove": _remove, "replace": _replace, "length": _length,
    "header": _edit_header, "header again": _edit_header, "meta": _meta, "meta again": _meta,
    "index": _index, "clock": _clock, "another file": _another_file, "link": _link,
    "no file": _no_file, "folders": _folders,
}  # fmt: skip
# of any file, and of a model that has no ema.json
BYTES = {name: CHANGES[name] for name in ("cut", "append", "remove", "replace", "link", "no file")}
MODEL = BYTES | {
    name: CHANGES[name]
    for name in ("flip", "blank", "exchange", "length", "header", "header again", "index")
}
