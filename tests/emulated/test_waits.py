"""Every wait of an update, a swap and a save, on a device that is as late as waits allow.

How to read a failure: NaN or other numbers mean that a wait is missing, and they come at every
run alike. Controls take a wait out and must differ.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA, load_file
from dist_ema.averaging import drop_in_rules, executors
from dist_ema.averaging.engines import HostThread, Overlapped
from dist_ema.averaging.executors import SideStream
from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan
from dist_ema.checkpoint.load_into import load_into
from dist_ema.sharding.numbering import Numbering

from . import load, needs, refusing_syncs, schedule

pytestmark = needs

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    load()
    torch.accelerator.set_device_index(0)
    yield torch.device("emulated", 0)
    torch.accelerator.synchronize()
    torch.accelerator.set_device_index(0)


def net(device: torch.device, dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 5)]
    return nn.Sequential(*layers).to(device, dtype)


def train(
    on: torch.device,
    steps: int,
    overlap: bool,
    spoil: Callable[[EMA], None] = lambda ema: None,
    **options: Any,
) -> list[Tensor]:
    """Averages and live weights after steps on made-up gradients, on the host."""
    model = net(on)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema = EMA(model, 0.9, **options)
    ema.attach(optimizer, overlap=overlap)
    spoil(ema)
    for step in range(steps):
        for p in model.parameters():
            p.grad = (p.detach() * (1 + step) + 0.1).sin()
        # Memory that would be used again too early, if nothing kept it.
        noise = [torch.full((64,), float(step), device=on) for _ in range(8)]
        optimizer.step()
        del noise
        if step % 4 == 3:
            with ema.swap():
                model(torch.ones(3, 8, device=on))
    averages = [value.cpu() for value in ema.gather().values()]
    return averages + [p.detach().cpu() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


# --- the device itself ---------------------------------------------------------------------------


def test_work_is_late_and_events_order_it(device: torch.device) -> None:
    host_view = load().host_view
    value = torch.full((3,), 12345.0, device=device)
    assert (host_view(value) != 12345).all(), "it did not run yet"
    side = torch.Stream(device)
    with side:
        unordered = value + 1
        assert (unordered.cpu() != 12346).all(), "the stream did not wait for another"
    side.wait_stream(torch.accelerator.current_stream(device))
    with side:
        ordered = value + 1
        assert (ordered.cpu() == 12346).all()


def test_freed_memory_is_lost(device: torch.device) -> None:
    """In the order of the stream that allocated it, unless another stream is known to use it."""
    side = torch.Stream(device)
    for recorded in (False, True):
        value, result = torch.ones(300, device=device), torch.empty(300, device=device)
        torch.accelerator.synchronize()
        with side:
            result.copy_(value)
        if recorded:
            value.record_stream(side)
        del value
        gc.collect()
        torch.full((300,), 7.0, device=device).cpu()  # the next owner
        side.synchronize()
        assert (load().host_view(result) == (1.0 if recorded else 7.0)).all()


def test_a_copy_to_pinned_memory_is_late(device: torch.device) -> None:
    value = torch.ones(5, device=device)
    answer = torch.empty(5, pin_memory=True).copy_(value, non_blocking=True)
    assert answer.isnan().all()
    torch.accelerator.synchronize()
    assert (answer == 1).all()
    assert (torch.empty(5).copy_(value, non_blocking=True) == 1).all()


def test_the_watch_sees(device: torch.device) -> None:
    value = torch.ones((), device=device)
    with refusing_syncs(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


# --- updates -------------------------------------------------------------------------------------

PLACES: list[dict[str, Any]] = [{}, {"dtype": BF16}, {"device": "cpu"}]


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_optimizers_that_step_before_the_attached_one(
    device: torch.device, options: dict[str, Any]
) -> None:
    """Per-layer optimizers write in the backward, and the attached stand-in steps after them.

    Guards `_before_any`: without it the stand-in's pre-step says that weights were written.
    """
    averages = []
    for overlap in (False, True):
        model = net(device)
        each = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
        stand_in = torch.optim.SGD(model.parameters(), lr=0.0)
        ema = EMA(model, 0.9, **options)
        ema.attach(stand_in, overlap=overlap)
        for step in range(6):
            for p, optimizer in zip(model.parameters(), each, strict=True):
                p.grad = (p.detach() * (1 + step) + 0.1).sin()
                optimizer.step()
                optimizer.zero_grad()
            stand_in.step()
        averages.append(list(ema.gather().values()))
    assert same(*averages)


@pytest.mark.parametrize("options", PLACES, ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_behind_the_step_equals_inline(
    device: torch.device, options: dict[str, Any], seed: int | None
) -> None:
    """seed: streams do parts of their work at random moments; None: as late as they may."""
    want = train(device, 9, overlap=False, **options)
    with schedule(random=0.0 if seed is None else 0.2, seed=seed or 0):
        assert same(want, train(device, 9, overlap=True, **options))


def no_fence(ema: EMA) -> None:
    ema.weights.updates.engine.fence = lambda: None  # type: ignore[method-assign]


def no_settle(ema: EMA) -> None:
    ema.weights.updates.engine.settle = lambda: None  # type: ignore[method-assign]


def no_submit(ema: EMA) -> None:
    """The side stream does not wait for the step."""

    class Unordered(SideStream):
        def submit(self, work: Callable[[], None]) -> torch.Event:
            with self._stream:
                work()
            return self._stream.record_event()

    ema.weights.updates.engine = Overlapped(Unordered(torch.device("emulated", 0)))


@pytest.mark.parametrize("spoil", [no_fence, no_settle, no_submit])
def test_a_missing_wait_is_seen(device: torch.device, spoil: Callable[[EMA], None]) -> None:
    want = train(device, 9, overlap=False)
    assert not same(want, train(device, 9, overlap=True, spoil=spoil))


def test_a_host_thread_that_does_not_wait_is_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = train(device, 9, overlap=False, device="cpu")
    monkeypatch.setattr(HostThread, "_await_copy", lambda self, copied: None)
    assert not same(want, train(device, 9, overlap=True, device="cpu"))


def test_a_device_without_events(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells when a copy to the host has arrived, so it is waited for."""
    want = train(device, 9, overlap=False, device="cpu")
    for module in ("engines", "executors"):
        monkeypatch.setattr(f"dist_ema.averaging.{module}.has_streams", lambda device: False)
    assert same(want, train(device, 9, overlap=True, device="cpu"))


