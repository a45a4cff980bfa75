"""Reading: what differs is said at once, what is damaged changes nothing, and any safetensors model
is a start.

How to read a failure: `small` makes a model of a few weights whose values say which weight they
are; `values` is what an average holds. The fuzz at the end names the mutation; tests/fuzz.py makes
it again from the seed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from dist_ema import EMA, Uniform, load_file
from dist_ema.checkpoint import atomic, manifest, reader, safetensors
from tests._models import Core, Images, Net
from tests._ranks import raises, run_program, run_ranks
from tests._wrappers import wrap
from tests.ema_json import stamped
from tests.fuzz import damaged, mutations

STARTS = "ignore:.*comes without ema.json:UserWarning"


def values(ema: EMA, which: int = 0) -> dict[str, Tensor]:
    return {slot.name: slot.shadow.clone() for slot in ema.weights.averages[which].averaged}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(model: nn.Module, decay: Any = 0.5, updates: int = 3, **options: Any) -> EMA:
    """An average that is neither live nor what it began with."""
    ema = EMA(model, decay, **options)
    for i in range(updates):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        ema.update()
    return ema


@contextmanager
def nothing_changes(ema: EMA) -> Iterator[None]:
    """The block raises, and the average is as before."""
    before, clock = values(ema), ema.weights.clock_to_dict()
    yield
    assert same(before, values(ema))
    assert clock == ema.weights.clock_to_dict()


# --- names and shapes -----------------------------------------------------------------------------


def wide(names: str, size: int = 3) -> nn.Module:
    model = nn.Module()
    for i, name in enumerate(names):
        model.register_parameter(name, nn.Parameter(torch.full((size,), float(i + ord(name)))))
    return model


def test_all_differences_are_listed(tmp_path: Path) -> None:
    """Three lists with counts, five names each; the message says how to load what is common, unless
    shapes differ.
    """
    moved(wide("abcdefgh")).save(tmp_path / "a")
    ema = EMA(wide("aABCDEFGH"), 0.5)
    with (
        nothing_changes(ema),
        pytest.raises(ValueError, match="and the model disagree on 15 weights: ") as caught,
    ):
        ema.load(tmp_path / "a")
    text = str(caught.value)
    assert "8 missing (A; B; C; D; E; and 3 more), 7 unexpected (b; c; d; e; f; and 2 more)" in text
    assert text.endswith("Pass strict=False to load what they have in common.")
    ema = EMA(wide("abcdefgh", 4), 0.5)
    for strict in (True, False):
        with nothing_changes(ema), pytest.raises(ValueError) as caught:  # noqa: PT011
            ema.load(tmp_path / "a", strict=strict)
        assert "8 reshaped (a: (3,) on disk, (4,) in the model; b" in str(caught.value)
        assert "strict=False" not in str(caught.value)


def test_what_is_common(tmp_path: Path) -> None:
    """strict=False: new weights take the live values, left-over ones are ignored, and both are
    named.
    """
    old = moved(wide("abc"))
    old.save(tmp_path / "a")
    ema = EMA(wide("bcde"), 0.5)
    with torch.no_grad():
        ema.weights.model.d.fill_(-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.load(tmp_path / "a", strict=False)
    said = [str(each.message) for each in caught]
    assert any(
        "lacks d; e: what is averaged starts from the live value there" in text for text in said
    )
    assert any("holds a, which the model lacks: left out" in text for text in said)
    assert all(each.filename == __file__ for each in caught), "the warning points here"
    found = values(ema)
    assert same({name: found[name] for name in "bc"}, {name: values(old)[name] for name in "bc"})
    assert (found["d"] == -1).all()
    assert torch.equal(found["e"], ema.weights.model.e)
    assert ema.now == 3


def test_another_kind_is_no_weight(tmp_path: Path) -> None:
    """Integers and complex numbers do not become an average silently, strict or not."""
    for value in (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.complex64)):
        save_file({"a": value}, tmp_path / "model.safetensors")
        ema = EMA(wide("a"), 0.5)
        with (
            nothing_changes(ema),
            pytest.raises(
                ValueError, match=r"1 of another kind \(a: torch\.(int32|complex64) on disk"
            ),
        ):
            ema.load(tmp_path, strict=False)


def test_an_ema_that_has_not_started(tmp_path: Path) -> None:
    """attach(start=...) not reached: loading what had started goes on at once; what had not started
    has not.
    """
    saved = moved(wide("ab"))
    saved.save(tmp_path / "a")
    model = wide("ab")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, start=1000)
    ema.load(tmp_path / "a")
    assert same(values(ema), values(saved)), "and not live again"
    assert (ema.gather()["a"] == values(saved)["a"]).all()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (ema.now, ema.metrics()["updates"]) == (4, 4)
    late = EMA(wide("ab"), 0.5)
    late.attach(torch.optim.SGD(late.weights.model.parameters(), 0.1), start=10)
    late.save(tmp_path / "late")
    ema.load(tmp_path / "late")
    assert not ema.weights.clock.started


def test_a_state_dict_with_a_broken_clock() -> None:
    """Refused before the first shadow is written."""
    ema = moved(wide("ab"))
    state = moved(wide("ab"), updates=7).state_dict()
    for value in (float("nan"), -1.0, 2.0**63, 0.5):
        state["clock"][2] = value  # steps
        with (
            nothing_changes(ema),
            pytest.raises(ValueError, match="the saved clock has no sound 'steps'"),
        ):
            ema.load_state_dict(state)


# --- a start from any model -----------------------------------------------------------------------


@pytest.mark.filterwarnings(STARTS)
@pytest.mark.parametrize("shadow", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_a_start(
    shadow: torch.dtype, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted window by window, here of 64 bytes; the clock is that of a new EMA, buffers are not
    taken.
    """
    monkeypatch.setattr("dist_ema.checkpoint.open_file.WINDOW", 64)
    source = {
        name: (value.to(stored) if value.is_floating_point() else value)
        for name, value in Images().state_dict().items()
    }
    source = {
        name: torch.randn_like(v) if v.is_floating_point() else v for name, v in source.items()
    }
    save_file(source, tmp_path / "model.safetensors", {"format": "pt"})
    model = Images().to(memory_format=torch.channels_last)
    ema = moved(model, Uniform(), dtype=shadow)
    with ema.swap():
        model.norm.running_mean += 5
    ema.load(tmp_path)
    full = ema.gather()
    assert all(torch.equal(full[name], source[name].to(shadow)) for name in ema.names())
    assert torch.equal(full["norm.running_mean"], model.norm.running_mean), (
        "live, not recalibrated and not the file's"
    )
    assert (ema.now, ema.metrics()["updates"], ema.weights.clock.started) == (0, 0, True)
    ema.update()
    copied = ema.gather()["head.bias"].to(model.head.bias.dtype)
    assert torch.allclose(copied, model.head.bias, rtol=2**-7), (
        "Uniform copies first (bf16 rounds stochastically)"
    )


