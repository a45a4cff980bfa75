"""How fast the average moves, how much memory it takes, and what the others need for the same.

    python launch/bench.py                                     GPT-2 on the CPU: all tables
    python launch/bench.py --dtype bfloat16 --only update      bf16 weights, fp32 and bf16 shadows
    python launch/bench.py --model many --only update          4,000 tensors of 64 elements
    python launch/bench.py --model experts --only memory       what 10,000 tensors take to construct
    python launch/bench.py --device cuda --model llama1b       on an accelerator, timed with events
    python launch/bench.py --model tiny --repeat 2 --no-peers  whether it runs at all

An update is memory traffic: the live weight is read, the shadow is read and written. So its time is
given against an addition that moves as many bytes, timed in the same rounds. Bandwidth of a shared
machine changes by the minute, so times from different runs cannot be compared. Every candidate is
built, timed together with the additions and with dist_ema, and dropped again.

    add     torch.add(a, b, out=c)   three streams; a CPU reads the lines of c before it writes them
    add_    a.add_(b)                three streams, in place, as an update moves them
    copy_   c.copy_(a)               two streams

The better of `add` and `add_` is the limit. Peers are timed if they can be imported: timm,
diffusers, ema-pytorch, torch_ema. Nothing is downloaded: models are lists of shapes. Memory is
measured in a fresh process per figure, above what the process held before. On a CPU the kernel's
high-water mark is reset for that (/proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from dist_ema import EMA
from dist_ema.averaging.kernels import cpu_plan

DECAY = 0.999
MOST = 1 << 27  # elements of a reference buffer: far beyond any cache
PARTS = ("update", "memory", "step", "publish")
WAYS = ("ours", "ours-stream", "ours-behind", "torch", "torch-synced")  # of saving on two ranks
VERBS = ("build", "first update", "update", "swap", "gather", "save")

Run = Callable[[], object]
Shapes = list[tuple[int, ...]]


# --- the models -----------------------------------------------------------------------------------


def shapes(model: str) -> Shapes:
    """Of every weight, in the order in which the model holds them."""
    return {
        "gpt2": _gpt2,
        "resnet50": _resnet50,
        "llama1b": _llama1b,
        "tiny": _tiny,
        "many": _many,
        "experts": _experts,
    }[model]()


def _gpt2() -> Shapes:
    n = 768
    block = [
        (n,),
        (n,),
        (n, 3 * n),
        (3 * n,),
        (n, n),
        (n,),
        (n,),
        (n,),
        (n, 4 * n),
        (4 * n,),
        (4 * n, n),
        (n,),
    ]
    return [(50257, n), (1024, n), *block * 12, (n,), (n,)]


def _resnet50() -> Shapes:
    result: Shapes = []

    def conv(out: int, into: int, kernel: int) -> None:
        result.extend([(out, into, kernel, kernel), (out,), (out,)])

    conv(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(width, into, 1)
            conv(width, width, 3)
            conv(4 * width, width, 1)
            if block == 0:
                conv(4 * width, into, 1)
            into = 4 * width
    return [*result, (1000, into), (1000,)]


def _llama1b() -> Shapes:
    n, kv, wide = 2048, 512, 8192
    block = [(n, n), (kv, n), (kv, n), (n, n), (wide, n), (wide, n), (n, wide), (n,), (n,)]
    return [(128256, n), *block * 16, (n,)]


def _tiny() -> Shapes:
    return [(300, 64), *[(64, 64), (64,), (64, 256), (7,)] * 4]


def _many() -> Shapes:
    return [(64,)] * 4000


def _experts() -> Shapes:
    return [(64, 32)] * 10_000


def build(model: str, dtype: torch.dtype, device: torch.device) -> nn.ParameterList:
    """Every weight allocated for itself, as layers do."""
    return nn.ParameterList(
        [
            nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02))
            for shape in shapes(model)
        ]
    )


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Something to time, and the bytes that it has to move."""

    name: str
    run: Run
    nbytes: int