@pytest.mark.parametrize("dropped", [False, True])
def test_memory_outlives_its_owner(device: torch.device, dropped: bool) -> None:
    """Shadows that are dropped while the side stream writes them become nothing else before.

    dropped: the control, an engine that does not keep them.
    """
    n = 4096
    shadow, live = torch.zeros(n, device=device), torch.ones(n, device=device)
    pair = ShadowPair("w", [shadow], live, Numbering(device=device))
    plan, engine = UpdatePlan([pair]), Overlapped(SideStream(device))
    torch.accelerator.synchronize()
    if dropped:
        engine.executor.keep = lambda tensors: None  # type: ignore[method-assign]
    engine.update(plan, [1.0], 1, False)
    del shadow, live, pair, plan, engine
    gc.collect()
    others = [torch.full((n,), float(value), device=device) for value in range(7, 11)]
    torch.accelerator.synchronize()
    kept = [bool((x == value).all()) for value, x in enumerate(others, 7)]
    assert all(kept) != dropped


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_no_host_sync_in_training(device: torch.device, options: dict[str, Any]) -> None:
    """With a guard, and steps that the device skips, whose flags are dropped at once."""
    averages = []
    for overlap in (False, True):
        model = net(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ema = EMA(model, 0.9, **options)
        ema.attach(optimizer, guard=True, overlap=overlap)
        for step in range(20):
            optimizer.found_inf = torch.tensor(float(step in (5, 11)), device=device)
            optimizer.grad_scale = None
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.25)
            with refusing_syncs() if overlap else nullcontext():
                optimizer.step()
                ema.metrics(distance=False)
        assert ema.metrics()["skipped"] == 2
        averages.append([value.cpu() for value in ema.gather().values()])
    assert all(value.isfinite().all() for value in averages[0])
    assert same(*averages)


