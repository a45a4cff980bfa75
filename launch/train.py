"""Train a digit classifier on one process or many, average it meanwhile, and export the average.

    python launch/train.py                                    one process
    torchrun --standalone --nproc-per-node 2 launch/train.py --wrapper fsdp2    or fsdp1, ddp
    accelerate launch launch/train.py                         as accelerate is configured
    ACCELERATE_USE_CPU=1 torchrun --standalone --nproc-per-node 2 launch/train.py
                                                              accelerate, two ranks without GPUs
    sbatch launch/slurm.sbatch                                two nodes

[Note: the same numbers]  Order and augmentation are drawn on the host from (seed, epoch, step) for
the whole batch, and each rank takes its share. No generator lives from one step to the next. So a
resumed run sees what an uninterrupted one would have seen, and the images do not depend on the
number of ranks. Sums over the ranks are the same too if they add up in the same order, which
`settle_buckets` ensures.

[Note: BatchNorm]  Running statistics are buffers, no gradient ties them together, and wrappers
treat them differently: DDP takes those of rank 0, FSDP leaves every rank its own. Here they are
averaged over the ranks in every step, so there is one model, whatever wraps it. They also belong to
the weights that produced them: averaged weights with the live statistics are a mixture, whose
accuracy jumps about. `EMA(buffers="average")` averages them with the weights; `--buffers copy`
shows what happens without. The live model suffers too, as its statistics lag behind its weights.
With fresh ones it would make up three quarters of the average's lead here: read the curves with
that in mind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dist_ema import EMA, Debiased

# The first images; the other 450 are for testing. One person may have written neighbouring digits,
# so a shuffle before the split would leak.
TRAIN_IMAGES = 1347
KEEP = 2  # checkpoints


class UsageError(ValueError):
    """The run cannot start like this: one sentence for the person who started it."""


# --- who takes part -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device
    wrapper: str
    accelerator: Any = None

    def describe(self, batch_size: int) -> str:
        ranks = "1 rank" if self.world == 1 else f"{self.world} ranks"
        backend = f", {dist.get_backend()}" if dist.is_initialized() else ""
        parts = f"{batch_size} = {self.world} x {batch_size // self.world}"
        return f"world: {ranks} ({self.wrapper}, {self.device.type}{backend}), batch {parts}"


def join(args: argparse.Namespace) -> Job:
    """Find out how the script was started, and join the other ranks. *Collective*."""
    by_accelerate = any(
        key.startswith(("ACCELERATE_USE_", "ACCELERATE_MIXED_PRECISION")) for key in os.environ
    )
    job = _join_accelerate(args) if by_accelerate else _join_torchrun(args)
    if args.batch_size % job.world or args.batch_size < 2 * job.world:
        raise UsageError(
            f"--batch-size {args.batch_size} cannot be shared by {job.world} ranks: each needs the "
            "same number of images, and BatchNorm at least 2."
        )
    return job


def _environ(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _join_accelerate(args: argparse.Namespace) -> Job:
    if args.wrapper:
        raise UsageError(
            f"--wrapper {args.wrapper} is for torchrun; accelerate wraps as its configuration says "
            "(accelerate launch --config_file launch/accelerate/fsdp2.yaml launch/train.py)."
        )
    try:
        from accelerate.accelerator import Accelerator
    except ImportError:
        raise UsageError(_missing("accelerate")) from None

    accelerator = Accelerator(cpu=args.device == "cpu")
    started, world = _environ("WORLD_SIZE", 1), accelerator.num_processes
    if world != started:
        raise UsageError(
            f"{started} processes were started, but in each of them accelerate has a world of "
            f"{world}, and they would overwrite each other's files: set ACCELERATE_USE_CPU=1 to "
            "train on the CPU, or start no more ranks than GPUs."
        )
    if args.device == "cuda" and accelerator.device.type != "cuda":
        raise UsageError(
            f"--device cuda was asked, but accelerate chose {accelerator.device.type}: "
            "use --device auto."
        )
    name = f"accelerate {accelerator.distributed_type.value}"
    return Job(accelerator.process_index, world, accelerator.device, name, accelerator)


def _join_torchrun(args: argparse.Namespace) -> Job:
    rank, world = _environ("RANK", 0), _environ("WORLD_SIZE", 1)
    wrapper = args.wrapper or ("ddp" if world > 1 else "none")
    if wrapper == "none" and world > 1:
        raise UsageError(
            f"--wrapper none trains in one process, but {world} were started, and they would "
            "overwrite each other's files: use --wrapper ddp, fsdp1 or fsdp2."
        )
    if wrapper != "none" and "RANK" not in os.environ:
        raise UsageError(
            f"--wrapper {wrapper} needs a process group: "
            f"torchrun --standalone --nproc-per-node 2 launch/train.py --wrapper {wrapper}"
        )
    device = _device(args.device, _environ("LOCAL_RANK", 0), _environ("LOCAL_WORLD_SIZE", 1))
    if wrapper != "none":
        dist.init_process_group(
            "nccl", device_id=device
        ) if device.type == "cuda" else dist.init_process_group("gloo")
    return Job(rank, world, device, wrapper)


def _device(asked: str, local_rank: int, local_world: int) -> torch.device:
    found = torch.cuda.device_count() if asked != "cpu" else 0
    if not found and asked == "cuda":
        raise UsageError(
            "--device cuda was asked, but torch finds no CUDA device: use --device cpu."
        )
    if not found:
        return torch.device("cpu")
    if local_world > found:
        raise UsageError(
            f"{local_world} ranks for {found} CUDA devices: start {found}, or use --device cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def decide(job: Job, work: Callable[[], int | None]) -> int:
    """Broadcast the number that `work` returns on rank 0; its refusal ends all. *Collective*."""
    number, refusal = 0, None
    if job.rank == 0:
        try:
            number = work() or 0
        except UsageError as caught:
            number, refusal = -1, caught
    if job.world > 1:
        answer = torch.tensor(number, device=job.device)
        dist.broadcast(answer, 0)
        number = int(answer)
    if number < 0:
        raise refusal or UsageError("rank 0 refused.")
    return number


def leave(code: int) -> None:
    """Exit. On gloo the interpreter's teardown is skipped, where gloo aborts now and then."""
    gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if gloo:
        os._exit(code)
    sys.exit(code)


