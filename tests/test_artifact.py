"""The saved form: canonical, atomic, checked, and an error everywhere when it is an error anywhere."""

from __future__ import annotations

import ast
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

import dist_ema
from dist_ema import EMA, Uniform, load_file
from tests.kit import Collectives, Core, Images, Net, Training, raises, run_ranks


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


# --- what is in it -----------------------------------------------------------------------------------------------


def test_a_save_is_a_model(ema: EMA, tmp_path: Path) -> None:
    """Every tool that reads safetensors can read it; aliases are back in load_file, so a strict load passes."""
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
    assert sorted(files_of(folder)) == ["config.json", "ema.json", "model.safetensors"], "stale shards are gone"
    stored = load_file(folder)
    assert {stored[name].dtype for name in ema.names()} == {torch.bfloat16}
    assert stored["seen"].dtype == torch.int64
    assert all(torch.equal(stored[name], full[name].to(stored[name].dtype)) for name in full)
    ema.export(tmp_path / "one.safetensors")
    assert load_file(tmp_path / "one.safetensors").keys() == full.keys()
    assert safetensors.torch.load_model(Core(), tmp_path / "one.safetensors") == (set(), [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "out"], "no temporary is left"
    half = nn.Linear(2, 2).to(torch.bfloat16)
    EMA(half, 0.5).export(tmp_path / "half")
    assert load_file(tmp_path / "half")["weight"].dtype == torch.bfloat16, "the model's own dtype"


def test_complex128_cannot_be_written(tmp_path: Path) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="w is torch.complex128"):
        EMA(model, 0.5, dtype=torch.float64).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- refusing ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="mode must be"):
        ema.save(tmp_path / "x", mode="fast")  # type: ignore[arg-type]
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "x"
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_all_differences_at_once(ema: EMA, tmp_path: Path) -> None:
    ema.save(tmp_path / "a")
    other = Core(hidden=4)
    other.extra = nn.Linear(1, 1)
    del other.gate
    other.forward = lambda x: x
    target = EMA(other, 0.5)
    before = [slot.shadow.clone() for slot in target._average.profiles[0].averages]
    with pytest.raises(ValueError, match="disagree on 7 weights") as error:
        target.load(tmp_path / "a")
    for words in (
        "2 missing (extra.weight; extra.bias)",
        "2 unexpected (gate.bias; gate.weight)",
        "(5, 6) on disk, (4, 6) in the model",
    ):
        assert words in str(error.value)
    assert all(
        torch.equal(a, slot.shadow) for a, slot in zip(before, target._average.profiles[0].averages, strict=True)
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
    """No module of the package imports pickle, or calls torch.load or torch.save."""
    for path in Path(dist_ema.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert "pickle" not in names, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path


# --- ranks -------------------------------------------------------------------------------------------------------


def direct_and_stream(folder: str) -> None:
    """Two ways to write, one file; writing in place needs no collective, and an overwrite replaces all."""
    for kind in ("ddp", "fsdp1 flat", "fsdp2"):
        run = Training(kind)
        ema = EMA(run.model, 0.5)
        ema.attach(run.optimizer)
        run.train(2)
        with Collectives() as collectives:
            ema.save(f"{folder}/direct", mode="direct", max_shard_size=500)
        assert collectives.count == 0
        ema.save(f"{folder}/stream", mode="stream", max_shard_size=500)
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


def one_rank_fails(folder: str) -> None:
    """A disk that is full for one rank is an error on all; the average that was there is whole, the temporary is gone."""
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
            (OSError, "File too large") if dist.get_rank() == broken else (RuntimeError, f"failed on rank {broken}")
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


def nobody_wrapped(folder: str) -> None:
    """A plain module in a job of several ranks: the first writes if all hold the same, else all raise."""
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


def test_on_ranks(tmp_path: Path) -> None:
    for name, work, world in [("a", direct_and_stream, 3), ("b", one_rank_fails, 2), ("c", nobody_wrapped, 2)]:
        (tmp_path / name).mkdir()
        run_ranks(world, work, str(tmp_path / name))
    for kind in ("ddp", "fsdp1-flat", "fsdp2"):
        stored = load_file(tmp_path / "a" / f"{kind}.safetensors")
        assert set(stored) == set(Net().state_dict())


def die_while_saving(folder: str, victim: int) -> Any:
    """SIGKILL of one rank in the middle of overwriting saves."""
    import signal
    import threading
    import time

    run = Training("fsdp2")
    ema = EMA(run.model, 0.5)
    ema.timeout = 5
    ema.save(f"{folder}/average", extra={"version": 0})
    if dist.get_rank() == victim:
        threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    for version in range(1, 500):
        with torch.no_grad():
            for slot in ema._average.profiles[0].averages:
                slot.shadow.fill_(float(version))
        ema.save(f"{folder}/average", extra={"version": version})
        Path(folder, f"returned-{dist.get_rank()}").write_text(str(version))
    raise AssertionError("nobody died")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_save_leaves_a_whole_version(tmp_path: Path, victim: int) -> None:
    """Whatever moment a rank dies at: one version, whole, and not older than the last save that returned."""
    run_ranks(2, die_or_report, str(tmp_path), victim, allow_dead=True)
    version = json.loads((tmp_path / "average" / "ema.json").read_text())["extra"]["version"]
    returned = [int(path.read_text()) for path in tmp_path.glob("returned-*")]
    assert version >= max(returned, default=0)
    stored = load_file(tmp_path / "average")
    ema = EMA(Net(), 0.5)
    ema.load(tmp_path / "average")
    if version:
        assert all((stored[name] == version).all() for name in ema.names())
    (tmp_path / f".average.tmp-{'0' * 32}").mkdir(exist_ok=True)  # what a rank that died leaves, if it was the first
    ema.save(tmp_path / "average")
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name], "the next save removes what was left"


def die_or_report(folder: str, victim: int) -> str:
    try:
        die_while_saving(folder, victim)
    except RuntimeError as error:  # the survivor, whose partner is gone
        return str(error)
    raise AssertionError("nobody died")
