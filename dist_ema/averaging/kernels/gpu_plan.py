"""`FusedPlan`: one update on an accelerator, in one launch for all tensors of a dtype.

A launch knows nothing of lists. Two tables on the device, built once, say where everything is:

    blocks    int32 [programs]         which tensor a program works on    | 0 | 0 | 0 | 1 | 2 | 2 |
    tensors   int64 [tensors, width]   length, first program, wide loads?, crc of the name, address
                                       of live, addresses of the shadows, numbering of elements or
                                       of pairs of them

A program reads BLOCK live elements once, moves all their shadows, and writes each shadow once: 12
bytes per fp32 element, 10 from bfloat16, 6 in bfloat16. Nothing is sent to the device per update
but the weights of the averages, and those only when they changed.

[Note: keys]  The key of the noise is the CRC-32 of "seed/update/name" ([Note: rounding] in
rounding), and CRC is linear: crc(a + b) = L(crc(a)) ^ crc(b), where L is a 32 x 32 bit matrix that
depends on the length of b alone. The columns of L for each name lie on the device, the host sends
crc("seed/update/"), and no name is hashed in an update. Hashes are uint32 in the kernel, whose
shifts are logical and whose products wrap.

[Note: proof]  The kernel is proved in Triton's interpreter alone. So the first plan of a kind
(device, dtypes, number of averages, shape of the numbering) moves two small tensors by the kernel
and by the fallback, and compares the bits. If they differ, or Triton fails (it needs a C compiler),
a warning says so once per device, and the fallback is used there. DIST_EMA_TRITON=0 in the
environment leaves Triton alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias
from zlib import crc32

import torch
from torch import Tensor

from ...sharding.geometry import Numbering
from .pairs import LIVE, SHADOW, ShadowPair, Weights, merge
from .rounding import key_prefix, signed

if TYPE_CHECKING:
    from .eager import UpdatePlan

__all__ = [
    "BLOCK",
    "REFUSED",
    "FusedPlan",
    "Kind",
    "Launch",
    "available",
    "is_proved",
    "name_columns",
    "table_row",
]

BLOCK = 4096  # elements that one program moves, 16 per thread
WARPS = 8
WIDE = 16  # bytes that one access moves at best
LEVELS = 4  # dimensions of a Numbering, neighbours joined

Fallback: TypeAlias = "Callable[[list[ShadowPair], int], UpdatePlan]"


# --- which pairs a launch takes -------------------------------------------------------------------


def available(device: torch.device) -> bool:
    """Triton is installed and compiles for `device`; its interpreter is for the CPU alone.

    The environment variable DIST_EMA_TRITON=0 says no.
    """
    if os.environ.get("DIST_EMA_TRITON") == "0" or device.type not in ("cpu", "cuda", "xpu"):
        return False
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False  # before Triton is imported: averaging on a CPU needs none
    try:
        from . import gpu_triton
    except ImportError:
        return False
    if gpu_triton.is_interpreted():
        return device.type == "cpu"  # the interpreter cannot follow a pointer to a device
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


@dataclass(frozen=True)
class Kind:
    """What the tensors of one launch have in common."""

    device: torch.device
    live: torch.dtype
    shadow: torch.dtype
    averages: int
    levels: int  # of the numbering; 0: nothing is rounded
    huge: bool  # element numbers beyond 32 bits
    resident: int  # programs at once, at most; 0: as many as the device takes


def _kind(pair: ShadowPair, share: float) -> tuple[Kind, Numbering | None] | None:
    """The launch that takes this pair, and the element numbers if it rounds; None: none does.

    A launch takes fp32, bfloat16 and fp16 into fp32 or bfloat16, 1-D and on one device, with
    element numbers that are a `Numbering` where it rounds.
    """
    shadow, n = pair.shadows[0], len(pair.live)
    flat = all(
        t.dim() == 1 and t.is_contiguous() and t.device == shadow.device
        for t in [*pair.shadows, pair.live]
    )
    alike = all(t.dtype == shadow.dtype and len(t) == n for t in pair.shadows)
    known = pair.live.dtype in LIVE and shadow.dtype in SHADOW
    if not (flat and alike and known and available(shadow.device)):
        return None
    resident = 0 if share == 1 else math.ceil(share * _multiprocessors(shadow.device))
    kind = Kind(shadow.device, pair.live.dtype, shadow.dtype, len(pair.shadows), 0, False, resident)
    if not pair.rounds:
        return kind, None
    if not isinstance(pair.indices, Numbering):
        return None
    inner, _ = pair.indices.joined
    if len(inner) >= LEVELS or any(size >= 1 << 30 for size, _ in inner):
        return None
    return replace(kind, levels=len(inner) + 1, huge=pair.indices.last(n) >= 1 << 32), pair.indices


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # for the interpreter, which runs one program at a time
    found = torch.get_device_module(device).get_device_properties(device)
    name = "gpu_subslice_count" if device.type == "xpu" else "multi_processor_count"
    return int(getattr(found, name))


Row: TypeAlias = "tuple[ShadowPair, Numbering | None]"


def _rows(group: Sequence[Row]) -> list[Row]:
    """The rows of one launch: neighbours as one where nothing is rounded, and wide where possible.

    A row whose tensors are misaligned alike begins with a short row, after which accesses are wide.
    """
    if group[0][1] is None:
        group = [(pair, None) for pair in merge([pair for pair, _ in group])]
    rows: list[Row] = []
    for pair, numbering in group:
        head = _misaligned(pair)
        if head:
            rows.append((_part(pair, slice(head)), numbering))
            pair = _part(pair, slice(head, None))
        if head and numbering is not None:
            numbering = replace(numbering, begin=numbering.begin + head)
        rows.append((pair, numbering))
    return rows


def _misaligned(pair: ShadowPair) -> int:
    """Elements before all tensors are at multiples of 16 bytes; 0 if that is never or not worth it.

    The arena sees to it that they get there together.
    """
    tensors = [pair.live, *pair.shadows]
    for head in range(WIDE // 2):
        if all((t.data_ptr() + head * t.element_size()) % WIDE == 0 for t in tensors):
            return head if len(pair.live) >= head + BLOCK else 0
    return 0


def _part(pair: ShadowPair, part: slice) -> ShadowPair:
    shadows = [shadow[part] for shadow in pair.shadows]
    return replace(pair, shadows=shadows, live=pair.live[part])


# --- the plan -------------------------------------------------------------------------------------


class FusedPlan:
    """One launch per dtype for one update over `pairs`: an `UpdatePlan` where `available` says yes.

    Args:
        pairs: What to move.
        seed: Of the noise of rounding.
        fallback: Makes the plan of the pairs that no launch takes; without it they raise
            ValueError. With it, the kernel must first give the bits of the fallback on its device
            ([Note: proof]).
        share: Of the device's multiprocessors. At most so many programs are at work at once; 1: no
            limit. The bits are the same.

    Note:
        *Aliases*: the tables hold addresses, so the plan keeps the tensors; make a new one when
        they move. *Cost*: on the device 4 bytes per BLOCK elements and 200 bytes per tensor.
    """

    def __init__(
        self,
        pairs: Sequence[ShadowPair],
        seed: int = 0,
        fallback: Fallback | None = None,
        share: float = 1.0,
    ) -> None:
        self.pairs, self.seed = list(pairs), seed
        groups: dict[Kind, list[Row]] = {}
        others = []
        for pair in self.pairs:
            taken = _kind(pair, share)
            if taken is None or (fallback is not None and not is_proved(taken[0], fallback)):
                others.append(pair)
            elif len(pair.live):
                groups.setdefault(taken[0], []).append((pair, taken[1]))
        if others and fallback is None:
            names = ", ".join(pair.name for pair in others[:5])
            raise ValueError(
                f"{names}: no kernel takes these dtypes, devices or element numbers. Use "
                "UpdatePlan, or pass it as fallback=."
            )
        self.others = fallback(others, seed) if others and fallback is not None else None
        keys = {(kind.averages, kind.device) for kind in groups}
        self.device_weights = {key: _Weights(*key) for key in keys}
        self.launches = [
            Launch(kind, _rows(group), self.device_weights[kind.averages, kind.device].values)
            for kind, group in groups.items()
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes; the stream that runs it must keep their memory."""
        pairs = [tensor for pair in self.pairs for tensor in (*pair.shadows, pair.live)]
        tables = [table for launch in self.launches for table in launch.tables]
        return pairs + tables + ([] if self.others is None else self.others.tensors)

    def run(self, weights: Weights, update: int, guard: bool = False) -> None:
        """Move every shadow towards live, on the current stream; as `UpdatePlan.run`.

        No host sync, and no memory of the device after the first call.
        """
        for on_device in self.device_weights.values():
            on_device.set(weights)
        head = signed(crc32(key_prefix(self.seed, update)))  # [Note: keys]
        for launch in self.launches:
            launch(head, guard)
        if self.others is not None:
            self.others.run(weights, update, guard)


