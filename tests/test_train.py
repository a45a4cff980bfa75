"""The main job, launch/train.py: every way to start it, resumed runs, refusals, and that the
average is worth it.

A rank is judged by the files it wrote: gloo processes now and then abort at interpreter exit after
everything is done. When a resume test fails, the two metrics.jsonl show the first epoch that
differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_ema import load_file

from .loops import Launcher

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "launch" / "train.py")
ENVIRON = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("ACCELERATE_", "TORCHELASTIC", "PYTEST"))
    and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
}
ENVIRON |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
QUICK = ["--steps-per-epoch", "4", "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command: str, **environ: str) -> str:
    """Run python with `command`; what it said. Its exit code proves nothing."""
    done = subprocess.run(
        [sys.executable, *command],
        env=ENVIRON | environ,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
    )
    return done.stdout + done.stderr


StartRanks = Callable[..., str]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher("accelerate", "sklearn.datasets", "matplotlib.pyplot") as made:
        yield made


@pytest.fixture(scope="module")
def start_ranks(launcher: Launcher) -> StartRanks:
    """Several ranks on the CPU. Wrapper 'accelerate' leaves the wrapping to it."""

    def run(ranks: int, out: Path, wrapper: str, epochs: int, *more: str) -> str:
        words = ["--out", str(out), "--epochs", str(epochs), *QUICK, *more]
        place, made = out.parent / f"of-{out.name}", out / "metrics.jsonl"
        if wrapper == "accelerate":
            job = launcher.start(Path(SCRIPT), place, *words, ranks=ranks, ACCELERATE_USE_CPU="1")
        else:
            job = launcher.start(Path(SCRIPT), place, *words, "--wrapper", wrapper, ranks=ranks)
        return job.wait(made)

    return run


TIMES = ("update_ms", "stall_ms", "lag")


def metrics(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds, but for the time that it took; sums over ranks to 9 digits, as cuts
    order them.
    """
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["averaging"] = {
            key: value for key, value in row["averaging"].items() if key not in TIMES
        }
        row["averaging"]["distance"] = round(row["averaging"]["distance"], 9)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def live(folder: Path) -> dict[str, Any]:
    """The leaves of a live checkpoint, weights and optimizer, read without a process group."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it works alone, and says so
        dcp_to_torch_save(folder / "live", folder / "live.pt")
    return dict(leaves(torch.load(folder / "live.pt", weights_only=True)))


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else None
    )
    if children is None:
        yield name, tree
        return
    for key, child in children:
        yield from leaves(child, f"{name}/{key}")


def assert_same_run(one: Path, other: Path, epoch: int, log: str = "") -> None:
    """The same bits: live weights, optimizer, average, clock, metrics."""
    assert [row["epoch"] for row in metrics(other)] == list(range(1, epoch + 1)), log
    assert metrics(one) == metrics(other), log
    folder = f"epoch-{epoch:04d}"
    a, b = live(one / folder), live(other / folder)
    assert a.keys() == b.keys()
    assert {
        "/model/0.0.weight",
        "/model/0.1.running_mean",
        "/optimizer/state/0.0.weight/momentum_buffer",
    } <= a.keys()
    same = {
        key: torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    }
    assert all(same.values()), [key for key, held in same.items() if not held]
    for file in ("ema/model.safetensors", "ema/ema.json"):
        assert (one / folder / file).read_bytes() == (other / folder / file).read_bytes(), file
    assert (one / "export/model.safetensors").read_bytes() == (
        other / "export/model.safetensors"
    ).read_bytes()


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, as if started by plain python."""
    for key in set(os.environ) - set(ENVIRON):
        monkeypatch.delenv(key)
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train", module)
    spec.loader.exec_module(module)
    return module


# --- started in every way -------------------------------------------------------------------------