@dataclass
class Row:
    """One line of the table of updates."""

    name: str
    ms: float | None = None
    gb_per_s: float | None = None
    times_limit: float | None = None  # its time by that of the better addition over the same bytes
    at_best: float | None = (
        None  # the same of the fastest rounds: what is left of it on an idle machine
    )
    fraction_of_limit: float | None = None
    times_ours: float | None = None  # its time by that of EMA.update() in the same rounds
    mb_moved: float | None = None
    note: str = ""


def stopwatch(device: torch.device) -> Callable[[Run], float]:
    """A function that runs something and returns its seconds, on an accelerator by events."""
    if device.type == "cpu":

        def by_host(run: Run) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return by_host

    def by_events(run: Run) -> float:
        start, end = (
            torch.Event(device, enable_timing=True),
            torch.Event(device, enable_timing=True),
        )
        torch.accelerator.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return by_events


def interleave(
    cases: Sequence[Case], repeat: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each case. Every round runs all of them and begins with another one."""
    watch, deadline = stopwatch(args.device), time.monotonic() + args.patience
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        for _ in range(3):  # EMAs look for moved weights in the first two updates
            case.run()
    for turn in range(repeat):
        first = turn % len(cases)
        while busy() and time.monotonic() < deadline:
            time.sleep(0.02)
        for case in [*cases[first:], *cases[:first]]:
            seconds[case.name].append(watch(case.run))
    return seconds


def busy() -> bool:
    """Other processes want the processor at this moment."""
    try:
        running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
    except OSError:
        return False
    return int(running) > 1


def references(n: int, device: torch.device) -> list[Case]:
    """Plain streams over flat fp32 buffers of n elements at most `MOST`."""
    n = min(n, MOST)
    # NOTE: not zeros: pages that were never written are all one page, and reading them is free.
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    return [
        Case("add", lambda: torch.add(a, b, out=c), 12 * n),
        Case("add_", lambda: a.add_(b), 12 * n),
        Case("copy_", lambda: c.copy_(a), 8 * n),
    ]


def ours(model: nn.Module, dtype: torch.dtype, averages: int) -> tuple[Run, int]:
    """One update of an EMA, and the bytes that it moves: live once, every shadow twice."""
    decays = [DECAY ** (1 + k) for k in range(averages)]
    ema = EMA(model, decay=decays, dtype=dtype)
    moved = sum(
        p.numel() * (p.element_size() + 2 * averages * dtype.itemsize) for p in model.parameters()
    )
    return ema.update, moved


# --- the peers ------------------------------------------------------------------------------------

# Each takes the model and returns what moves its average once. Shadows are fp32 for any weights.


def _torch_foreach(model: nn.Module) -> Run:
    live = [p.detach() for p in model.parameters()]
    shadows = [p.float().clone() for p in live]
    if live[0].dtype == torch.float32:
        return torch.no_grad()(lambda: torch._foreach_lerp_(shadows, live, 1 - DECAY))
    return torch.no_grad()(
        lambda: torch._foreach_lerp_(shadows, [p.float() for p in live], 1 - DECAY)
    )


def _torch_multi(model: nn.Module) -> Run:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.module.float()
    return lambda: averaged.update_parameters(model)


def _torch_avg(model: nn.Module) -> Run:
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
    averaged.module.float()
    return lambda: averaged.update_parameters(model)


def _timm(model: nn.Module) -> Run:
    averaged = _timm_class()(model, decay=DECAY)
    averaged.module.float()
    return lambda: averaged.update(model)


def _timm_class() -> Any:
    try:
        return importlib.import_module("timm.utils").ModelEmaV3
    except (
        ImportError
    ):  # timm without torchvision: the one file that is needed here does not use it
        found = importlib.util.find_spec("timm")
        if found is None or found.origin is None:
            raise
        path = Path(found.origin).parent / "utils" / "model_ema.py"
        alone = importlib.util.spec_from_file_location("timm_model_ema", path)
        assert alone is not None
        assert alone.loader is not None
        module = importlib.util.module_from_spec(alone)
        alone.loader.exec_module(module)
        return module.ModelEmaV3


def _diffusers(model: nn.Module) -> Run:
    return _diffusers_model(model, foreach=False)


def _diffusers_foreach(model: nn.Module) -> Run:
    return _diffusers_model(model, foreach=True)


def _diffusers_model(model: nn.Module, foreach: bool) -> Run:
    averaged = importlib.import_module("diffusers.training_utils").EMAModel(
        model.parameters(), decay=DECAY, foreach=foreach
    )
    averaged.shadow_params = [p.float() for p in averaged.shadow_params]
    return lambda: averaged.step(model.parameters())


def _ema_pytorch(model: nn.Module) -> Run:
    make = importlib.import_module("ema_pytorch").EMA
    averaged = make(
        model, beta=DECAY, update_every=1, update_after_step=-1, include_online_model=False
    )
    averaged.ema_model.float()
    return lambda: averaged.update()


def _torch_ema(model: nn.Module) -> Run:
    averaged = importlib.import_module("torch_ema").ExponentialMovingAverage(
        model.parameters(), decay=DECAY
    )
    averaged.shadow_params = [p.float() for p in averaged.shadow_params]
    return lambda: averaged.update(model.parameters())


PEERS: dict[str, Callable[[nn.Module], Run]] = {
    "torch _foreach_lerp_": _torch_foreach,
    "torch AveragedModel, multi_avg_fn": _torch_multi,
    "torch AveragedModel, avg_fn": _torch_avg,
    "timm ModelEmaV3": _timm,
    "diffusers EMAModel": _diffusers,
    "diffusers EMAModel, foreach": _diffusers_foreach,
    "ema-pytorch EMA": _ema_pytorch,
    "torch_ema": _torch_ema,
}


def updates(args: argparse.Namespace) -> list[Row]:
    """One update of everybody, each timed with the references and with ours in the same rounds."""
    model = build(args.model, args.dtype, args.device)
    n = sum(p.numel() for p in model.parameters())
    plain = references(n, args.device)
    label = "ours" if args.averages == 1 else f"ours, {args.averages} averages in one pass"
    full = Case(f"{label}, fp32 shadow", *ours(model, torch.float32, args.averages))
    rows = _rows([*plain, full], interleave([*plain, full], args.repeat, args))
    compact = Case(f"{label}, bf16 shadow", *ours(model, torch.bfloat16, args.averages))
    cases = [*plain, full, compact]
    rows += _rows(cases, interleave(cases, -(-args.repeat // 3), args), ours=full.name)[-1:]
    del compact, cases
    for name, make in PEERS.items() if args.peers else ():
        gc.collect()
        try:
            peer = Case(name, make(model), full.nbytes)
            cases = [*plain, full, peer]
            rows += _rows(cases, interleave(cases, args.repeat, args), ours=full.name)[-1:]
        except ImportError:
            rows.append(Row(name, note="not installed"))
        except Exception as error:  # a peer that cannot do it is a result
            rows.append(
                Row(name, note=f"raises {type(error).__name__}: {str(error).splitlines()[0][:60]}")
            )
    return rows


def _rows(cases: Sequence[Case], seconds: dict[str, list[float]], ours: str = "") -> list[Row]:
    median = {name: statistics.median(each) for name, each in seconds.items()}
    rate = {case.name: case.nbytes / median[case.name] for case in cases}
    best = {case.name: case.nbytes / min(seconds[case.name]) for case in cases}
    limit, best_limit = (max(rates["add"], rates["add_"]) for rates in (rate, best))
    return [
        Row(
            case.name,
            ms=median[case.name] * 1e3,
            gb_per_s=rate[case.name] / 1e9,
            times_limit=limit / rate[case.name],
            at_best=best_limit / best[case.name],
            fraction_of_limit=rate[case.name] / limit,
            times_ours=median[case.name] / median[ours] if ours else None,
            mb_moved=case.nbytes / 1e6,
        )
        for case in cases
    ]


# --- a training step ------------------------------------------------------------------------------


@dataclass
class Step:
    """One line of the table of training steps."""

    name: str
    ms: float
    times_plain: float


class Trainer:
    """A transformer that predicts noise, large enough that its optimizer and its average matter."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        width, layers, tokens, rows = (
            (32, 1, 8, 2) if tiny else (256, 4, 64, 4) if device.type == "cpu" else BIG
        )
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, batch_first=True
        )
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.data = torch.randn(rows, tokens, width, device=device)

    def step(self) -> None:
        self.model(self.data).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


