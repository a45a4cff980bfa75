"""The compiled passes of a CPU: the bits of eager torch, on any number of threads, and eager torch
where there are none.

How to read a failure: `live` and `shadow` name the pass. The oracle is `UpdatePlan` without passes,
which test_kernels proves against float64.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.averaging.engines import HostThread
from dist_ema.averaging.executors import Worker
from dist_ema.averaging.kernels import cpu_plan, cpu_threads
from dist_ema.averaging.kernels.cpu_plan import SHARE, WORTH, Pass
from dist_ema.averaging.kernels.cpu_tables import FEW, ROW, TASK, cut_tasks, ramps
from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan
from dist_ema.averaging.kernels.pairs import LIVE, SHADOW
from tests._models import draw
from tests._oracle import noise, round_to_bfloat16
from tests._ranks import run_program

needs_numba = pytest.mark.skipif(not cpu_plan.available(), reason="numba is not installed")
both = pytest.mark.parametrize(
    ("live", "shadow"), [(live, shadow) for live in LIVE for shadow in SHADOW], ids=str
)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(
    live: torch.dtype, shadow: torch.dtype, averages: int = 1, more: int = 0
) -> list[ShadowPair]:
    """Lengths around a vector and a chunk, at addresses that no vector is aligned to; always the
    same.
    """
    pairs = []
    for k, n in enumerate((1, 7, 64, 1000, ROW - 1, ROW + 17, more)):
        shadows = [draw(n + 1, shadow, 100 * k + i)[1:] for i in range(averages)]
        pairs.append(ShadowPair(f"w{k}", shadows, draw(n + 1, live, 50 + k)[1:], torch.arange))
    return pairs


def bits(pairs: list[ShadowPair]) -> list[Tensor]:
    return [
        shadow.clone().contiguous().view(torch.uint8) for pair in pairs for shadow in pair.shadows
    ]


def count(plan: Any) -> int:
    """Compiled passes of a plan."""
    return sum(isinstance(step, Pass) for step in plan.steps)


def moved(passes: bool, pairs: list[ShadowPair], *runs: Any, **options: Any) -> list[Tensor]:
    plan = UpdatePlan(pairs, 5, passes=passes)
    assert {isinstance(step, Pass) for step in plan.steps} == {passes}, "some pairs were not taken"
    for update, weights in enumerate(runs):
        plan.run(weights, update, **options)
    return bits(pairs)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- the bits of eager torch ----------------------------------------------------------------------


@needs_numba
@both
@pytest.mark.parametrize("guard", [False, True])
def test_bits(live: torch.dtype, shadow: torch.dtype, guard: bool) -> None:
    """Three averages, weights on both sides of 0.5, as floats and as tensors: the bits of an eager
    plan.
    """
    runs = [
        [0.001, 0.3, 0.5],
        [0.7, 1.0, 0.0],
        [torch.tensor(0.1), torch.tensor(0.9, dtype=torch.float64), 1 / 3],
    ]
    assert equal(
        moved(False, make(live, shadow, 3), *runs, guard=guard),
        moved(True, make(live, shadow, 3), *runs, guard=guard),
    )


@needs_numba
@pytest.mark.parametrize("shadow", SHADOW, ids=str)
@pytest.mark.parametrize("live", [BF16, torch.float16], ids=str)
def test_every_number_of_16_bits(live: torch.dtype, shadow: torch.dtype) -> None:
    """All patterns, subnormal, infinite and nan ones too; what becomes nan is nan, whatever its
    payload.
    """
    every = torch.arange(1 << 16).to(torch.int16).view(live)
    for guard, weight in ((False, 0.25), (True, 0.25), (False, 1.0)):
        results = []
        for passes in (False, True):
            pair = ShadowPair("w", [draw(1 << 16, shadow, 1)], every, torch.arange)
            UpdatePlan([pair], passes=passes).run([weight], 3, guard)
            results.append(pair.shadows[0])
        eager, got = results
        assert torch.equal(eager.isnan(), got.isnan())
        assert torch.equal(eager.nan_to_num(7.0), got.nan_to_num(7.0))


@needs_numba
def test_rounding_of_every_shadow() -> None:
    """At weight 0 a compact shadow keeps its bits, whichever they are; towards a weight it moves as
    `noise` says.
    """
    every = torch.arange(1 << 16).to(torch.int16).view(BF16)
    pair = ShadowPair("w", [every.clone()], torch.zeros(1 << 16), torch.arange)
    UpdatePlan([pair], passes=True).run([0.0], 1)
    kept = every.isfinite() & (every != 0)  # 0 * inf is nan, and -0 + 0 is 0
    assert torch.equal(pair.shadows[0][kept].view(torch.int16), every[kept].view(torch.int16))
    pair = ShadowPair("w", [torch.zeros(1000, dtype=BF16)], draw(1000, F32, 3), torch.arange)
    UpdatePlan([pair], seed=2, passes=True).run([1.0], 9)
    want = round_to_bfloat16(pair.live, noise(2, 9, "w", torch.arange(1000)))
    assert torch.equal(pair.shadows[0], want)


def strange(start: int, stop: int) -> Tensor:
    """No run is longer than one."""
    return torch.arange(start, stop).square()


NUMBERS: dict[str, Callable[[int, int], Tensor]] = {
    "a run": lambda a, b: torch.arange(a + 12345, b + 12345),
    "rows of a matrix": lambda a, b: (
        torch.arange(a, b) % 100 + torch.arange(a, b) // 100 * 1000 + 50
    ),
    "channels last": lambda a, b: torch.arange(a, b) % 64 * 49 + torch.arange(a, b) // 64 % 49,
    "beyond 32 bits": lambda a, b: torch.arange(a, b) * 3 + (1 << 32) - 1000,
    "backwards": lambda a, b: 1_000_000 - torch.arange(a, b),
    "strange": strange,
}


@needs_numba
@pytest.mark.parametrize("name", NUMBERS)
def test_element_numbers(name: str) -> None:
    """Noise is numbered by the element in the full weight, however its numbers run; too short runs
    are left to eager code.
    """
    n, results = 300_000, []
    for passes in (False, True):
        pair = ShadowPair("w", [draw(n, BF16, 1)], draw(n, F32, 2), NUMBERS[name])
        plan = UpdatePlan([pair], 3, passes=passes)
        assert bool(count(plan)) == (passes and name != "strange")
        plan.run([0.01], 4)
        results.append(pair.shadows[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 99, 100, 101, 1 << 18, (1 << 18) + 1])
def test_ramps(name: str, n: int) -> None:
    """ramps: written out again they are the numbers, and none crosses a multiple of 2^32."""
    runs = ramps(NUMBERS[name], n, huge=True)
    if runs is None:
        assert name == "strange" or n < 4
        return
    parts = [np.arange(length) * step + first for length, first, step in runs]
    assert np.array_equal(
        np.concatenate([np.zeros(0, np.int64), *parts]), NUMBERS[name](0, n).numpy()
    )
    assert all(part[0] >> 32 == part[-1] >> 32 for part in parts)
    assert len(runs) <= 2 + n // FEW


# --- the table ------------------------------------------------------------------------------------


def test_tasks() -> None:
    """Every row is in one task, and no task is longer than its share by more than a row."""
    for sizes in ([64] * 4000, [1], [ROW], [3, 1, 1, ROW - 1] * 9, [ROW] * 40, [ROW] * 2000):
        starts = cut_tasks(np.cumsum(sizes)).tolist()
        assert (starts[0], starts[-1]) == (0, len(sizes))
        work = [sum(sizes[a:b]) for a, b in itertools.pairwise(starts)]
        assert sum(work) == sum(sizes)
        assert max(work) < sum(sizes) / len(work) + max(sizes)
        assert len(work) == min(len(sizes), 64) or TASK <= sum(sizes) / len(work) < 2 * TASK


@needs_numba
def test_neighbours_become_one_row() -> None:
    """Pairs that touch on both sides are one row of the table; each pair of dtypes has a pass."""
    shadow, live = torch.zeros(30), torch.ones(30)
    pairs = [
        ShadowPair(f"{i}", [shadow[i : i + 10]], live[i : i + 10], torch.arange)
        for i in (0, 10, 20)
    ]
    pairs.append(ShadowPair("b", [torch.zeros(5)], torch.ones(5, dtype=BF16), torch.arange))
    pairs.append(
        ShadowPair("d", [torch.zeros(5, dtype=torch.float64)], torch.ones(5), torch.arange)
    )
    plan = UpdatePlan(pairs, passes=True)
    made = [step for step in plan.steps if isinstance(step, Pass)]
    assert [step.rows[:, 0].tolist() for step in made] == [[30], [5]]
    plan.run([0.5], 0)
    assert all((pair.shadows[0] == 0.5).all() for pair in pairs)


# --- [Note: threads] ------------------------------------------------------------------------------


@pytest.fixture(params=["torch's threads", "Python's threads"])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch with an OpenMP runtime that can be called, and one without."""
    if request.param == "torch's threads":
        if cpu_threads.find_openmp() is None:
            pytest.skip("this torch has no GOMP_parallel_loop_dynamic")
        yield
        return
    with monkeypatch.context() as patch:
        for module in (cpu_threads, importlib.import_module(f"{cpu_plan.__package__}.cpu_numba")):
            patch.setattr(module, "find_openmp", lambda: None)
        cpu_plan.find_pass.cache_clear()
        yield
    cpu_plan.find_pass.cache_clear()


