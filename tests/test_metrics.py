"""What `ema.metrics()` says is true: distances against float64, copies against a flipped bit, times
against a clock that the test holds.

How to read a failure: `ranks` compares with sums over full weights in one process; `Streams` is a
device whose two streams are two numbers, so every time is known in advance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, Constant, HalfLife
from dist_ema.averaging import metrics
from dist_ema.averaging.engines import HostThread, Overlapped
from dist_ema.averaging.executors import UNREAD, Instant, Meter
from dist_ema.distributed.coordinator import StoreCoordinator
from tests._models import Images, Net, batch, image_batch
from tests._oracle import Collectives, Training
from tests._ranks import raises, run_ranks

# --- over ranks -----------------------------------------------------------------------------------


def relative(run: Training, ema: EMA, which: int) -> float:
    """|live - average| / |live| from full weights, in float64, on the first rank."""
    average = ema.gather(which)
    live = EMA(run.model, 0.5, split=ema.weights.placement.split, buffers="average").gather()
    names = [name for name in ema.names() if name in average]
    apart = sum(
        (live[name].double() - average[name].double()).square().sum().item() for name in names
    )
    whole = sum(live[name].double().square().sum().item() for name in names)
    return math.sqrt(apart / whole) if names else math.nan


def flipped(ema: EMA, name: str, delta: int) -> None:
    """Move the last bit of one element of a shadow."""
    (slot,) = [slot for slot in ema.weights.averages[0].averaged if slot.name == name]
    slot.shadow.view(torch.int32 if slot.shadow.dtype == torch.float32 else torch.int16)[-1:] += (
        delta
    )


ROWS: list[
    tuple[str, Any, Any, dict[str, Any], str | None]
] = [  # the last: a weight that every rank averages whole
    ("ddp", Net, batch, {}, None),
    ("ddp whole", Net, batch, {"split": False}, "core.blocks.0.up.weight"),
    ("ddp", Images, image_batch, {"buffers": "average"}, None),
    ("fsdp2", Net, batch, {"dtype": torch.bfloat16}, "scale"),
    ("fsdp1 flat", Net, batch, {}, "scale"),
]


def ranks() -> None:
    for kind, make, data, options, copied in ROWS:
        run = Training(kind, make, data)
        ema = EMA(run.model, [Constant(0.9), HalfLife(2.0)], **options)
        ema.attach(run.optimizer)
        run.train(4)
        for which in (0, 1):
            got, want = ema.metrics(which), relative(run, ema, which)
            assert json.loads(json.dumps(got)) == got, "plain numbers"
            if dist.get_rank() == 0:
                assert math.isclose(got["distance"], want, rel_tol=1e-9), (kind, which, got, want)
            assert got["distance"] > 0
            assert got["replicas_agree"] is True, kind
        if copied is not None:
            flipped(ema, copied, dist.get_rank())
            assert ema.metrics()["replicas_agree"] is False, (kind, "seen by every rank")
            flipped(ema, copied, -dist.get_rank())
            assert ema.metrics()["replicas_agree"] is True
        sent: list[str] = []
        with Collectives() as collectives, counted(sent):
            ema.metrics()
            ema.metrics(distance=False)
        assert (collectives.count, sent) == (0, ["metrics"]), "one message for all of it"
        with ema.swap():
            with raises(RuntimeError, "ema.metrics() inside ema.swap()", "distance=False"):
                ema.metrics()
            assert "distance" not in ema.metrics(distance=False)
        assert ema.metrics(0)["distance"] == got["distance"] or which, (
            "the swap left nothing behind"
        )
    alone(ema)


def alone(ema: EMA) -> None:
    """Called by the first rank only: local without the distance, and named with it."""
    ema.timeout = 0.5
    if dist.get_rank() == 0:
        assert ema.metrics(distance=False)["updates"] == 4
        with raises(RuntimeError, "ema.metrics() is collective, and rank 1 did not enter it"):
            ema.metrics()


class counted:  # noqa: N801
    """The verbs of the messages that are exchanged while the block runs."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __enter__(self) -> None:
        self._kept: Callable[..., Any] = StoreCoordinator._next

        def numbered(board: StoreCoordinator, verb: str, *args: Any, **kwargs: Any) -> Any:
            self._seen.append(verb)
            return self._kept(board, verb, *args, **kwargs)

        StoreCoordinator._next = numbered  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        StoreCoordinator._next = self._kept  # type: ignore[method-assign]


@pytest.mark.multirank
def test_over_ranks() -> None:
    run_ranks(2, ranks)


