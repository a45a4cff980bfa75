"""`kernels.Plan` on an accelerator, in one launch for all tensors of a dtype: a Triton kernel over tables of pointers.

A launch knows nothing of lists. Two tables on the device, built once, say where everything is:

    blocks   int32 [programs]        which tensor a program works on       | 0 | 0 | 0 | 1 | 2 | 2 |
    tensors  int64 [tensors, width]  length, first program, wide loads?, crc of the name, address of live,
                                     addresses of the K shadows, numbering of the elements

A program reads BLOCK live elements once, moves K shadows towards them, and writes each shadow once: 12 bytes per fp32
element, 10 from bfloat16, 6 in bfloat16. Nothing is sent to the device per update but K weights, and those only when they
changed.

[Note: the same bits]  Stochastic rounding takes the bits of `kernels.noise`, so that an average does not depend on who
computed it. The key is the CRC-32 of "seed/update/name", and CRC is linear: crc(a + b) = L(crc(a)) ^ crc(b), where L is a
32 x 32 bit matrix that depends on the length of b only. So the columns of L for each name lie on the device, the host
sends crc("seed/update/"), and no name is hashed in an update. Element numbers come from a `Numbering`; hashes are uint32,
whose shifts are logical and whose products wrap, as the masked int64 of `kernels.noise` do.

[Note: contraction]  weight * (live - shadow) + shadow is one fused multiply-add here, as compilers make it of torch's own
lerp; we say so, because Triton's default differs between versions. Only Triton's interpreter rounds twice. The two differ
by 1 ulp of the larger operand, unless the weight is a power of two, and 1 ulp of fp32 moves a stochastic rounding once in
65536 elements.

[Note: proof]  Interpreted, the kernel is proved; no GPU has run it yet. So the first plan of a kind (device, dtypes, number
of averages, shape of the numbering) moves two small tensors by the kernel and by the fallback, and compares the bits. If
they differ, or Triton fails (it needs a C compiler), a warning says so once per device, and the fallback is used there.
DIST_EMA_TRITON=0 in the environment leaves Triton alone.

Triton is imported when the first plan for a device is made, so nobody who averages on a CPU needs it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-untyped,import-not-found]

from ...sharding.geometry import Numbering

__all__ = ["BLOCK", "FusedPlan", "Kind", "PairLike", "Runnable", "available", "supports"]


BLOCK = 4096  # elements that one program moves, 16 per thread


WARPS = 8


LEVELS = 4  # dimensions of a Numbering, neighbours joined


LIVE = (torch.float32, torch.bfloat16, torch.float16)


SHADOW = (torch.float32, torch.bfloat16)


class PairLike(Protocol):
    """A `kernels.Pair`."""

    @property
    def name(self) -> str:
        """Of the weight: a part of the key of its noise."""

    @property
    def shadows(self) -> list[Tensor]:
        """One per average."""

    @property
    def live(self) -> Tensor:
        """What they average."""

    @property
    def indices(self) -> Callable[[int, int], Tensor]:
        """(start, stop) -> element numbers in the full weight."""


class Runnable(Protocol):
    """A plan for what this one does not take."""

    def run(self, weights: Sequence[float | Tensor], update: int, guard: bool = False) -> None:
        """Move every shadow towards live."""


def _numbering(pair: PairLike) -> Numbering | None:
    """The pair's own, or that of a run of neighbours, which is looked at element by element; None: neither.

    *Cost*: of a run, what one update of `kernels.Plan` spends on element numbers, and a host sync per 4 M elements.
    """
    if isinstance(pair.indices, Numbering):
        inner, _ = pair.indices.joined
        return (
            pair.indices
            if len(inner) < LEVELS and all(size < 1 << 30 for size, _ in inner)
            else None
        )
    n, most = len(pair.live), 1 << 22
    first = int(pair.indices(0, 1)) if n else 0
    for start in range(0, n, most):
        found = pair.indices(start, min(start + most, n))
        want = torch.arange(first + start, first + start + len(found), device=found.device)
        if not torch.equal(found, want):
            return None
    return Numbering(first)


# --- what is taken -----------------------------------------------------------------------------------------------


def available(device: torch.device) -> bool:
    """Triton is installed and compiles for `device`; in Triton's interpreter (TRITON_INTERPRET=1), for the CPU alone.
    The environment variable DIST_EMA_TRITON=0 says no."""
    if os.environ.get("DIST_EMA_TRITON") == "0" or device.type not in ("cpu", "cuda", "xpu"):
        return False
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False  # before Triton is imported, for those who only average on a CPU
    try:
        import triton
    except ImportError:
        return False
    if (
        triton.knobs.runtime.interpret
        if hasattr(triton, "knobs")
        else os.environ.get("TRITON_INTERPRET") == "1"
    ):
        return device.type == "cpu"  # a pointer to a device is no pointer for the interpreter
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def supports(pairs: Sequence[PairLike]) -> bool:
    """FusedPlan takes all of `pairs`: fp32, bfloat16 or fp16 into fp32 or bfloat16, 1-D, on one device each, with element
    numbers that are a `Numbering` or a run of neighbours where rounding needs them."""
    return all(_kind(pair) is not None for pair in pairs)


@dataclass(frozen=True)
class Kind:
    """What the tensors of one launch have in common."""

    device: torch.device
    live: torch.dtype
    shadow: torch.dtype
    averages: int
    levels: int  # of the numbering; 0: nothing is rounded
    huge: bool  # element numbers beyond 32 bits


def _kind(pair: PairLike) -> tuple[Kind, Numbering | None] | None:
    """The launch that takes this pair, and the element numbers if it rounds; None: none does."""
    shadow, n = pair.shadows[0], len(pair.live)
    plain = all(
        t.dim() == 1 and t.is_contiguous() and t.device == shadow.device
        for t in [*pair.shadows, pair.live]
    )
    alike = all(t.dtype == shadow.dtype and len(t) == n for t in pair.shadows)
    known = pair.live.dtype in LIVE and shadow.dtype in SHADOW
    if not (plain and alike and known and available(shadow.device)):
        return None
    kind = Kind(shadow.device, pair.live.dtype, shadow.dtype, len(pair.shadows), 0, False)
    if shadow.dtype != torch.bfloat16:
        return kind, None
    numbering = _numbering(pair)
    if numbering is None:
        return None
    huge = numbering.last(n) >= 1 << 32
    return replace(kind, levels=len(numbering.joined[0]) + 1, huge=huge), numbering


# --- the plan ----------------------------------------------------------------------------------------------------


class FusedPlan:
    """One launch per dtype for one update over `pairs`; a `kernels.Plan` where `available` says yes.

    fallback: makes the plan of the pairs that no launch takes (`kernels.Plan`); without it they raise ValueError. With it,
    the kernel must first do as the fallback does, on its device ([Note: proof]).
    *Aliases*: the tables hold addresses, so the plan keeps the tensors; make a new one when they move. *Cost*: on the
    device 4 bytes per BLOCK elements and about 200 bytes per tensor.
    """

    def __init__(
        self,
        pairs: Sequence[PairLike],
        seed: int = 0,
        fallback: Callable[[list[Any], int], Runnable] | None = None,
    ) -> None:
        self.pairs: list[Any] = list(pairs)
        self.seed = seed
        groups: dict[Kind, list[tuple[PairLike, Numbering | None]]] = {}
        others = []
        for pair in self.pairs:
            taken = _kind(pair)
            if taken is None or (fallback is not None and not _proved(taken[0], fallback)):
                others.append(pair)
            elif len(pair.live):
                groups.setdefault(taken[0], []).append((pair, taken[1]))
        if others and fallback is None:
            names = ", ".join(pair.name for pair in others[:5])
            raise ValueError(
                f"{names}: no kernel takes these dtypes, devices or element numbers. Use kernels.Plan."
            )
        self._others = fallback(others, seed) if others and fallback is not None else None
        keys = {(kind.averages, kind.device) for kind in groups}
        self._weights = {key: _Weights(*key) for key in keys}
        self._launches = [
            _Launch(kind, group, self._weights[kind.averages, kind.device].values)
            for kind, group in groups.items()
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes, for a stream that must know."""
        mine = [tensor for pair in self.pairs for tensor in (*pair.shadows, pair.live)]
        tables = [table for launch in self._launches for table in launch.tables]
        return mine + tables + list(getattr(self._others, "tensors", []))

    @property
    def scratch_bytes(self) -> int:
        """On the device, besides the shadows."""
        own = sum(table.nbytes for launch in self._launches for table in launch.tables)
        return own + int(getattr(self._others, "scratch_bytes", 0))

    def run(self, weights: Sequence[float | Tensor], update: int, guard: bool = False) -> None:
        """Move every shadow towards live, on the current stream. weights: 1 - decay of each average, floats or 0-dim
        tensors on the shadows' device. guard: keep the shadow, element by element, where live is not finite.

        No host sync, and no memory of the device but once, at the first call.
        """
        for held in self._weights.values():
            held.set(weights)
        head = crc32(f"{self.seed}/{update}/".encode())  # [Note: the same bits]
        for launch in self._launches:
            launch(head, guard)
        if self._others is not None:
            self._others.run(weights, update, guard)


