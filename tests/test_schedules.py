"""Decay as a pure function of the clock: published formulas, exact composition, and errors that
name the value.

How to read a failure: the parameter names the schedule; golden values were computed from the
formulas of the papers and codebases that `golden_schedules.json` cites, not by this package.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ema import (
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
    Window,
)
from dist_ema.schedules import from_dict, from_text, gamma_of, schedule
from dist_ema.schedules.decays import MOST_STEPS

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())
NAMED = {
    "Ratio(0.9999)": Ratio(0.9999),
    "Warmup(0.9999, power=2/3, inv_gamma=1)": Warmup(0.9999, power=2 / 3, inv_gamma=1),
    "Ramp(0.9999, tau=2000)": Ramp(0.9999, tau=2000),
    "Power(gamma=6.937204...) i.e. sigma_rel=0.1, elapsed 1": Power(
        gamma=6.9372041
    ),  # the digits it was made with
    "Uniform()": Uniform(),
    "Debiased(0.999)": Debiased(0.999),
    "HalfLife(500)": HalfLife(500),
}
CLOSED: list[Schedule] = [
    Constant(0.0), Constant(0.9), Constant(0.9999), Constant(1.0), HalfLife(500), HalfLife(0.3),
    Power(sigma_rel=0.05), Power(sigma_rel=0.28), Power(gamma=0),
    Power(gamma=3.5, origin="training"), Uniform(), Debiased(0.0), Debiased(0.5), Debiased(0.9999),
]  # fmt: skip
STEPPED: list[Schedule] = [
    Ratio(), Ratio(0.5), Warmup(), Warmup(0.99, power=0.75, inv_gamma=4), Ramp(), Ramp(0.9, tau=7),
    Cosine(0.99, 300), Cosine(0.9, 50, final=0.95),
]  # fmt: skip
# The copy (decay 0) and the plain 1 that make composition trivial are wanted at these clocks too.
CLOCKS = [(1, 1), (2, 1), (2, 2), (3, 2), (10, 3), (100, 99), (100, 100), (1000, 64), (5000, 1024)]


# --- values ---------------------------------------------------------------------------------------


def test_golden_is_whole() -> None:
    """Every entry of the golden file that holds decays is compared below."""
    assert {
        name for name, entry in GOLDEN.items() if "decay" in entry and isinstance(entry, dict)
    } == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_golden(name: str) -> None:
    """Each formula, its shift by one included: n = 1 is the first update."""
    entry = GOLDEN[name]
    assert [NAMED[name](n) for n in entry["n"]] == pytest.approx(
        entry["decay"], rel=1e-12, abs=1e-15
    )


def test_golden_by_width() -> None:
    """The golden row of Power again, by sigma_rel, to the seven digits that its gamma has."""
    entry = GOLDEN["Power(gamma=6.937204...) i.e. sigma_rel=0.1, elapsed 1"]
    assert [Power(sigma_rel=0.1)(n) for n in entry["n"]] == pytest.approx(entry["decay"], abs=1e-8)


@pytest.mark.parametrize(("sigma", "gamma"), GOLDEN["sigma_rel_to_gamma"].items())
def test_sigma_rel_to_gamma(sigma: str, gamma: float) -> None:
    """gamma_of: the largest real root of the cubic, and the width of its profile is the sigma asked
    for.
    """
    found = gamma_of(float(sigma))
    assert found == pytest.approx(gamma, abs=5e-7)
    # The deviation of t^gamma on [0, 1]: sqrt((g + 1) / ((g + 2)^2 (g + 3))).
    assert math.sqrt((found + 1) / ((found + 2) ** 2 * (found + 3))) == pytest.approx(
        float(sigma), rel=1e-9
    )
    assert Power(sigma_rel=float(sigma))(1000, 10) == Power(gamma=found)(1000, 10)


@pytest.mark.parametrize(
    ("of", "now", "elapsed", "decay"),
    [
        (Constant(0.5), 1, 1, 0.5), (Constant(0.5), 7, 3, 0.125), (Constant(0.0), 3, 2, 0.0),
        (Constant(1.0), 3, 2, 1.0), (HalfLife(500), 500, 500, 0.5),
        (HalfLife(8), 4, 4, math.sqrt(0.5)), (Cosine(0.9, 100), 0, 1, 0.9),
        (Cosine(0.9, 100), 50, 1, 0.95), (Cosine(0.9, 100), 100, 1, 1.0),
        (Cosine(0.9, 100), 400, 1, 1.0), (Power(gamma=0), 4, 1, 0.75), (Power(gamma=1), 4, 2, 0.25),
        (Uniform(), 4, 3, 0.25), (Debiased(0.5), 2, 1, 1 / 3),
    ],
)  # fmt: skip
def test_by_hand(of: Schedule, now: float, elapsed: float, decay: float) -> None:
    """Values that need no computer, at the boundary steps."""
    assert of(now, elapsed) == pytest.approx(decay, rel=1e-14, abs=0)


@pytest.mark.parametrize("of", [*CLOSED, *STEPPED], ids=repr)
def test_decay_is_a_share(of: Schedule) -> None:
    """In [0, 1] at every clock, also when a rounding could push it out."""
    values = [of(now, elapsed) for now, elapsed in CLOCKS]
    assert all(type(value) is float and 0 <= value <= 1 for value in values)


@pytest.mark.parametrize(
    ("of", "mean"),
    [
        (Uniform(), lambda n: [1 / n] * n),
        (Debiased(0.9), lambda n: [0.9 ** (n - i) for i in range(1, n + 1)]),
    ],
    ids=["Uniform", "Debiased"],
)
def test_profile(of: Schedule, mean: Any) -> None:
    """What an average weighs each step with: Uniform all alike, Debiased geometrically and with
    nothing of the start.
    """
    n, weights = 40, [0.0] * 41
    weights[0] = 1.0  # of the start
    for now in range(1, n + 1):
        weights = [of(now) * weight for weight in weights]
        weights[now] += 1 - of(now)
    total = sum(mean(n))
    assert weights == pytest.approx([0.0, *(value / total for value in mean(n))], abs=1e-14)


# --- [Note: elapsed] ------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [*CLOSED, *STEPPED], ids=repr)
@pytest.mark.parametrize(("now", "elapsed"), CLOCKS)
def test_elapsed_is_a_product(of: Schedule, now: int, elapsed: int) -> None:
    """One move of k equals k moves of 1, to 1e-12 of the product."""
    product = math.prod(of(now - i, 1) for i in range(elapsed))
    assert of(now, elapsed) == pytest.approx(product, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("of", CLOSED, ids=repr)
def test_real_elapsed_composes(of: Schedule) -> None:
    """Closed forms take any real elapsed: s(now, a + b) == s(now - b, a) * s(now, b)."""
    draw = random.Random(0)
    for _ in range(500):
        now = 10 ** draw.uniform(0, 6)
        b = now * draw.uniform(1e-3, 0.9)
        a = (now - b) * draw.uniform(1e-3, 0.9)
        assert of(now, a + b) == pytest.approx(of(now - b, a) * of(now, b), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("of", CLOSED, ids=repr)
def test_closed_forms_do_not_count(of: Schedule) -> None:
    """A closed form takes a million images in one call, whole or not."""
    assert 0 <= of(3e6, 1e6 + 0.5) <= of(3e6, 1e6) <= 1


@pytest.mark.parametrize("of", STEPPED, ids=repr)
@pytest.mark.parametrize("elapsed", [0.5, 1.5, 2.0001, MOST_STEPS + 1, 1e9])
def test_stepped_refuse(of: Schedule, elapsed: float) -> None:
    """Per-step schedules take whole elapsed up to 1024; else the error names the value and
    HalfLife, the way out.
    """
    with pytest.raises(
        ValueError,
        match=rf"whole elapsed up to 1024, got {elapsed:g}\. Use HalfLife".replace("+", r"\+"),
    ):
        of(1e10, elapsed)


@pytest.mark.parametrize("of", STEPPED, ids=repr)
def test_stepped_at_the_limit(of: Schedule) -> None:
    """1024 steps are still taken, as a float too."""
    assert of(2000, 1024.0) == of(2000, MOST_STEPS)


# --- values that print, compare and are saved -----------------------------------------------------


@pytest.mark.parametrize("of", [*CLOSED, *STEPPED], ids=repr)
def test_round_trips(of: Schedule) -> None:
    """repr evaluates back, the spec goes through JSON and back, equal values are equal and hash
    alike.
    """
    assert eval(repr(of)) == of
    again = from_dict(json.loads(json.dumps(of.to_dict())))
    assert (again, type(again), hash(again)) == (of, type(of), hash(of))
    assert None not in of.to_dict().values()


def test_equality() -> None:
    """Two schedules are equal only if kind and values are."""
    everything = [*CLOSED, *STEPPED]
    assert [(a, b) for i, a in enumerate(everything) for b in everything[:i] if a == b] == []


def test_frozen() -> None:
    """A schedule cannot change under a running average."""
    with pytest.raises(AttributeError):
        Constant(0.9).decay = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("of", [*CLOSED, *STEPPED], ids=repr)
def test_copies_first(of: Schedule) -> None:
    """The first update forgets the start: Uniform, Debiased, Warmup, Power from its own start, and
    a constant 0.
    """
    forgets = (
        isinstance(of, (Uniform, Debiased, Warmup))
        or of == Constant(0.0)
        or (isinstance(of, Power) and of.gamma != 3.5)
    )
    assert of.copies_first == forgets
    assert of.origin == ("training" if of.copies_first != (of(1) == 0) else "start")


# --- arguments ------------------------------------------------------------------------------------


def test_float_means_constant() -> None:
    """`schedule`: a float is Constant, a schedule is itself."""
    assert schedule(0.99) == Constant(0.99)
    assert schedule(1) == Constant(1.0)
    given = Uniform()
    assert schedule(given) is given


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Constant(1.5), r"decay must be in \[0, 1\], got 1\.5"),
        (lambda: Constant(-0.1), r"decay must be in \[0, 1\], got -0\.1"),
        (lambda: Constant(math.nan), r"decay must be in \[0, 1\], got nan"),
        (lambda: Warmup(1.5), r"decay must be in \[0, 1\], got 1\.5"),
        (lambda: Warmup(power=0), r"power must be positive, got 0"),
        (lambda: Warmup(inv_gamma=-2), r"inv_gamma must be positive, got -2"),
        (lambda: Ratio(2), r"decay must be in \[0, 1\], got 2"),
        (lambda: Ramp(3), r"decay must be in \[0, 1\], got 3"),
        (lambda: Ramp(tau=0), r"tau must be positive, got 0"),
        (lambda: HalfLife(0), r"units must be positive, got 0"),
        (lambda: HalfLife(math.inf), r"units must be positive, got inf"),
        (lambda: Cosine(1.1, 10), r"decay must be in \[0, 1\], got 1\.1"),
        (lambda: Cosine(0.9, 0), r"total must be positive, got 0"),
        (lambda: Cosine(0.9, 10, final=7), r"final must be in \[0, 1\], got 7"),
        (
            lambda: Debiased(1.0),
            r"decay must be in \[0, 1\), got 1\.0\. For the plain mean use Uniform",
        ),
        (lambda: Power(), r"one of sigma_rel and gamma, got sigma_rel=None, gamma=None"),
        (lambda: Power(0.1, 3), r"one of sigma_rel and gamma, got sigma_rel=0\.1, gamma=3"),
        (lambda: Power(gamma=-0.5), r"gamma must be 0 or more, got -0\.5"),
        (lambda: Power(gamma=math.nan), r"gamma must be 0 or more, got nan"),
        (lambda: Power(sigma_rel=0.29), r"sigma_rel must be between 0 and 0\.2887 .*got 0\.29"),
        (lambda: Power(sigma_rel=0), r"sigma_rel must be between 0 and 0\.2887 .*got 0"),
        (lambda: Power(0.1, origin="end"), r"origin must be 'start' or 'training', got 'end'"),
        (lambda: HalfLife(True), r"units must be a number, got True"),
        (lambda: Power(gamma="3"), r"gamma must be a number, got '3'"),  # type: ignore[arg-type]
        (lambda: schedule(True), r"decay must be a float or a schedule .*got True"),
        (lambda: schedule("0.9"), r"decay must be a float or a schedule .*got '0\.9'"),  # type: ignore[arg-type]
        (
            lambda: from_dict({"name": "Cubic"}),
            r"no schedule is called 'Cubic'; known are Constant, Cosine",
        ),
        (lambda: from_dict({"decay": 0.9}), r"no schedule is called None"),
        (lambda: from_dict({"name": ["Ratio"]}), r"no schedule is called \['Ratio'\]"),
        (lambda: from_dict({"name": "Ratio", "tau": 3}), r"Ratio does not take \{'tau': 3\}"),
        (
            lambda: from_dict({"name": "Ratio", "decay": "high"}),
            r"decay must be a number, got 'high'",
        ),
        (
            lambda: from_dict({"name": "Ratio", "decay": 1.5}),
            r"decay must be in \[0, 1\], got 1\.5",
        ),
    ],
)
def test_arguments(build: Any, message: str) -> None:
    """A wrong argument is a ValueError with the value in it, from the constructor or from a damaged
    artifact.
    """
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda number: HalfLife(number(500)),
        lambda number: Warmup(number(0.5), power=number(1)),
        lambda number: Cosine(number(0.5), total=number(8)),
        lambda number: Debiased(number(0.5)),
        lambda number: Power(gamma=number(3)),
        lambda number: Power(sigma_rel=number(0.125)),
        lambda number: Window(number(8), blocks=4),
        lambda number: schedule(number(0.5)),
    ],
)
def test_numbers_of_numpy_are_python_s(build: Any) -> None:
    """Files hold the arguments, so they must not fail after a night of training."""
    given = build(np.float32)
    assert given == build(float)
    assert repr(given) == repr(build(float))
    assert from_dict(json.loads(json.dumps(given.to_dict()))) == given
    assert Window(8, blocks=np.int64(4)).to_dict() == Window(8, blocks=4).to_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("HalfLife(500)", HalfLife(500)),
        ("Power(origin='start', sigma_rel=0.1)", Power(sigma_rel=0.1)),
        ("Window(30, 'linear', blocks=16)", Window(30)),
        ("Power", None),
        ("Power(sigma_rel=0.5)", None),
        ("Schedule()", None),
        ("print(1)", None),
        ("HalfLife(print(1))", None),
        ("HalfLife(**{})", None),
        ("HalfLife(\0", None),
        ("(" * 9999, None),
        (f"HalfLife({'-' * 9999}1)", None),
    ],
)
def test_from_text(text: str, wanted: Schedule | None) -> None:
    """A call as a script writes it; nothing else is run, and nothing else raises."""
    assert from_text(text) == wanted
