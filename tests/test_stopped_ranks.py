"""Ranks that are stopped or killed inside a verb: the others raise in time, and name rank and verb.

How to read a failure: see tests/stopped.py, which stops them and says what the others did.
"""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from dist_ema import EMA
from tests._models import Net
from tests._ranks import run_ranks
from tests.stopped import KILL, MESSAGES, RUNS, STOP, Case, outcomes, problem

IN_VERBS = [
    Case("swap", 3, 2, STOP),
    Case("swap", 3, 0, KILL),
    Case("gather", 3, 1, STOP, RUNS, 1),
    Case("gather", 2, 0, STOP, RUNS, 1),
    Case("gather", 3, 2, KILL, RUNS, 1),
    Case("copy_to", 3, 1, STOP, number=2),
    Case("EMA", 3, 1, STOP, ("all_reduce",), timeout=8),
]
MORE = [
    Case("copy_to", 3, 0, KILL, number=2),
    Case("swap", 2, 1, STOP, MESSAGES, 2),
    Case("load", 3, 0, STOP, MESSAGES, 2),
    Case("leave", 2, 1, STOP),
    Case("leave", 3, 1, KILL),
    Case("block", 3, 1, KILL),
    Case("block", 2, 0, STOP),
    Case("EMA", 3, 0, KILL, ("all_reduce",), timeout=8),
    Case("EMA", 2, 1, STOP, MESSAGES, 2, timeout=8),
    Case("pull", 2, 0, STOP),
]


@pytest.mark.multirank
@pytest.mark.parametrize("cases", [IN_VERBS, MORE])
def test_the_others_raise_in_time_and_name_rank_and_verb(cases: list[Case]) -> None:
    """Guards the deadlines of bytes and of construction, and heartbeats in the block of a swap."""
    for case, (own, others) in zip(cases, outcomes(cases), strict=True):
        assert own is None
        for outcome in others:
            assert outcome is not None, f"{case}: a rank left no result"
            assert outcome[1], f"{case} passed"
            # NOTE: not TIMEOUT + 10, for a loaded machine; the process group waits half an hour.
            assert problem(case, outcome, 60) == "", case


def stopped_store() -> None:
    """The last rank holds the store and is stopped. Guards BoundedStore."""
    rank, first = dist.get_rank(), dist.group.WORLD
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    facts: list[Any] = [None] * 3
    dist.all_gather_object(facts, (store.port, os.getpid()), group=first)
    port, pid = facts[2]
    dist.destroy_process_group()
    if rank < 2:
        store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    group = dist.new_group([0, 1])
    if rank < 2:
        without_the_store(nn.parallel.DistributedDataParallel(Net(), process_group=group), pid)
    dist.barrier()


def without_the_store(model: nn.parallel.DistributedDataParallel, host: int) -> None:
    rank, group = dist.get_rank(), model.process_group
    ema = EMA(model, 0.5, timeout=60)
    other = EMA(nn.parallel.DistributedDataParallel(Net(), process_group=group), 0.5, timeout=60)

    def refused(verb: str, call: Any) -> float:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"^{re.escape(verb)}: the key-value .* stopped"):
            call()
        return time.monotonic() - began

    def swapped() -> None:
        with ema.swap():
            dist.barrier(group)
            if rank == 0:
                os.kill(host, signal.SIGSTOP)
            ema.timeout = other.timeout = 2.0
            time.sleep(0.5)

    assert refused("ema.swap()", swapped) < 60
    assert refused("ema.gather()", other.gather) < 60
    assert refused("ema.gather()", other.gather) < 1, "the host has not answered since"
    assert refused("EMA(...)", lambda: EMA(model, 0.5, timeout=1.0)) < 60
    dist.barrier(group)
    if rank == 0:
        os.kill(host, signal.SIGCONT)


@pytest.mark.multirank
def test_the_host_of_the_store_is_stopped() -> None:
    run_ranks(3, stopped_store)
