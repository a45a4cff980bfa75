"""`dist-ema verify`: nothing that changed passes, everything that is wrong is listed, and a seal is
put on what is sound.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_ema import EMA
from dist_ema.checkpoint import crc32, safetensors
from dist_ema.checkpoint.manifest import META
from dist_ema.checkpoint.safetensors import INDEX
from dist_ema.cli import main
from dist_ema.offline.verify import verify
from dist_ema.text import Tick
from tests.ema_json import stamped


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two averages in one file each, the same in several, an export, a folder and a file of another
    writer.
    """
    folder = tmp_path_factory.mktemp("shop")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    ema = EMA(model, [0.5, 0.9])
    ema.update()
    ema.save(folder / "ema")
    ema.save(folder / "sharded", max_shard_size=40)
    ema.export(folder / "out")
    ema.export(folder / "one.safetensors")
    (folder / "hf").mkdir()
    save_file(model.state_dict(), folder / "hf" / "model.safetensors")
    return folder


def copy(shop: Path, name: str, to: Path) -> Path:
    shutil.copytree(shop / name, to)
    return to


def edit(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_bytes(stamped(meta | changes))


def problems(path: Path) -> str:
    return "\n".join(verify(path).problems)


def test_sound(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written passes; whether there were sums to compare is said."""
    said = {}
    for name in ("ema", "sharded", "out", "one.safetensors", "hf", "ema/averages/1-Constant"):
        assert main(["verify", str(shop / name)]) == 0
        said[name] = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (shop / "ema").rglob("*.safetensors"))
    held = f"15 weights, {size / 1000:.3g} kB, all values finite"
    assert said["ema"] == f"{shop / 'ema'} is sound: {held}; CRC-32 agrees\n"
    assert "CRC-32 agrees" in said["sharded"]
    assert "CRC-32 agrees" in said["out"]
    for name in ("one.safetensors", "hf", "ema/averages/1-Constant"):
        assert "is sound as far as can be told" in said[name]
        assert "there are no check sums to compare" in said[name]
    assert main(["verify", str(shop / "out"), str(shop / "hf"), "--json"]) == 0
    out, hf = json.loads(capsys.readouterr().out)
    assert (out["sound"], out["kind"], out["sums"], out["not_finite"]) == (
        True,
        "export",
        ["crc32"],
        {},
    )
    assert out["files"] == json.loads((shop / "out" / META).read_text())["files"]
    assert (hf["sound"], hf["kind"], hf["sums"], hf["weights"]) == (True, "model", [], 9)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("out/model.safetensors", 3),
        (f"out/{META}", 5),
        ("ema/averages/1-Constant/model.safetensors", 5),
        (f"sharded/{INDEX}", 5),
    ],
)
def test_no_changed_byte_passes(name: str, step: int, shop: Path, tmp_path: Path) -> None:
    """One bit turned in every third or fifth byte of headers, weights and an index."""
    first, _, rest = name.partition("/")
    folder = copy(shop, first, tmp_path / "x")
    content = (folder / rest).read_bytes()
    assert verify(folder).sound
    passed = []
    for i in range(0, len(content), step):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        (folder / rest).write_bytes(changed)
        if verify(folder).sound:
            passed.append(i)
    assert passed == []


def test_files(shop: Path, tmp_path: Path) -> None:
    """Cut, grown, lost, swapped and added files are named."""
    folder = copy(shop, "sharded", tmp_path / "sharded")
    first, second = sorted(path.name for path in folder.glob("model-*"))[:2]
    one, two = (folder / first).read_bytes(), (folder / second).read_bytes()
    (folder / first).write_bytes(one[:-1])
    (folder / second).write_bytes(two + b"\0")
    said = problems(folder)
    assert f"{folder / first} holds {len(one) - 1} bytes, its header describes {len(one)}" in said
    assert f"{folder / second} holds {len(two) + 1} bytes, its header describes {len(two)}" in said
    (folder / first).unlink()
    (folder / second).write_bytes(two)
    assert first in problems(folder)
    (folder / first).write_bytes(two)
    (folder / second).write_bytes(one)
    assert "disagree on" in problems(folder)
    (folder / first).write_bytes(one)
    (folder / second).write_bytes(two)
    assert verify(folder).sound
    (folder / "model.safetensors").write_bytes(one)
    assert (
        f"{folder / 'model.safetensors'} is no part of the model, but some loaders would take it"
        in problems(folder)
    )
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    assert verify(folder).sound, "a file that nobody takes for the model"


def test_swapped_weights(shop: Path, tmp_path: Path) -> None:
    """Two averages with each other's files: sound headers, other sums."""
    folder = copy(shop, "ema", tmp_path / "ema")
    inner = folder / "averages" / "1-Constant" / "model.safetensors"
    file, data = safetensors.read_header(inner), bytearray(inner.read_bytes())
    at, to = (len(file.head) + file.entries[name].begin for name in ("0.bias", "2.bias"))
    data[at : at + 8], data[to : to + 8] = data[to : to + 8], data[at : at + 8]
    inner.write_bytes(data)
    assert f"{inner} is damaged: its CRC-32 is" in problems(folder)


def test_meta(shop: Path, tmp_path: Path) -> None:
    """ema.json that lost a sum, or speaks of another size or weight: every contradiction in one
    list.
    """
    folder = copy(shop, "ema", tmp_path / "ema")
    files = json.loads((folder / META).read_text())["files"]
    listed = files["model.safetensors"]
    edit(folder, files=files | {"model.safetensors": {"size": listed["size"]}})
    assert (
        f"{folder / META} is not sound: files: model.safetensors must have a size and a CRC-32"
        in problems(folder)
    )
    edit(
        folder,
        files=files | {"model.safetensors": listed | {"size": 5}},
        averaged=["lost"],
        own_buffers=["gone"],
    )
    said = verify(folder).problems
    assert len(said) == 5
    assert all(str(folder / META) in each for each in said)
    edit(folder, files={}, averaged=[], own_buffers=[])
    assert "model.safetensors is not listed" in problems(folder)
    edit(folder, files=files, aliases={"0.weight": ["0.bias"]})
    assert "0.bias is listed as another name of 0.weight, and is a weight itself" in problems(
        folder
    )
    (folder / META).write_text("{")
    assert "is not valid JSON" in problems(folder)
    (folder / META).unlink()
    assert "ema.json is missing, though the folder holds further averages" in problems(folder)


def test_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and infinite values are counted by weight, in every dtype that can hold them, integers
    aside.
    """
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([1.0, nan, -inf, inf, 2.0])
    weights = {
        "f64": values.double(), "f32": values, "f16": values.half(), "bf16": values.bfloat16(),
        "e5m2": values.to(torch.float8_e5m2),
        "e4m3": torch.tensor([1.0, nan]).to(torch.float8_e4m3fn),
        "c64": torch.complex(
            torch.tensor([1.0, nan, nan, inf]), torch.tensor([inf, 0.0, inf, inf])
        ),
        "int": torch.full((3,), -1), "bool": torch.tensor([True]), "fine": torch.ones(3),
        "empty": torch.ones(0), "only": torch.tensor([inf]),
    }  # fmt: skip
    save_file(weights, tmp_path / "a.safetensors")
    assert main(["verify", str(tmp_path / "a.safetensors"), "--json"]) == 1
    out, err = capsys.readouterr()
    both = {"nan": 1, "inf": 2}
    expected = dict.fromkeys(("f64", "f32", "f16", "bf16", "e5m2"), both)
    assert json.loads(out)[0]["not_finite"] == expected | {
        "e4m3": {"nan": 1, "inf": 0},
        "c64": {"nan": 2, "inf": 2},
        "only": {"nan": 0, "inf": 1},
    }
    assert f"{tmp_path / 'a.safetensors'}: bf16 holds 1 NaN and 2 infinite values." in err
    assert err.count("\n") == 8


def test_all_is_listed(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several paths with several problems, one of which is not there: all are looked at."""
    folder = copy(shop, "out", tmp_path / "out")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = content[-8:-4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    edit(folder, averaged=["lost"])
    assert main(["verify", str(folder), str(tmp_path / "nowhere"), str(shop / "ema")]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{folder} is not sound: 3 problems"
    assert out.splitlines()[1].startswith(f"{shop / 'ema'} is sound")
    for part in (
        "averaged: it names lost",
        "NaN",
        "is damaged: its CRC-32 is",
        "nowhere does not exist",
    ):
        assert part in err


def test_seal(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--seal adds SHA-256 and changes nothing else; then a change that fits its CRC-32 is found."""
    folder = copy(shop, "ema", tmp_path / "ema")
    before = json.loads((folder / META).read_text())
    names = sorted(path.name for path in folder.iterdir())
    assert main(["verify", str(folder), "--seal"]) == 0
    assert capsys.readouterr().out.endswith("CRC-32 agrees; sealed with SHA-256\n")
    after = json.loads((folder / META).read_text())
    assert after.pop("crc32") != before.pop("crc32")
    for name, said in after["files"].items():
        assert said.pop("sha256") == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert after == before
    assert sorted(path.name for path in folder.iterdir()) == names
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("CRC-32 and SHA-256 agree\n")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    total = crc32.RangeSum(len(content))
    total.add(0, content)
    meta = json.loads((folder / META).read_text())
    meta["files"]["model.safetensors"]["crc32"] = crc32.check_sum(
        len(content), [total.contribution]
    )
    edit(folder, files=meta["files"])
    (problem,) = verify(folder).problems
    assert "is damaged: its SHA-256 is" in problem


def test_seal_refuses(shop: Path, tmp_path: Path) -> None:
    """What is not sound is not sealed, nor what has no ema.json; nothing is written then."""
    folder = copy(shop, "out", tmp_path / "out")
    edit(folder, averaged=["lost"])
    before = (folder / META).read_bytes()
    assert not verify(folder, seal=True).sound
    assert (folder / META).read_bytes() == before
    assert "sha256" not in before.decode()
    for path in (shop / "hf", shop / "one.safetensors"):
        verdict = verify(path, seal=True)
        assert verdict.sound
        assert "no ema.json to seal" in verdict.unsealed
    assert not (shop / "hf" / META).exists()


def test_seal_cannot_be_written(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound folder that cannot be written to is sound, and not sealed: code 1, one sentence,
    nothing changed.
    """
    folder = copy(shop, "ema", tmp_path / "ema")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert main(["verify", str(folder), "--seal"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder} is sound: ")
    assert "sealed" not in out
    sealed = f"{folder}/ema.json: Permission denied."
    assert err == f"dist-ema: {folder} could not be sealed: {sealed}\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert main(["verify", str(folder), "--seal", "--json"]) == 1
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["sound"], said["sealed"]) == (True, False)
    assert "could not be sealed" in said["unsealed"]


def test_seal_sees_another_save(shop: Path, tmp_path: Path) -> None:
    """A save that comes while files are read must not get the sums of the old ones."""
    folder = copy(shop, "out", tmp_path / "out")

    @contextmanager
    def save_over(total: int) -> Iterator[Tick]:
        yield lambda done: None
        files = json.loads((folder / META).read_text())["files"]
        edit(folder, files={name: said | {"crc32": "00000000"} for name, said in files.items()})

    verdict = verify(folder, seal=True, bar=save_over)
    assert ["was written anew" in each for each in verdict.problems] == [True]
    assert "sha256" not in (folder / META).read_text()


def test_progress(shop: Path) -> None:
    """The bar ends at its end: every byte of every file is told."""
    told: list[int] = []

    @contextmanager
    def bar(total: int) -> Iterator[Tick]:
        yield told.append
        assert (
            sum(told)
            == total
            == sum(path.stat().st_size for path in (shop / "sharded").rglob("*.safetensors"))
        )

    assert verify(shop / "sharded", bar=bar).sound
    assert told


def test_file_of_a_folder(shop: Path, tmp_path: Path) -> None:
    """One file is compared with the sums in the ema.json beside it."""
    folder = copy(shop, "out", tmp_path / "out")
    path = folder / "model.safetensors"
    assert verify(path).sums == ["crc32"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged" in problems(path)


def test_other_forms(tmp_path: Path) -> None:
    """A pickled checkpoint is pointed at convert, and never read."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.ckpt")
    assert "dist-ema convert" in problems(tmp_path / "a.ckpt")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "folder" / "pytorch_model.bin")
    assert "does hold pytorch_model.bin: `dist-ema convert`" in problems(tmp_path / "folder")
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nowhere")
