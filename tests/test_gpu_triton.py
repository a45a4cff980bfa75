"""The Triton kernel equals `UpdatePlan`, in Triton's interpreter, on the CPU.

How to read a failure: every check runs in a process of its own (the interpreter must be chosen
before Triton is imported), and its traceback is the inner one. The interpreter says nothing of
races, alignment or speed: that is `test_gpu.py`. Where a weight is no power of two, older
interpreters round twice ([Note: contraction] in gpu_triton), so those rows allow 1 ulp; noise,
masks, tables and addresses have no such excuse, so all others are compared bit for bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from dist_ema import EMA, Constant, Power
from dist_ema.averaging.engines import Overlapped
from dist_ema.averaging.kernels import gpu_launch, gpu_plan
from dist_ema.averaging.kernels.eager import ShadowPair, UpdatePlan
from dist_ema.averaging.kernels.gpu_launch import available
from dist_ema.averaging.kernels.gpu_plan import FusedPlan
from dist_ema.averaging.kernels.rounding import noise_key
from dist_ema.sharding.numbering import Numbering
from dist_ema.sharding.records import Region, Shard
from tests._models import draw
from tests._oracle import noise
from tests._ranks import run_ranks
from tests._wrappers import wrap
from tests.test_engines import Late, Skippable, Watch, steps
from tests.test_kernels import NUMBERINGS

CPU, BF16, F16, F32 = torch.device("cpu"), torch.bfloat16, torch.float16, torch.float32
# Nothing, one, less than a program, around its size (256 here), several programs, and a last one
# with one element.
AWKWARD = [0, 1, 3, 255, 256, 257, 0, 1023, 1024, 1025]
EXACT = [0.0, 0.25, 0.5, 0.75, 1.0]  # products by these are not rounded


# --- the process ----------------------------------------------------------------------------------


def interpret() -> None:
    assert "triton" not in sys.modules, "imported before the interpreter was chosen"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    gpu_launch.BLOCK = 256  # small programs, so that short tensors need several


def version() -> tuple[int, ...] | None:
    """Of the triton that is installed, if there is one."""
    try:
        import triton
    except ImportError:
        return None
    return tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., None]]:
    """Runs a function of this module where Triton is interpreted."""
    # Spawned: Triton takes the word when it is imported, and the server that the ranks are forked
    # from has imported it.
    with ProcessPoolExecutor(1, get_context("spawn"), interpret) as pool:
        found = pool.submit(version).result(timeout=120)
        if found is None:
            pytest.skip("triton is not installed")
        if found < (3, 6):
            pytest.skip("the kernels are proved with triton 3.6 or newer")
        yield lambda check, *args: pool.submit(check, *args).result(timeout=120)


# --- pairs ----------------------------------------------------------------------------------------


def cut(sizes: list[int], dtype: torch.dtype, seed: int, where: str) -> list[Tensor]:
    """Tensors of their own (64-byte aligned), one element off, or end to end in one storage."""
    if where == "arena":
        return list(draw(sum(sizes), dtype, seed).split(sizes))
    off = int(where == "off")
    return [draw(n + off, dtype, seed + i)[off:] for i, n in enumerate(sizes)]


def numbers(first: int) -> Numbering:
    return Numbering(first)


def make(
    live: torch.dtype, shadow: torch.dtype, averages: int, where: str = "own"
) -> list[ShadowPair]:
    lives = cut(AWKWARD, live, 50, where)
    shadows = [cut(AWKWARD, shadow, 100 * (k + 1), where) for k in range(averages)]
    return [
        ShadowPair(f"w.{i}", list(row), lives[i], numbers(11 * i))
        for i, row in enumerate(zip(*shadows, strict=True))
    ]


def twin(pairs: list[ShadowPair]) -> list[ShadowPair]:
    return [
        ShadowPair(pair.name, [s.clone() for s in pair.shadows], pair.live, pair.indices)
        for pair in pairs
    ]


def bits(pairs: list[ShadowPair], k: int = 0) -> Tensor:
    return torch.cat([pair.shadows[k].view(torch.int16) for pair in pairs])


def compare(pairs: list[ShadowPair], weights: list[Any], ulps: int = 0, **options: Any) -> None:
    """Both plans over the same pairs; ulps: of the larger operand."""
    other, scale = (
        twin(pairs),
        [torch.maximum(p.live.float().abs(), p.shadows[0].float().abs()) for p in pairs],
    )
    FusedPlan(pairs, seed=5).run(weights, 7, **options)
    UpdatePlan(other, seed=5).run(weights, 7, **options)
    for pair, want, size in zip(pairs, other, scale, strict=True):
        for k, (a, b) in enumerate(zip(pair.shadows, want.shadows, strict=True)):
            far = (a.float() - b.float()).abs() / (size + 1e-9) / torch.finfo(F32).eps
            same = torch.equal(a.view(torch.int16), b.view(torch.int16))
            assert same or (ulps and far.max() <= ulps), (
                f"{pair.name}, average {k}, is off by {far.max()} ulp"
            )


# --- equal to UpdatePlan --------------------------------------------------------------------------


def check_equal(live: torch.dtype, shadow: torch.dtype, where: str) -> None:
    for weight in EXACT if where == "own" else EXACT[1:2]:  # no weight knows an address
        compare(make(live, shadow, 1, where), [weight])
    compare(make(live, shadow, 3, where), [0.25, torch.tensor(0.75), torch.tensor(0.0)])
    if shadow == F32 and where == "own":
        for weight in (0.001, 0.3, 0.9):
            compare(make(live, shadow, 1, where), [weight], ulps=1)


@pytest.mark.parametrize(
    ("live", "shadow", "where"),
    [
        pytest.param(
            live, shadow, where, marks=[pytest.mark.rest] if where != "own" and (i + j) % 2 else []
        )
        for i, live in enumerate((F32, BF16, F16))
        for j, shadow in enumerate((F32, BF16))
        for where in ("own", "off", "arena")
    ],
    ids=str,
)
def test_equal(interpreted: Any, live: torch.dtype, shadow: torch.dtype, where: str) -> None:
    """One and three averages, weights on host and device, every length and alignment: the bits of
    `UpdatePlan.run`.
    """
    interpreted(check_equal, live, shadow, where)


def check_shares() -> None:
    for live, shadow in ((F32, F32), (BF16, F32), (F32, BF16)):
        plain = make(live, shadow, 2)
        for guard in (False, True):
            FusedPlan(plain, seed=5).run([0.25, 0.5], 7, guard)
        for share, resident in ((1e-9, 1), (0.25, 2), (0.3, 3)):
            grids: list[int] = []
            limited = make(live, shadow, 2)
            plan = FusedPlan(limited, seed=5, share=share)
            for guard in (False, True):
                plan.run([0.25, 0.5], 7, guard)
            assert all(torch.equal(bits(limited, k), bits(plain, k)) for k in range(2))
            for launch in plan.launches:
                launch.kernel = Nothing(grids)
            plan.run([0.25, 0.5], 8)
            assert grids == [resident]
    few = [ShadowPair("w", [torch.zeros(300)], torch.ones(300), numbers(0))]
    plan, grids = FusedPlan(few, share=0.9), []
    plan.run([0.5], 0)
    assert (few[0].shadows[0] == 0.5).all()
    plan.launches[0].kernel = Nothing(grids)
    plan.run([0.5], 1)
    assert grids == [2], "there is work for two"


def test_a_share_of_the_device(interpreted: Any) -> None:
    """Few programs that take turns give the same bits, and no more of them are launched."""
    interpreted(check_shares)


def check_attached_share() -> None:
    os.environ["DIST_EMA_TRITON"] = "1"
    found = []
    for overlap in (True, 0.25):
        torch.manual_seed(0)
        model = torch.nn.Linear(60, 50)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = EMA(model, 0.75, dtype=BF16)
        with pytest.raises(ValueError, match=r"a share between 0 and 1, got 1\.5"):
            ema.attach(optimizer, overlap=1.5)
        ema.attach(optimizer, overlap=overlap)
        for _ in range(3):
            model(torch.ones(2, 60)).sum().backward()
            optimizer.step()
        ema.to(dtype=F32)  # another plan, under the same limit
        optimizer.step()
        found.append(ema.gather())
        limits = {launch.kind.resident for launch in ema.weights.updates.plan.launches}
        assert limits == {0 if overlap is True else 2}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_attached_to_a_share(interpreted: Any) -> None:
    """`attach(overlap=0.25)` reaches the kernel, and every plan that is made later."""
    interpreted(check_attached_share)


def check_rows(live: torch.dtype, shadow: torch.dtype, want: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    sizes = [100, 900, 50]
    n = sum(sizes)
    columns = [torch.randn(n + 1).to(dtype)[1:].split(sizes) for dtype in (live, shadow)]
    pairs = [
        ShadowPair(f"w.{i}", [own], value, Numbering(11 * i))
        for i, (value, own) in enumerate(zip(*columns, strict=True))
    ]
    (launch,) = FusedPlan(pairs).launches
    assert [(row[0], row[2]) for row in launch.rows.tolist()] == want
    for weight in EXACT:
        compare(pairs, [weight])


@pytest.mark.parametrize(
    ("live", "shadow", "want"),
    [
        (F32, F32, [(3, 0), (1047, 1)]),
        (BF16, F32, [(7, 0), (1043, 1)]),
        # What is rounded is not joined: the name is a part of its key.
        (BF16, BF16, [(100, 0), (3, 0), (897, 1), (50, 0)]),
    ],
    ids=str,
)
def test_rows_of_a_cut_shard(interpreted: Any, live: Any, shadow: Any, want: Any) -> None:
    """(length, wide accesses) of neighbours that begin one element behind 16 bytes."""
    interpreted(check_rows, live, shadow, want)


def check_guard(live: torch.dtype, shadow: torch.dtype) -> None:
    for weight in (0.25, torch.tensor(0.0), 1.0):
        pairs = make(live, shadow, 2)
        before = twin(pairs)
        for pair in pairs:
            for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
                pair.live[i::7] = value
        compare(pairs, [weight, 0.5], guard=True)
        for pair, old in zip(pairs, before, strict=True):
            poisoned = ~pair.live.isfinite()
            assert torch.equal(pair.shadows[0][poisoned], old.shadows[0][poisoned])
            assert pair.shadows[0].isfinite().all()


@pytest.mark.parametrize("shadow", [F32, BF16], ids=str)
@pytest.mark.parametrize("live", [F32, BF16, F16], ids=str)
def test_guard(interpreted: Any, live: torch.dtype, shadow: torch.dtype) -> None:
    """Where live is not finite the shadow stays, bit for bit, at any weight."""
    interpreted(check_guard, live, shadow)


def check_poison() -> None:
    infinite = [0x7F800000, -0x00800000, 0x3F800000]
    for shadow in (F32, BF16):
        # nan of both signs and some payloads, 50 times, because the noise differs; then inf, -inf
        # and 1
        live = torch.tensor(
            [-1, 0x7FFFFFFF, 0x7FC00001, 0x7FC00000] * 50 + infinite, dtype=torch.int32
        ).view(F32)
        pairs = [ShadowPair("w", [torch.ones(203, dtype=shadow)], live, Numbering())]
        FusedPlan(pairs).run([0.25], 0)
        got = pairs[0].shadows[0]
        assert got[:200].isnan().all()
        assert got[200:].tolist() == [float("inf"), float("-inf"), 1.0]


def test_poison_passes(interpreted: Any) -> None:
    """Without guard the infinite stay infinite and nan stays nan: a carry of the rounding must not
    make one the other.
    """
    interpreted(check_poison)


def check_neighbours() -> None:
    for shift in range(5):
        room, live = torch.full((2000,), 7.0), torch.ones(1500)
        pairs = [ShadowPair("w", [room[shift : shift + 1500]], live, numbers(0))]
        FusedPlan(pairs).run([1.0], 0)
        assert (room[shift : shift + 1500] == 1).all()
        assert (room[:shift] == 7).all()
        assert (room[shift + 1500 :] == 7).all()


def test_neighbours_stay(interpreted: Any) -> None:
    """The mask of the last program: nothing before or behind a shadow is written."""
    interpreted(check_neighbours)


# --- the noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "w", "layers.0.attn.qkv.weight", "gewichtß"])
def test_the_key_is_linear(name: str) -> None:
    """[Note: keys]: crc of the whole from the crc of its ends."""
    for update in (0, 1, 12345):
        head, columns = crc32(f"3/{update}/".encode()), gpu_launch.name_columns(name)
        key = crc32(name.encode())
        for bit in range(32):
            key ^= columns[bit] & 0xFFFFFFFF if head >> bit & 1 else 0
        assert key == noise_key(3, update, name)


# A range of a row-major weight; rows and columns of it; a box inside; channels_last: whole, a
# range, some channels.
BOXES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, Region]] = {
    "range": ((40, 30), None, Region((0, 0), (40, 30), 217, 1150)),
    "rows": ((40, 30), None, Region((5, 0), (20, 30), 7, 551)),
    "columns": ((40, 30), None, Region((0, 7), (40, 9), 5, 351)),
    "one column": ((900, 3), None, Region((0, 2), (900, 1), 0, 900)),
    "inside": ((9, 20, 11), None, Region((2, 3, 4), (6, 15, 6), 7, 533)),
    "channels_last": ((12, 7, 3, 5), (0, 2, 3, 1), Region((0, 0, 0, 0), (12, 3, 5, 7), 0, 1260)),
    "channels_last range": (
        (12, 7, 3, 5),
        (0, 2, 3, 1),
        Region((0, 0, 0, 0), (12, 3, 5, 7), 333, 1111),
    ),
    "channels_last box": ((12, 7, 3, 5), (0, 2, 3, 1), Region((4, 0, 1, 2), (8, 3, 3, 4), 10, 280)),
    "scalar": ((), None, Region((), (), 0, 1)),
    "no columns": ((4, 3), None, Region((0, 3), (4, 0), 0, 0)),
    "empty": ((4, 3), None, Region((4, 0), (0, 3), 0, 0)),
}


def both(kind: str) -> tuple[Numbering, Callable[[int, int], Tensor]]:
    """The formula that `Numbering.of` makes, and the numbers cut out of a tensor that holds them
    all.
    """
    shape, order, region = BOXES[kind]
    raw = torch.zeros(shape)
    record = Shard(
        "w", "trainable", shape, raw, (torch.nn.Module(), "w"), region, lambda: raw, 0, order
    )
    every = torch.arange(raw.numel()).view(shape)
    every = every if order is None else every.permute(order)
    block = every[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))]
    held = block.flatten()[region.begin : region.end]
    return Numbering.of(record, region), lambda a, b: held[a:b]


@pytest.mark.parametrize("kind", BOXES)
def test_numbering(kind: str) -> None:
    """`Numbering.of` counts as torch does, in one piece and in two."""
    numbering, want = both(kind)
    n = BOXES[kind][2].numel
    assert torch.equal(numbering(0, n), want(0, n))
    assert torch.equal(numbering(n // 3, n), want(n // 3, n))
    assert numbering.last(n) >= int(want(0, n).max() if n else 0)


def test_numbering_is_short() -> None:
    """Every dimension costs the kernel a division: neighbours are joined, and those of size 1 left
    out.
    """
    assert Numbering(0, 0, (40, 5, 6), (30, 6, 1)).joined == ([], 1)
    assert Numbering(0, 0, (40, 1, 6), (30, 6, 1)).joined == ([(6, 1)], 30)
    assert Numbering(0, 0, (1, 8, 5, 7, 3), (9, 105, 7, 1, 35)).joined == ([(3, 35), (35, 1)], 105)


def check_boxes(kind: str) -> None:
    numbering, want = both(kind)
    n = BOXES[kind][2].numel
    pairs = [ShadowPair("w", [draw(n, BF16, 1)], draw(n, F32, 2), numbering)]
    other = [ShadowPair("w", [pairs[0].shadows[0].clone()], pairs[0].live, want)]
    FusedPlan(pairs, 1).run([0.25], 2)
    UpdatePlan(other, 1).run([0.25], 2)
    assert torch.equal(bits(pairs), bits(other))


@pytest.mark.parametrize("kind", BOXES)
def test_boxes(interpreted: Any, kind: str) -> None:
    """Compact shadows of column shards and channels_last weights: the kernel's digits,
    `_numbers`.
    """
    interpreted(check_boxes, kind)


def check_huge() -> None:
    for base in (0, (1 << 32) - 300, 5 << 40):
        pairs = [ShadowPair("w", [draw(700, BF16, 1)], draw(700, F32, 2), Numbering(base))]
        compare(pairs, [0.25])
        rows = [
            ShadowPair(
                "w",
                [draw(700, BF16, 1)],
                draw(700, F32, 2),
                Numbering(3, base, (90, 9), (1 << 33, 1)),
            )
        ]
        compare(rows, [0.25])


def test_huge(interpreted: Any) -> None:
    """Element numbers beyond 32 bits enter the hash whole."""
    interpreted(check_huge)


def check_pairs() -> None:
    for numbering in NUMBERINGS.values():
        pair = ShadowPair("w", [draw(701, BF16, 1)], draw(701, F32, 2), numbering)
        one_by_one = partial(Numbering.__call__, numbering)
        other = ShadowPair("w", [pair.shadows[0].clone()], pair.live, one_by_one)
        FusedPlan([pair], 3).run([0.25], 5)
        UpdatePlan([other], 3, passes=False).run([0.25], 5)
        assert torch.equal(pair.shadows[0], other.shadows[0]), numbering


def test_one_hash_for_two(interpreted: Any) -> None:
    """Rows that number pairs, and rows that cannot."""
    interpreted(check_pairs)


def check_every_bit() -> None:
    n = 4096
    live, index = torch.full((n,), 1.0 + 2.0**-9), torch.arange(n)
    for update in range(3):
        pairs = [ShadowPair("w", [torch.ones(n, dtype=BF16)], live, Numbering())]
        FusedPlan(pairs, 9).run([1.0], update)
        up = noise(9, update, "w", index) + 0x4000 >= 1 << 16
        assert torch.equal(pairs[0].shadows[0] > 1, up)


def test_noise(interpreted: Any) -> None:
    """The kernel rounds up exactly where `noise` says so, in every update."""
    interpreted(check_every_bit)


# --- what is taken, and what it costs -------------------------------------------------------------


def check_supports() -> None:
    ones = torch.ones(4)
    assert available(CPU)
    assert not available(torch.device("meta"))
    FusedPlan([ShadowPair("w", [ones, ones], ones.half(), numbers(3))])
    FusedPlan([ShadowPair("w", [ones.bfloat16()], ones, numbers(3))])
    for shadows, live, indices in (
        ([ones.double()], ones, numbers(0)),
        ([ones], ones.double(), numbers(0)),
        ([ones.to(torch.complex64)], ones.to(torch.complex64), numbers(0)),
        ([ones.half()], ones.half(), numbers(0)),
        ([ones, ones.bfloat16()], ones, numbers(0)),
        ([ones, torch.ones(3)], ones, numbers(0)),
        ([torch.ones(8)[::2]], ones, numbers(0)),
        ([ones.bfloat16()], ones, lambda a, b: torch.arange(a, b) * 2),
        ([ones.bfloat16()], ones, Numbering(0, 0, (2,) * 5, (81, 54, 18, 6, 2))),
        ([ones.bfloat16()], ones, Numbering(0, 0, (2, 1 << 30), (1 << 31, 1))),
    ):
        pair = ShadowPair("odd", list(shadows), live, indices)
        with pytest.raises(ValueError, match="^odd: no kernel takes"):
            FusedPlan([ShadowPair("w", [ones], ones, numbers(0)), pair])


def test_supports(interpreted: Any) -> None:
    """What no launch takes is refused by name: other dtypes, strides, lengths and element
    numbers.
    """
    interpreted(check_supports)


def test_not_without_the_interpreter() -> None:
    """A CPU has the kernel only where Triton is interpreted."""
    assert not available(CPU)
    with pytest.raises(ValueError, match="w: no kernel takes"):
        FusedPlan([ShadowPair("w", [torch.ones(1)], torch.ones(1), numbers(0))])


def check_fallback() -> None:
    pairs = make(F32, F32, 1) + make(BF16, BF16, 1)
    pairs += [ShadowPair("double", [draw(700, torch.float64, 1)], draw(700, F32, 2), numbers(0))]
    pairs += [
        ShadowPair(
            "odd", [draw(700, BF16, 1)], draw(700, F32, 2), lambda a, b: torch.arange(a, b) ** 2
        )
    ]
    other = twin(pairs)
    plan = FusedPlan(pairs, 4, UpdatePlan)
    plan.run([0.25], 3)
    UpdatePlan(other, 4).run([0.25], 3)
    assert all(torch.equal(a.shadows[0], b.shadows[0]) for a, b in zip(pairs, other, strict=True))
    assert plan.pairs == pairs
    assert len(plan.launches) == 2
    FusedPlan([], 4, UpdatePlan).run([0.5], 0)


def test_fallback(interpreted: Any) -> None:
    """A list of all sorts: one launch per dtype, the rest by `UpdatePlan`, the same result."""
    interpreted(check_fallback)


def check_cost() -> None:
    plan = FusedPlan(make(BF16, F32, 2) + make(BF16, BF16, 2))
    filled: list[float] = []
    programs: list[int] = []
    tensors = [tensor.data_ptr() for tensor in plan.tensors]
    (weights,) = plan.device_weights.values()
    weights.places = [Fill(place, filled) for place in weights.places]  # type: ignore[misc]
    for launch in plan.launches:
        launch.kernel = Count(launch.kernel, programs)
    for update in range(4):
        plan.run([0.25, 0.5 if update < 2 else 0.75], update)
    assert filled == [0.25, 0.5, 0.75], "a weight is sent when it changes"
    assert programs == [sum(-(-n // 256) for n in AWKWARD)] * 8, "one launch per dtype and update"
    assert [tensor.data_ptr() for tensor in plan.tensors] == tensors
    plan.run([0.25, torch.tensor(0.5)], 4)
    plan.run([0.25, 0.75], 5)
    assert filled == [0.25, 0.5, 0.75, 0.75], "a tensor came between"
    assert FusedPlan([ShadowPair("w", [torch.ones(0)], torch.ones(0), numbers(0))]).launches == []


class Fill:
    def __init__(self, place: Tensor, seen: list[float]) -> None:
        self._place, self._seen = place, seen

    def fill_(self, value: float) -> None:
        self._seen.append(value)
        self._place.fill_(value)

    def copy_(self, value: Tensor) -> None:
        self._place.copy_(value)


class Count:
    def __init__(self, kernel: Any, seen: list[int]) -> None:
        self.kernel, self._seen = kernel, seen

    def __getitem__(self, grid: tuple[int]) -> Any:
        self._seen.append(*grid)
        return self.kernel[grid]


def test_cost(interpreted: Any) -> None:
    """One launch per dtype, a weight written only when it changed, nothing allocated."""
    interpreted(check_cost)


def check_tables() -> None:
    pairs = [ShadowPair("a", [torch.zeros(600)], torch.ones(600), numbers(0))]
    pairs += [ShadowPair("b", [torch.zeros(5)[1:]], torch.ones(4), numbers(0))]
    plan = FusedPlan(pairs)
    (launch,) = plan.launches
    assert launch.blocks.tolist() == [0, 0, 0, 1]
    rows = launch.rows.tolist()
    assert [row[:3] for row in rows] == [[600, 0, 1], [4, 3, 0]]
    assert {t.data_ptr() for t in (pairs[1].live, launch.rows, launch.blocks)} <= {
        t.data_ptr() for t in plan.tensors
    }
    assert [row[4:] for row in rows] == [
        [pair.live.data_ptr(), pair.shadows[0].data_ptr()] for pair in pairs
    ]


def test_tables(interpreted: Any) -> None:
    """Lengths, first programs, whether 16-byte loads are allowed, and addresses."""
    interpreted(check_tables)


# --- inside EMA -----------------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """fp32, bfloat16 and double weights, channels_last, a bias, an averaged buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30)
        self.b = torch.nn.Linear(30, 9).to(BF16)
        self.c = torch.nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last)
        self.d = torch.nn.Linear(3, 3).double()


