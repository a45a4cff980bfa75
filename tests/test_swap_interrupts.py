"""An interrupt at any moment of a swap leaves live weights and shadows as they were, and one
between the messages of another verb is an error on the other ranks (tests/interrupts.py).

How to read a failure: the message names the line of the entry or exit that was interrupted.
"""

from __future__ import annotations

import itertools
import linecache
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_ema
from dist_ema import EMA
from dist_ema.averaging import swap_journal
from dist_ema.averaging.swap_registry import Reads
from dist_ema.distributed import coordinator, messages
from dist_ema.verbs import entry
from tests._oracle import same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.interrupts import between_messages

HERE = Path(dist_ema.__file__).parent
# What runs before the work of a swap.
ENTRY = {str(HERE / "ema.py"), entry.__file__}
ENTRY |= {room.__file__ for room in (coordinator, messages)}
FILES = {str(path) for path in HERE.glob("averaging/swap*.py")} | {
    str(HERE / name) for name in ("ema.py", "sharding/derived.py")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exchanged and cast": {},
    "averaged buffers": {"buffers": "average"},
    "compact": {"dtype": torch.bfloat16},
    "in host memory": {"device": "cpu"},
}
# Python prints an interrupt inside `__del__` of a closed swap; it is harmless.
quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interrupter:
    """Raises KeyboardInterrupt at one executed line of the entry or exit of a swap.

    Args:
        line: Which one.
        after: Count only lines after one that holds this text was executed.
    """

    def __init__(self, line: int, after: str = "") -> None:
        self.line, self.after, self.seen, self.place = line, after, 0, ""

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in FILES and code.co_name != "run_shielded":
            return None
        if (
            code.co_name == "__del__"
        ):  # runs when the collector comes, so ranks would count otherwise
            return None
        if event == "line":
            place = (code.co_filename, frame.f_lineno)
            if self.after:
                self.after = "" if self.after in linecache.getline(*place) else self.after
            else:
                self.seen += 1
                if self.seen == self.line:
                    self.place = f"{place[0]}:{place[1]}"
                    raise KeyboardInterrupt
        return self

    def run(self, block: Callable[[], None]) -> bool:
        """Whether the block was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            block()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return self.seen >= self.line


class Trained:
    """A model with an average that differs from it, and what both must be at all times."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.ema = model, EMA(model, 0.5, timeout=5.0, **options)
        torch.manual_seed(0)  # replicas are equal
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        self.ema.update()
        self.ema.weights.settle()
        self.live = snapshot(model)
        self.shadows = [value.clone() for value in self.current_shadows()]

    def current_shadows(self) -> list[Tensor]:
        averaged = self.ema.weights.averages[0].averaged
        return [state.shadow for state in averaged if state.shadow is not None]

    def block(self) -> None:
        with self.ema.swap():
            pass

    def check(self, place: str) -> None:
        assert not self.ema.weights.swaps.open, f"the swap stayed open after {place}"
        assert same(self.live, snapshot(self.model)), f"live weights changed after {place}"
        assert same(self.shadows, self.current_shadows()), f"shadows changed after {place}"

    def check_swap(self) -> None:
        with self.ema.swap():
            assert not same(self.live, snapshot(self.model))
        self.check("a swap")


def small() -> nn.Module:
    """Two dtypes: one of them is exchanged, the other one cast."""
    return nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.BatchNorm1d(3))


@quiet
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_line_of_entry_and_exit(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per weight. Guards the order of copies and counts."""
    monkeypatch.setattr(swap_journal, "SCRATCH", 4)
    trained = Trained(small(), **options)
    line = 1
    while (interrupter := Interrupter(line)).run(trained.block):
        trained.check(f"line {line}, {interrupter.place}")
        line += 1
    assert line > 300, "the lines of a swap were not traced"
    trained.check_swap()


@contextmanager
def interrupts() -> Iterator[Callable[[float], None]]:
    """`arm(seconds)` sends SIGINT later; none arrives after the block."""
    armed = False

    def arm(seconds: float) -> None:
        nonlocal armed
        armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def raise_interrupt(*_: Any) -> None:
        if armed:
            signal.raise_signal(signal.SIGINT)

    before = [
        (number, signal.signal(number, handler))
        for number, handler in (
            (signal.SIGALRM, raise_interrupt),
            (signal.SIGINT, signal.default_int_handler),
        )
    ]
    try:
        yield arm
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_interrupts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 of them at seeded times, in every part of a swap."""
    monkeypatch.setattr(swap_journal, "SCRATCH", 4)
    trained, draw = Trained(nn.Linear(9, 9).to(dtype)), random.Random(0)
    began = time.perf_counter()
    for _ in range(20):
        trained.block()
    duration = (time.perf_counter() - began) / 20
    hits = 0
    for number in range(200):
        try:
            with interrupts() as arm:
                arm(max(1e-6, draw.uniform(0, duration)))
                trained.block()
            duration *= 0.9  # the machine is faster now than when it was measured
        except KeyboardInterrupt:
            hits += 1
            duration *= 1.03
        trained.check(f"interrupt {number}")
    assert hits > 50, "the interrupts came too late"
    trained.check_swap()


# --- ranks ----------------------------------------------------------------------------------------

CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("ddp", torch.float32, {}),
    ("ddp", torch.bfloat16, {"device": "cpu"}),
    ("fsdp1 flat", torch.float32, {}),
    ("fsdp1 orig", torch.bfloat16, {}),
    ("fsdp2", torch.float32, {"device": "cpu"}),
    ("fsdp2", torch.bfloat16, {}),
]


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 3), nn.Linear(3, 2))


