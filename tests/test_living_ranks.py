"""Living models on two ranks: DDP, FSDP1, FSDP2 and tensor parallel in one spawn, and DCP.

Each program is either right or raises by name; the table `RED` holds those that are silent or
unclear today, and must be equal to what is seen: an engineer who makes one right removes its line.
"""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from dist_ema import EMA
from dist_ema.averaging.engines import Overlapped
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.living import distance
from tests.test_engines import Late

DECAY = 0.75
WRAPPERS = ["ddp", "fsdp1 orig", "fsdp1 flat", "fsdp1 no_shard", "fsdp2", "tp"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if kind != "tp":
        return wrap(kind, model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"body": ColwiseParallel(), "head": RowwiseParallel()})


def bare(name: str) -> str:
    return name.removeprefix("module.")


def full(model: nn.Module) -> dict[str, Tensor]:
    """All weights of the model in float64, on every rank."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {bare(name): value.detach().double().clone() for name, value in state.items()}


class Run:
    """A wrapped model with its EMA, and the naive average on every rank."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.model = kind, build(kind)
        self.ema = EMA(self.model, DECAY, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.ema.attach(self.optimizer)
        self.average, self.count = full(self.model), 0

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.count += 1
            torch.manual_seed(self.count)
            self.model(torch.randn(6, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, live in full(self.model).items():
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * live

    def off(self) -> float:
        """The difference on rank 0, told to all."""
        gathered = self.ema.gather()
        off = torch.tensor(distance(self.average, gathered) if dist.get_rank() == 0 else 0.0)
        dist.broadcast(off, 0)
        return float(off)


def convert(model: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """The model is the user's: its own conversions must not raise."""
    try:
        call(model)
    except RuntimeError as error:
        raise AssertionError(f"the model cannot be converted: {str(error)[:60]}") from error


def converted(kind: str, call: Callable[[nn.Module], Any]) -> Callable[[], float]:
    def program() -> float:
        run = Run(kind)
        run.step(25)
        convert(run.model, call)
        run.step(3)
        return run.off()

    return program


def after_the_ema(kind: str, call: Callable[[nn.Module], Any]) -> Callable[[], float]:
    """Once there was an EMA: the model must convert as if there had been none."""

    def program() -> float:
        model = build(kind)
        ema = EMA(model, DECAY)
        ema.update()
        del ema
        convert(model, call)
        return 0.0

    return program


def reassigned(model: nn.Module) -> None:
    for p in model.parameters():
        local = p.data
        p.data = local.clone() if not isinstance(local, DTensor) else local + 0


def references(kind: str) -> Callable[[], float]:
    def program() -> float:
        run = Run(kind)
        run.step(2)
        with run.ema.swap():
            pass
        alone = build(kind)  # torch's own references are not ours
        alone(torch.randn(6, 4)).square().mean().backward()
        ours, torchs = (
            sum(weakref.getweakrefcount(p) for p in model.parameters())
            for model in (run.model, alone)
        )
        return float(ours - torchs)

    return program


def moves_between_phases(kind: str) -> Callable[[], float]:
    """FSDP1's offload of whole models, as RLHF trainers do it."""

    def program() -> float:
        run = Run(kind)
        run.step(25)
        for module in run.model.modules():
            handle = getattr(module, "_handle", None)
            if handle is not None:
                flat = handle.flat_param
                moved = flat.data.to("cpu", copy=True)
                flat.data = moved
                flat._local_shard = moved
        run.step(3)
        return run.off()

    return program


def written_inside(kind: str) -> Callable[[], float]:
    """Live is restored, and the write is named."""

    def program() -> float:
        run = Run(kind)
        run.step(2)
        before = full(run.model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with run.ema.swap(), torch.no_grad():
                    for p in run.model.parameters():
                        p.mul_(2)
            except RuntimeError as error:
                warnings.warn(str(error), stacklevel=1)
        assert distance(before, full(run.model)) == 0, "live is not restored"
        text = " ".join(str(each.message) for each in caught)
        assert "weight" in text or "bias" in text, "silent: the write is not named"
        return 0.0

    return program


def assigned_inside(kind: str) -> Callable[[], float]:
    """After a step FSDP1 counts writes into its flat parameter apart from those into its shard."""

    def program() -> float:
        model = build(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        ema = EMA(model, DECAY)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ema.swap():
                model(torch.ones(2, 4))
        quiet = not any("written" in str(each.message) for each in caught)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with ema.swap():
                for p in model.parameters():
                    p.data = p.data * 1.5
        named = any("body.weight" in str(each.message) for each in caught)
        return 0.0 if quiet and named else 1.0

    return program


def replaced_head(kind: str) -> Callable[[], float]:
    def program() -> float:
        run = Run(kind)
        run.step(2)
        owner = run.model.module if kind == "ddp" else run.model
        owner.head = nn.Linear(6, 4)
        try:
            run.ema.gather()
        except RuntimeError as error:
            assert "head" in str(error)
            return 0.0
        raise AssertionError("silent: a replaced head")

    return program


def unfrozen(kind: str) -> Callable[[], float]:
    """An update walks no tree under FSDP, and must see it all the same."""

    def program() -> float:
        model = build(kind)
        module = model.module if kind == "ddp" else model
        module.head.requires_grad_(False)
        ema = EMA(model, DECAY)
        for _ in range(3):
            ema.update()
        module.head.requires_grad_(True)
        try:
            ema.update()
        except RuntimeError as error:
            assert "head.weight, head.bias became trainable" in str(error)
            return 0.0
        raise AssertionError("silent: an unfrozen head")

    return program


def host_engine(kind: str) -> Callable[[], float]:
    def program() -> float:
        run = Run(kind, device="cpu")
        run.step(25)
        reassigned(run.model)
        run.step(3)
        return run.off()

    return program


# --- DCP -----------------------------------------------------------------------------------------


def shared_folder() -> str:
    box: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    return str(box[0])


def staged(kind: str) -> Callable[[], float]:
    """Staging that keeps its buffers, as every fast asynchronous save does."""

    def program() -> float:
        run, folder = Run(kind), shared_folder()
        run.step(2)
        state = {"ema": run.ema.state_dict()}
        buffers = _create_cpu_state_dict(state, pin_memory=False, share_memory=False)
        for _ in range(2):  # the second time into buffers that are there
            state = {"ema": run.ema.state_dict()}
            copied = _copy_state_dict(state, buffers, non_blocking=False)
        dcp.save(copied, checkpoint_id=f"{folder}/1")
        other = Run(kind)
        dcp.load({"ema": other.ema}, checkpoint_id=f"{folder}/1")
        other.average = run.average
        return other.off()

    return program


def another_decay(kind: str, decay: Any) -> Callable[[], float]:
    """A schedule is not a key: the resumed average goes on with the new one."""

    def program() -> float:
        run, folder = Run(kind), shared_folder()
        run.step(2)
        dcp.save({"ema": run.ema}, checkpoint_id=folder)
        ema = EMA(build(kind), decay)
        dcp.load({"ema": ema}, checkpoint_id=folder)
        gathered = ema.gather()
        return distance(run.average, gathered) if dist.get_rank() == 0 else 0.0

    return program


def without_an_average(kind: str) -> Callable[[], float]:
    def program() -> float:
        run, folder = Run(kind), shared_folder()
        dcp.save({"model": run.model.state_dict()}, checkpoint_id=folder)
        try:
            dcp.load({"ema": run.ema}, checkpoint_id=folder)
        except BaseException as error:
            assert "Constant(" not in str(error), f"unclear: {str(error)[-120:]}"
            assert "average" in str(error) or "EMA" in str(error), str(error)[-120:]
            return 0.0
        raise AssertionError("silent: nothing was loaded")

    return program


def assigned_before_a_verb(kind: str, convert_first: bool) -> Callable[[], float]:
    """What the user assigns is live's, whatever verb comes before the next forward; and the block
    is the average's.
    """

    def program() -> float:
        run = Run(kind)
        run.step(3)
        if convert_first:
            run.model.double().float()
        before = full(run.model)
        for p in run.model.parameters():
            local = getattr(p, "_local_tensor", p).detach()
            if isinstance(p, DTensor):
                local.mul_(2)
            else:
                p.data = local * 2
        run.ema.gather()
        doubled = {name: 2 * value for name, value in before.items()}
        off = [distance(doubled, full(run.model))]
        with run.ema.swap(), torch.no_grad():
            run.model(torch.ones(2, 4))
            off.append(distance(run.average, full(run.model)))
        off.append(distance(doubled, full(run.model)))
        run.step(2)
        return max(*off, run.off())

    return program


def left_in_another_order(kind: str) -> Callable[[], float]:
    """On all ranks alike: the first exit is refused, the last one makes every replica whole."""

    def program() -> float:
        run = Run(kind)
        run.step(2)
        other, live = EMA(run.model, 0.9), full(run.model)
        first, second = run.ema.swap(), other.swap()
        first.__enter__()
        second.__enter__()
        with raises(RuntimeError, "Leave swaps in the reverse order"):
            first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        restored = distance(live, full(run.model))
        run.step(1)
        return max(restored, run.off())

    return program


def replicas_apart(write: Callable[[nn.Module], None]) -> Callable[[], float]:
    """A weight of one rank alone was written: every verb that reads the whole model names it."""

    def program() -> float:
        run = Run("ddp")
        run.step(1)
        assert run.ema.metrics()["replicas_agree"]
        if dist.get_rank() == 1:
            with torch.no_grad():
                write(run.model.module)
        assert not run.ema.metrics()["replicas_agree"]
        folder = shared_folder()
        verbs = {
            "gather": run.ema.gather,
            "save": lambda: run.ema.save(f"{folder}/save"),
            "export": lambda: run.ema.export(f"{folder}/export"),
            "copy_to": lambda: run.ema.copy_to(build("ddp")),
        }
        for verb, call in verbs.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            seen = [str(each.message) for each in caught]
            named = f"ema.{verb}(): body.weight differ between ranks 0 and 1"
            assert any(named in text for text in seen), seen
        return 0.0

    return program


def scaled(model: Any) -> None:
    model.body.weight.mul_(2)


def assigned_alone(model: Any) -> None:
    model.body.weight.data = torch.zeros_like(model.body.weight)


def wrapped_later(kind: str, of_the_model: bool) -> Callable[[], float]:
    """The ranks of an EMA are those of its construction: `rescan` cannot divide it anew."""

    def program() -> float:
        torch.manual_seed(0)
        model: Any = Net()
        ema = EMA(model, DECAY)
        ema.update()
        if of_the_model:
            model.body = wrap(kind, model.body)
        else:
            model.extra = wrap(kind, Net().requires_grad_(False))
        with raises(RuntimeError, "is held by ranks [0, 1] now", "body.weight"):
            ema.rescan()
        return 0.0

    return program


def edited_inside(kind: str) -> Callable[[], float]:
    """Named at the exit; a forward inside, which unshards, is no edit."""

    def program() -> float:
        run = Run(kind)
        run.step(1)
        owner = run.model.module if kind == "ddp" else run.model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with run.ema.swap():
                run.model(torch.ones(2, 4))
            assert not [each for each in caught if "ema.swap" in str(each.message)]
            with run.ema.swap():
                owner.head = nn.Linear(6, 4)
        return float(not any("head.weight" in str(each.message) for each in caught))

    return program


def updated_before_the_backward(kind: str) -> Callable[[], float]:
    """After the forward, FSDP1 registers views of the whole weights under their names."""

    def program() -> float:
        run = Run(kind)
        run.step(1)
        live = full(run.model)
        loss = run.model(torch.ones(2, 4)).sum()
        try:
            run.ema.update()
        except RuntimeError as error:
            raise AssertionError("nothing was replaced, and an error names a weight") from error
        loss.backward()
        for name, average in run.average.items():
            run.average[name] = DECAY * average + (1 - DECAY) * live[name]
        return run.off()

    return program


def written_behind_the_step(kind: str) -> Callable[[], float]:
    """Named where an update reads behind the step; sharded Parameters count writes apart."""

    def program() -> float:
        run = Run(kind)
        run.ema.weights.updates.engine = Overlapped(Late(0))
        for write in (False, True):
            run.model(torch.ones(2, 4)).sum().backward()
            run.optimizer.step()
            run.model(torch.ones(2, 4)).sum().backward()
            if not write:
                continue
            with torch.no_grad():
                for p in run.model.parameters():
                    p.clamp_(-0.1, 0.1)
            with raises(RuntimeError, "was written after the optimizer's step"):
                run.optimizer.step()
        return 0.0

    return program


def frozen_of_a_teacher(kind: str) -> Callable[[], float]:
    """A write into a frozen weight of the student reaches the teacher with the next update."""

    def program() -> float:
        student, teacher = (build(kind) for _ in range(2))
        for module in student.modules():
            if isinstance(module, nn.Linear) and module.out_features == 4:
                module.requires_grad_(False)
        ema = EMA(student, DECAY, into=teacher)
        ema.update()
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(1 if p.requires_grad else 3)
        ema.update()
        return distance(full(student), full(teacher))

    return program


def group_destroyed() -> float:
    """As loops do that wrap the model anew: nothing was written, and no replica is stale."""
    torch.manual_seed(0)
    group = dist.new_group([0, 1])
    model: Any = nn.parallel.DistributedDataParallel(Net(), process_group=group)
    ema = EMA(model, DECAY)
    before = full(model)
    dist.destroy_process_group(group)
    with raises(RuntimeError, "ema.swap() needs the process group"), ema.swap():
        pass
    ema.update()
    return distance(before, full(model))


def table() -> dict[str, Callable[[], float]]:
    from dist_ema import HalfLife

    entries: dict[str, Callable[[], float]] = {}
    for kind in WRAPPERS:
        entries |= {
            f"{kind}: double().float()": converted(kind, lambda m: m.double().float()),
            f"{kind}: p.data =": converted(kind, reassigned),
            f"{kind}: p.data = on the host engine": host_engine(kind),
            f"{kind}: values assigned before a verb": assigned_before_a_verb(kind, False),
            f"{kind}: converted, then assigned": assigned_before_a_verb(kind, True),
            f"{kind}: references": references(kind),
            f"{kind}: to() when the EMA is gone": after_the_ema(
                kind, lambda m: m.to(torch.float64)
            ),
            f"{kind}: half() when the EMA is gone": after_the_ema(kind, lambda m: m.half()),
            f"{kind}: a write inside swap": written_inside(kind),
            f"{kind}: replaced head": replaced_head(kind),
            f"{kind}: written behind the step": written_behind_the_step(kind),
        }
    for kind in ("ddp", "fsdp1 orig", "fsdp2"):
        entries |= {
            f"{kind}: staged DCP": staged(kind),
            f"{kind}: DCP, another decay": another_decay(kind, 0.5),
            f"{kind}: DCP, another schedule": another_decay(kind, HalfLife(9)),
            f"{kind}: DCP, no average": without_an_average(kind),
            f"{kind}: unfrozen": unfrozen(kind),
        }
    for kind in ("fsdp1 orig", "fsdp2", "tp"):
        entries[f"{kind}: frozen of a teacher"] = frozen_of_a_teacher(kind)
    for kind in ("fsdp1 orig", "fsdp1 flat"):
        entries[f"{kind}: offload between phases"] = moves_between_phases(kind)
    for kind in ("ddp", "fsdp1 orig", "fsdp2"):
        entries[f"{kind}: swaps left in another order"] = left_in_another_order(kind)
        entries[f"{kind}: edited inside a swap"] = edited_inside(kind)
    for write in (scaled, assigned_alone):
        entries[f"ddp: one rank is {write.__name__}"] = replicas_apart(write)
    for of_the_model in (True, False):
        entries[f"fsdp2: wrapped later, {of_the_model}"] = wrapped_later("fsdp2", of_the_model)
    for kind in ("fsdp1 grad_op", "fsdp2 kept"):
        entries[f"{kind}: updated before the backward"] = updated_before_the_backward(kind)
    entries["ddp: group destroyed"] = group_destroyed
    entries["fsdp1 orig: assigned inside a swap"] = assigned_inside("fsdp1 orig")
    return entries


NAMES = ("body.", "head.", "weight", "bias")
RED: dict[str, str] = {}


def judge(program: Callable[[], float]) -> str:
    """'' where the outcome is right, else what was seen, on this rank."""
    try:
        off = program()
    except (RuntimeError, ValueError) as error:
        return "" if any(name in str(error) for name in NAMES) else f"unclear: {str(error)[:150]}"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-150:]}"
    return "" if off <= 2e-5 else f"silent: off by {off:.4g}"


def work() -> dict[str, str]:
    warnings.simplefilter("ignore")
    verdicts = {}
    for title, program in table().items():
        both: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(both, judge(program))
        verdicts[title] = next((verdict for verdict in both if verdict), "")
    return verdicts


@pytest.mark.multirank
def test_living_models_on_two_ranks() -> None:
    verdicts = run_ranks(2, work)[0]
    seen = {title: verdict for title, verdict in verdicts.items() if verdict}
    worse = {title: seen[title] for title in seen.keys() - RED.keys()}
    assert not worse, "\n".join(f"{title}: {verdict}" for title, verdict in sorted(worse.items()))
    assert not RED.keys() - seen.keys(), f"right now, remove from RED: {RED.keys() - seen.keys()}"
