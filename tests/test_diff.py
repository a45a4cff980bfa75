"""`dist-ema diff`: distances as torch computes them in float64, and nothing that differs is called
the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_ema import EMA, Constant
from dist_ema.cli import main
from dist_ema.offline import diff as room
from dist_ema.offline.diff import Difference, Row, diff

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that end inside weights."""
    monkeypatch.setattr(room, "WINDOW", 5)


def compare(tmp_path: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> Difference:
    for label, weights in (("a", a), ("b", b)):
        save_file(
            {name: value.clone() for name, value in weights.items()},
            tmp_path / f"{label}.safetensors",
        )
    return diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def row(tmp_path: Path, a: Tensor, b: Tensor) -> Row:
    (found,) = compare(tmp_path, {"w": a}, {"w": b}).rows
    return found


def test_distances(tmp_path: Path) -> None:
    """Every floating dtype against every other, largest distance first."""
    torch.manual_seed(0)
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    full = {f"{i}.{j}": torch.randn(3, 4, dtype=torch.float64) for i in range(6) for j in range(6)}
    a = {name: value.to(dtypes[int(name[0])]) for name, value in full.items()}
    b = {name: (value * 1.01).to(dtypes[int(name[2])]) for name, value in full.items()}
    found = compare(tmp_path, a, b)
    assert [each.distance for each in found.rows] == sorted(
        (each.distance for each in found.rows), reverse=True
    )
    assert len(found.rows) == 36
    for each in found.rows:
        x, y = a[each.name].double(), b[each.name].double()
        assert each.distance == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-12)
        assert each.largest == (x - y).abs().max().item()
        assert each.changed == (x != y).sum().item()
        assert each.elements == 12
    assert not found.same()


@pytest.mark.parametrize(
    ("a", "b", "distance", "largest", "changed"),
    [
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0]), 1.0, 5.0, 1),
        (torch.zeros(3), torch.ones(3), INF, 1.0, 3),
        (torch.zeros(3), -torch.zeros(3), 0.0, 0.0, 0),
        (torch.tensor(2.0), torch.tensor(1.0), 0.5, 1.0, 1),
        (torch.ones(0, 2), torch.ones(0, 2), 0.0, 0.0, 0),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0, 0.0, 0),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 1.0]), INF, INF, 1),
        (torch.tensor([1.0, 1.0]), torch.tensor([1.0, NAN]), INF, INF, 1),
        (torch.tensor([1.0, NAN]), torch.tensor([2.0, NAN]), INF, 1.0, 1),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, INF]), 0.0, 0.0, 0),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF]), INF, INF, 1),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, INF]).bfloat16(), 0.0, 0.0, 0),
        (
            torch.tensor([1.0, 2.0]),
            torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])),
            0.0,
            0.0,
            0,
        ),
        (
            torch.complex(torch.ones(4), torch.ones(4)),
            torch.complex(torch.ones(4), -torch.ones(4)),
            math.sqrt(2),
            2.0,
            4,
        ),
        (torch.tensor([3 + 4j, 1j]), torch.tensor([0j, 1j]), 5 / math.sqrt(26), 5.0, 1),
        (torch.tensor([1.0, 2.0]), torch.tensor([4 + 4j, 2 + 0j]), math.sqrt(5), 5.0, 1),
        (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 3)]), INF, 2.0, 1),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), 0.0, 0.0, 0),
    ],
)
def test_corners(
    a: Tensor, b: Tensor, distance: float, largest: float, changed: int, tmp_path: Path
) -> None:
    """Zeros, scalars, nothing at all, NaN, infinity, complex numbers."""
    found = row(tmp_path, a, b)
    assert (found.distance, found.largest, found.changed) == (
        pytest.approx(distance),
        largest,
        changed,
    )


def test_integers_are_exact(tmp_path: Path) -> None:
    """Beyond what float64 holds, over dtypes and signs; and no threshold lets a counter pass."""
    big = 2**53
    found = row(tmp_path, torch.tensor([big, 7]), torch.tensor([big + 1, 7]))
    assert (found.changed, found.exact) == (1, True)
    for a, b, changed in (
        (torch.tensor([-1]), torch.tensor([2**64 - 1], dtype=torch.uint64), 1),
        (torch.tensor([big + 1]), torch.tensor([big + 1], dtype=torch.uint64), 0),
        (torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.int8), 0),
        (torch.tensor([200], dtype=torch.uint8), torch.tensor([-56], dtype=torch.int8), 1),
    ):
        assert row(tmp_path, a, b).changed == changed
    counters = compare(tmp_path, {"n": torch.tensor(1_000_000)}, {"n": torch.tensor(1_000_001)})
    assert not counters.same(0.5)
    assert compare(tmp_path, {"n": torch.tensor(5)}, {"n": torch.tensor(5)}).same(0.0)


