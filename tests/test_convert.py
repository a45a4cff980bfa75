"""Other people's checkpoints: each structure as its package writes it, what is taken from it, and
what is refused.

How to read a failure: `MADE` builds a checkpoint by the names of its kind; `converted` runs the
command and reads the model back with safetensors. The real packages' own files were converted too;
their structures are what is built here.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import EMA
from dist_ema.cli import convert as cli
from dist_ema.cli import main
from dist_ema.foreign import recognise
from dist_ema.offline import convert as offline
from dist_ema.text import size
from tests._models import Tied
from tests._ranks import run_program
from tests.conftest import Call

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is:UserWarning"
)  # it is not used, on purpose

State = dict[str, torch.Tensor]


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Tied()
    nn.init.normal_(model.frozen)
    model.norm.running_mean += seed
    return model


LIVE, SHADOW = net(1).state_dict(), net(2).state_dict()
PARAMETERS = [name for name, _ in net(1).named_parameters()]
LDM_LIVE = {
    "model.diffusion.a.b": torch.randn(3),
    "model.diffusion.a.c": torch.randn(2),
    "first_stage.w": torch.randn(4),
}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged() -> State:
    """torch's own."""
    model = AveragedModel(net(1), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    model.update_parameters(net(1))
    model.update_parameters(net(2))
    return dict(model.state_dict())


AVERAGED = averaged()
CLOCK = {"n_averaged": 2}
ONE = {"ema_model.": SHADOW, "online_model.": LIVE}
EMA_PYTORCH = {"initted": torch.tensor(True), "step": torch.tensor(5)} | {
    p + n: v for p, s in ONE.items() for n, v in s.items()
}
LIGHTNING = {
    "pytorch-lightning_version": "2.6.6",
    "global_step": 8,
    "epoch": 4,
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "hyper_parameters": {"a": 1},
    "optimizer_states": [
        {"state": {0: {"exp_avg": torch.ones(7, 4)}}, "param_groups": [{"params": [0]}]}
    ],
}
SHADOWS = [SHADOW[name] for name in PARAMETERS]

# (what torch.save gets, the key that must be taken, the kind, the state_dict that must come out,
# what goes into extra)
MADE: dict[str, tuple[Any, str, str, State, dict[str, Any]]] = {
    "averaged model": (
        AVERAGED,
        "",
        "torch",
        {n[7:]: v for n, v in AVERAGED.items() if n != "n_averaged"},
        CLOCK,
    ),
    "torchvision": (
        {"model": LIVE, "model_ema": AVERAGED, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "model_ema",
        "torch",
        {n[7:]: v for n, v in AVERAGED.items() if n != "n_averaged"},
        CLOCK,
    ),
    "lightning": (
        LIGHTNING
        | {
            "state_dict": under("model.", SHADOW),
            "current_model_state": under("model.", LIVE),
            "averaging_state": {"n_averaged": torch.tensor(8)},
        },
        "state_dict",
        "lightning",
        under("model.", SHADOW),
        {"n_averaged": 8, "global_step": 8, "epoch": 4},
    ),
    "lightning swa": (
        LIGHTNING
        | {
            "state_dict": LIVE,
            "callbacks": {
                "StochasticWeightAveraging": {"n_averaged": 4, "average_model_state": SHADOW},
                "X{'a': None}": {},
            },
        },
        "callbacks.StochasticWeightAveraging.average_model_state",
        "lightning",
        SHADOW,
        {"n_averaged": 4},
    ),
    "timm": (
        {
            "epoch": 3,
            "arch": "r",
            "state_dict": LIVE,
            "state_dict_ema": SHADOW,
            "metric": 0.5,
            "args": argparse.Namespace(lr=1),
        },
        "state_dict_ema",
        "timm",
        SHADOW,
        {"epoch": 3, "arch": "r", "metric": 0.5},
    ),
    "timm, wrapped": (
        {"state_dict_ema": under("module.", SHADOW)},
        "state_dict_ema",
        "timm",
        SHADOW,
        {},
    ),
    "ema-pytorch": (EMA_PYTORCH, "", "ema-pytorch", SHADOW, {"step": 5, "initted": True}),
    "ema-pytorch in a trainer": (
        {"model": LIVE, "opt": {}, "ema": EMA_PYTORCH},
        "ema",
        "ema-pytorch",
        SHADOW,
        {"step": 5},
    ),
    "ldm": (
        {
            "state_dict": LDM_LIVE
            | {
                "model_ema.diffusionab": torch.ones(3),
                "model_ema.diffusionac": torch.zeros(2),
                "model_ema.decay": torch.tensor(0.5),
                "model_ema.num_updates": torch.tensor(9, dtype=torch.int32),
            }
        },
        "state_dict.model_ema",
        "ldm",
        LDM_LIVE | {"model.diffusion.a.b": torch.ones(3), "model.diffusion.a.c": torch.zeros(2)},
        {"num_updates": 9, "decay": 0.5},
    ),
    "mmengine": (
        {
            "state_dict": SHADOW,
            "ema_state_dict": under("module.", LIVE) | {"steps": torch.tensor(6)},
            "meta": {"iter": 1},
        },
        "state_dict",
        "mmengine",
        SHADOW,
        {"steps": 6},
    ),
    "plain": ({"params": LIVE, "params_ema": SHADOW}, "params_ema", "raw", SHADOW, {}),
    "wrapped": ({"net_ema": under("module._orig_mod.", SHADOW)}, "net_ema", "raw", SHADOW, {}),
    "only a table": (SHADOW, "", "raw", SHADOW, {}),
}


@pytest.fixture
def call(call: Call) -> Call:
    return partial(call, "convert")


def model(path: Path) -> tuple[State, dict[str, Any]]:
    """The complete state_dict, aliases restored, and ema.json."""
    meta = json.loads((path / "ema.json").read_text())
    weights = load_file(path / "model.safetensors")
    return weights | {
        alias: weights[name] for name, others in meta["aliases"].items() for alias in others
    }, meta


def equal(found: State, want: State) -> None:
    assert sorted(found) == sorted(want)
    assert [
        name
        for name in want
        if not torch.equal(found[name], want[name]) or found[name].dtype != want[name].dtype
    ] == []


# --- each kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", MADE)
def test_kinds(what: str, call: Call, tmp_path: Path) -> None:
    """The average is found, named and written; what the command says names the key; --list shows it
    first.
    """
    content, key, kind, want, extra = MADE[what]
    torch.save(content, src := tmp_path / "a.pt")
    code, out, err = call(src, tmp_path / "out")
    assert (code, err) == (0, "")
    found, meta = model(tmp_path / "out")
    equal(found, want)
    said = meta["extra"]["converted"]
    assert (said["from"], said["key"]) == (kind, key)
    assert extra.items() <= said.items()
    assert (meta["kind"], meta["format"], meta["clock"], meta["weights"]) == (
        "export",
        1,
        {},
        "all",
    )
    assert (key or "the whole file") in out
    listed = json.loads(call(src, "--list", "--json")[1])["tables"]
    assert (listed[0]["key"], listed[0]["kind"]) == (key, kind)
    assert listed[0]["average"] == (what != "only a table")
    assert ("nothing in it says that it is an average" in out) == (what == "only a table")
    assert call("--from", kind, src, tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_live_tables_can_be_asked_for(call: Call, tmp_path: Path) -> None:
    """--key takes any table, --prefix cuts names; with mmengine ema_state_dict is the live model,
    and is not offered.
    """
    torch.save(MADE["mmengine"][0], src := tmp_path / "a.pt")
    listed = {
        row["key"]: row["average"] for row in json.loads(call(src, "--list", "--json")[1])["tables"]
    }
    assert listed == {"state_dict": True, "ema_state_dict": False}
    torch.save(MADE["lightning"][0], src)
    assert call(src, tmp_path / "out", "--key", "current_model_state", "--prefix", "model.")[0] == 0
    equal(model(tmp_path / "out")[0], LIVE)
    assert call(src, tmp_path / "part", "--key", "state_dict.model.norm")[0] == 0
    assert set(model(tmp_path / "part")[0]) == {
        name[5:] for name in LIVE if name.startswith("norm.")
    }
    assert "begins with 'x.'" in call(src, tmp_path / "x", "--prefix", "x.")[2]
    err = call(src, tmp_path / "x", "--key", "nowhere")[2]
    assert "no table of tensors at 'nowhere'; there are " in err
    assert "'current_model_state'" in err


def test_rest(call: Call, tmp_path: Path) -> None:
    """--rest names the live table that completes an average; where the two differ in shape they are
    of two models.
    """
    live = {"w": torch.zeros(2), "b": torch.zeros(3)}
    torch.save(
        {"shadow": {"w": torch.ones(2)}, "net": live, "other": {"w": torch.zeros(5)}},
        src := tmp_path / "a.pt",
    )
    assert call(src, tmp_path / "out", "--rest", "net")[0] == 0
    found, meta = model(tmp_path / "out")
    equal(found, {"w": torch.ones(2), "b": torch.zeros(3)})
    assert meta["averaged"] == ["w"]
    code, _, err = call(src, tmp_path / "x", "--rest", "other")
    assert code == 1
    assert "w is (2,) in the average, (5,) in the live model" in err
    torch.save({"ema": {"wave": torch.ones(2, dtype=torch.complex64), "n": torch.tensor(1)}}, src)
    assert "2 weights, 1 not averaged" in call(src, tmp_path / "complex")[1]
    assert model(tmp_path / "complex")[1]["averaged"] == ["wave"]


def test_several_averages(call: Call, tmp_path: Path) -> None:
    """Profiles of one run are never chosen silently."""
    profiles = {
        f"ema_models.{i}.{name}": value + i
        for i in (0, 1)
        for name, value in {"ema_model.w": torch.ones(2), "step": torch.tensor(3)}.items()
    }
    torch.save(profiles, src := tmp_path / "a.pt")
    code, out, err = call(src, tmp_path / "out")
    assert (code, out) == (1, "")
    assert "several averages: ema_models.0 (ema-pytorch, 1 tensor), ema_models.1" in err
    assert call(src, tmp_path / "out", "--key", "ema_models.1")[0] == 0
    equal(model(tmp_path / "out")[0], {"w": torch.full((2,), 2.0)})
    assert not (tmp_path / "x").exists()


def test_no_average(call: Call, tmp_path: Path) -> None:
    """Live weights are taken only when named, or where there is nothing else; a wrong --from says
    what there is.
    """
    torch.save(
        {"model": LIVE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        src := tmp_path / "a.pt",
    )
    code, _, err = call(src, tmp_path / "out")
    assert code == 1
    assert "does not show an average. It holds model (raw," in err
    assert "what timm writes" in call(src, tmp_path / "out", "--from", "timm")[2]
    assert (
        "no folder of torch.distributed.checkpoint"
        in call(src, tmp_path / "out", "--from", "dcp")[2]
    )
    save_file(
        {"scale": torch.tensor(0.5), "shift": torch.tensor(3)},
        scalars := tmp_path / "scalars.safetensors",
    )
    assert call(scalars, tmp_path / "two")[0] == 0, "scalars alone are a model too"
    assert model(tmp_path / "two")[0] == {"scale": 0.5, "shift": 3}
    torch.save({"epoch": 1, "loss": [0.1]}, src)
    assert "holds no table of tensors" in call(src, tmp_path / "out")[2]
    EMA(nn.Linear(2, 2)).save(tmp_path / "run" / "ema-000001", keep=2)
    assert (
        "ema-000001 is dist_ema's own already"
        in call(tmp_path / "run" / "latest", tmp_path / "out")[2]
    )
    assert not (tmp_path / "out").exists()


# --- lists without names --------------------------------------------------------------------------

NAMELESS = {
    "torch-ema": {
        "decay": 0.9,
        "num_updates": 3,
        "shadow_params": SHADOWS,
        "collected_params": None,
    },
    "diffusers": {"decay": 0.9, "optimization_step": 3, "shadow_params": SHADOWS, "power": 2 / 3},
}


@pytest.mark.parametrize("kind", NAMELESS)
def test_names_from_the_live_model(kind: str, call: Call, tmp_path: Path) -> None:
    """The order of a state_dict names them, statistics and aliases come from it; a JSON list names
    them too.
    """
    torch.save({"epoch": 1, "ema": NAMELESS[kind]}, src := tmp_path / "a.pt")
    torch.save(LIVE, live := tmp_path / "live.pt")
    assert "is a list without names. Give the live model" in call(src, tmp_path / "out")[2]
    assert call(src, tmp_path / "out", "--like", live)[0] == 0
    found, meta = model(tmp_path / "out")
    equal(
        found, {n: SHADOW[n] if n in (*PARAMETERS, "head.weight") else v for n, v in LIVE.items()}
    )
    assert meta["averaged"] == sorted(PARAMETERS)
    assert meta["extra"]["converted"]["from"] == kind
    (tmp_path / "names.json").write_text(json.dumps(PARAMETERS))
    assert call(src, tmp_path / "named", "--like", tmp_path / "names.json")[0] == 0
    found, meta = model(tmp_path / "named")
    equal(found, {name: SHADOW[name] for name in PARAMETERS})
    assert meta["weights"] == "averaged"


def test_names_that_do_not_fit(call: Call, tmp_path: Path) -> None:
    """Another number, other shapes, a file that sorts its names, and lists that are none: refused,
    nothing guessed.
    """
    torch.save(NAMELESS["torch-ema"], src := tmp_path / "a.pt")
    short = {n: v for n, v in LIVE.items() if n not in ("head.weight", "frozen")}
    torch.save(short, tmp_path / "short.pt")
    assert (
        "4 tensors without names, and 3 names"
        in call(src, tmp_path / "o", "--like", tmp_path / "short.pt")[2]
    )
    torch.save(dict(reversed([(n, LIVE[n]) for n in PARAMETERS])), tmp_path / "turned.pt")
    assert (
        "by its place in the list" in call(src, tmp_path / "o", "--like", tmp_path / "turned.pt")[2]
    )
    save_file({n: LIVE[n].clone() for n in PARAMETERS}, tmp_path / "live.safetensors")
    assert (
        "whose file sorts them by name"
        in call(src, tmp_path / "o", "--like", tmp_path / "live.safetensors")[2]
    )
    for text in ("{}", "[1]", "["):
        (tmp_path / "names.json").write_text(text)
        assert call(src, tmp_path / "o", "--like", tmp_path / "names.json")[0] == 1
    assert not (tmp_path / "o").exists()


def test_shapes_that_tell(call: Call, tmp_path: Path) -> None:
    """Where no two weights have one shape, a safetensors model names them whatever the order."""
    live = {
        "b.weight": torch.ones(2, 3),
        "a.weight": torch.ones(4),
        "a.running_mean": torch.full((4,), 5.0),
    }
    torch.save(
        {"num_updates": 1, "shadow_params": [torch.zeros(2, 3), torch.full((4,), 2.0)]},
        tmp_path / "a.pt",
    )
    save_file(live, tmp_path / "live.safetensors")
    assert (
        call(tmp_path / "a.pt", tmp_path / "out", "--like", tmp_path / "live.safetensors")[0] == 0
    )
    want = {
        "b.weight": torch.zeros(2, 3),
        "a.weight": torch.full((4,), 2.0),
        "a.running_mean": live["a.running_mean"],
    }
    equal(model(tmp_path / "out")[0], want)


# --- forms ----------------------------------------------------------------------------------------


def test_forms_of_files(call: Call, tmp_path: Path) -> None:
    """safetensors, one and several, diffusers' folder with its clock, and the files of torch before
    1.6.
    """
    want = {name: value.clone() for name, value in SHADOW.items()}
    save_file(
        under("ema_model.", want) | {"step": torch.tensor(5), "initted": torch.tensor(True)},
        tmp_path / "a.safetensors",
    )
    assert call(tmp_path / "a.safetensors", tmp_path / "out1")[0] == 0
    length = 0x0480  # its first two bytes are those of a pickle
    head = (
        json.dumps({"model_ema.w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        .encode()
        .ljust(length)
    )
    (tmp_path / "blob").write_bytes(length.to_bytes(8, "little") + head + b"x")
    assert call(tmp_path / "blob", tmp_path / "out0")[0] == 0
    equal(model(tmp_path / "out1")[0], want)
    torch.save(MADE["timm"][0], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert call(tmp_path / "old.pt", tmp_path / "out2")[0] == 0
    equal(model(tmp_path / "out2")[0], SHADOW)
    folder = tmp_path / "unet_ema"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "UNet", "optimization_step": 7, "decay": 0.9, "power": 0.75})
    )
    halves = [dict(list(want.items())[:3]), dict(list(want.items())[3:])]
    for i, half in enumerate(halves):
        save_file(half, folder / f"diffusion_pytorch_model-{i}.safetensors")
    weights = {
        name: f"diffusion_pytorch_model-{i}.safetensors"
        for i, half in enumerate(halves)
        for name in half
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weights})
    )
    assert call(folder, tmp_path / "out3")[0] == 0
    found, meta = model(tmp_path / "out3")
    equal(found, want)
    said = meta["extra"]["converted"]
    assert (said["from"], said["optimization_step"], said["decay"]) == ("diffusers", 7, 0.9)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    for bad in (
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "gone.safetensors"}},
        {},
        [],
    ):
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(bad))
        assert call(folder, tmp_path / "x")[0] == 1