def test_two_epochs_and_two_resumed_are_four_under_ddp(
    tmp_path: Path, start_ranks: StartRanks
) -> None:
    """Three ranks, where the order of additions shows: guards settle_buckets and
    share_statistics.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    batch = ["--batch-size", "33"]
    start_ranks(3, whole, "ddp", 4, *batch)
    start_ranks(3, parts, "ddp", 2, *batch)
    log = start_ranks(3, parts, "ddp", 4, "--resume", *batch)
    assert "going on after epoch 2" in log
    assert_same_run(whole, parts, 4, log)


def test_two_epochs_and_two_resumed_are_four_under_fsdp2_and_across_wrappers(
    tmp_path: Path, start_ranks: StartRanks
) -> None:
    """FSDP1 and then accelerate's DDP give the same bits as FSDP2 throughout: two ranks have one
    order to add in.
    """
    whole = tmp_path / "whole"
    start(
        *TORCHRUN, "2", SCRIPT, "--wrapper", "fsdp2", "--out", str(whole), "--epochs", "4", *QUICK
    )
    for first, second in (("fsdp2", "fsdp2"), ("fsdp1", "accelerate")):
        start_ranks(2, tmp_path / first, first, 2)
        log = start_ranks(2, tmp_path / first, second, 4, "--resume")
        assert_same_run(whole, tmp_path / first, 4, log)
    assert "world: 2 ranks (accelerate MULTI_CPU, cpu, gloo), batch 32 = 2 x 16" in log


def test_plain_python(tmp_path: Path) -> None:
    out = tmp_path / "run"
    log = start(SCRIPT, "--out", str(out), "--epochs", "3", *QUICK)
    assert "world: 1 rank (none, cpu), batch 32 = 1 x 32" in log
    assert f"next: dist-ema inspect {out / 'export'}" in log
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "epoch-0002",
        "epoch-0003",
        "export",
        "metrics.jsonl",
    ]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert metrics(out)[2]["averaging"]["updates"] == 12


def test_resume_in_one_process(tmp_path: Path, train: ModuleType) -> None:
    """Also from a folder that a killed run left: an unfinished checkpoint, and a line of an epoch
    that was not saved.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(["--out", str(whole), "--epochs", "4", *QUICK]) == 0
    assert train.main(["--out", str(parts), "--epochs", "2", *QUICK]) == 0
    (parts / ".unfinished" / "live").mkdir(parents=True)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"epoch": 3, "live": {}, "ema": {}}) + "\n" + '{"epoch": 4, "li'
        )  # cut short
    assert train.main(["--out", str(parts), "--epochs", "4", "--resume", *QUICK]) == 0
    assert_same_run(whole, parts, 4)


def test_accelerate_launch(tmp_path: Path) -> None:
    """One process on the CPU, whatever is asked (fact 22)."""
    out = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", SCRIPT]
    log = start(*launch, "--out", str(out), "--epochs", "1", *QUICK)
    assert "world: 1 rank (accelerate NO, cpu)" in log
    assert load_file(out / "export").keys() == load_file(out / "epoch-0001" / "ema").keys()


# --- what it makes --------------------------------------------------------------------------------


def test_the_average_is_better_and_steadier_than_live(tmp_path: Path, train: ModuleType) -> None:
    """And the exported file, in a plain model, has the accuracy that was measured inside swap()."""
    assert train.main(["--out", str(tmp_path / "run"), "--epochs", "12", "--device", "cpu"]) == 0
    rows = metrics(tmp_path / "run")
    of = {
        name: torch.tensor([row[name]["accuracy"] for row in rows[6:]]) for name in ("live", "ema")
    }
    assert of["ema"].mean() > of["live"].mean() + 0.01
    assert of["ema"].diff().std() < of["live"].diff().std() / 2

    net, digits = train.Net(), train.load_digits(torch.device("cpu"))
    net.load_state_dict(load_file(tmp_path / "run" / "export"), strict=True)
    with torch.no_grad():
        right = net.eval()(digits.test_images).argmax(1) == digits.test_labels
    assert right.double().mean().item() == rows[-1]["ema"]["accuracy"]


