"""torch.distributed.checkpoint: the average is Stateful, and reshards between wrappers and worlds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dist_ema import EMA, Uniform
from dist_ema.checkpoint.dcp import FlatRange
from tests._oracle import Training
from tests._ranks import raises, run_ranks

CHAIN = [("ddp", 2), ("fsdp1 flat", 3), ("fsdp2", 2), ("none", 1), ("hsdp", 4), ("ddp whole", 2)]
ASYNC = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def build(kind: str) -> tuple[Training, EMA]:
    run = Training(kind)
    return run, EMA(run.model, Uniform(), split=kind != "ddp whole")


def load_all_then_save(kind: str, folder: str, earlier: list[str]) -> None:
    for source in earlier:
        _, ema = build(kind)
        dcp.load({"ema": ema}, checkpoint_id=f"{folder}/{source}")
        full = ema.gather()
        assert (ema.now, ema.metrics()["updates"]) == (3.0, 3)
        if full:
            want = torch.load(f"{folder}/{source.removesuffix('-async')}.pt")
            assert [name for name in ema.names() if not torch.equal(full[name], want[name])] == []
            assert torch.equal(full["core.mean"], want["core.mean"]), "the average's own buffer"
    run, ema = build(kind)
    ema.attach(run.optimizer)
    run.train(3)
    with ema.swap():
        for buffer in run.model.buffers():
            if buffer.is_floating_point():
                buffer += 0.5 + dist.get_rank()
    dcp.save({"ema": ema}, checkpoint_id=f"{folder}/{kind}")
    full = ema.gather()
    if full:
        torch.save(full, f"{folder}/{kind}.pt")
    if ASYNC:
        future = dcp.async_save({"ema": ema}, checkpoint_id=f"{folder}/{kind}-async")
        getattr(future, "result", lambda: getattr(future, "upload_completion").result())()  # noqa: B009
        ema.reset()


@pytest.mark.multirank
def test_saved_and_resharded_under_every_wrapper(tmp_path: Path) -> None:
    """Each link of the chain loads what all earlier links saved, also with async_save, then saves its own."""
    earlier: list[str] = []
    for kind, world in CHAIN:
        run_ranks(world, load_all_then_save, kind, str(tmp_path), earlier)
        earlier += [kind, f"{kind}-async"] if ASYNC else [kind]
    assert len(earlier) == (12 if ASYNC else 6)


def refuse_arithmetic() -> None:
    _, ema = build("ddp")
    state = ema.state_dict()
    part = state["averages"]["Uniform()"]
    ranges = [value for value in part["weights"].values() if isinstance(value, FlatRange)]
    assert ranges, "with two ranks some weight is cut"
    with raises(RuntimeError, "only for torch.distributed.checkpoint"):
        ranges[0] + 1
    assert "elements of" in repr(ranges[0])
    ema.load_state_dict(state)
    with raises(ValueError, "lacks scale, core.emb.weight"):
        ema.load_state_dict(state | {"averages": {"Uniform()": part | {"weights": {}}}})
    with raises(ValueError, "lacks Uniform()"):
        ema.load_state_dict(state | {"averages": {}})
    whole = {name: torch.full(tuple(value.shape), 2.0) for name, value in part["weights"].items()}
    ema.load_state_dict(state | {"averages": {"Uniform()": part | {"weights": whole}}})
    full = ema.gather()
    assert all((full[name] == 2).all() for name in full if name in ema.names())
    odd = {name: torch.full(tuple(value.shape), 3.0) for name, value in part["weights"].items()}
    if dist.get_rank() == 1:
        odd[list(odd)[-1]] = torch.zeros(2, 2, 2)
    with raises(
        ValueError if dist.get_rank() == 1 else RuntimeError, "(2, 2, 2) in the state_dict"
    ):
        ema.load_state_dict(state | {"averages": {"Uniform()": part | {"weights": odd}}})
    again = ema.gather()
    assert all(torch.equal(again[name], full[name]) for name in full), (
        "nothing was written on any rank"
    )


@pytest.mark.multirank
def test_a_flat_range_is_a_handle() -> None:
    """Arithmetic on it raises instead of giving garbage; full tensors load into any cut."""
    run_ranks(2, refuse_arithmetic)


def test_one_process_gets_plain_tensors(tmp_path: Path) -> None:
    """A world of one can use torch.save and weights_only=True."""
    model = torch.nn.Linear(3, 4)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    again = EMA(torch.nn.Linear(3, 4), 0.5)
    again.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(ema.gather().values(), again.gather().values(), strict=True)
    )
    assert again.now == 1
