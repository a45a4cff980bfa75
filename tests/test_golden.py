"""Folders that an early version wrote: they load bit for bit, and the same bytes are written again.

How to read a failure: a difference names the folder and the file in it. `data/make_golden.py` wrote
the folders at commit 1ee8245. It is not run again to make a failing test pass. `rounded/compact` is
younger: it pins the bits of bf16 averages since two neighbouring elements share one hash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as read_safetensors
from torch import Tensor, nn

from dist_ema import EMA, load_file
from tests._ranks import run_ranks
from tests.conftest import Call
from tests.data import make_golden as golden

GOLDEN = Path(golden.__file__).parent / "golden"
FOLDERS = {f"plain/{name}": case for name, case in golden.CASES.items()}
FOLDERS |= {f"{w}/{n}": golden.CASES[n] for w in golden.WRAPPERS for n in golden.ON_RANKS}
FOLDERS |= {"rounded/compact": golden.CASES["compact"]}
SNAPSHOTS = [f"snapshots/{now:010}" for now in (2, 4, 8)]
HALF = [f"snapshots-half/{now:010}" for now in (2, 4, 8)]  # exports: a start, without a clock
EXPORTS = ["export/first", "export/third", *(f"{wrapper}/export" for wrapper in golden.WRAPPERS)]
ONE_FILE = "export/one.safetensors"
ALL = [*FOLDERS, *SNAPSHOTS, *HALF, *EXPORTS, ONE_FILE, "dcp"]


def files_of(path: Path) -> dict[str, Any]:
    """Relative name -> bytes; of ema.json the values, without the versions and its own sum."""
    files: dict[str, Any] = {}
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if each.name == "ema.json":
            values = json.loads(each.read_text())
            files[str(each.relative_to(path))] = {
                key: value for key, value in values.items() if key not in ("versions", "crc32")
            }
        elif each.is_file():
            files[str(each.relative_to(path))] = each.read_bytes()
    return files


def differences(path: str, out: Path, pinned: str | None = None) -> list[str]:
    """What a folder that was written now does not have in common with the golden one.

    pinned: the golden folder, if it is not the one of that name.
    """
    old, new = files_of(GOLDEN / (pinned or path)), files_of(out / path)
    assert old, path
    return [
        f"{path}: {name}" for name in sorted(old.keys() | new) if old.get(name) != new.get(name)
    ]


COUNTER = "num_batches_tracked"


def new_differences(path: str, out: Path) -> list[str]:
    """The same, for what was recalibrated anew.

    NOTE: a module's buffers are one state since, so BatchNorm's counter is an own buffer too: it is
    named as one, and lies in the files of further averages. Everything else must have the same
    bits.
    """
    if path.endswith("/compact"):
        return differences(path, out, "rounded/compact")
    meta = GOLDEN / path / "ema.json"
    if not meta.exists() or '"running_mean"' not in meta.read_text().replace("norm.", ""):
        return differences(path, out)
    old, new = without_counter(GOLDEN / path), without_counter(out / path)
    return [f"{path}: {name}" for name in sorted(old.keys() | new) if not same(old, new, name)]


def without_counter(folder: Path) -> dict[str, Any]:
    """The values of ema.json and the weights, without the counter and what sizes and sums say of
    it.
    """
    values: dict[str, Any] = dict(files_of(folder)["ema.json"])
    own = [
        values.pop("own_buffers"),
        *(each["own_buffers"] for each in values["averages"].values()),
    ]
    values["averages"] = sorted(values["averages"])
    values["own"] = [[name for name in names if not name.endswith(COUNTER)] for names in own]
    values["files"] = sorted(values["files"])
    for each in sorted(folder.rglob("*.safetensors")):
        for name, weight in read_safetensors(each).items():
            if not name.endswith(COUNTER):
                values[f"{each.parent.relative_to(folder)}/{name}"] = weight
    return values


def same(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    a, b = old.get(name), new.get(name)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(
            a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)
        )
    return bool(a == b)


def weights_of(path: Path) -> dict[str, Tensor]:
    """All weights in the files of a folder, read by the library that defines the format."""
    weights: dict[str, Tensor] = {}
    for each in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        weights |= read_safetensors(each)
    return weights


def labels_of(path: Path) -> list[str]:
    """Where each average lies, in the order of the schedules."""
    inner = [each.name for each in (path / "averages").glob("*")]
    return ["", *(f"averages/{each}" for each in sorted(inner, key=lambda n: int(n.split("-")[0])))]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def load_and_save(
    path: str, case: golden.Case, wrap: Callable[[nn.Module], nn.Module], out: Path
) -> list[str]:
    """Load a folder, save it again under `out`, and name the weights that came out otherwise."""
    model = wrap(golden.model_of(case))
    optimizer = golden.optimizer_of(model)
    for _ in range(case.steps or len(case.moves)):
        golden.step(model, optimizer)  # before averaging starts, the average is the live model
    ema = golden.ema_of(case, model)
    ema.load(GOLDEN / path)
    if case.attach is not None:
        ema.attach(optimizer, **case.attach)
    ema.save(out / path, **case.save)
    wrong = []
    for which, label in enumerate(labels_of(GOLDEN / path)):
        held, full = weights_of(GOLDEN / path / label), ema.gather(which)
        names = ema.names() if full else []  # only the first rank has them
        wrong += [f"{path}/{label}: {n}" for n in names if not same_bits(held[n], full[n])]
    return wrong


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script writes today in one process."""
    out = tmp_path_factory.mktemp("anew")
    golden.write_plain(out)
    return out


