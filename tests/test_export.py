"""`dist-ema export`: the bytes that ema.export writes, the files that other loaders open, and
nothing half done.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from torch import nn

from dist_ema import EMA, __version__, load_file
from dist_ema.checkpoint import disk, safetensors
from dist_ema.checkpoint.manifest import META, Manifest
from dist_ema.cli import main
from dist_ema.offline import model_card
from dist_ema.offline.export import Exported, export
from dist_ema.offline.verify import verify
from tests.ema_json import stamped


class Net(nn.Module):
    """Two pairs of tied weights, bf16, a frozen layer, a scalar, an empty one, integers,
    BatchNorm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.z, self.y = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b, self.a = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.y.weight, self.a.weight = self.z.weight, self.b.weight
        self.norm = nn.BatchNorm1d(4)
        self.short = nn.Parameter(torch.randn(9).bfloat16())
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.frozen = nn.Parameter(torch.randn(3).half(), requires_grad=False)
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("flags", torch.tensor([True, False, True]))


def trained(*decays: float, **options: Any) -> EMA:
    torch.manual_seed(0)
    model = Net()
    ema = EMA(model, list(decays) or 0.9, **options)
    for _ in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight += torch.randn(weight.shape).to(weight.dtype) * weight.requires_grad
        ema.update()
    return ema


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same model, byte by byte."""
    names = [
        {path.name for path in each.iterdir() if path.name not in (META, model_card.README)}
        for each in (a, b)
    ]
    return names[0] == names[1] and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names[0]
    )


# --- the bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}], ids=str
)
def test_as_ema_export(options: dict[str, Any], tmp_path: Path) -> None:
    """From every form of a saved average: the files of ema.export of the same average, to the last
    byte.
    """
    ema = trained(0.9, 0.5, **options)
    ema.save(tmp_path / "saved")
    ema.save(tmp_path / "sharded", max_shard_size=100)
    for which in (0, 1):
        ema.export(want := tmp_path / f"want{which}", which=which)
        ema.export(one := tmp_path / f"want{which}.safetensors", which=which)
        for name in ("saved", "sharded"):
            export(tmp_path / name, out := tmp_path / f"{name}{which}", which=which)
            assert same_files(out, want), (name, which)
            assert verify(out).sums == ["crc32", "sha256"]
            assert verify(out).sound
            export(tmp_path / name, alone := tmp_path / f"{name}{which}.safetensors", which=which)
            assert alone.read_bytes() == one.read_bytes(), (name, which)
            ours, theirs = (json.loads((folder / META).read_text()) for folder in (out, want))
            for key in ("kind", "weights", "clock", "averaged", "own_buffers", "aliases", "dtypes"):
                assert ours[key] == theirs[key], key
    for short, dtype in (
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp64", torch.float64),
    ):
        ema.export(want := tmp_path / short, dtype=dtype, max_shard_size="60B")
        done = tmp_path / f"{short}-cli"
        assert (
            main(
                [
                    "export",
                    str(tmp_path / "saved"),
                    str(done),
                    "--dtype",
                    short,
                    "--max-shard-size",
                    "60B",
                ]
            )
            == 0
        )
        assert len(list(done.glob("model-*"))) >= 2
        assert same_files(done, want), short


def test_loads(tmp_path: Path) -> None:
    """safetensors opens the file, and load_file gives every alias back: it passes strict."""
    ema = trained()
    ema.save(tmp_path / "saved")
    export(tmp_path / "saved", one := tmp_path / "one.safetensors")
    export(tmp_path / "saved", tmp_path / "out", max_shard_size=100)
    full = ema.gather()
    for path in (one, tmp_path / "out"):
        found = load_file(path)
        assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
            name: (value.dtype, value.shape) for name, value in Net().state_dict().items()
        }
        assert all(
            torch.equal(found[name], value.to(found[name].dtype)) for name, value in full.items()
        )
        Net().load_state_dict(found, strict=True)
    alone = load_safetensors(one)
    assert set(full) - set(alone) == {"y.weight", "a.weight"}
    assert all(torch.equal(value, found[name]) for name, value in alone.items())


def test_export_of_an_export(tmp_path: Path) -> None:
    """What was cast stays cast: an export has the dtypes that it was given, whatever the model
    had.
    """
    ema = trained()
    ema.save(tmp_path / "saved")
    ema.export(tmp_path / "half", dtype=torch.bfloat16)
    export(tmp_path / "half", tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "half")


def test_own_buffers_of_another(tmp_path: Path) -> None:
    """Statistics that were recalibrated for the first average only must not be shipped with the
    second.
    """
    ema = trained(0.9, 0.5)
    with ema.swap():
        ema.weights.model.norm(torch.randn(8, 4))  # type: ignore[operator]
    ema.save(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "first")
    with pytest.raises(
        ValueError,
        match=r"holds norm\.num_batches_tracked, norm\.running_mean, norm\.running_var as "
        "recalibrated for its first",
    ):
        export(tmp_path / "saved", tmp_path / "second", which=1)


def test_damaged_source(tmp_path: Path) -> None:
    """Bytes that are not those of the sums are not passed on with new sums: wherever they lie,
    nothing is written.
    """
    trained(0.9, 0.5).save(saved := tmp_path / "saved")
    for name, which in (
        ("model.safetensors", 0),
        ("model.safetensors", 1),
        ("averages/1-Constant/model.safetensors", 1),
    ):
        content = (saved / name).read_bytes()
        file = safetensors.read_header(saved / name)
        for weight in file.entries:
            if file.entries[weight].nbytes:
                changed = bytearray(content)
                changed[len(file.head) + file.entries[weight].begin] ^= 1
                (saved / name).write_bytes(changed)
                with pytest.raises(
                    ValueError, match=r"is damaged: its CRC-32 is \w+, ema\.json says"
                ):
                    export(saved, tmp_path / "out", which=which)
        (saved / name).write_bytes(content)
    meta = json.loads((saved / META).read_text())
    (saved / META).write_bytes(stamped(meta | {"averaged": ["lost"]}))
    with pytest.raises(ValueError, match=r"averaged: it names lost.*dist-ema verify"):
        export(saved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_too_large_for_the_dtype(tmp_path: Path) -> None:
    """A finite value must not become infinite; what was infinite may stay so."""
    save_file(
        {"w": torch.tensor([1.0, 70000.0]), "n": torch.tensor(70000)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="w holds values that are too large for F16"):
        export(tmp_path / "a.safetensors", tmp_path / "out", dtype="F16")
    for verb in (["average", "a.safetensors"], ["convert"]):  # the other verbs that cast
        line = [
            verb[0],
            *(str(tmp_path / name) for name in [*verb[1:], "a.safetensors", "out"]),
            "--dtype",
            "fp16",
        ]
        assert main(line) == 1
    assert not (tmp_path / "out").exists()
    save_file({"w": torch.tensor([1.0, float("inf")])}, tmp_path / "b.safetensors")
    export(tmp_path / "b.safetensors", tmp_path / "out", dtype="F16")
    assert load_file(tmp_path / "out")["w"].tolist() == [1.0, float("inf")]


# --- --like ---------------------------------------------------------------------------------------


def test_like(tmp_path: Path) -> None:
    """File names, shards, key order, dtypes and the choice among tied names are theirs."""
    ema = trained()
    ema.save(tmp_path / "saved")
    theirs = {name: value.clone() for name, value in Net().state_dict().items()}
    del theirs["z.weight"]  # they call it y.weight, and write both of the other pair
    theirs["short"] = theirs["short"].float()
    theirs["scale"] = theirs["scale"].half()
    names = sorted(theirs, reverse=True)
    files = {f"weights-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    (like := tmp_path / "like").mkdir()
    for file, chosen in files.items():
        save_file({name: theirs[name] for name in chosen}, like / file, {"format": "pt"})
    where = {name: file for file, chosen in files.items() for name in chosen}
    (like / "weights.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    done = export(tmp_path / "saved", out := tmp_path / "out", like=like)
    assert sorted(done.files) == sorted(files)
    assert json.loads((out / "weights.safetensors.index.json").read_text())["weight_map"] == where
    full = ema.gather()
    for file in files:
        ours, his = safetensors.read_header(out / file), safetensors.read_header(like / file)
        assert ours == his, "the header to the last byte"
        found = load_safetensors(out / file)
        assert all(torch.equal(value, full[name].to(value.dtype)) for name, value in found.items())
    assert json.loads((out / META).read_text())["aliases"] == {"y.weight": ["z.weight"]}
    export(tmp_path / "saved", one := tmp_path / "one.safetensors", like=like)
    assert safetensors.read_header(one).metadata == {"format": "pt", "z.weight": "y.weight"}
    export(
        tmp_path / "saved", cut := tmp_path / "cut", like=like, max_shard_size="100B", dtype="BF16"
    )
    assert {path.name[:8] for path in cut.glob("*.safetensors")} == {"weights-"}
    assert (cut / "weights.safetensors.index.json").exists()
    assert {
        entry.dtype
        for file in safetensors.read_model(cut).values()
        for entry in file.entries.values()
    } == {
        "BF16",
        "BOOL",
        "I64",
    }


def test_like_a_lone_shard(tmp_path: Path) -> None:
    """One file with a number in its name is found through an index only."""
    (like := tmp_path / "like").mkdir()
    save_file({"w": torch.ones(2)}, like / (name := "model-00001-of-00001.safetensors"))
    (like / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    export(like / name, out := tmp_path / "out", like=like)
    assert json.loads((out / safetensors.INDEX).read_text())["weight_map"] == {"w": name}
    assert verify(out).sound


def test_like_odd_order(tmp_path: Path) -> None:
    """Where their order would put a weight at an odd address in another dtype, it is ours."""
    entries = {"a": safetensors.Entry("U8", (3,)), "b": safetensors.Entry("F32", (2,))}
    file = safetensors.header(entries, None, ["a", "b"])
    (tmp_path / "odd.safetensors").write_bytes(file.head + bytes(11))
    save_file(
        {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2)}, tmp_path / "src.safetensors"
    )
    export(
        tmp_path / "src.safetensors",
        tmp_path / "out.safetensors",
        like=tmp_path / "odd.safetensors",
    )
    assert list(safetensors.read_header(tmp_path / "out.safetensors").entries) == ["b", "a"]
    assert load_safetensors(tmp_path / "out.safetensors")["b"].tolist() == [1.0, 1.0]


def test_like_refuses(tmp_path: Path) -> None:
    """Every weight that only one has, or that has another shape or kind, by name and at once;
    nothing is written.
    """
    save_file(
        {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "n": torch.tensor(3)},
        tmp_path / "a.safetensors",
    )
    save_file(
        {"b": torch.ones(4), "c": torch.tensor([1]), "d": torch.ones(1), "n": torch.tensor(3)},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ValueError, match="b.safetensors, 4 differences") as caught:
        export(tmp_path / "a.safetensors", tmp_path / "out", like=tmp_path / "b.safetensors")
    said = str(caught.value)
    for part in (
        "a.safetensors lacks d",
        "has a besides",
        "b is [3] in ",
        "[4] in ",
        "c is F32 in ",
    ):
        assert part in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "1 differences"),
        ('{"architectures": 3}', "1 differences"),
        ('{"architectures": [3]}', "1 differences"),
        ('{"architectures": ["pipeline"], "model_type": "gpt2"}', "1 differences"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "gpt2"}', "cannot build the Llama"),
    ],
)
def test_like_with_an_odd_config(config: str, words: str, tmp_path: Path) -> None:
    """A config.json beside the pattern may hold anything: a sentence, or no other names."""
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "like").mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "like" / "model.safetensors")
    (tmp_path / "like" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "a.safetensors", tmp_path / "out", like=tmp_path / "like")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_from_dcp(tmp_path: Path) -> None:
    """A folder of torch.distributed.checkpoint is verified, compared and shipped like any other
    model.
    """
    weights = {"a.w": torch.randn(6, 4), "n": torch.tensor(3), "h": torch.randn(5).bfloat16()}
    dcp.save(dict(weights), checkpoint_id=tmp_path / "dcp", no_dist=True)
    save_file(weights, tmp_path / "like.safetensors", {"format": "pt"})
    verdict = verify(tmp_path / "dcp")
    assert (verdict.sound, verdict.kind, verdict.weights, verdict.sums) == (True, "other", 3, [])
    export(
        tmp_path / "dcp", out := tmp_path / "out.safetensors", like=tmp_path / "like.safetensors"
    )
    assert out.read_bytes() == (tmp_path / "like.safetensors").read_bytes()
    assert main(["diff", str(tmp_path / "dcp"), str(out)]) == 0
    with pytest.raises(ValueError, match="there is no average 1; there are 0"):
        export(tmp_path / "dcp", tmp_path / "x", which=1)
    dcp.save({"w": torch.tensor([1.0, float("nan")])}, checkpoint_id=tmp_path / "bad", no_dist=True)
    assert verify(tmp_path / "bad").problems == [
        f"{tmp_path / 'bad'}: w holds 1 NaN and 0 infinite values."
    ]
    assert "no ema.json to seal" in verify(tmp_path / "dcp", seal=True).unsealed


def test_latest(tmp_path: Path) -> None:
    """The pointer to the newest save stands for the folder: as what is read, and as what must not
    be written into.
    """
    ema = trained()
    for step in (1, 2):
        ema.save(tmp_path / "run" / f"ema-{step}", keep=2)
    latest = tmp_path / "run" / "latest"
    assert verify(latest).sums == ["crc32"]
    export(latest, tmp_path / "out")
    assert json.loads((tmp_path / "out" / META).read_text())["source"]["name"] == "ema-2"
    with pytest.raises(ValueError, match="lies inside"):
        export(latest, tmp_path / "run" / "ema-2" / "out")


def test_nothing_to_export(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no weights: there is nothing to export"):
        export(tmp_path / "a.safetensors", tmp_path / "out")


def test_part_of_a_model(tmp_path: Path) -> None:
    """What was saved with only= is no model, unless --like proves that nothing is missing; nor is
    one file of a folder.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = EMA(model, [0.9, 0.5], only=r"^0\.")
    ema.save(saved := tmp_path / "saved")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="averaged weights only"):
        export(saved, tmp_path / "out")
    with pytest.raises(ValueError, match=r"lacks 1\.weight"):
        export(saved, tmp_path / "out", like=tmp_path / "whole.safetensors")
    save_file(
        {f"0.{name}": value for name, value in model[0].state_dict().items()},
        part := tmp_path / "part.safetensors",
    )
    assert export(saved, tmp_path / "out", like=part).weights == 2
    with pytest.raises(ValueError, match="which='1-Constant'"):
        export(saved / "averages" / "1-Constant", tmp_path / "out2")
    with pytest.raises(ValueError, match="name the folder"):
        export(saved / "model.safetensors", tmp_path / "out2")


