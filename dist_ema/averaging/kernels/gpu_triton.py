"""The Triton kernel of an update. Imports triton, so `gpu_plan` imports it when a plan needs one.

`block` is the number of elements that one program moves; tables are those of gpu_launch.

[Note: contraction]  weight * (live - shadow) + shadow is one fused multiply-add here, as compilers
make it of torch's own lerp; we say so, because Triton's default differs between versions. Only
older interpreters of Triton round twice. The two differ by 1 ulp of the larger operand, unless the
weight is a power of two. In fp32 that moves a stochastic rounding once in 65536 elements.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["TYPES", "is_interpreted", "update_kernel"]

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def is_interpreted() -> bool:
    """Triton runs kernels on the host (TRITON_INTERPRET=1 when it was imported)."""
    if hasattr(triton, "knobs"):
        return bool(triton.knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET") == "1"  # triton before 3.4


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """As in rounding. x: uint32"""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x46CA68B5
    return x ^ (x >> 16)


@triton.jit
def _hash(pair: tl.tensor, key: tl.tensor, huge: tl.constexpr) -> tl.tensor:
    """As in rounding. pair: int64 if huge, else uint32"""
    low = pair.to(tl.uint32) ^ (pair >> 32).to(tl.uint32) * 0x9E3779B1 if huge else pair
    return _mix(_mix(low ^ key) ^ (key >> 7))


@triton.jit
def _load_all(row: tl.tensor, n: tl.constexpr) -> tl.tuple:
    """The n columns of the table from `row` on. No load waits for another."""
    columns: tl.tuple = ()
    for k in tl.static_range(n):
        columns += (tl.load(row + k),)
    return columns


@triton.jit
def _numbers(
    row: tl.tuple, start: tl.tensor, lane: tl.tensor, levels: tl.constexpr, huge: tl.constexpr
) -> tl.tensor:
    """Numbers of the elements start + lane in the full weight: a `Numbering`.

    The long division is done once per program. uint32 unless huge: sums and products wrap, and
    the result does not need more.
    """
    word = tl.int64 if huge else tl.uint32
    place = row[0] + start
    number = row[1].to(word)
    carry = lane.to(tl.uint32)
    for level in tl.static_range(levels - 1):
        size, stride = row[2 + 2 * level], row[3 + 2 * level]
        carry += (place % size).to(tl.uint32)
        place = place // size
        number += (carry % size.to(tl.uint32)).to(word) * stride.to(word)
        carry = carry // size.to(tl.uint32)
    return number + (place.to(word) + carry.to(word)) * row[2 * levels].to(word)


@triton.jit
def _noise(
    paired: tl.tensor, row: tl.tuple, start: tl.tensor, key: tl.tensor,
    levels: tl.constexpr, huge: tl.constexpr, block: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As in rounding: 16 bits per element, uint32. paired: the row numbers pairs of elements."""
    if paired:
        word = _hash(_numbers(row, start // 2, tl.arange(0, block // 2), levels, huge), key, huge)
        noise = tl.interleave(word & 0xFFFF, word >> 16)
    else:
        number = _numbers(row, start, tl.arange(0, block), levels, huge)
        shift = (number & 1).to(tl.uint32) * 16
        noise = (_hash(number >> 1, key, huge) >> shift) & 0xFFFF
    return noise


@triton.jit
def _key(name: tl.tensor, columns: tl.tensor, head: tl.tensor) -> tl.tensor:
    """The crc of "seed/update/name" from the crc of either end ([Note: keys] in gpu_launch)."""
    bit = tl.arange(0, 32)
    chosen_columns = tl.where((head >> bit) & 1 == 1, tl.load(columns + bit), 0)
    return (name.to(tl.int32) ^ tl.xor_sum(chosen_columns, 0)).to(tl.uint32, bitcast=True)


@triton.jit
def _round(exact: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """fp32 -> the bits of the bfloat16 below or above, int16; as in rounding."""
    # NOTE: cut by bits, because the interpreter truncates in a cast and a chip rounds. The sum
    # would carry nan into zero; of inf it touches nothing that is kept.
    bits = tl.where(exact != exact, 0x7FC00000, exact.to(tl.uint32, bitcast=True) + noise)
    return (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _move(
    target: tl.tensor, targets: tl.tensor, live: tl.tensor, at: tl.tensor, inside: tl.tensor,
    weights: tl.tensor, noise: tl.tensor, shadow_type: tl.constexpr, averages: tl.constexpr,
    guard: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Move the shadows at `at` towards live, which is read once for all of them.

    target: the first address of `targets`, loaded already. wide: every lane is inside, and
    addresses allow loads of 16 bytes.
    """
    for k in tl.static_range(averages):
        weight = tl.load(weights + k)
        if k > 0:
            target = tl.load(targets + k)
        place = target.to(tl.pointer_type(shadow_type)) + at
        if wide:
            place = tl.max_contiguous(tl.multiple_of(place, 16), block)
            shadow = tl.load(place).to(tl.float32)
        else:
            shadow = tl.load(place, mask=inside).to(tl.float32)
        towards = live
        if guard:
            towards = tl.where(tl.abs(live) < float("inf"), live, shadow)
        step = towards - shadow
        # As in torch.lerp, whose kernels are contracted: [Note: contraction].
        near = tl.abs(weight) < 0.5
        moved = tl.fma(tl.where(near, weight, weight - 1), step, tl.where(near, shadow, towards))
        if shadow_type == tl.bfloat16:
            place = place.to(tl.pointer_type(tl.int16), bitcast=True)
            moved = _round(moved, noise)
        if wide:
            tl.store(place, moved)
        else:
            tl.store(place, moved, mask=inside)


@triton.jit
def _update_block(
    program: tl.tensor, blocks: tl.tensor, tensors: tl.tensor, columns: tl.tensor,
    weights: tl.tensor, head: tl.tensor, live_type: tl.constexpr, shadow_type: tl.constexpr,
    averages: tl.constexpr, levels: tl.constexpr, huge: tl.constexpr, guard: tl.constexpr,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """`block` elements of one tensor."""
    which = tl.load(blocks + program)
    # The width of the table: `table_row`.
    row = tensors + which * (5 + averages + (2 * levels + 2 if levels else 0))
    # NOTE: all before the first branch, so that one wait covers them.
    n, first, wide, name, source, target = _load_all(row, 6)
    start = (program - first).to(tl.int64) * block
    left = n - start
    lane = tl.arange(0, block)
    at = start + lane
    noise = lane
    if levels:
        numbers = row + 5 + averages
        paired, digits = tl.load(numbers), _load_all(numbers + 1, 2 * levels + 1)
        key = _key(name, columns + which * 32, head)
        noise = _noise(paired == 1, digits, start, key, levels, huge, block)
    source = source.to(tl.pointer_type(live_type)) + at
    # NOTE: two branches, because a mask that depends on the length forbids 16-byte loads.
    if (left >= block) & (wide == 1):
        source = tl.max_contiguous(tl.multiple_of(source, 16), block)
        live = tl.load(source).to(tl.float32)
        _move(
            target, row + 5, live, at, lane < block, weights, noise,
            shadow_type, averages, guard, True, block,
        )  # fmt: skip
    else:
        inside = lane < left
        live = tl.load(source, mask=inside).to(tl.float32)
        _move(
            target, row + 5, live, at, inside, weights, noise,
            shadow_type, averages, guard, False, block,
        )  # fmt: skip


# NOTE: head differs in every update; specialised, it would compile three kernels.
@triton.jit(do_not_specialize=["head", "programs"])
def update_kernel(
    blocks: tl.tensor, tensors: tl.tensor, columns: tl.tensor, weights: tl.tensor, head: tl.tensor,
    programs: tl.tensor, live_type: tl.constexpr, shadow_type: tl.constexpr, averages: tl.constexpr,
    levels: tl.constexpr, huge: tl.constexpr, guard: tl.constexpr, block: tl.constexpr,
    resident: tl.constexpr,
) -> None:  # fmt: skip
    """All `programs` of the tables: one each, or in turns by those that are resident."""
    if resident:
        # NOTE: what does not change in the loop stays in it, as registers are what is scarce.
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0), disable_licm=True):
            _update_block(
                program, blocks, tensors, columns, weights, head,
                live_type, shadow_type, averages, levels, huge, guard, block,
            )  # fmt: skip
    else:
        _update_block(
            tl.program_id(0), blocks, tensors, columns, weights, head,
            live_type, shadow_type, averages, levels, huge, guard, block,
        )  # fmt: skip