@pytest.mark.parametrize("default", ["cpu", "emulated"])
@pytest.mark.parametrize("options", PLACES, ids=str)
def test_skipped_steps_are_heard_whole(
    device: torch.device, options: dict[str, Any], default: str
) -> None:
    """The count is on its way until its mark has passed, in memory that holds no number yet.

    default: where tensors are made that nobody places, as `torch.set_default_device` says.
    """
    model = net(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.device(default):
        ema = EMA(model, 0.9, **options)
        ema.attach(optimizer)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0, device=device), None
        with refusing_syncs():
            optimizer.step()
            heard = [ema.metrics(distance=False)["skipped"]]
        while heard[-1] == 0:
            time.sleep(0.001)  # an event that is asked often enough passes
            heard.append(ema.metrics(distance=False)["skipped"])
    assert set(heard) == {0, 1}


def test_steps_skipped_on_two_devices(device: torch.device) -> None:
    """One optimizer per device, each with its own found_inf: the step counts if one happened."""
    model = nn.ModuleList([nn.Linear(3, 3).to(f"emulated:{k}") for k in range(2)])
    optimizers = [torch.optim.AdamW(part.parameters(), fused=True) for part in model]
    ema = EMA(model, 0.5)
    ema.attach(*optimizers)
    for skipped in ((1.0, 1.0), (0.0, 1.0), (1.0, 1.0)):
        for k, (optimizer, part) in enumerate(zip(optimizers, model, strict=True)):
            optimizer.found_inf = torch.full((), skipped[k], device=f"emulated:{k}")
            optimizer.grad_scale = None
            for p in part.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert ema.metrics()["skipped"] == 2


def test_times_are_those_of_the_device(device: torch.device) -> None:
    """Reading them waits for nothing, and what is under way is counted."""
    model = net(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.9)
    ema.attach(optimizer)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with refusing_syncs():
            optimizer.step()
            known = ema.metrics(distance=False)
    assert known["lag"] >= 1
    torch.accelerator.synchronize()
    known = ema.metrics(distance=False)
    assert known["lag"] == 0
    assert known["update_ms"] > 0
    assert known["bytes"] == sum(4 * p.numel() for p in model.parameters())


def test_updates_allocate_nothing(device: torch.device) -> None:
    model = net(device)
    ema = EMA(model, 0.99)
    for _ in range(2):
        ema.update()
    before = load().allocations()
    for _ in range(10):
        ema.update()
    assert load().allocations() == before


