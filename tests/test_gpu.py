"""What only a CUDA device can show: the compiled kernel, streams that race, and a host that never
waits.

How to read a failure: a race shows as wrong numbers, and every race test has a control, the same
run with its wait taken out, which must differ; when the control fails, the delays are too short to
prove anything on this device. A host sync shows as torch's own error, with the line that waits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.averaging.engines import HostThread, Overlapped
from dist_ema.averaging.executors import SideStream, Worker
from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan
from dist_ema.averaging.kernels.gpu_launch import available
from dist_ema.averaging.kernels.gpu_plan import FusedPlan
from dist_ema.sharding.numbering import Numbering

from .test_gpu_triton import AWKWARD, BOXES, EXACT, both

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch says of its own sync-debug mode that it is a prototype
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

CUDA = torch.device("cuda", 0)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [*AWKWARD, 4095, 4096, 4097, (1 << 20) + 5]
LONG = 20_000_000  # cycles of `_sleep`: some 10 ms


# --- the kernel -----------------------------------------------------------------------------------


def make(live: torch.dtype, shadow: torch.dtype, averages: int, off: int) -> list[ShadowPair]:
    """Tensors of their own; off: they begin that many elements behind a 512-byte boundary."""
    torch.manual_seed(averages)
    pairs = []
    for i, n in enumerate(SIZES):
        drawn = [torch.randn(n + off, device=CUDA).to(shadow)[off:] for _ in range(averages)]
        pairs.append(
            ShadowPair(
                f"w.{i}",
                drawn,
                torch.randn(n + off, device=CUDA).to(live)[off:],
                Numbering(11 * i, device=CUDA),
            )
        )
    return pairs


def twin(pairs: list[ShadowPair]) -> list[ShadowPair]:
    return [
        ShadowPair(pair.name, [s.clone() for s in pair.shadows], pair.live, pair.indices)
        for pair in pairs
    ]


def differ(pair: ShadowPair, other: ShadowPair) -> tuple[float, float]:
    """(the largest difference in ulp of the larger operand in fp32, the share of elements that
    differ).
    """
    worst = share = 0.0
    for a, b in zip(pair.shadows, other.shadows, strict=True):
        if len(a):
            size = torch.maximum(a.float().abs(), pair.live.float().abs()) * torch.finfo(F32).eps
            worst = max(worst, float(((a.float() - b.float()).abs() / size.clamp_min(1e-30)).max()))
            share = max(share, float((a != b).float().mean()))
    return worst, share


@pytest.mark.parametrize("off", [0, 1, 8])
@pytest.mark.parametrize("shadow", [F32, BF16], ids=str)
@pytest.mark.parametrize("live", [F32, BF16, F16], ids=str)
def test_fused_equals_plan(live: torch.dtype, shadow: torch.dtype, off: int) -> None:
    """Bit for bit where products are exact; else 1 ulp of fp32, which moves a rounding once in
    65536 elements.
    """
    assert available(CUDA)
    weights: list[float | Tensor] = [*EXACT, torch.tensor(0.25, device=CUDA), 0.001, 0.3, 0.9]
    for weight in weights:
        pairs = make(live, shadow, 2, off)
        other = twin(pairs)
        FusedPlan(pairs, 5).run([weight, 0.5], 7)
        UpdatePlan(other, 5).run([weight, 0.5], 7)
        exact = isinstance(weight, Tensor) or weight in EXACT
        for pair, want in zip(pairs, other, strict=True):
            worst, share = differ(pair, want)
            if exact:
                assert share == 0, (
                    f"{pair.name} ({len(pair.live)}) at weight {weight}: {share:.2%} differ"
                )
            elif shadow == F32:
                assert worst <= 1, (
                    f"{pair.name} ({len(pair.live)}) at weight {weight}: off by {worst} ulp"
                )
            else:
                assert share * len(pair.live) <= 1 + len(pair.live) / 4096


@pytest.mark.parametrize("shadow", [F32, BF16], ids=str)
@pytest.mark.parametrize("live", [F32, BF16, F16], ids=str)
def test_guard(live: torch.dtype, shadow: torch.dtype) -> None:
    """Where live is not finite the shadow stays, bit for bit."""
    for weight in (0.25, torch.tensor(0.0, device=CUDA), 1.0):
        pairs = make(live, shadow, 2, 0)
        before = twin(pairs)
        for pair in pairs:
            for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
                pair.live[i::7] = value
        other = twin(pairs)
        FusedPlan(pairs, 5).run([weight, 0.5], 7, guard=True)
        UpdatePlan(other, 5).run([weight, 0.5], 7, guard=True)
        for pair, want, old in zip(pairs, other, before, strict=True):
            poisoned = ~pair.live.isfinite()
            assert torch.equal(pair.shadows[0][poisoned], old.shadows[0][poisoned])
            assert all(torch.equal(a, b) for a, b in zip(pair.shadows, want.shadows, strict=True))


@pytest.mark.parametrize("kind", BOXES)
def test_boxes(kind: str) -> None:
    """Noise of column shards and channels_last weights, by the compiled kernel: the bits of the
    CPU.
    """
    numbering, want = both(kind)
    n = BOXES[kind][2].numel
    shadow, live = torch.randn(n).to(BF16), torch.randn(n)
    here = ShadowPair("w", [shadow.to(CUDA)], live.to(CUDA), numbering)
    there = ShadowPair("w", [shadow], live, want)
    FusedPlan([here], 1).run([0.25], 2)
    UpdatePlan([there], 1).run([0.25], 2)
    assert torch.equal(here.shadows[0].cpu(), there.shadows[0])


def test_huge_numbers() -> None:
    """Element numbers beyond 32 bits."""
    for base in (0, (1 << 32) - 300, 5 << 40):
        numbering = Numbering(base, device=CUDA)
        pairs = [
            ShadowPair(
                "w",
                [torch.randn(9000, device=CUDA).to(BF16)],
                torch.randn(9000, device=CUDA),
                numbering,
            )
        ]
        other = twin(pairs)
        FusedPlan(pairs).run([0.25], 2)
        UpdatePlan(other).run([0.25], 2)
        assert torch.equal(pairs[0].shadows[0], other[0].shadows[0])


def test_another_device() -> None:
    """The kernel is launched where the tensors are, not where the thread happens to be."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    second = torch.device("cuda", 1)
    pairs = [
        ShadowPair(
            "w", [torch.zeros(5000, device=second)], torch.ones(5000, device=second), Numbering()
        )
    ]
    FusedPlan(pairs).run([0.5], 0)
    assert (pairs[0].shadows[0] == 0.5).all()


