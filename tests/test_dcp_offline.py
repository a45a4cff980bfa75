"""Folders of torch.distributed.checkpoint without torch: the same bytes as torch reads, and nothing
that they hold is run.

How to read a failure: `same` compares every tensor of a folder with what dcp.load gives; `refused`
wants a ValueError with these words, and looks for the file that an attack would have made.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import json
import operator
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from dist_ema import EMA
from dist_ema.checkpoint.open_file import DTYPES
from dist_ema.foreign import torch_dcp, torch_zip, unpickler
from dist_ema.foreign.dcp_metadata import Chunk
from dist_ema.offline import sources
from tests._oracle import Training
from tests._ranks import run_ranks
from tests.conftest import Call

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is:UserWarning"
)  # it is not used, on purpose

WEIGHTS = {
    "half": torch.randn(33).bfloat16(),
    "ints": torch.arange(-2, 5),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    "complex": torch.randn(3, dtype=torch.complex64),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "middle": torch.randn(40)[3:17],
    "parameter": nn.Parameter(torch.randn(4, 3)),
}
STATE = {"app": {"model": WEIGHTS}, "a.b": {"c": torch.ones(2)}, "step": 7, "text": {"x": "y"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from one process."""
    folder = tmp_path_factory.mktemp("dcp") / "saved"
    dcp.save(STATE, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def read(folder: torch_dcp.Folder, name: str, window: int = 1 << 20) -> bytes:
    nbytes = folder.entries[name].nbytes
    return b"".join(
        bytes(folder.read(name, at, min(at + window, nbytes))) for at in range(0, nbytes, window)
    )


def same(path: Path, window: int = 1 << 20) -> int:
    """Every tensor has the bytes that dcp.load gives. Returns how many there were."""
    with torch_dcp.Folder(path) as folder:
        state = {
            name: torch.zeros(entry.shape, dtype=DTYPES[entry.dtype])
            for name, entry in folder.entries.items()
        }
        dcp.load(state, checkpoint_id=path, no_dist=True)
        assert [name for name in state if read(folder, name, window) != raw(state[name])] == []
    return len(state)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1 << 20, 24, 8])
def test_one_process(saved: Path, window: int) -> None:
    """All dtypes, and tensors that do not lie row by row, in windows that end anywhere."""
    assert same(saved, window) == len(WEIGHTS) + 1
    with torch_dcp.Folder(saved) as folder:
        assert read(folder, "app.model.last") == raw(WEIGHTS["last"])
        assert folder.others == {"step": "no tensor", "text.x": "no tensor"}
        assert folder.paths["a.b.c"] == ("a.b", "c")
        assert folder.entries["app.model.half"].dtype == "BF16"