# --- the task -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8 x 8 pixels, between 0 and 1."""

    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor  # [N]
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device) -> Digits:
    """The training part stays on the host, where it is augmented."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target)
    n = TRAIN_IMAGES
    return Digits(images[:n], labels[:n], images[n:].to(device), labels[n:].to(device))


def draw(*key: int) -> torch.Generator:
    """A generator that depends on `key` and on nothing else ([Note: the same numbers])."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 17 degrees, scale by 15 %, shift by a pixel, add noise of 0.2."""

    def centred(*size: int) -> Tensor:  # uniform in [-1, 1)
        return torch.rand(size, generator=generator) * 2 - 1

    n = len(images)
    angle, scale, shift = 0.3 * centred(n), 1 + 0.15 * centred(n), centred(n, 2) / 4
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.2 * torch.randn(moved.shape, generator=generator)


def batches(
    job: Job, digits: Digits, args: argparse.Namespace, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of every batch of one epoch."""
    order = torch.randperm(len(digits.images), generator=draw(args.seed, epoch))
    for step in range(args.steps_per_epoch):
        rows = order[step * args.batch_size : (step + 1) * args.batch_size]
        images = augment(digits.images[rows], draw(args.seed, epoch, step + 1))
        local = slice(job.rank, None, job.world)
        yield images[local].to(job.device), digits.labels[rows][local].to(job.device)


class Block(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Net(nn.Sequential):
    """14,458 weights, and 160 running statistics."""

    def __init__(self, width: int = 16) -> None:
        # NOTE: a stride in place of max pooling, whose backward adds in no fixed order on a GPU.
        blocks = Block(1, width), Block(width, 2 * width), Block(2 * width, 2 * width, stride=2)
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


# --- one run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a job trains."""

    job: Job
    args: argparse.Namespace
    digits: Digits
    model: nn.Module
    optimizer: Any  # accelerate's is no torch optimizer

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        wrapped = self.optimizer
        return wrapped.optimizer if self.job.accelerator else wrapped  # type: ignore[no-any-return]


def build(job: Job, args: argparse.Namespace) -> Run:
    """The data, and the model as it will be trained, before its first step."""
    torch.manual_seed(args.seed)
    if job.device.type == "cuda":  # resuming to the same bits needs more care there
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = wrap(job, Net().to(job.device))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    if job.accelerator:
        model, optimizer = job.accelerator.prepare(model, optimizer)
    settle_buckets(model, optimizer, job.device)
    return Run(job, args, load_digits(job.device), model, optimizer)


def wrap(job: Job, model: nn.Module) -> nn.Module:
    """What `--wrapper` asks for. EMA finds out by itself what it was."""
    if job.accelerator or job.wrapper == "none":
        return model
    if job.wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = dist.init_device_mesh(job.device.type, (job.world,))
    if job.wrapper == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        # NOTE: without device_id a CPU model is sent to a GPU that may not exist.
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_id=job.device,
            use_orig_params=True,
            device_mesh=mesh,
        )
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if mesh.device_type == "cpu":  # torch 2.8: gloo takes an average of gradients for a sum
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
    return model


