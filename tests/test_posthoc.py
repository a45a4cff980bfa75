"""Choosing the decay after training: profiles, the fit, snapshots, and what is written.

How to read a failure: `recursion` is the oracle of profiles, 10 lines that replay every update;
`dense` the oracle of the fit, which solves the constrained problem on the whole matrix by Lagrange
multipliers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_ema import (
    EMA,
    Constant,
    Cosine,
    Debiased,
    HalfLife,
    Power,
    Ramp,
    Ratio,
    Schedule,
    Uniform,
    Warmup,
    load_file,
)
from dist_ema.cli import main
from dist_ema.posthoc import profiles, snapshots
from dist_ema.posthoc.profiles import Mixer, Profile, coefficients
from tests._models import Tied
from tests._ranks import run_ranks
from tests._wrappers import wrap
from tests.conftest import Call
from tests.ema_json import stamped

GOLDEN = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())
ANY = [
    Constant(0.9), Constant(1.0), HalfLife(30), Warmup(0.99), Ratio(0.97), Ramp(0.99, tau=20),
    Power(sigma_rel=0.1), Power(gamma=2.5, origin="training"), Cosine(0.9, total=200), Uniform(),
    Debiased(0.95), Constant(0.0),
]  # fmt: skip
TWO = (Power(sigma_rel=0.05), Power(sigma_rel=0.10))


def recursion(of: Schedule, updates: int, elapsed: float = 1.0, before: float = 0.0) -> np.ndarray:
    """What every update weighs, the start first."""
    shares = np.zeros(updates + 1)
    shares[0] = 1.0
    for i in range(1, updates + 1):
        now = i * elapsed + (before if of.origin == "training" else 0.0)
        decay = of(now, elapsed)
        shares *= decay
        shares[i] = 1 - decay
    return shares


def stored(
    schedules: Any = TWO, count: int = 32, each: int = 20, elapsed: float = 1.0, before: float = 0.0
) -> list[Profile]:
    return [
        Profile(of, k * each * elapsed, k * each, before)
        for k in range(1, count + 1)
        for of in schedules
    ]


def matrix(some: list[Profile], elapsed: float = 1.0) -> np.ndarray:
    rows = max(each.updates for each in some) + 1
    columns = [recursion(each.schedule, each.updates, elapsed, each.before) for each in some]
    return np.stack([np.pad(column, (0, rows - len(column))) for column in columns], axis=1)


def dense(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """min |Wx - t| with sum(x) = 1, by Lagrange multipliers."""
    n = columns.shape[1]
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[:n, n], system[n, :n] = columns.T @ columns, 1.0, 1.0
    return np.linalg.solve(system, np.append(columns.T @ target, 1.0))[:n]


def inner_product(a: float, end_a: float, b: float, end_b: float) -> float:
    """The integral of two profiles t^a on [0, end_a] and t^b on [0, end_b], each scaled to area 1.

    Karras et al. 2023, appendix C: (a+1)(b+1) / (a+b+1) / later * (earlier / later)^(exponent of
    the later one).
    """
    if end_a > end_b:
        return inner_product(b, end_b, a, end_a)
    return (a + 1) * (b + 1) / (a + b + 1) / end_b * (end_a / end_b) ** b


# --- profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ANY, ids=repr)
@pytest.mark.parametrize(("elapsed", "before"), [(1.0, 0.0), (3.0, 0.0), (1.0, 40.0)])
def test_profile(of: Schedule, elapsed: float, before: float) -> None:
    """Every schedule, every=3 and a late start included, is what replaying its updates gives."""
    mixer = Mixer([Profile(of, 90 * elapsed, 90, before), Profile(of, 200 * elapsed, 200, before)])
    fit = mixer.fit(of)
    clock, wanted, mixed = mixer.shape(of, fit, points=200)
    assert clock.tolist() == [i * elapsed for i in range(1, 201)]
    assert wanted == pytest.approx(recursion(of, 200, elapsed, before)[1:], abs=1e-13)
    assert mixed == pytest.approx(wanted, abs=1e-12)


def test_inner_product() -> None:
    """The closed form of the paper: as the golden file has it, as an integral, and as the limit of
    what is stored.
    """
    assert "(g_i+1)(g_j+1)(t_i/t_j)^e / ((g_i+g_j+1) max(t_i,t_j))" in GOLDEN["post_hoc"]
    for (a, s), (b, t) in (
        ((17.0, 3.0), (7.0, 5.0)),
        ((7.0, 5.0), (17.0, 3.0)),
        ((0.5, 2.0), (0.5, 2.0)),
    ):
        golden = (a + 1) * (b + 1) * (s / t) ** (b if s < t else -a) / ((a + b + 1) * max(s, t))
        clock = (np.arange(400_000) + 0.5) / 400_000 * min(s, t)
        integral = np.mean(
            (a + 1) * clock**a / s ** (a + 1) * (b + 1) * clock**b / t ** (b + 1)
        ) * min(s, t)
        assert inner_product(a, s, b, t) == pytest.approx(golden, rel=1e-13)
        assert inner_product(a, s, b, t) == pytest.approx(integral, rel=1e-8)
    steps, one, two = 4000, *TWO
    discrete = recursion(one, steps)[: steps // 2 + 1] * 0 + recursion(one, steps // 2)
    product = float(discrete @ recursion(two, steps)[: steps // 2 + 1])
    assert product == pytest.approx(
        inner_product(one.exponent, steps / 2, two.exponent, steps), rel=1e-4
    )


@pytest.mark.parametrize(
    "target", [*TWO, Power(sigma_rel=0.07), Power(gamma=0), Constant(0.99), Uniform()], ids=repr
)
def test_fit(target: Schedule) -> None:
    """The streaming solution is that of the whole matrix; a stored profile comes out with weight 1,
    alone.
    """
    some = stored(count=8, each=25)
    fit, columns = coefficients(some, target), matrix(some)
    wanted = recursion(target, 200)
    assert fit.weights == pytest.approx(dense(columns, wanted), abs=1e-9)
    assert sum(fit.weights) == pytest.approx(1, abs=1e-14)
    assert fit.residual == pytest.approx(
        np.linalg.norm(columns @ fit.weights - wanted) / np.linalg.norm(wanted), abs=1e-12
    )
    assert fit.condition == pytest.approx(
        np.linalg.cond(columns / np.linalg.norm(columns, axis=0)), rel=1e-6
    )
    assert (fit.largest, fit.gain) == (
        np.abs(fit.weights).max(),
        pytest.approx(np.linalg.norm(fit.weights)),
    )
    if target in TWO:
        alone = np.zeros(16)
        alone[14 + TWO.index(target)] = 1.0
        assert fit.weights == pytest.approx(alone, abs=1e-10)


def test_paper() -> None:
    """The paper's solution, from integrals: of a long run the discrete one is the same, and only
    its sum is not held to 1.
    """
    some = stored(count=12, each=2000)
    ends = [(each.schedule.exponent, each.now) for each in some]  # type: ignore[attr-defined]
    target = (Power(sigma_rel=0.08).exponent, 24000.0)
    a = np.array([[inner_product(*i, *j) for j in ends] for i in ends])
    b = np.array([inner_product(*i, *target) for i in ends])
    paper = np.linalg.solve(a, b)
    fit = coefficients(some, Power(sigma_rel=0.08))
    assert abs(sum(paper) - 1) < 1e-3
    assert fit.weights == pytest.approx(paper, abs=2e-3)


@pytest.mark.parametrize(
    "of", [Constant(0.99), Power(gamma=3, origin="training"), Warmup(0.98)], ids=repr
)
def test_start(of: Schedule) -> None:
    """Schedules that keep a share of the start: profiles and mixtures sum to 1 with it, so a frozen
    weight stays itself.
    """
    some = stored([of, Constant(0.97)], count=6, each=10, before=30)
    columns, target = matrix(some), Constant(0.98)
    fit = coefficients(some, target)
    assert columns[0].max() > 1e-3
    assert (columns @ fit.weights).sum() == pytest.approx(1, abs=1e-12)
    assert fit.weights == pytest.approx(dense(columns, recursion(target, 60, 1.0, 30)), abs=1e-6)


@pytest.mark.parametrize(
    "of", [Constant(0.9), Power(sigma_rel=0.1), Power(gamma=3, origin="training")], ids=repr
)
def test_nothing_yet(of: Schedule) -> None:
    """A snapshot from before the first update is the start alone."""
    some = [Profile(of, 0, 0, 20), *stored([of, Constant(0.8)], count=3, each=10, before=20)]
    fit = coefficients(some, Constant(0.95))
    assert fit.weights == pytest.approx(
        dense(matrix(some), recursion(Constant(0.95), 30, 1.0, 20)), abs=1e-8
    )


def test_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many updates share cells: what is in the span stays exact, and the rest moves by less than
    the cells are wide.
    """
    some = stored(count=8, each=125)
    exact = {target: coefficients(some, target) for target in (TWO[0], Power(sigma_rel=0.08))}
    monkeypatch.setattr(profiles, "MOST_CELLS", 130)
    line = profiles.Timeline([(each.now, each.updates) for each in some])
    assert set(line.widths[1:].tolist()) == {8.0, 5.0}
    assert {each.now for each in some} <= set(line.edges.tolist())
    cell = np.searchsorted(line.edges, np.arange(1001))
    merged = [
        np.bincount(cell, column) / np.sqrt(line.widths)
        for column in (*matrix(some).T, recursion(Power(gamma=0.2), 1000))
    ]
    assert coefficients(some, Power(gamma=0.2)).weights == pytest.approx(
        dense(np.stack(merged[:-1], 1), merged[-1]), abs=1e-9
    )
    for target, fit in exact.items():
        coarse = coefficients(some, target)
        assert coarse.weights == pytest.approx(fit.weights, abs=5e-3)
        assert (coarse.residual < 1e-13) == (target in TWO)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triangle grows chunk by chunk; where the chunks end does not matter."""
    whole = coefficients(stored(), Power(sigma_rel=0.12))
    monkeypatch.setattr(profiles, "MOST_AT_ONCE", 37)
    assert coefficients(stored(), Power(sigma_rel=0.12)).weights == pytest.approx(
        whole.weights, abs=1e-11
    )


def test_at() -> None:
    """An earlier moment: later snapshots get no weight, and a moment between two updates is that of
    the earlier one.
    """
    some = stored(count=8, each=25)
    assert coefficients(some, TWO[1], at=100).weights == pytest.approx(
        [float(i == 7) for i in range(16)], abs=1e-10
    )
    mixer = Mixer(some, 110.7)
    assert (mixer.now, mixer.updates) == (110.0, 110)
    assert mixer.fit(TWO[0]).weights[8:] == (0.0,) * 8
    assert mixer.fit(TWO[0]).residual > 0.1
    for at, words in (
        (0.4, "before the first update, which was at 1"),
        (201, "beyond the last snapshot, .* at 200"),
        (5, "until 5; .* of 25"),
    ):
        with pytest.raises(ValueError, match=words):
            Mixer(some, at)


def test_not_one_run() -> None:
    """Clocks that contradict each other."""
    for odd, words in (
        ([Profile(TWO[0], 30, 60)], "not of one run"),
        ([Profile(TWO[0], 30, 20)], "not of one run"),
        ([Profile(TWO[0], 30, 30, 5)], r"different moments \(0, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            coefficients([*stored(count=2), *odd], TWO[0])
    with pytest.raises(ValueError, match="without a single update"):
        coefficients([Profile(TWO[0], 0, 0)], TWO[0])
    for now, updates in ((5, 0), (-5, 5), (float("nan"), 5), (float("inf"), 5)):
        with pytest.raises(ValueError, match="must count up from 0"):
            Profile(TWO[0], now, updates)
    with pytest.raises(ValueError, match="decay must be a float or a schedule"):
        coefficients(stored(count=2), "0.9")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="Use HalfLife"
    ):  # a schedule that cannot be used: half steps
        coefficients([Profile(Ratio(), 5, 10), Profile(Ratio(), 10, 20)], TWO[0])


# --- snapshots ------------------------------------------------------------------------------------


class Small(Tied):
    """And a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def train(
    out: Path | None,
    steps: int = 200,
    tracked: Any = (),
    *,
    every: float = 10,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, EMA, EMA]:
    """A noisy run; the EMA that is stored, and one that tracks."""
    torch.manual_seed(0)
    model = model or Small()
    dtype = options.pop("dtype", None)
    ema, beside = EMA(model, TWO), EMA(model, tracked or [Uniform()])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ema.attach(optimizer, **options)
    beside.attach(optimizer, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.arange(7)) - torch.randn(7, 7)).square().mean().backward()
        optimizer.step()
        if out is not None:
            ema.snapshot(out, every=every, dtype=dtype)
    return model, ema, beside


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[float, dict[str, torch.Tensor]], nn.Module]:
    """20 snapshots of 200 steps, and what was tracked meanwhile."""
    out, sigmas = tmp_path_factory.mktemp("run") / "snapshots", [0.05, 0.07, 0.12]
    model, _, beside = train(out, tracked=[Power(sigma_rel=sigma) for sigma in sigmas])
    return out, {sigma: beside.gather(i) for i, sigma in enumerate(sigmas)}, model


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Any) -> float:
    """|a - b| / |b|, of all these weights together."""
    apart, size = (
        sum(float(each[name].double().square().sum()) for name in names)
        for each in (minus(a, b), b)
    )
    return float((apart / size) ** 0.5)


