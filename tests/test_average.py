"""`dist-ema average`: float64 sums of files, in any form and number, and every difference named
before anything is written.

How to read a failure: expected values are torch's own, in float64, rounded once.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ema import EMA, load_file
from dist_ema.offline.average import in_order, shares
from dist_ema.offline.export import export
from tests.conftest import Call


@pytest.fixture
def call(call: Call) -> Call:
    """`dist-ema average ...` in this process."""

    return partial(call, "average")


def model(seed: int, **more: Tensor) -> dict[str, Tensor]:
    """Every dtype that there is an average of, a scalar, an empty weight, whole numbers."""
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(9, 5, generator=g),
        "double": torch.randn(4, generator=g, dtype=torch.float64),
        "half": torch.randn(33, generator=g).half(),
        "brain": torch.randn(33, generator=g).bfloat16(),
        "wave": torch.complex(torch.randn(3, generator=g), torch.randn(3, generator=g)),
        "scalar": torch.randn((), generator=g),
        "empty": torch.empty(0, 3),
        "same": torch.arange(5),
        "count": torch.tensor(seed),
    } | more


FLOATING = ("w", "double", "half", "brain", "wave", "scalar", "empty")


def expected(models: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """In float64, rounded once."""
    total = {
        name: torch.zeros_like(models[0][name], dtype=wide(models[0][name])) for name in FLOATING
    }
    for one, weight in zip(models, weights, strict=True):
        for name in FLOATING:
            total[name] = total[name] + one[name].to(total[name].dtype) * weight
    return {name: total[name].to(models[-1][name].dtype) for name in FLOATING}


def wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


@pytest.fixture
def shop(tmp_path: Path) -> list[Path]:
    """Three models: a file, a folder with config, a folder of an older number."""
    paths = [tmp_path / "ema-7.safetensors", tmp_path / "hf", tmp_path / "other"]
    save_file(model(0), paths[0])
    for seed, path in ((1, paths[1]), (2, paths[2])):
        path.mkdir()
        save_file(model(seed), path / "model.safetensors")
        for name in ("config.json", "tokenizer.model", "README.md", "optimizer.bin"):
            (path / name).write_text(f"{name} of {seed}")
    return paths


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], [1 / 3, 1 / 3, 1 / 3]), (["--wma"], [1 / 6, 2 / 6, 3 / 6]),
        (["--weights", "2,0,-1"], [2.0, 0.0, -1.0]),
        (["--weights", "0.2,0.2,0.1"], [0.4, 0.4, 0.2]), (["--lawa", "2"], [0.0, 0.5, 0.5]),
        (["--lawa", "2", "--wma"], [0.0, 1 / 3, 2 / 3]),
    ],
    ids=str,
)  # fmt: skip
def test_average(
    options: list[str], weights: list[float], shop: list[Path], tmp_path: Path, call: Call
) -> None:
    """Bit for bit the float64 sum; whole numbers from the last model, and said where they differ;
    config beside it.
    """
    code, out, err = call(*shop, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    found, wanted = load_file(tmp_path / "out"), expected([model(i) for i in range(3)], weights)
    assert set(found) == set(model(0))
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert (found["count"], found["same"].tolist()) == (2, [0, 1, 2, 3, 4])
    assert "have no mean: count\n" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "ema.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert (tmp_path / "out" / "config.json").read_text() == "config.json of 2"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("README.md of 2\n\n<!-- dist_ema: begin -->")
    said = json.loads((tmp_path / "out" / "ema.json").read_text())
    used = [weight for weight in weights if weight or "lawa" not in str(options)]
    assert [each["weight"] for each in said["extra"]["average"]["models"]] == pytest.approx(used)
    assert (said["kind"], said["averaged"]) == ("export", sorted(FLOATING))


def test_float64(tmp_path: Path, call: Call) -> None:
    """Sums of bf16 models lose nothing before the one rounding at the end; equal models come out as
    they are.
    """
    values = [
        torch.tensor([1.0, 256.0]),
        torch.tensor([2.0**-8, 1.0]),
        torch.tensor([2.0**-8, 1.0]),
    ]
    for i, value in enumerate(values):
        save_file({"w": value.bfloat16()}, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    assert (
        call(*paths, tmp_path / "sum.safetensors", "--weights", "1,1,1", "--dtype", "fp64")[0] == 0
    )
    exact = torch.stack([value.double() for value in values]).mul(1 / 3).sum(0)
    assert torch.allclose(load_file(tmp_path / "sum.safetensors")["w"], exact, rtol=1e-15, atol=0)
    assert call(*[paths[1]] * 7, tmp_path / "same.safetensors")[0] == 0
    assert torch.equal(load_file(tmp_path / "same.safetensors")["w"], values[1].bfloat16())


def test_nan_without_weight(tmp_path: Path, call: Call) -> None:
    """A model with weight 0 is not touched: 0 * NaN is NaN."""
    save_file({"w": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors")
    assert (
        call(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            tmp_path / "o",
            "--weights",
            "0,1",
        )[0]
        == 0
    )
    assert load_file(tmp_path / "o")["w"] == 1


class Tied(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.a.weight, value)
        self.b.weight = self.a.weight
        self.to(dtype)


def test_ours(tmp_path: Path, call: Call) -> None:
    """Saved averages, exports, another dtype, and a file that has a tied weight under its other
    name.
    """
    EMA(Tied(1.0)).save(tmp_path / "saved")
    EMA(Tied(4.0, torch.bfloat16)).export(tmp_path / "export")
    save_file(
        {"b.weight": torch.full((3, 3), 4.0)}, tmp_path / "b.safetensors", {"a.weight": "b.weight"}
    )
    inputs = [tmp_path / "export", tmp_path / "b.safetensors", tmp_path / "saved"]
    code, _, err = call(*inputs, tmp_path / "out")
    assert (code, err) == (0, "")
    found = load_file(tmp_path / "out")
    assert {name: weight.tolist() for name, weight in found.items()} == dict.fromkeys(
        ["a.weight", "b.weight"], [[3.0] * 3] * 3
    )
    assert found["a.weight"].dtype == torch.float32
    Tied(0).load_state_dict(found, strict=True)
    assert call(*inputs, tmp_path / "one.safetensors", "--dtype", "bf16")[0] == 0
    one = load_file(tmp_path / "one.safetensors")
    assert (set(one), one["a.weight"].dtype) == ({"a.weight", "b.weight"}, torch.bfloat16)


def test_damaged_sources(tmp_path: Path, call: Call) -> None:
    """One byte of a saved average, or a number of its ema.json: named, and nothing is written.

    What has no weight is not read.
    """
    for name in "ab":
        EMA(Tied(2.0)).save(tmp_path / name)
    weights, meta = tmp_path / "a" / "model.safetensors", tmp_path / "a" / "ema.json"
    for path, old, new, words in (
        (
            weights,
            weights.read_bytes()[-1:],
            b"\xff",
            r"a/model\.safetensors is damaged: its CRC-32 is",
        ),
        (
            meta,
            b'"updates": 0',
            b'"updates": 7',
            r"a/ema\.json is damaged: crc32: ema\.json was changed since dist_ema wrote it",
        ),
    ):
        kept = path.read_bytes()
        path.write_bytes(new.join(kept.rsplit(old, 1)))
        for first, last in ("ab", "ba"):
            code, _, err = call(tmp_path / first, tmp_path / last, tmp_path / "out")
            assert (code, bool(re.search(words, err))) == (1, True), err
        code, _, err = call(weights, tmp_path / "b", tmp_path / "out")
        assert (code, bool(re.search(words, err))) == (1, True), err
        assert (
            call(
                tmp_path / "a", tmp_path / "b", tmp_path / f"good-{path.name}", "--weights", "0,1"
            )[0]
            == 0
        )
        path.write_bytes(kept)
    assert call(weights, tmp_path / "b", tmp_path / "out")[0] == 0


def test_shards(shop: list[Path], tmp_path: Path, call: Call) -> None:
    """--max-shard-size: several files and an index, the same weights; windows may end inside
    weights.
    """
    assert call(*shop, tmp_path / "one")[0] == 0
    assert call(*shop, tmp_path / "many", "--max-shard-size", "200B")[0] == 0
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    one, many = load_file(tmp_path / "one"), load_file(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)
    code, _, err = call(*shop, tmp_path / "one.safetensors", "--max-shard-size", "200B")
    assert (code, "bytes, max_shard_size is 200B. Name a folder." in err) == (1, True)


def test_windows(
    shop: list[Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*shop, tmp_path / "whole")[0] == 0
    monkeypatch.setattr("dist_ema.offline.blend.WINDOW", 4)
    monkeypatch.setattr("dist_ema.offline.blend.STEP", 3)
    code, out, _ = call(*shop, tmp_path / "parts")
    assert (code, "have no mean: count\n" in out) == (0, True)
    parts = load_file(tmp_path / "parts")
    assert all(
        torch.equal(weight, parts[name]) for name, weight in load_file(tmp_path / "whole").items()
    )


def test_differences(tmp_path: Path, call: Call) -> None:
    """All of them at once, over all models, and nothing is written."""
    save_file(model(0), tmp_path / "a.safetensors")
    b = model(1, more=torch.ones(1), scalar=torch.ones(1), same=torch.ones(5))
    del b["half"]
    save_file(b, tmp_path / "b.safetensors")
    save_file(model(2, wave=torch.ones(3)), tmp_path / "c.safetensors")
    code, out, err = call(*(tmp_path / f"{name}.safetensors" for name in "bca"), tmp_path / "out")
    assert (code, out) == (1, "")
    for words in (
        "5 differences", "b.safetensors lacks half", "b.safetensors has more besides",
        "scalar is [1] in", "same is F32 in", "wave is F32 in",
    ):  # fmt: skip
        assert words in err, err
    assert not (tmp_path / "out").exists()


def test_many_files(tmp_path: Path, call: Call) -> None:
    """More models than a process may open files."""
    for i in range(80):
        save_file(
            {"w": torch.full((2,), float(i)), "n": torch.tensor(7)}, tmp_path / f"m{i}.safetensors"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    try:
        code, _, err = call(*(tmp_path / f"m{i}.safetensors" for i in range(80)), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (code, err) == (0, "")
    assert load_file(tmp_path / "out")["w"].tolist() == [39.5, 39.5]


def test_large_values(tmp_path: Path, call: Call) -> None:
    """A mean of the largest float64 is finite, though their sum is not."""
    for name in "ab":
        save_file(
            {"w": torch.tensor([1.5e308], dtype=torch.float64)}, tmp_path / f"{name}.safetensors"
        )
    assert call(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out")[0] == 0
    assert load_file(tmp_path / "out")["w"].tolist() == [1.5e308]


def test_memory(tmp_path: Path, call: Call) -> None:
    """Six models of 48 MB: no more memory than 30 MB."""
    for i in range(6):
        save_file(
            {"w": torch.full((6 << 20,), float(i)), "v": torch.ones(6 << 20)},
            tmp_path / f"m{i}.safetensors",
        )
    tracemalloc.start()
    try:
        code, _, _ = call(*(tmp_path / f"m{i}.safetensors" for i in range(6)), tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == 0
    assert 4 << 20 < peak < 30 << 20
    assert set(load_file(tmp_path / "out")["w"].tolist()) == {2.5}


# --- order and weights ----------------------------------------------------------------------------


def test_order() -> None:
    """A shell sorts 10 before 9; where one number alone differs it is the order, else what was
    given is.
    """
    assert in_order(["run/ema-10", "run/ema-9", "run/ema-100"]) == [
        "run/ema-9",
        "run/ema-10",
        "run/ema-100",
    ]
    assert in_order(["e-10/ema", "e-9/ema"]) == ["e-9/ema", "e-10/ema"]
    for given in (
        ["b", "a"],
        ["run-2/ema-1", "run-1/ema-2"],
        ["b1", "a2"],
        ["x-2", "x-1-y"],
        ["m2", "m"],
        ["2a", "2a"],
    ):
        assert in_order(given) == given


def test_lawa_by_number(tmp_path: Path, call: Call) -> None:
    """The last ones are those of the highest numbers, and the table shows which."""
    for i in (8, 9, 10):
        save_file({"w": torch.tensor(float(i))}, tmp_path / f"ema-{i}.safetensors")
    given = sorted(tmp_path.glob("ema-*"))
    assert given[0].name == "ema-10.safetensors"
    code, out, _ = call(*given, tmp_path / "out", "--lawa", 2, "--json")
    assert code == 0
    report = json.loads(out)
    assert [Path(each["path"]).name for each in report["models"]] == [
        "ema-9.safetensors",
        "ema-10.safetensors",
    ]
    assert (report["averaged"], report["taken_from_last"]) == (1, [])
    assert load_file(tmp_path / "out")["w"] == 9.5
    code, out, _ = call(
        *given, tmp_path / "given", "--weights", "1,0,0"
    )  # weights are matched as they stand
    assert load_file(tmp_path / "given")["w"] == 10


def test_shares() -> None:
    assert shares(4, None, True) == [0.1, 0.2, 0.3, 0.4]
    for weights in ([1.0, -1.0], [float("inf"), 1.0], [float("nan"), 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="must be finite and must not sum to 0"):
            shares(2, weights, False)


def test_what_goes_along(shop: list[Path], tmp_path: Path, call: Call) -> None:
    """The licence, what links lead to, and a card that says what was averaged; the same as with
    export.
    """
    (shop[2] / "LICENSE").write_text("free")
    (shop[2] / "tokenizer.json").symlink_to(shop[1] / "config.json")
    assert call(*shop, tmp_path / "out", "--weights", "1,1,2")[0] == 0
    export(shop[2], tmp_path / "shipped")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "shipped").iterdir()
    }
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "config.json of 1"
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "over models",
        f"|  | `0.25 of {shop[0]}` |\n",
        f"| mixed from | `0.5 of {shop[2]}` |",
        "last | `count` |",
    ):
        assert said in card, said
    assert "not told by its source" not in card
    (tmp_path / "out" / "README.md").write_text("mine\n" + card)
    assert call(*shop, tmp_path / "out", "--force")[0] == 0
    again = (tmp_path / "out" / "README.md").read_text()
    assert again.startswith("mine\nREADME.md of 2")
    assert again.count("## Averaged weights") == 1
    assert f"0.333333 of {shop[0]}" in again
    assert call(*[shop[0]] * 25, tmp_path / "many")[0] == 0
    assert "and 5 more, in ema.json" in (tmp_path / "many" / "README.md").read_text()


def test_tied(tmp_path: Path, call: Call) -> None:
    """Tied weights meet under whatever name each file has; a model that does not tie them is named,
    not cut.
    """
    one, two = torch.randn(3, 2), torch.randn(3, 2)
    save_file({"emb": one}, a := tmp_path / "a.safetensors", {"head": "emb"})
    save_file({"head": two}, b := tmp_path / "b.safetensors")
    save_file({"emb": two, "head": two.clone()}, c := tmp_path / "c.safetensors")
    save_file({"emb": two, "head": one}, d := tmp_path / "d.safetensors")
    for i, pair in enumerate(((a, b), (b, a), (c, a))):
        assert call(*pair, tmp_path / f"{i}.safetensors")[0] == 0, pair
        for tensor in load_file(tmp_path / f"{i}.safetensors").values():
            assert torch.equal(tensor, ((one.double() + two.double()) / 2).float())
    code, _, err = call(d, a, tmp_path / "out.safetensors")
    assert code == 1
    assert f"1 differences: head is tied to emb in {a}, another weight in {d}." in err
    assert call(a, d, tmp_path / "untied.safetensors")[0] == 0
    assert torch.equal(load_file(tmp_path / "untied.safetensors")["head"], one)


def test_through_links(shop: list[Path], tmp_path: Path, call: Call) -> None:
    """OUT is what a link leads to, a folder or a file: that is replaced, and the link stays."""
    for name, real in (
        ("folder", "real"),
        ("file.safetensors", "real.safetensors"),
        ("plain", "other.safetensors"),
    ):
        (tmp_path / name).symlink_to(tmp_path / "deep" / real)
        assert call(*shop, tmp_path / name)[0] == 0
        assert "exists. Pass --force" in call(*shop, tmp_path / name)[2]
        assert call(*shop, tmp_path / name, "--force", "--wma")[0] == 0
        assert (tmp_path / name).is_symlink()
        wanted = expected([model(i) for i in range(3)], [1 / 6, 2 / 6, 3 / 6])["w"]
        assert torch.equal(load_file(tmp_path / "deep" / real)["w"], wanted)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop is a link that leads to itself" in call(*shop, tmp_path / "loop", "--force")[2]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [
        "other.safetensors",
        "real",
        "real.safetensors",
    ]


def test_names_that_are_no_text(shop: list[Path], tmp_path: Path, call: Call) -> None:
    """A path may be any bytes, and ema.json is UTF-8: they are there as escapes."""
    odd = tmp_path / os.fsdecode(b"odd\xff")
    export(shop[0], odd)
    export(odd, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "ema.json").read_text())["source"]["name"] == "odd\\udcff"
    assert call(odd, shop[1], tmp_path / "mean")[0] == 0
    made_of = json.loads((tmp_path / "mean" / "ema.json").read_text())["extra"]["average"]["models"]
    assert [model["path"] for model in made_of] == [f"{tmp_path}/odd\\udcff", str(shop[1])]


# --- refusals -------------------------------------------------------------------------------------


def test_refused(shop: list[Path], tmp_path: Path, call: Call) -> None:
    """Exit code 2 for a wrong command, 1 for files that will not do, one sentence each."""
    for arguments, wanted, words in (
        ([shop[0], tmp_path / "out"], 2, "at least two models and an OUT"),
        ([*shop, "out", "--weights", "1,x"], 2, "must be numbers with commas"),
        ([*shop, "out", "--weights", "1,nan"], 2, "must be numbers with commas"),
        ([*shop, "out", "--lawa", "0"], 2, "whole number of 1 or more"),
        ([*shop, "out", "--wma", "--weights", "1,1,1"], 2, "not allowed with"),
        ([*shop, tmp_path / "out", "--weights", "1,1"], 1, "names 2 weights for 3 models"),
        ([*shop, tmp_path / "out", "--lawa", "4"], 1, "asks for more models than the 3"),
        ([*shop, tmp_path / "nowhere" / "x", tmp_path / "out"], 2, "x does not exist"),
        ([*shop, tmp_path / "hf"], 1, "exists. Pass --force"),
        ([*shop, tmp_path / "out", "--max-shard-size", "much"], 2, "max_shard_size must be"),
        ([*shop, tmp_path / "hf" / "out"], 1, "lies inside"),
        (
            [*shop, tmp_path / "out", "--weights", "1e308,1e308,1"],
            1,
            "too large to compute with",
        ),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (wanted, ""), arguments
        assert words in err
    assert not (tmp_path / "out").exists()
    assert (
        call(*shop, tmp_path / "hf", "--force")[0] == 0
    )  # over one of the inputs: read before it is replaced
    assert torch.equal(
        load_file(tmp_path / "hf")["w"], expected([model(i) for i in range(3)], [1 / 3] * 3)["w"]
    )
    assert (tmp_path / "hf" / "optimizer.bin").exists()
