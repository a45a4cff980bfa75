"""DeepSpeed ZeRO on two ranks: the average of the fp32 masters, in every stage and precision.

How to read a failure: the key of the result names stage, precision and check; the value is the
difference to a float64 average of the masters, or the error.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, Window, load_file
from dist_ema.averaging import drop_in_rules
from tests import _deepspeed
from tests._models import Net, batch
from tests._oracle import Training
from tests._ranks import raises, run_ranks

DECAY = 0.75
EPS = 3e-7
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Model(nn.Module):
    """Tied, frozen and normalised weights; sizes that no world divides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.tied, self.b = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 3)
        self.tied.weight = self.a.weight
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.relu(self.a(x) + self.tied(x)))) + self.frozen


class Run:
    """An engine with its EMA, and the naive average of its masters on every rank."""

    def __init__(self, stage: int, precision: str, accumulate: int = 1, **zero: Any) -> None:
        torch.manual_seed(0)
        self.dtype, self.stage, self.accumulate = PRECISIONS[precision], stage, accumulate
        self.module = Model().to(self.dtype)
        self.engine = _deepspeed.engine(self.module, stage, self.dtype, accumulate, **zero)
        self.trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.ema = EMA(self.engine, DECAY)
        self.ema.attach(self.engine)
        self.average, self.count = self.masters(), 0

    def masters(self) -> dict[str, Tensor]:
        """The optimizer's own fp32 weights in float64, by DeepSpeed's own getter."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).double().clone() for n, p in self.trained.items()}

    def live(self) -> dict[str, Tensor]:
        """What the model computes with, in float64."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.trained.values()), enabled=self.stage == 3):
            return {n: p.detach().double().clone() for n, p in self.trained.items()}

    def batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(6, 5, generator=generator).to(self.dtype)

    def step(self, n: int = 1, scale: float = 1.0) -> None:
        for _ in range(n):
            for _ in range(self.accumulate):
                self.count += 1
                output = self.engine(self.batch(10 * self.count + dist.get_rank()))
                self.engine.backward(output.float().square().mean() * scale)
                self.engine.step()
            if self.engine.was_step_applied():
                for name, master in self.masters().items():
                    self.average[name].lerp_(master, 1 - DECAY)

    @torch.no_grad()
    def probe(self) -> Tensor:
        """In eval mode; DeepSpeed may keep weights gathered behind it."""
        self.engine.eval()
        output = self.engine(self.batch(1))
        self.engine.train()
        return output.double().clone()

    def off(self) -> float:
        """The difference of the average on rank 0, on all ranks."""
        gathered = self.ema.gather()
        off = torch.tensor(distance(self.average, gathered) if gathered else 0.0)
        dist.broadcast(off, 0)
        return float(off)

    def rounded(self) -> dict[str, Tensor]:
        """The average as the model would hold it."""
        return {name: value.to(self.dtype).double() for name, value in self.average.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(
        (value - b[name].reshape(value.shape)).abs().max().item() for name, value in a.items()
    )


def trained(stage: int, precision: str, accumulate: int) -> float:
    run = Run(stage, precision, accumulate)
    run.step(4)
    return run.off()


def swapped(stage: int, precision: str, warm: bool) -> float:
    """A swap lends the average to the 16-bit weights and leaves the masters alone, also after a
    warm evaluation.
    """
    run = Run(stage, precision)
    run.step(3)
    if warm:
        run.probe()
    live, masters = run.live(), run.masters()
    before = run.probe()
    with run.ema.swap():
        inside, seen = run.live(), run.probe()
    assert not torch.equal(before, seen)
    assert torch.equal(before, run.probe())
    assert distance(live, run.live()) == distance(masters, run.masters()) == 0
    with raises(KeyError, "evaluation failed"), run.ema.swap():
        run.probe()
        raise KeyError("evaluation failed")
    assert distance(live, run.live()) == 0
    off = distance(run.rounded(), inside)
    run.step(2)
    return max(off if run.dtype == torch.float32 else 0.0 if off < 0.01 else off, run.off())


def stored(stage: int, precision: str) -> float:
    """A file holds everything, and gives the average back bit for bit."""
    run = Run(stage, precision)
    run.step(3)
    with shared_path() as path:
        run.ema.save(path)
        first = run.ema.gather()
        stored = load_file(path)
        assert stored.keys() == run.module.state_dict().keys()
        assert stored["frozen"].tolist() == [0, 1, 2]
        assert distance(run.average, stored) < EPS
        run.step(1)
        run.ema.load(path)
    second = run.ema.gather()
    assert all(torch.equal(first[name], second[name]) for name in first if name in run.trained)
    return 0.0


@contextmanager
def shared_path() -> Iterator[str]:
    """For a file of all ranks, deleted after the block."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    yield f"{folder[0]}/average"
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


def windowed(stage: int, precision: str) -> float:
    """The mean of every master of a Window, lent by a swap, and resumed with its blocks."""
    run = Run(stage, precision)
    run.ema.detach()
    past: list[dict[str, Tensor]] = []

    def walk(ema: EMA, steps: int, covered: int) -> float:
        run.ema = ema
        ema.attach(run.engine)
        for _ in range(steps):
            run.step()
            past.append(run.masters())
        ema.detach()
        run.average = {
            name: torch.stack([each[name] for each in past[-covered:]]).mean(0)
            for name in run.trained
        }
        with ema.swap():
            inside = run.live()
        assert distance(run.rounded(), inside) < (EPS if run.dtype == torch.float32 else 0.01)
        return run.off()

    with shared_path() as path:
        off = walk(EMA(run.engine, Window(6, blocks=3)), 9, 5)
        run.ema.save(path)
        resumed = EMA(run.engine, Window(6, blocks=3))
        resumed.load(path)
    return max(off, walk(resumed, 3, 6))


def copied(stage: int, precision: str) -> float:
    """copy_to the model itself writes masters too: else the next step would go on from the old
    ones.
    """
    run = Run(stage, precision)
    run.step(3)
    drop_in_rules.pull(run.ema.weights, 1.0)
    off = max(distance(run.average, run.masters()), run.off())
    assert distance(run.rounded(), run.live()) < (EPS if run.dtype == torch.float32 else 0.01)
    run.step(2)
    return max(off, run.off())


def other_verbs(stage: int, precision: str) -> float:
    """reset and rescan take the masters, metrics reads them, and update by hand averages them."""
    run = Run(stage, precision)
    run.step(3)
    masters, average = run.masters(), run.average
    found = run.ema.metrics()
    square = sum((masters[n] - average[n]).square().sum().item() for n in masters)
    norm = sum(value.square().sum().item() for value in masters.values())
    assert abs(found["distance"] - (square / norm) ** 0.5) < 1e-5, found
    run.ema.rescan()
    off = run.off()
    run.ema.detach()
    run.ema.update()
    for name, master in run.masters().items():
        run.average[name].lerp_(master, 1 - DECAY)
    off = max(off, run.off())
    run.ema.reset()
    run.average = run.masters()
    return max(off, run.off())


def offloaded(stage: int, precision: str) -> float:
    """Masters in host memory, and under ZeRO-3 the partitions too."""
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    run = Run(stage, precision, **zero)
    run.step(3)
    run.probe()
    with run.ema.swap():
        inside = run.live()
    run.step(1)
    return max(run.off(), 0.0 if distance(run.rounded(), inside) < 1 else 1.0)


def persistent(stage: int, precision: str) -> float:
    """Small weights that ZeRO-3 keeps gathered."""
    run = Run(stage, precision, stage3_param_persistence_threshold=100_000)
    run.step(3)
    live = run.live()
    before = run.probe()
    with run.ema.swap():
        assert not torch.equal(before, run.probe())
    assert torch.equal(before, run.probe())
    assert distance(live, run.live()) == 0
    run.step(2)
    return run.off()


def overflowed(stage: int, precision: str) -> float:
    """A step that overflows is skipped, and is no step of the average; fp16 scales the loss."""
    run = Run(stage, precision)
    run.step(2)
    scaler = run.engine.optimizer.loss_scaler if precision == "fp16" else None
    scale = scaler.cur_scale if scaler else 0
    run.step(1, scale=float("inf"))
    assert not run.engine.was_step_applied()
    assert scaler is None or scaler.cur_scale == scale / 2 > 1
    assert run.ema.metrics()["updates"] == 2
    run.step(1)
    return run.off()


def module_alone(stage: int) -> float:
    """The engine's module has everything that is looked at."""
    run = Run(stage, "bf16")
    run.ema.detach()
    run.ema = EMA(run.engine.module, DECAY)
    run.ema.attach(run.engine)
    run.step(3)
    return run.off()


def taught(precision: str) -> float:
    """ZeRO-3, into= a model that DeepSpeed partitions without an optimizer: it computes with the
    average, though an earlier forward left its weights gathered.
    """
    run = Run(3, precision)
    run.ema.detach()
    torch.manual_seed(0)
    config = _deepspeed.config(3, torch.float32, 1)
    teacher = _deepspeed.deepspeed().initialize(model=Model(), config=config)[0]
    run.ema = EMA(run.engine, DECAY, into=teacher)
    run.ema.attach(run.engine)
    run.step(3)
    teacher.eval()
    early = teacher(run.batch(1).float()).double()
    run.step(1)
    late = teacher(run.batch(1).float()).double()
    twin = Model().eval()
    weights = {name: value.float() for name, value in run.average.items()}
    weights |= {name: buffer.float() for name, buffer in teacher.module.named_buffers()}
    expected = torch.func.functional_call(twin, weights, run.batch(1).float()).double()
    assert (early - expected).abs().max() > 1e-3
    assert (late - expected).abs().max() < 2e-6
    return run.off()


def refused(stage: int) -> float:
    run = Run(stage, "bf16")
    run.ema.detach()
    with raises(ValueError, "engine"):
        run.ema.attach(run.engine.optimizer)
    with raises(ValueError, "engine"):
        run.ema.attach(run.engine.optimizer.optimizer)
    teacher = Model()
    if stage < 3:
        with raises(ValueError, "a.weight", "split=False"):
            EMA(run.engine, DECAY, split=False)
        with raises(ValueError, "a.weight", "in place of into= call ema.copy_to(teacher)"):
            EMA(run.engine, DECAY, into=teacher)
        run.ema.attach(run.engine)
        run.step(2)
        run.ema.copy_to(teacher)
        weights = {n: p.detach() for n, p in teacher.named_parameters()}
        return distance(run.average, weights)
    trained = _deepspeed.engine(teacher, stage)
    with raises(ValueError, "of the teacher has fp32 masters", "without an optimizer"):
        EMA(run.engine, DECAY, into=trained)
    weight: Any = run.module.a.weight
    flags: list[tuple[Any, str, Any, str]] = [  # which DeepSpeed sets where it can do this
        (weight, "ds_secondary_tensor", torch.ones(1), "secondary partitions"),
        (weight, "comm", None, "MiCS"),
        (weight.ds_tensor, "ds_quant_scale", torch.ones(1), "quantized"),
        (weight.ds_tensor, "final_location", SimpleNamespace(value="nvme"), "parameters on NVMe"),
        (run.engine.optimizer, "swap_optimizer", True, "optimizer on NVMe"),
    ]
    for thing, name, value, words in flags:
        with patched(thing, name, value), raises(ValueError, words):
            EMA(run.engine, DECAY)
    return 0.0


@contextmanager
def patched(thing: Any, name: str, value: Any) -> Iterator[None]:
    kept = vars(thing).get(name, patched)
    setattr(thing, name, value)
    yield
    setattr(thing, name, kept) if kept is not patched else delattr(thing, name)


def built_too_early(stage: int) -> float:
    """The optimizer takes the weights over, and has masters from then on."""
    model = Model()
    ema = EMA(model, DECAY)
    engine = _deepspeed.engine(model, stage)
    engine.backward(engine(torch.ones(6, 5)).mean())
    engine.step()
    with raises(RuntimeError, "belongs to DeepSpeed", "deepspeed.initialize"):
        ema.update()
    return 0.0


def table(whole: bool) -> dict[str, Callable[[], float]]:
    """All programs by title, or a sample: every stage and every precision meets every program."""
    found: dict[str, Callable[[], float]] = {}
    for stage, precision in ((1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        title = f"zero{stage} {precision}"
        programs: dict[str, Callable[[], float]] = {
            f"{title}: average": lambda s=stage, p=precision: trained(s, p, 1),
            f"{title}: accumulation": lambda s=stage, p=precision: trained(s, p, 3),
            f"{title}: swap": lambda s=stage, p=precision: swapped(s, p, False),
            f"{title}: swap after a warm evaluation": lambda s=stage, p=precision: swapped(
                s, p, True
            ),
            f"{title}: file": lambda s=stage, p=precision: stored(s, p),
            f"{title}: window": lambda s=stage, p=precision: windowed(s, p),
            f"{title}: copied into the model": lambda s=stage, p=precision: copied(s, p),
            f"{title}: other verbs": lambda s=stage, p=precision: other_verbs(s, p),
            f"{title}: offloaded": lambda s=stage, p=precision: offloaded(s, p),
        }
        turn = (stage == 3) != (precision == "bf16")  # stages 1 and 3 take turns in precision
        for number, (name, program) in enumerate(programs.items()):
            if whole or stage == 2 or number % 2 == turn:
                found[name] = program
    for stage in (1, 2, 3):
        found |= {
            f"zero{stage} bf16: overflow": lambda s=stage: overflowed(s, "bf16"),
            f"zero{stage} fp16: overflow": lambda s=stage: overflowed(s, "fp16"),
            f"zero{stage} fp16: swap": lambda s=stage: swapped(s, "fp16", True),
            f"zero{stage}: the module alone": lambda s=stage: module_alone(s),
            f"zero{stage}: refused": lambda s=stage: refused(s),
            f"zero{stage}: built too early": lambda s=stage: built_too_early(s),
        }
    found["zero3 fp32: taught"] = lambda: taught("fp32")
    found["zero3 bf16: taught"] = lambda: taught("bf16")
    found["zero3 bf16: persistent"] = lambda: persistent(3, "bf16")
    return found


def run_table(whole: bool) -> dict[str, str]:
    """What is not right, by title."""
    _deepspeed.deepspeed()
    wrong = {}
    for title, program in table(whole).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                off = program()
            except Exception as error:
                wrong[title] = f"{type(error).__name__}: {error}"
                continue
        if not off < EPS:
            wrong[title] = f"off by {off:.2g}"
    return wrong


@_deepspeed.needs_deepspeed
@pytest.mark.multirank
@pytest.mark.slow
def test_zero_on_two_ranks(pytestconfig: pytest.Config) -> None:
    """Every stage and precision equals the average of the masters."""
    assert run_ranks(2, run_table, pytestconfig.getoption("--all")) == [{}, {}]


# --- frameworks -----------------------------------------------------------------------------------


def config(stage: int, precision: str, accumulate: int) -> dict[str, Any]:
    return _deepspeed.config(stage, PRECISIONS[precision], accumulate)


def through_accelerate(
    stage: int, folder: str, resume: bool = False, die: bool = False
) -> dict[str, Any]:
    """prepare, accumulate, save_state and load_state, as docs/deepspeed.md has them.

    Two epochs; `die` in the second one, `resume` after the first.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    _deepspeed.deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader, TensorDataset

    from dist_ema.integrations.accelerate import register

    AcceleratorState._reset_state(True)
    plugin = DeepSpeedPlugin(hf_ds_config=config(stage, "bf16", 2))
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model: Any = Model().bfloat16()
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    loader: Any = DataLoader(TensorDataset(torch.randn(96, 5).bfloat16()), batch_size=6)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = Run.__new__(Run)
    run.trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    run.ema = ema = EMA(model, DECAY)
    with raises(ValueError, "ema.attach(engine)"):
        ema.attach(optimizer)
    ema.attach(model)
    register(accelerator, ema)
    run.average = run.masters()
    state = f"{folder}/state-{stage}"

    def epoch(last: int = 1000) -> None:
        for number, (x,) in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).float().square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                for name, master in run.masters().items():
                    run.average[name].lerp_(master, 1 - DECAY)
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)

    if resume:
        accelerator.load_state(state)
        epoch()
        return {"average": ema.gather()}
    epoch()
    off = run.off()
    accelerator.save_state(state)
    kept = ema.gather()
    epoch(5 if die else 1000)
    off, whole = max(off, run.off()), ema.gather()
    updates = ema.metrics(distance=False)["updates"]
    accelerator.load_state(state)
    back = ema.gather()
    same = all(torch.equal(kept[name], back[name]) for name in kept if name in run.trained)
    return {"exact": off < EPS, "loaded": same, "updates": updates, "average": whole}


class Regression(nn.Module):
    """What `Trainer` wants: a dictionary with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.b(torch.tanh(self.a(x))).squeeze(-1)
        return {"loss": (y - labels).square().mean(), "logits": y}


def through_trainer(stage: int, folder: str, resume: str | None = None, die: bool = False) -> int:
    """Eight steps of `Trainer`, with a checkpoint after four; `die` after six."""
    _deepspeed.deepspeed()
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dist_ema.integrations.transformers import EMACallback

    class Death(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if die and state.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)

    AcceleratorState._reset_state(True)
    arguments: dict[str, Any] = {
        "max_steps": 8, "save_steps": 4, "learning_rate": 0.1, "gradient_accumulation_steps": 2,
        "report_to": [], "disable_tqdm": True, "label_names": ["labels"], "optim": "adamw_torch",
        "per_device_train_batch_size": 6, "max_grad_norm": 0.0, "ddp_backend": "gloo",
    }  # fmt: skip
    arguments["deepspeed"] = config(stage, "fp32", 2)
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    rows = [{"x": each, "labels": each @ torch.tensor([1.0, -2.0])} for each in x]
    torch.manual_seed(0)
    callback = EMACallback(decay=0.5)
    made = Trainer(
        Regression(),
        TrainingArguments(output_dir=folder, **arguments),
        train_dataset=rows,
        callbacks=[callback, Death()],
    )
    made.train(resume_from_checkpoint=resume)
    assert callback.ema is not None
    return int(callback.ema.metrics(distance=False)["updates"])


def live_and_die(folder: str) -> None:
    """Whole runs of both, then one of accelerate that is killed in its second epoch."""
    found = [through_accelerate(stage, folder) for stage in (3, 2)]
    updates = through_trainer(2, f"{folder}/whole")
    torch.save((found, updates), f"{folder}/whole-{dist.get_rank()}.pt")
    dist.barrier()
    through_accelerate(2, f"{folder}/killed", die=True)


def resume_and_die(folder: str) -> None:
    """accelerate goes on where the killed job saved; a Trainer is killed between checkpoints."""
    found = through_accelerate(2, f"{folder}/killed", resume=True)
    torch.save(found, f"{folder}/resumed-{dist.get_rank()}.pt")
    dist.barrier()
    through_trainer(2, f"{folder}/trainer", die=True)


@_deepspeed.needs_deepspeed
@pytest.mark.multirank
@pytest.mark.slow
def test_frameworks_are_killed_and_resumed(tmp_path: Path) -> None:
    """accelerate and Trainer: averages of the masters, as if the job had never died."""
    (tmp_path / "killed").mkdir()
    folder, expected = str(tmp_path), {"exact": True, "loaded": True, "updates": 16}
    assert run_ranks(2, live_and_die, folder, allow_dead=True) == [None, None]
    assert run_ranks(2, resume_and_die, folder, allow_dead=True) == [None, None]
    assert not (tmp_path / "trainer" / "checkpoint-8").exists()
    checkpoint = f"{folder}/trainer/checkpoint-4"
    assert run_ranks(2, through_trainer, 2, f"{folder}/trainer", checkpoint) == [8, 8]
    for rank in range(2):
        found, updates = torch.load(tmp_path / f"whole-{rank}.pt")
        assert [each | {"average": {}} for each in found] == [expected | {"average": {}}] * 2
        assert updates == 8
        refuse_other_bits(found[1], torch.load(tmp_path / f"resumed-{rank}.pt"))
    places = (tmp_path / name / "checkpoint-8" / "ema" for name in ("whole", "trainer"))
    refuse_other_bits(*({"average": load_file(place)} for place in places))


def refuse_other_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    first, second = a["average"], b["average"]
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- elastic --------------------------------------------------------------------------------------

CHAIN = [
    ("fsdp2", 4),
    ("zero3", 2),
    ("ddp", 3),
    ("zero1", 2),
    ("none", 1),
    ("zero3", 3),
    ("fsdp2", 2),
]


def next_link(kind: str, source: str, target: str) -> None:
    """Load what the last wrapper saved, and save it again; the first one trains."""
    if kind.startswith("zero"):
        _deepspeed.deepspeed()
    run = Training(kind, lambda: Net(scalar=False), batch)
    ema = EMA(run.model, 0.9)
    if source:
        ema.load(source)
    else:
        ema.attach(run.optimizer)
        run.train(5)
    ema.save(target)


@_deepspeed.needs_deepspeed
@pytest.mark.multirank
@pytest.mark.slow
def test_elastic_chain(tmp_path: Path) -> None:
    """One average through eight wrappers and worlds: the same bits at the end."""
    source = ""
    for number, (kind, world) in enumerate(CHAIN):
        target = str(tmp_path / f"{number}-{kind}-{world}")
        run_ranks(world, next_link, kind, source, target)
        source = target
    first, last = load_file(tmp_path / "0-fsdp2-4"), load_file(source)
    assert first.keys() == last.keys()
    averaged = [name for name in first if "frozen" not in name and "seen" not in name]
    assert [name for name in averaged if not torch.equal(first[name], last[name])] == []
