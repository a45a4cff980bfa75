"""`Launch`: the call of the GPU kernel for one `Kind` of pairs, and its tables on the device.

A launch knows nothing of lists. Two tables on the device, built once, say where everything is:

    blocks    int32 [programs]         which tensor a program works on    | 0 | 0 | 0 | 1 | 2 | 2 |
    tensors   int64 [tensors, width]   length, first program, wide loads?, crc of the name, address
                                       of live, addresses of the shadows, numbering of elements or
                                       of pairs of them

A program reads BLOCK live elements once, moves all their shadows, and writes each shadow once: 12
bytes per fp32 element, 10 from bfloat16, 6 in bfloat16.

[Note: keys]  The key of the noise is the CRC-32 of "seed/update/name" ([Note: rounding] in
rounding), and CRC is linear: crc(a + b) = L(crc(a)) ^ crc(b), where L is a 32 x 32 bit matrix that
depends on the length of b alone. The columns of L for each name lie on the device, the host sends
crc("seed/update/"), and no name is hashed in an update. Hashes are uint32 in the kernel, whose
shifts are logical and whose products wrap.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from ...sharding.numbering import Numbering
from .pairs import LIVE, SHADOW, ShadowPair, merge
from .rounding import signed

__all__ = ["BLOCK", "Kind", "Launch", "available", "kind_of", "name_columns", "table_row"]

BLOCK = 4096  # elements that one program moves, 16 per thread
WARPS = 8
WIDE = 16  # bytes that one access moves at best
LEVELS = 4  # dimensions of a Numbering, neighbours joined


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
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


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


def kind_of(pair: ShadowPair, share: float) -> Kind | None:
    """The launch that takes this pair; None: none does.

    A launch takes fp32, bfloat16 and fp16 into fp32 or bfloat16, 1-D and on one device. Where it
    rounds, the element numbers must be a `Numbering`.
    """
    shadow, n = pair.shadows[0], len(pair)
    flat = all(
        t.dim() == 1 and t.is_contiguous() and t.device == shadow.device for t in pair.tensors
    )
    alike = all(t.dtype == shadow.dtype and len(t) == n for t in pair.shadows)
    known_dtypes = pair.live.dtype in LIVE and shadow.dtype in SHADOW
    if not (flat and alike and known_dtypes and available(shadow.device)):
        return None
    resident = 0 if share == 1 else math.ceil(share * _multiprocessors(shadow.device))
    kind = Kind(shadow.device, *pair.dtypes, len(pair.shadows), 0, False, resident)
    if not pair.rounds:
        return kind
    if not isinstance(pair.indices, Numbering):
        return None
    inner, _ = pair.indices.joined
    if len(inner) >= LEVELS or any(size >= 1 << 30 for size, _ in inner):
        return None
    return replace(kind, levels=len(inner) + 1, huge=pair.indices.last(n) >= 1 << 32)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # for the interpreter, which runs one program at a time
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(
        properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count
    )


def _rows(kind: Kind, pairs: Sequence[ShadowPair]) -> list[ShadowPair]:
    """The rows of one launch: neighbours as one where nothing is rounded, and wide where possible.

    A row whose tensors are misaligned alike begins with a short row, after which accesses are wide.
    """
    rows: list[ShadowPair] = []
    for pair in pairs if kind.levels else merge(pairs):
        head = _misaligned(pair)
        rows += [_part(pair, 0, head), _part(pair, head, len(pair))] if head else [pair]
    return rows


def _misaligned(pair: ShadowPair) -> int:
    """Elements before all tensors are at multiples of 16 bytes; 0 if that is never or not worth it.

    The arena sees to it that they get there together.
    """
    for head in range(WIDE // 2):
        if all((t.data_ptr() + head * t.element_size()) % WIDE == 0 for t in pair.tensors):
            return head if len(pair) >= head + BLOCK else 0
    return 0


def _part(pair: ShadowPair, start: int, stop: int) -> ShadowPair:
    shadows, indices = [shadow[start:stop] for shadow in pair.shadows], pair.indices
    if isinstance(indices, Numbering):
        indices = replace(indices, begin=indices.begin + start)
    return replace(pair, shadows=shadows, live=pair.live[start:stop], indices=indices)


class Launch:
    """The tables of one `Kind`, and the call of the kernel."""

    def __init__(self, kind: Kind, pairs: Sequence[ShadowPair], weights: Tensor) -> None:
        from . import gpu_triton

        pairs = _rows(kind, pairs)
        self.kind, self._weights, self._block = kind, weights, BLOCK
        programs = [-(-len(pair) // BLOCK) for pair in pairs]
        *starts, self._programs = itertools.accumulate(programs, initial=0)
        rows = [
            table_row(pair, pair.indices if kind.levels else None, start)
            for pair, start in zip(pairs, starts, strict=True)
        ]
        columns = [name_columns(pair.name) for pair in pairs] if kind.levels else [[0] * 32]
        blocks = torch.repeat_interleave(torch.tensor(programs, device="cpu"))
        self.blocks = blocks.to(kind.device, torch.int32)
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


def table_row(pair: ShadowPair, indices: object, start: int) -> list[int]:
    """One tensor of the table, as the kernel reads it. indices: a `Numbering` where it rounds."""
    addresses = [t.data_ptr() for t in pair.tensors]
    wide = all(address % WIDE == 0 for address in addresses)
    row = [len(pair), start, int(wide), signed(crc32(pair.name.encode()))]
    # NOTE: addresses of an XPU may lie above 2^63, and the table is int64: the kernel casts back.
    row += [signed(address, 64) for address in addresses]
    if isinstance(indices, Numbering):
        halved = indices.halved  # [Note: rounding]: one hash for two elements
        numbers = halved or indices
        inner, stride = numbers.joined
        row += [int(halved is not None), numbers.begin, numbers.base, *itertools.chain(*inner)]
        row.append(stride)
    return row


def name_columns(name: str) -> list[int]:
    """The matrix L of a name ([Note: keys]), one column per bit."""
    data = name.encode()
    return [signed(crc32(data, 1 << bit) ^ crc32(data)) for bit in range(32)]