def settle_buckets(model: nn.Module, optimizer: Any, device: torch.device) -> None:
    """Let DDP order its buckets, which it does after its first backward. *Collective*.

    In another order three ranks or more add up differently, and the first step after a resume would
    not repeat the bits.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.eval()  # BatchNorm's statistics stay as they are
        model(torch.zeros(2, 1, 8, 8, device=device)).sum().backward()
        optimizer.zero_grad()


def train_epoch(run: Run, epoch: int, advance: Callable[[], None]) -> None:
    run.model.train()
    for images, labels in batches(run.job, run.digits, run.args, epoch):
        loss = F.cross_entropy(run.model(images), labels)
        run.optimizer.zero_grad()
        run.job.accelerator.backward(loss) if run.job.accelerator else loss.backward()
        share_statistics(run.job, run.model)
        run.optimizer.step()  # the average moves right behind this: ema.attach()
        advance()


@torch.no_grad()
def share_statistics(job: Job, model: nn.Module) -> None:
    """Average BatchNorm statistics over ranks ([Note: BatchNorm]). *Collective*, 640 bytes."""
    if job.world == 1:
        return
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    dist.all_reduce(flat)
    for buffer, mean in zip(
        statistics, (flat / job.world).split([b.numel() for b in statistics]), strict=True
    ):
        buffer.copy_(mean.view_as(buffer))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Accuracy and loss on the test images, each rank its part. *Collective*."""
    run.model.eval()
    local = slice(run.job.rank, None, run.job.world)
    labels = run.digits.test_labels[local]
    logits = run.model(run.digits.test_images[local]).float()
    right, loss = (
        (logits.argmax(1) == labels).sum(),
        F.cross_entropy(logits, labels, reduction="sum"),
    )
    sums = torch.stack([right.double(), loss.double()])
    if run.job.world > 1:
        dist.all_reduce(sums)
    accuracy, loss = (sums / len(run.digits.test_labels)).tolist()
    return {"accuracy": accuracy, "loss": loss}


# --- files ----------------------------------------------------------------------------------------


def save(run: Run, ema: EMA, epoch: int) -> None:
    """Write live/, ema/ and state.json to out/epoch-0003: all of it or nothing. *Collective*."""
    unfinished = run.args.out / ".unfinished"
    decide(run.job, lambda: _clear(unfinished))
    with quiet():
        dcp.save(live_state(run), checkpoint_id=unfinished / "live")
    ema.save(unfinished / "ema", extra={"epoch": epoch})
    decide(run.job, lambda: _commit(run.args, unfinished, epoch))