def test_dcp(call: Call, tmp_path: Path) -> None:
    """dist_ema's own Stateful beside the live model: complete, with the clock; and any other table
    by its key.
    """
    module = net(3)
    module.small = nn.Parameter(torch.randn(3).bfloat16())
    ema = EMA(module, [0.5, 0.9])
    with torch.no_grad():
        for p in module.parameters():
            p += 1
    ema.update()
    state = {"ema": ema, "app": {"model": module.state_dict()}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert call(tmp_path / "dcp", "--list")[1].endswith("\n\nleft unread: step\n")
    code, _, err = call(tmp_path / "dcp", tmp_path / "x")
    assert code == 1
    assert "several averages: ema.averages.average_0 (dist-ema" in err
    (key,) = re.findall(r"--key (ema\.\S+)", cli.CONVERT.text)  # the example of --help
    assert call(tmp_path / "dcp", tmp_path / "out", "--key", key)[0] == 0
    found, meta = model(tmp_path / "out")
    want = ema.gather()
    equal(found, {name: want[name] for name in module.state_dict()})
    assert meta["extra"]["converted"]["clock"]["updates"] == 1
    assert meta["extra"]["converted"]["schedule"] == "Constant(decay=0.5)"
    assert "norm.num_batches_tracked" in found
    for verb in (("export", tmp_path / "dcp"), ("average", tmp_path / "dcp", tmp_path / "dcp")):
        assert main([*map(str, verb), str(tmp_path / "soup")]) == 1, "no model of all that is there"
        assert not (tmp_path / "soup").exists()
    key = ("--key", "ema.averages.average_1", "--averaged-only", "--from", "dcp")
    assert call(tmp_path / "dcp", tmp_path / "part", *key)[0] == 0
    found, meta = model(tmp_path / "part")
    assert meta["weights"] == "averaged"
    assert "norm.num_batches_tracked" not in found
    assert (
        call(tmp_path / "dcp", tmp_path / "live", "--key", "app.model", "--dtype", "bf16")[0] == 0
    )
    found, _ = model(tmp_path / "live")
    assert all(
        torch.equal(found[n], v.bfloat16() if v.is_floating_point() else v)
        for n, v in module.state_dict().items()
    )
    code, _, err = call(tmp_path / "dcp", tmp_path / "dcp" / "out", "--key", "app.model")
    assert code == 1
    assert "lies inside" in err
    (tmp_path / "loop").symlink_to("loop")
    assert call(tmp_path / "loop", tmp_path / "new")[0] == 2
    assert call(tmp_path / "dcp", tmp_path / "loop" / "out", "--key", "app.model")[0] == 1


def test_rounding_aliases_and_one_file(call: Call, tmp_path: Path) -> None:
    """--dtype rounds as torch does and leaves integers; tied weights are written once; one file
    carries its aliases.
    """
    torch.save(
        {"model_ema": SHADOW | {"strided": torch.randn(4, 5).t(), "empty": torch.empty(0, 2)}},
        src := tmp_path / "a.pt",
    )
    code, out, _ = call(src, tmp_path / "one.safetensors", "--dtype", "bf16", "--json")
    assert code == 0
    assert json.loads(out)["aliases"] == {"head.weight": "emb.weight"}
    found = load_file(tmp_path / "one.safetensors")
    saved = torch.load(src)["model_ema"]
    assert "head.weight" not in found
    assert all(
        torch.equal(v, saved[n].bfloat16() if saved[n].is_floating_point() else saved[n])
        for n, v in found.items()
    )
    assert len(found) == len(saved) - 1
    assert "exists. Pass --force" in call(src, tmp_path / "one.safetensors")[2]
    assert call(src, tmp_path / "one.safetensors", "--force")[0] == 0
    assert load_file(tmp_path / "one.safetensors")["frozen"].dtype == torch.float32
    (tmp_path / "link").symlink_to(tmp_path / "one.safetensors")
    assert call(src, tmp_path / "link", "--force", "--dtype", "fp16")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "one.safetensors")["frozen"].dtype == torch.float16
    (tmp_path / "two").symlink_to(tmp_path / "real")
    assert call(src, tmp_path / "two", "--max-shard-size", "100B")[0] == 0
    assert (tmp_path / "two").is_symlink()
    assert (tmp_path / "two" / "model.safetensors.index.json").exists()