def test_every_folder_is_known() -> None:
    """A golden folder that no test reads would prove nothing."""
    metas = {str(each.parent.relative_to(GOLDEN)) for each in GOLDEN.rglob("ema.json")}
    assert metas == set(ALL) - {ONE_FILE, "dcp"}
    assert sum(each.stat().st_size for each in GOLDEN.rglob("*")) < 1_000_000


@pytest.mark.parametrize(
    "path", [*(f for f in FOLDERS if f.startswith("plain/")), *SNAPSHOTS, *HALF, *EXPORTS[:2]]
)
def test_the_same_bytes_in_one_process(anew: Path, path: str) -> None:
    assert new_differences(path, anew) == []


def test_only_roundings_are_others() -> None:
    """bf16 averages were rounded by other bits at 1ee8245: one way or the other, by one spacing."""
    for label in labels_of(GOLDEN / "plain/compact"):
        old, new = (
            weights_of(GOLDEN / where / "compact" / label) for where in ("plain", "rounded")
        )
        assert old.keys() == new.keys()
        for name in old:
            a, b = old[name].float(), new[name].float()
            spacing = torch.ldexp(torch.ones_like(a), torch.frexp(a).exponent - 8)
            assert ((a - b).abs() <= spacing * (old[name].dtype == torch.bfloat16)).all()


def test_the_same_bytes_in_one_file(anew: Path) -> None:
    assert (anew / ONE_FILE).read_bytes() == (GOLDEN / ONE_FILE).read_bytes()


@pytest.mark.parametrize("path", [*FOLDERS, *SNAPSHOTS])
def test_loads_in_one_process(path: str, tmp_path: Path) -> None:
    """The same bits, and the same folder when it is saved again: clock, own buffers, aliases."""
    case = FOLDERS.get(path, golden.PROFILES)
    assert load_and_save(path, case, lambda model: model, tmp_path) == []
    assert differences(path, tmp_path) == []


@pytest.mark.parametrize("path", [*HALF, *EXPORTS, ONE_FILE])
def test_an_export_is_a_start(path: str) -> None:
    model = golden.model_of(golden.PROFILES)
    ema, held = EMA(model, 0.5), weights_of(GOLDEN / path)
    with pytest.warns(UserWarning, match="clock at 0"):
        ema.load(GOLDEN / path)
    full = ema.gather()
    assert [n for n in ema.names() if not torch.equal(held[n].float(), full[n])] == []
    assert (ema.now, len(ema.names())) == (0.0, 7)