@needs_numba
def test_bits_do_not_depend_on_threads(team: None, threads: Callable[[int], None]) -> None:
    """One, two and five threads: every element is moved once."""
    results = []
    for number in (1, 2, 5):
        threads(number)
        results.append(moved(True, make(F32, BF16, 2, 3 * SHARE), [0.01, 0.6], [0.3, 0.1]))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@needs_numba
def test_threads_are_torchs(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as torch's own kernels take here, and one per SHARE; a host thread's bound holds."""
    cpu_plan.passes_same_bits()  # which runs a pass once per process
    seen: list[int] = []
    run = cpu_threads.run_on_threads
    monkeypatch.setattr(
        cpu_plan,
        "run_on_threads",
        lambda move, job, tasks, n: (seen.append(n), run(move, job, tasks, n)),
    )
    threads(3)
    large, small = make(BF16, F32, 1, 4 * SHARE), make(BF16, F32, 1, SHARE)
    UpdatePlan(large, passes=True).run([0.5], 0)
    UpdatePlan(small, passes=True).run([0.5], 0)
    assert seen == [3, 1]
    engine, inline = HostThread(None, Worker(2)), make(BF16, F32, 1, 4 * SHARE)
    plan = UpdatePlan(large, passes=True)
    engine.update(plan, [0.25], 1, False)
    engine.settle()
    assert seen[2:] == [2]
    UpdatePlan(inline, passes=True).run([0.5], 0)
    UpdatePlan(inline, passes=True).run([0.25], 1)
    assert equal(bits(large), bits(inline))


FORKED = """
import os, signal, torch
from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan
torch.set_num_threads(2)
pair = ShadowPair("w", [torch.zeros(1 << 22)], torch.ones(1 << 22), torch.arange)
plan = UpdatePlan([pair], passes=True)
plan.run([0.5], 0)
child = os.fork()
if child == 0:
    signal.alarm(20)
    plan.run([0.5], 1)  # on one thread: the others were not forked
    torch.set_num_threads(1)  # as torch asks of forked processes
    os._exit(0 if bool((pair.shadows[0] == 0.75).all()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
plan.run([0.5], 1)
assert bool((pair.shadows[0] == 0.75).all())
"""


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forked() -> None:
    """A process that was forked after an update can update too."""
    run_program(FORKED)


# --- when there is a pass -------------------------------------------------------------------------


def digest() -> list[str]:
    """(passes that were used, hash of the average) of an fp32 and a compact average of a bfloat16
    model.
    """
    draws, found = torch.Generator().manual_seed(0), []
    model = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 7)).to(BF16)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draws))
    for dtype in SHADOW:
        ema = EMA(model, 0.9, dtype=dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        ema.update()
        values = b"".join(
            value.view(torch.uint8).numpy().tobytes() for value in ema.gather().values()
        )
        found += [str(count(ema.weights.updates.plan)), hashlib.sha256(values).hexdigest()]
    return found


def test_without_numba() -> None:
    """Eager torch where numba is missing, and the same bits."""
    code = "import sys; sys.modules['numba'] = None\n"
    code += "from tests.test_cpu_numba import digest; print(*digest())"
    missing, here = run_program(code).split(), digest()
    assert missing[::2] == ["0", "0"]
    if cpu_plan.available():
        assert here[::2] == [str(int(cpu_plan.passes_same_bits()))] * 2
    assert missing[1::2] == here[1::2]


def test_a_small_model_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing and compiling take a second and a half: below WORTH a plan does not look for
    numba.
    """

    def refuse() -> bool:
        raise AssertionError("a small plan asked for numba")

    monkeypatch.setattr(cpu_plan, "available", refuse)
    EMA(nn.Linear(3, 2), dtype=BF16).update()


@needs_numba
def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMBA_DISABLE_JIT=1 is numba's own switch, and ours."""
    import numba

    assert cpu_plan.available.__wrapped__()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    assert not cpu_plan.available.__wrapped__()


@needs_numba
def test_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled from WORTH elements on, where torch's lerp has the same bits, and never for what is
    not in host memory.
    """
    monkeypatch.setattr(cpu_plan, "passes_same_bits", lambda: True)

    def passes(n: int, device: str = "cpu") -> int:
        pair = ShadowPair(
            "w", [torch.zeros(n, device=device)], torch.ones(n, device=device), torch.arange
        )
        return count(UpdatePlan([pair]))

    assert (passes(WORTH - 1), passes(WORTH), passes(WORTH, "meta")) == (0, 1, 0)
    monkeypatch.setattr(cpu_plan, "passes_same_bits", lambda: False)
    assert passes(WORTH) == 0


@needs_numba
def test_no_pass_for_what_only_looks_like_memory() -> None:
    """Tensor subclasses may hold nothing at their address, or something else than what they show:
    `is_reachable`.
    """

    class Quantised(Tensor):
        pass

    plain, quantised = torch.zeros(9), torch.ones(9).as_subclass(Quantised)
    for shadow, live in ((plain, quantised), (quantised, plain)):
        assert count(UpdatePlan([ShadowPair("w", [shadow], live, torch.arange)], passes=True)) == 0


def test_contraction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`passes_same_bits` sees a lerp that rounds after the product, on either side of 0.5."""
    tried, lerp = cpu_plan.passes_same_bits.__wrapped__, torch.lerp
    for near, far in ((True, True), (True, False), (False, True)):

        def rounds_twice(
            a: Tensor, b: Tensor, w: float, near: bool = near, far: bool = far
        ) -> Tensor:
            if w < 0.5:
                return a + w * (b - a) if near else lerp(a, b, w)
            return b - (b - a) * (1 - w) if far else lerp(a, b, w)

        monkeypatch.setattr(torch, "lerp", rounds_twice)
        assert tried() is False


@needs_numba
def test_numba_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba refuses to compile: one warning, and eager torch takes over."""

    from dist_ema.averaging.kernels import cpu_numba

    def refuse(live: torch.dtype, shadow: torch.dtype) -> None:
        raise TypeError("no such thing")

    monkeypatch.setattr(cpu_numba, "compile_pass", refuse)
    monkeypatch.setattr(cpu_plan, "find_pass", cpu_plan.find_pass.__wrapped__)
    pair = ShadowPair("w", [torch.zeros(5)], torch.ones(5), torch.arange)
    with pytest.warns(UserWarning, match="eager torch takes over: no such thing"):
        plan = UpdatePlan([pair], passes=True)
    plan.run([0.5], 0)
    assert (pair.shadows[0] == 0.5).all()


# --- autograd -------------------------------------------------------------------------------------


@needs_numba
def test_autograd_sees_the_write() -> None:
    """A shadow that autograd saved (a teacher's weight) is known to be overwritten:
    `increment_version` in Pass.run.
    """
    teacher = nn.Parameter(torch.ones(4))
    arena = torch.zeros(8)
    pairs = [ShadowPair("t", [teacher.detach()], torch.zeros(4), torch.arange)]
    pairs += [ShadowPair(f"{i}", [arena[i : i + 4]], torch.ones(4), torch.arange) for i in (0, 4)]
    plan, before = UpdatePlan(pairs, passes=True), arena._version
    loss = (teacher * teacher).sum()
    plan.run([0.5], 0)
    assert arena._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_inference_mode() -> None:
    """Tensors without a version counter are moved too."""
    with torch.inference_mode():
        pair = ShadowPair("w", [torch.zeros(5)], torch.ones(5), torch.arange)
        UpdatePlan([pair], passes=True).run([0.5], 0)
        assert (pair.shadows[0] == 0.5).all()


@needs_numba
def test_an_average_of_a_model(tmp_path: Any) -> None:
    """Through the front door: compiled where the model is large enough, and saved and loaded with
    the same bits.
    """
    model = nn.Linear(400, 400)
    ema = EMA(model, 0.5)
    assert bool(count(ema.weights.updates.plan)) == cpu_plan.passes_same_bits()
    with torch.no_grad():
        model.weight.zero_()
    ema.update()
    hashed = hashlib.sha256(ema.gather()["weight"].numpy().tobytes()).hexdigest()
    ema.save(tmp_path / "a")
    again = EMA(model, 0.5)
    again.load(tmp_path / "a")
    assert hashlib.sha256(again.gather()["weight"].numpy().tobytes()).hexdigest() == hashed