def save_ranks(folder: str) -> None:
    """FSDP2 with uneven shards and its average; DDP's ranges of the average; shards on dim 1, and
    on both dims.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    run = Training("fsdp2")
    ema = EMA(run.model, 0.5)
    ema.attach(run.optimizer)
    run.train(2)
    ddp = Training("ddp")
    other = EMA(ddp.model, 0.9)
    other.attach(ddp.optimizer)
    ddp.train(2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = distribute_tensor(torch.arange(70.0).view(10, 7), mesh, [Shard(1)])
    deep = distribute_tensor(torch.arange(120.0).view(2, 5, 12), mesh, [Shard(2)])
    state = {
        "model": run.model.state_dict(),
        "ema": ema,
        "ddp": other,
        "columns": columns,
        "deep": deep,
    }
    dcp.save(state, checkpoint_id=f"{folder}/ranks")
    full = {"ema": ema.gather(), "ddp": other.gather()}
    if dist.get_rank() == 0:
        torch.save(full, f"{folder}/full.pt")


@pytest.mark.multirank
def test_ranks(tmp_path: Path) -> None:
    """Chunks of three ranks come together; what an average saved is what it gathers."""
    run_ranks(3, save_ranks, str(tmp_path))
    assert same(tmp_path / "ranks") > 30
    same(tmp_path / "ranks", 8)
    full = torch.load(tmp_path / "full.pt")
    with sources.open_model(tmp_path / "ranks") as folder:
        assert isinstance(folder, torch_dcp.Folder)
        assert read(folder, "columns", 24) == raw(torch.arange(70.0))
        assert len({chunk.file for chunk in folder.weights["columns"][1]}) == 3
        for label in ("ema", "ddp"):
            prefix = f"{label}.averages.average_0.weights."
            names = [name for name in folder.entries if name.startswith(prefix)]
            assert len(names) > 10
            assert all(
                read(folder, name) == raw(full[label][name[len(prefix) :]]) for name in names
            )


def test_never_imports_torch(saved: Path) -> None:
    """`dist-ema inspect` looks into a folder without torch, and lists its tensors."""
    code = (
        "import sys; from dist_ema.cli import main\n"
        "code = main(['inspect', sys.argv[1]])\n"
        "print(code, sorted({'torch', 'pickle5', 'safetensors'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "0 []"
    assert "app.model.transposed" in done.stdout
    assert "[4, 3]" in done.stdout


def test_without_a_plan(copy: Path) -> None:
    """Planners that do not flatten leave no paths: names stay whole."""
    edit(copy, lambda said: setattr(said, "planner_data", None))
    with torch_dcp.Folder(copy) as folder:
        assert folder.paths["app.model.half"] == ("app.model.half",)


# --- what is not sound ----------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite .metadata, as somebody with torch would."""
    said = pickle.loads((folder / torch_dcp.META).read_bytes())
    change(said)
    (folder / torch_dcp.META).write_bytes(pickle.dumps(said))


def chunk(said: Any, name: str) -> Any:
    return said.state_dict_metadata[name].chunks[0]


def place(said: Any, name: str) -> Any:
    return next(value for key, value in said.storage_data.items() if key.fqn == name)


def swap_places(said: Any) -> None:
    """The bytes of one weight for those of another."""
    a, b = place(said, "app.model.half"), place(said, "app.model.middle")
    a.offset, a.length, b.offset, b.length = b.offset, b.length, a.offset, a.length


def overlap(said: Any) -> None:
    """Two halves of a (4, 3) weight that are both the first."""
    kind = type(chunk(said, "app.model.parameter"))
    said.state_dict_metadata["app.model.parameter"].chunks = [
        kind(torch.Size([0, 0]), torch.Size([2, 3]))
    ] * 2