# --- in one process -------------------------------------------------------------------------------


def test_distance_of_awkward_models() -> None:
    """Complex, double and empty weights, more than one chunk, zeros, and nan; live is only read."""
    model = nn.Module()
    torch.manual_seed(0)
    for name, value in {
        "long": torch.randn(1 << 20) + 3,
        "longer": torch.randn((1 << 20) + 7, dtype=torch.float64),
        "complex": torch.randn(5, 3, dtype=torch.complex64),
        "empty": torch.empty(0, 4),
        "short": torch.randn(9).to(torch.bfloat16),
    }.items():
        setattr(model, name, nn.Parameter(value))
    ema = EMA(model, 0.75)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    apart = math.sqrt(
        sum((live[n] - before[n]).to(torch.complex128).abs().square().sum().item() for n in live)
    )
    whole = math.sqrt(sum(live[n].to(torch.complex128).abs().square().sum().item() for n in live))
    assert math.isclose(ema.metrics()["distance"], apart / whole, rel_tol=1e-6)
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters()), (
        "live was only read"
    )
    with torch.no_grad():
        model.short[3] = math.nan
    assert math.isnan(ema.metrics()["distance"])
    zeros = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(zeros.weight)
    ema = EMA(zeros, 0.5)
    assert ema.metrics()["distance"] == 0
    ema.weights.averages[0].averaged[0].shadow.fill_(1.0)
    assert ema.metrics()["distance"] == math.inf


def test_no_distance_before_the_start() -> None:
    """Until averaging begins the average is the live model, whatever the shadows hold."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, start=2)
    for want in (False, False, True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert (ema.metrics()["distance"] > 0) == want


def test_small_tensors_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 small weights are few chunks, and no chunk is long. Guards `_batches`."""
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(1000)) for _ in range(40)] + [nn.Parameter(torch.randn(7000))]
    )
    ema = EMA(model, 0.5)
    monkeypatch.setattr(metrics, "WINDOW", 3000)
    slots = ema.weights.averages[0].averaged
    sizes = [len(live) for live, _ in metrics.batches([(slot.live, slot.shadow) for slot in slots])]
    assert sizes == [3000] * 13 + [1000, 3000, 3000, 1000]


# --- times ----------------------------------------------------------------------------------------


class At:
    """A point in time of the device; it has passed when the host has seen as much."""

    def __init__(self, streams: Streams, at: float) -> None:
        self._streams, self.at = streams, at

    def query(self) -> bool:
        return self.at <= self._streams.seen

    def elapsed_time(self, end: At) -> float:
        assert self.query()
        assert end.query(), "elapsed_time() of an event that has not passed raises"
        return end.at - self.at


class Streams:
    """A device with two streams, on which an update takes 5 ms. Nothing in here waits."""

    def __init__(self) -> None:
        self.compute = self.side = self.seen = 0.0
        self._inside: list[float] = []

    def submit(self, work: Callable[[], None]) -> At:
        start = max(self.compute, self.side)
        self._inside, self.side = [start, start + 5], start + 5
        work()
        assert not self._inside, "one mark before the update, one behind it"
        return At(self, self.side)

    def wait(self, ticket: At) -> None:
        self.compute = max(self.compute, ticket.at)

    def done(self, ticket: At) -> bool:
        return ticket.query()

    def keep(self, tensors: Any) -> None:
        """Nothing is freed here."""

    def mark(self) -> At:
        return At(self, self._inside.pop(0) if self._inside else self.compute)


def test_times_of_a_side_stream() -> None:
    """A step of 3 ms hides 3 of the 5 ms; what has not passed is not known, and never waited
    for.
    """
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    streams = Streams()
    ema.weights.updates.engine = Overlapped(streams)
    for step in range(4):
        streams.compute += 3
        model.weight.grad = torch.ones(2, 2)
        optimizer.step()
        known = ema.metrics(distance=False)
        assert (known["update_ms"], known["stall_ms"], known["lag"]) == (0, 0, step + 1)
    assert streams.compute == 3 + 3 * 5
    with ema.swap():
        pass
    ema.weights.before_step()  # the swap waited for the last update, so that this step need not
    ema.weights.before_step()  # and no update came since
    streams.seen = 14
    known = ema.metrics(distance=False)
    assert (known["update_ms"], known["stall_ms"], known["lag"]) == (5, 2, 2)
    streams.seen = 100
    known = ema.metrics(distance=False)
    assert (known["update_ms"], known["stall_ms"], known["lag"]) == (5, 0, 0)


