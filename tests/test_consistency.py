"""Ranks that call one verb differently are told which argument, and on which ranks.

How to read a failure: inside a rank a check is a plain assert. `raises` shows the message that came
and the words that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ema import EMA, HalfLife
from dist_ema.distributed import waiting
from dist_ema.distributed.ranks import Ranks
from dist_ema.sharding import torch_internals
from tests._models import Net
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

ALONE = 2  # the rank that differs


def differs() -> bool:
    return dist.get_rank() == ALONE


def named(verb: str, argument: str, first: str, second: str) -> Any:
    """The block must raise on every rank, and name the argument, its values and two ranks."""
    call = "EMA(...)" if verb == "EMA" else f"ema.{verb}()"
    return raises(
        ValueError, f"{call}: ", f"{argument} is {first} on rank ", f"and {second} on rank 2"
    )


CONSTRUCTION: list[tuple[str, Any, Any, str, str]] = [
    ("decay", 0.5, 0.75, "[Constant(decay=0.5)]", "[Constant(decay=0.75)]"),
    (
        "decay",
        0.5,
        [0.5, 0.9],
        "[Constant(decay=0.5)]",
        "[Constant(decay=0.5), Constant(decay=0.9)]",
    ),
    ("decay", HalfLife(8), HalfLife(9), "[HalfLife(units=8)]", "[HalfLife(units=9)]"),
    ("dtype", torch.float32, torch.bfloat16, "torch.float32", "torch.bfloat16"),
    ("buffers", "copy", "average", "'copy'", "'average'"),
    ("only", None, "core", "None", "'core'"),
    (
        "only",
        str.islower,
        str.isascii,
        "<method 'islower' of 'str' objects>",
        "<method 'isascii' of 'str' objects>",
    ),
    ("split", True, False, "True", "False"),
    ("device", None, "cpu", "None", "'cpu'"),
]


def construction() -> None:
    model = wrap("ddp", Net())
    for argument, most, other, first, second in CONSTRUCTION:
        given = {"decay": 0.5, argument: other if differs() else most}
        with named("EMA", argument, first, second):
            EMA(model, **given)
    teacher = wrap("ddp", Net())
    with named("EMA", "into", "False", "True"):
        EMA(model, into=teacher if differs() else None)


def verbs(ema: EMA, other: torch.nn.Module, folder: str) -> dict[str, Callable[..., Any]]:
    """Every collective verb, under the arguments of its own."""

    def swap(**options: Any) -> None:
        with ema.swap(**options):
            pass

    state = ema.state_dict()
    return {
        "swap": swap,
        "gather": ema.gather,
        "copy_to": lambda **options: ema.copy_to(other, **options),
        "save": lambda path=f"{folder}/out-3", **options: ema.save(path, **options),
        "export": lambda path=f"{folder}/export", **options: ema.export(path, **options),
        "load": lambda path=f"{folder}/kept-1", **options: ema.load(path, **options),
        "metrics": ema.metrics,
        "reset": ema.reset,
        "rescan": ema.rescan,
        "load_state_dict": lambda: ema.load_state_dict(state),
    }


ARGUMENTS: list[tuple[str, str, Any, Any]] = [
    *((verb, "which", 0, 1) for verb in ("swap", "gather", "copy_to", "export", "metrics")),
    ("save", "path", "{}/a-1", "{}/b-1"),
    ("save", "max_shard_size", "5GB", "1GB"),
    ("save", "mode", None, "stream"),
    ("save", "extra", {"a": [1], "b": 2}, {"a": [1], "b": 3}),
    ("save", "keep", None, 2),
    ("save", "wait", True, False),
    ("export", "path", "{}/a", "{}/a.safetensors"),
    ("export", "dtype", None, torch.bfloat16),
    ("export", "max_shard_size", "5GB", 4096),
    ("export", "mode", "direct", "stream"),
    ("load", "path", "{}/kept-1", "{}/other"),
    ("load", "strict", True, False),
    ("load", "verify", True, False),
]


def arguments(folder: str) -> None:
    """Each argument of each verb; then the verbs go on, and equal dicts in another order are
    equal.
    """
    ema = EMA(wrap("ddp", Net()), [0.5, 0.75])
    ema.save(f"{folder}/kept-1")
    calls = verbs(ema, wrap("ddp", Net()), folder)
    schedules = ["Constant(decay=0.5)", "Constant(decay=0.75)"]
    for verb, argument, *values in ARGUMENTS:
        given = [v.format(folder) if isinstance(v, str) else v for v in values]
        texts = [f"'{schedules[v]}'" if argument == "which" else repr(v) for v in given]
        with named(verb, argument, *texts):
            calls[verb](**{argument: given[differs()]})
    with raises(ValueError, "ema.save(): ", "folder is", "every is 1.0 on rank", "0.5 on rank 2"):
        ema.update()
        ema.snapshot(f"{folder}/{differs()}", every=0.5 if differs() else 1.0)
    for call in calls.values():
        call()
    ema.save(f"{folder}/kept-2", extra={"b": 1, "a": 2} if differs() else {"a": 2, "b": 1})


def clocks(folder: str) -> None:
    """A clock, or what `attach` was given, that differs is named by every verb."""
    model, other = wrap("ddp", Net()), wrap("ddp", Net())
    for changed, words in [
        (
            lambda ema: ema.update(900.0 if differs() else 600.0),
            ["now is 600.0", "900.0 on rank 2"],
        ),
        (lambda ema: [ema.update() for _ in range(1 + differs())], ["updates is 1", "2 on rank 2"]),
        (
            lambda ema: ema.update(decay=0.1 if differs() else None),
            ["[(0.5, 1.0)]", "[(0.1, 1.0)]"],
        ),
    ]:
        ema = EMA(model, 0.5)
        ema.save(f"{folder}/kept-1")
        calls = verbs(ema, other, folder)
        changed(ema)
        for verb, call in calls.items():
            with raises(ValueError, f"ema.{verb}(): ", *words):
                call()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for argument, most, alone in [
        ("every", 1, 2),
        ("start", 0, 5),
        ("elapsed", 600.0, 900.0),
        ("overlap", True, False),
        ("guard", False, True),
    ]:
        ema = EMA(model, 0.5)
        handle = ema.attach(optimizer, **{argument: alone if differs() else most})
        with named("gather", f"attach({argument}=)", repr(most), repr(alone)):
            ema.gather()
        handle.remove()
        if argument != "start":  # else the average of rank 2 still waits for its first step
            ema.gather()


class CountingStore:
    """The store of the job, and the messages that were written to it."""

    def __init__(self, prefix: str) -> None:
        self.store, self.messages = torch_internals.side_store(prefix), []

    def set(self, key: str, value: str) -> None:
        self.messages.append(key)
        self.store.set(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def no_message() -> None:
    """Arguments cost no message: they are in the number by which a rank is counted."""
    stores: list[CountingStore] = []

    def counting(prefix: str) -> Any:
        stores.append(CountingStore(prefix))
        return stores[-1]

    ranks = Ranks(range(3), None, counting, 20.0)
    ranks.begin("reset", {"path": "a", "extra": {"b": 1}})
    ranks.run_on_all("reset", lambda: None)
    assert stores
    sent = [key for store in stores for key in store.messages]
    assert [key for key in sent if "/here/" not in key] == []
    ranks.begin("reset", {"path": dist.get_rank()})
    with raises(ValueError, "ema.reset(): path is "):
        ranks.run_on_all("reset", lambda: None)


def together(folder: str) -> None:
    waiting.GRACE = 1.0
    construction()
    arguments(folder)
    clocks(folder)
    no_message()


@pytest.mark.multirank
def test_ranks_that_disagree(tmp_path: Path) -> None:
    """Every argument of construction, of `attach` and of every verb, and the clock: named on all
    ranks.
    """
    run_ranks(3, together, str(tmp_path))
