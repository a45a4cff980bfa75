"""Engines that defer the arithmetic equal the inline one bit for bit, and every wait is needed.

The device is played by `Late`: work that was submitted is done as late as possible (when somebody
waits for it, or when more is submitted behind it) or at once, by the throw of a coin. A wait that
is missing then shows as a wrong bit, always.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_ema import EMA, Debiased, Power
from dist_ema.averaging import drop_in_rules, executors
from dist_ema.averaging.engines import Engine, HostThread, Overlapped, choose_engine
from dist_ema.averaging.executors import Instant, Mark, Worker
from dist_ema.distributed.coordinator import StoreCoordinator
from tests._ranks import raises, run_program, run_ranks
from tests._wrappers import wrap
from tests.conftest import Seeds

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


class Ticket:
    """What `Late` gives for work; only its identity matters."""


class Late:
    """An executor that does its work in order, and as late as it may."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: list[tuple[Ticket, Callable[[], None]]] = []
        self.deferred = 0

    def submit(self, work: Callable[[], None]) -> Ticket:
        ticket = Ticket()
        self._waiting.append((ticket, work))
        if self._random.random() < 0.3:
            self.wait(ticket)
        else:
            self.deferred += 1
        return ticket

    def keep(self, tensors: Any) -> None:
        """Nothing is freed behind our back here."""

    def mark(self) -> Mark:
        return Instant()

    def done(self, ticket: Any) -> bool:
        """Now and then the device gets a step further while somebody looks."""
        if self._waiting and self._random.random() < 0.5:
            self._waiting.pop(0)[1]()
        return all(waiting is not ticket for waiting, _ in self._waiting)

    def wait(self, ticket: Any) -> None:
        while any(waiting is ticket for waiting, _ in self._waiting):
            self._waiting.pop(0)[1]()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def engines(seed: int) -> list[Engine]:
    return [
        Overlapped(Late(seed)),
        HostThread(Late(seed), Late(seed + 1)),
        HostThread(None, Late(seed)),
    ]


def play(
    seed: int, engine: Engine | None, folder: Path, every: int, guard: bool, dtype: torch.dtype
) -> list[Any]:
    """One random schedule of step, swap, gather, save, manual update and reset; returns all that
    could be seen.
    """
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    ema = EMA(model, Power(gamma=1.0), dtype=dtype, buffers="average")
    ema.attach(optimizer, every=every, guard=guard, overlap=False)
    if engine is not None:
        ema.weights.updates.engine = engine
    seen: list[Any] = []
    for _ in range(12):
        action = chance.choice(
            ["step", "step", "step", "skip", "swap", "gather", "save", "update", "state", "reset"]
        )
        if action in ("step", "skip"):
            optimizer.found_inf = torch.tensor(1.0 if action == "skip" else 0.0)
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        elif action == "swap":
            with ema.swap():
                seen += [p.clone() for p in model.parameters()] + [model.eval()(torch.ones(2, 5))]
                model.train()
        elif action == "gather":
            seen += [value.clone() for value in ema.gather().values()]
        elif action == "save":
            ema.save(folder / "average")
            seen.append((folder / "average" / "model.safetensors").read_bytes())
        elif action == "state":
            seen += [
                value.clone()
                for value in ema.state_dict()["averages"]["average_0"]["weights"].values()
            ]
        elif action == "update":
            ema.update(2.0)
        else:
            ema.reset()
        seen += [p.detach().clone() for p in model.parameters()]
    return [*seen, *ema.gather().values(), ema.now]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.filterwarnings("ignore:ema..*no update came")
@pytest.mark.filterwarnings("ignore:ema.*moves the average twice")
def test_random_schedules(tmp_path: Path, seeds: Seeds) -> None:
    """Guards every settle() and fence(): in ready, begin, before_step and in the engines
    themselves. 50 seeds are every value of one option with every value of the others.
    """
    for seed in seeds(200):
        options = {
            "every": 1 + seed % 3,
            "guard": seed % 2 == 0,
            "dtype": (torch.float32, torch.bfloat16)[seed % 5 == 0],
        }
        want = play(seed, None, tmp_path, **options)
        for number, engine in enumerate(engines(seed)):
            assert same(want, play(seed, engine, tmp_path, **options)), (seed, number)