def place(layout: str, folder: Path, weights: dict[str, Tensor]) -> Path:
    """The weights in a folder of one of the layouts that people have. Returns what to load."""
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    if "sharded" not in layout:
        name = (
            "diffusion_pytorch_model.safetensors" if "diffusers" in layout else "model.safetensors"
        )
        name = "flow.safetensors" if layout in ("odd stem", "one file") else name
        save_file(weights, folder / name, {"format": "pt"})
        return folder / name if layout == "one file" else folder
    stem = "diffusion_pytorch_model" if "diffusers" in layout else "model"
    where = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"{stem}-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"{stem}-0000{i + 1}-of-00002.safetensors")
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index if "index" in layout else folder


LAYOUTS = [
    "transformers",
    "diffusers",
    "odd stem",
    "one file",
    "sharded",
    "sharded diffusers",
    "sharded, by its index",
]


@pytest.mark.filterwarnings(STARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", ["emb.weight", "head.weight", "both"])
def test_every_layout_is_a_start(layout: str, tied: str, tmp_path: Path) -> None:
    """Of tied names the file may hold either, or both if they agree.

    Frozen weights and buffers need not be there.
    """
    weights = {name: torch.randn(value.shape) for name, value in Core().named_parameters()}
    weights["head.weight"] = weights["emb.weight"].clone()
    for name in {"emb.weight", "head.weight"} - (
        {tied} if tied != "both" else {"emb.weight", "head.weight"}
    ):
        del weights[name]
    for name in ("frozen.weight", "frozen.bias"):
        weights[name] = torch.zeros(2)  # another shape: it is not read
    path = place(layout, tmp_path, weights)
    model = Core()
    ema = moved(model)
    ema.load(path)
    full = ema.gather()
    want = weights.get("emb.weight", weights.get("head.weight"))
    assert torch.equal(full["emb.weight"], want)
    assert torch.equal(full["head.weight"], want)
    assert all(
        torch.equal(full[name], weights[name]) for name in ema.names() if name != "emb.weight"
    )
    assert torch.equal(full["frozen.weight"], model.frozen.weight)
    assert load_file(path).keys() == weights.keys()
    del weights["gate.bias"]
    weights["position_ids"] = torch.ones(3)
    path = place(layout, tmp_path, weights)
    with (
        nothing_changes(ema),
        pytest.raises(ValueError, match=r"1 missing \(gate.bias\), 1 unexpected \(position_ids\)"),
    ):
        ema.load(path)


def test_tied_here_and_not_there(tmp_path: Path) -> None:
    """Two values for one weight: taking either would lose the other."""
    weights = {name: value.clone() for name, value in Core().state_dict().items()}
    weights["head.weight"][3, 4] += 1
    save_file(weights, tmp_path / "model.safetensors")
    ema = EMA(Core(), 0.5)
    for strict in (True, False):
        with (
            nothing_changes(ema),
            pytest.raises(
                ValueError, match=r"emb.weight and head.weight are one weight in the model"
            ),
        ):
            ema.load(tmp_path, strict=strict)


def test_an_export_is_a_start(tmp_path: Path) -> None:
    """A folder says that it has no clock to go on with; its sums are checked; one file is as
    good.
    """
    saved = moved(Core())
    saved.export(tmp_path / "out", max_shard_size=300)
    saved.export(tmp_path / "one.safetensors")
    ema = moved(Core(), updates=1)
    with pytest.warns(UserWarning, match=r"out is an export: .* its clock at 0\. What ema\.save"):
        ema.load(tmp_path / "out")
    assert same(values(ema), values(saved))
    assert ema.now == 0
    ema = EMA(Core(), 0.5)
    with pytest.warns(
        UserWarning, match="one.safetensors comes without ema.json: the average starts from it"
    ):
        ema.load(tmp_path / "one.safetensors")
    assert same(values(ema), values(saved))
    flip(next((tmp_path / "out").glob("*-00002-of-*")))
    with nothing_changes(ema), pytest.raises(ValueError, match="is damaged: its CRC-32 is"):
        ema.load(tmp_path / "out")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings(STARTS)
def test_several_start_and_resume(tmp_path: Path) -> None:
    """All averages start from one model.

    Saved ones are found by their schedules, also beyond ten; the rest in order.
    """
    decays = [i / 16 for i in range(12)]
    saved = EMA(wide("ab"), decays)
    for i, profile in enumerate(saved.weights.averages):
        for slot in profile.averaged:
            slot.shadow.fill_(i)
    saved.save(tmp_path / "a")
    ema = EMA(wide("ab"), decays)
    ema.load(tmp_path / "a")
    assert [int(values(ema, i)["a"][0]) for i in range(12)] == list(range(12))
    two = EMA(wide("ab"), [decays[1], 0.99])
    with pytest.warns(
        UserWarning,
        match=r"averaged with Constant\(decay=0.0\); this EMA goes on with Constant\(decay=0.99\)",
    ):
        two.load(tmp_path / "a")
    assert [int(values(two, i)["a"][0]) for i in range(2)] == [1, 0]
    two = EMA(wide("ab"), [0.99, decays[0]])
    with pytest.warns(UserWarning, match=r"averaged with Constant\(decay=0.0625\)"):
        two.load(tmp_path / "a")
    assert [int(values(two, i)["a"][0]) for i in range(2)] == [1, 0], (
        "not the one that the other took"
    )
    save_file(
        {"a": torch.full((3,), 7.0), "b": torch.full((3,), 8.0)}, tmp_path / "model.safetensors"
    )
    two.load(tmp_path / "model.safetensors")
    assert [int(values(two, i)["b"][0]) for i in range(2)] == [8, 8]


# --- the disk -------------------------------------------------------------------------------------


def test_files_that_nobody_summed(tmp_path: Path) -> None:
    """An index that leads to another file with the same weights: its bytes have no check sum."""
    ema = moved(Core())
    ema.save(tmp_path / "a", max_shard_size=300)
    index = tmp_path / "a" / safetensors.INDEX
    table = json.loads(index.read_text())
    name = table["weight_map"]["gate.bias"]
    shutil.copy(tmp_path / "a" / name, tmp_path / "a" / "x.safetensors")
    flip(tmp_path / "a" / "x.safetensors")
    table["weight_map"] = {
        k: "x.safetensors" if v == name else v for k, v in table["weight_map"].items()
    }
    index.write_text(json.dumps(table))
    for read in (ema.load, load_file):
        with (
            nothing_changes(ema),
            pytest.raises(ValueError, match=r"files: x\.safetensors is not listed"),
        ):
            read(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:.*(starts from|left out)")
@pytest.mark.parametrize("verb", ["save", "export"])
def test_a_file_of_a_folder_is_summed_too(verb: str, tmp_path: Path) -> None:
    """Naming the file or the index, and not the folder around it, does not leave the check out."""
    ema = moved(Core())
    getattr(ema, verb)(tmp_path / "one")
    getattr(ema, verb)(tmp_path / "many", max_shard_size=300)  # in four
    names = (
        "one/model.safetensors",
        "many/model-00001-of-00004.safetensors",
        f"many/{safetensors.INDEX}",
    )
    for name in names:
        EMA(Core(), 0.5).load(tmp_path / name, strict=False)
    flip(tmp_path / names[0])
    flip(tmp_path / names[1])
    for name in names:
        with nothing_changes(ema), pytest.raises(ValueError, match="is damaged: its CRC-32"):
            ema.load(tmp_path / name, strict=False)


ODD_META: list[dict[str, Any]] = [
    {"files": {"model.safetensors": {}}}, {"files": {"model.safetensors": 7}}, {"kind": "sun"},
    {"weights": "some"}, {"files": {"model.safetensors": {"size": "1", "crc32": "00000000"}}},
    {"aliases": []}, {"aliases": {"a": "b"}},
    {"files": {"model.safetensors": {"size": 1, "crc32": None}}}, {"aliases": {"a": [7]}},
    {"averaged": "ab"}, {"averaged": [1]}, {"own_buffers": {"a": 1}},
    {"averages": {"x-Constant": {"own_buffers": []}}}, {"schedules": [7]},
    {"averages": {"1-Constant": {}}}, {"schedules": [{"name": "Power", "sigma_rel": 1e-300}]},
    {"clock": [1]},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_META, ids=str)
def test_ema_json_is_not_trusted(odd: dict[str, Any], tmp_path: Path) -> None:
    """What reading would trip over in the middle is one sentence at the beginning:
    Manifest.problems.
    """
    ema = moved(wide("ab"))
    ema.save(tmp_path / "a")
    path = tmp_path / "a" / manifest.META
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    with nothing_changes(ema), pytest.raises(ValueError, match=r"ema\.json is damaged: \w+: "):
        ema.load(tmp_path / "a")


@pytest.mark.parametrize("where", ["a", "a/model.safetensors"])
def test_ema_json_has_a_check_sum(where: str, tmp_path: Path) -> None:
    """Sound, and not what was written. JSON that says the same in another layout is not damaged."""
    ema = moved(wide("ab"))
    ema.save(tmp_path / "a")
    path = tmp_path / "a" / manifest.META
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta))
    ema.load(tmp_path / "a")
    path.write_text(json.dumps(meta | {"clock": meta["clock"] | {"updates": 99}}))
    with (
        nothing_changes(ema),
        pytest.raises(ValueError, match=r"ema\.json was changed since dist_ema wrote it"),
    ):
        ema.load(tmp_path / where)


