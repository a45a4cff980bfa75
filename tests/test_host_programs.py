"""25 generated programs: every outcome is equal to the naive average, or an error that names a
weight.

How to go on from a failure: `python -m tests.host_programs --seed N --trace` prints every action;
`--without ACTION ...` leaves actions out; `--seeds 300` is the whole proof.
"""

from __future__ import annotations

import pytest

from tests._ranks import run_ranks
from tests.host_programs import Outcome, plan, run, run_many

SEEDS = list(range(25))
GROUPS = plan(SEEDS)
SHARDED = sorted({(wrapper, world) for wrapper, world in GROUPS if wrapper != "none"})


def judge(outcomes: list[Outcome]) -> None:
    failures = [
        f"seed {each.seed} ({each.title}): {each.failure}" for each in outcomes if each.failure
    ]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("seed", GROUPS["none", 1])
def test_a_generated_program(seed: int) -> None:
    judge([run(seed)])


@pytest.mark.multirank
@pytest.mark.parametrize("group", SHARDED, ids=lambda group: f"{group[0]}, {group[1]}")
def test_generated_programs_under_a_wrapper(group: tuple[str, int]) -> None:
    wrapper, world = group
    judge(run_ranks(world, run_many, GROUPS[group], wrapper)[0])


def test_the_generator_sees_a_plain_program_as_equal() -> None:
    """Steps, verbs and nothing that edits the model: the reference itself is right."""
    without = [
        "to_and_back",
        "assign_data",
        "load_assigned",
        "load_state_dict",
        "freeze",
        "unfreeze",
    ]
    without += ["replace", "add", "delete", "swap_and_write", "swap_and_recalibrate"]
    outcomes = [run(seed, without=[*without, "swap_and_evaluate"]) for seed in range(4)]
    judge(outcomes)
    assert sum(each.counts["equal"] for each in outcomes) > 40


def test_the_generator_sees_a_wrong_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is lost in silence is found by every seed that steps."""
    import dist_ema
    from tests import host_programs

    class Lossy(dist_ema.EMA):
        def attach(self, *optimizers: object, **options: object) -> None:  # type: ignore[override]
            """Nothing is hooked."""

    monkeypatch.setattr(host_programs, "EMA", Lossy)
    outcomes = [run(seed) for seed in range(3)]
    assert all(each.verdict == "silent" for each in outcomes)