class _Weights:
    """The weights of K averages on a device, written only when they change, without a host sync."""

    def __init__(self, averages: int, device: torch.device) -> None:
        self.values = torch.zeros(averages, dtype=torch.float32, device=device)
        self.places = list(self.values.unbind())
        self._known: list[float | None] = [None] * averages

    def set(self, weights: Weights) -> None:
        """A float travels with a launch of fill_; a tensor is copied on the device."""
        for k, (place, weight) in enumerate(zip(self.places, weights, strict=True)):
            if isinstance(weight, Tensor):
                place.copy_(weight)
                self._known[k] = None
            elif weight != self._known[k]:
                place.fill_(weight)
                self._known[k] = weight


class Launch:
    """The tables of one `Kind`, and the call of the kernel."""

    def __init__(self, kind: Kind, group: Sequence[Row], weights: Tensor) -> None:
        from . import gpu_triton

        self.kind, self._weights, self._block = kind, weights, BLOCK
        programs = [-(-len(pair.live) // BLOCK) for pair, _ in group]
        *starts, self._programs = itertools.accumulate(programs, initial=0)
        blocks = torch.arange(len(group), dtype=torch.int32, device="cpu")
        rows = [table_row(*entry, start) for entry, start in zip(group, starts, strict=True)]
        columns = [name_columns(pair.name) for pair, _ in group] if kind.levels else [[0] * 32]
        self.blocks = blocks.repeat_interleave(torch.tensor(programs, device="cpu")).to(kind.device)
        self.rows = torch.tensor(rows, device="cpu").to(kind.device)
        self._columns = torch.tensor(columns, dtype=torch.int32, device="cpu").to(kind.device)
        self.kernel = gpu_triton.update_kernel
        self._types = [gpu_triton.TYPES[dtype] for dtype in (kind.live, kind.shadow)]

    @property
    def tables(self) -> list[Tensor]:
        return [self.blocks, self.rows, self._columns, self._weights]

    def __call__(self, head: int, guard: bool) -> None:
        kind, (live_type, shadow_type) = self.kind, self._types
        # NOTE: Triton launches on the current device, which need not be that of the tensors.
        module = None if kind.device.type == "cpu" else torch.get_device_module(kind.device)
        with contextlib.nullcontext() if module is None else module.device(kind.device):
            self.kernel[(min(kind.resident or self._programs, self._programs),)](
                *self.tables,
                head,
                self._programs,
                live_type=live_type,
                shadow_type=shadow_type,
                averages=kind.averages,
                levels=kind.levels,
                huge=kind.huge,
                guard=guard,
                block=self._block,
                resident=kind.resident > 0,
                num_warps=WARPS,
                enable_fp_fusion=False,  # [Note: contraction] in gpu_triton
            )


def table_row(pair: ShadowPair, numbering: Numbering | None, start: int) -> list[int]:
    """One tensor of the table, as the kernel reads it."""
    addresses = [pair.live.data_ptr(), *(shadow.data_ptr() for shadow in pair.shadows)]
    wide = all(address % WIDE == 0 for address in addresses)
    row = [len(pair.live), start, int(wide), signed(crc32(pair.name.encode()))]
    # NOTE: addresses of an XPU may lie above 2^63, and the table is int64: the kernel casts back.
    row += [signed(address, 64) for address in addresses]
    if numbering is not None:
        halved = numbering.halved  # [Note: rounding]: one hash for two elements
        numbers = halved or numbering
        inner, stride = numbers.joined
        levels = [value for level in inner for value in level]
        row += [int(halved is not None), numbers.begin, numbers.base, *levels, stride]
    return row


def name_columns(name: str) -> list[int]:
    """The matrix L of a name ([Note: keys]), one column per bit."""
    data = name.encode()
    return [signed(crc32(data, 1 << bit) ^ crc32(data)) for bit in range(32)]


# --- [Note: proof] --------------------------------------------------------------------------------

REFUSED: set[torch.device] = set()


@lru_cache(maxsize=256)
def is_proved(kind: Kind, fallback: Fallback) -> bool:
    """The kernel gives the bits of the fallback.

    *Cost*: once per kind, two small updates and what they compile.
    """
    if kind.device in REFUSED:
        return False
    try:
        equal = all(_is_equal(kind, fallback, guard) for guard in (False, True))
        problem = "" if equal else "it gives other bits"
    except Exception as error:  # whatever Triton raises: a missing compiler, an unknown chip
        problem = f"{type(error).__name__}: {error}"
    if problem:
        REFUSED.add(kind.device)
        warnings.warn(
            f"the Triton kernel is not used on {kind.device} ({problem}); torch's own kernels "
            "update the averages, which is slower and right. Set DIST_EMA_TRITON=0 in the "
            "environment to silence this warning.",
            stacklevel=2,
        )
    return not problem


def _is_equal(kind: Kind, fallback: Fallback, guard: bool) -> bool:
    fused, reference = _probes(kind, guard), _probes(kind, guard)
    # NOTE: products by these are exact, so that nothing may differ ([Note: contraction] in
    # gpu_triton).
    tensor = torch.full((), 0.75, dtype=torch.float32, device=kind.device)
    weights = [(0.25, tensor, 0.5)[k % 3] for k in range(kind.averages)]
    share = 1e-9 if kind.resident else 1.0  # one program moves all, in turns
    FusedPlan(fused, 5, share=share).run(weights, 7, guard)
    fallback(reference, 5).run(weights, 7, guard)
    return all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for one, other in zip(fused, reference, strict=True)
        for a, b in zip(one.shadows, other.shadows, strict=True)
    )


def _probes(kind: Kind, guard: bool) -> list[ShadowPair]:
    """Less than one program, and more than one; the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(n: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(n, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(kind.device, dtype)

    sizes, strides = (7, 5, 3, 4), (1000, 92, 18, 1)  # no two of them can be joined
    first = LEVELS - max(1, kind.levels)
    base = 5 << 40 if kind.huge else 4
    probes = []
    for n, begin in itertools.product((5, BLOCK + 3), (1, 2)):  # elements by one, and in pairs
        numbering = Numbering(begin, base, sizes[first:], strides[first:], kind.device)
        live = draw(n, kind.live)
        if guard:
            live[::3], live[1::7] = float("nan"), float("inf")
        shadows = [draw(n, kind.shadow) for _ in range(kind.averages)]
        probes.append(ShadowPair(f"probe.{n}.{begin}", shadows, live, numbering, kind.huge))
    return probes
