"""Ranks that stop themselves (SIGSTOP) or die (SIGKILL) before an operation of a verb.

    python -m tests.stopped [--only save gather]    every verb before each of its operations, on 2
                                                    and 3 ranks; half an hour
    python -m tests.stopped --timeout 10            on a machine that does other work too

Each case is a group of ranks with an average of its own, all in one world. The victim counts what
it does in the verb, and fails before the operation of the case. `fault` returns on every other rank
what was raised, and after how long.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA
from dist_ema.averaging import drop_in_rules
from dist_ema.distributed import collectives, receiver
from dist_ema.sharding import ownership
from tests._models import Net
from tests._ranks import run_ranks

__all__ = ["BYTES", "KILL", "MESSAGES", "RUNS", "STOP", "TIMEOUT", "Case", "outcomes", "problem"]

VERBS = ("EMA", "swap", "leave", "gather", "copy_to", "load", "save", "stream", "export", "pull")
TIMEOUT = 3.0
AT_ONCE = 12  # cases in one world
MESSAGES, BYTES = ("add", "compare_set", "set"), ("broadcast", "all_reduce")
RUNS = ("send", "receive_into")  # of bytes over connections


class Case(NamedTuple):
    """A group of `size` ranks, of which `victim` fails before operation `number` of a kind."""

    verb: str  # as the error names it
    size: int
    victim: int
    fault: signal.Signals
    kind: tuple[str, ...] = BYTES
    number: int = 0
    timeout: float = TIMEOUT

    def __str__(self) -> str:
        place = f"rank {self.victim} of {self.size}, {self.fault.name}"
        return f"{self.verb}, {place}, {'/'.join(self.kind)} {self.number}"


STOP, KILL = signal.SIGSTOP, signal.SIGKILL
ENTERED: list[Any] = []


def arm(case: Case) -> None:
    """From now on, count operations and fail before the one of the case."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > case.number:
                os.kill(os.getpid(), case.fault)
                time.sleep(0.5)  # another thread may take the signal
            return operation(*args, **kwargs)

        return call

    places = {MESSAGES: dist.PrefixStore, RUNS: receiver.Stream}
    place: Any = places.get(case.kind, dist)
    for name in case.kind:
        setattr(place, name, counted(getattr(place, name)))


def enter_swap(ema: EMA) -> None:
    """Enter it alone: a swap that is dropped is left, and that takes a timeout of its own."""
    ENTERED.append(ema.swap())
    ENTERED[-1].__enter__()


def use(ema: EMA, case: Case, other: nn.Module, folder: Path, is_victim: bool) -> None:
    """The verb of the case, in which the victim fails."""
    if case.verb not in ("leave", "block"):
        if is_victim:
            arm(case)
        calls: dict[str, Callable[[], Any]] = {
            "gather": ema.gather,
            "copy_to": lambda: ema.copy_to(other),
            "load": lambda: ema.load(folder / "kept"),
            "save": lambda: ema.save(folder / "new"),
            "stream": lambda: ema.save(folder / "new", mode="stream"),
            "export": lambda: ema.export(folder / "out"),
            "swap": lambda: enter_swap(ema),
            "pull": lambda: drop_in_rules.pull(ema.weights, 1.0),
            "EMA": lambda: EMA(other, 0.5, timeout=case.timeout),
        }
        calls[case.verb]()
        return
    with ema.swap():
        # A rank at work is waited for, also by one that has left the block long ago.
        time.sleep(2 * case.timeout if is_victim else 0)
    with ema.swap():
        if is_victim and case.verb == "leave":
            arm(case)
        elif is_victim:
            os.kill(os.getpid(), case.fault)