# --- where it goes --------------------------------------------------------------------------------


COPIED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "special_tokens_map.json", "preprocessor_config.json",
    "modeling_x.py", "LICENSE", "chat_template.jinja",
}  # fmt: skip
LEFT = (
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "events.out",
    "scheduler.pkl",
    ".cache.json",
)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder as Hugging Face has them, with what must and what must not go along."""
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file(
        {"w": torch.ones(2, 2), "n": torch.tensor(1)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    for name in (*COPIED, *LEFT):
        (folder / name).write_text(f"of {name}")
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\r\n# Their model\n")
    (folder / "tokenizer.model").write_bytes(b"\n\x10sentencepiece")
    (folder / "vocab.txt").write_bytes(b"\x80\x04\x95evil")
    (folder / "odd.json").write_bytes(b"PK\x03\x04evil")
    (folder / "sub").mkdir()
    (folder / "blob").write_text("of a cache")
    (folder / "added_tokens.json").symlink_to(folder / "blob")
    return folder


def test_beside(hf: Path, tmp_path: Path) -> None:
    """Config, tokenizer, licence and code go along, links followed; pickles, weights and training
    state do not.
    """
    save_file({"w": torch.zeros(2, 2), "n": torch.tensor(7)}, tmp_path / "src.safetensors")
    done = export(tmp_path / "src.safetensors", out := tmp_path / "out", like=hf)
    wanted = COPIED | {"tokenizer.model", "added_tokens.json", "README.md"}
    assert set(done.beside) == wanted
    assert {path.name for path in out.iterdir()} == wanted | {"model.safetensors", META}
    assert (out / "config.json").read_text() == "of config.json"
    assert (out / "added_tokens.json").read_text() == "of a cache"
    assert not (out / "added_tokens.json").is_symlink()


def test_card(hf: Path, tmp_path: Path) -> None:
    """The section says what average this is; a second export replaces it and nothing else of the
    card.
    """
    ema = EMA(nn.Linear(2, 2, bias=False), 0.9)
    ema.save(tmp_path / "saved")
    crc = json.loads((tmp_path / "saved" / META).read_text())["files"]["model.safetensors"]["crc32"]
    theirs = (hf / "README.md").read_bytes()
    (hf / "model.safetensors").unlink()
    save_file({"weight": torch.ones(2, 2)}, hf / "model.safetensors")
    export(tmp_path / "saved", out := tmp_path / "out", like=hf)
    first = (out / "README.md").read_bytes()
    assert first.startswith(theirs + b"\n<!-- dist_ema: begin -->\n")
    for part in (
        "Constant(decay=0.9)",
        "now 0",
        "F32 1",
        "`saved`",
        f"CRC-32 {crc}",
        f"dist_ema {__version__}",
    ):
        assert part.encode() in first, part
    (out / "README.md").write_bytes(b"mine\n" + first + b"after\n")
    export(tmp_path / "saved", out, like=hf, dtype="BF16", force=True)
    second = (out / "README.md").read_bytes()
    assert second == b"mine\n" + first.replace(b"F32 1", b"BF16 1") + b"after\n"


def test_card_is_not_written_by_files() -> None:
    """Names and schedules from a file can neither close the section nor write Markdown; a lone
    marker eats no text.
    """
    evil = {"name": f"`x`|{model_card.END}\n# big\x1b[2J"}
    facts = Manifest(schedules=[evil], source={"name": "a|b`c", "crc32": {}})
    section = model_card.section(facts, {"F32": 1})
    assert section.count(model_card.END) == section.count(model_card.BEGIN) == 1
    assert "\n# big" not in section
    assert "\x1b" not in section
    assert "a?b?c" in section
    lone = f"{model_card.BEGIN} of somebody\nkept\n".encode()
    once = model_card.write_into(lone, section)
    assert model_card.write_into(once, section) == once
    assert once.startswith(lone)


def test_force(hf: Path, tmp_path: Path) -> None:
    """Without --force nothing is replaced.

    With it the model is, and what lies beside it stays: adapters, notes, folders.
    """
    save_file({"w": torch.zeros(2, 2), "n": torch.tensor(7)}, src := tmp_path / "src.safetensors")
    before = {path.name: path.read_bytes() for path in hf.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="exists. Pass force=True"):
        export(src, hf)
    assert {path.name: path.read_bytes() for path in hf.iterdir() if path.is_file()} == before
    save_file({"lora": torch.ones(1)}, hf / "adapter.safetensors")
    (hf / "sub" / "notes").write_text("mine")
    (hf / "model-00001-of-00002.safetensors").write_bytes(b"old")
    kept = {path: path.stat().st_ino for path in (hf / "sub" / "notes", hf / "tokenizer.json")}
    export(src, hf, force=True)
    assert {path: path.stat().st_ino for path in kept} == kept, "large neighbours are not copied"
    assert load_safetensors(hf / "model.safetensors")["n"] == 7
    assert (hf / "sub" / "notes").read_text() == "mine"
    assert load_safetensors(hf / "adapter.safetensors")["lora"] == 1
    assert (hf / "added_tokens.json").is_symlink()
    assert not (hf / "model-00001-of-00002.safetensors").exists()
    assert {name for name in before if not (hf / name).exists()} == set()
    with pytest.raises(ValueError, match="exists. Pass force=True"):
        export(hf, src)
    export(hf, src, force=True)
    assert load_safetensors(src)["n"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "src.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_names_of_pickles_are_refused(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUT that is named as a pickle would become a folder of that name; a folder that is so called
    is a folder.
    """
    save_file({"w": torch.zeros(2, 2)}, src := tmp_path / "src.safetensors")
    out = tmp_path / f"x{suffix}"
    for verb in (["export", str(src)], ["average", str(src), str(src)], ["convert", str(src)]):
        assert main([*verb, str(out)]) == 1
        assert "Name x for a folder, or x.safetensors for one file." in capsys.readouterr().err
        assert not out.exists()
    out.mkdir()
    export(src, out, force=True)
    assert load_file(out)["w"].shape == (2, 2)