def averaged(triton: bool, kind: str, options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """(its plan, all averages) after steps of which two are skipped and one leaves nan."""
    os.environ["DIST_EMA_TRITON"] = str(int(triton))
    torch.manual_seed(0)
    model = Mixed()
    if kind != "none":
        model = wrap(kind, model)
    optimizer = Skippable(model.parameters(), {})
    ema = EMA(model, [0.75, 0.5, Constant(0.0)], buffers="average", **options)
    ema.attach(optimizer, guard=True, start=1)
    if "overlapped" in options.get("only", ""):
        ema.weights.updates.engine = Overlapped(Late(0))
    generator = torch.Generator().manual_seed(1)
    for step in range(7):
        with torch.no_grad():
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            model.get_buffer(next(name for name, _ in model.named_buffers())).add_(1)
            if step == 4:
                next(iter(model.parameters())).grad.view(-1)[::5] = float("nan")
        optimizer.found_inf = torch.full((), float(step in (2, 5)))
        optimizer.step()
    return ema.weights.updates.plan, [
        value for which in range(3) for value in ema.gather(which).values()
    ]


def check_ema(kind: str, options: dict[str, Any]) -> None:
    plan, got = averaged(True, kind, options)
    other, want = averaged(False, kind, options)
    assert isinstance(plan, FusedPlan)
    assert isinstance(other, UpdatePlan)
    assert plan.launches
    if kind == "none":
        assert {launch.kind.live for launch in plan.launches} == {F32, BF16}
        assert [pair.name for pair in plan.others.pairs] == ["d.weight", "d.bias"], (
            "doubles go another way"
        )
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(value.isnan().any() for value in got if value.is_floating_point())


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": BF16}, {"only": "|overlapped", "dtype": BF16}, {"device": "cpu"}],
    ids=str,
)
def test_an_ema_is_the_same(interpreted: Any, options: dict[str, Any]) -> None:
    """Attached, guarded, with skipped steps, three averages: with Triton and without, bit for
    bit.
    """
    interpreted(check_ema, "none", options)