def test_a_file_of_another_length(tmp_path: Path) -> None:
    """Sound in itself, and not what was written: seen without the check sum too."""
    ema = moved(wide("ab"))
    ema.save(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]
    )
    for read in (lambda path: ema.load(path, verify=False), load_file):
        with (
            nothing_changes(ema),
            pytest.raises(ValueError, match=f"it holds {len(data) + 8} bytes, .* says {len(data)}"),
        ):
            read(tmp_path / "a")


def test_ema_json_leads_nowhere(tmp_path: Path) -> None:
    """A broken link is no folder without ema.json, whose clock would begin at 0."""
    ema = moved(wide("ab"))
    ema.save(tmp_path / "a")
    os.rename(tmp_path / "a" / manifest.META, tmp_path / "kept")
    os.symlink("gone", tmp_path / "a" / manifest.META)
    for read in (ema.load, load_file):
        with nothing_changes(ema), pytest.raises(OSError, match=r"ema\.json"):
            read(tmp_path / "a")


def test_aliases_that_cannot_be(tmp_path: Path) -> None:
    """Another name of a weight that is a weight itself would be read in its place."""
    ema = moved(wide("abc"))
    ema.save(tmp_path / "a")
    path = tmp_path / "a" / manifest.META
    path.write_bytes(stamped(json.loads(path.read_text()) | {"aliases": {"a": ["b"]}}))
    for read in (ema.load, load_file):
        with (
            nothing_changes(ema),
            pytest.raises(
                ValueError, match="b is listed as another name of a, and is a weight itself"
            ),
        ):
            read(tmp_path / "a")