def test_the_executor_does_defer() -> None:
    """Otherwise the test above would prove nothing."""
    late = Late(0)
    done: list[int] = []
    tickets = [late.submit(lambda i=i: done.append(i)) for i in range(20)]
    assert late.deferred > 5
    late.wait(tickets[-1])
    assert done == list(range(20))


def test_weights_written_behind_the_step_are_named() -> None:
    """A forced normalisation in the forward would race with the deferred read; inline there is
    nothing to race with.
    """
    for overlap in (True, False):
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = EMA(model, 0.5)
        ema.attach(optimizer)
        if overlap:
            ema.weights.updates.engine = Overlapped(Late(0))
        model.weight.grad = torch.ones(3, 3)
        optimizer.step()
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)
        if overlap:
            with pytest.raises(RuntimeError, match=r"weight was written after .* overlap=False"):
                optimizer.step()
        else:
            optimizer.step()
        with ema.swap():
            pass
        optimizer.step()


def four_times(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for shadow, _ in pairs:
        shadow.mul_(4)


def test_a_rule_waits_for_the_update_in_flight() -> None:
    """The arithmetic of a drop-in comes after it, and not in between."""
    model = nn.Linear(3, 3)
    optimizer, ema = torch.optim.SGD(model.parameters(), 1.0), EMA(model, 0.5)
    ema.attach(optimizer)
    ema.weights.updates.engine = Overlapped(Late(0))
    before = ema.gather()["weight"]
    model.weight.grad = torch.full((3, 3), -2.0)
    optimizer.step()
    drop_in_rules.move_by(ema.weights, four_times)
    torch.testing.assert_close(ema.gather()["weight"], 4 * (before + 1))


def test_a_host_thread_equals_inline() -> None:
    """200 steps with and without it: the same average, bit for bit, with a real thread."""
    results = []
    for device in (None, "cpu"):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        ema = EMA(model, 0.99, device=device)
        ema.attach(optimizer)
        for _ in range(200):
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert isinstance(ema.weights.updates.engine, HostThread) == (device == "cpu")
        results.append([*ema.gather().values()])
    assert same(*results)


@pytest.mark.parametrize("kind", [MemoryError, SystemExit])
def test_a_worker_that_fails_reaches_the_trainer(kind: type[BaseException], tmp_path: Path) -> None:
    """The error names the update and comes at the next call; live weights are untouched, and
    nothing is saved. Guards `except BaseException` and `_refuse_failed` in fence and settle.
    """
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5, device="cpu")
    ema.attach(optimizer)
    model.weight.grad = torch.ones(3, 3)
    optimizer.step()
    engine = ema.weights.updates.engine
    engine.settle()

    def broken(*_: Any) -> None:
        raise kind("no room")

    engine.windowed.run = broken  # type: ignore[attr-defined]
    optimizer.step()
    live = model.weight.detach().clone()
    words = f"update 1 of the average failed in the host thread: {kind.__name__}: no room"
    for call in (
        lambda: ema.save(tmp_path / "average"),
        optimizer.step,
        ema.update,
        ema.gather,
        ema.detach,
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
        assert torch.equal(live, model.weight), call
    assert list(tmp_path.iterdir()) == []
    optimizer.step()
    assert torch.equal(live - 0.1, model.weight), (
        "detached, so training goes on without the average"
    )


def test_a_worker_survives_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that ends the thread neither hangs who waits for it nor the next task.

    Guards is_alive() in submit.
    """
    worker, seen = Worker(), []
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest's would tell of it
    worker.wait(worker.submit(sys.exit))
    assert worker.thread is not None
    worker.thread.join(10)
    assert not worker.thread.is_alive()
    worker.wait(worker.submit(lambda: seen.append(1)))
    assert seen == [1]


FORK = """
import os, sys, threading, torch
from torch import nn
from dist_ema import EMA
from dist_ema.averaging import executors
executors.PATIENCE = 0.1
model = nn.Linear(3, 3)
ema = EMA(model, 0.5, device="cpu")
ema.update()
ema.weights.settle()  # its thread is idle when the process forks, the other one is at work
go = threading.Event()
held = EMA(model, 0.5, device="cpu")
held.update()
held.weights.settle()
held.weights.updates.engine.windowed.run = lambda *_: go.wait()
held.update()
child = os.fork()
if child:
    go.set()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    held.gather()
except RuntimeError as error:
    ema.update()
    os._exit(0 if "forked" in str(error) and ema.gather() else 4)
os._exit(3)
"""


@pytest.mark.filterwarnings("ignore")
def test_a_fork_neither_hangs_nor_loses_a_word() -> None:
    """The child has no thread: what it waited for is named as gone, what it starts anew goes on.

    Guards Worker.wait.
    """
    run_program(FORK, timeout=60)


def test_one_copy_per_run_of_neighbours() -> None:
    """Weights that lie end to end go to the window at once: FSDP1's flat parameters, arenas of the
    user.
    """
    flat, wide = torch.randn(100), torch.randn(20, dtype=torch.float64)
    views = [flat[:30], flat[30:30], flat[30:70], flat[80:100], wide[:10], wide[10:], flat[70:80]]
    model = nn.ParameterList([nn.Parameter(view) for view in views])
    ema = EMA(model, 0.5, device="cpu")
    twin = EMA(model, 0.5)
    for _ in range(2):
        with torch.no_grad():
            flat += 1
            wide -= 1
        ema.update()
        twin.update()
    assert sorted(len(live) for _, live in ema.weights.updates.engine.copies) == [10, 20, 20, 70]  # type: ignore[attr-defined]
    assert same([*ema.gather().values()], [*twin.gather().values()])


def test_the_window_is_replaced_with_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that moved get a window of their own; the old one is gone before.

    Guards `Plan([])` in _open_window.
    """
    model = nn.Linear(5, 5)
    ema = EMA(model, 0.5, device="cpu")
    engine = ema.weights.updates.engine = HostThread(None, Late(0))
    ema.update()
    engine.settle()
    window, empty, gone = weakref.ref(engine.copies[0][0].untyped_storage()), torch.empty, []
    model.weight.data = model.weight.data.clone()

    def watched(*sizes: Any, **options: Any) -> torch.Tensor:
        if sizes == (30,):
            gone.append(window() is None)
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", watched)
    ema.update()
    assert gone == [True]
    assert engine.window_bytes == 4 * 30 + 4


def test_a_window_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update raises; the next one tries again, and does not average from nothing.

    Guards the order in _open_window.
    """
    model = nn.Linear(5, 5)
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    model.weight.data = model.weight.data.clone()
    empty = torch.empty

    def full(*sizes: Any, **options: Any) -> torch.Tensor:
        if sizes == (30,):
            raise MemoryError
        return empty(*sizes, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(MemoryError):
            ema.update()
    with torch.no_grad():
        model.weight += 1
    ema.update()
    assert torch.allclose(ema.gather()["weight"], model.weight - 0.5)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_steps_in_other_modes(mode: Any, device: str | None) -> None:
    """Windows made in inference mode could never be written outside, casts would change bits.

    Guards inference_mode(False) in the hooks.
    """
    results = []
    for other_mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = EMA(model, 0.75, device=device)
        ema.attach(optimizer, guard=True, start=1)
        for step in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, step + 1)
            with mode() if other_mode and step < 3 else nullcontext():
                optimizer.step()
        results.append([*ema.gather().values()])
    assert same(*results)


def test_steps_inside_compiled_functions() -> None:
    """Hooks fire and updates run under torch.compile, which breaks its graph there."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema, by_hand = EMA(model, 0.5), EMA(model, 0.5)
    ema.attach(optimizer)

    @torch.compile(backend="eager")
    def step(x: torch.Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        by_hand.update()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            step(torch.ones(2, 3))
    assert (ema.now, by_hand.now) == (4, 4)
    assert same([*ema.gather().values()], [*by_hand.gather().values()])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_another_default_dtype(device: str | None) -> None:
    """Weights of skipped steps are fp32 whatever torch's default is: 0.0001 is no bfloat16
    number.
    """
    results = []
    for default in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        ema = EMA(model, Debiased(0.9999), device=device)
        ema.attach(optimizer)
        try:
            torch.set_default_dtype(default)
            for skipped in (1.0, 0.0, 0.0):
                optimizer.found_inf = torch.tensor(skipped, dtype=torch.float32)
                model.weight.grad = torch.ones(3, 3, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([*ema.gather().values()])
    assert same(*results)


def test_the_worker_bounds_its_own_threads() -> None:
    before = torch.get_num_threads()
    seen: list[Any] = []
    worker = Worker(threads=1)
    ticket = worker.submit(
        lambda: seen.append(
            (torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().daemon)
        )
    )
    worker.wait(ticket)
    assert seen == [(1, False, True)]
    assert torch.get_num_threads() == before


# --- the hot path ---------------------------------------------------------------------------------


class Watch:
    """Inside the block a host sync, a copy from device to host, or a collective raises; allocations
    are measured.

    CPU tensors play the device. What reaches the dispatcher is seen there, whoever called it;
    `.cpu()`, `.tolist()` and the like do nothing on a CPU, so they are seen as calls.
    """

    def __init__(self) -> None:
        self.largest = 0  # elements of the longest tensor that was allocated
        self._dispatched, self._called = _Dispatched(self), _Called()

    def __enter__(self) -> Watch:
        self._called.__enter__()
        self._dispatched.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._dispatched.__exit__(*error)
        self._called.__exit__(*error)


class Waits(Exception):  # noqa: N818
    """The host would have waited for the device, or for another rank."""


class _Dispatched(TorchDispatchMode):
    SYNCS = frozenset(
        (
            "_local_scalar_dense",
            "equal",
            "is_nonzero",
            "nonzero",
            "masked_select",
            "item",
            "_unique2",
            "allclose",
        )
    )

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.namespace, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        masked = name.startswith("index") and any(
            x.dtype == torch.bool for x in given[1:]
        )  # counts them first
        if name in self.SYNCS or space in ("c10d", "_c10d_functional") or masked:
            raise Waits(f"{space}::{name}")
        known = {self._place(x) for x in given}
        result = func(*args, **(kwargs or {}))
        fresh = [
            x
            for x in tree_leaves(result)
            if isinstance(x, torch.Tensor) and self._place(x) not in known
        ]
        self._watch.largest = max([self._watch.largest, *(x.numel() for x in fresh)])
        return result

    def _place(self, x: torch.Tensor) -> int:
        return getattr(x, "_local_tensor", x).untyped_storage().data_ptr()


class _Called(TorchFunctionMode):
    NAMES = frozenset(
        (
            "cpu",
            "item",
            "tolist",
            "numpy",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "synchronize",
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # NOTE: the device of another tensor is the device that the CPU plays here; a host is called
        # by its name.
        if name in self.NAMES or (
            name == "to" and "cpu" in [x for x in args[1:] if isinstance(x, str)]
        ):
            raise Waits(name)
        return func(*args, **(kwargs or {}))


SINS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "float": lambda x: float(x[0]),
    "max": lambda x: max(x[:2]),  # type: ignore[call-overload]
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float32),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "reduce": lambda x: dist.all_reduce(x),
}


def hot_path() -> None:
    """Hooks, gate, engine and kernels: no sync, no collective, no message, and nothing allocated as
    long as a shard.
    """
    for sin in SINS.values():
        with raises(Waits), Watch():
            sin(torch.ones(3))
    with Watch() as watch:
        torch.ones(40).add_(1).view(8, 5)[1:] + 1
    assert watch.largest == 40, "views and writes in place are no allocations"
    for kind, dtype, guard, decay in (
        ("ddp", F32, True, 0.99),
        ("fsdp2", F32, False, [Power(gamma=1.0), 0.99]),
        ("ddp", BF16, False, 0.99),
        ("fsdp2", BF16, True, [Power(gamma=1.0), 0.99]),
    ):
        model = wrap(
            kind, nn.Sequential(nn.Linear(2400, 2000), nn.Linear(2000, 16), nn.BatchNorm1d(16))
        )
        optimizers: list[Any] = [Skippable(part, {}) for part in halves(model)]
        ema = EMA(model, decay, dtype=dtype, buffers="average")
        ema.attach(*optimizers, every=2, guard=guard)
        ema.weights.updates.engine = Overlapped(Late(0))
        steps(optimizers, 8)  # the first updates look at addresses
        held = min(
            slot.averaged_region.numel
            for slot in ema.weights.averages[0].averaged
            if slot.averaged_region.numel > 1 << 20
        )
        with Watch() as watch, pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreCoordinator, "_next", refuse)  # of every message
            steps(optimizers, 8)
        assert 0 < watch.largest <= 1 << 20 < held, (kind, dtype, watch.largest, held)
        plan = ema.weights.updates.plan
        ema.weights.updates.engine = Overlapped(Late(0))
        ema.weights.updates.plan = Sinner(plan)  # type: ignore[assignment]
        with raises(Waits), Watch():
            steps(optimizers, 8)


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(model.parameters())
    return parameters[:2], parameters[2:]


class Skippable(torch.optim.Optimizer):
    """As a fused optimizer: the device may skip the step, and the hooks find `found_inf`."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1 - self.found_inf)


def steps(optimizers: list[Skippable], n: int) -> None:
    for step in range(n):
        for optimizer in optimizers:
            optimizer.found_inf = torch.full((), float(step % 3 == 0))
            optimizer.step()


def refuse(*_: Any, **__: Any) -> None:
    raise Waits("a message to other ranks")


class Sinner:
    """A plan with one `.item()` in it."""

    def __init__(self, plan: Any) -> None:
        self.tensors, self._plan = plan.tensors, plan

    def run(self, weights: Any, number: int, guard: bool) -> None:
        weights[0].item()
        self._plan.run(weights, number, guard)


@pytest.mark.multirank
def test_the_hot_path_never_waits() -> None:
    """Red if anything on the way from a hook to the kernels looks at a value: see `SINS` and
    `Sinner`.
    """
    run_ranks(2, hot_path)


MEMORY = """
import torch
from torch import nn
from dist_ema import EMA
torch.set_num_threads(1)
# what a thread, scratches and compiled passes cost
warm = nn.ParameterList([nn.Parameter(torch.ones(1 << 20))])
for dtype in (torch.float32, torch.float64):
    ema = EMA(warm, 0.5, device="cpu", dtype=dtype)
    ema.update()
    ema.metrics()
size = 24 << 20
model = nn.ParameterList([nn.Parameter(torch.ones(size // 8)) for _ in range(8)])
optimizer = torch.optim.SGD(model.parameters(), 0.1)
# ru_maxrss would begin at what the parent had
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

open("/proc/self/clear_refs", "w").write("5")
before = peak()
ema = EMA(model, 0.9, device="cpu")
ema.attach(optimizer)
for _ in range(6):
    optimizer.step()
    with torch.no_grad():
        model[0] += 1
ema.weights.settle()
known = ema.metrics(distance=False)
print((known["bytes"] + known["pinned"]) / (1 << 20), peak() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux"
)
def test_memory_of_a_host_thread() -> None:
    """The process grows by the shadows and one window, and by no third copy of the model."""
    promised, grown = map(float, run_program(MEMORY).split())
    assert 191 < promised < 193, "shadows and one window of 96 MB each"
    assert 150 < grown < promised + 8, f"{grown} MB for {promised} MB of shadows and window"


def test_choice() -> None:
    """CPU weights have nothing to hide behind unless host shadows were asked for; several devices
    share no stream.
    """
    assert type(choose_engine({CPU}, host=False)).__name__ == "Inline"
    assert type(choose_engine({CPU}, host=True)).__name__ == "HostThread"
    assert type(choose_engine({CPU}, host=True, overlap=False)).__name__ == "Inline"
    assert type(choose_engine({CPU, torch.device("meta")}, host=False)).__name__ == "Inline"


def test_streams_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has streams if an event records and answers there, whatever its name is."""
    monkeypatch.setattr(executors, "has_streams", executors.has_streams.__wrapped__)
    assert not executors.has_streams(CPU)
    assert not executors.has_streams(torch.device("meta"))
    assert type(executors.mark(CPU)) is Instant
    recorded: list[Any] = []

    class Event:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            self.device = device

        def record(self, stream: Any) -> None:
            recorded.append(self.device)

        def query(self) -> bool:
            return True

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "Stream", lambda device: device)
    assert executors.has_streams(torch.device("hpu"))
    assert recorded == [torch.device("hpu")]
