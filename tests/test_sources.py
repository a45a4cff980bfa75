"""Models in files: read in windows, written as one stream."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_ema import EMA
from dist_ema.checkpoint import crc32, manifest, safetensors
from dist_ema.checkpoint.manifest import Manifest
from dist_ema.offline import sources, writer
from dist_ema.offline.sums import Checked, FileWindow

WEIGHTS = {
    "a.weight": torch.randn(7, 5),
    "half": torch.randn(33).to(torch.bfloat16),
    "count": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def read_all(path: Path, window: int = 16) -> dict[str, bytes]:
    with sources.open_model(path) as model:
        return {
            name: b"".join(map(bytes, sources.windows(model, name, window)))
            for name in model.entries
        }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def rewrite(path: Path, out: Path, **options: object) -> None:
    """Copy a model through source and sink."""
    with sources.open_model(path) as model:
        files = safetensors.plan(dict(model.entries), "100B" if out.suffix == "" else "5GB")
        if out.suffix:
            files = {out.name: next(iter(files.values()))}
        checked, facts, beside = Checked(model), Manifest(kind="export"), {"config.json": b"{}"}
        writer.write(
            out,
            files,
            lambda names: chain.from_iterable(map(checked.windows, names)),
            facts,
            beside=beside,
            **options,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("form", ["file", "folder", "saved"])
def test_read(form: str, tmp_path: Path) -> None:
    """The same bytes from a file, a folder of several shards, and a saved average, in windows that
    end inside weights.
    """
    module = torch.nn.Linear(5, 7)
    module.register_buffer("count", torch.tensor(3))
    weights = WEIGHTS
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    if form == "folder":
        rewrite(path, path := tmp_path / "folder")
        assert len(list(path.glob("*.safetensors"))) > 1
    if form == "saved":
        EMA(module).save(path := tmp_path / "saved", max_shard_size=100)
        weights = module.state_dict()
    assert read_all(path) == {name: raw(tensor) for name, tensor in weights.items()}


def test_aliases(tmp_path: Path) -> None:
    """From ema.json in a folder, from the header in a file; names that the files do not hold are no
    aliases.
    """
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    ema = EMA(net)
    ema.save(tmp_path / "saved")
    ema.export(tmp_path / "one.safetensors")
    for path in (tmp_path / "saved", tmp_path / "one.safetensors"):
        with sources.open_model(path) as model:
            assert dict(model.aliases) == {"1.weight": "0.weight"}


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        sources.open_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        sources.open_model(tmp_path)


def test_cut_while_read(tmp_path: Path) -> None:
    """Somebody truncates the file behind an open source."""
    save_file({"w": torch.randn(100)}, path := tmp_path / "model.safetensors")
    with sources.open_model(path) as model:
        model.read("w", 0, 4)
        with open(path, "r+b") as file:
            file.truncate(200)
        with pytest.raises(ValueError, match="became shorter"):
            model.read("w", 0, 400)


def test_write(tmp_path: Path) -> None:
    """safetensors reads what was written, the sums are those of the files, and the bytes are those
    that ranks write.
    """
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    ticks: list[int] = []
    rewrite(tmp_path / "model.safetensors", tmp_path / "out", tick=ticks.append)
    rewrite(tmp_path / "model.safetensors", tmp_path / "one.safetensors")
    out = tmp_path / "out"
    meta = json.loads((out / "ema.json").read_text())
    assert set(meta["files"]) == {path.name for path in out.glob("*.safetensors")}
    found = {}
    for name, line in meta["files"].items():
        data = (out / name).read_bytes()
        whole = crc32.RangeSum(len(data))
        whole.add(0, data)
        assert line["size"] == len(data)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["crc32"] == crc32.check_sum(len(data), [whole.contribution])
        found |= load_file(out / name)
    assert sum(ticks) == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert (out / "config.json").read_text() == "{}"
    for tensors in (found, load_file(tmp_path / "one.safetensors")):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items())
        assert len(tensors) == 5
    assert safetensors.read_model(out)


def test_target(tmp_path: Path) -> None:
    """Nothing is replaced without force; with force only a model is, and what lies beside it
    stays.
    """
    save_file(WEIGHTS, src := tmp_path / "model.safetensors")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    rewrite(src, out := tmp_path / "out")
    (out / "tokenizer.json").write_text("kept")
    (out / "sub").mkdir()
    with pytest.raises(ValueError, match="exists. Pass force=True"):
        rewrite(src, out)
    (out / "model-00001-of-00009.safetensors").write_bytes(b"old")
    rewrite(src, out, force=True)
    assert (out / "tokenizer.json").read_text() == "kept"
    assert (out / "sub").is_dir()
    assert not (out / "model-00001-of-00009.safetensors").exists()
    with pytest.raises(ValueError, match="no model: it is not ours"):
        rewrite(src, tmp_path / "notes", force=True)
    with pytest.raises(ValueError, match="is a file"):
        (tmp_path / "plain").write_text("")
        rewrite(src, tmp_path / "plain", force=True)
    with pytest.raises(ValueError, match="is a folder"):
        (tmp_path / "odd.safetensors").mkdir()
        rewrite(src, tmp_path / "odd.safetensors", force=True)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """Content that raises half-way: the old model is whole, and no temporary lies about."""
    save_file(WEIGHTS, src := tmp_path / "model.safetensors")
    rewrite(src, out := tmp_path / "out")
    before = read_all(out)

    def content(names: Sequence[str]) -> list[FileWindow]:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        writer.write(
            out,
            safetensors.plan({"w": safetensors.Entry("F32", (3,))}, "5GB"),
            content,
            Manifest(kind="export"),
            force=True,
        )
    assert read_all(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_which(tmp_path: Path) -> None:
    """A further average is complete: what it shares with the first is read from there, the rest
    from its own files.
    """
    module = torch.nn.Linear(5, 7)
    module.bias.requires_grad_(False)
    ema = EMA(module, [*(0.5 + i / 100 for i in range(12))])
    with torch.no_grad():
        module.weight += 1
    ema.update()
    ema.save(tmp_path / "saved")
    saved = manifest.read(tmp_path / "saved")
    assert saved is not None
    assert saved.labels == ["", *(f"{i}-Constant" for i in range(1, 12))]
    for which in (0, 1, 2, 10, 11):
        names = [
            which,
            str(which),
            f"Constant(decay={0.5 + which / 100})",
            f"Constant({0.5 + which / 100})",
            *([f"{which}-Constant"] if which else []),
        ]
        for name in names:
            with sources.open_model(tmp_path / "saved", name) as model:
                got = {
                    name: bytes(model.read(name, 0, entry.nbytes))
                    for name, entry in model.entries.items()
                }
            assert got == {name: raw(tensor) for name, tensor in ema.gather(which).items()}, name
    for name in (12, -1, "", "Constant", "x", "Constant(0.9)", "Constant(", "Constant(x)"):
        with pytest.raises(
            ValueError,
            match=r"there is (no|more than one) average .* 0: Constant\(decay=0\.5\), 1: ",
        ):
            sources.open_model(tmp_path / "saved", name)
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="there is no average '1'; there are 0: the only one"):
        sources.open_model(tmp_path / "a.safetensors", "1")


def test_checked(tmp_path: Path) -> None:
    """Sound however much was asked for, and in any windows; a turned bit anywhere is found, in a
    file that is named too.
    """
    EMA(torch.nn.Linear(5, 7)).save(path := tmp_path / "saved", max_shard_size=100)
    for asked in ([], ["weight"], ["weight", "bias", "bias", "weight"]):
        with sources.open_model(path) as model:
            checked = Checked(model)
            for name in asked:
                parts = list(checked.windows(name))
                assert b"".join(bytes(part.data) for part in parts) == b"".join(
                    map(bytes, sources.windows(model, name))
                )
                assert all(part.crc32 in (None, zlib.crc32(part.data)) for part in parts)
                checked.reading(name, 4, 8).window()
            checked.finish()
    content = (file := path / "model-00002-of-00002.safetensors").read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for there in (path, file):
        with (
            sources.open_model(there) as model,
            pytest.raises(ValueError, match="model-00002.* is damaged: its CRC-32 is"),
        ):
            Checked(model).finish()
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    with sources.open_model(tmp_path / "a.safetensors") as model:
        Checked(model).finish()


def versions(tmp_path: Path) -> None:
    """Two saves of one model, in two files each: all zeros in a, all ones in b."""
    for value, name in enumerate(("a", "b")):
        module = torch.nn.Linear(5, 7)
        torch.nn.init.constant_(module.weight, value)
        torch.nn.init.constant_(module.bias, value)
        EMA(module).save(tmp_path / name, max_shard_size=100)


def test_two_versions_do_not_mix(tmp_path: Path) -> None:
    """A save that replaces the folder behind an open source: what is open is read on, the rest is
    refused.
    """
    versions(tmp_path)
    with sources.open_model(tmp_path / "a") as model:
        model.read("weight", 0, 4)
        (tmp_path / "a").rename(tmp_path / "old")
        (tmp_path / "b").rename(tmp_path / "a")
        shutil.rmtree(tmp_path / "old")
        assert bytes(model.read("weight", 4, 8)) == raw(torch.zeros(1))
        with pytest.raises(ValueError, match="was replaced while it was read. Try again"):
            model.read("bias", 0, 4)


def test_replaced_between_header_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of another shape that comes right after the headers: nothing is read at the old
    places.
    """
    EMA(torch.nn.Linear(5, 7)).save(path := tmp_path / "a")
    really = safetensors.read_model

    def then_saved(folder: Path) -> dict[str, safetensors.SafetensorsFile]:
        found = really(folder)
        EMA(torch.nn.Linear(7, 5)).save(path)
        return found

    monkeypatch.setattr(safetensors, "read_model", then_saved)
    with (
        sources.open_model(path) as model,
        pytest.raises(ValueError, match="was replaced while it was read. Try again"),
    ):
        model.read("weight", 0, 4)


