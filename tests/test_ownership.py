"""Geometry of regions, by brute force: every element is counted once and lies where it says.

How to read a failure: the seed is fixed, so a failing draw comes back; the assertion names sizes,
range or box.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.averaging.kernels.eager import Direct, Packed, ShadowPair, UpdatePlan
from dist_ema.sharding import arena, discovery, ownership
from dist_ema.sharding.arena import allocate
from dist_ema.sharding.fingerprint import WINDOW, fingerprint
from dist_ema.sharding.geometry import Box, boxes, boxes_with_data, even, runs, split_box
from dist_ema.sharding.numbering import Numbering
from dist_ema.sharding.ownership import assign
from dist_ema.sharding.records import Region, Shard

CPU = torch.device("cpu")


def shapes(
    n: int, seed: int, least: int = 1, most: int = 6
) -> Iterator[tuple[random.Random, tuple[int, ...]]]:
    """Random shapes up to 4-D, many of their dimensions 1."""
    draw = random.Random(seed)
    for _ in range(n):
        dims = draw.randint(0, 4)
        yield (
            draw,
            tuple(1 if draw.random() < 0.15 else draw.randint(least, most) for _ in range(dims)),
        )


def a_range(draw: random.Random, n: int) -> tuple[int, int]:
    begin = draw.randint(0, n)
    return begin, draw.randint(begin, n)


def a_box(draw: random.Random, shape: tuple[int, ...]) -> Box:
    """A block with at least one element, or all of a 0-dim weight."""
    offsets = tuple(draw.randrange(n) for n in shape)
    return Box(offsets, tuple(draw.randint(1, n - o) for o, n in zip(offsets, shape, strict=True)))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


# --- boxes and runs -------------------------------------------------------------------------------


def test_boxes_cover() -> None:
    """boxes: any range is at most 2 * ndim - 1 blocks, exactly covered, in order."""
    most = [0] * 5
    for draw, sizes in shapes(4000, seed=0, least=0):
        begin, end = a_range(draw, math.prod(sizes))
        found = list(boxes(sizes, begin, end))
        elements = [numbered(sizes)[box.slices].ravel() for box in found]
        covered = np.concatenate([[], *elements]).tolist()
        assert covered == list(range(begin, end)), (sizes, begin, end)
        assert all(box.numel > 0 for box in found)
        most[len(sizes)] = max(most[len(sizes)], len(found))
    assert most == [1, 1, 3, 5, 7]


def test_boxes_of_whole() -> None:
    """A whole weight is one block: full files and state_dicts must not be cut for nothing."""
    for _, sizes in shapes(200, seed=1):
        assert list(boxes(sizes, 0, math.prod(sizes))) == [Box((0,) * len(sizes), sizes)]


def test_runs() -> None:
    """runs: the contiguous stretches of a block in the file, in the block's own order, and as few
    as there can be.
    """
    for draw, shape in shapes(2000, seed=2):
        box = a_box(draw, shape)
        found = list(runs(box, shape))
        covered = list(itertools.chain.from_iterable(range(start, start + n) for start, n in found))
        wanted = numbered(shape)[box.slices].ravel()
        assert covered == wanted.tolist(), (box, shape)
        # NOTE: as few as the dimensions that are covered completely allow; rows that touch by
        # chance stay apart.
        whole = next((d for d in reversed(range(len(shape))) if box.sizes[d] != shape[d]), 0)
        assert len(found) == math.prod(box.sizes[:whole])


def test_split_box() -> None:
    """split_box: blocks of at most `most` elements, in row-major order, exactly the box."""
    for draw, shape in shapes(2000, seed=3):
        box, most = a_box(draw, shape), draw.randint(1, 40)
        found = list(split_box(box, most))
        assert all(0 < block.numel <= most for block in found), (box, most)
        covered = np.concatenate([numbered(shape)[block.slices].ravel() for block in found])
        assert covered.tolist() == numbered(shape)[box.slices].ravel().tolist(), (box, most)


def test_split_box_wastes_nothing() -> None:
    """A box that fits stays one, and rows are taken together as long as they fit."""
    assert list(split_box(Box((1, 2), (3, 4)), 12)) == [Box((1, 2), (3, 4))]
    assert [block.numel for block in split_box(Box((0, 0), (7, 4)), 8)] == [8, 8, 8, 4]
    assert [block.numel for block in split_box(Box((0, 0), (2, 5)), 3)] == [3, 2, 3, 2]


def test_box() -> None:
    """Box.meet is the set intersection, None if empty; Box.within cuts it out of a tensor that
    holds the outer box.
    """
    met = 0
    for draw, shape in shapes(2000, seed=4):
        a, b = a_box(draw, shape), a_box(draw, shape)
        common, all_ = a.intersect(b), numbered(shape)
        wanted = sorted({*all_[a.slices].ravel().tolist()} & {*all_[b.slices].ravel().tolist()})
        assert common == b.intersect(a)
        if common is None:
            assert wanted == []
            continue
        met += 1
        assert wanted
        assert all_[common.slices].ravel().tolist() == wanted
        assert common.numel == len(wanted)
        assert all_[a.slices][common.within(a)].ravel().tolist() == wanted
    assert 500 < met < 2000


def test_even() -> None:
    """even: parts in rank order that meet end to end and differ by one element at most."""
    for begin, n, size in itertools.product((0, 5), range(12), range(1, 6)):
        parts = [even(begin, begin + n, rank, size) for rank in range(size)]
        assert [parts[0][0], *(end for _, end in parts)] == [
            *(start for start, _ in parts),
            begin + n,
        ]
        lengths = [end - start for start, end in parts]
        assert max(lengths) - min(lengths) <= 1


# --- regions of permuted weights ------------------------------------------------------------------


def shard(weight: Tensor, order: tuple[int, ...] | None, region: Region) -> Shard:
    """The record of a weight whose storage lies in `order`."""
    place = (nn.Module(), "w")
    return Shard(
        "w", "trainable", tuple(weight.shape), weight, place, region, lambda: weight, order=order
    )


def drawn(seed: int, n: int = 800) -> Iterator[tuple[Shard, Region, Tensor]]:
    """(record, region, elements of the full weight in the region's order); half of the weights are
    permuted.
    """
    for draw, shape in shapes(n, seed):
        order = tuple(draw.sample(range(len(shape)), len(shape)))
        plain = order == tuple(range(len(shape))) or draw.random() < 0.5
        order = tuple(range(len(shape))) if plain else order
        weight = torch.arange(math.prod(shape)).view(shape)
        stored = weight.permute(order)
        box = (
            Box((0,) * len(shape), tuple(stored.shape))
            if draw.random() < 0.4
            else a_box(draw, tuple(stored.shape))
        )
        region = Region(box.offsets, box.sizes, *a_range(draw, box.numel))
        elements = stored[box.slices].reshape(-1)[region.begin : region.end]
        yield shard(weight, None if plain else order, region), region, elements


def test_pieces() -> None:
    """pieces: each block of the full row-major weight with its view, whatever the storage order;
    all of it, once.
    """
    for record, region, elements in drawn(seed=5):
        weight, seen = record.tensor, []
        data = elements.clone()
        for box, view in boxes_with_data(record, region, data):
            assert torch.equal(weight[box.slices], view), (record.shape, record.order, region)
            assert (
                view.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
            )  # *Aliases*
            seen += view.flatten().tolist()
        assert sorted(seen) == sorted(elements.tolist())


def test_pieces_write_through() -> None:
    """Writing every block from a full weight fills exactly the region: what load and copy_to do."""
    for record, region, elements in drawn(seed=6, n=300):
        data = torch.full_like(elements, -1)
        for box, view in boxes_with_data(record, region, data):
            view.copy_(record.tensor[box.slices])
        assert torch.equal(data, elements)


def test_numbering() -> None:
    """numbering: row-major numbers in the full weight, so that rounding noise is the same under any
    cut and order.
    """
    draw = random.Random(7)
    for record, region, elements in drawn(seed=7):
        start, stop = a_range(draw, region.numel)
        found = Numbering.of(record, region, CPU)(start, stop)
        assert found.dtype == torch.int64
        assert torch.equal(found, elements[start:stop]), (
            record.shape,
            record.order,
            region,
            start,
            stop,
        )


def test_numbering_of_nothing() -> None:
    """An empty shard of a rank beyond the rows (fact 4) has no numbers, and no division by its size
    of 0.
    """
    for order in (None, (1, 0)):
        empty = Region((4, 0), (0, 3), 0, 0)
        assert Numbering.of(shard(torch.zeros(4, 3), order, empty), empty, CPU)(0, 0).tolist() == []


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (1, 4, 3, 3), (6, 1, 2, 2), (2, 2, 1, 1)])
def test_channels_last(shape: tuple[int, ...]) -> None:
    """A channels_last weight as `find` records it: read in storage order, given back row-major."""
    model = nn.Module()
    values = torch.arange(math.prod(shape)).float().view(shape)
    model.w = nn.Parameter(values.clone().contiguous(memory_format=torch.channels_last))
    (found,) = discovery.find_shards(model).shards
    assert found.read().data_ptr() == model.w.data_ptr()
    rebuilt = torch.empty(shape)
    for box, view in boxes_with_data(found, found.local_region, found.read()):
        rebuilt[box.slices] = view
    assert torch.equal(rebuilt, values)
    assert torch.equal(
        Numbering.of(found, found.local_region, CPU)(0, values.numel()).float(), found.read()
    )


# --- slots and shadows ----------------------------------------------------------------------------


class Odd(nn.Module):
    """Long and short neighbours in one storage, a lone long weight, a 0-dim, an empty, a half and a
    complex one.
    """

    def __init__(self) -> None:
        super().__init__()
        n = arena.LONG
        flat = torch.randn(2 * n + 3)
        self.lone = nn.Parameter(torch.randn(n + 1))
        self.a, self.b, self.c = (nn.Parameter(part) for part in flat.split([n, 3, n]))
        self.scalar, self.empty = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.zeros(0, 4))
        self.small = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.phasor = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.last = nn.Parameter(torch.randn(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_allocate(dtype: torch.dtype) -> None:
    """Shadows begin as live, in one arena per dtype; neighbours stay neighbours, lone long ones are
    aligned, and short ones that touch nothing lie before them, end to end.
    """
    torch.manual_seed(0)
    slots = assign(discovery.find_shards(Odd()).shards, lambda _: True, split=True)
    arenas = allocate(slots, dtype, None)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    assert [arena.dtype for arena in arenas] == [dtype, wide]
    by_name = {slot.name: slot.shadow for slot in slots if slot.shadow is not None}
    for slot in slots:
        shadow = by_name[slot.name]
        assert torch.equal(shadow, slot.live.to(shadow.dtype))
        assert shadow.dtype == (wide if slot.name == "phasor" else dtype)
    bounds = sorted(
        (s.storage_offset(), s.storage_offset() + len(s))
        for s in by_name.values()
        if s.dtype == dtype
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(bounds)), (
        "two shadows overlap"
    )
    offset = {name: shadow.storage_offset() for name, shadow in by_name.items()}
    assert offset["b"] - offset["a"] == arena.LONG
    assert offset["c"] - offset["b"] == 3  # long, but it continues its neighbour in the model
    assert all(offset[name] * dtype.itemsize % arena.ALIGN == 0 for name in ("lone", "a", "last"))
    assert offset["small"] - offset["scalar"] == 1
    assert offset["small"] + 15 <= min(offset[name] for name in ("lone", "a", "b", "c", "last"))


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", range(9))
def test_a_cut_weight_and_its_shadow_are_misaligned_alike(first: int, live: torch.dtype) -> None:
    """Some element lies at a multiple of 16 bytes in both: guards `_offset` in arena."""
    model = nn.Linear(1, 1, bias=False).to(live)
    model.weight.data = torch.zeros(first + arena.LONG, dtype=live)[first:].view(-1, 1)
    (state,) = EMA(model).weights.averages[0].averaged
    assert state.shadow is not None
    ahead = -state.local.data_ptr() % 16 // live.itemsize
    assert (state.shadow.data_ptr() + ahead * state.shadow.element_size()) % 16 == 0


def test_short_weights_share_one_pack() -> None:
    """Biases between long matrices become one step of a plan: short chains lie together in the
    arena (`_starts`).
    """
    model = nn.Sequential(*[nn.Linear(128, 130) for _ in range(3)])
    slots = assign(discovery.find_shards(model).shards, lambda _: True, split=True)
    allocate(slots, torch.float32, None)
    pairs = [
        ShadowPair(slot.name, [slot.shadow], slot.live, torch.arange)
        for slot in slots
        if slot.shadow is not None
    ]
    plan = UpdatePlan(pairs, passes=False)
    direct, packed = ([s for s in plan.steps if isinstance(s, kind)] for kind in (Direct, Packed))
    assert [len(step.live) for step in direct] == [128 * 130] * 3
    assert [[len(live) for live in step.lives] for step in packed] == [[130] * 3]


def test_neighbours_in_one_storage_stay_one() -> None:
    """What lies end to end in the model (FSDP1's flat parameters) is one chain, long or short, with
    empty ones in between, in the order of the model, and so one step of a plan.
    """
    for sizes in ([7, 0, arena.LONG, 5], [arena.LONG // 2] * 3, [4, 0, 4]):
        model, flat = nn.Module(), torch.randn(sum(sizes))
        model.first = nn.Parameter(
            torch.randn(10)
        )  # no multiple of what long pieces are aligned to
        for i, part in enumerate(flat.split(sizes)):
            model.register_parameter(f"part{i}", nn.Parameter(part))
        slots = assign(discovery.find_shards(model).shards, lambda _: True, split=True)
        allocate(slots, torch.float32, None)
        pairs = [
            ShadowPair(slot.name, [slot.shadow], slot.live, torch.arange)
            for slot in slots
            if slot.shadow is not None
        ]
        plan = UpdatePlan(pairs, passes=False)
        lives = [
            live
            for step in plan.steps
            for live in (step.lives if isinstance(step, Packed) else [step.live])
        ]
        assert sorted(map(len, lives)) == sorted([10, sum(sizes)])


def test_allocate_elsewhere() -> None:
    """`device` moves all shadows there; None keeps each beside its weight."""
    slots = assign(discovery.find_shards(nn.Linear(3, 2)).shards, lambda _: True, split=True)
    assert [arena.device for arena in allocate(slots, torch.float32, torch.device("meta"))] == [
        torch.device("meta")
    ]


def test_slot_of_one_process() -> None:
    """In a world of one a slot owns and answers for all that it holds, and `average` is live until
    there is a shadow.
    """
    model = nn.Linear(3, 2)
    slots = assign(discovery.find_shards(model).shards, lambda _: True, split=True)
    for slot, weight in zip(slots, model.parameters(), strict=True):
        assert slot.averaged_region == slot.saved_region == slot.shard.local_region
        assert slot.live.data_ptr() == slot.average.data_ptr() == weight.data_ptr()
    allocate(slots, torch.float32, None)
    with torch.no_grad():
        model.weight.zero_()
    assert slots[0].live.abs().sum() == 0
    assert slots[0].average.abs().sum() > 0


def test_parts_cover() -> None:
    """parts: what a rank answers for in blocks of at most MOST, own buffers in place of the
    model's.
    """
    model = nn.BatchNorm1d(3)
    slots = assign(
        discovery.find_shards(model).shards, lambda shard: shard.kind != "buffer", split=True
    )
    own = {"running_mean": torch.tensor([7.0, 8.0, 9.0])}
    found = {
        slots[number].name: (offsets, block.tolist())
        for number, offsets, block in ownership.saved_blocks(slots, own)
    }
    assert found == {
        "weight": ((0,), [1.0] * 3), "bias": ((0,), [0.0] * 3),
        "running_mean": ((0,), [7.0, 8.0, 9.0]), "running_var": ((0,), [1.0] * 3),
        "num_batches_tracked": ((), 0),
    }  # fmt: skip


# --- fingerprints ---------------------------------------------------------------------------------


def test_fingerprint_sees_every_byte() -> None:
    """Equal bits, equal hash; any byte changed, any two elements exchanged, another length: another
    hash.
    """
    data = torch.randn(64, generator=torch.Generator().manual_seed(0))
    seen = {int(fingerprint(data))}
    assert int(fingerprint(data.clone())) in seen
    for i in range(256):
        other = data.clone()
        other.view(torch.uint8)[i] ^= 1 << (i % 8)
        seen.add(int(fingerprint(other)))
    for i in range(63):
        order = list(range(64))
        order[i], order[i + 1] = order[i + 1], order[i]
        seen.add(int(fingerprint(data[order])))
    seen |= {int(fingerprint(data[:n])) for n in range(64)}
    assert len(seen) == 1 + 256 + 63 + 64


def test_fingerprint_takes_a_megabyte() -> None:
    """Whatever the length of the data, and while the factors are made too."""
    data = torch.zeros(5 * WINDOW)
    with torch.profiler.profile(profile_memory=True) as profiled:
        fingerprint(data)
    found = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    sizes = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
    assert 1 << 20 <= max(itertools.accumulate(sizes)) <= (1 << 20) + 1000


def test_fingerprint_sees_permutations() -> None:
    """Replicas that hold the same values in another order differ: all 5 x 5 permutation matrices,
    one hash each.
    """
    rows = torch.eye(5)
    orders = list(itertools.permutations(range(5)))
    assert len({int(fingerprint(rows[list(order)].view(-1))) for order in orders}) == len(orders)


def test_fingerprint_of_all_dtypes() -> None:
    """-0.0 is not 0.0, and bool, complex and long data are hashed by their bytes."""
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    for data in (
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(2).bfloat16(),
    ):
        assert fingerprint(data) == fingerprint(data.view(torch.uint8))
    size = 4 * WINDOW
    long = torch.zeros(size + 4, dtype=torch.uint8)
    marks = set()
    for i in (0, size - 1, size, size + 3):
        long.zero_()[i] = 1
        marks.add(int(fingerprint(long)))
    assert len(marks) == 4


def test_fingerprint_of_long_tensors() -> None:
    """One bit anywhere, two elements or two windows exchanged, two signs turned: another hash."""
    n = WINDOW + 300
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        data = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(0))
        want = fingerprint(data)
        assert fingerprint(data.clone()) == want
        for at in (0, n // 2, n - 1):
            other = data.clone()
            other.view(torch.uint8)[at * data.element_size()] ^= 1
            assert fingerprint(other) != want, (dtype, at)
        other = data.clone()
        other[5], other[6] = data[6], data[5]
        assert fingerprint(other) != want
        other = data.clone()
        other[:2] *= -1  # the highest bits of two words
        assert fingerprint(other) != want
    words = torch.randn(2 * WINDOW, generator=torch.Generator().manual_seed(0))
    assert fingerprint(words) != fingerprint(words.roll(WINDOW)), "windows changed places"


def test_fingerprint_does_not_see_the_place_in_memory() -> None:
    """A view that begins at an odd byte has the hash of its copy; zeros of other lengths differ."""
    data = torch.randn(4 * WINDOW + 9).bfloat16()
    assert fingerprint(data[1:]) == fingerprint(data[1:].clone())
    assert fingerprint(data[1:-1]) == fingerprint(data[1:-1].clone())
    zeros = torch.zeros(9, dtype=torch.uint8)
    assert len({int(fingerprint(zeros[:n])) for n in range(10)}) == 10