BIG = (2048, 16, 1024, 8)  # width, layers, tokens, rows: about 800 M weights


def steps(args: argparse.Namespace) -> list[Step]:
    """Time of a training step: without an average; with one inline, in flight or on the host."""
    trainer = Trainer(args.device, args.model == "tiny")
    beside = EMA(trainer.model, DECAY)
    host = EMA(trainer.model, DECAY, device="cpu")
    cases = [Case("no average", lambda: _train(trainer), 0)]
    cases.append(Case("inline", lambda: _train(trainer, beside, overlap=False), 0))
    if args.device.type != "cpu":
        cases.append(Case("overlapped", lambda: _train(trainer, beside), 0))
    cases.append(Case("offloaded", lambda: _train(trainer, host), 0))
    seconds = {
        name: statistics.median(each) / STEPS
        for name, each in interleave(cases, args.repeat, args).items()
    }
    plain = seconds["no average"]
    return [Step(name, took * 1e3, took / plain) for name, took in seconds.items()]


STEPS = 10  # in one measurement


def _train(trainer: Trainer, ema: EMA | None = None, overlap: bool = True) -> None:
    """Some steps, and the wait for the last update: on average a step pays for all of its own."""
    if ema is not None:
        ema.attach(trainer.optimizer, overlap=overlap)
    for _ in range(STEPS):
        trainer.step()
    if ema is not None:
        ema.state_dict()
        ema.detach()


