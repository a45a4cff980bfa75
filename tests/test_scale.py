"""What verbs cost in the store: `launch.scale` counts no more than its formula at 8 to 512 ranks.

How to read a failure: the ranks are threads, each with an EMA of its own. `tests/test_coordinator`
counts single exchanges at 512 ranks in every run, and `--all` a whole save.
"""

from __future__ import annotations

import pytest

from launch import scale


@pytest.mark.parametrize(
    ("size", "verbs"),
    [
        (8, tuple(scale.EXCHANGES)),
        (64, ("save", "gather", "metrics")),
        pytest.param(512, ("save",), marks=pytest.mark.rest),
    ],
)
def test_no_verb_costs_more_than_its_formula(size: int, verbs: tuple[str, ...]) -> None:
    """At most 10 operations and 1 kB read, by each rank."""
    for verb, cost in scale.count(size, verbs).items():
        operations, read = scale.formula(verb, size)
        assert cost.operations <= operations <= 10, (verb, cost)
        assert cost.read <= read <= 1000, (verb, cost)
    assert scale.formula("save", 8)[0] == scale.formula("save", 4096)[0]


def test_collectives_do_not_grow() -> None:
    assert scale.swap_collectives(8) == scale.swap_collectives(4096)
