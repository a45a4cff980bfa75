"""shadow += weight * (live - shadow), on lists of plain 1-D tensors.

Always `lerp`: it is an exact fixed point, where `mul_` then `add_` moves constants and drifts. A `Plan` is made once per
set of addresses and holds every view that an update needs, so that a step allocates and decides nothing:

    long, same dtype         one lerp_ each, neighbours merged                 12 bytes per fp32 element
    long, another dtype      cast through a 4 MB scratch, then lerp_           10 bytes per bf16 -> fp32 element
    short                    torch.cat into the scratch, one lerp_ for many
    bfloat16 shadow          fp32 arithmetic in the scratch, rounded stochastically ([Note: rounding])

[Note: rounding]  A bf16 shadow at decay 0.999 never moves when it is rounded to nearest. Here the 16 bits that are cut off
decide by chance: a hash of (seed, update, name, element number in the full weight) is added below the cut. There is no
generator and no state, so the bits are the same on any world size, wrapper and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

__all__ = ["SCRATCH", "Pair", "Plan", "noise", "round_to_bfloat16"]

SCRATCH = 1 << 20  # elements in one chunk: 4 MB of fp32; 256 KB is slower than no chunks at all
SHORT = 16 << 10  # elements below which tensors are packed
_MASK = 0xFFFFFFFF


@dataclass
class Pair:
    """Shadows of one weight, one per average, and the live elements that they average; all 1-D and of one length."""

    name: str
    shadows: list[Tensor]
    live: Tensor
    indices: Callable[[int, int], Tensor]  # (start, stop) -> element numbers in the full weight, int64
    huge: bool = True  # numbers beyond 32 bits may occur


class Plan:
    """The steps of one update over `pairs`; each live element is read once, whatever the number of averages.

    *Cost*: two scratches of at most 4 MB per dtype and device in use.
    """

    def __init__(self, pairs: Sequence[Pair], seed: int = 0) -> None:
        self.pairs, self.seed = list(pairs), seed
        self._scratch: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        self._direct: list[tuple[list[Tensor], Tensor]] = []
        self._through: list[tuple[list[Tensor], list[Tensor], Tensor, Tensor]] = []
        self._rounded: list[tuple[Pair, list[Tensor], Tensor, int, Tensor]] = []
        compact = [pair for pair in pairs if pair.shadows[0].dtype == torch.bfloat16]
        plain = [pair for pair in pairs if pair.shadows[0].dtype != torch.bfloat16 and pair.live.numel()]
        for group in _runs([(pair.shadows, pair.live) for pair in plain]):
            self._add(group)
        for pair in compact:
            for shadows, live, start in _chunks(pair.shadows, pair.live):
                wide = self._cut(torch.float32, shadows[0].device, len(live))
                self._rounded.append((pair, shadows, live, start, wide))

    def _add(self, group: list[tuple[list[Tensor], Tensor]]) -> None:
        """One merged long pair, or a run of short ones whose shadows lie end to end."""
        lives = [live for _, live in group]
        shadows = [_join([each[k] for each, _ in group]) for k in range(len(group[0][0]))]
        live, to = lives[0], (shadows[0].dtype, shadows[0].device)
        alike = (live.dtype, live.device) == to
        if len(lives) == 1 and alike:
            # Several shadows share one read of live while its chunk is in the cache.
            whole = [(shadows, live)] if len(shadows) == 1 else [(s, part) for s, part, _ in _chunks(shadows, live)]
            self._direct += whole
        elif len(lives) == 1:
            for parts, part, _ in _chunks(shadows, live):
                cast = self._cut(*to, len(part))
                self._through.append((parts, [part], cast, cast))
        else:
            packed = self._cut(live.dtype, live.device, len(shadows[0]), 1)
            self._through.append((shadows, lives, packed, packed if alike else self._cut(*to, len(packed))))

    def _cut(self, dtype: torch.dtype, device: torch.device, n: int, number: int = 0) -> Tensor:
        key = (dtype, device, number)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(SCRATCH, dtype=dtype, device=device)
        return self._scratch[key][:n]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes."""
        return [t for pair in self.pairs for t in (*pair.shadows, pair.live)] + list(self._scratch.values())

    @property
    def scratch_bytes(self) -> int:
        return sum(scratch.nbytes for scratch in self._scratch.values())

    def run(self, weights: Sequence[float | Tensor], update: int, guard: bool = False) -> None:
        """Move every shadow towards live. weights: 1 - decay of each average, floats or 0-dim fp32 tensors on the
        shadows' device.

        guard: keep the shadow, element by element, where live is not finite.
        """
        for shadows, live in self._guarded() if guard else self._direct:
            for shadow, weight in zip(shadows, weights, strict=True):
                _lerp(shadow, live, weight, guard)
        for shadows, lives, packed, cast in self._through:
            if len(lives) > 1:
                torch.cat(lives, out=packed)
                if cast is not packed:
                    cast.copy_(packed)
            else:
                cast.copy_(lives[0])
            for shadow, weight in zip(shadows, weights, strict=True):
                _lerp(shadow, cast, weight, guard)
        for pair, shadows, live, start, wide in self._rounded:
            low = _low(_draw(_key(self.seed, update, pair.name), pair.indices(start, start + len(live)), pair.huge))
            moved = live.to(wide.device, wide.dtype)
            for shadow, weight in zip(shadows, weights, strict=True):
                _lerp(wide.copy_(shadow), moved, weight, guard)
                shadow.copy_(_round(wide, low))

    def _guarded(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """In chunks, because a guarded move needs a temporary of live's size."""
        for shadows, live in self._direct:
            for parts, part, _ in _chunks(shadows, live):
                yield parts, part


def _lerp(shadow: Tensor, live: Tensor, weight: float | Tensor, guard: bool) -> None:
    if guard:
        live = torch.where(live.isfinite(), live, shadow)
    shadow.lerp_(live, _of(weight, shadow))


def _chunks(shadows: list[Tensor], live: Tensor) -> Iterator[tuple[list[Tensor], Tensor, int]]:
    """Views of at most one scratch each, and where they start."""
    for start in range(0, len(live), SCRATCH):
        stop = start + SCRATCH
        yield [shadow[start:stop] for shadow in shadows], live[start:stop], start


def _of(weight: float | Tensor, shadow: Tensor) -> float | Tensor:
    return weight.to(shadow.device, shadow.dtype) if isinstance(weight, Tensor) else weight


def _runs(pairs: Sequence[tuple[list[Tensor], Tensor]]) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """Merge neighbours on both sides; then group short pairs whose shadows touch, up to one scratch."""
    group: list[tuple[list[Tensor], Tensor]] = []
    size = 0
    for shadows, live in _merge(pairs):
        short = len(live) < SHORT
        if group and not (
            short
            and size + len(live) <= SCRATCH
            and _all_touch(group[-1][0], shadows)
            and (live.dtype, live.device) == (group[-1][1].dtype, group[-1][1].device)
        ):
            yield group
            group, size = [], 0
        if short:
            group.append((shadows, live))
            size += len(live)
        else:
            yield [(shadows, live)]
    if group:
        yield group


def _merge(pairs: Sequence[tuple[list[Tensor], Tensor]]) -> Iterator[tuple[list[Tensor], Tensor]]:
    last: tuple[list[Tensor], Tensor] | None = None
    for shadows, live in pairs:
        if last and _all_touch(last[0], shadows) and _touch(last[1], live):
            last = ([_join([a, b]) for a, b in zip(last[0], shadows, strict=True)], _join([last[1], live]))
            continue
        if last:
            yield last
        last = (shadows, live)
    if last:
        yield last


def _all_touch(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(_touch(x, y) for x, y in zip(a, b, strict=True))


def _touch(a: Tensor, b: Tensor) -> bool:
    """b begins where a ends, in the same storage."""
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.dtype == b.dtype
    return same and a.storage_offset() + len(a) == b.storage_offset()


def _join(parts: list[Tensor]) -> Tensor:
    """The one view over parts that lie end to end."""
    return parts[0].as_strided((sum(map(len, parts)),), (1,))


# --- [Note: rounding] --------------------------------------------------------------------------------------------


def noise(seed: int, update: int, name: str, indices: Tensor) -> Tensor:
    """32 hash bits per element, int64 in [0, 2^32), the same wherever the element lies."""
    return _draw(_key(seed, update, name), indices, huge=True).to(torch.int64) & _MASK


@lru_cache(maxsize=4096)
def _key(seed: int, update: int, name: str) -> int:
    return crc32(f"{seed}/{update}/{name}".encode())


def _draw(key: int, indices: Tensor, huge: bool) -> Tensor:
    """The bits of `noise` as int32: a quarter of the traffic of int64, and multiplication wraps the same."""
    if huge:
        indices = indices ^ (indices >> 32) * 0x9E3779B1
    x = indices.to(torch.int32).bitwise_xor_(_signed(key))
    spare = torch.empty_like(x)
    return _mix(_mix(x, spare).bitwise_xor_(_signed(key >> 7)), spare)


def _mix(x: Tensor, spare: Tensor) -> Tensor:
    """A bijection of 32 bits, in place, in which every input bit reaches every output bit."""
    x.bitwise_xor_(_shift(x, 16, spare)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift(x, 15, spare)).mul_(0x46CA68B5)
    return x.bitwise_xor_(_shift(x, 16, spare))


def _shift(x: Tensor, n: int, out: Tensor) -> Tensor:
    """To the right, filling with zeros: int32 shifts fill with the sign."""
    return torch.bitwise_right_shift(x, n, out=out).bitwise_and_((1 << 32 - n) - 1)


def _signed(word: int) -> int:
    return word - ((word & 1 << 31) << 1)


def _low(bits: Tensor) -> Tensor:
    """The upper 16 hash bits, to be added below the cut. int32, in place."""
    return _shift(bits, 16, bits)


def round_to_bfloat16(wide: Tensor, bits: Tensor) -> Tensor:
    """fp32 to the bfloat16 below or above, by chance in proportion to the distance. bits: see `noise`."""
    return _round(wide, (bits >> 16).to(torch.int32))


def _round(wide: Tensor, low: Tensor) -> Tensor:
    # NOTE: cut by bits, because a cast rounds to nearest; -65536 is 0xFFFF0000 as an int32.
    cut = torch.add(wide.view(torch.int32), low).bitwise_and_(-65536).view(torch.float32)
    return torch.where(wide.isfinite(), cut, wide).to(torch.bfloat16)