def test_ranks_share_the_batches_of_one_process(train: ModuleType) -> None:
    """[Note: the same numbers] in train.py: the images do not depend on the world."""
    args = argparse.Namespace(seed=3, batch_size=8, steps_per_epoch=2)
    digits = train.load_digits(torch.device("cpu"))
    jobs = [
        train.Job(rank, world, torch.device("cpu"), "") for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    for whole, even, odd in zip(
        *(train.batches(job, digits, args, 5) for job in jobs), strict=True
    ):
        for i in range(2):  # images, labels
            assert torch.equal(whole[i][0::2], even[i])
            assert torch.equal(whole[i][1::2], odd[i])
    first, second = (next(iter(train.batches(jobs[0], digits, args, epoch)))[0] for epoch in (5, 6))
    assert not torch.equal(first, second)


# --- what it refuses ------------------------------------------------------------------------------


def test_ranks_under_accelerate_without_the_cpu_variable(
    tmp_path: Path, launcher: Launcher
) -> None:
    """Two worlds of one would overwrite each other's files (fact 22)."""
    arguments = ["--out", str(tmp_path / "run"), "--epochs", "1", "--steps-per-epoch", "4"]
    place = tmp_path / "of-run"
    job = launcher.start(Path(SCRIPT), place, *arguments, ACCELERATE_MIXED_PRECISION="no")
    log = job.wait(job.log)
    assert "2 processes were started, but in each of them accelerate has a world of 1" in log
    assert "set ACCELERATE_USE_CPU=1" in log
    assert not (tmp_path / "run").exists()


def test_wrapper_none_on_two_ranks(
    tmp_path: Path,
    train: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--wrapper", "none", "--out", str(tmp_path / "run")]) == 2
    assert "--wrapper none trains in one process, but 2 were started" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--wrapper", "ddp"], "--wrapper ddp needs a process group: torchrun --standalone"),
        (["--batch-size", "1"], "--batch-size 1 cannot be shared by 1 ranks"),
        (["--batch-size", "2000"], "--batch-size 2000 is more than the 1347 training images."),
        (["--steps-per-epoch", "43"], "--steps-per-epoch 43: an epoch has 42 at batch size 32."),
        (["--out", SCRIPT], f"--out {SCRIPT} cannot be written: File exists."),
        (["--decay", "1.5"], "argument --decay: must be at least 0 and below 1, got '1.5'"),
        (
            ["--epochs", "none"],
            "argument --epochs: must be a whole number of 1 or more, got 'none'",
        ),
    ],
)
def test_a_bad_argument_gives_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    train: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(train.main(["--device", "cpu", *arguments]))  # or argparse exits by itself
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, train: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is there, but nothing can be put into it: refused before anything is trained."""
    (tmp_path / "metrics.unfinished").mkdir()
    assert train.main(["--out", str(tmp_path), "--epochs", "1", *QUICK]) == 2
    assert (
        f"train.py: --out {tmp_path} cannot be written: Is a directory." in capsys.readouterr().err
    )


def test_a_run_is_not_overwritten_nor_changed(
    tmp_path: Path, train: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert train.main([*out, "--epochs", "1", *QUICK]) == 0
    assert train.main([*out, "--epochs", "2", *QUICK]) == 2
    assert f"{tmp_path / 'run'} holds a run already" in capsys.readouterr().err
    assert train.main([*out, "--epochs", "2", "--lr", "0.2", "--resume", *QUICK]) == 2
    assert (
        "epoch-0001 was trained with --lr 0.1, and --resume came with 0.2."
        in capsys.readouterr().err
    )
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1]
    again = [*out, "--epochs", "1", "--resume", *QUICK]
    (tmp_path / "run" / "epoch-0001.bak").mkdir()  # a copy of the user's
    assert train.main(again) == 0
    for name in ("metrics.jsonl", "epoch-0001/state.json"):
        (tmp_path / "run" / name).write_text("{half\n")
        capsys.readouterr()
        assert train.main(again) == 2
        assert f"{name} is missing or damaged, so the run cannot" in capsys.readouterr().err


# --- the launchers --------------------------------------------------------------------------------


def test_help_names_every_option(train: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    options = "wrapper epochs batch-size lr decay seed out resume device save-every"
    for option in [*options.split(), "steps-per-epoch", "buffers"]:
        assert re.search(rf"--{option}\b", text), option
    assert "torchrun --standalone --nproc-per-node 2 launch/train.py --wrapper fsdp2" in text


@pytest.mark.parametrize(("script", "defaults"), [("scale", ["512"]), ("offline", ["1GB", "5"])])
def test_help_shows_defaults(script: str, defaults: list[str]) -> None:
    text = start(str(ROOT / "launch" / f"{script}.py"), "--help")
    assert [default for default in defaults if f"(default {default})" not in text] == []


def test_evaluate_names_what_it_cannot_read(tmp_path: Path) -> None:
    """A wrong path is wrong usage: one sentence, no traceback."""
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), str(tmp_path / "none")]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path / 'none'} does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configs(name: str, kind: str, train: ModuleType) -> None:
    """Every key is one that accelerate's launcher knows, and the layer that it is to wrap
    exists.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert config.num_processes == 2
    known = vars(launch_command_parser().parse_args(["script"]))
    assert set(config.fsdp_config) <= set(known)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert hasattr(train, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])


def test_slurm_script_starts_torchrun_on_every_node(tmp_path: Path, train: ModuleType) -> None:
    """With stand-ins for Slurm's two commands: what srun would start on two nodes of four GPUs."""
    for name, text in {
        "srun": 'printf "%s\\n" "$@" > "$PRINTED"',
        "scontrol": "printf 'node1\\nnode2\\n'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SUBMIT_DIR": str(ROOT),
        "JOB_ID": "7",
        "JOB_NODELIST": "node[1-2]",
        "JOB_NUM_NODES": "2",
    }
    slurm |= {"GPUS_ON_NODE": "4", "CPUS_PER_TASK": "16"}
    environ = {f"SLURM_{key}": value for key, value in slurm.items()} | {
        "PRINTED": str(tmp_path / "printed")
    }
    environ["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "--epochs", "3"],
        env=ENVIRON | environ,
        check=True,
        timeout=60,
    )
    words = (tmp_path / "printed").read_text().split("\n")[:-1]
    begin, at = words.index(".venv/bin/torchrun"), words.index("launch/train.py")
    assert all(word.startswith("--") for word in words[:begin])  # srun's own
    rendezvous = ["--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29500"]
    assert words[begin + 1 : at] == ["--nnodes", "2", "--nproc-per-node", "4", *rendezvous]
    args = train.parse(words[at + 1 :])
    assert (args.wrapper, args.batch_size, args.epochs, args.resume) == ("fsdp2", 64, 3, True)
    assert str(args.out) == "runs/slurm-7"