def test_capture_is_refused(device: torch.device) -> None:
    """A replay would run no hooks: the step says so when it is captured, and how it works."""
    model = net(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    load().set_capturing(True)
    try:
        for verb in (optimizer.step, ema.update):
            with pytest.raises(RuntimeError, match=r"captured.*ema.detach\(\).*ema.update\(\)"):
                verb()
    finally:
        load().set_capturing(False)


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_updates_after_replays(device: torch.device, options: dict[str, Any]) -> None:
    """`ema.detach()` before the capture and `ema.update()` after each replay, as the refusal says:
    the bits of an attached run, with swaps between replays. A replay runs the captured operators
    on the same memory, and no hooks.
    """
    gathered = []
    for captured in (False, True):
        model = net(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ema = EMA(model, 0.9, **options)
        ema.attach(optimizer)
        if captured:
            ema.detach()
            replay = type(optimizer).step.__wrapped__  # without the hooks of Optimizer
        for step in range(6):
            for p in model.parameters():
                p.grad = (p.detach() * (1 + step) + 0.1).sin()
            if captured:
                replay(optimizer)
                ema.update()
            else:
                optimizer.step()
            if step % 3 == 2:
                with ema.swap():
                    gathered.append(model(torch.ones(3, 8, device=device)).detach().cpu())
        gathered += [value.cpu() for value in ema.gather().values()]
        gathered += [p.detach().cpu() for p in model.parameters()]
    half = len(gathered) // 2
    assert same(gathered[:half], gathered[half:])
    assert not any(value.isnan().any() for value in gathered)


# --- files, swaps and teachers -------------------------------------------------------------------


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_files_hold_the_average(device: torch.device, tmp_path: Path, options: Any) -> None:
    """Staging buffers are pinned: they are waited for before they are written."""
    model = net(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5, **options)
    ema.attach(optimizer)
    for wait in (True, False):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        ema.save(tmp_path / str(wait), wait=wait)
        want = {name: value.cpu() for name, value in ema.gather().items()}
        ema.save(tmp_path / "last")
        for path in (tmp_path / str(wait), tmp_path / "last"):
            files = load_file(path)
            assert all(torch.equal(want[name], files[name]) for name in want)
    ema.reset()
    ema.load(tmp_path / "last")
    assert same(list(want.values()), list(ema.gather().values()))


def test_a_teacher_is_in_step(device: torch.device) -> None:
    """Its forward waits for the update that writes it."""
    results = []
    for overlap in (False, True):
        model = net(device)
        teacher = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = EMA(model, 0.5, into=teacher)
        ema.attach(optimizer, overlap=overlap)
        seen = []
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.full_like(p, step + 1.0)
            optimizer.step()
            seen.append(teacher(torch.ones(4, 8, device=device)).detach().cpu())
        results.append(seen)
    assert same(*results)


def test_host_memory_that_the_device_still_reads(device: torch.device) -> None:
    """Weights in pinned host memory: a swap writes them when the copies of them were made."""
    model = nn.Linear(4, 3)
    for p in model.parameters():
        p.data = p.data.pin_memory()
    ema = EMA(model, 0.5)
    live = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update(decay=1.0)
    copies = [p.detach().to(device, non_blocking=True) for p in model.parameters()]
    with ema.swap():
        average = [p.detach().to(device, non_blocking=True) for p in model.parameters()]
    after = [p.detach().to(device, non_blocking=True) for p in model.parameters()]
    assert same(copies, [x + 1 for x in live])
    assert same(average, live)
    assert same(after, [x + 1 for x in live])
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data = p.data.pin_memory()
    copies = [p.detach().to(device, non_blocking=True) for p in other.parameters()]
    ema.copy_to(other)
    assert same(copies, [x + 1 for x in live])


def offloaded(model: nn.Module) -> list[Tensor]:
    """Move the weights into pinned host memory, and return what they are."""
    for p in model.parameters():
        p.data = p.data.pin_memory()
    return [p.detach().clone() for p in model.parameters()]


def test_a_pull_writes_into_host_memory(device: torch.device) -> None:
    model = nn.Linear(4, 3)
    ema = EMA(model, 0.5)
    average = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update(decay=1.0)
    live = offloaded(model)
    copies = [p.detach().to(device, non_blocking=True) for p in model.parameters()]
    drop_in_rules.pull(ema.weights, 1.0)
    assert same(copies, live)
    assert same([*model.parameters()], average)


def test_a_saved_model_goes_into_host_memory(device: torch.device, tmp_path: Path) -> None:
    other = nn.Linear(4, 3)
    EMA(other, 0.5).export(tmp_path / "saved")
    model = nn.Linear(4, 3)
    live = offloaded(model)
    copies = [p.detach().to(device, non_blocking=True) for p in model.parameters()]
    load_into(tmp_path / "saved", model)
    assert same(copies, live)
    assert same([*model.parameters()], [*other.parameters()])


def test_an_offloaded_teacher(device: torch.device) -> None:
    """An update writes it when the copies that its forward asked for were made."""
    model = nn.Linear(4, 3)
    teacher = copy.deepcopy(model)
    for p in teacher.parameters():
        p.data = p.data.pin_memory()
    ema = EMA(model, 0.5, into=teacher)
    before = [p.detach().clone() for p in teacher.parameters()]
    for verb in (ema.update, ema.reset):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        before = [p.detach().clone() for p in teacher.parameters()]
        copies = [p.detach().to(device, non_blocking=True) for p in teacher.parameters()]
        verb()
        assert same(copies, before)
        assert not same([*teacher.parameters()], before)


def test_work_in_a_thread_goes_on_where_the_caller_is(device: torch.device) -> None:
    """The same stream, and the same device, although no tensor of the swap lies there."""
    seen: list[Any] = []

    def look() -> None:
        seen.append(torch.accelerator.current_device_index())
        seen.append(torch.accelerator.current_stream())

    second = torch.device("emulated", 1)
    torch.accelerator.set_device_index(1)
    stream = torch.Stream(second)
    for devices in ((), (torch.device("emulated", 0),)):
        with stream:
            executors.run_shielded(look, devices, 1.0, lambda: None)
        assert (seen.pop(), seen.pop()) == (stream, 1)