def fault(folder: str, cases: list[Case]) -> tuple[int, str, float]:
    """(the victim, what was raised or '', after how many seconds)."""
    ends = [sum(case.size for case in cases[: i + 1]) for i in range(len(cases))]
    groups = [
        dist.new_group(list(range(end - case.size, end)))
        for case, end in zip(cases, ends, strict=True)
    ]
    number = next(i for i, end in enumerate(ends) if dist.get_rank() < end)
    case, group = cases[number], groups[number]
    victim, path = ends[number] - case.size + case.victim, Path(folder, str(number))
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net(), process_group=group)
    ema = EMA(model, 0.5, timeout=60)
    ema.save(path / "kept")
    collectives.WINDOW = collectives.STREAM = receiver.WINDOW = ownership.MAX_BLOCK = 512
    pids: list[Any] = [None] * case.size
    dist.all_gather_object(pids, os.getpid(), group=group)
    before = [p.detach().clone() for p in model.parameters()]
    dist.barrier()
    ema.timeout, began, text = case.timeout, time.monotonic(), ""
    try:
        other = model if case.verb == "EMA" else Net()
        use(ema, case, other, path, dist.get_rank() == victim)
    except RuntimeError as error:
        text = str(error)
    seconds = time.monotonic() - began
    if case.verb in ("leave", "block"):
        seconds -= 2 * case.timeout
    if dist.get_rank() != victim:
        time.sleep(2.0)  # the others must come to their own end
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[case.victim], signal.SIGKILL)
    if case.verb in ("gather", "load", "save", "stream", "export", "EMA"):
        assert all(map(torch.equal, before, model.parameters()))
    return victim, text, seconds


Outcome = tuple[int, str, float] | None  # of a rank; None of one that left no result


def outcomes(cases: list[Case]) -> list[tuple[Outcome, list[Outcome]]]:
    """Of the victim and of the others, for each case."""
    world = sum(case.size for case in cases)
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(world, fault, folder, cases, timeout=200, allow_dead=True, server=True)
    rest, pairs = iter(found), []
    for case in cases:
        each = [next(rest) for _ in range(case.size)]
        pairs.append((each.pop(case.victim), each))
    return pairs


def problem(case: Case, outcome: Outcome, limit: float) -> str:
    """What is wrong with how another rank took the fault. limit: Seconds in which it must end."""
    if outcome is None:
        return "left no result"
    victim, text, seconds = outcome
    verb = {"leave": "swap", "block": "swap", "stream": "save", "pull": "weights.pull"}.get(
        case.verb, case.verb
    )
    call = "EMA(...)" if verb == "EMA" else f"ema.{verb}()"
    if text and not (call in text and re.search(rf"\branks? ([\d, ]*, )?{victim}\b", text)):
        return f"{call} or rank {victim} is not named: {text}"
    return "" if seconds < limit else f"took {seconds:.1f} s: {text}"


def walk(verbs: list[str], timeout: float = TIMEOUT) -> int:
    """Try every verb before each operation, until the victim does not come that far.

    A line for each row, at its end: a walk that is cut short says what it has shown.
    """
    kinds, places = (MESSAGES, BYTES, RUNS), ((2, 1), (3, 0), (3, 1))
    rows = {
        Case(verb, *place, signal_, kind, 0, timeout): 0
        for verb, place, signal_, kind in product(verbs, places, (STOP, KILL), kinds)
    }
    faults = dict.fromkeys(rows, 0)
    failures = dict.fromkeys(rows, 0)
    while rows:
        batch = list(rows)[:AT_ONCE]
        cases = [row._replace(number=rows[row]) for row in batch]
        for row, case, (own, others) in zip(batch, cases, outcomes(cases), strict=True):
            rows[row] += 1
            if own is not None:
                del rows[row]
                print(f"{row}: {faults[row]} faults, {failures[row]} failures", flush=True)
                continue
            faults[row] += 1
            for text in filter(None, (problem(case, each, timeout + 10) for each in others)):
                failures[row] += 1
                print(f"{case}: {text}", flush=True)
    for verb in verbs:
        of_verb = [row for row in faults if row.verb == verb]
        counts = [sum(numbers[row] for row in of_verb) for numbers in (faults, failures)]
        print(f"{verb}: {counts[0]} faults, {counts[1]} failures", flush=True)
    return sum(failures.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Every verb, before each of its operations.")
    parser.add_argument("--only", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="of the averages, seconds")
    options = parser.parse_args()
    sys.exit(bool(walk(options.only, options.timeout)))