def test_steps_skipped_on_two_devices() -> None:
    """One optimizer per device, each with its own found_inf: the step counts if one happened."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = nn.ModuleList([nn.Linear(3, 3).to(f"cuda:{k}") for k in range(2)])
    optimizers = [torch.optim.SGD(part.parameters(), 0.1, fused=True) for part in model]
    ema = EMA(model, 0.5)
    ema.attach(*optimizers)
    for skipped in ((1.0, 1.0), (0.0, 1.0), (1.0, 1.0)):
        for k, (optimizer, part) in enumerate(zip(optimizers, model, strict=True)):
            optimizer.found_inf = torch.full((), skipped[k], device=f"cuda:{k}")
            optimizer.grad_scale = None
            for p in part.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert ema.metrics()["skipped"] == 2


def allocations() -> int:
    return int(torch.cuda.memory_stats(CUDA)["allocation.all.allocated"])


@pytest.fixture
def never_wait() -> Any:
    """A function that makes every host sync an error from its call to the end of the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_a_run_allocates_nothing_and_never_waits(never_wait: Callable[[], None]) -> None:
    """After the first run: no memory of the device, no host sync, with weights on host and device,
    and a guard.
    """
    plan = FusedPlan(make(BF16, F32, 2, 0) + make(F32, BF16, 2, 0))
    skip = torch.tensor(0.0, device=CUDA)
    for guard in (False, True):
        plan.run([0.5, skip], 0, guard)
    before = allocations()
    never_wait()
    for update in range(1, 20):
        plan.run([1 / (1 + update), skip if update % 2 else 0.25], update, guard=update % 3 == 0)
    assert allocations() == before


def test_updates_allocate_nothing() -> None:
    """`ema.update()` takes no memory of the device after the second update."""
    model = net()
    ema = EMA(model, 0.99)
    for _ in range(2):
        ema.update()
    before = allocations()
    for _ in range(10):
        ema.update()
    assert allocations() == before


# --- streams --------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).to(CUDA)


class Slow(SideStream):
    """A side stream on which everything takes long to begin and long to end."""

    def submit(self, work: Callable[[], None]) -> Any:
        def slow() -> None:
            torch.cuda._sleep(LONG)
            work()
            torch.cuda._sleep(LONG)

        return super().submit(slow)