def share(said: Any) -> None:
    """Two weights in the same bytes, as a small folder that claims a large model would have
    them.
    """
    a, b = place(said, "app.model.half"), place(said, "app.model.middle")
    b.relative_path, b.offset, b.length = a.relative_path, a.offset, a.length


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "outside": (
        lambda s: setattr(place(s, "app.model.half"), "relative_path", "../__0_0.distcp"),
        "no file of the folder",
    ),
    "absolute": (
        lambda s: setattr(place(s, "app.model.half"), "relative_path", os.sep + "etc"),
        "no file of the folder",
    ),
    "parent": (
        lambda s: setattr(place(s, "app.model.half"), "relative_path", ".."),
        "no file of the folder",
    ),
    "a number for a file": (
        lambda s: setattr(place(s, "app.model.half"), "relative_path", 7),
        "no file of the folder",
    ),
    "another file": (
        lambda s: setattr(place(s, "app.model.half"), "relative_path", "__9_0.distcp"),
        "is not there",
    ),
    "beyond the end": (
        lambda s: setattr(place(s, "app.model.half"), "length", 10**9),
        "It was cut short",
    ),
    "before the start": (
        lambda s: setattr(place(s, "app.model.half"), "offset", -1),
        "sizes that are none",
    ),
    "compressed": (
        lambda s: setattr(place(s, "app.model.half"), "transform_descriptors", ["zstd"]),
        "only its writer can",
    ),
    "nowhere": (lambda s: s.storage_data.clear(), "names no file for a chunk"),
    "too large a chunk": (
        lambda s: setattr(chunk(s, "app.model.half"), "sizes", torch.Size([34])),
        "lies outside its shape",
    ),
    "too small a chunk": (
        lambda s: setattr(chunk(s, "app.model.half"), "sizes", torch.Size([32])),
        "do not cover its shape",
    ),
    "no chunk": (
        lambda s: s.state_dict_metadata["app.model.half"].chunks.clear(),
        "do not cover its shape",
    ),
    "a huge weight": (
        lambda s: s.state_dict_metadata["app.model.half"].__dict__.update(
            size=torch.Size([1 << 50]),
            chunks=[type(chunk(s, "app.model.half"))(torch.Size([0]), torch.Size([1 << 50]))],
        ),
        "is larger than the",
    ),
    "many dimensions": (
        lambda s: s.state_dict_metadata["app.model.scalar"].__dict__.update(
            size=torch.Size([1] * 65)
        ),
        "damaged pickle",
    ),
    "no sizes": (lambda s: setattr(chunk(s, "app.model.half"), "sizes", None), "TypeError"),
    "no properties": (
        lambda s: setattr(s.state_dict_metadata["app.model.half"], "properties", 3),
        "expected TensorProperties, found a int",
    ),
    "no table": (lambda s: setattr(s, "state_dict_metadata", [1]), "AttributeError"),
    "swapped": (swap_places, "is not the tensor that .metadata names"),
    "overlap": (overlap, "its chunks overlap"),
    "one place for two": (
        share,
        "middle: its chunks overlap those of app.model.half in __0_0.distcp",
    ),
    "too few bytes": (
        lambda s: setattr(place(s, "app.model.half"), "length", 33),
        "is larger than the 33 bytes",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_edited(what: str, copy: Path) -> None:
    """A .metadata that contradicts itself, its files, or leads out of the folder."""
    change, words = EDITS[what]
    edit(copy, change)
    with pytest.raises(ValueError, match=words), torch_dcp.Folder(copy) as folder:
        for name in folder.entries:
            read(folder, name)


def test_other_dtypes_are_listed(tmp_path: Path) -> None:
    """What safetensors cannot hold is no entry, and says why."""
    dcp.save(
        {"w": torch.ones(2), "wide": torch.ones(2, dtype=torch.complex128)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    with torch_dcp.Folder(tmp_path) as folder:
        assert list(folder.entries) == ["w"]
        assert "torch.complex128" in folder.others["wide"]


def test_what_is_left_out_is_said(tmp_path: Path, call: Call) -> None:
    """inspect lists what is no weight, and why."""
    wide = torch.ones(2, dtype=torch.complex128)
    dcp.save(
        {"w": torch.ones(2), "step": 7, "wide": wide, "name": {"x": "y"}},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    code, out, _ = call("inspect", tmp_path)
    assert code == 0
    assert "left out  no tensor: step, name.x\n" in out
    for verb in (["export", tmp_path], ["average", tmp_path, tmp_path], ["convert", tmp_path]):
        code, _, err = call(*verb, tmp_path.parent / "out")
        assert (code, "of torch.complex128" in err, err.count("\n")) == (1, True, 1), verb
        assert not (tmp_path.parent / "out").exists()
    assert call("diff", tmp_path, tmp_path)[0] == 1
    assert "left out  of torch.complex128, which safetensors cannot hold: wide\n" in out
    said = json.loads(call("inspect", tmp_path, "--json")[1])
    assert {name: why.split()[0] for name, why in said["others"].items()} == {
        "step": "no",
        "wide": "of",
        "name.x": "no",
    }


def test_items_that_are_no_plain_tensors(copy: Path) -> None:
    """Compressed records, views that use an element twice, other sizes, lazy conjugates, and what
    is no tensor at all.
    """
    items = {
        "middle is no sound archive of torch.save: data.pkl is compressed": (
            "app.model.middle",
            torch.ones(14),
        ),
        "reaches beyond": ("app.model.middle", torch.ones(1).expand(14)),
        "is not the tensor": ("app.model.middle", torch.ones(15)),
        "damaged pickle": ("app.model.complex", torch.ones(3, dtype=torch.complex64).conj()),
        "is no tensor that dist_ema can read": ("app.model.middle", "x" * (2 << 20)),
    }
    for words, (name, content) in items.items():
        item = copy / "item.distcp"
        torch.save(content, item)
        if words.endswith("compressed"):
            compress(item)

        def point(said: Any, name: str = name, length: int = item.stat().st_size) -> None:
            vars(place(said, name)).update(relative_path="item.distcp", offset=0, length=length)

        sound = (copy / torch_dcp.META).read_bytes()
        edit(copy, point)
        with pytest.raises(ValueError, match=words), torch_dcp.Folder(copy) as folder:
            read(folder, name)
        (copy / torch_dcp.META).write_bytes(sound)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def test_metadata_that_is_no_file(tmp_path: Path) -> None:
    """A folder, or a pipe that nobody writes to."""
    (tmp_path / torch_dcp.META).mkdir()
    with pytest.raises(ValueError, match="is no file"):
        torch_dcp.Folder(tmp_path)


# --- what would run -------------------------------------------------------------------------------


class Evil:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._how = call, args

    def __reduce__(self) -> Any:
        return self._how


def touch(marker: Path) -> dict[str, Any]:
    """Attacks that would make the file `marker`, by what must be refused."""
    made = f"open({str(marker)!r}, 'w')"
    opened = Evil(builtins.eval, made)
    return {
        f"{os.system.__module__}.system": Evil(os.system, f"touch {marker}"),
        "builtins.eval": opened,
        "builtins.exec": Evil(builtins.exec, made),
        "builtins.open": Evil(open, str(marker), "w"),
        "builtins.getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "builtins.__import__": Evil(__import__, "os"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "torch.serialization.load": Evil(torch.load, str(marker)),
        "functools.partial": Evil(functools.partial, os.system, f"touch {marker}"),
        "operator.methodcaller": Evil(operator.methodcaller, "system"),
        "pickle.loads": Evil(pickle.loads, pickle.dumps(opened)),
        "pathlib.Path.touch": Evil(Path.touch, marker),
        "builtins.map": Evil(map, os.system, [f"touch {marker}"]),
    }


# Pickles of protocol 2 use the names that Python 2 had, and getattr for what lies in a class.
OTHERS = ("torch.nn.modules.linear.Linear", "collections.Counter")
REFUSED = {
    name: f"{name.rpartition('.')[2]}, which dist_ema refuses"
    for name in (*touch(Path("x")), *OTHERS)
}
REFUSED["pathlib.Path.touch"] = "which dist_ema refuses"


def short(text: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def by_hand(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Attacks that no pickler writes: (pickle, what must be said)."""
    name = b"ctorch\nSize\n"
    return {
        "dots": (
            short("torch") + short("Size.__new__") + pickle.STACK_GLOBAL + b".",
            "torch.Size.__new__",
        ),
        "a path to a function": (
            short("torch.distributed.checkpoint.metadata")
            + short("Metadata.__init__.__globals__")
            + pickle.STACK_GLOBAL
            + b".",
            "__globals__",
        ),
        "a call of a text": (short("os") + b")" + pickle.REDUCE + b".", "calls a str"),
        "a call of a record": (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n)R)R.",
            "calls a Record",
        ),
        "a call of a dtype": (b"ctorch\nfloat32\n)R.", "calls a str"),
        "a call of a new object": (short("os") + b")" + pickle.NEWOBJ + b".", "calls a str"),
        "arguments that are no tuple": (
            name + b"]" + pickle.REDUCE + b".",
            "calls a StandIn with a list",
        ),
        "the state of a function": (name + b"}" + pickle.BUILD + b".", "sets the state"),
        "the state of a list": (b"]}" + pickle.BUILD + b".", "sets the state of a list"),
        "items of a record": (
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n)R"
            + short("a")
            + b"N"
            + pickle.SETITEM
            + b".",
            "sets items of a Record",
        ),
        "append to a function": (name + b"N" + pickle.APPEND + b".", "appends to a StandIn"),
        "an outside object": (short("x") + pickle.BINPERSID + b".", "object outside itself"),
        "an extension": (pickle.EXT1 + b"\1.", "opcode 0x82"),
        "an instance": (b"(ios\nsystem\n.", "opcode 0x69"),
        "an old text": (b"S'x'\n.", "opcode 0x53"),
        "names of numbers": (
            b"K\1K\2" + pickle.STACK_GLOBAL + b".",
            "STACK_GLOBAL requires str",
        ),
        "nested keys": (
            b"})N" + pickle.SETITEM + b".",
            "uses a tuple as a key",
        ),
        "a number of a million bytes": (pickle.LONG4 + b"\0\0\x10\0" + b"." * 20, "opcode 0x8b"),
        "a long number": (pickle.LONG1 + b"\xff" + b"\1" * 255 + b".", "a number of 255 bytes"),
        "a text longer than the file": (
            pickle.BINUNICODE8 + b"\xff" * 7 + b"\x7f" + b"x.",
            "damaged pickle",
        ),
        "nothing on the stack": (b"R.", "damaged pickle"),
        "no end": (b"N", "damaged pickle"),
        "an empty file": (b"", "damaged pickle"),
        "a mark too few": (b"t.", "damaged pickle"),
        "wrong arguments": (name + b")" + pickle.REDUCE + b".", "damaged pickle"),
        "negative sizes": (
            name + b"](J\xff\xff\xff\xffe" + pickle.TUPLE1 + pickle.REDUCE + b".",
            "damaged pickle",
        ),
        "a memo of nothing": (b"h\7.", "damaged pickle"),
        "a far memo": (b"Nr\xff\xff\xff\xff0h\1.", "damaged pickle"),
        "something else": (b"N.", "expected a Metadata, found a NoneType"),
    }


def refused(folder: Path, words: str, marker: Path) -> None:
    with (
        pytest.raises(ValueError, match=re.escape(words)) as caught,
        torch_dcp.Folder(folder) as opened,
    ):
        for name in opened.entries:
            read(opened, name)
    assert "\n" not in str(caught.value)
    assert not marker.exists(), "it ran"


def test_attacks_on_metadata(copy: Path, tmp_path: Path) -> None:
    """Calls at the top, in a place that is read, in one that is not, and as a key: refused by name,
    and not run.
    """
    marker = tmp_path / "ran"
    for words, evil in touch(marker).items():
        for protocol in (2, 4):
            (copy / torch_dcp.META).write_bytes(pickle.dumps(evil, protocol))
            refused(copy, REFUSED[words], marker)


def test_attacks_deep_inside(copy: Path, tmp_path: Path) -> None:
    """In parts of .metadata that nobody would need to read, and in a path."""
    marker = tmp_path / "ran"
    sound = (copy / torch_dcp.META).read_bytes()
    for where in ("planner_data", "storage_meta", "version"):
        (copy / torch_dcp.META).write_bytes(sound)
        edit(
            copy,
            lambda said, where=where: setattr(
                said, where, {"a": [("b", touch(marker)["builtins.eval"])]}
            ),
        )
        refused(
            copy, "asks for builtins.eval, which dist_ema refuses. Nothing in it was run.", marker
        )
    (copy / torch_dcp.META).write_bytes(sound)
    edit(
        copy,
        lambda said: setattr(
            place(said, "app.model.half"), "relative_path", touch(marker)["subprocess.Popen"]
        ),
    )
    refused(copy, "asks for subprocess.Popen", marker)


@pytest.mark.parametrize("what", by_hand(Path("x")))
def test_attacks_by_hand(what: str, copy: Path, tmp_path: Path) -> None:
    """Opcodes put together on purpose."""
    data, words = by_hand(tmp_path / "ran")[what]
    (copy / torch_dcp.META).write_bytes(b"\x80\4" + data)
    refused(copy, words, tmp_path / "ran")


def test_attacks_on_items(copy: Path, tmp_path: Path) -> None:
    """A sound .metadata that points to a tensor whose own pickle calls."""
    marker = tmp_path / "ran"
    attacks = touch(marker)
    attacks |= dict(zip(OTHERS, (nn.Linear(2, 2), Counter("aab")), strict=True))
    for words, evil in attacks.items():
        item = copy / "evil.distcp"
        torch.save({"w": evil}, item)

        def point(said: Any, item: Path = item) -> None:
            vars(place(said, "app.model.middle")).update(
                relative_path=item.name, offset=0, length=item.stat().st_size
            )

        edit(copy, point)
        refused(copy, REFUSED[words], marker)


def test_bombs(tmp_path: Path) -> None:
    """Small pickles that would take exponential time, deep recursion, or all memory."""
    laughs = b"]" + (pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2) * 200 + b"."
    assert len(unpickler.read(laughs, {}, "laughs")) == 2
    deep = unpickler.read(b"]" + pickle.TUPLE1 * 100_000 + b".", {}, "deep")
    depth = 0
    while deep:  # taken apart by hand: freeing it at once is the interpreter's own affair
        deep, depth = deep[0], depth + 1
    assert depth == 100_000
    with pytest.raises(ValueError, match="damaged"):
        unpickler.read(b"N" + b"r\xff\xff\xff\x7f" + b"0" + b"h\1.", {}, "memo")
    with pytest.raises(ValueError, match="dist_ema reads up to"):
        unpickler.read(bytes(unpickler.MAX_BYTES + 1), {}, "zeros")
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(1 << 40)  # nothing on disk; reading it would end in MemoryError
    (tmp_path / "folder").mkdir()
    huge.rename(tmp_path / "folder" / torch_dcp.META)
    with pytest.raises(ValueError, match="dist_ema reads up to"):
        torch_dcp.Folder(tmp_path / "folder")


# Small pickles that make the C unpickler allocate, recurse or compute without a bound: (pickle,
# what must be said).
BOUNDED = {
    "a far memo index": (b"Nr\xff\xff\xff\x7f.", ""),
    "many far memo indices": (
        b"N"
        + b"".join(b"r" + i.to_bytes(4, "little") for i in range(1 << 31, 1 << 32, 1 << 21))
        + b".",
        "",
    ),
    "bytes that are not there": (b"B\xff\xff\xff\xff.", "damaged pickle"),
    "bytes of 64 bits": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "opcode 0x8e"),
    "a byte array": (b"\x96" + b"\xff" * 4 + b"\0\0\0\0.", "opcode 0x96"),
    "a text that is not there": (b"X\xff\xff\xff\xff.", "damaged pickle"),
    "a huge frame": (b"\x95" + b"\xff" * 7 + b"\x7fN.", ""),
    "a huge number": (b"\x8b\xff\xff\xff\x7f.", "opcode 0x8b"),
    "a number in digits": (b"L" + b"9" * 1_000_000 + b"L\n.", "opcode 0x4c"),
    "a deep tuple": (b")" + b"\x85" * 200_000 + b"0N.", ""),
    "a deep key": (b"})" + b"\x85" * 200_000 + b"Ns.", "uses a tuple as a key"),
    "a key whose hash takes 2^60 steps": (
        b"})" + b"q\0h\0\x86" * 60 + b"Ns.",
        "uses a tuple as a key",
    ),
    "a set": (b"\x8f(" + b")" + b"q\0h\0\x86" * 60 + b"\x90.", "opcode 0x8f"),
    "lists that share lists": (b"]" + b"q\0]h\0ah\0a" * 100_000 + b".", ""),
    "more objects than fit": (b"]" * (4 << 20), "needs more memory"),
    "marks": (b"(" * (4 << 20), "needs more memory"),
}


def test_bounds() -> None:
    """Each is over in seconds, in 192 MB of further address space: a value, or a ValueError with
    its reason.
    """
    code = (
        "import pathlib, pickle, re, resource, sys, time\n"
        "from dist_ema.foreign import unpickler\n"
        "cases = pickle.load(sys.stdin.buffer)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "used = int(re.search(r'VmSize:\\s+(\\d+)', status)[1]) << 10\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (192 << 20),) * 2)\n"
        "for what, (data, words) in cases.items():\n"
        "    start, found = time.monotonic(), ''\n"
        "    try:\n"
        "        unpickler.read(data, {}, 'it')\n"
        "    except ValueError as error:\n"
        "        found = str(error)\n"
        "    if words not in found or bool(words) != bool(found) or time.monotonic() - start > "
        "30:\n"
        "        print(what, repr(found), time.monotonic() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(BOUNDED), capture_output=True, timeout=200
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_cut_and_flipped(copy: Path) -> None:
    """400 copies, cut or with bytes changed: a ValueError of one line, or tensors of some bytes;
    never anything else.
    """
    generator = random.Random(7)
    sound = {name: (copy / name).read_bytes() for name in (torch_dcp.META, "__0_0.distcp")}
    outcomes = {"read": 0, "refused": 0}
    for round_ in range(400):
        name = (torch_dcp.META, "__0_0.distcp")[round_ % 2]
        data = bytearray(sound[name])
        if round_ % 8 < 2:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.choice([1, 3, 30])):
                data[generator.randrange(len(data))] = generator.randrange(256)
        (copy / name).write_bytes(data)
        try:
            with torch_dcp.Folder(copy) as folder:
                for weight in folder.entries:
                    read(folder, weight)
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        (copy / name).write_bytes(sound[name])
    assert min(outcomes.values()) > 40, outcomes


# --- archives -------------------------------------------------------------------------------------


def test_archives(tmp_path: Path) -> None:
    """Records where zipfile says they are, also behind 64-bit directories."""
    torch.save({"w": torch.arange(1000)}, path := tmp_path / "a.pt")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as known:
        want = {info.filename.split("/", 1)[1]: known.read(info) for info in known.infolist()}
    found = torch_zip.records(lambda begin, end: data[begin:end], len(data), "a.pt")
    assert {name: data[begin:end] for name, (begin, end) in found.items()} == want
    with zipfile.ZipFile(path, "w") as new, new.open("a/big", "w", force_zip64=True) as file:
        file.write(b"content")
    data = path.read_bytes()
    begin, end = torch_zip.records(lambda begin, end: data[begin:end], len(data), "a.pt")["big"]
    assert data[begin:end] == b"content"
    with pytest.raises(ValueError, match="cut short"):
        torch_zip.records(lambda begin, end: data[begin:end], len(data) - 1, "a.pt")
    for bad in (b"", b"x" + data[:-22] + b"PK\5\6" + b"\xff" * 16 + b"\0\0"):
        with pytest.raises(ValueError, match="no sound archive"):
            torch_zip.records(lambda begin, end, bad=bad: bad[begin:end], len(bad), "bad")


def test_runs() -> None:
    """Random cuts of random shapes, against numpy: every element once, from where it lies."""
    generator = np.random.default_rng(3)
    for _ in range(60):
        shape = tuple(int(n) for n in generator.integers(1, 6, generator.integers(0, 4)))
        whole = np.arange(int(np.prod(shape)))
        cuts = [sorted({0, n, *map(int, generator.integers(0, n + 1, 2))}) for n in shape]
        chunks = [Chunk((), ())]
        for edges in cuts:
            chunks = [
                Chunk((*c.offsets, a), (*c.sizes, b - a))
                for c in chunks
                for a, b in itertools.pairwise(edges)
            ]
        runs = torch_dcp.chunk_runs(shape, chunks)
        dense = [
            whole.reshape(shape)[
                tuple(slice(o, o + s) for o, s in zip(c.offsets, c.sizes, strict=True))
            ].ravel()
            for c in chunks
        ]
        parts = zip(runs.lengths.tolist(), runs.chunks.tolist(), runs.inside.tolist(), strict=True)
        assert np.array_equal(np.concatenate([dense[i][at : at + n] for n, i, at in parts]), whole)