def test_errors_name_what_was_asked_for(tmp_path: Path) -> None:
    """A hidden sibling that cannot be made is ours: the user knows OUT."""
    save_file({"w": torch.zeros(2, 2)}, src := tmp_path / "src.safetensors")
    out = tmp_path / ("x" * 250)  # the hidden name is longer than the file system allows
    with pytest.raises(OSError, match="File name too long") as raised:
        export(src, out)
    assert raised.value.filename == str(out)
    with pytest.raises(OSError, match="File name too long") as raised:
        EMA(nn.Linear(2, 2)).save(out)
    assert raised.value.filename == str(out)


def test_what_comes_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that appears at OUT while it is written stays, as one that was there before."""
    save_file({"w": torch.zeros(2, 2)}, src := tmp_path / "src.safetensors")
    sync, out = disk.Target.sync, tmp_path / "out"

    def come(self: disk.Target) -> None:
        out.mkdir()
        (out / "notes").write_text("mine")
        sync(self)

    monkeypatch.setattr(disk.Target, "sync", come)
    with pytest.raises(ValueError, match="exists. Pass force=True"):
        export(src, out)
    assert os.listdir(out) == ["notes"]
    assert sorted(os.listdir(tmp_path)) == ["out", "src.safetensors"]


def test_no_links(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without links what lies beside the model is copied."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    save_file({"w": torch.zeros(2, 2)}, src := tmp_path / "src.safetensors")
    before = {
        path.name: path.read_bytes()
        for path in hf.glob("*")
        if path.is_file() and "safetensors" not in path.name
    }
    export(src, hf, force=True)
    del before["README.md"]
    assert {name: (hf / name).read_bytes() for name in before} == before


def test_places(tmp_path: Path) -> None:
    """OUT is not SRC, not in it, not around it, nor --like; links are seen through; an average to
    resume from stays.
    """
    ema = EMA(nn.Linear(2, 2))
    ema.save(a := tmp_path / "runs" / "a")
    ema.save(b := tmp_path / "runs" / "b")
    (tmp_path / "link").symlink_to(a)
    save_file(nn.Linear(2, 2).state_dict(), alone := tmp_path / "runs" / "like.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"out": a}, "itself"),
        ({"out": tmp_path / "link"}, "itself"),
        ({"out": tmp_path / "runs" / "b" / ".." / "a"}, "itself"),
        ({"out": a / "deep" / "out"}, "lies inside"),
        ({"out": tmp_path / "link" / "out.safetensors"}, "lies inside"),
        ({"out": tmp_path / "runs"}, "which would be replaced"),
        ({"out": b, "like": b}, "itself"),
        ({"out": b / "x", "like": b}, "lies inside"),
        ({"out": alone, "like": alone}, "itself"),
        ({"out": b}, "an average to resume from"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            export(a, **options, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="Name a folder"):
        export(a, tmp_path / "x.safetensors", max_shard_size="10B")
    assert not (tmp_path / "x.safetensors").exists()


def test_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written, from what, in text and in JSON."""
    trained().save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    held = f"12 weights (F32 8, BF16 1, BOOL 1, F16 1, I64 1), {size / 1000:.3g} kB in 1 file"
    assert first == f"{tmp_path / 'out'}: {held}, from {tmp_path / 'saved'} (Constant(decay=0.9))"
    assert second == "beside them: README.md"
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "x.safetensors"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == {"x.safetensors": (tmp_path / "x.safetensors").stat().st_size}
    assert (said["average"], said["beside"]) == ("Constant(decay=0.9)", [])
    for wrong in (["--dtype", "int8"], ["--max-shard-size", "0"], ["--max-shard-size", "big"]):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(tmp_path / "saved"), str(tmp_path / "y"), *wrong])
        assert caught.value.code == 2
        assert wrong[0] in capsys.readouterr().err


