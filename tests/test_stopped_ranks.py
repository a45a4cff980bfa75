"""Ranks that are stopped or killed inside a verb: the others raise in time, and name rank and verb.

How to read a failure: each case is a group of ranks with an average of its own, all in one world.
The victim counts what it does in the verb, and stops itself (SIGSTOP) or dies (SIGKILL) before the
operation of the case. `fault` returns on every other rank what was raised, and after how long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA
from dist_ema.distributed import transfer
from tests._models import Net
from tests._ranks import run_ranks

TIMEOUT = 3.0
MESSAGES, BYTES = ("add", "compare_set", "set"), ("broadcast", "all_reduce", "isend", "irecv")


class Case(NamedTuple):
    """A group of `size` ranks, of which `victim` fails before operation `number` of a kind."""

    verb: str  # as the error names it
    size: int
    victim: int
    fault: signal.Signals
    kind: tuple[str, ...] = BYTES
    number: int = 0


STOP, KILL = signal.SIGSTOP, signal.SIGKILL
IN_VERBS = [
    Case("swap", 3, 2, STOP),
    Case("swap", 3, 0, KILL),
    Case("gather", 3, 1, STOP, number=1),
    Case("gather", 2, 0, STOP, number=1),
    Case("gather", 3, 2, KILL, number=1),
    Case("copy_to", 3, 1, STOP, number=2),
]
MORE = [
    Case("copy_to", 3, 0, KILL, number=2),
    Case("swap", 2, 1, STOP, MESSAGES, 2),
    Case("load", 3, 0, STOP, MESSAGES, 2),
    Case("leave", 2, 1, STOP),
    Case("leave", 3, 1, KILL),
    Case("block", 3, 1, KILL),
    Case("block", 2, 0, STOP),
]


def arm(case: Case) -> None:
    """From now on, count operations and fail before the one of the case."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > case.number:
                os.kill(os.getpid(), case.fault)
            return operation(*args, **kwargs)

        return call

    place: Any = dist if case.kind == BYTES else dist.PrefixStore
    for name in case.kind:
        setattr(place, name, counted(getattr(place, name)))


def use(ema: EMA, case: Case, other: nn.Module, folder: Path, is_victim: bool) -> None:
    """The verb of the case, in which the victim fails."""
    if case.verb not in ("leave", "block"):
        if is_victim:
            arm(case)
        calls: dict[str, Callable[[], Any]] = {
            "gather": ema.gather,
            "copy_to": lambda: ema.copy_to(other),
            "load": lambda: ema.load(folder / "kept"),
            "swap": lambda: ema.swap().__enter__(),
        }
        calls[case.verb]()
        return
    with ema.swap():
        # A rank at work is waited for, also by one that has left the block long ago.
        time.sleep(2 * TIMEOUT if is_victim else 0)
    with ema.swap():
        if is_victim and case.verb == "leave":
            arm(case)
        elif is_victim:
            os.kill(os.getpid(), case.fault)


def fault(folder: str, cases: list[Case]) -> tuple[int, str, float] | None:
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
    ema = EMA(model, 0.5, timeout=30)
    ema.save(path / "kept")
    transfer.WINDOW = transfer.STREAM = 512
    pids: list[Any] = [None] * case.size
    dist.all_gather_object(pids, os.getpid(), group=group)
    before = [p.detach().clone() for p in model.parameters()]
    dist.barrier()
    ema.timeout, began = TIMEOUT, time.monotonic()
    try:
        use(ema, case, Net(), path, dist.get_rank() == victim)
    except RuntimeError as error:
        seconds = time.monotonic() - began
        time.sleep(2.0)  # the others must come to their own end
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[case.victim], signal.SIGKILL)
        if case.verb in ("gather", "load"):
            assert all(map(torch.equal, before, model.parameters()))
        return victim, str(error), seconds - (2 * TIMEOUT if case.verb in ("leave", "block") else 0)
    raise AssertionError(f"{case} passed")


@pytest.mark.multirank
@pytest.mark.parametrize("cases", [IN_VERBS, MORE])
def test_the_others_raise_in_time_and_name_rank_and_verb(cases: list[Case], tmp_path: Path) -> None:
    """Guards the deadlines of bytes, and the heartbeats inside the block of a swap."""
    world = sum(case.size for case in cases)
    outcomes_of_all = run_ranks(
        world, fault, str(tmp_path), cases, timeout=200, allow_dead=True, server=True
    )
    found = iter(outcomes_of_all)
    for case in cases:
        outcomes = [next(found) for _ in range(case.size)]
        assert outcomes.pop(case.victim) is None
        for outcome in outcomes:
            assert outcome is not None, f"{case}: a rank left no result"
            victim, text, seconds = outcome
            verb = "swap" if case.verb in ("leave", "block") else case.verb
            assert f"ema.{verb}()" in text, (case, text)
            assert f"rank {victim} " in text, (case, text)
            assert seconds < 60, (case, text, seconds)  # the process group would wait half an hour
