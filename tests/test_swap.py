"""Lending and taking back: bit for bit, whatever happens inside."""

from __future__ import annotations

import copy
import signal
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, load_file
from dist_ema.averaging.kernels.eager import SCRATCH
from tests._models import Images, Net, image_batch
from tests._oracle import Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap


def trained(model: nn.Module, **options: Any) -> EMA:
    ema = EMA(model, 0.5, **options)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    ema.update()
    return ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_live_and_shadow_come_back(dtype: torch.dtype, live: torch.dtype) -> None:
    """With one dtype the contents are exchanged; with two the live weights are kept aside, because
    casts round.
    """
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(7, 3)).to(live)
    ema = trained(model, dtype=dtype)
    before, shadows = (
        snapshot(model),
        [slot.shadow.clone() for slot in ema.weights.averages[0].averaged],
    )
    with ema.swap():
        for slot, shadow in zip(ema.weights.averages[0].averaged, shadows, strict=True):
            assert torch.equal(slot.live, shadow.to(live))
    assert same(before, snapshot(model))
    assert same(shadows, [slot.shadow for slot in ema.weights.averages[0].averaged])


def test_no_second_model_in_memory() -> None:
    """With one dtype the exchange goes through one scratch.

    Guards against a clone of the live weights.
    """
    model = nn.Linear(2048, 4096)
    ema = trained(model)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                made.append(out.untyped_storage().nbytes())
            return out

    with Watch(), ema.swap():
        pass
    assert sum(made) <= 4 * SCRATCH + 4096, made