# --- archives -------------------------------------------------------------------------------------


class Pipe(io.RawIOBase):
    """A file that cannot seek, so that zipfile writes sizes behind each record, in a data
    descriptor.
    """

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def zipped(content: dict[str, bytes], **options: Any) -> bytes:
    """An archive with these records."""
    pipe = Pipe()
    with zipfile.ZipFile(
        pipe if options.pop("stream", False) else (file := io.BytesIO()), "w"
    ) as new:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = options.get("method", zipfile.ZIP_STORED)
            with new.open(info, "w", force_zip64=options.get("zip64", False)) as record:
                record.write(data)
    return bytes(pipe.data) or file.getvalue()


def directory(data: bytes) -> int:
    """Where the central directory begins."""
    return int.from_bytes(data[-6:-2], "little")


def encrypted(content: dict[str, bytes]) -> bytes:
    """The flag alone, in the directory."""
    data = bytearray(zipped(content))
    data[directory(data) + 8] |= 1
    return bytes(data)


def doubled(content: dict[str, bytes]) -> bytes:
    """One name with other bytes behind it, under another folder, which torch leaves out of the
    name.
    """
    return zipped(content | {"other/data.pkl": content["archive/data.pkl"]})


def overlapping(content: dict[str, bytes]) -> bytes:
    """A record that lies inside another, and is a whole record itself."""
    inner = (
        b"PK\3\4"
        + bytes(14)
        + struct.pack("<IIHH", 4, 4, len("archive/x"), 0)
        + b"archive/x"
        + b"1234"
    )
    data = zipped(content | {"archive/outer": inner, "archive/x": b"1234"})
    at, place = data.rindex(b"PK\1\2"), data.index(inner)
    return data[: at + 42] + struct.pack("<I", place) + data[at + 46 :]