def train(
    steps: int, overlap: bool, slow: bool = False, fence: bool = True, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(average, live) after steps whose gradients are elementwise, so that the device has no choice
    of order.
    """
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ema = EMA(model, 0.9, **options)
    ema.attach(optimizer, overlap=overlap)
    if slow:
        late = Slow(CUDA)
        ema.weights.updates.engine = (
            HostThread(late, Worker()) if "device" in options else Overlapped(late)
        )
    if not fence:
        ema.weights.updates.engine.fence = lambda: None  # type: ignore[method-assign]
    for step in range(steps):
        for p in model.parameters():
            (p * (1 + step) + 0.1).sin().sum().backward()
        noise = [
            torch.empty(1 << 22, device=CUDA).fill_(step) for _ in range(8)
        ]  # memory that would be reused too early
        optimizer.step()
        optimizer.zero_grad()
        del noise
        if step % 10 == 9:
            with ema.swap():
                torch.cuda._sleep(1000)
    averages = [value.clone() for value in ema.gather().values()]
    torch.cuda.synchronize()
    return averages, [p.detach().cpu() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("slow", [False, True])
def test_a_side_stream_equals_inline(slow: bool, dtype: torch.dtype) -> None:
    """50 steps with the update behind the next step, on a side stream that is late, against the
    inline update.
    """
    want, live = train(50, overlap=False, dtype=dtype)
    got, got_live = train(50, overlap=True, slow=slow, dtype=dtype)
    assert same(live, got_live), "the run itself is not reproducible on this device"
    assert same(want, got)


def test_a_missing_wait_is_seen() -> None:
    """The control of the test above: without `fence` the late side stream reads weights of the next
    step.
    """
    want, _ = train(9, overlap=False)
    got, _ = train(9, overlap=True, slow=True, fence=False)
    assert not same(want, got)


def test_a_host_thread_equals_inline() -> None:
    """Shadows in host memory: the copy stream may be late, the result is that of the inline update,
    bit for bit.
    """
    want, _ = train(50, overlap=False, device="cpu")
    assert same(want, train(50, overlap=True, device="cpu")[0])
    assert same(want, train(50, overlap=True, device="cpu", slow=True)[0])
    near, _ = train(50, overlap=False)
    assert all(
        torch.allclose(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)
        for a, b in zip(want, near, strict=True)
    )


@pytest.mark.parametrize("kind", [UpdatePlan, FusedPlan])
def test_memory_outlives_its_owner(kind: Any) -> None:
    """Shadows that are dropped while the side stream writes them must not become somebody else's
    memory.
    """
    n = 1 << 22
    pair = ShadowPair(
        "w", [torch.zeros(n, device=CUDA)], torch.ones(n, device=CUDA), Numbering(device=CUDA)
    )
    plan, engine = kind([pair]), Overlapped(Slow(CUDA))
    plan.run([0.0], 0)  # compiled before the race
    torch.cuda.synchronize()
    engine.update(plan, [1.0], 1, False)
    places = {pair.shadows[0].data_ptr(), pair.live.data_ptr()}
    del pair, plan, engine
    gc.collect()
    # Two numbers: a late update would make them equal.
    others = [torch.full((n,), value, device=CUDA) for value in (7.0, 9.0)]
    assert places.isdisjoint(other.data_ptr() for other in others), "memory was reused too early"
    torch.cuda.synchronize()
    assert [bool((other == value).all()) for other, value in zip(others, (7, 9), strict=True)] == [
        True,
        True,
    ]


# --- a host that never waits ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_no_host_sync_in_training(
    overlap: bool, dtype: torch.dtype, never_wait: Callable[[], None]
) -> None:
    """20 attached steps of a fused optimizer under GradScaler, two of them skipped by the device:
    torch sees no sync.
    """
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    ema = EMA(model, 0.9, dtype=dtype)
    ema.attach(optimizer, overlap=overlap, guard=True)
    x, poison = torch.randn(64, 512, device=CUDA), torch.full((64, 512), float("inf"), device=CUDA)

    def step(data: Tensor) -> None:
        with torch.autocast("cuda", torch.float16):
            loss = model(data).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for _ in range(3):
        step(x)
    torch.cuda.synchronize()
    never_wait()
    for i in range(20):
        step(poison if i in (5, 11) else x)
        ema.metrics(distance=False)
    torch.cuda.set_sync_debug_mode("default")
    assert isinstance(ema.weights.updates.plan, FusedPlan)
    assert ema.weights.updates.plan.launches, "the kernel failed its proof on this device"
    assert ema.weights.skipped == 2
    for _ in range(2):  # it asks, and at the next call it knows
        heard = ema.metrics(distance=False)["skipped"]
        torch.cuda.synchronize()
    heard = ema.metrics(distance=False)["skipped"]
    assert heard == ema.metrics()["skipped"] == 2
    assert all(value.isfinite().all() for value in ema.gather().values())


# --- the kernel inside EMA ------------------------------------------------------------------------


@pytest.mark.parametrize("live", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_ema_with_triton_is_the_same(
    dtype: torch.dtype, live: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attached, overlapped, guarded, two averages, one step skipped: the bits of torch's own
    kernels.
    """
    results = []
    for triton in ("1", "0"):
        monkeypatch.setenv("DIST_EMA_TRITON", triton)
        model = net().to(live)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        ema = EMA(model, [0.75, 0.5], dtype=dtype)
        ema.attach(optimizer, guard=True)
        assert isinstance(ema.weights.updates.engine, Overlapped)
        assert isinstance(ema.weights.updates.plan, FusedPlan) == (triton == "1")
        for step in range(8):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.25 * (step - 3))
                if step == 5:
                    p.grad[:1] = float("nan")
            optimizer.found_inf = torch.full((), float(step == 2), device=CUDA)
            optimizer.grad_scale = None
            optimizer.step()
        results.append([value for which in (0, 1) for value in ema.gather(which).values()])
        assert ema.metrics()["skipped"] == 1
    assert same(*results)


