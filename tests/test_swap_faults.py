"""A swap that fails among ranks, and what its block writes, under every wrapper and beside
others.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA
from tests._models import Net
from tests._oracle import same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap


@contextmanager
def no_memory() -> Iterator[None]:
    """Memory runs out before the first window of a transfer is sent."""

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no window")

    before = dist.broadcast, dist.all_reduce
    dist.broadcast = dist.all_reduce = fail
    try:
        yield
    finally:
        dist.broadcast, dist.all_reduce = before


def refused(ema: EMA, folder: str) -> None:
    """By name, in every verb that reads or writes the model."""
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: ema.save(f"{folder}/half"),
        "export": lambda: ema.export(f"{folder}/half"),
        "gather": ema.gather,
        "swap": lambda: ema.swap().__enter__(),
        "update": ema.update,
        "reset": ema.reset,
        "state_dict": ema.state_dict,
    }
    for verb, call in calls.items():
        with raises(RuntimeError, f"ema.{verb}() after an ema.swap() that failed"):
            call()
    assert not Path(folder, "half").exists()


def broken_broadcast(folder: str, at_exit: bool) -> None:
    """The owners hold live, the replicas may not: nothing is written until both were loaded."""
    model = wrap("ddp", Net())
    ema = EMA(model, 0.5, timeout=5.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    ema.update()
    ema.save(f"{folder}/kept {at_exit}")
    live, before = copy.deepcopy(model.state_dict()), snapshot(model)
    with raises(MemoryError, "no window"), contextlib.ExitStack() as stack:
        if at_exit:
            stack.enter_context(no_memory_after(ema))
        else:
            stack.enter_context(no_memory())
            stack.enter_context(ema.swap())
    refused(ema, folder)
    model.load_state_dict(live)
    ema.load(f"{folder}/kept {at_exit}")
    assert same(before, snapshot(model))
    with ema.swap():
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))


@contextmanager
def no_memory_after(ema: EMA) -> Iterator[None]:
    """The entry succeeds, the exit does not."""
    swap = ema.swap()
    swap.__enter__()
    yield
    with no_memory():
        swap.__exit__(None, None, None)


def writes(kind: str) -> None:
    """Every weight is doubled inside: live is restored, the average and frozen weights keep it, all
    named.
    """
    model = wrap(kind, Net())
    ema = EMA(model, 0.5)
    ema.update()
    trained = [p.requires_grad for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ema.swap(), torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    text = " ".join(str(each.message) for each in caught)
    assert "The average keeps what was written" in text, kind
    assert "is not averaged and was written" in text, kind
    for p, old, learns in zip(model.parameters(), before, trained, strict=True):
        assert bool((p.detach() == (old if learns else 2 * old)).all()), kind
    with ema.swap():
        for p, old in zip(model.parameters(), before, strict=True):
            assert bool((p.detach() == 2 * old).all()), kind


def on_ranks(folder: str) -> None:
    broken_broadcast(folder, at_exit=False)
    broken_broadcast(folder, at_exit=True)
    for kind in ("ddp", "fsdp1 flat", "fsdp1 orig", "fsdp2"):
        writes(kind)


@pytest.mark.multirank
def test_failed_broadcasts_and_writes_on_ranks(tmp_path: Path) -> None:
    """Guards `failed` in WeightSwap, and the version counters of every wrapper."""
    run_ranks(2, on_ranks, str(tmp_path))


def message_of(block: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            block()
    return [str(each.message) for each in caught]


def test_the_swap_of_another_ema_hides_no_write() -> None:
    """Guards SwapRegistry.discount: the inner swap is no write, and the block's are named once
    each.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one, two = EMA(model, 0.5), EMA(model, 0.9)
    part = EMA(model, 0.5, only="^0")

    def nested(inner: EMA, before: bool, inside: str) -> list[str]:
        def block() -> None:
            with one.swap():
                if before:
                    model[1].weight.clamp_(-0.01, 0.01)
                with inner.swap():
                    if inside:
                        model.get_parameter(inside).add_(1)

        return message_of(block)

    assert nested(two, False, "") == []
    (only,) = nested(two, True, "")
    assert only.startswith("1.weight was written")
    (only,) = nested(two, False, "0.weight")
    assert only.startswith("0.weight was written inside"), "it became the inner average's"
    first, second = nested(part, False, "1.weight")
    assert first.startswith("1.weight is not averaged and was written")
    assert second.startswith("1.weight was written inside"), "it became the outer average's"