def test_closed_is_opened_again(tmp_path: Path) -> None:
    """`close` frees the files for whoever holds many models; the next read opens them again."""
    versions(tmp_path)
    with sources.open_model(tmp_path / "b") as model:
        for _ in range(2):
            assert bytes(model.read("weight", 0, 4)) == raw(torch.ones(1))
            model.close()


def test_pickles(tmp_path: Path) -> None:
    """What torch.save and pickle wrote is told by its first bytes and pointed at convert; no header
    is taken for it.
    """
    torch.save(WEIGHTS, tmp_path / "zip.bin")
    torch.save(WEIGHTS, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "plain").write_bytes(pickle.dumps({"a": 1}))
    for name in ("zip.bin", "old", "plain"):
        with pytest.raises(ValueError, match=f"{name} is a pickled checkpoint.* `dist-ema convert"):
            sources.find(tmp_path / name)
    hits = 0
    for pad in range(500, 1300, 8):
        file = safetensors.header({"x": safetensors.Entry("U8", (0,))}, {"p": "x" * pad})
        (tmp_path / "a.safetensors").write_bytes(file.head)
        hits += file.head[0] == 0x80 and 2 <= file.head[1] <= 5
        assert sources.open_model(tmp_path / "a.safetensors").entries
    assert hits, "a length whose bytes look like a pickle's first"