def minus(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: a[name].double() - b[name].double() for name in b}


def test_reconstruct(run: Any, tmp_path: Path) -> None:
    """Mixed is what was tracked, weight by weight; the rest comes from the newest snapshot; every
    name is back.
    """
    out, tracked, model = run
    for sigma, wanted in tracked.items():
        fit = snapshots.reconstruct(out, tmp_path / str(sigma), sigma_rel=sigma)
        mixed = load_file(tmp_path / str(sigma))
        assert far(mixed, wanted, ["emb.weight", "norm.weight", "norm.bias", "scale"]) < (
            1e-6 if sigma == 0.05 else 1e-3
        )
        for name in ("norm.running_mean", "norm.num_batches_tracked", "frozen"):
            assert torch.equal(mixed[name], model.state_dict()[name])
        Small().load_state_dict(mixed)
        assert mixed["scale"].shape == ()
        meta = json.loads((tmp_path / str(sigma) / "ema.json").read_text())
        assert meta["schedules"] == [Power(sigma_rel=sigma).to_dict()]
        assert (meta["kind"], meta["clock"]["now"], meta["averaged"]) == (
            "export",
            200,
            sorted(["emb.weight", "norm.weight", "norm.bias", "scale"]),
        )
        assert sum(meta["extra"]["reconstruct"]["weights"].values()) == pytest.approx(1)
        assert meta["extra"]["reconstruct"]["residual"] == fit.residual