def check_rank() -> None:
    check_ema("ddp", {"dtype": BF16})


def check_ranks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        run_ranks(2, check_rank, method="fork")


@pytest.mark.multirank
def test_shards_of_an_ema_are_the_same(interpreted: Any) -> None:
    """Cut over two ranks, the element numbers do not begin at 0."""
    interpreted(check_ranks)


def check_the_hot_path() -> None:
    os.environ["DIST_EMA_TRITON"] = "1"
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3).to(BF16))
    optimizers = [Skippable(model.parameters(), {})]
    ema = EMA(model, [Power(gamma=1.0), 0.99], dtype=BF16)
    ema.attach(*optimizers)
    ema.weights.updates.engine = Overlapped(Late(0))
    steps(optimizers, 4)
    launched: list[int] = []
    for launch in ema.weights.updates.plan.launches:
        launch.kernel = Nothing(launched)
    with Watch() as watch:
        steps(optimizers, 4)
    assert len(launched) >= 6, "two dtypes"
    assert watch.largest <= 600, "the optimizer's own"


class Nothing:
    """In place of the kernel, which the interpreter runs on the host."""

    def __init__(self, seen: list[int]) -> None:
        self._seen = seen

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *_, **__: self._seen.append(*grid)


def test_the_hot_path(interpreted: Any) -> None:
    """All that happens on the host around a launch: nothing is looked at, nothing is allocated."""
    interpreted(check_the_hot_path)