def test_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save over the folder between the check and the reading: one version is read, the one that
    was checked.
    """
    old, new = moved(Core()), moved(Core(), updates=5)
    old.save(tmp_path / "a")
    fill = reader.OpenCheckpoint.fill

    def late(self: reader.OpenCheckpoint, ranks: Any) -> Any:
        new.save(tmp_path / "a")
        return fill(self, ranks)

    monkeypatch.setattr(reader.OpenCheckpoint, "fill", late)
    ema = EMA(Core(), 0.5)
    ema.load(tmp_path / "a", verify=False)
    assert same(values(ema), values(old))
    assert ema.now == 3


def test_a_disk_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between the check and the reading: an error, and a new average instead of a mixture.

    Guards AveragedWeights.begin_again.
    """
    moved(Core()).save(tmp_path / "a")
    fill = reader.OpenCheckpoint.fill

    def late(self: reader.OpenCheckpoint, ranks: Any) -> Any:
        os.truncate(tmp_path / "a" / "model.safetensors", 1500)
        return fill(self, ranks)

    monkeypatch.setattr(reader.OpenCheckpoint, "fill", late)
    model = Core()
    ema = moved(model)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        ema.load(tmp_path / "a")
    assert all(torch.equal(slot.shadow, slot.live) for slot in ema.weights.averages[0].averaged)
    assert (ema.now, ema.metrics()["updates"]) == (0, 0)