# --- [Note: proof] -----------------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """A `kernels.Pair` that nobody else knows."""

    name: str
    shadows: list[Tensor]
    live: Tensor
    indices: Numbering
    huge: bool


_REFUSED: set[torch.device] = set()


@lru_cache(maxsize=256)
def _proved(kind: Kind, reference: Callable[[list[Any], int], Runnable]) -> bool:
    """The kernel gives the bits of the reference. *Cost*: once per kind, two small updates and what they compile."""
    if kind.device in _REFUSED:
        return False
    try:
        wrong = (
            None
            if all(_alike(kind, reference, guard) for guard in (False, True))
            else "it gives other bits"
        )
    except Exception as error:  # whatever Triton raises: a missing compiler, an unknown chip
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        _REFUSED.add(kind.device)
        warnings.warn(
            f"the Triton kernel is not used on {kind.device} ({wrong}); averages are updated by torch's own kernels, which "
            "is slower and right. DIST_EMA_TRITON=0 in the environment says that this is known.",
            stacklevel=2,
        )
    return not wrong


def _alike(kind: Kind, reference: Callable[[list[Any], int], Runnable], guard: bool) -> bool:
    fast, slow = _probes(kind, guard), _probes(kind, guard)
    # NOTE: products by these are not rounded, so that nothing may differ ([Note: contraction]).
    some: list[float | Tensor] = [
        0.25,
        torch.full((), 0.75, dtype=torch.float32, device=kind.device),
        0.5,
    ]
    weights = [some[k % 3] for k in range(kind.averages)]
    FusedPlan(fast, 5).run(weights, 7, guard)
    reference(slow, 5).run(weights, 7, guard)
    pairs = [
        (a, b)
        for x, y in zip(fast, slow, strict=True)
        for a, b in zip(x.shadows, y.shadows, strict=True)
    ]
    return all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)