# --- [Note: proof] --------------------------------------------------------------------------------


def check_switch() -> None:
    os.environ["DIST_EMA_TRITON"] = "0"
    assert not available(CPU)
    os.environ["DIST_EMA_TRITON"] = "1"
    assert available(CPU)


def test_switch(interpreted: Any) -> None:
    """DIST_EMA_TRITON=0."""
    interpreted(check_switch)


def check_proof(how: str) -> None:
    os.environ["DIST_EMA_TRITON"] = "1"
    model = torch.nn.Linear(50, 50)
    call = gpu_launch.Launch.__call__

    def broken(launch: Any, head: int, guard: bool) -> None:
        if how == "raises":
            raise OSError("no C compiler")
        call(launch, head + (how == "noise"), guard and how != "guard")

    gpu_plan.is_proved.cache_clear()
    gpu_launch.Launch.__call__ = broken  # type: ignore[method-assign]
    try:
        with pytest.warns(UserWarning, match="is not used on cpu") as caught:
            plan = EMA(model, 0.75, dtype=BF16).weights.updates.plan
        assert len(caught) == 1
        assert (how == "raises") == ("OSError: no C compiler" in str(caught[0].message))
        assert isinstance(plan, FusedPlan)
        assert plan.launches == []
        ema = EMA(model, [0.75, 0.5], dtype=F32)  # another kind: no further word, and no attempt
        before = ema.weights.averages[0].averaged[0].shadow.clone()
        with torch.no_grad():
            model.weight += 1
        ema.update()
        assert torch.equal(
            ema.weights.averages[0].averaged[0].shadow,
            before.lerp(model.weight.flatten(), 0.25),
        )
    finally:
        gpu_launch.Launch.__call__ = call  # type: ignore[method-assign]
        gpu_plan.is_proved.cache_clear()
        gpu_plan.REFUSED.clear()
    assert len(EMA(model, 0.75, dtype=BF16).weights.updates.plan.launches) == 1


