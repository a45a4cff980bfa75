"""ema.to: the same average in another dtype or place, whatever is attached or under way."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, Constant, Uniform
from dist_ema.averaging.engines import HostThread, Inline
from tests._models import Net
from tests._oracle import Training, same
from tests._ranks import raises, run_ranks
from tests.test_engines import Late

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def step(model: nn.Module, seed: int) -> None:
    """Move the weights by multiples of 1/8 that bfloat16 holds, so that halving averages are exact
    in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-8, 9, p.shape, generator=generator) / 8)


def shadows(ema: EMA) -> list[Tensor]:
    ema.weights.settle()
    return [
        slot.shadow
        for profile in ema.weights.averages
        for slot in profile.averaged
        if slot.shadow is not None
    ]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_equals_a_fresh_one(device: str | None, dtype: torch.dtype) -> None:
    """Cast after two updates, then two more: bit for bit what an EMA of that dtype and place has
    from the beginning.

    Guards what `allocate` starts from, `_replan`, and that EMA keeps dtype and device for `rescan`
    and repr.
    """
    model = Net()
    step(model, 0)
    moved, fresh = EMA(model, [0.5, 0.75]), EMA(model, [0.5, 0.75], dtype=dtype, device=device)
    for i in range(1, 5):
        step(model, i)
        if i == 2:
            assert moved.to(device, dtype) is moved
        if i < 3:
            moved.update(decay=0.0)
            fresh.update(decay=0.0)
        else:
            moved.update(decay=0.5)
            fresh.update(decay=0.5)
    assert [t.dtype for t in shadows(moved)] == [t.dtype for t in shadows(fresh)]
    assert same(shadows(moved), shadows(fresh))
    assert (
        type(moved.weights.updates.engine)
        is type(fresh.weights.updates.engine)
        is (HostThread if device else Inline)
    )
    assert repr(moved) == repr(fresh)
    for ema in (moved, fresh):
        model.core.frozen.requires_grad_(True)
        ema.rescan()
    assert same(shadows(moved), shadows(fresh)), "what became trainable lies with the others"


@pytest.mark.parametrize("overlap", [True, False])
def test_while_attached(overlap: bool) -> None:
    """Into host memory and back between two steps, with an update under way: nothing is lost, and
    hooks go on.

    Guards `ready` before the shadows are copied, and that the overlap of `attach` is kept.
    """
    results = []
    for moves in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 3))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        ema = EMA(model, 0.9, device="cpu")
        ema.attach(optimizer, overlap=overlap)
        late = ema.weights.updates.engine = (
            HostThread(None, Late(1)) if overlap else ema.weights.updates.engine
        )
        for i in range(12):
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if moves and i in (2, 5, 8):
                ema.to(dtype=F64)
                assert ema.weights.updates.engine is not late, (
                    "the old engine would keep the old shadows"
                )
                assert isinstance(ema.weights.updates.engine, HostThread) == overlap
                ema.to("cpu", F32)
        results.append([*ema.gather().values()])
        assert ema.now == 12
    assert same(*results)


def test_nothing_is_left_behind() -> None:
    """The old shadows are freed when the call returns.

    Guards `_chosen = None`: an engine that stayed would hold them.
    """
    model = nn.Linear(300, 300)
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    before = weakref.ref(shadows(ema)[0].untyped_storage())
    ema.to(dtype=F64)
    gc.collect()
    assert before() is None


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for the second average, the first has not moved either, and updates
    go on.
    """
    model = nn.Linear(5, 5)
    step(model, 0)
    ema, twin = EMA(model, [0.5, 0.75]), EMA(model, [0.5, 0.75])
    empty, calls = torch.empty, []

    def full(*sizes: Any, **options: Any) -> Tensor:
        calls.append(sizes)
        if len(calls) == 2:
            raise MemoryError
        return empty(*sizes, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(MemoryError):
            ema.to(dtype=F64)
    step(model, 1)
    ema.update()
    twin.update()
    assert repr(ema) == repr(twin)
    assert same(shadows(ema), shadows(twin))


def test_own_buffers_and_files_stay(tmp_path: Path) -> None:
    """Clock, recalibrated buffers and what a file holds are those of before; the file loads into
    either dtype.
    """
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = EMA(model, Uniform(), buffers="average")
    for i in range(3):
        step(model, i)
        ema.update()
    with ema.swap():
        model[1].running_mean.fill_(7.0)
    before = ema.gather()
    ema.to(dtype=F64)
    after = ema.gather()
    assert ema.now == 3
    assert all(
        torch.equal(after[name], value.to(after[name].dtype)) for name, value in before.items()
    )
    assert after["1.running_mean"].eq(7).all()
    ema.save(tmp_path / "a")
    again = EMA(model, Uniform(), buffers="average")
    again.load(tmp_path / "a")
    assert all(
        torch.equal(value.double(), after[name].double()) for name, value in again.gather().items()
    )


def test_refused() -> None:
    model = nn.Linear(3, 3)
    ema = EMA(model)
    with pytest.raises(
        ValueError, match="dtype must be torch.float32, float64 or bfloat16, got torch.float16"
    ):
        ema.to(dtype=torch.float16)
    for device in ("meta", "gpu", F64):
        with pytest.raises(ValueError, match=rf"like 'cpu' or 'cuda:1', got '?{device}"):
            ema.to(device)
    with ema.swap(), pytest.raises(RuntimeError, match=r"ema.to\(\) inside ema.swap"):
        ema.to(dtype=F64)
    taught = EMA(model, into=nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="the shadows are the teacher's weights"):
        taught.to("cpu")
    assert ema.to() is ema


def on_ranks() -> None:
    """FSDP2 and DDP, cut: each rank moves its own part, and the average goes on as if it had been
    there all along.
    """
    for kind in ("fsdp2", "ddp"):
        results = []
        for moves in (False, True):
            run = Training(kind)
            ema = EMA(run.model, Constant(0.9), dtype=F32 if moves else F64)
            ema.attach(run.optimizer)
            if moves:
                ema.to(dtype=F64)
                ema.to(device="cpu")
            run.train(3)
            results.append(ema.gather())
            with ema.swap():
                run.probe()
        assert all(torch.equal(value, results[1][name]) for name, value in results[0].items()), kind
    ema.to(dtype=F32 if dist.get_rank() else F64)
    for verb in (ema.gather, ema.reset):
        with raises(ValueError, "dtype of the shadows is 'torch.float64' on rank 0"):
            verb()


@pytest.mark.multirank
def test_on_ranks() -> None:
    run_ranks(2, on_ranks)


def test_what_lies_there_already_is_not_copied() -> None:
    ema = EMA(nn.Linear(3, 2), 0.5, device="cpu")
    places = [state.shadow.data_ptr() for state in ema.weights.averages[0].averaged]  # type: ignore[union-attr]
    ema.to("cpu").to(dtype=torch.float32)
    assert [state.shadow.data_ptr() for state in ema.weights.averages[0].averaged] == places  # type: ignore[union-attr]