def test_window(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that end inside weights give the same bytes."""
    snapshots.reconstruct(run[0], tmp_path / "a", sigma_rel=0.07)
    monkeypatch.setattr("dist_ema.offline.blend.WINDOW", 5)
    monkeypatch.setattr("dist_ema.offline.blend.STEP", 3)
    snapshots.reconstruct(run[0], tmp_path / "b.safetensors", sigma_rel=0.07)
    one, two = load_file(tmp_path / "a"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_damaged(run: Any, tmp_path: Path) -> None:
    """One bit of either profile's file: nothing is made of it."""
    for profile in ("", "averages/1-Power"):
        shutil.copytree(run[0], there := tmp_path / f"of {Path(profile).name}")
        file = sorted(there.iterdir())[-1] / profile / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its CRC-32"):
            snapshots.reconstruct(there, tmp_path / "out", sigma_rel=0.08)
        assert not (tmp_path / "out").exists()


def test_at_a_snapshot(run: Any, tmp_path: Path) -> None:
    """A stored profile at a stored moment is that snapshot, bit for bit, buffers included."""
    snapshots.reconstruct(run[0], tmp_path / "out", sigma_rel=0.05, at=120)
    mixed, snapshot = load_file(tmp_path / "out"), load_file(run[0] / "0000000120")
    assert all(torch.equal(mixed[name], weight) for name, weight in snapshot.items())


@pytest.mark.parametrize(
    "options",
    [{"every": 3}, {"elapsed": 16.0}, {"start": 40}, {"start": 40, "every": 3, "elapsed": 0.5}],
    ids=str,
)
def test_attached(options: dict[str, Any], tmp_path: Path) -> None:
    """Every-N, images and a late start: the clock in ema.json tells enough to find the profile."""
    size = options.get("elapsed", 1.0)
    ema, beside = attached(tmp_path, options, size)
    fit = snapshots.reconstruct(tmp_path / "snapshots", tmp_path / "out", sigma_rel=0.08)
    moment = snapshots.Snapshots(tmp_path / "snapshots").moment()
    assert moment == (ema.now, ema.metrics()["updates"])
    assert fit.residual < 0.01
    assert far(load_file(tmp_path / "out"), beside.gather(), ["emb.weight", "scale"]) < 1e-3


def attached(path: Path, options: dict[str, Any], size: float) -> Any:
    model = Small()
    torch.manual_seed(1)
    ema, beside = EMA(model, TWO), EMA(model, Power(sigma_rel=0.08))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for each in (ema, beside):
        each.attach(optimizer, **options)
    for _ in range(240 + options.get("start", 0)):
        optimizer.zero_grad()
        (model(torch.arange(7)) - torch.randn(7, 7)).square().mean().backward()
        optimizer.step()
        ema.snapshot(path / "snapshots", every=12 * size)
    return ema, beside


def test_compact(tmp_path: Path) -> None:
    """bf16 snapshots: half the size, errors of bf16, and a start without a clock, not something to
    resume from.
    """
    _, ema, beside = train(tmp_path / "s", dtype=torch.bfloat16, tracked=[Power(sigma_rel=0.07)])
    fit = snapshots.reconstruct(tmp_path / "s", tmp_path / "out", sigma_rel=0.07)
    error = far(load_file(tmp_path / "out"), beside.gather(), ["emb.weight", "norm.weight"])
    assert 1e-5 < error < 2**-8 * fit.gain
    assert load_file(tmp_path / "out")["emb.weight"].dtype == torch.float32  # the model's own
    with pytest.warns(UserWarning, match="is an export: the average starts from it"):
        ema.load(tmp_path / "s" / "0000000200")
    assert ema.now == 0


def test_compact_float8(tmp_path: Path) -> None:
    """Frozen float8 weights are wider in a bf16 snapshot, and their own dtype again in the mixture,
    bit for bit.
    """
    model = nn.Linear(2, 2)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        frozen = torch.randn(8).to(kind)
        model.register_parameter(
            str(kind).removeprefix("torch."), nn.Parameter(frozen, requires_grad=False)
        )
    ema = EMA(model, TWO)
    for _ in range(8):
        ema.update()
        ema.snapshot(tmp_path / "s", every=2, dtype=torch.bfloat16)
    snapshots.reconstruct(tmp_path / "s", tmp_path / "out", sigma_rel=0.09)
    mixed = load_file(tmp_path / "out")
    for name in ("float8_e4m3fn", "float8_e5m2"):
        frozen = getattr(model, name)
        assert mixed[name].dtype == frozen.dtype
        assert torch.equal(mixed[name].view(torch.uint8), frozen.detach().view(torch.uint8))


def test_due(tmp_path: Path) -> None:
    """When the clock passes a multiple: once, whatever the steps, and never before averaging
    began.
    """
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    assert ema.snapshot(tmp_path / "s", every=10) is None
    names = []
    for elapsed in (4, 4, 4, 18, 1, 40, 0.5):
        ema.update(elapsed)
        path = ema.snapshot(tmp_path / "s", every=10)
        assert ema.snapshot(tmp_path / "s", every=10) is None  # the clock stands
        names.append(path and path.name)
    assert names == [None, None, "0000000012", "0000000030", None, "0000000071", None]
    assert sorted(each.name for each in (tmp_path / "s").iterdir()) == [
        name for name in names if name
    ]
    assert ema.snapshot(tmp_path / "other", every=1) is None  # whole units are passed, not halves
    ema.update()
    assert ema.snapshot(tmp_path / "other", every=1) is not None
    with pytest.raises(ValueError, match="every must be positive"):
        ema.snapshot(tmp_path, every=0)
    late = EMA(model, TWO)
    late.update(15)
    with pytest.warns(
        UserWarning,
        match=r"later clock \(0000000030 ...\). If they are of another run, move them away",
    ):
        late.snapshot(tmp_path / "s", every=10)


@pytest.mark.parametrize(
    ("elapsed", "every", "names"),
    [
        (0.25, 0.5, ["0000000000.5", "0000000001", "0000000001.5", "0000000002"]),
        (0.1, 1, ["0000000001", "0000000002"]),
        (4e9, 8e9, [f"{8 * k}000000000" for k in range(1, 11)]),
    ],
)
def test_clocks_of_epochs_and_of_tokens(
    elapsed: float, every: float, names: list[str], tmp_path: Path
) -> None:
    """Every snapshot has a name, and more digits are no earlier clock."""
    ema = EMA(nn.Linear(2, 2), TWO)
    for _ in range(8 if elapsed == 0.25 else 20):
        ema.update(elapsed)
        ema.snapshot(tmp_path, every=every)
    assert [
        path.name for path in sorted(tmp_path.iterdir(), key=lambda at: float(at.name))
    ] == names


def test_leftovers(tmp_path: Path) -> None:
    """What a killed snapshot left is removed by a later one, unless that is of an earlier clock."""
    for clock in ("0000000005", "0000000009.75", "0000000015"):
        (tmp_path / f".{clock}.tmp-{'0' * 32}").mkdir()
    ema = EMA(nn.Linear(2, 2), TWO)
    ema.update(10)
    ema.snapshot(tmp_path, every=10)
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == [f".0000000015.tmp-{'0' * 32}", "0000000010"]


def test_more_averages_than_updates(tmp_path: Path) -> None:
    """Their profiles depend on each other; ema.json holds a finite condition."""
    ema = EMA(nn.Linear(2, 2), TWO)
    for _ in range(2):
        ema.update(100)
        ema.snapshot(tmp_path / "s", every=100)
    fit = snapshots.reconstruct(tmp_path / "s", tmp_path / "out", sigma_rel=0.07)
    assert fit.condition == pytest.approx(2**52)


def test_resumed(tmp_path: Path) -> None:
    """A run cut short and resumed stores the same sequence, with no snapshot of its own at the
    seam.
    """
    model = nn.Linear(2, 2)
    for name, cut in (("whole", 0), ("cut", 25)):
        ema = EMA(model, TWO)
        for step in range(1, 61):
            if step == cut:
                ema.save(tmp_path / "saved")
                ema = EMA(model, TWO)
                ema.load(tmp_path / "saved")
                assert ema.snapshot(tmp_path / name, every=10) is None
            ema.update()
            ema.snapshot(tmp_path / name, every=10)
    whole, cut_short = (
        sorted(each.name for each in (tmp_path / name).iterdir()) for name in ("whole", "cut")
    )
    assert whole == cut_short == [f"{10 * i:010}" for i in range(1, 7)]


def _collective(folder: str) -> list[str]:
    """On 2 ranks: DDP and FSDP2 snapshots, then one mixture of each."""
    import torch.distributed as dist

    out = []
    for kind in ("ddp", "fsdp2"):
        torch.manual_seed(3)
        model: Any = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        model = wrap(kind, model)
        ema = EMA(model, TWO)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema.attach(optimizer)
        paths = []
        for step in range(20):
            optimizer.zero_grad()
            model(torch.full((4, 5), float(step % 3))).square().mean().backward()
            optimizer.step()
            paths.append(ema.snapshot(Path(folder) / kind, every=4))
        assert [path is not None for path in paths] == [(step + 1) % 4 == 0 for step in range(20)]
        out.append(kind)
        dist.barrier()
    return out


@pytest.mark.multirank
def test_ranks(tmp_path: Path) -> None:
    """All ranks save when due, without asking each other; sharded and replicated snapshots mix
    alike.
    """
    assert run_ranks(2, _collective, str(tmp_path)) == [["ddp", "fsdp2"]] * 2
    for kind in ("ddp", "fsdp2"):
        assert len(list((tmp_path / kind).iterdir())) == 5
        snapshots.reconstruct(tmp_path / kind, tmp_path / f"{kind}-out", sigma_rel=0.08)
    one, two = load_file(tmp_path / "ddp-out"), load_file(tmp_path / "fsdp2-out")
    assert all(torch.allclose(one[name], two[name], rtol=1e-5) for name in one)


def test_only(tmp_path: Path) -> None:
    """`only=`: snapshots hold what is averaged, and so does the mixture."""
    model = Small()
    ema = EMA(model, TWO, only="emb")
    for _ in range(8):
        ema.update()
        ema.snapshot(tmp_path / "s", every=2)
    snapshots.reconstruct(tmp_path / "s", tmp_path / "out", sigma_rel=0.09)
    mixed = load_file(tmp_path / "out")
    for folder in (tmp_path / "s" / "0000000008", tmp_path / "out"):
        assert json.loads((folder / "ema.json").read_text())["weights"] == "averaged"
    assert set(mixed) == {"emb.weight", "head.weight"}
    assert torch.allclose(mixed["emb.weight"], model.emb.weight)


def test_eleven_averages(tmp_path: Path) -> None:
    """averages/10-Power is the eleventh, not the second."""
    model, widths = nn.Linear(3, 3), [0.05 + 0.015 * i for i in range(12)]
    ema = EMA(model, [Power(sigma_rel=width) for width in widths])
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update()
        ema.snapshot(tmp_path / "s", every=6)
    found = snapshots.Snapshots(tmp_path / "s").stored
    for i, width in enumerate(widths):
        mine = next(
            each
            for each in found
            if each.profile.schedule == Power(sigma_rel=width) and each.profile.now == 12
        )
        weight = load_file(mine.files / "model.safetensors")["weight"]
        assert torch.allclose(weight, ema.gather(i)["weight"])


def test_equal_profiles_share(tmp_path: Path) -> None:
    """Two saves of one moment, without a third: what tells them apart is rounding noise."""
    profile = Profile(Power(sigma_rel=0.05), 100, 100)
    fit = coefficients([profile, profile], Power(sigma_rel=0.055))
    assert fit.weights == pytest.approx((0.5, 0.5))
    alone = coefficients([profile], Power(sigma_rel=0.055))
    assert fit.residual == pytest.approx(alone.residual)
    ema = EMA(nn.Linear(3, 3), Power(sigma_rel=0.05))
    for _ in range(100):
        ema.update()
    for name in "ab":
        ema.save(tmp_path / name)
    snapshots.reconstruct([tmp_path / "a", tmp_path / "b"], tmp_path / "out", sigma_rel=0.055)
    mixed, saved = load_file(tmp_path / "out"), load_file(tmp_path / "a")
    torch.testing.assert_close(mixed, saved)


def test_what_python_gives(run: Any, tmp_path: Path) -> None:
    """A dtype of torch, a number as the target, snapshots from a generator; no other dtype."""
    out, folders = tmp_path / "out", sorted(run[0].iterdir())
    fit = snapshots.reconstruct(
        (each for each in folders),
        out,
        target=0.98,
        dtype=torch.bfloat16,  # type: ignore[arg-type]
    )
    assert fit == snapshots.Snapshots(folders).fit(Constant(0.98))
    floats = filter(torch.is_floating_point, load_file(out).values())
    assert {value.dtype for value in floats} == {torch.bfloat16}
    for dtype in ("I64", "bf16"):
        with pytest.raises(ValueError, match=f"dtype must be one of F64, .*, got '{dtype}'"):
            snapshots.reconstruct(run[0], tmp_path / "other", sigma_rel=0.1, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refused(run: Any, tmp_path: Path) -> None:
    """Too few, mixed models, mixed runs, damage, and widths that the snapshots cannot express: by
    name, nothing written.
    """
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        snapshots.reconstruct(tmp_path / "nowhere", out, sigma_rel=0.1)
    with pytest.raises(
        ValueError, match="holds 0 stored averages; mixing takes at least 2. Store some with"
    ):
        snapshots.reconstruct(tmp_path, out, sigma_rel=0.1)
    with pytest.raises(ValueError, match="is a file"):
        snapshots.reconstruct(run[0] / "0000000010" / "ema.json", out, sigma_rel=0.1)
    for inside in (
        run[0] / "out",
        run[0] / "0000000190" / "out",
    ):  # the next reconstruct would mix it in
        with pytest.raises(ValueError, match="lies inside"):
            snapshots.reconstruct(run[0], inside, sigma_rel=0.1)
        assert main(["reconstruct", str(run[0]), str(inside), "--sigma-rel", "0.1"]) == 1
    with pytest.raises(ValueError, match="takes one of sigma_rel and target"):
        snapshots.reconstruct(run[0], out)
    with pytest.raises(ValueError, match=r"cannot be mixed .* misses \d\d% of its profile"):
        snapshots.reconstruct([run[0] / "0000000190", run[0] / "0000000200"], out, sigma_rel=0.2)
    other = EMA(nn.Linear(2, 2), TWO)
    for _ in range(210):
        other.update()
    other.save(tmp_path / "other")
    with pytest.raises(
        ValueError,
        match=r"do not average the same weights: bias, emb.weight, .* and 1 more only in one",
    ):
        snapshots.reconstruct([run[0], tmp_path / "other"], out, target=TWO[0])
    torch.manual_seed(0)
    wide = Small()
    wide.emb = nn.Embedding(7, 6)
    wide.head = wide.emb
    ema = EMA(wide, TWO)
    for _ in range(210):
        ema.update()
    ema.save(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"emb.weight is \[7, 4\] in .*, \[7, 6\] in .*wide"):
        snapshots.reconstruct([run[0], tmp_path / "wide"], out, target=Power(sigma_rel=0.08))
    late = EMA(begun := Small(), TWO)
    late.attach(torch.optim.SGD(begun.parameters(), 0.1), start=5)
    late.save(tmp_path / "late")
    with pytest.raises(ValueError, match="late cannot be used as a snapshot: .* had not started"):
        snapshots.Snapshots([run[0], tmp_path / "late"])
    meta = json.loads((tmp_path / "wide" / "ema.json").read_text())
    for key, value in (
        ("clock", {}),
        ("schedules", [{"name": "What"}, {}]),
        ("schedules", meta["schedules"][:1]),
        ("averaged", 3),
    ):
        (tmp_path / "wide" / "ema.json").write_bytes(stamped(meta | {key: value}))
        with pytest.raises(ValueError, match=f"wide/ema.json is damaged: {key}: "):
            snapshots.Snapshots([tmp_path / "wide", run[0]])
    assert not out.exists()


# --- the command ----------------------------------------------------------------------------------


def test_command(run: Any, tmp_path: Path, call: Call) -> None:
    """One width: the model, the report, and a second time only with --force."""
    code, out, err = call(
        "reconstruct", run[0], tmp_path / "out", "--sigma-rel", 0.07, "--dtype", "bf16"
    )
    assert (code, err) == (0, "")
    assert "40 stored averages, 20 moments from 10 to 200" in out
    assert "mixed as of 200, after 200 updates; weights sum to 1" in out
    assert load_file(tmp_path / "out")["emb.weight"].dtype == torch.bfloat16
    code, out, err = call("reconstruct", run[0], tmp_path / "out", "--sigma-rel", 0.07)
    assert (code, err.count("\n")) == (1, 1)
    assert "exists. Pass --force" in err
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert call("reconstruct", run[0], tmp_path / "link", "--sigma-rel", 0.07, "--force")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "out")["emb.weight"].dtype == torch.float32
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("| average | `Power(", "| clock | `now 200", "| mixed from | `"):
        assert said in card, said
    code, out, err = call("inspect", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "Power(" in out


def test_sweep(run: Any, tmp_path: Path, call: Call) -> None:
    """A model per width and a plot; JSON has the weights.

    Nothing is written if one of them is refused.
    """
    plot = tmp_path / "fit.png"
    code, out, _ = call(
        "reconstruct", run[0], tmp_path / "o", "--sweep", "0.05:0.09:0.02", "--json", "--plot", plot
    )
    assert code == 0
    assert sorted(each.name for each in (tmp_path / "o").iterdir()) == [
        "sigma-0.050",
        "sigma-0.070",
        "sigma-0.090",
    ]
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    made = json.loads(out)["mixtures"]
    assert [each["sigma_rel"] for each in made] == [0.05, 0.07, 0.09]
    assert made[0]["weights"]["0000000200"] == pytest.approx(1)
    assert far(load_file(made[1]["out"]), run[1][0.07], ["emb.weight"]) < 1e-3
    shutil.rmtree(tmp_path / "o" / "sigma-0.050")
    code, _, err = call("reconstruct", run[0], tmp_path / "o", "--sweep", "0.05:0.09:0.02")
    assert (code, "sigma-0.070 exists. Pass --force" in err) == (1, True)
    assert not (tmp_path / "o" / "sigma-0.050").exists()
    code, _, err = call("reconstruct", run[0], tmp_path / "p", "--sigma-rel", 0.05, "--at", 199)
    assert (code, "or mix as of 190, the snapshot before" in err) == (1, True)
    ends = [run[0] / "0000000190", run[0] / "0000000200"]
    (tmp_path / "few").mkdir()
    for each in ends:
        (tmp_path / "few" / each.name).symlink_to(each)
    code, _, err = call("reconstruct", tmp_path / "few", tmp_path / "p", "--sweep", "0.05:0.2:0.05")
    assert code == 1
    assert "cannot be mixed" in err
    assert not (tmp_path / "p").exists()


def test_poor(run: Any, tmp_path: Path, call: Call) -> None:
    """A width that is met badly is written, and said so; without OUT nothing is written at all."""
    code, out, err = call("reconstruct", run[0], "--sigma-rel", 0.02)
    assert code == 0
    assert "do not express sigma_rel 0.02 (" in err
    assert out.count("\n") == 11
    code, out, err = call("reconstruct", run[0], tmp_path / "out", "--sigma-rel", 0.02, "--at", 100)
    assert (code, (tmp_path / "out").is_dir()) == (0, True)
    assert "mixed as of 100" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["S", "O"], "one of the arguments --sigma-rel --sweep --curve is required"),
        (["S", "O", "--sigma-rel", "0.3"], "must be between 0 and 0.2887"),
        (["S", "O", "--sigma-rel", "nan"], "must be between 0 and 0.2887"),
        (["S", "O", "--sweep", "0.1:0.2"], "must be FROM:TO:STEP"),
        (["S", "O", "--sweep", "0.1:0.2:0"], "must go up"),
        (["S", "O", "--sweep", "0.1:0.05:0.01"], "must go up"),
        (["S", "O", "--sweep", "0.1:0.2:1e-9"], "must go up"),
        (["S", "O.safetensors", "--sweep", "0.1:0.2:0.05"], "OUT must be a folder"),
    ],
)
def test_usage(arguments: list[str], words: str, call: Call) -> None:
    code, out, err = call("reconstruct", *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_plot_refused(
    run: Any, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work: no PNG, no folder, no matplotlib."""
    for plot, words in (
        ("fit.pdf", "ends in .png"),
        (tmp_path / "no" / "fit.png", "there is no folder"),
    ):
        code, _, err = call(
            "reconstruct", run[0], tmp_path / "out", "--sigma-rel", 0.07, "--plot", plot
        )
        assert (code, words in err) == (1, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(
        "reconstruct", run[0], tmp_path / "out", "--sigma-rel", 0.07, "--plot", tmp_path / "fit.png"
    )
    assert (code, "pip install 'dist-ema[plot]'" in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_skipped(run: Any, tmp_path: Path, call: Call) -> None:
    """Updates that the device refused are spoken of."""
    for each in sorted(run[0].iterdir())[-4:]:
        (tmp_path / "s" / each.name).mkdir(parents=True)
        for inner in each.iterdir():
            (tmp_path / "s" / each.name / inner.name).symlink_to(inner)
        meta = json.loads((each / "ema.json").read_text())
        meta["clock"]["accepted"] -= 3
        (tmp_path / "s" / each.name / "ema.json").unlink()
        (tmp_path / "s" / each.name / "ema.json").write_bytes(stamped(meta))
    assert (
        "up to 3 updates were refused by the device"
        in call("reconstruct", tmp_path / "s", "--sigma-rel", 0.06)[2]
    )


# --- a real run -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """launch/sweep.py, and launch/train.py beside it."""
    folder = Path(__file__).parent.parent / "launch"
    loaded = {}
    for name in ("train", "sweep"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[name])
    return loaded["sweep"]


def test_digits(digits: ModuleType, tmp_path: Path) -> None:
    """2 stored profiles, 32 snapshots of a real run: what is mixed equals what was tracked to 1e-3,
    and is worth having.
    """
    sigmas = (0.03, 0.07, 0.12, 0.15, 0.20)
    trained = digits.train_and_store(tmp_path, epochs=10, seed=0, snapshots=32, tracked=sigmas)
    assert len(list(trained.snapshots.iterdir())) == 32
    live = digits.train.evaluate(trained.run)
    rows = digits.sweep(trained, tmp_path, [*sigmas, 0.05])
    assert {row["sigma_rel"]: row["distance"] for row in rows[:-1] if row["distance"] > 1e-3} == {}
    assert min(row["loss"] for row in rows) < live["loss"]
    assert digits.table(digits.mean([rows, rows])).count("\n") == 7


def test_what_a_sweep_removes(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs of an earlier sweep, and nothing else: --out may be any folder."""
    words = ["--out", str(tmp_path), "--seeds", "1", "--epochs", "1", "--snapshots", "1"]
    notes, other = tmp_path / "notes", tmp_path / "seed-7" / "theirs"
    other.parent.mkdir()
    for path in (notes, other):
        path.touch()
    with pytest.raises(SystemExit, match="2"):
        digits.main(words)
    assert f"--out {tmp_path} holds seed-7, but no sweep.json" in capsys.readouterr().err
    assert other.exists()
    (tmp_path / "sweep.json").touch()  # so it was one of ours
    assert digits.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes",
        "seed-0",
        "sweep.json",
        "sweep.png",
    }
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--seeds", "0"])
    assert (
        "argument --seeds: must be a whole number of 1 or more, got '0'" in capsys.readouterr().err
    )