@pytest.mark.parametrize("shadow", [F32, BF16], ids=str)
@pytest.mark.parametrize("live", [F32, BF16, F16], ids=str)
def test_the_proof_holds(live: torch.dtype, shadow: torch.dtype) -> None:
    """The comparison that an EMA makes before it trusts the kernel; a warning would be an error
    here.
    """
    for averages in (1, 3):
        plan = FusedPlan(make(live, shadow, averages, 0), 5, UpdatePlan)
        assert plan.others is None
        assert plan.launches


# --- telemetry ------------------------------------------------------------------------------------


def test_times_are_those_of_the_device() -> None:
    """A side stream that sleeps some 20 ms around each update: nobody waits to learn of it, and the
    step was held up.
    """
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.9)
    ema.attach(optimizer)
    ema.weights.updates.engine = Overlapped(Slow(CUDA))
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    known = ema.metrics(distance=False)
    assert known["lag"] >= 1, "the host ran ahead; if not, the delays are too short"
    torch.cuda.synchronize()
    known = ema.metrics(distance=False)
    assert known["lag"] == 0
    assert 0 < known["update_ms"] < known["stall_ms"], (
        "the sleep lies around the update, and the step waits for all"
    )
    assert known["bytes"] == sum(4 * p.numel() for p in model.parameters())
    assert known["pinned"] == 0
    full = ema.metrics()
    average = ema.gather()
    live = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
    apart = sum((live[name] - average[name].double()).square().sum() for name in live)
    whole = sum(value.square().sum() for value in live.values())
    assert abs(full["distance"] - float((apart / whole).sqrt())) < 1e-9
    assert full["replicas_agree"] is True


def test_times_inline() -> None:
    """Events around the update, not the time of the launches; the step waits for all of it."""
    ema = EMA(net(), 0.9)
    ema.weights.use_engine(overlap=False)
    ema.update()
    torch.cuda.synchronize()
    known = ema.metrics(distance=False)
    assert 0 < known["update_ms"] == known["stall_ms"]


def test_a_host_thread_on_its_device() -> None:
    """The thread looks at events of the model's device, from that device, and the window is
    pinned.
    """
    model = net()
    ema = EMA(model, 0.9, device="cpu")
    ema.update()
    engine = ema.weights.updates.engine
    assert isinstance(engine, HostThread)
    seen: list[int] = []
    engine.worker.wait(engine.worker.submit(lambda: seen.append(torch.cuda.current_device())))
    assert seen == [CUDA.index]
    assert all(window.is_pinned() for window, _ in engine.copies)
    assert all(slot.shadow.is_pinned() for slot in ema.weights.states if slot.shadow is not None), (
        "guards layout.allocate"
    )
    known = ema.metrics()
    held = sum(4 * p.numel() for p in model.parameters())
    assert (known["bytes"], known["pinned"]) == (0, 2 * held + 4)
    assert known["update_ms"] > 0


def test_the_watch_sees(never_wait: Callable[[], None]) -> None:
    """The control of the test above."""
    value = torch.ones((), device=CUDA)
    never_wait()
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()