def test_a_stall_is_timed_once() -> None:
    """Steps without an update, as between two of every=2, do not make the last one's stall 0."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    streams = Streams()
    engine = ema.weights.updates.engine = Overlapped(streams)
    ema.weights.move(1.0)
    for _ in range(3):
        engine.fence()
    streams.seen = 100
    assert ema.metrics(distance=False)["stall_ms"] == 5


def test_times_of_the_others() -> None:
    """Inline the step waits for all of it; a host thread adds the copy to it and averages behind
    it.
    """
    for device in (None, "cpu"):
        model = nn.Linear(300, 300)
        ema = EMA(model, 0.5, device=device)
        first = ema.metrics()
        assert (first["update_ms"], first["stall_ms"], first["lag"], first["skipped"]) == (
            0,
            0,
            0,
            0,
        )
        ema.update()
        ema.weights.settle()
        known = ema.metrics()
        assert known["update_ms"] > 0
        assert known["stall_ms"] > 0
        assert (known["stall_ms"] == known["update_ms"]) == (device is None)
        assert known["lag"] == 0
        assert known["bytes"] == 4 * 300 * 301
        assert known["pinned"] == (0 if device is None else 4 * 300 * 301 + 4)


def test_the_distance_settles() -> None:
    """It is that of the average after the last update, and of the weights where they are now.

    Guards settle and follow.
    """
    for engine in (
        lambda: None,
        lambda: Overlapped(Held()),
        lambda: HostThread(None, Held()),
        lambda: HostThread(Held(moves=True), Held()),
    ):
        model = nn.Linear(2, 2, bias=False)
        nn.init.ones_(model.weight)
        ema = EMA(model, 0.5)
        ema.weights.updates.engine = engine() or ema.weights.updates.engine
        with torch.no_grad():
            model.weight.fill_(3.0)
        ema.weights.move(1.0)
        assert ema.metrics()["distance"] == 1 / 3
        model.weight.data = torch.full((2, 2), 4.0)
        assert ema.metrics()["distance"] == 2 / 4


def test_lag_of_a_host_thread() -> None:
    """An update that the thread has not done yet."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    late = Held()
    ema.weights.updates.engine = HostThread(None, late)
    ema.update()
    assert ema.metrics(distance=False)["lag"] == 1
    assert ema.metrics(distance=False)["update_ms"] == 0
    late.wait("ticket")
    assert ema.metrics(distance=False)["lag"] == 0


class Held:
    """A worker that works when it is waited for; moves: or after it was asked."""

    def __init__(self, moves: bool = False) -> None:
        self._work: list[Callable[[], None]] = []
        self.moves = moves

    def submit(self, work: Callable[[], None]) -> str:
        self._work.append(work)
        return "ticket"

    def wait(self, ticket: str) -> None:
        while self._work:
            self._work.pop(0)()

    def done(self, ticket: str) -> bool:
        busy = bool(self._work)
        if self.moves:
            self.wait(ticket)
        return not busy

    def keep(self, tensors: Any) -> None:
        """Host memory."""

    def mark(self) -> Instant:
        return Instant()


def test_averaged_buffers_are_in_the_times() -> None:
    """They are averaged in the step, whatever the engine hides."""
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.5, buffers="average")
    ema.weights.updates.engine = Overlapped(Streams())
    ema.update()
    known = ema.metrics(distance=False)
    assert 0 < known["stall_ms"] == known["update_ms"]


def test_a_meter_that_is_not_read() -> None:
    """It keeps the last intervals only, and goes on when it is read."""
    streams, meter = Streams(), Meter()
    streams.seen = 1e9
    for i in range(3 * UNREAD):
        meter.add(At(streams, 0), At(streams, i))
    assert len(meter.intervals) == UNREAD
    assert meter.read() == 3 * UNREAD - 1
    assert meter.read() == 3 * UNREAD - 1
    assert not meter.intervals


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_metrics_leave_everything_as_it_was() -> None:
    model = nn.Linear(3, 3)
    ema = EMA(model, 0.5)
    ema.update()
    shadow = ema.weights.averages[0].averaged[0].shadow
    live, average, clock = (
        model.weight.detach().clone(),
        shadow.clone(),
        ema.weights.clock.to_dict(),
    )
    with torch.inference_mode():
        ema.metrics()
    assert same_bits(live, model.weight.detach())
    assert same_bits(average, shadow)
    assert ema.weights.clock.to_dict() == clock
    ema.update()
