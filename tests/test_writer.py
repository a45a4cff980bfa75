"""The saved form: canonical, atomic, checked, and an error everywhere when it is an error
anywhere.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

import dist_ema
from dist_ema import EMA, Uniform, load_file
from dist_ema.checkpoint import atomic, disk, manifest
from dist_ema.distributed import connections, machines, receiver
from tests._models import Core, Images, Net
from tests._oracle import Collectives, Training
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def ema() -> EMA:
    torch.manual_seed(0)
    model = Core()
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    return ema


# --- what is durable ---------------------------------------------------------------------------


def test_every_file_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that holds only empty weights too: no rank writes into it after it is made."""
    real, synced = os.fsync, set()

    def note(fd: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    model = nn.Module()
    model.full, model.void = nn.Parameter(torch.ones(99)), nn.Parameter(torch.ones(0, 3))
    EMA(model, 0.5).save(tmp_path / "average", max_shard_size="100B")
    files = {each.name for each in (tmp_path / "average").iterdir()}
    assert len(files) == 4  # two shards, the index, ema.json
    assert files <= synced


# --- what is in it --------------------------------------------------------------------------------


def test_a_save_is_a_model(ema: EMA, tmp_path: Path) -> None:
    """Every tool that reads safetensors can read it; aliases are back in load_file, so a strict
    load passes.
    """
    ema.save(tmp_path / "average", extra={"epoch": 3})
    full = ema.gather()
    stored = load_file(tmp_path / "average")
    assert stored.keys() == full.keys()
    assert all(torch.equal(stored[name], full[name]) for name in full)
    model = Core()
    model.load_state_dict(stored, strict=True)
    plain = safetensors.torch.load_file(tmp_path / "average" / "model.safetensors")
    assert set(full) - set(plain) == {"head.weight"}, "a tied weight is written once"
    meta = json.loads((tmp_path / "average" / "ema.json").read_text())
    assert (meta["kind"], meta["weights"], meta["extra"]) == ("ema", "all", {"epoch": 3})
    assert meta["aliases"] == {"emb.weight": ["head.weight"]}
    assert meta["schedules"] == [{"name": "Constant", "decay": 0.5}]
    stored["gate.bias"] += 1  # copy on write: the file stays


def test_only_keeps_the_averaged_weights(tmp_path: Path) -> None:
    model = Core()
    ema = EMA(model, 0.5, only=r"^blocks\.")
    ema.save(tmp_path / "part")
    stored = load_file(tmp_path / "part")
    assert stored
    assert all(name.startswith("blocks.") for name in stored)
    again = EMA(Core(), 0.5, only=r"^blocks\.")
    again.load(tmp_path / "part")
    assert all(torch.equal(again.gather()[name], stored[name]) for name in stored)
    with pytest.raises(ValueError, match=r"missing \(emb.weight"):
        EMA(Core(), 0.5).load(tmp_path / "part")


def test_export(ema: EMA, tmp_path: Path) -> None:
    full = ema.gather()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ema.export(folder, dtype=torch.bfloat16, max_shard_size=300)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    ema.export(folder, dtype=torch.bfloat16)
    assert sorted(files_of(folder)) == ["config.json", "ema.json", "model.safetensors"], (
        "stale shards are gone"
    )
    stored = load_file(folder)
    assert {stored[name].dtype for name in ema.names()} == {torch.bfloat16}
    assert stored["seen"].dtype == torch.int64
    assert all(torch.equal(stored[name], full[name].to(stored[name].dtype)) for name in full)
    ema.export(tmp_path / "one.safetensors")
    assert load_file(tmp_path / "one.safetensors").keys() == full.keys()
    assert safetensors.torch.load_model(Core(), tmp_path / "one.safetensors") == (set(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "out"], (
        "no temporary is left"
    )
    half = nn.Linear(2, 2).to(torch.bfloat16)
    EMA(half, 0.5).export(tmp_path / "half")
    assert load_file(tmp_path / "half")["weight"].dtype == torch.bfloat16, "the model's own dtype"


def publish_once(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """A version is written behind training, so its weights are cast when they are staged."""
    ema = EMA(model, 0.5)
    handle = ema.publish(folder, every=1, dtype=dtype)
    ema.update()
    handle.remove()


def test_too_large_for_the_dtype(tmp_path: Path) -> None:
    """A finite value must not become infinite; what was infinite may stay so.

    Only floats are a dtype to ship.
    """
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.bias.fill_(70000.0)
    refused = "bias holds values that are too large for torch.float16"
    with pytest.raises(ValueError, match=refused):
        EMA(model, 0.5).export(tmp_path / "a", dtype=torch.float16)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match=refused):
        publish_once(model, tmp_path / "b", torch.float16)
    for dtype in (torch.int8, torch.complex64, "bf16"):
        with pytest.raises(ValueError, match="dtype must be a floating dtype"):
            EMA(model, 0.5).export(tmp_path / "a", dtype=dtype)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert list((tmp_path / "b").iterdir()) == []
    with torch.no_grad():
        model.bias.fill_(math.inf)
    EMA(model, 0.5).export(tmp_path / "a", dtype=torch.float16)
    publish_once(model, tmp_path / "b", torch.float16)
    assert load_file(tmp_path / "a")["bias"].item() == math.inf
    for path in (tmp_path / "a", tmp_path / "b/version-000001"):
        found = load_file(path)
        assert not found["bias"].isfinite()
        assert found["weight"].isnan().tolist() == [[True, False]]


def test_complex128_cannot_be_written(tmp_path: Path) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="w is torch.complex128"):
        EMA(model, 0.5, dtype=torch.float64).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_export_over_an_export(ema: EMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies beside the model files stays, in the new folder that takes the place of the old
    one. An error before that changes nothing.
    """
    folder = tmp_path / "out"
    ema.export(folder, max_shard_size=300)
    (folder / "vocab" / "inner").mkdir(parents=True)
    (folder / "vocab" / "inner" / "merges.txt").write_text("m")
    (folder / "config.json").write_text("{}")
    (folder / "unet").symlink_to("vocab")
    safetensors.torch.save_file(
        {"live": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors"
    )
    folder.chmod(0o750)
    before = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish", None)
        with pytest.raises(TypeError):
            ema.export(folder)
    assert files_of(folder) == before
    ema.export(folder)
    kept = {
        name: data for name, data in before.items() if not name.startswith(("model", "ema.json"))
    }
    assert len(kept) >= 3
    after = files_of(folder)
    assert {name: after[name] for name in kept} == kept
    assert after.keys() - kept.keys() == {"model.safetensors", "ema.json"}
    assert os.readlink(folder / "unet") == "vocab"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["out"]


# --- refusing -------------------------------------------------------------------------------------


def test_targets_that_are_not_ours(ema: EMA, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(ValueError, match="it is not ours to replace"):
        ema.save(tmp_path / "thesis")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        ema.save(tmp_path / "file")
    with pytest.raises(ValueError, match="is a folder"):
        (tmp_path / "d.safetensors").mkdir()
        ema.export(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"Name e for a folder, or e\.safetensors for one file"):
        ema.export(tmp_path / "e.pt")
    with pytest.raises(ValueError, match="mode must be"):
        ema.save(tmp_path / "x", mode="fast")  # type: ignore[arg-type]
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "x"
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_nothing_else_is_replaced(ema: EMA, tmp_path: Path) -> None:
    """A save takes the place of a save, not of what somebody put beside its files; an export takes
    no average away.
    """
    ema.save(tmp_path / "a", max_shard_size=300)
    ema.save(tmp_path / "a", max_shard_size=300)
    with pytest.raises(ValueError, match="average to resume from"):
        ema.export(tmp_path / "a")
    ema.export(tmp_path / "b")
    ema.export(tmp_path / "b")
    ema.save(tmp_path / "b")
    (tmp_path / "a" / "optimizer.pt").write_text("x")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"a holds optimizer.pt, which ema.save\(\) did not write"):
        ema.save(tmp_path / "a")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ('{"decay": 0.999}', "config/model.safetensors, ema.json, train.py"),  # of another program
        ('{"format": 1}', "config/model.safetensors, train.py"),
        ('{"format": 1, "files": {"model', "config/model.safetensors, train.py"),  # cut
    ],
)
def test_an_ema_json_that_names_no_files(content: str, held: str, ema: EMA, tmp_path: Path) -> None:
    """What else lies there stays; a damaged save alone is replaced."""
    folder = tmp_path / "a"
    ema.save(folder, max_shard_size=300)
    (folder / "ema.json").write_text(content)
    (folder / "train.py").write_text("x")
    (folder / "config").mkdir()
    (folder / "config" / "model.safetensors").write_text("x")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"a holds {held}, which ema.save\(\) did not write"):
        ema.save(folder)
    assert files_of(tmp_path) == before
    (folder / "train.py").unlink()
    shutil.rmtree(folder / "config")
    if "format" in content:
        ema.save(folder)
        assert load_file(folder).keys() == ema.gather().keys()


def test_what_comes_while_it_is_written_stays(
    ema: EMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside those of a save, a file in place of the folder, a folder in place of a file:
    refused as at the beginning, and nothing is removed.
    """
    sync = disk.FileWriter.sync
    folder, file = tmp_path / "a", tmp_path / "b.safetensors"

    def beside(target: Path) -> None:
        (target / "notes").write_text("x")

    def instead(target: Path) -> None:
        target.rename(tmp_path / "elsewhere")
        target.write_text("x")

    ema.save(folder)
    for target, verb, comes, refused in (
        (folder, ema.save, beside, "holds notes, which"),
        (folder, ema.save, instead, "is a file"),
        (folder, ema.export, Path.touch, "is a file"),
        (file, ema.export, Path.mkdir, "is a folder"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=refused):
            patch.setattr(
                disk.FileWriter,
                "sync",
                lambda self, every: (comes(target), sync(self, every)),  # noqa: B023
            )
            verb(target)
        if comes is beside:
            (folder / "notes").unlink()
        if comes is instead:
            folder.unlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b.safetensors", "elsewhere"]


def test_the_temporary_folder_is_removed(
    ema: EMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever cleans up: the error names it, and the earlier version stays."""
    ema.save(tmp_path / "a")
    before, isdir = files_of(tmp_path), os.path.isdir

    def remove(path: Path) -> bool:
        if ".tmp-" in str(path):
            shutil.rmtree(path)
        return isdir(path)

    monkeypatch.setattr(os.path, "isdir", remove)
    with pytest.raises(RuntimeError, match=r"^ema.save\(\): .*/\.a\.tmp-\w+ is gone, in which"):
        ema.save(tmp_path / "a")
    assert files_of(tmp_path) == before


def test_the_working_directory(ema: EMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the same folder under a save or an export; one that is gone is named."""
    for verb in (ema.save, ema.export):
        folder = tmp_path / verb.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        for version in range(2):
            verb(".")
            Path("log").write_text(str(version))  # raises where the folder was exchanged
            assert load_file(".").keys() == load_file(folder).keys()
            (folder / "log").unlink()
        assert sorted(os.listdir(folder)) == ["ema.json", "model.safetensors"]
    shutil.rmtree(folder)
    for call in (ema.save, ema.export, ema.load, load_file):
        with pytest.raises(FileNotFoundError, match="working directory .* removed.*'ema'"):
            call("ema")


@pytest.mark.parametrize(
    "extra", [{"best": math.inf}, {"loss": math.nan}, {"a": {1, 2}}, {"a": "\ud800"}, [1]], ids=str
)
def test_extra_that_no_reader_takes(extra: Any, ema: EMA, tmp_path: Path) -> None:
    """Refused at the call: a save that cannot be loaded would be found out after training."""
    for wait in (True, False):
        with pytest.raises(ValueError, match="extra|ema.json cannot hold"):
            ema.save(tmp_path / "a", extra=extra, wait=wait)
    assert list(tmp_path.iterdir()) == []


def test_extra_comes_back(ema: EMA, tmp_path: Path) -> None:
    """JSON makes texts of keys, which sort otherwise than numbers: the check sum is that of what is
    read.
    """
    ema.save(tmp_path / "a", extra={"of epoch": {2: "a", 10: ("b", None)}})
    ema.load(tmp_path / "a")
    assert manifest.read(tmp_path / "a").extra == {"of epoch": {"2": "a", "10": ["b", None]}}


def test_all_differences_at_once(ema: EMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a")
    other = Core(hidden=4)
    other.extra = nn.Linear(1, 1)
    del other.gate
    other.forward = lambda x: x
    target = EMA(other, 0.5)
    before = [slot.shadow.clone() for slot in target.weights.averages[0].averaged]
    with pytest.raises(ValueError, match="disagree on 7 weights") as error:
        target.load(tmp_path / "a")
    for words in (
        "2 missing (extra.weight; extra.bias)",
        "2 unexpected (gate.bias; gate.weight)",
        "(5, 6) on disk, (4, 6) in the model",
    ):
        assert words in str(error.value)
    assert all(
        torch.equal(a, slot.shadow)
        for a, slot in zip(before, target.weights.averages[0].averaged, strict=True)
    )


def test_damage_is_found(ema: EMA, tmp_path: Path) -> None:
    """One flipped bit is found by the check sum, a cut file always; nothing is loaded then."""
    folder = tmp_path / "a"
    ema.save(folder)
    ema.load(folder)
    good = (folder / "model.safetensors").read_bytes()
    now = ema.gather()
    for position in (len(good) - 1, len(good) - 200):
        bad = bytearray(good)
        bad[position] ^= 1
        (folder / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged"):
            ema.load(folder)
    ema.load(folder, verify=False)
    (folder / "model.safetensors").write_bytes(good[:-8])
    for verify in (True, False):
        with pytest.raises(ValueError, match="cut short"):
            ema.load(folder, verify=verify)
    (folder / "model.safetensors").write_bytes(good)
    ema.load(folder)
    assert all(torch.equal(ema.gather()[name], now[name]) for name in now)
    meta = json.loads((folder / "ema.json").read_text())
    (folder / "ema.json").write_text(json.dumps(meta | {"format": 3}))
    with pytest.raises(ValueError, match="holds format 3"):
        ema.load(folder)
    for odd in (
        {"clock": {}},
        {"clock": meta["clock"] | {"now": "late"}},
        {"schedules": []},
        {"schedules": [{"name": "Sun"}]},
    ):
        (folder / "ema.json").write_text(json.dumps(meta | odd))
        with pytest.raises(ValueError, match="is damaged"):
            ema.load(folder)
    assert all(torch.equal(ema.gather()[name], now[name]) for name in now), "nothing was changed"
    ema.export(tmp_path / "export")
    with pytest.warns(UserWarning, match="is an export"):
        ema.load(tmp_path / "export")
    with pytest.raises(ValueError, match="no folder"):
        ema.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        load_file(tmp_path / "nowhere")


def test_another_schedule_is_said(ema: EMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"Constant\(decay=0.5\).*Uniform\(\)"):
        EMA(Core(), Uniform()).load(tmp_path / "a")


def test_nothing_is_ever_pickled() -> None:
    """No module of the package imports pickle or calls torch.save; torch.load only reads tensors:
    other tools' files.
    """
    for path in Path(dist_ema.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            assert "pickle" not in names or path.name == "unpickler.py", path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                # Numbers of opcodes, and the class whose find_class and opcode table are narrowed.
                allowed = node.attr.isupper() or node.attr in (
                    "_Unpickler",
                    "UnpicklingError",
                    "decode_long",
                )
                assert allowed, node.attr
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called != "torch.save", path
            if called == "torch.load":
                assert path.name in ("torch_save.py", "timm.py")
                assert "weights_only=True" in ast.unparse(node)


# --- ranks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_windows() -> Iterator[list[int]]:
    """Streams move 24 bytes at a time inside; yields how many bytes each send of weights had."""
    sent: list[int] = []
    real, window = receiver.windows, receiver.WINDOW

    def windows(runs: Iterable[receiver.Run]) -> Iterator[list[receiver.Run]]:
        for each in real(runs):
            sent.append(sum(len(run.data) for run in each))
            yield each

    receiver.windows, receiver.WINDOW = windows, 24
    try:
        yield sent
    finally:
        receiver.windows, receiver.WINDOW = real, window


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that this rank opens to write parts of them, as often as it does."""
    opened: list[str] = []

    class Target(disk.Target):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

    real, disk.Target = disk.Target, Target  # type: ignore[misc]
    try:
        yield opened
    finally:
        disk.Target = real  # type: ignore[misc]


def direct_and_stream(folder: str) -> None:
    """Two ways to write, one file; writing in place needs no collective, and an overwrite replaces
    all.
    """
    for kind in ("ddp", "fsdp1 flat", "fsdp2"):
        run = Training(kind)
        ema = EMA(run.model, 0.5)
        ema.attach(run.optimizer)
        run.train(2)
        with Collectives() as collectives, opened_files() as opened:
            ema.save(f"{folder}/direct", mode="direct", max_shard_size=500)
        assert collectives.count == 0
        assert len(opened) == len(set(opened)) > 1
        with small_windows() as sent:
            ema.save(f"{folder}/stream", mode="stream", max_shard_size=500)
        assert dist.get_rank() == 0 or 0 < max(sent) <= 24
        ema.export(f"{folder}/{kind.replace(' ', '-')}.safetensors")
        if dist.get_rank() == 0:
            one, two = (files_of(Path(folder) / name) for name in ("direct", "stream"))
            assert one == two
            assert len(one) > 3
        dist.barrier()
    channels = nn.parallel.DistributedDataParallel(Images().to(memory_format=torch.channels_last))
    ema = EMA(channels, 0.5)
    ema.save(f"{folder}/channels")
    full = ema.gather()
    if full:
        stored = load_file(f"{folder}/channels")
        assert all(torch.equal(stored[name], full[name]) for name in full)
        assert torch.equal(stored["a.weight"], channels.module.a.weight)


class Zoo(nn.Module):
    """Every kind of weight that a file can hold in an awkward place: tied, 0-dim, empty, of 16, 8
    and 64 bits, complex, channels_last, frozen; buffers of bools and integers, and one that no
    state_dict has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.ones(0, 4))
        self.sixteen = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16))
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.sixtyfour = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.randn(3, 3).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("mask", torch.arange(9) % 2 == 0)
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("tiny", torch.arange(-3, 3, dtype=torch.int8))
        self.register_buffer("mean", torch.randn(3).to(torch.float16))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def canonical(folder: str) -> None:
    """The same bytes in every file, whoever holds what, in both modes, now or behind, with several
    averages; and those of a model that nobody wrapped.
    """
    for kind in ("zoo", "net"):
        torch.manual_seed(3)
        twin = Zoo() if kind == "zoo" else Net()
        torch.manual_seed(3)
        # NOTE: gloo cannot send float8, which DDP would at its start.
        model = (
            nn.parallel.DistributedDataParallel(Zoo(), init_sync=False)
            if kind == "zoo"
            else wrap("fsdp2", Net())
        )
        averages = [EMA(each, [0.5, Uniform()]) for each in (twin, model)]
        for ema in averages:
            for number in (1, 2):
                with torch.no_grad():
                    for p in ema.weights.model.parameters():
                        if p.requires_grad:
                            p += number
                ema.update()
        for size in (150, "5GB") if kind == "zoo" else ("5GB",):
            averages[0].save(f"{folder}/want", max_shard_size=size)
            want = files_of(Path(folder, "want")) if dist.get_rank() == 0 else {}
            for mode, wait in (
                ("direct", True),
                ("stream", True),
                ("direct", False),
                ("stream", False),
            ):
                averages[1].save(f"{folder}/{mode}", max_shard_size=size, mode=mode, wait=wait)  # type: ignore[arg-type]
                averages[1]._saving.finish()
                if want:
                    found = files_of(Path(folder, mode))
                    assert {name for name, data in found.items() ^ want.items()} == set(), (
                        kind,
                        size,
                        mode,
                        wait,
                    )
                    assert len(want) > 6 if size == 150 else len(want) == 3
                dist.barrier()
        if want:
            stored, full = load_file(f"{folder}/stream"), twin.state_dict()
            assert stored.keys() == full.keys()
            assert kind == "net" or torch.equal(stored["scalar"], twin.scalar - 1.25)
            assert all(
                torch.equal(stored[name], full[name])
                for name, _ in twin.named_buffers()
                if name in full
            )
            plain = safetensors.torch.load_file(f"{folder}/stream/model.safetensors")
            assert all(
                torch.equal(stored[name], plain[name])
                for name in plain
                if plain[name].dtype.itemsize > 1
            )


def one_rank_fails(folder: str) -> None:
    """A disk that is full for one rank is an error on all; the average that was there is whole, the
    temporary is gone.
    """
    model = nn.parallel.DistributedDataParallel(nn.Linear(300, 400))
    ema = EMA(model, 0.5)
    ema.timeout = 20
    ema.save(f"{folder}/kept")
    before = files_of(Path(folder) / "kept") if dist.get_rank() == 0 else {}
    for broken in (0, 1):
        dist.barrier()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limit[1]))
        kind, words = (
            (OSError, "File too large")
            if dist.get_rank() == broken
            else (RuntimeError, f"failed on rank {broken}")
        )
        try:
            with raises(kind, words):
                ema.save(f"{folder}/kept", mode="direct")
            if broken == 0:
                with raises(kind, words):
                    ema.save(f"{folder}/kept", mode="stream")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    dist.barrier()
    if dist.get_rank() == 0:
        assert files_of(Path(folder) / "kept") == before
        assert os.listdir(folder) == ["kept"]
    with raises(ValueError if dist.get_rank() == 0 else RuntimeError, "no folder"):
        ema.load(f"{folder}/nowhere")
    if dist.get_rank() == 0:
        (Path(folder) / "kept" / "model.safetensors").write_bytes(b"x" * 100)
    dist.barrier()
    with raises((ValueError, RuntimeError), "model.safetensors"):  # type: ignore[arg-type]
        ema.load(f"{folder}/kept")
    ema.update()


def ranks_that_differ(folder: str) -> None:
    """Ranks that would write parts of different files are refused, before anything is written."""
    first = dist.get_rank() == 0
    ema = EMA(nn.parallel.DistributedDataParallel(nn.Linear(30, 40)), [0.5, 0.9])
    ema.timeout = 20
    for options in (
        {"which": int(first)},
        {"dtype": torch.bfloat16 if first else None},
        {"max_shard_size": 999 + 3999 * first},
    ):
        with raises(ValueError, f"ema.export(): {next(iter(options))} is ", "on rank 1"):
            ema.export(f"{folder}/differ", **options)
    with raises(ValueError, "ema.save(): mode is 'stream' on rank 0 and None on rank 1"):
        ema.save(f"{folder}/differ", mode="stream" if first else None)
    with raises(ValueError, "ema.save(): extra is {'rank': 0} on rank 0 and {'rank': 1} on rank 1"):
        ema.save(f"{folder}/differ", extra={"rank": dist.get_rank()})
    lazy = nn.Linear(30, 40)
    lazy.register_buffer("cache", None)
    ema = EMA(nn.parallel.DistributedDataParallel(lazy), 0.5)
    lazy.cache = torch.zeros(3) if first else None  # as its forward may fill it
    with raises(ValueError, "ema.save(): the ranks ask for different files"):
        ema.save(f"{folder}/differ")
    dist.barrier()
    assert not [name for name in os.listdir(folder) if "differ" in name]


@contextlib.contextmanager
def obeying_modes() -> Iterator[None]:
    """Root without its power over the modes of files (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH): this
    thread only.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110
    assert libc.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(head, sets) == 0


def permission_lost(folder: str) -> None:
    """On the rank that makes the folder: an error on both that names the place; what was there is
    intact.
    """
    ema = EMA(nn.parallel.DistributedDataParallel(nn.Linear(3, 4)), 0.5)
    ema.timeout = 20
    run, first = Path(folder, "run"), dist.get_rank() == 0
    ema.save(run / "kept")
    before = files_of(run / "kept")
    dist.barrier()
    run.chmod(0o555)
    for path in (run / "kept", run / "new", run / "deep" / "new"):
        for mode in ("direct", "stream"):
            words = ("Permission denied", str(run)) + (() if first else ("failed on rank 0",))
            with obeying_modes(), raises(PermissionError if first else RuntimeError, *words):
                ema.save(path, mode=mode)  # type: ignore[arg-type]
    dist.barrier()
    run.chmod(0o755)
    assert files_of(run / "kept") == before
    assert os.listdir(run) == ["kept"]
    dist.barrier()
    for path, words in (
        (run / "kept" / "ema.json", "is a file"),
        (run / "kept" / "ema.json" / "x", "ema.json is a file"),
    ):
        with raises(ValueError if first else RuntimeError, words):
            ema.save(path)
    ema.save(run / "far" / "away" / "new")
    dist.barrier()
    assert files_of(run / "far" / "away" / "new") == before
    assert files_of(run / "kept") == before


def another_file_system(folder: str) -> None:
    """Rank 1 does not see what rank 0 made: streamed without being told, and refused by name where
    it was told otherwise.
    """
    ema = EMA(nn.parallel.DistributedDataParallel(nn.Linear(30, 40)), 0.5)
    ema.timeout = 20
    hidden = Path(folder, "hidden")
    ema.save(hidden / "seen")
    dist.barrier()
    hidden.chmod(0)
    with obeying_modes() if dist.get_rank() == 1 else contextlib.nullcontext():
        assert hidden.is_dir()
        assert os.path.isdir(hidden / "seen") == (dist.get_rank() == 0)
        ema.save(hidden / "streamed")
        with raises(
            RuntimeError, "mode='direct'", "rank 1 does not see the folder", "pass mode='stream'"
        ):
            ema.save(hidden / "forced", mode="direct")
        dist.barrier()
    hidden.chmod(0o755)
    assert sorted(os.listdir(hidden)) == ["seen", "streamed"]
    assert files_of(hidden / "seen") == files_of(hidden / "streamed")


def other_machines(folder: str) -> None:
    """What the machine is called decides, unless a mode is given: two machines stream, two ranks of
    one write into place.
    """
    model = nn.parallel.DistributedDataParallel(nn.Linear(30, 40))
    assert len(machines.machine_id()) > 3
    assert len(set(EMA(model, 0.5)._entry.ranks.gather("test", machines.machine_id(), list))) == 1
    sent: list[int] = []
    real = connections.Connections.send
    connections.Connections.send = lambda *args: (sent.append(1), real(*args))[1]  # type: ignore[method-assign]
    for machine, mode, streams in (
        (0, None, False),
        (1, None, True),
        (1, "direct", False),
        (0, "stream", True),
    ):
        os.environ[machines.MACHINE] = f"host {machine * dist.get_rank()}"
        sent.clear()
        EMA(model, 0.5).save(f"{folder}/a", mode=mode)  # type: ignore[arg-type]
        assert bool(sent) == (streams and dist.get_rank() == 1), (machine, mode)
    del os.environ[machines.MACHINE]


def nobody_wrapped(folder: str) -> None:
    """A plain module in a job of several ranks: the first writes if all hold the same, else all
    raise.
    """
    torch.manual_seed(0)
    model = Net()
    ema = EMA(model, 0.5)
    ema.save(f"{folder}/plain")
    ema.load(f"{folder}/plain")
    assert load_file(f"{folder}/plain").keys() == ema.gather().keys() == model.state_dict().keys()
    with torch.no_grad():
        model.scale += dist.get_rank()
    ema.update()
    with raises(RuntimeError, "is not wrapped", "scale"):
        ema.save(f"{folder}/plain")


def several(folder: str, works: str) -> None:
    """One after the other, each in a folder of its own below the first word."""
    prefix, *names = works.split()
    for name in names:
        path = Path(folder, prefix, name)
        path.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        globals()[name](str(path))


def test_on_ranks(tmp_path: Path) -> None:
    run_ranks(3, several, str(tmp_path), "a direct_and_stream canonical")
    works = "b one_rank_fails ranks_that_differ nobody_wrapped permission_lost other_machines"
    run_ranks(2, several, str(tmp_path), works + " another_file_system" * (os.geteuid() == 0))
    for kind in ("ddp", "fsdp1-flat", "fsdp2"):
        stored = load_file(tmp_path / "a" / "direct_and_stream" / f"{kind}.safetensors")
        assert set(stored) == set(Net().state_dict())
