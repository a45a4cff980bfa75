"""Engines that defer the arithmetic equal the inline one bit for bit, and every wait is needed.

The device is played by `Late`: work that was submitted is done as late as possible (when somebody waits for it, or when
more is submitted behind it) or at once, by the throw of a coin. A wait that is missing then shows as a wrong bit, always.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import EMA, Power
from dist_ema.engine import Engine, HostThread, Overlapped, Worker, choose

CPU = torch.device("cpu")


class Ticket:
    def __init__(self, executor: Late) -> None:
        self._executor = executor

    def synchronize(self) -> None:
        self._executor.wait(self)


class Late:
    """An executor that does its work in order, and as late as it may."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: list[tuple[Ticket, Callable[[], None]]] = []
        self.deferred = 0

    def submit(self, work: Callable[[], None]) -> Ticket:
        ticket = Ticket(self)
        self._waiting.append((ticket, work))
        if self._random.random() < 0.3:
            self.wait(ticket)
        else:
            self.deferred += 1
        return ticket

    def keep(self, tensors: Any) -> None:
        """Nothing is freed behind our back here."""

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
    return [Overlapped(Late(seed)), HostThread(Late(seed), Late(seed + 1)), HostThread(None, Late(seed))]


def play(seed: int, engine: Engine | None, folder: Path, every: int, guard: bool, dtype: torch.dtype) -> list[Any]:
    """One random schedule of step, swap, gather, save, manual update and reset; returns all that could be seen."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    ema = EMA(model, Power(gamma=1.0), dtype=dtype, buffers="average")
    ema.attach(optimizer, every=every, guard=guard, overlap=False)
    if engine is not None:
        ema._average.engine = engine
    seen: list[Any] = []
    for _ in range(12):
        action = chance.choice(["step", "step", "step", "skip", "swap", "gather", "save", "update", "state", "reset"])
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
            seen += [value.clone() for value in ema.state_dict()["averages"][repr(ema.schedule)]["weights"].values()]
        elif action == "update":
            ema.update(2.0)
        else:
            ema.reset()
        seen += [p.detach().clone() for p in model.parameters()]
    return [*seen, *ema.gather().values(), ema.now]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.filterwarnings("ignore:ema..*no update came")
@pytest.mark.parametrize("block", range(4))
def test_two_hundred_random_schedules(block: int, tmp_path: Path) -> None:
    """Guards every settle() and fence(): in ready, begin, before_step and in the engines themselves."""
    for seed in range(50 * block, 50 * block + 50):
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
    """A forced normalisation in the forward would race with the deferred read; inline there is nothing to race with."""
    for overlap in (True, False):
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = EMA(model, 0.5)
        ema.attach(optimizer)
        if overlap:
            ema._average.engine = Overlapped(Late(0))
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
        assert isinstance(ema._average.engine, HostThread) == (device == "cpu")
        results.append([*ema.gather().values()])
    assert same(*results)


def test_a_worker_that_fails_reaches_the_trainer(tmp_path: Path) -> None:
    """The error names the update and comes at the next call; live weights are untouched, and nothing is saved."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5, device="cpu")
    ema.attach(optimizer)
    model.weight.grad = torch.ones(3, 3)
    optimizer.step()
    engine = ema._average.engine
    engine.settle()
    engine._windowed.run = broken  # type: ignore[attr-defined]
    optimizer.step()
    live = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="update 1 of the average failed in the host thread: MemoryError: no room"):
        ema.save(tmp_path / "average")
    with pytest.raises(RuntimeError, match="update 1"):
        optimizer.step()
    assert torch.equal(live - 0.1, model.weight), "the step itself was made"
    assert list(tmp_path.iterdir()) == []


def broken(*_: Any) -> None:
    raise MemoryError("no room")


def test_the_worker_bounds_its_own_threads() -> None:
    mine = torch.get_num_threads()
    seen: list[Any] = []
    worker = Worker(threads=1)
    ticket = worker.submit(
        lambda: seen.append((torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().daemon))
    )
    worker.wait(ticket)
    assert seen == [(1, False, True)]
    assert torch.get_num_threads() == mine


def test_choice() -> None:
    """CPU weights have nothing to hide behind unless host shadows were asked for; several devices share no stream."""
    assert type(choose({CPU}, host=False)).__name__ == "Inline"
    assert type(choose({CPU}, host=True)).__name__ == "HostThread"
    assert type(choose({CPU, torch.device("meta")}, host=False)).__name__ == "Inline"