def test_order_of_calls() -> None:
    """Everything that would read or move the wrong weights raises inside a swap, and names
    itself.
    """
    model = nn.Linear(2, 2)
    ema = trained(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema.attach(optimizer)
    model.weight.grad = torch.ones(2, 2)
    before = snapshot(model)
    with ema.swap() as inside:
        assert inside is ema
        for verb in ("update", "gather", "state_dict", "reset", "rescan", "reset_buffers"):
            with pytest.raises(RuntimeError, match=rf"ema.{verb}\(\) inside ema.swap\(\)"):
                getattr(ema, verb)()
        with pytest.raises(RuntimeError, match=r"ema.save\(\) inside ema.swap"):
            ema.save("nowhere")
        with pytest.raises(RuntimeError, match=r"ema.swap\(\) inside ema.swap"), ema.swap():
            pass
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside ema.swap"):
            optimizer.step()
    assert same(before, snapshot(model))
    ema.update()


def test_half_a_swap_is_undone() -> None:
    """If writing fails in the middle, what was written is taken back.

    Guards `restore` in WeightSwap.leave.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = trained(model)
    before = snapshot(model)
    third = ema.weights.averages[0].averaged[2]
    kept, third.shadow = third.shadow, torch.ones(3)  # too long: the exchange raises
    with pytest.raises(RuntimeError), ema.swap():
        raise AssertionError("not reached")
    assert same(before, snapshot(model))
    third.shadow = kept
    with ema.swap():
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))


def test_abandoned_and_interrupted() -> None:
    model = nn.Linear(2, 2)
    ema = trained(model)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), ema.swap():
        raise KeyboardInterrupt

    def evaluate() -> Any:
        with ema.swap():
            yield 1

    abandoned = evaluate()
    next(abandoned)
    assert not same(before, snapshot(model))
    abandoned.close()
    assert same(before, snapshot(model))


def test_autocast_sees_the_average() -> None:
    """Autocast caches its casts of the weights (fact 18).

    Guards torch.clear_autocast_cache() on both sides.
    """
    model = nn.Linear(4, 4)
    ema = trained(model)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = model(x)
        with ema.swap():
            average = model(x)
        assert torch.equal(model(x), live)
    want = copy.deepcopy(model)
    want.load_state_dict(ema.gather())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(want(x), average)
    assert not torch.equal(live, average)


def test_inference_mode_and_no_grad() -> None:
    """Built, updated and swapped inside inference_mode, trained outside (fact 14).

    Guards inference_mode(False).
    """
    model = nn.Linear(3, 3)
    with torch.inference_mode():
        ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema.attach(optimizer)
    for context in (torch.inference_mode, torch.no_grad):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        before = snapshot(model)
        with context(), ema.swap():
            model(torch.randn(2, 3))
        assert same(before, snapshot(model))
    with torch.inference_mode():
        ema.update()
    ema.update()
    assert ema.metrics()["updates"] == 4


def test_a_swap_between_forward_and_backward_raises() -> None:
    """Writes bump the version counter, so autograd refuses stale gradients (fact 19).

    Guards against `.data`.
    """
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    ema = trained(model)
    loss = model(torch.randn(2, 2)).sum()
    with ema.swap():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_models_see_the_swap() -> None:
    """Contents change, addresses do not: no recompilation.

    Frozen code cannot see it, and is refused (fact 18).
    """
    model = nn.Linear(3, 3)
    compiled = torch.compile(model, backend="eager")
    ema = trained(compiled)
    x = torch.randn(2, 3)
    live = compiled(x)
    with ema.swap():
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), live)
    assert torch.equal(compiled(x), live)
    import torch._inductor.config as config

    assert "torch._inductor.config" in sys.modules
    config.freezing = True
    try:
        with pytest.raises(RuntimeError, match="freezing"), ema.swap():
            pass
        inner = trained(nn.Sequential(nn.Linear(3, 3)))
        torch.compile(lambda: inner.model(x), backend="eager")()
        with pytest.raises(RuntimeError, match="freezing"), inner.swap():
            pass
    finally:
        config.freezing = False


# --- buffers --------------------------------------------------------------------------------------


def test_recalibrated_buffers_become_the_averages_own(tmp_path: Any) -> None:
    model = Images()
    ema = trained(model)
    live = [b.clone() for b in model.buffers()]
    with ema.swap():
        model.train()(image_batch(0, 0)[0])
        recalibrated = model.norm.running_mean.clone()
    assert all(torch.equal(a, b) for a, b in zip(live, model.buffers(), strict=True)), (
        "integer counters too"
    )
    assert not torch.equal(recalibrated, model.norm.running_mean)
    with ema.swap():
        assert torch.equal(model.norm.running_mean, recalibrated)
    assert torch.equal(ema.gather()["norm.running_mean"], recalibrated)
    ema.save(tmp_path / "average")
    again = EMA(Images(), 0.5)
    again.load(tmp_path / "average")
    assert torch.equal(again.gather()["norm.running_mean"], recalibrated)
    ema.reset_buffers()
    assert torch.equal(ema.gather()["norm.running_mean"], model.norm.running_mean)
    with pytest.raises(KeyError), ema.swap():
        model.train()(image_batch(0, 0)[0])
        raise KeyError("half recalibrated")
    assert torch.equal(ema.gather()["norm.running_mean"], model.norm.running_mean), (
        "a failed block recalibrates nothing"
    )


def test_recalibrated_buffers_are_not_rounded_to_the_shadows_dtype(tmp_path: Any) -> None:
    model = Images()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "buffers": "average"}
    ema, again = EMA(model, 0.5, **options), EMA(Images(), 0.5, **options)
    with ema.swap():
        model.norm.running_var.fill_(1.2345)
    wanted = torch.full((5,), 1.2345)
    assert torch.equal(ema.gather()["norm.running_var"], wanted)
    ema.export(tmp_path / "shipped")
    assert torch.equal(load_file(tmp_path / "shipped")["norm.running_var"], wanted)
    ema.save(tmp_path / "average")
    again.load(tmp_path / "average")
    with again.swap():
        assert torch.equal(again.model.norm.running_var, wanted)
    other = Images()
    again.copy_to(other)
    assert torch.equal(other.norm.running_var, wanted)


def test_averaged_buffers() -> None:
    model = Images()
    ema = EMA(model, 0.5, buffers="average")
    assert "norm.running_mean" in ema.names()
    start = model.norm.running_mean.clone()
    model.train()(image_batch(0, 0)[0])
    ema.update()
    want = start.lerp(model.norm.running_mean, 0.5)
    live = model.norm.running_mean.clone()
    with ema.swap():
        assert torch.equal(model.norm.running_mean, want)
        model(image_batch(1, 0)[0])
    assert torch.equal(model.norm.running_mean, live)
    shadow = next(
        slot.shadow for slot in ema.weights.averages[0].averaged if slot.name == "norm.running_mean"
    )
    assert torch.equal(shadow, want), "what the block wrote does not reach the shadow"


# --- ranks ----------------------------------------------------------------------------------------


def one_rank_raises(kind: str) -> None:
    run = Training(kind)
    ema = EMA(run.model, 0.5)
    ema.attach(run.optimizer)
    run.train(2)
    before = snapshot(run.model)
    expected: type[BaseException] = KeyError if dist.get_rank() == 1 else RuntimeError
    words = (
        ("no image",)
        if dist.get_rank() == 1
        else ("rank 1 left ema.swap()", "KeyError", "no image")
    )
    with raises(expected, *words), ema.swap():
        if dist.get_rank() == 1:
            raise KeyError("no image")
    assert same(before, snapshot(run.model))
    run.train(1)


def ddp_buffers() -> None:
    """DDP writes the first rank's buffers over the others' in every forward, also in eval: no
    recalibration (fact 6).
    """
    run = Training("ddp", Images, image_batch)
    ema = EMA(run.model, 0.5)
    ema.attach(run.optimizer)
    run.train(3)
    before = snapshot(run.model)
    with ema.swap():
        run.probe()
    assert same(before, snapshot(run.model))
    assert ema.weights.averages[0].own_buffers == {}
    full = ema.gather()
    if full:
        live = run.model.module.state_dict()
        assert all(
            torch.equal(full[name], live[name]) for name in live if name not in ema.names()
        ), "the first rank's"


def a_buffer_is_gone() -> None:
    """One rank's block lost a buffer, so its values cannot be read at the exit: told to all, and
    everything is back.
    """
    model = wrap("ddp", Images())
    ema = trained(model)
    before, mine = snapshot(model), dist.get_rank() == 1
    words = (
        ["norm.running_mean is no buffer"]
        if mine
        else ["rank 1 left ema.swap()", "norm.running_mean is no buffer"]
    )
    with raises(RuntimeError, *words), ema.swap():
        if mine:
            model.module.norm.running_mean = None
    assert same(before, snapshot(model))
    with ema.swap():
        assert not same(before, snapshot(model))


def interrupted_while_leaving(kind: str) -> None:
    """Ctrl-C while others are awaited is raised when all are whole ([Note: interrupts] in swap)."""
    model = wrap(kind, Net())
    ema = trained(model)
    before = snapshot(model)
    signal.signal(signal.SIGALRM, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    if dist.get_rank() == 1:
        with ema.swap():
            time.sleep(1)
    else:
        with raises(KeyboardInterrupt), ema.swap():
            signal.setitimer(signal.ITIMER_REAL, 0.5)
    assert same(before, snapshot(model))
    ema.update()
    with ema.swap():
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))


def leaving() -> None:
    ddp_buffers()
    a_buffer_is_gone()
    interrupted_while_leaving("ddp")
    interrupted_while_leaving("fsdp2")


def missing_rank() -> None:
    """A verb that a rank never enters raises on the others in time, and names who is missing."""
    ema = EMA(wrap("ddp", Net()), 0.5)
    ema.timeout = 1.0
    if dist.get_rank() != 1:
        with raises(
            RuntimeError, "ema.gather() is collective", "rank 1 did not enter it within 1 s"
        ):
            ema.gather()
        dist.barrier()
    else:
        dist.barrier()
        with raises(RuntimeError, "rank 1 did not enter it"):
            ema.gather()


@pytest.mark.multirank
def test_swap_on_ranks() -> None:
    for kind in ("ddp", "fsdp1 orig", "fsdp2"):
        run_ranks(2, one_rank_raises, kind)
    run_ranks(2, leaving)
    run_ranks(3, missing_rank)