@pytest.mark.parametrize(
    "path", [path for path in ALL if path not in ("dcp", "plain/eleven", "plain/only")]
)
def test_load_file(path: str) -> None:
    """A complete state_dict with the tied name; it fits the model."""
    weights, held = load_file(GOLDEN / path), weights_of(GOLDEN / path)
    assert [name for name in held if not same_bits(held[name], weights[name])] == []
    assert same_bits(weights["head.weight"], held["emb.weight"])
    golden.Net().load_state_dict(weights, strict=True)


@pytest.mark.parametrize("wrapper", golden.WRAPPERS)
def test_wrappers_agree(wrapper: str) -> None:
    """The bytes do not depend on the wrapper: the numbers are exact, and the form is canonical."""
    for name in golden.ON_RANKS:
        one, other = files_of(GOLDEN / "plain" / name), files_of(GOLDEN / wrapper / name)
        assert [file for file in one.keys() | other if one.get(file) != other.get(file)] == []


def test_offline_verbs(call: Call, tmp_path: Path) -> None:
    """Sound for the verbs that need no torch; the DCP folder converts to the same bits."""
    for path in ALL:
        code, out, err = call("inspect", GOLDEN / path)
        assert (code, err) == (0, ""), path
        assert "emb.weight" in out or "gate" in out or "up.weight" in out, path
    code, out, err = call("verify", *(GOLDEN / path for path in ALL))
    assert (code, err) == (0, "")
    assert out.count("is sound") == len(ALL)
    shutil.copytree(GOLDEN / "plain" / "several", tmp_path / "several")
    which = ("--which", 2, "--dtype", "bfloat16")
    assert call("export", tmp_path / "several", tmp_path / "out", *which)[0] == 0
    shipped = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert shipped == (GOLDEN / "export" / "third" / "model.safetensors").read_bytes()
    for decay, label in ((0.5, ""), (0.75, "averages/1-Constant")):
        key, out = f"ema.averages.Constant(decay={decay})", tmp_path / f"of-torch-{decay}"
        assert call("convert", GOLDEN / "dcp", out, "--key", key)[0] == 0
        weights, held = weights_of(out), weights_of(GOLDEN / "fsdp2/attach" / label)
        assert len(weights) == 9  # seven averaged, and two recalibrated buffers
        assert [name for name in weights if not same_bits(weights[name], held[name])] == []


# --- two ranks -----------------------------------------------------------------------------------


def on_ranks(out: str) -> list[str]:
    """Write everything anew, then load every folder under two wrappers and save it again."""
    golden.write_on_ranks(Path(out, "anew"))
    wrong = []
    for wrapper in ("fsdp2", "ddp"):
        wrap, where = golden.WRAPPERS[wrapper], Path(out, wrapper)
        for path, case in FOLDERS.items():
            wrong += [f"{wrapper} reads {each}" for each in load_and_save(path, case, wrap, where)]
        load_of_torch(wrap, where)
    return wrong


def load_of_torch(wrap: Callable[[nn.Module], nn.Module], out: Path) -> None:
    """Fill an average from the folder that `dcp.save` wrote, and save it."""
    import torch.distributed.checkpoint as dcp

    case = golden.CASES["attach"]
    model = wrap(golden.model_of(case))
    ema = golden.ema_of(case, model)
    dcp.load({"ema": ema}, checkpoint_id=str(GOLDEN / "dcp"))
    ema.attach(golden.optimizer_of(model), **case.attach or {})
    ema.save(out / "of-torch" / "fsdp2" / "attach", **case.save)


@pytest.mark.multirank
def test_two_ranks(tmp_path: Path) -> None:
    """Under FSDP2 and DDP: the same bits in `gather`, the same bytes saved again and made anew."""
    assert [
        wrong for rank in run_ranks(golden.WORLD, on_ranks, str(tmp_path)) for wrong in rank
    ] == []
    written = [path for path in (*FOLDERS, *EXPORTS) if path.split("/")[0] in golden.WRAPPERS]
    found = [each for path in written for each in new_differences(path, tmp_path / "anew")]
    for wrapper in ("fsdp2", "ddp"):
        found += [each for path in FOLDERS for each in differences(path, tmp_path / wrapper)]
        found += differences("fsdp2/attach", tmp_path / wrapper / "of-torch")
    assert found == []