@pytest.mark.parametrize("how", ["raises", "noise", "guard"])
def test_a_wrong_kernel_is_not_used(interpreted: Any, how: str) -> None:
    """It is compared with `UpdatePlan` before it is trusted; one warning per device."""
    interpreted(check_proof, how)


def test_the_comparison_does_not_recurse() -> None:
    """Without a fallback there is no comparison: the comparison itself must not recurse."""
    assert gpu_plan.FusedPlan([], 0).others is None


def test_triton_is_not_imported() -> None:
    """An EMA on a CPU needs no Triton: it is imported when a plan for a device is made."""
    source = """
import sys, torch
from dist_ema import EMA
known = "triton" in sys.modules
EMA(torch.nn.Linear(2, 2)).update()
sys.exit("triton" in sys.modules and not known)
"""
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


class Placed:
    """A tensor at an address that the test chooses."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __len__(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return self._address


def test_addresses_beyond_63_bits() -> None:
    """Unified memory of an XPU may lie in the upper half: the table holds the same 64 bits."""
    live: Any = Placed((1 << 64) - 32)
    shadow: Any = Placed(1 << 63)
    row = torch.tensor(gpu_launch.table_row(ShadowPair("w", [shadow], live, numbers(0)), None, 0))
    assert [address & (1 << 64) - 1 for address in row[4:].tolist()] == [(1 << 64) - 32, 1 << 63]