def live_state(run: Run) -> dict[str, Any]:
    """Canonical names and each rank's own shards, so another wrapper and world can load them."""
    model, optimizer = get_state_dict(run.model, run.torch_optimizer)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def quiet() -> Iterator[None]:
    """DCP says on every call that it works alone, and FSDP1 that it is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(args: argparse.Namespace, unfinished: Path, epoch: int) -> None:
    state = {"epoch": epoch, "settings": settings(args)}
    (unfinished / "state.json").write_text(json.dumps(state, indent=2))
    for written in (unfinished / "state.json", unfinished):
        _sync(written)
    unfinished.rename(args.out / f"epoch-{epoch:04d}")
    _sync(args.out)
    for old in checkpoints(args.out)[:-KEEP]:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    """A rename must not reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(out: Path) -> list[Path]:
    """The oldest first. A copy of yours, epoch-0003.bak, is none."""
    return sorted(path for path in out.glob("epoch-*") if path.name[6:].isdigit())


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What must not change when a run goes on, or its numbers would."""
    return {
        key: getattr(args, key)
        for key in ("seed", "batch_size", "lr", "decay", "buffers", "steps_per_epoch")
    }


def find_start(args: argparse.Namespace) -> int:
    """The epoch to go on from, 0 for a fresh start. metrics.jsonl is cut to it."""
    found = checkpoints(args.out)
    if (found or (args.out / "metrics.jsonl").exists()) and not args.resume:
        raise UsageError(
            f"{args.out} holds a run already: go on with --resume, or write to another --out."
        )
    epoch = 0
    if found:
        with _refused_if_damaged(path := found[-1] / "state.json"):
            state = json.loads(path.read_text())
            epoch, before = int(state["epoch"]), dict(state["settings"])
        _refuse_changes(args, found[-1], before)
    with _refused_if_damaged(args.out / "metrics.jsonl"):
        rows = [row for row in read_metrics(args.out) if row["epoch"] <= epoch]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        rewrite(args.out / "metrics.jsonl", rows)
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}.") from None
    return epoch


@contextmanager
def _refused_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        raise UsageError(
            f"{path} is missing or damaged, so the run cannot go on from {path.parent}: remove "
            "what is damaged, or write to another --out."
        ) from None


def _refuse_changes(args: argparse.Namespace, folder: Path, before: dict[str, Any]) -> None:
    for key, now in settings(args).items():
        if before.get(key) != now:
            option = key.replace("_", "-")
            raise UsageError(
                f"{folder} was trained with --{option} {before.get(key)}, "
                f"and --resume came with {now}."
            )


def restore(run: Run, epoch: int) -> None:
    """Fill the live model and the optimizer. *Collective*.

    It comes before `ema.attach`, because set_state_dict steps a fresh optimizer.
    """
    # NOTE: DCP's .metadata is a pickle, so resume only from a folder that you trust.
    state = live_state(run)
    with quiet():
        dcp.load(state, checkpoint_id=run.args.out / f"epoch-{epoch:04d}" / "live")
    set_state_dict(
        run.model,
        run.torch_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows so far, without a last line that a killed run left unfinished."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".unfinished")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def append(out: Path, row: dict[str, Any]) -> None:
    """One line of metrics.jsonl. JSON has no infinity: null."""
    finite = {
        key: value if math.isfinite(value) else None for key, value in row["averaging"].items()
    }
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"averaging": finite}) + "\n")


def plot(out: Path) -> None:
    """Both curves as curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(out)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, unit in zip(
        panels, ("accuracy", "loss"), ("", " (cross entropy)"), strict=True
    ):
        for name, label in (("live", "live"), ("ema", "average")):
            panel.plot(
                [row["epoch"] for row in rows],
                [row[name][key] for row in rows],
                marker=".",
                label=label,
            )
        panel.set(xlabel="epoch", ylabel=f"test {key}{unit}")
        panel.legend()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


# --- from start to end ----------------------------------------------------------------------------


@contextmanager
def progress(
    job: Job, steps: int, done: int
) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """(advance, say): a bar on rank 0, plain lines without a terminal; other ranks are silent."""
    if job.rank != 0 or not sys.stdout.isatty():
        yield lambda: None, lambda text: print(text, flush=True) if job.rank == 0 else None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=steps, completed=done)
        yield lambda: bar.advance(task), lambda text: bar.console.print(text, highlight=False)


def main_job(job: Job, args: argparse.Namespace) -> None:
    start = decide(job, lambda: find_start(args))
    run = build(job, args)
    if start:
        restore(run, start)
    ema = EMA(
        run.model, Debiased(args.decay), buffers=args.buffers
    )  # after wrapping, before training
    ema.attach(run.optimizer)
    if start:
        ema.load(args.out / f"epoch-{start:04d}" / "ema")
    if args.publish:
        published = ema.publish(args.out / "published", every=args.publish, keep=10, dtype=None)
    with progress(job, args.epochs * args.steps_per_epoch, start * args.steps_per_epoch) as (
        advance,
        say,
    ):
        say(job.describe(args.batch_size))
        say(repr(ema))
        if args.resume:
            say(
                f"going on after epoch {start}"
                if start
                else f"nothing to resume in {args.out}: starting at epoch 1"
            )
        for epoch in range(start + 1, args.epochs + 1):
            say(one_epoch(run, ema, epoch, advance))
    if args.publish:
        published.remove(stop=job.rank == 0)
    finish(run, ema)