@dataclass
class PublishCost:
    """The line of the table of publishing. low, high: 95 % confidence of times_plain."""

    name: str
    ms: float
    times_plain: float
    low: float
    high: float
    pairs: int


PUBLISHED = 50  # steps between two versions
SEGMENT, DUE = 20, 5  # steps in a measurement, and the one that publishes
PAIRS = 2  # for each round that is asked for


def publishing(args: argparse.Namespace) -> list[PublishCost]:
    """What publishing adds to the steps of a run.

    Short segments of one run alternate, with one version published in it and without. A segment
    that publishes lasts until its version is in place. What it takes longer than its neighbour is
    what a version costs, so it is spread over the steps between two versions. The interval is that
    of a median: two of the sorted values.
    """
    trainer = Trainer(args.device, args.model == "tiny")
    ema = EMA(trainer.model, DECAY)
    ema.attach(trainer.optimizer, overlap=False)
    plain, extra = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(-1, PAIRS * args.repeat):
            both = {
                each: _segment(trainer, ema, folder, each)
                for each in (turn % 2 == 0, turn % 2 == 1)
            }
            if turn >= 0:  # the first pair warms up
                plain.append(both[False] / SEGMENT)
                extra.append(both[True] - both[False])
    step, n = statistics.median(plain), len(extra)
    ratios = sorted(1 + each / (PUBLISHED * step) for each in extra)
    low = max(0, int(n / 2 - 0.98 * n**0.5))
    name, middle = f"publishing every {PUBLISHED}", statistics.median(ratios)
    return [PublishCost(name, step * 1e3, middle, ratios[low], ratios[n - 1 - low], n)]


def _segment(trainer: Trainer, ema: EMA, folder: str, publishes: bool) -> float:
    """Seconds of some steps."""
    handle = ema.publish(folder, every=ema.now + DUE) if publishes else None

    def steps() -> None:
        for _ in range(SEGMENT):
            trainer.step()
        if handle is not None:
            handle.wait()

    seconds = stopwatch(trainer.data.device)(steps)
    if handle is not None:
        handle.remove()
        assert (handle.published, handle.skipped) == (1, 0)
    return seconds