def _probes(kind: Kind, guard: bool) -> list[_Probe]:
    """Less than a program, and one that ends in the next; the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float32).to(kind.device, dtype)

    sizes, strides = (7, 5, 3, 4), (1000, 91, 17, 1)  # no two of them can be joined
    first = LEVELS - max(1, kind.levels)
    numbering = Numbering(
        1, 5 << 40 if kind.huge else 3, sizes[first:], strides[first:], kind.device
    )
    probes = []
    for n in (5, BLOCK + 3):
        live = draw(n, kind.live)
        if guard:
            live[::3], live[1::7] = float("nan"), float("inf")
        shadows = [draw(n, kind.shadow) for _ in range(kind.averages)]
        probes.append(_Probe(f"probe.{n}", shadows, live, numbering, kind.huge))
    return probes


class _Weights:
    """The weights of K averages on a device, written there only when they change, without a host sync."""

    def __init__(self, averages: int, device: torch.device) -> None:
        self.values = torch.zeros(averages, dtype=torch.float32, device=device)
        self._each = list(self.values.unbind())
        self._known: list[float | None] = [None] * averages

    def set(self, weights: Sequence[float | Tensor]) -> None:
        """floats go with a launch, tensors are copied where they are."""
        for k, (place, weight) in enumerate(zip(self._each, weights, strict=True)):
            if isinstance(weight, Tensor):
                place.copy_(weight)
                self._known[k] = None
            elif weight != self._known[k]:
                place.fill_(weight)
                self._known[k] = weight


class _Launch:
    """The tables of one `Kind`, and the call of the kernel."""

    def __init__(
        self, kind: Kind, group: list[tuple[PairLike, Numbering | None]], weights: Tensor
    ) -> None:
        self._kind, self._weights, self._block = kind, weights, BLOCK
        programs = [-(-len(pair.live) // self._block) for pair, _ in group]
        starts = [0, *accumulate(programs)]
        rows = [
            _row(pair, numbering, start)
            for (pair, numbering), start in zip(group, starts, strict=False)
        ]
        blocks = torch.arange(len(group), dtype=torch.int32).repeat_interleave(
            torch.tensor(programs)
        )
        columns = [_columns(pair.name) for pair, _ in group] if kind.levels else [[0] * 32]
        self._programs = starts[-1]
        self._tensors = torch.tensor(rows).to(kind.device)
        self._blocks = blocks.to(kind.device)
        self._columns = torch.tensor(columns, dtype=torch.int32).to(kind.device)
        self._kernel, self._types = _compile()

    @property
    def tables(self) -> list[Tensor]:
        return [self._blocks, self._tensors, self._columns, self._weights]

    def __call__(self, head: int, guard: bool) -> None:
        kind = self._kind
        # NOTE: Triton launches on the current device, which need not be that of the tensors.
        with _current(kind.device):
            self._kernel[(self._programs,)](
                self._blocks,
                self._tensors,
                self._columns,
                self._weights,
                _signed(head),
                live_type=self._types[kind.live],
                shadow_type=self._types[kind.shadow],
                averages=kind.averages,
                levels=kind.levels,
                huge=kind.huge,
                guard=guard,
                block=self._block,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    cpu = device.type == "cpu"
    return contextlib.nullcontext() if cpu else torch.get_device_module(device).device(device)


def _row(pair: PairLike, numbering: Numbering | None, start: int) -> list[int]:
    """One tensor of the table, as `_update` reads it."""
    addresses = [pair.live.data_ptr(), *(shadow.data_ptr() for shadow in pair.shadows)]
    wide = all(address % 16 == 0 for address in addresses)
    row = [len(pair.live), start, int(wide), _signed(crc32(pair.name.encode())), *addresses]
    if numbering is not None:
        inner, stride = numbering.joined
        row += [
            numbering.begin,
            numbering.base,
            *(value for level in inner for value in level),
            stride,
        ]
    return row


def _columns(name: str) -> list[int]:
    """The matrix by which the crc of what comes before a name enters the crc of both ([Note: the same bits])."""
    data = name.encode()
    return [_signed(crc32(data, 1 << bit) ^ crc32(data)) for bit in range(32)]


def _signed(word: int) -> int:
    """32 bits as an int32."""
    return word - (1 << 32) if word >= 1 << 31 else word


# --- the kernel: compiled by Triton, in whose language everything from here on is written -------------------------


@lru_cache(maxsize=1)
def _compile() -> tuple[Any, dict[torch.dtype, Any]]:
    """The kernel, and Triton's names for dtypes. Where functions below are looked up, Triton finds compiled ones."""
    import triton
    import triton.language as language

    names = globals()
    names["tl"] = language
    for function in (_mix, _noise, _numbers, _key, _round, _move):
        names[function.__name__] = triton.jit(function)
    types = {
        torch.float32: language.float32,
        torch.bfloat16: language.bfloat16,
        torch.float16: language.float16,
    }
    # NOTE: head differs in every update; specialised, it would compile three kernels.
    return triton.jit(_update, do_not_specialize=["head"]), types