# --- other people's loaders -----------------------------------------------------------------------


@contextmanager
def silence(name: str) -> Iterator[None]:
    """A logger of theirs must not warn."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger(name), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    assert said == []


def shipped(
    model: nn.Module, home: Path, name: str, **options: Any
) -> tuple[Path, dict[str, torch.Tensor], Exported]:
    """Save theirs, average it with weights that moved, export like theirs: the folder, and the
    average's weights.
    """
    model.save_pretrained(home / name, **options)  # type: ignore[operator]
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    ema.update()
    ema.save(home / f"{name}-ema")
    done = export(home / f"{name}-ema", home / f"{name}-out", like=home / name)
    return home / f"{name}-out", ema.gather(), done


def test_transformers(tmp_path: Path) -> None:
    """AutoModel opens the folder without a warning: tied GPT-2 tied bf16 Llama in shards."""
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    small = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, **small))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, **small)).to(
        torch.bfloat16
    )
    for name, model, options in (("gpt2", gpt2, {}), ("llama", llama, {"max_shard_size": "3KB"})):
        out, full, done = shipped(model, tmp_path, name, **options)
        assert len(done.files) > 1 or name == "gpt2"
        with silence("transformers"):
            again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        state = again.state_dict()
        assert state.keys() == full.keys()
        assert all(
            torch.equal(state[key], value.to(state[key].dtype)) for key, value in full.items()
        )
        assert again.dtype == model.dtype
        assert again.lm_head.weight is again.get_input_embeddings().weight


def test_diffusers(tmp_path: Path) -> None:
    """ModelMixin.from_pretrained finds diffusion_pytorch_model.safetensors, in one file and in
    shards, without a warning.
    """
    from diffusers import UNet2DModel

    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    for name, options in (("one", {}), ("shards", {"max_shard_size": "100KB"})):
        model = UNet2DModel(
            8, 3, 3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks
        )
        out, full, done = shipped(model, tmp_path, name, **options)
        assert all(file.startswith("diffusion_pytorch_model") for file in done.files)
        assert (out / "diffusion_pytorch_model.safetensors.index.json").exists() == (
            name == "shards"
        )
        with silence("diffusers"):
            again, info = UNet2DModel.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        assert all(torch.equal(again.state_dict()[key], value) for key, value in full.items())


# --- memory ---------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from dist_ema.cli import main
from dist_ema.offline import diff, export, verify
import numpy
numpy.ones(9) @ numpy.ones(9)  # its threads, once and for all

words = open("/proc/self/status").read().split()
held = int(words[words.index("VmData:") + 1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + (120 << 20), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def sparse(path: Path, shape: tuple[int, ...]) -> None:
    """One weight of zeros, which takes no disk."""
    file = safetensors.header({"w": safetensors.Entry("F32", shape)})
    with open(path, "wb") as handle:
        handle.write(file.head)
        handle.truncate(file.size)


def test_memory(tmp_path: Path) -> None:
    """A single weight of 240 MB under a hard limit of 120 MB: no verb holds a whole weight.

    Guards the windows of source, verify, diff and export, and that casts go by windows too.
    """
    sparse(tmp_path / "a.safetensors", (60_000_000,))
    sparse(tmp_path / "b.safetensors", (60_000_000,))
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    for line in (
        ["verify", a],
        ["diff", a, b],
        ["export", a, str(tmp_path / "out.safetensors"), "--dtype", "bf16"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *line], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), line
    assert (tmp_path / "out.safetensors").stat().st_size > 120_000_000
    (tmp_path / "out.safetensors").unlink()
    whole = LIMITED.replace("sys.exit(main(sys.argv[1:]))", "bytearray(240_000_000)")
    assert (
        "MemoryError"
        in subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True).stderr
    )


def test_like_ties(tmp_path: Path) -> None:
    """Weights that only the pattern ties become one where their bits agree, else they are named."""
    one = torch.randn(3, 2)
    save_file({"emb": one}, like := tmp_path / "like.safetensors", {"head": "emb"})
    save_file({"emb": one, "head": one.clone()}, equal := tmp_path / "equal.safetensors")
    save_file({"emb": one, "head": one + 1}, other := tmp_path / "other.safetensors")
    export(equal, out := tmp_path / "out.safetensors", like=like)
    assert list(safetensors.read_header(out).entries) == ["emb"]
    assert all(torch.equal(load_file(out)[name], one) for name in ("emb", "head"))
    with pytest.raises(ValueError, match="head is tied to emb in .*, another weight in "):
        export(other, out, like=like, force=True)