def test_no_handle_stays_open(tmp_path: Path) -> None:
    ema = moved(Core())
    ema.save(tmp_path / "a", max_shard_size=300)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ema.load(tmp_path / "a")
        with pytest.raises(ValueError, match="disagree"):
            EMA(wide("a"), 0.5).load(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == open_before


MEASURE = """
import sys, torch
from torch import nn
from dist_ema import EMA

def field(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(name))

torch.set_num_threads(1)
model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 6144, 4096) for _ in range(2)))
with torch.no_grad():
    for p in model.parameters():
        p.fill_(1.0)
ema = EMA(model, 0.5)
ema.save(sys.argv[1])
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
ema.reset()
open("/proc/self/clear_refs", "w").write("5")
base = field("VmRSS")
ema.load(sys.argv[1])
assert all((slot.shadow == 1).all() for slot in ema.weights.states)
print(field("VmHWM") - base)
"""


def test_memory_while_loading(tmp_path: Path) -> None:
    """201 MB of weights come in through windows of 4 MB; some 30 MB is the code that runs for the
    first time.
    """
    grown = int(run_program(MEASURE, str(tmp_path / "a")))
    assert grown <= 48, grown


# --- load_file ------------------------------------------------------------------------------------


def test_load_file(tmp_path: Path) -> None:
    """Whatever we or safetensors wrote: complete, and strictly loadable."""
    ema = moved(Core())
    want = ema.gather()
    ema.save(tmp_path / "a", max_shard_size=300)
    ema.export(tmp_path / "out")
    ema.export(tmp_path / "one.safetensors")
    theirs = Core()
    theirs.load_state_dict(want)
    save_model(theirs, str(tmp_path / "theirs.safetensors"))
    os.symlink(tmp_path / "a", tmp_path / "link")
    for name in ("one.safetensors", *(path.name for path in (tmp_path / "a").glob("model*"))):
        # A hub's cache: links to files whose names tell nothing.
        (tmp_path / "hub").mkdir(exist_ok=True)
        blob = tmp_path / f"blob-{name.replace('.', '-')}"
        shutil.copy(tmp_path / ("" if name == "one.safetensors" else "a") / name, blob)
        os.symlink(f"../{blob.name}", tmp_path / "hub" / name)
    for name in (
        "a",
        "a/model.safetensors.index.json",
        "out",
        "out/model.safetensors",
        "one.safetensors",
        "theirs.safetensors",
        "link",
        "hub/one.safetensors",
        "hub/model.safetensors.index.json",
    ):
        found = load_file(tmp_path / name)
        if "index" not in name:  # the aliases are in ema.json
            Core().load_state_dict(found, strict=True)
        assert all(torch.equal(found[key], want[key]) for key in found)
    shard = next((tmp_path / "a").glob("*-00001-of-*"))
    assert "head.weight" in load_file(shard) or "emb.weight" not in load_file(shard)
    assert load_model(Core(), str(tmp_path / "one.safetensors")) == (set(), [])


def test_load_file_refuses(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    shutil.copy(tmp_path / "a.pt", tmp_path / "pickles" / "pytorch_model.bin")
    ema = moved(wide("ab"))
    ema.save(tmp_path / "a")
    for name, words in [
        ("nowhere", "does not exist"), ("a.pt", "is no safetensors file.*`dist-ema convert` reads"),
        ("empty", "holds no model.safetensors"), ("a/ema.json", "name the folder, "),
        ("pickles", "holds no model.safetensors.*`dist-ema convert` reads"),
    ]:  # fmt: skip
        for read in (ema.load, load_file):
            with pytest.raises(ValueError, match=words):
                read(tmp_path / name)
    os.truncate(tmp_path / "a" / "model.safetensors", 100)
    with pytest.raises(ValueError, match="cut short"):
        load_file(tmp_path / "a")


def test_metadata_is_not_always_an_alias(tmp_path: Path) -> None:
    """Other writers keep other things there: 'format' is never a weight, and a weight is never
    overwritten.
    """
    save_file(
        {"pt": torch.ones(1), "b": torch.zeros(1)},
        tmp_path / "a.safetensors",
        {"format": "pt", "b": "pt", "c": "b"},
    )
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {"pt", "b", "c"}
    assert found["b"] == found["c"] == 0


# --- ranks ----------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of weights that this process really reads while the block runs."""
    read, sizes = os.preadv, list[int]()

    def counted(fd: int, buffers: Any, offset: int) -> int:
        sizes.append(read(fd, buffers, offset))
        return sizes[-1]

    os.preadv = counted  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        os.preadv = read


def on_ranks(folder: str) -> None:
    for kind in ("ddp", "fsdp2"):
        names_on_ranks(kind, f"{folder}/{kind}")
        slices_on_ranks(kind, f"{folder}/{kind}")
        damage_on_ranks(kind, f"{folder}/{kind}")
    replaced_between_ranks(folder)


def names_on_ranks(kind: str, folder: str) -> None:
    """The same report and start on every rank; warnings of all ranks are the first rank's."""
    ema = EMA(wrap(kind, Net()), 0.5)
    ema.update()
    ema.save(f"{folder}/a")
    other = Net()
    other.core.extra = nn.Parameter(torch.full((5, 2), 3.0))
    del other.core.gate
    model = wrap(kind, other)
    target = EMA(model, 0.25)
    target.attach(torch.optim.SGD(model.parameters(), 0.1), start=100)
    with (
        nothing_changes(target),
        raises(
            ValueError, "1 missing (core.extra), 2 unexpected (core.gate.bias; core.gate.weight)"
        ),
    ):
        target.load(f"{folder}/a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.load(f"{folder}/a", strict=False)
    said = " ".join(str(each.message) for each in caught)
    assert bool(said) == (dist.get_rank() == 0), said
    for words in (
        ()
        if dist.get_rank()
        else (
            "Constant(decay=0.5); this EMA goes on with Constant(decay=0.25)",
            "lacks core.extra:",
            "holds core.gate.bias",
        )
    ):
        assert words in said, said
    assert (target.now, target.weights.clock.started) == (1, True)
    full, want = target.gather(), ema.gather()
    for name in target.names() if full else ():
        assert torch.equal(full[name], want[name]) if name in want else (full[name] == 3).all()
    target.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The rank that warns raises; the others, which have no warning, do not wait for it.
        with suppress(UserWarning) if dist.get_rank() == 0 else nullcontext():
            target.load(f"{folder}/a", strict=False)
    assert (target.now, target.weights.clock.started) == (1, True)
    reshaped = EMA(wrap(kind, Net(hidden=4)), 0.5)
    with (
        nothing_changes(reshaped),
        raises(ValueError, "3 reshaped (core.blocks.0.up.weight: (5, 6) on disk, (4, 6)"),
    ):
        reshaped.load(f"{folder}/a", strict=False)


def slices_on_ranks(kind: str, folder: str) -> None:
    """A rank reads what it averages, in the file's dtype, and its half of every file if the sums
    are checked.
    """
    if dist.get_rank() == 0:
        source = {name: torch.randn(v.shape).bfloat16() for name, v in Net().named_parameters()}
        os.makedirs(f"{folder}/hf")
        place("sharded diffusers", Path(folder, "hf"), source)
    dist.barrier()
    ema = EMA(wrap(kind, Net()), 0.5)
    held = sum(slot.averaged_region.numel for slot in ema.weights.averages[0].averaged)
    with counting() as sizes, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*comes without ema.json")
        ema.load(f"{folder}/hf")
    assert sum(sizes) == 2 * held
    want, full = load_file(f"{folder}/hf"), ema.gather()
    assert all(torch.equal(full[name], want[name].float()) for name in ema.names() if full)
    with counting() as sizes:
        ema.load(f"{folder}/a", verify=False)
    assert sum(sizes) == 4 * held
    size = os.path.getsize(f"{folder}/a/model.safetensors")
    with counting() as sizes:
        ema.load(f"{folder}/a")
    assert 4 * held + size // 2 <= sum(sizes) <= 4 * held + size // 2 + 1


def damage_on_ranks(kind: str, folder: str) -> None:
    """A flipped bit is an error on all, whoever's part it lies in; so are files that the ranks do
    not see alike.
    """
    mine = dist.get_rank() == 1
    ema = EMA(wrap(kind, Net()), 0.5)
    for _ in range(2):
        ema.update()
    os.makedirs(f"{folder}/other", exist_ok=True)
    for path in (f"{folder}/b", f"{folder}/other/b"):
        ema.save(path)
    if not mine:
        flip(Path(folder, "b", "model.safetensors"))
    dist.barrier()
    with nothing_changes(ema), raises(ValueError, "is damaged: its CRC-32 is"):
        ema.load(f"{folder}/b")
    if not mine:
        for name, lost in [("fresh", ""), ("stale", "scale")]:
            os.makedirs(f"{folder}/{name}")
            held = {key: value.detach() for key, value in Net().named_parameters() if key != lost}
            save_file(held, f"{folder}/{name}/model.safetensors")
    for name in ("verify", "strict"):
        with nothing_changes(ema), raises(ValueError, f"{name} is False on rank 0 and True on"):
            ema.load(f"{folder}/a", **{name: bool(mine)})
    dist.barrier()
    opened = os.open
    if mine:  # as the cache of a network file system may show it
        os.open = lambda path, *args, **kwargs: opened(
            str(path).replace("fresh", "stale"), *args, **kwargs
        )
    try:
        with nothing_changes(ema), raises(ValueError, "the ranks see different files in", "fresh"):
            ema.load(f"{folder}/fresh", strict=False)
    finally:
        os.open = opened


def replaced_between_ranks(folder: str) -> None:
    """Another job saves over the folder while the ranks open it: all of them load one version."""
    ema = moved(wrap("ddp", Net()))
    ema.save(f"{folder}/race")
    with torch.no_grad():
        for p in ema.weights.model.parameters():
            p += 1
    ema.update()
    ema.save(f"{folder}/next")
    wanted, path = values(ema), Path(os.path.realpath(folder), "race")
    opened = reader.OpenFile

    def replace(file: Path) -> reader.OpenFile:
        reader.OpenFile = opened  # type: ignore[misc]
        new = atomic.temporary_sibling(path)
        shutil.copytree(f"{folder}/next", new)
        atomic.publish(new, path)
        return opened(file)

    dist.barrier()
    if dist.get_rank() == 1:
        reader.OpenFile = replace  # type: ignore[misc, assignment]
    ema.reset()
    ema.load(path, verify=False)
    assert reader.OpenFile is opened, "nothing was replaced"
    assert same(values(ema), wanted)


def test_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, str(tmp_path))


# --- fuzz -----------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: kind and time of change, and what the files hold."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        held = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = status.st_mode, status.st_mtime_ns, held
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two averages, several files each, tied names, an own buffer."""
    model = Core()
    ema = moved(model, [0.5, Uniform()])
    with ema.swap():
        model.mean += 1
    ema.save(tmp_path_factory.mktemp("good") / "a", max_shard_size=1000)
    return tmp_path_factory.getbasetemp() / "good0" / "a"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fuzz(good: Path, seed: int, tmp_path: Path) -> None:
    """100 damaged folders a seed: a ValueError or OSError, or exactly the weights and the clock
    that were saved; nothing is written, and an average that could not be loaded is as it was.
    """
    ema = moved(Core(), [0.5, Uniform()])
    ema.load(good)
    want, clock = [values(ema, i) for i in range(2)], ema.weights.clock_to_dict()
    marks = [{name: torch.full_like(value, 7.0) for name, value in each.items()} for each in want]
    outcomes = {"loaded": 0, "refused": 0}
    for label, folder in islice(damaged(good, tmp_path / "case" / "a", seed), 100):
        before = tree(folder.parent)
        for profile in ema.weights.averages:
            for slot in profile.averaged:
                slot.shadow.fill_(7.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ema.load(folder)
                outcome = "loaded"
            except (ValueError, OSError) as error:
                outcome = "refused"
                assert len(str(error)) < 3000, (label, error)
            except BaseException as error:
                raise AssertionError(
                    f"seed {seed}, {label}: {type(error).__name__}: {error}"
                ) from error
        outcomes[outcome] += 1
        found = [values(ema, i) for i in range(2)]
        assert all(map(same, found, want if outcome == "loaded" else marks)), (
            f"seed {seed}, {label}: {outcome}"
        )
        assert ema.weights.clock_to_dict() == clock, f"seed {seed}, {label}: {outcome}"
        try:
            load_file(folder)
        except (ValueError, OSError):
            pass
        except BaseException as error:
            raise AssertionError(
                f"load_file, seed {seed}, {label}: {type(error).__name__}: {error}"
            ) from error
        assert tree(folder.parent) == before, f"seed {seed}, {label} wrote something"
    assert min(outcomes.values()) >= 1, outcomes


def test_fuzz_is_the_same_again(good: Path, tmp_path: Path) -> None:
    """A seed makes the same folders, so a failure can be looked at."""
    for name in ("one", "two"):
        for i, (_, change) in enumerate(islice(mutations(5), 30)):
            shutil.copytree(good, tmp_path / name / str(i) / "a")
            change(tmp_path / name / str(i) / "a")
    one, two = (
        {key.split(f"/{name}/")[1]: value[2] for key, value in tree(tmp_path / name).items()}
        for name in ("one", "two")
    )
    assert one == two