def one_epoch(run: Run, ema: EMA, epoch: int, advance: Callable[[], None]) -> str:
    """Train, evaluate live and average, note it, save."""
    began = time.monotonic()
    train_epoch(run, epoch, advance)
    live = evaluate(run)
    with ema.swap():
        average = evaluate(run)
    seconds = time.monotonic() - began
    row = {
        "epoch": epoch,
        "live": live,
        "ema": average,
        "seconds": seconds,
        "averaging": ema.metrics(),
    }
    if run.job.rank == 0:
        append(run.args.out, row)
    if epoch % run.args.save_every == 0 or epoch == run.args.epochs:
        save(run, ema, epoch)
    accuracy = f"live {live['accuracy']:7.2%}  average {average['accuracy']:7.2%}"
    return f"epoch {epoch:3d}/{run.args.epochs}  {accuracy}  {seconds:5.1f} s"


def finish(run: Run, ema: EMA) -> None:
    """The file to ship, the curves, and what to do next. *Collective*."""
    out = run.args.out
    ema.export(out / "export")
    if run.job.rank == 0:
        plot(out)
        rows = read_metrics(out)
        last = rows[-max(1, len(rows) // 3) :]
        live, average = (
            sum(row[name]["accuracy"] for row in last) / len(last) for name in ("live", "ema")
        )
        print(
            f"mean of the last {len(last)} epochs: live {live:.2%}, average {average:.2%}; "
            f"{out / 'curves.png'}"
        )
        print(f"next: dist-ema inspect {out / 'export'}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Each default stands in its help."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "train.py", formatter_class=form, description=(__doc__ or "").split("[Note")[0]
    )
    whole = _number(int, "a whole number of 1 or more", lambda n: n >= 1)
    natural = _number(int, "a whole number of 0 or more", lambda n: n >= 0)
    share = _number(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
    rate = _number(float, "above 0", lambda x: 0 < x < math.inf)
    add = parser.add_argument
    text = "how torchrun's ranks hold the model (ddp on several, none on one)"
    add("--wrapper", choices=["fsdp2", "fsdp1", "ddp", "none"], help=text)
    add("--epochs", type=whole, default=20, metavar="N", help="in all, resumed ones included (20)")
    add(
        "--batch-size",
        type=whole,
        default=32,
        metavar="N",
        help="of all ranks together; each takes its share (32)",
    )
    add(
        "--lr",
        type=rate,
        default=0.1,
        metavar="X",
        help="constant, which is what leaves noise to average away (0.1)",
    )
    text = (
        "share of the average that survives a step: 0.98 forgets half in 34 steps; "
        "corrected for the start (0.98)"
    )
    add("--decay", type=share, default=0.98, metavar="D", help=text)
    text = (
        "BatchNorm statistics of the average: averaged as well, or copied from live, "
        "which is worse (average)"
    )
    add("--buffers", choices=["average", "copy"], default="average", help=text)
    add(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of initial weights, order and augmentation (0)",
    )
    text = "folder for metrics.jsonl, curves.png, two checkpoints and the export (runs/digits)"
    add("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help=text)
    text = (
        "go on from the last checkpoint in --out, on any wrapper and world; "
        "on the same ones to the same bits"
    )
    add("--resume", action="store_true", help=text)
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA where there is one (auto)",
    )
    add(
        "--save-every",
        type=whole,
        default=1,
        metavar="N",
        help="epochs between checkpoints; the last is saved too (1)",
    )
    add(
        "--steps-per-epoch",
        type=whole,
        metavar="N",
        help="end epochs early, for a quick look (all training images)",
    )
    text = "steps between the versions of the average in OUT/published (none)"
    add("--publish", type=whole, metavar="N", help=text)
    return parser.parse_args(arguments)


def _number(kind: type, wanted: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse that says what it wanted."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return convert


def check(args: argparse.Namespace) -> None:
    """What argparse cannot know."""
    for package in ("sklearn", "matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(_missing(package))
    size, whole = args.batch_size, TRAIN_IMAGES // args.batch_size
    if not whole:
        raise UsageError(f"--batch-size {size} is more than the {TRAIN_IMAGES} training images.")
    args.steps_per_epoch = args.steps_per_epoch or whole
    if args.steps_per_epoch > whole:
        raise UsageError(
            f"--steps-per-epoch {args.steps_per_epoch}: an epoch has {whole} at batch size {size}."
        )


def _missing(package: str) -> str:
    return f"launch/train.py needs {package}: pip install 'dist-ema[demo]'."


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 after one sentence that says what to change."""
    args = parse(arguments)
    try:
        check(args)
        main_job(join(args), args)
    except UsageError as refusal:
        if _environ("RANK", 0) == 0:
            print(f"train.py: {refusal}", file=sys.stderr)
        else:
            time.sleep(
                3
            )  # torchrun ends all ranks with the first one, and rank 0 has something to say
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