def _mix(x: tl.tensor) -> tl.tensor:
    """As in kernels. x: uint32"""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x46CA68B5
    return x ^ (x >> 16)


def _noise(number: tl.tensor, key: tl.tensor, huge: tl.constexpr) -> tl.tensor:
    """As in kernels. number: int64 if huge, else uint32"""
    low = number.to(tl.uint32) ^ (number >> 32).to(tl.uint32) * 0x9E3779B1 if huge else number
    return _mix(_mix(low ^ key) ^ (key >> 7))


def _numbers(
    row: tl.tensor, start: tl.tensor, lane: tl.tensor, levels: tl.constexpr, huge: tl.constexpr
) -> tl.tensor:
    """Numbers of the elements start + lane in the full weight: a `Numbering`, the long division done once per program.

    uint32 unless huge: sums and products wrap, and the result does not need more.
    """
    word = tl.int64 if huge else tl.uint32
    place = tl.load(row) + start
    number = tl.load(row + 1).to(word)
    carry = lane.to(tl.uint32)
    for level in tl.static_range(levels - 1):
        size, stride = tl.load(row + 2 + 2 * level), tl.load(row + 3 + 2 * level)
        carry += (place % size).to(tl.uint32)
        place = place // size
        number += (carry % size.to(tl.uint32)).to(word) * stride.to(word)
        carry = carry // size.to(tl.uint32)
    return number + (place.to(word) + carry.to(word)) * tl.load(row + 2 * levels).to(word)