STEP = 6  # each line is interrupted in one of the six cases, and in all of them with `--all`


def every_line(
    first: int, step: int, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Of both ranks at once; then of rank 1 alone, after the work in the thread has begun."""
    trained = Trained(wrap(kind, Small().to(dtype)), **options)
    for alone, after in ((False, ""), (True, "done.wait")):
        for line in itertools.count(first, step):
            interrupter = Interrupter(line if dist.get_rank() == 1 or not alone else -1, after)
            found = interrupter.run(lambda: quietly(trained.block))
            trained.check(f"line {line} of {kind}, {interrupter.place}")
            if not any_rank(found and interrupter.line > 0):
                break
        assert line > 60, "the lines of a swap were not traced"
    trained.check_swap()


def quietly(block: Callable[[], None]) -> None:
    """The other rank left by an interrupt, and this one says so."""
    try:
        block()
    except RuntimeError as error:
        assert "KeyboardInterrupt" in str(error), error


def any_rank(value: bool) -> bool:
    total = torch.tensor(int(value))
    dist.all_reduce(total)
    return bool(total)


class EntryInterrupter(Interrupter):
    """Interrupts a line before the work of the entry, in the messages too."""

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        inside = frame.f_code.co_filename in ENTRY
        if not inside or frame.f_code.co_name in ("beat", "__exit__"):
            return None
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if "swap.enter()" in line:
                self.line = min(self.line, self.seen)  # all lines before were executed
            if not self.seen and "swap = self._prepare_swap" not in line:
                return self
            self.seen += 1
            if self.seen == self.line:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def before_the_work() -> None:
    """Rank 1 is interrupted before it moves anything: the other one learns of it at once."""
    trained = Trained(wrap("ddp", Small()))
    trained.ema.timeout = 60.0
    began, hits = time.monotonic(), 0
    for number in range(1, 200, 5):  # what follows are turns of the loop that waits
        interrupter = EntryInterrupter(number if dist.get_rank() == 1 else -1)
        interrupter.run(lambda: quietly(trained.block))
        trained.check(f"line {number}, {interrupter.place}")
        hits += any_rank(bool(interrupter.place))
    assert hits > 10, "the lines of the entry were not traced"
    assert time.monotonic() - began < 60, "a rank waited for the timeout"
    trained.check_swap()


def twice(folder: str) -> None:
    """The second interrupt does not wait for the other rank, so the EMA refuses until `load`."""
    trained = Trained(wrap("ddp", Small()))
    ema = trained.ema
    ema.save(folder)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    if dist.get_rank() == 1:
        with raises(KeyboardInterrupt), ema.swap():
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        signal.setitimer(signal.ITIMER_REAL, 0)
        with raises(RuntimeError, "ema.update() after an ema.swap() that failed"):
            ema.update()
        with raises(RuntimeError, "ema.gather() after an ema.swap() that failed"):
            ema.weights.refuse("ema.gather", Reads.SHADOWS)
        for thread in threading.enumerate():
            if thread.name == "dist_ema swap":
                thread.join()  # it uses the process group until the other rank has left
    else:
        with ema.swap():
            time.sleep(1)
    dist.barrier()
    ema.load(folder)
    trained.check("load")
    trained.check_swap()


def interrupted_ranks(folder: str, step: int) -> None:
    swap_journal.SCRATCH = 4
    for number, case in enumerate(CASES):
        every_line(1 + number % step, step, *case)
    before_the_work()
    twice(folder)
    between_messages(f"{folder}-files", ("stream", "load"), 100, 499)


@pytest.mark.multirank
def test_every_line_on_ranks(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    step = 1 if pytestconfig.getoption("--all") else STEP
    run_ranks(2, interrupted_ranks, str(tmp_path / "average"), step)