def beyond(content: dict[str, bytes]) -> bytes:
    """The last record reaches into the directory."""
    data = zipped(content)
    at, length = data.rindex(b"PK\1\2"), len([*content.values()][-1]) + 9
    return data[: at + 20] + struct.pack("<II", length, length) + data[at + 28 :]


ARCHIVES: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "stored": (zipped, ""),
    "zip64": (partial(zipped, zip64=True), ""),
    "data descriptors": (partial(zipped, stream=True), ""),
    "deflated": (partial(zipped, method=zipfile.ZIP_DEFLATED), "is compressed"),
    "lzma": (partial(zipped, method=zipfile.ZIP_LZMA), "is compressed"),
    "encrypted": (encrypted, "data.pkl is encrypted"),
    "one name twice": (doubled, "holds data.pkl twice"),
    "overlapping": (overlapping, "x overlaps another record"),
    "beyond the records": (beyond, "reaches beyond the records"),
    "a shorter record": (
        lambda content: zipped(content | {"archive/data/0": content["archive/data/0"][:-8]}),
        "more or fewer bytes than its record",
    ),
    "a longer record": (
        lambda content: zipped(content | {"archive/data/1": content["archive/data/1"] * 2}),
        "more or fewer bytes than its record",
    ),
    "TorchScript": (
        lambda content: zipped(content | {"archive/constants.pkl": b""}),
        "is a TorchScript program",
    ),
    "cut short": (lambda content: zipped(content)[:-30], "damaged or cut short"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives(what: str, call: Call, tmp_path: Path) -> None:
    """Each feature of zip is read right, or refused with its name; there is no third outcome."""
    weights = {"a": torch.randn(50, 7), "b": torch.arange(9)}
    torch.save({"model_ema": weights}, src := tmp_path / "archive.pt")
    with zipfile.ZipFile(src) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    change, words = ARCHIVES[what]
    src.write_bytes(change(content))
    code, _, err = call(src, tmp_path / "out")
    assert (code, words in err, err.count("\n")) == (bool(words), True, bool(words)), err
    if words:
        assert not (tmp_path / "out").exists()
    else:
        equal(model(tmp_path / "out")[0], weights)


# --- what is refused ------------------------------------------------------------------------------


class Mine:
    """A class that no reader knows. Unpickling one would leave a trace."""

    traces: list[str] = []  # noqa: RUF012

    def __setstate__(self, state: Any) -> None:
        self.traces.append("ran")


class Other:
    """Another one."""


class Evil:
    """Pickled as a call."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_classes_are_not_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of unknown classes are refused by name; --inert reads past them; whole modules and
    calls never run.
    """
    monkeypatch.chdir(tmp_path)
    mine = Mine()
    vars(mine)["a"] = 1
    torch.save({"config": mine, "model_ema": SHADOW, "other": Other()}, "a.pt")
    code, _, err = call("a.pt", "out")
    name, other = f"{Mine.__module__}.Mine", f"{Mine.__module__}.Other"
    assert code == 1
    assert f"asks for {name}, {other}, whose code dist_ema does not run" in err
    assert f"--inert {name}" in err
    assert call("a.pt", "out", "--inert", name, "--inert", other)[0] == 0
    equal(model(Path("out"))[0], SHADOW)
    torch.save({"ema": nn.Linear(2, 2), "epoch": 1}, "yolo.pt")
    code, _, err = call("yolo.pt", "x")
    assert code == 1
    assert "holds whole modules (torch.nn.modules.linear.Linear): pickled code" in err
    assert "state_dict()" in err
    for zipped in (True, False):
        torch.save(
            {"model_ema": SHADOW, "evil": Evil()}, "evil.pt", _use_new_zipfile_serialization=zipped
        )
        for more in ((), ("--inert", f"{os.system.__module__}.system")):
            code, _, err = call("evil.pt", "x", *more)
            assert code == 1
            assert err.count("\n") == 1
            assert "system" in err
    assert (Mine.traces, Path("ran").exists(), Path("x").exists()) == ([], False, False)


def test_unreadable(call: Call, tmp_path: Path) -> None:
    """What is no checkpoint, or cannot be converted: one sentence, code 1 (2 for a path that is not
    there).
    """
    torch.save(SHADOW, good := tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02" + b"x" * 50)
    (tmp_path / "byte.pt").write_bytes(b"\x80")
    torch.save(3, tmp_path / "number.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    torch.save({"model_ema": {"a": torch.ones(1), 0: torch.ones(1)}}, tmp_path / "numbered.pt")
    torch.save(
        {"model_ema": {"w": torch.ones(3).to_sparse(), "v": torch.ones(2)}}, tmp_path / "sparse.pt"
    )
    torch.save({"model_ema": {"w": torch.ones(3, dtype=torch.complex128)}}, tmp_path / "wide.pt")
    torch.save(
        {"model_ema": {"module.a": torch.ones(1), "module._orig_mod.a": torch.ones(1)}},
        tmp_path / "twice.pt",
    )
    torch.save(
        {
            "model_ema.ab": torch.ones(1),
            "model_ema.num_updates": torch.tensor(1),
            "model.x": torch.ones(1),
        },
        tmp_path / "dots.pt",
    )
    both = {"model.a.b": torch.ones(1), "model.ab": torch.ones(1)}
    torch.save(
        both | {"model_ema.ab": torch.ones(1), "model_ema.num_updates": torch.tensor(1)},
        tmp_path / "both.pt",
    )
    deep: Any = SHADOW
    for _ in range(60):
        deep = {"a": deep}
    torch.save(deep, tmp_path / "deep.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        (tmp_path / "two" / name).write_bytes(good.read_bytes())
    EMA(net(1)).save(tmp_path / "ours")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": np.ones(3)}))
    torch.save(
        {"model_ema": {"w": torch.ones(3, device="meta"), "v": torch.ones(2)}}, tmp_path / "meta.pt"
    )
    torch.save({"model_ema": {"__metadata__": torch.ones(3)}}, tmp_path / "name.pt")
    said = {
        "pickle.pt": "asks for numpy.", "meta.pt": "model_ema.w cannot be converted",
        "name.pt": "is called __metadata__",
        "cut.pt": "", "text.pt": "is no safetensors file", "byte.pt": "is no safetensors file",
        "old.pt": "is no checkpoint of torch.save",
        "number.pt": "holds one int", "tensor.pt": "holds one tensor, not a table",
        "numbered.pt": "model_ema.0 cannot be converted (its key is of int",
        "sparse.pt": "model_ema.w cannot be converted",
        "wide.pt": "holds no table", "twice.pt": "are both a", "deep.pt": "deep",
        "dots.pt": "fits no live weight", "both.pt": "fits model.a.b and model.ab",
        "empty": "no checkpoint", "two": "a.pt, b.pt", "ours": "dist_ema's own already",
    }  # fmt: skip
    for name, words in said.items():
        code, out, err = call(tmp_path / name, tmp_path / "out")
        assert (code, out) == (1, ""), name
        assert words in err, (name, err)
        assert "weights_only" not in err, "torch's advice is to run it"
        assert err.count("\n") == 1, err
    assert call(tmp_path / "nothing.pt", tmp_path / "out")[0] == 2
    assert call(good)[0] == 2
    assert not (tmp_path / "out").exists()


def test_cut_and_flipped(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 copies, cut or with bytes changed, of both forms of file: a model or one sentence, and
    nothing left beside it.
    """
    monkeypatch.chdir(tmp_path)
    content = {
        "model_ema": {"a": torch.randn(5, 7), "b": torch.arange(3), "t": torch.randn(4, 6).t()},
        "lr": [1, "x"],
    }
    torch.save(content, "new.pt")
    torch.save(content, "old.pt", _use_new_zipfile_serialization=False)
    sound = [Path(name).read_bytes() for name in ("new.pt", "old.pt")]
    generator = random.Random(5)
    codes = {0: 0, 1: 0}
    for i in range(200):
        data = bytearray(sound[i % 2])
        if i % 6 < 2:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.choice([1, 3, 30])):
                data[generator.randrange(len(data))] = generator.randrange(256)
        Path("x.pt").write_bytes(data)
        code, _, err = call("x.pt", "out", "--force")
        assert err.count("\n") == code, err
        codes[code] += 1
    assert min(codes.values()) > 20, codes
    assert {path.name for path in tmp_path.iterdir()} == {"new.pt", "old.pt", "x.pt", "out"}


def test_a_directory_beyond_the_limit(call: Call, tmp_path: Path) -> None:
    """A table of contents that claims 32 MB is refused before it is read."""
    size = 32 << 20
    with open(tmp_path / "a.pt", "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        file.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 9, 9, size - 4, 4, 0))
    code, _, err = call(tmp_path / "a.pt", tmp_path / "out")
    assert (code, "a directory of 33,554,428 bytes" in err) == (1, True), err


def test_amplification(call: Call, tmp_path: Path) -> None:
    """A view that repeats one element says more bytes than the file explains: refused, unless
    allowed by its size.
    """
    big = torch.ones(1).expand(30_000, 10_000)
    tied = dict.fromkeys((f"layers.{i}.w" for i in range(20)), torch.ones(50_000))
    torch.save({"model_ema": {"w": big, "v": torch.ones(3)}}, src := tmp_path / "a.pt")
    code, _, err = call(src, tmp_path / "out")
    held = src.stat().st_size
    assert code == 1
    assert f"holds {size(held)}, and 1.2 GB would be written, more than the {size(4 * held)}" in err
    assert call(src, tmp_path / "out", "--max-size", "1GB")[0] == 1
    small = {"w": torch.ones(2)}
    torch.save({"live": {"w": torch.zeros(2), "v": big}, "model_ema": small}, src)
    assert "1.2 GB would be written" in call(src, tmp_path / "out", "--rest", "live")[2]
    torch.save({"live": {"w": torch.ones(2)}, "model_ema": {"w": big}}, src)
    assert call(src, tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()
    torch.save({"model_ema": {"w": torch.ones(1).expand(300, 100)}}, src)
    assert call(src, tmp_path / "out", "--max-size", "120kB")[0] == 0
    assert model(tmp_path / "out")[0]["w"].shape == (300, 100)
    torch.save({"model_ema": tied}, src)
    assert call(src, tmp_path / "tied", "--dtype", "fp64")[0] == 0, "tied weights are one"


def test_shared_structures_are_walked_once(tmp_path: Path) -> None:
    """Lists that hold one another exponentially often, or themselves, end at once."""
    laughs: Any = [{"model_ema": SHADOW}]
    for _ in range(45):
        laughs = [laughs, laughs]
    wide: Any = {"w": torch.ones(1)}
    for _ in range(6):
        wide = {f"k{i}": wide for i in range(100)}
    torch.save({"x": laughs, "wide": wide}, src := tmp_path / "a.pt")
    assert [each.kind for each in offline.candidates(offline.ConvertRequest(src))[0]] == ["raw"]
    loop: dict[str, Any] = {"model_ema": dict(SHADOW)}
    loop["self"] = loop
    torch.save(loop, src)
    assert [
        each.key for each in offline.candidates(offline.ConvertRequest(src))[0] if each.average
    ] == ["model_ema"]


def test_memory_is_a_window(tmp_path: Path) -> None:
    """A checkpoint of 200 MB, one weight not row by row: mapped pages aside, no more than a few
    windows.
    """
    torch.save(
        {"model_ema": {"a": torch.ones(25 << 20), "b": torch.ones(1 << 13, 3 << 10).t()}},
        src := tmp_path / "a.pt",
    )
    code = (
        "import sys, re, pathlib, torch\n"
        "from contextlib import ExitStack; from dist_ema.offline import convert\n"
        "held = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', "
        "pathlib.Path('/proc/self/status').read_text())[1]) >> 10\n"
        "stack = ExitStack(); before = held(); most = [0]\n"
        "plan = convert.plan(convert.ConvertRequest(pathlib.Path(sys.argv[1]), dtype='BF16'), "
        "stack)\n"
        "convert.write(plan, pathlib.Path(sys.argv[2]), force=False, tick=lambda n: "
        "most.append(held() - before))\n"
        "print(max(most))"
    )
    grown = int(run_program(code, str(src), str(tmp_path / "out.safetensors")))
    assert 0 < grown < 120, "MB over the start"
    found = load_file(tmp_path / "out.safetensors")
    assert found["b"].shape == (3 << 10, 1 << 13)
    assert bool((found["a"] == 1).all())


# --- the tables -----------------------------------------------------------------------------------


def test_kinds_agree() -> None:
    """The command's choices are the kinds that `foreign` knows; every kind stands in its table of
    facts.
    """
    assert set(cli.KINDS) == {*recognise.KINDS, "auto", "swa", "dcp"}
    assert recognise.__doc__ is not None
    assert all(f"\n{kind} " in recognise.__doc__ for kind in recognise.KINDS)


def test_plain_values() -> None:
    """Numbers for ema.json: tensors of one element are read, nothing else is, and no NaN gets into
    JSON.
    """

    def leaf(value: Any, dtype: str) -> recognise.Leaf:
        raw = np.array(value).reshape(-1).view(np.uint8)
        return recognise.Leaf(dtype, np.shape(value), lambda begin, end: raw[begin:end], "key")

    assert recognise.scalar(leaf(np.int64(7), "I64")) == 7
    assert recognise.scalar(leaf(np.float32(0.5), "F32")) == 0.5
    assert recognise.scalar(leaf(np.ones(2, np.float32), "F32")) is None
    assert recognise.scalar(leaf(np.float32("nan"), "F32")) == "nan"
    assert recognise.scalar([1]) is None
    assert recognise.scalar(OrderedDict()) is None


def test_help(call: Call) -> None:
    """--help teaches by examples, and parsing needs neither torch nor numpy."""
    assert "dist-ema convert last.ckpt --list" in call("--help")[1]
    code = "import sys; from dist_ema.cli import main\n"
    code += "try: main(['convert', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