def _key(name: tl.tensor, columns: tl.tensor, head: tl.tensor) -> tl.tensor:
    """crc("seed/update/name"), from the crc of the name and that of "seed/update/" ([Note: the same bits])."""
    bit = tl.arange(0, 32)
    chosen = tl.where((head >> bit) & 1 == 1, tl.load(columns + bit), 0)
    return (name.to(tl.int32) ^ tl.xor_sum(chosen, 0)).to(tl.uint32, bitcast=True)


def _round(exact: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """fp32 -> the bits of the bfloat16 below or above, int16; as in kernels. Cut by bits: a cast rounds to nearest, or
    truncates in the interpreter."""
    bits = exact.to(tl.uint32, bitcast=True)
    # The sum would carry nan into zero; of inf it touches nothing that is kept.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return (
        (tl.where(nan, 0x7FC00000, bits + (noise >> 16)) >> 16)
        .to(tl.uint16)
        .to(tl.int16, bitcast=True)
    )


def _move(
    row: tl.tensor, live: tl.tensor, at: tl.tensor, inside: tl.tensor, weights: tl.tensor, noise: tl.tensor,
    shadow_type: tl.constexpr, averages: tl.constexpr, guard: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Move the shadows at `at` towards live, read once for all of them. wide: every lane counts, 16 bytes at a time."""
    for k in tl.static_range(averages):
        weight = tl.load(weights + k)
        place = tl.load(row + 5 + k).to(tl.pointer_type(shadow_type)) + at
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


def _update(
    blocks: tl.tensor, tensors: tl.tensor, columns: tl.tensor, weights: tl.tensor, head: tl.tensor,
    live_type: tl.constexpr, shadow_type: tl.constexpr, averages: tl.constexpr, levels: tl.constexpr,
    huge: tl.constexpr, guard: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """One program: `block` elements of one tensor."""
    which = tl.load(blocks + tl.program_id(0))
    # The width of the table: `_row`.
    row = tensors + which * (5 + averages + (2 * levels + 1 if levels else 0))
    start = (tl.program_id(0) - tl.load(row + 1)).to(tl.int64) * block
    left = tl.load(row) - start
    lane = tl.arange(0, block)
    at = start + lane
    noise = lane
    if levels:
        key = _key(tl.load(row + 3), columns + which * 32, head)
        noise = _noise(_numbers(row + 5 + averages, start, lane, levels, huge), key, huge)
    source = tl.load(row + 4).to(tl.pointer_type(live_type)) + at
    # NOTE: two branches, because a mask that depends on the length forbids 16-byte loads.
    if (left >= block) & (tl.load(row + 2) == 1):
        source = tl.max_contiguous(tl.multiple_of(source, 16), block)
        live = tl.load(source).to(tl.float32)
        _move(
            row, live, at, lane < block, weights, noise, shadow_type, averages, guard, True, block
        )
    else:
        inside = lane < left
        live = tl.load(source, mask=inside).to(tl.float32)
        _move(row, live, at, inside, weights, noise, shadow_type, averages, guard, False, block)