# --- memory ---------------------------------------------------------------------------------------


@dataclass
class Peak:
    """One line of the table of memory: the most that a process held above what it held before."""

    name: str
    peak_mb: float
    seconds: float
    model_mb: float
    note: str = ""


class Meter:
    """Peak memory since `start`, and seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._base = _status("VmRSS")
        self.began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self.began
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else _status("VmHWM")
        return {"peak_mb": (peak - self._base) / 1e6, "seconds": seconds}


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        f"/proc/self/status has no {field}: memory on the CPU can be measured on Linux only."
    )


def probe(args: argparse.Namespace, job: str, folder: Path) -> dict[str, float]:
    """In a process of its own: what one verb takes."""
    model = build(args.model, args.dtype, args.device)
    meter = Meter(args.device)
    if job == "build":
        meter.start()
        EMA(model, DECAY)
        return meter.stop()
    ema = EMA(model, DECAY)
    if job != "first update":
        ema.update()  # the first use of an average imports numba and compiles
    meter.start()
    result = verb(ema, job, folder)
    measured = meter.stop()
    del result
    return measured


def verb(ema: EMA, name: str, folder: Path) -> object:
    if name == "first update":
        return ema.update()
    if name == "update":
        return [ema.update() for _ in range(5)]
    if name == "swap":
        with ema.swap():
            return None
    return ema.gather() if name == "gather" else ema.save(folder / "average")


def memory(args: argparse.Namespace) -> list[Peak]:
    """Peaks of one process, and of two ranks that save."""
    size = sum(torch.Size(shape).numel() for shape in shapes(args.model)) * 4 / 1e6
    rows = [
        _peak(name, [_launch(args, name, [{}]) for _ in range(min(3, args.repeat))], size)
        for name in VERBS
    ]
    if args.device.type == "cpu":
        # NOTE: in turns, because machines that are shared change their speed by the minute.
        jobs = [f"{wrapper}-{way}" for wrapper in ("ddp", "fsdp2") for way in WAYS]
        rounds = [
            {job: _launch_ranks(args, job) for job in jobs} for _ in range(min(5, args.repeat))
        ]
        for job in jobs:
            runs = [each[job] for each in rounds]
            rows.append(_peak(f"2 ranks, {job}", runs, runs[0]["model_mb"]))
    return rows


def _peak(name: str, runs: Sequence[dict[str, float]], size: float) -> Peak:
    peak, seconds = (statistics.median(run[key] for run in runs) for key in ("peak_mb", "seconds"))
    return Peak(name, peak, seconds, size)


def _launch(
    args: argparse.Namespace, job: str, environs: Sequence[dict[str, str]]
) -> dict[str, float]:
    """Measure in one fresh process per environment, and take the worst of what they report."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "dist_ema.ema"])
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        reports = [Path(folder) / f"{rank}.json" for rank in range(len(environs))]
        processes = [
            fresh.Process(
                target=_report, args=(args, job, path, environ | {"STORE": f"{folder}/store"})
            )
            for path, environ in zip(reports, environs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if not all(path.exists() for path in reports):
            codes = [process.exitcode for process in processes]
            raise RuntimeError(
                f"measuring {job} failed with exit codes {codes}; what it printed stands above."
            )
        results: list[dict[str, float]] = [json.loads(path.read_text()) for path in reports]
    return {key: max(result[key] for result in results) for key in results[0]}


def _report(args: argparse.Namespace, job: str, path: Path, environ: dict[str, str]) -> None:
    """In a process of its own: measure `job`, and write what came out to `path`."""
    os.environ |= environ
    measured = (probe_ranks if "RANK" in environ else probe)(args, job, path.parent)
    path.write_text(json.dumps(measured))
    os._exit(0)  # gloo now and then aborts while the interpreter ends


def _launch_ranks(args: argparse.Namespace, job: str) -> dict[str, float]:
    return _launch(args, job, [{"RANK": str(rank)} for rank in range(2)])


def probe_ranks(args: argparse.Namespace, job: str, folder: Path) -> dict[str, float]:
    """On one of two ranks: save an average of 384 MB, by us or by a gather of torch's."""
    wrapper, way = job.split("-", 1)
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["STORE"], 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    tiny = args.model == "tiny"
    model = _wrap(
        _blocks(64 if tiny else 1024, 100 if tiny else 24_000, 4 if tiny else 68), wrapper
    )
    size = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    meter = Meter(torch.device("cpu"))
    if way.startswith("ours"):
        ema = EMA(model, DECAY)
        dist.barrier()
        meter.start()
        ema.save(
            folder / "average",
            mode="stream" if way == "ours-stream" else None,
            wait=way != "ours-behind",
        )
        if way == "ours-behind":
            blocked = time.perf_counter()
            ema.save(folder / "next", wait=True)  # the second save waits for the first
            return meter.stop() | {"model_mb": size, "seconds": blocked - meter.began}
    else:
        # A model under FSDP2 cannot be copied, so its live weights stand for the average.
        average = model if wrapper == "fsdp2" else AveragedModel(model.module)
        dist.barrier()
        meter.start()
        _save_gathered(average, folder / "average.safetensors", synced=way == "torch-synced")
    return meter.stop() | {"model_mb": size}


def _save_gathered(model: nn.Module, path: Path, synced: bool) -> None:
    """The usual way: everything on every rank, written by the first."""
    from safetensors.torch import save_file

    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    full: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in full.items()}, path)
        if synced:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    dist.barrier()


