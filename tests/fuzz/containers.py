"""Damage to what torch writes: zip archives, the pickles in them, and `.metadata`.

A pickle is changed between its opcodes, so that most changes still are pickles. Each hostile one
would leave a file called `canary` if any of its code ran.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pickletools import genops

__all__ = ["ARCHIVE_CHANGES", "CANARY", "DCP_CHANGES"]

CANARY = "canary"
_SHELL = f"touch {CANARY}"
_CODE = f"open({CANARY!r}, 'w').close()"
_EVIL = [  # module, name, argument
    ("os", "system", _SHELL), ("posix", "system", _SHELL),
    ("subprocess", "call", f"touch {CANARY}"), ("subprocess", "getoutput", _SHELL),
    ("builtins", "exec", _CODE), ("builtins", "eval", _CODE), ("builtins", "open", "/etc/passwd"),
    ("builtins", "__import__", "antigravity"), ("pathlib", "Path", CANARY),
    ("shutil", "rmtree", "."), ("torch", "load", "x.pt"), ("torch.hub", "load", "x"),
    ("numpy", "fromfile", "/dev/zero"), ("pickle", "loads", "x"), ("runpy", "run_path", "x"),
    ("torch.storage", "_load_from_bytes", "x"), ("code", "interact", ""),
]  # fmt: skip
_NUMBERS = [
    0,
    1,
    2,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 100,
]
_TEXTS = [
    "", "x", ".", "..", "../x", "../../x", "/etc/passwd", "a\0b", "data", "storage", "little",
    "big", "cpu", "cuda:0", "meta", "y" * 300, "\U0001f600", "a.b", "model_ema", "0", "__class__",
    "averages",
]  # fmt: skip


# --- pickles -------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    raw = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _call(draw: random.Random) -> bytes:
    """A call that leaves nothing on the stack, through one opcode or another."""
    module, name, argument = draw.choice(_EVIL)
    function = draw.choice(
        [
            pickle.GLOBAL + f"{module}\n{name}\n".encode(),
            _text(module) + _text(name) + pickle.STACK_GLOBAL,
        ]
    )
    arguments = _text(argument) + pickle.TUPLE1
    return draw.choice(
        [
            function + arguments + pickle.REDUCE + pickle.POP,
            function + arguments + pickle.NEWOBJ + pickle.POP,
            pickle.MARK + function + _text(argument) + pickle.OBJ + pickle.POP,
            pickle.MARK
            + _text(argument)
            + pickle.INST
            + f"{module}\n{name}\n".encode()
            + pickle.POP,
            function + pickle.POP,
        ]
    )


def _bomb(draw: random.Random) -> bytes:
    """More memory, time or depth than the file explains."""
    deep = draw.choice([100, 5_000, 100_000])
    return draw.choice(
        [
            pickle.BINBYTES8 + struct.pack("<Q", 1 << draw.choice([31, 40, 62])),
            pickle.BINUNICODE + struct.pack("<I", (1 << 32) - 1),
            pickle.LONG4 + struct.pack("<i", (1 << 31) - 1),
            pickle.LONG1 + b"\xff" + b"\x7f" * 255 + pickle.POP,
            pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 1 << 31) + pickle.POP,
            pickle.FRAME + struct.pack("<Q", 1 << 60),
            pickle.EMPTY_TUPLE + pickle.TUPLE1 * deep + pickle.POP,
            pickle.EMPTY_DICT
            + pickle.EMPTY_TUPLE
            + (pickle.DUP + pickle.TUPLE2) * 60
            + pickle.NONE
            + pickle.SETITEM
            + pickle.POP,
            pickle.EMPTY_LIST * deep + pickle.POP * deep,
            pickle.EMPTY_DICT
            + pickle.MEMOIZE
            + _text("me")
            + pickle.BINGET
            + b"\0"
            + pickle.SETITEM
            + pickle.POP,
            pickle.EXT1 + b"\1",
            pickle.PERSID + b"x\n",
            pickle.NONE + pickle.BINPERSID + pickle.POP,
        ]
    )


def change_pickle(draw: random.Random, data: bytes) -> bytes:
    """The pickle with something replaced, inserted, dropped or repeated between opcodes."""
    operations = list(genops(data))
    edges = [position or 0 for _, _, position in operations] + [len(data)]
    parts = [data[begin:end] for begin, end in pairwise(edges)]
    numbers = [
        i
        for i, (code, value, _) in enumerate(operations)
        if type(value) is int and code.name.startswith(("BININT", "LONG1", "INT"))
    ]
    texts = [i for i, (code, _, _) in enumerate(operations) if "UNICODE" in code.name]
    names = [i for i, (code, _, _) in enumerate(operations) if code.name == "GLOBAL"]
    at, other = draw.randrange(1, len(parts)), draw.randrange(1, len(parts))
    what = draw.choice(
        [
            "number",
            "number",
            "text",
            "text",
            "name",
            "call",
            "call",
            "bomb",
            "bomb",
            "drop",
            "twice",
            "swap",
            "flip",
        ]
    )
    if what == "number" and numbers:
        parts[draw.choice(numbers)] = _number(draw.choice([*_NUMBERS, -1, -(1 << 40)]))
    elif what == "text" and texts:
        parts[draw.choice(texts)] = _text(draw.choice(_TEXTS))
    elif what == "name" and names:
        module, name, _ = draw.choice(_EVIL)
        parts[draw.choice(names)] = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    elif what == "drop":
        del parts[at]
    elif what == "twice":
        parts.insert(at, parts[other])
    elif what == "swap":
        parts[at], parts[other] = parts[other], parts[at]
    elif what == "flip":
        raw = bytearray(data)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        return bytes(raw)
    else:
        parts.insert(at, _bomb(draw) if what == "bomb" else _call(draw))
    return b"".join(parts)


# --- archives ------------------------------------------------------------------------------------


def _fields(draw: random.Random, data: bytes) -> bytes:
    """A field of a record's header, of the directory or of its end, changed in place."""
    raw = bytearray(data)
    widths = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}
    found = [
        (at, width)
        for mark, width in widths.items()
        for at in range(len(raw) - 3)
        if raw[at : at + 4] == mark
    ]
    at, width = draw.choice(found or [(0, min(len(raw), 30))])
    for _ in range(draw.choice([1, 1, 3])):
        size = draw.choice([1, 2, 4])
        place = at + draw.randrange(4, max(width, 9), 2)
        value = draw.choice([0, 1, 8, 12, 255, 1 << 15, (1 << 31) - 1, (1 << 32) - 1])
        raw[place : place + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(raw[: len(data)])


def _rezip(draw: random.Random, data: bytes) -> bytes:
    """The archive written anew, with one thing about its records changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    method, i = zipfile.ZIP_STORED, draw.randrange(len(records))
    name, content = records[i]
    what = draw.choice(
        [
            "deflate",
            "lzma",
            "drop",
            "rename",
            "twice",
            "shorter",
            "longer",
            "order",
            "comment",
            "empty",
            "script",
        ]
    )
    if what in ("deflate", "lzma"):
        method = zipfile.ZIP_DEFLATED if what == "deflate" else zipfile.ZIP_LZMA
    elif what == "drop":
        del records[i]
    elif what == "rename":
        names = ["../x", "/etc/x", "", "x" * 300, "archive/data.pkl", "a/b/c", "archive/byteorder"]
        records[i] = draw.choice(names), content
    elif what == "twice":
        records.append((draw.choice([name, f"other/{name.split('/', 1)[-1]}"]), content[::-1]))
    elif what in ("shorter", "longer"):
        records[i] = name, content[: len(content) // 2] if what == "shorter" else content + b"x" * 9
    elif what == "order":
        draw.shuffle(records)
    elif what == "empty":
        records = []
    elif what == "script":
        records.append((f"{name.split('/')[0]}/constants.pkl", pickle.dumps(1)))
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w", method) as archive:
        for record, raw in records:
            archive.writestr(zipfile.ZipInfo(record), raw, method)
        if what == "comment":
            archive.comment = draw.choice([b"PK\5\6" + bytes(18), b"x" * 65_000])
    return new.getvalue()


def _change_record(draw: random.Random, data: bytes) -> bytes:
    """The archive with a changed data.pkl, as torch writes it: stored."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for name, raw in records:
            changed = change_pickle(draw, raw) if name.endswith("data.pkl") else raw
            archive.writestr(zipfile.ZipInfo(name), changed)
    return new.getvalue()


# --- changes of a folder ------------------------------------------------------------------------


def _of_archive(
    change: Callable[[random.Random, bytes], bytes],
) -> Callable[[random.Random, Path], None]:
    def changed(draw: random.Random, folder: Path) -> None:
        path = draw.choice(sorted(folder.glob("*.pt")))
        path.write_bytes(change(draw, path.read_bytes()))

    return changed


def _bare_pickle(draw: random.Random, data: bytes) -> bytes:
    """A pickle that is no archive: what torch wrote before 1.6 looks like, or somebody's own."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        (name,) = [name for name in old.namelist() if name.endswith("data.pkl")]
        plain = old.read(name)
    return draw.choice(
        [plain, change_pickle(draw, plain), pickle.dumps({"w": 1}), b"\x80\x02" + plain]
    )


def _metadata(draw: random.Random, folder: Path) -> None:
    path = folder / ".metadata"
    data = path.read_bytes()
    for _ in range(draw.choice([1, 1, 1, 3])):
        try:
            data = change_pickle(draw, data)
        except ValueError:  # the last change left no pickle to walk
            break
    path.write_bytes(data)


def _chunks(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.glob("*.distcp")))
    path.write_bytes(_fields(draw, path.read_bytes()))


ARCHIVE_CHANGES: dict[str, Callable[[random.Random, Path], None]] = {
    "fields": _of_archive(_fields), "fields again": _of_archive(_fields),
    "zip": _of_archive(_rezip), "zip again": _of_archive(_rezip),
    "pickle": _of_archive(_change_record), "pickle again": _of_archive(_change_record),
    "pickle once more": _of_archive(_change_record), "bare pickle": _of_archive(_bare_pickle),
}  # fmt: skip
DCP_CHANGES: dict[str, Callable[[random.Random, Path], None]] = {
    "metadata": _metadata, "metadata again": _metadata, "metadata once more": _metadata,
    "chunks": _chunks, "chunks again": _chunks,
}  # fmt: skip
