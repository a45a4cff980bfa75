"""An interrupt at any line of the entry and exit of a swap leaves live weights and shadows as they were."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_ema
from dist_ema import EMA
from dist_ema.averaging import swap

HERE = Path(dist_ema.__file__).parent
FILES = {
    str(HERE / name)
    for name in ("ema.py", "averaging/swap.py", "averaging/swap_registry.py", "sharding/derived.py")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exchanged and cast": {},
    "averaged buffers": {"buffers": "average"},
    "compact": {"dtype": torch.bfloat16},
}


def interrupted_at(line: int, run: Callable[[], None]) -> bool:
    """Run, with a KeyboardInterrupt at the given executed line. Returns whether there was such a line."""
    seen = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= line


# An interrupt inside `__del__` of a swap that is closed is printed by Python, and harmless.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_line_of_entry_and_exit(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per weight, and a cast where dtypes differ. Guards the order of copies and counts."""
    monkeypatch.setattr(swap, "SCRATCH", 4)
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.BatchNorm1d(3))
    ema = EMA(model, 0.5, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    ema.update()
    live = copy.deepcopy(model.state_dict())
    shadows = [state.shadow.clone() for state in ema.weights.averages[0].averaged]  # type: ignore[union-attr]

    def unlike() -> list[str]:
        now = model.state_dict()
        names = [name for name, value in live.items() if not torch.equal(value, now[name])]
        pairs = zip(ema.weights.averages[0].averaged, shadows, strict=True)
        return names + [f"shadow of {s.name}" for s, want in pairs if not same(s.shadow, want)]

    def block() -> None:
        with ema.swap():
            pass

    line = 1
    while interrupted_at(line, block):
        assert not ema.weights.swaps.open, f"the swap stayed open after line {line}"
        assert unlike() == [], f"after line {line}"
        line += 1
    assert line > 300, "the lines of a swap were not traced"
    with ema.swap():
        assert unlike() != []


def same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a, b)