def _blocks(width: int, words: int, layers: int) -> nn.Sequential:
    """One large matrix and many of the same middle size, without biases."""
    layer = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    return nn.Sequential(nn.Linear(words, width, bias=False), *layer)


def _wrap(model: nn.Sequential, wrapper: str) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# --- the report -----------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = (
        names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    )
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def passes() -> str:
    """How updates in host memory run here. NUMBA_DISABLE_JIT=1 makes them eager."""
    if not cpu_plan.available():
        return "eager"
    return f"numba {importlib.metadata.version('numba')}"


def heading(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know to measure the same."""
    sizes = [torch.Size(shape).numel() for shape in shapes(args.model)]
    return {
        "command": shlex.join(["python", "launch/bench.py", *sys.argv[1:]]),
        "machine": machine(args.device),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "load": os.getloadavg()[0],
        "device": str(args.device),
        "passes": passes(),
        "model": args.model,
        "dtype": str(args.dtype).removeprefix("torch."),
        "tensors": len(sizes),
        "elements": sum(sizes),
        "averages": args.averages,
        "repeat": args.repeat,
    }


def cells(rows: Sequence[Row | Step | Peak | PublishCost]) -> list[list[str]]:
    """A head and the rows as text; columns that are empty everywhere are left out."""
    names = [
        key for key in asdict(rows[0]) if any(asdict(row)[key] not in (None, "") for row in rows)
    ]
    body = [[_text(key, asdict(row)[key]) for key in names] for row in rows]
    return [[name.replace("_", " ") for name in names], *body]


def _text(key: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return (
        f"{value:.3f}"
        if key in ("times_limit", "times_plain", "times_ours", "at_best", "low", "high")
        or value < 1
        else f"{value:.2f}"
        if value < 100
        else f"{value:.0f}"
    )


def show(title: str, table: list[list[str]]) -> None:
    """Print a table, in colour where rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(f"\n{title}")
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    head, *body = table
    pretty = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        pretty.add_column(
            name, justify="left" if i == 0 or name == "note" else "right", no_wrap=name != "note"
        )
    for line in body:
        pretty.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 150).print(pretty)