def test_names_and_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What only one has, and what has another shape, is named and never the same, whatever the
    threshold.
    """
    one, two = torch.ones(2, 3), torch.ones(3, 2)
    found = compare(
        tmp_path, {"a": one, "same": one, "turned": one}, {"b": one, "same": one, "turned": two}
    )
    assert (found.missing, found.unexpected, found.reshaped) == (
        ["a"],
        ["b"],
        {"turned": ([2, 3], [3, 2])},
    )
    assert [each.name for each in found.rows] == ["same"]
    assert not found.same(1.0)
    assert main(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [
        "missing     a (in A alone)",
        "unexpected  b (in B alone)",
        "reshaped    turned: [2, 3] in A, [3, 2] in B",
    ]
    for a, b in (
        ({"x": one}, {"x": one, "y": one}),
        ({"x": one, "y": one}, {"x": one}),
        ({"x": one}, {"x": two}),
    ):
        assert not compare(tmp_path, a, b).same(1.0)


def test_threshold(tmp_path: Path) -> None:
    """0 allows other dtypes of the same values; a distance equal to the threshold is not beyond
    it.
    """
    a = {"w": torch.ones(4)}
    assert compare(tmp_path, a, a).same()
    cast = compare(tmp_path, a, {"w": torch.ones(4).bfloat16()})
    assert (cast.same(), cast.same(0.0)) == (False, True)
    apart = compare(tmp_path, a, {"w": torch.full((4,), 1.5)})
    assert (apart.same(0.49), apart.same(0.5)) == (False, True)
    lost = compare(tmp_path, a, {"w": torch.full((4,), NAN)})
    assert not lost.same(1e300)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.emb.weight


def test_tied(tmp_path: Path) -> None:
    """Names of one weight meet whichever is written; two weights under them are two comparisons."""
    EMA(model := Tied()).save(tmp_path / "saved")
    weight = model.emb.weight.detach()
    cases: list[tuple[dict[str, Tensor], int]] = [
        ({"emb.weight": weight}, 0),
        ({"head.weight": weight}, 0),
        ({"emb.weight": weight, "head.weight": weight.clone()}, 0),
        ({"emb.weight": weight, "head.weight": weight + 1}, 1),
    ]
    for theirs, apart in cases:
        save_file(theirs, path := tmp_path / "theirs.safetensors")
        for found in (diff(tmp_path / "saved", path), diff(path, tmp_path / "saved")):
            assert (found.missing, found.unexpected) == ([], [])
            assert len(found.beyond(None)) == apart


def test_several_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--which-a and --which-b: number, label, schedule; the frozen weights that the first alone has
    are there too.
    """
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = EMA(model, [Constant(0.5), Constant(0.9)])
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update()
    ema.save(tmp_path / "ema")
    a, b = ema.gather(0)["weight"].double(), ema.gather(1)["weight"].double()
    path = str(tmp_path / "ema")
    for name in ("1", "1-Constant", "Constant(decay=0.9)"):
        assert main(["diff", path, path, "--which-b", name, "--json"]) == 1
        said = json.loads(capsys.readouterr().out)
        assert said["weights"]["weight"]["distance"] == pytest.approx(
            ((a - b).norm() / a.norm()).item()
        )
        assert said["weights"]["bias"]["changed"] == 0
    assert main(["diff", path, path, "--which-a", "1", "--which-b", "1"]) == 0
    for name in ("2", "Constant", "", "none"):
        assert main(["diff", path, path, "--which-b", name]) == 1
        assert "0: Constant(decay=0.5), 1: Constant(decay=0.9)" in capsys.readouterr().err


def test_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table holds what differs, --weights limits it; JSON holds every weight, and null where no
    number is.
    """
    a = {f"w{i:02}": torch.full((2,), 1.0) for i in range(30)}
    b = {name: value + 0.001 * i for i, (name, value) in enumerate(a.items())}
    b["w29"] = torch.tensor([1.0, NAN])
    compare(tmp_path, a, b)
    line = ["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(line) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("compared, 29 differ")
    assert out[3].split() == ["w29", "inf", "inf", "1", "of", "2", "F32"]
    assert out[4].split() == ["w28", "2.800e-02", "2.800e-02", "2", "of", "2", "F32"]
    assert out[-1] == "... and 9 of 29 more: --weights all"
    assert main([*line, "--weights", "all", "--threshold", "0.5"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert (out[0].split(", ")[1], len(out)) == ("1 differ by more than 0.5", 3 + 29)
    assert main([*line, "--json"]) == 1
    said: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (said["same"], said["compared"], said["beyond"], len(said["weights"])) == (
        False,
        30,
        29,
        30,
    )
    assert said["weights"]["w29"]["distance"] is None
    for wrong in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit) as caught:
            main([*line, "--threshold", wrong])
        assert caught.value.code == 2
        capsys.readouterr()