def draw(results: dict[str, list[Any]], title: str, path: Path) -> None:
    """A PNG with one bar chart per part."""
    try:
        import matplotlib
    except ImportError:
        print("No chart: matplotlib is not installed (pip install 'dist-ema[plot]').")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(1 + 0.35 * len(rows) for rows in results.values())
    ratios = [1 + 0.35 * len(rows) for rows in results.values()]
    figure, axes = pyplot.subplots(
        len(results),
        figsize=(9, 1 + height),
        squeeze=False,
        layout="constrained",
        height_ratios=ratios,
    )
    for axis, (part, rows) in zip(axes[:, 0], results.items(), strict=True):
        field, label = BARS[part]
        drawn = [row for row in rows if getattr(row, field) is not None]
        colours = [
            "tab:blue" if "ours" in row.name or part != "update" else "tab:grey" for row in drawn
        ]
        bars = axis.barh(
            [row.name for row in drawn], [getattr(row, field) for row in drawn], color=colours
        )
        axis.bar_label(bars, [_text(field, getattr(row, field)) for row in drawn], padding=3)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.set(title=part, xlabel=label)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


BARS = {
    "update": (
        "fraction_of_limit",
        "fraction of the bandwidth of a plain addition (more is better)",
    ),
    "step": ("ms", "milliseconds per training step (less is better)"),
    "publish": ("times_plain", "step by that without publishing (less is better)"),
    "memory": ("peak_mb", "peak memory above the base, MB (less is better)"),
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models, add = ("gpt2", "resnet50", "llama1b", "tiny", "many", "experts"), parser.add_argument
    add(
        "--device",
        type=_device,
        default=torch.device("cpu"),
        metavar="DEVICE",
        help="cpu, cuda or cuda:1 (cpu)",
    )
    add(
        "--model",
        choices=models,
        default="gpt2",
        help="whose list of shapes; many: 4000 x 64; experts: 10000 x 64 x 32 (gpt2)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the live weights (float32)",
    )
    add(
        "--averages",
        type=int,
        default=1,
        metavar="N",
        help="how many averages are kept of each weight (1)",
    )
    add("--repeat", type=int, default=25, metavar="N", help="rounds that a median is taken of (25)")
    add(
        "--patience",
        type=float,
        default=0,
        metavar="S",
        help="seconds that a median may wait for an idle machine (0)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="folder for JSON and PNG (runs/bench)",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time other libraries too (yes)",
    )
    add("--only", choices=PARTS, help="one part instead of all")
    args = parser.parse_args(words)
    if args.averages < 1 or args.repeat < 1:
        parser.error(
            f"--averages and --repeat must be 1 or more, got {args.averages} and {args.repeat}"
        )
    there = torch.accelerator.current_accelerator(check_available=True)
    if args.device.type not in ("cpu", there.type if there else "cpu"):
        parser.error(f"--device {args.device}, but torch finds no accelerator here")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {error.strerror}")
    args.dtype = getattr(torch, args.dtype)
    return args


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:1, got {text!r}") from None


WORK: dict[str, Callable[[argparse.Namespace], list[Any]]] = {
    "update": updates,
    "memory": memory,
    "step": steps,
    "publish": publishing,
}


def measure(args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """Each part that was asked for, as soon as it is measured."""
    for part, work in WORK.items():
        if args.only in (None, part):
            yield part, work(args)


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    head = heading(args)
    facts = (
        head["machine"],
        f"torch {head['torch']}",
        head["passes"],
        head["commit"],
        head["date"],
    )
    about = ", ".join([f"{head['model']} {head['dtype']}", *facts])
    print(f"{head['command']}\n{about}")
    results: dict[str, list[Any]] = {}
    for part, rows in measure(args):
        results[part] = rows
        show(part, cells(rows))
    name = "-".join([args.model, head["dtype"], args.device.type, args.only or "all"])
    written = args.out / f"{name}.json"
    written.write_text(
        json.dumps(
            head | {part: [asdict(row) for row in rows] for part, rows in results.items()}, indent=1
        )
    )
    draw(results, about, written.with_suffix(".png"))
    print(f"{written} and {written.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
