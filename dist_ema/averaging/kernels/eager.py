"""shadow += weight * (live - shadow), on lists of plain 1-D tensors.

Always `lerp`: it is an exact fixed point, where `mul_` then `add_` moves constants and drifts. A `Plan` is made once per
set of addresses and holds every view that an update needs, so that a step allocates and decides nothing. On a CPU with
numba, lists of at least WORTH elements in fp32 and 16-bit dtypes go through `compiled`, in one pass. All else is eager:

    long, same dtype         one lerp_ each, neighbours merged                 12 bytes per fp32 element
    long, another dtype      cast through a 4 MB scratch, then lerp_           10 bytes per bf16 -> fp32 element
    short                    torch.cat into the scratch, one lerp_ for many; shadows that lie apart by foreach
    16-bit shadow            fp32 arithmetic in the scratch, rounded stochastically ([Note: rounding])

[Note: rounding]  A bf16 shadow at decay 0.999 never moves when it is rounded to nearest. Here the bits that are cut off
decide by chance: a hash of (seed, update, name, element number in the full weight) is added below the cut. There is no
generator and no state, so the bits are the same on any world size, wrapper and device.

[Note: two ways, the same bits]  Compiled and eager plans give the same bits (but for the payload of a NaN), so a rank may
take either. What decides is whether torch's own lerp is one fused multiply-add on this processor, as the compiled one is:
`_contracts` tries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu_numba
from .rounding import (
    draw_bits,
    key_prefix,
    noise_key,
    round_half_in_place,
    round_in_place,
    upper_bits,
)

__all__ = ["SCRATCH", "ShadowPair", "UpdatePlan"]


SCRATCH = 1 << 20  # elements in one chunk: 4 MB of fp32; 256 KB is slower than no chunks at all


SHORT = 16 << 10  # elements below which tensors are packed


PACK = 16 << 10  # elements in one pack: one thread moves it, which is faster than to wait for two


WORTH = 1 << 17  # elements; compiling for less takes longer than it ever saves


@dataclass
class ShadowPair:
    """Shadows of one weight, one per average, and the live elements that they average; all 1-D and of one length."""

    name: str
    shadows: list[Tensor]
    live: Tensor
    indices: Callable[
        [int, int], Tensor
    ]  # (start, stop) -> element numbers in the full weight, int64
    huge: bool = True  # numbers beyond 32 bits may occur


class UpdatePlan:
    """The steps of one update over `pairs`; each live element is read once, whatever the number of averages.

    passes: take compiled passes wherever there is one; None: where they are worth it, and their bits are those of torch.
    *Cost*: two scratches of at most 4 MB per dtype and device in use. Compiled: a second at the first plan, no scratch.
    """

    def __init__(
        self, pairs: Sequence[ShadowPair], seed: int = 0, passes: bool | None = None
    ) -> None:
        self.pairs, self.seed = list(pairs), seed
        self._scratch: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        self._passes: list[cpu_numba.Pass] = []
        self._direct: list[tuple[list[Tensor], Tensor]] = []
        self._through: list[tuple[list[Tensor], list[Tensor], Tensor, Tensor]] = []
        self._apart: list[tuple[list[list[Tensor]], list[Tensor], list[Tensor], list[Tensor]]] = []
        self._rounded: list[tuple[ShadowPair, list[Tensor], Tensor, int, Tensor]] = []
        left = [pair for pair in pairs if pair.live.numel()]
        if passes or (passes is None and _worth(left)):
            left = self._compile(left)
        apart: list[tuple[list[Tensor], Tensor]] = []
        for group in _runs([(pair.shadows, pair.live) for pair in left if not _compact(pair)]):
            if len(group) > 1 or len(group[0][1]) >= SHORT:
                self._add(group)
            else:
                apart += group
        for group in _alike(apart):
            (self._add_apart if len(group) > 1 else self._add)(group)
        for pair in filter(_compact, left):
            for shadows, live, start in _chunks(pair.shadows, pair.live):
                wide = self._cut(torch.float32, shadows[0].device, len(live))
                self._rounded.append((pair, shadows, live, start, wide))

    def _compile(self, pairs: Sequence[ShadowPair]) -> list[ShadowPair]:
        """One pass per pair of dtypes; returns what none takes."""
        left: list[ShadowPair] = []
        plain: list[tuple[list[Tensor], Tensor]] = []
        pieces: list[cpu_numba.Piece] = []
        for pair in pairs:
            runs: list[tuple[int, int, int]] | None = None
            if _here(pair) and cpu_numba.ready(pair.live.dtype, pair.shadows[0].dtype):
                runs = (
                    cpu_numba.ramps(pair.indices, len(pair.live), pair.huge)
                    if _compact(pair)
                    else []
                )
            if runs is None:
                left.append(pair)
            elif runs:
                pieces.append(cpu_numba.Piece(pair.shadows, pair.live, pair.name, runs))
            else:
                plain.append((pair.shadows, pair.live))
        groups: dict[tuple[torch.dtype, torch.dtype], list[cpu_numba.Piece]] = {}
        for piece in [
            *(cpu_numba.Piece(shadows, live) for shadows, live in _merge(plain)),
            *pieces,
        ]:
            groups.setdefault((piece.live.dtype, piece.shadows[0].dtype), []).append(piece)
        self._passes = [cpu_numba.Pass(group) for group in groups.values()]
        return left

    def _add(self, group: list[tuple[list[Tensor], Tensor]]) -> None:
        """One merged long pair, or a run of short ones whose shadows lie end to end."""
        lives = [live for _, live in group]
        shadows = [_join([each[k] for each, _ in group]) for k in range(len(group[0][0]))]
        live, to = lives[0], (shadows[0].dtype, shadows[0].device)
        alike = (live.dtype, live.device) == to
        if len(lives) == 1 and alike:
            # Several shadows share one read of live while its chunk is in the cache.
            whole = (
                [(shadows, live)]
                if len(shadows) == 1
                else [(s, part) for s, part, _ in _chunks(shadows, live)]
            )
            self._direct += whole
        elif len(lives) == 1:
            for parts, part, _ in _chunks(shadows, live):
                cast = self._cut(*to, len(part))
                self._through.append((parts, [part], cast, cast))
        else:
            packed = self._cut(live.dtype, live.device, len(shadows[0]), 1)
            self._through.append(
                (shadows, lives, packed, packed if alike else self._cut(*to, len(packed)))
            )

    def _add_apart(self, group: list[tuple[list[Tensor], Tensor]]) -> None:
        """Short pairs whose shadows lie apart, as those of another module do."""
        lives = [live for _, live in group]
        shadows = [[each[k] for each, _ in group] for k in range(len(group[0][0]))]
        live, to = lives[0], (shadows[0][0].dtype, shadows[0][0].device)
        if (live.dtype, live.device) == to:
            self._apart.append((shadows, lives, [], lives))
        else:
            n = sum(map(len, lives))
            through = [self._cut(live.dtype, live.device, n, 1), self._cut(*to, n)]
            self._apart.append(
                (shadows, lives, through, list(through[1].split([len(each) for each in lives])))
            )

    def _cut(self, dtype: torch.dtype, device: torch.device, n: int, number: int = 0) -> Tensor:
        key = (dtype, device, number)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(
                PACK if number else SCRATCH, dtype=dtype, device=device
            )
        return self._scratch[key][:n]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes."""
        return [t for pair in self.pairs for t in (*pair.shadows, pair.live)] + list(
            self._scratch.values()
        )

    @property
    def scratch_bytes(self) -> int:
        return sum(scratch.nbytes for scratch in self._scratch.values()) + sum(
            each.nbytes for each in self._passes
        )

    def run(self, weights: Sequence[float | Tensor], update: int, guard: bool = False) -> None:
        """Move every shadow towards live. weights: 1 - decay of each average, floats or 0-dim fp32 tensors on the
        shadows' device.

        guard: keep the shadow, element by element, where live is not finite.
        """
        for each in self._passes:
            each.run(weights, key_prefix(self.seed, update), guard)
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
        self._run_apart(weights, guard)
        for pair, shadows, live, start, wide in self._rounded:
            low = upper_bits(
                draw_bits(
                    noise_key(self.seed, update, pair.name),
                    pair.indices(start, start + len(live)),
                    pair.huge,
                )
            )
            moved = live.to(wide.device, wide.dtype)
            for shadow, weight in zip(shadows, weights, strict=True):
                _lerp(wide.copy_(shadow), moved, weight, guard)
                shadow.copy_(
                    round_in_place(wide, low)
                    if shadow.dtype == torch.bfloat16
                    else round_half_in_place(wide, low)
                )

    def _run_apart(self, weights: Sequence[float | Tensor], guard: bool) -> None:
        for lists, lives, through, ready in self._apart:
            if through:
                packed, cast = through
                cast.copy_(torch.cat(lives, out=packed))
            for shadows, weight in zip(lists, weights, strict=True):
                if isinstance(weight, float) and not guard:
                    torch._foreach_lerp_(shadows, ready, weight)
                    continue
                for shadow, live in zip(shadows, ready, strict=True):
                    _lerp(shadow, live, weight, guard)

    def _guarded(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        """In chunks, because a guarded move needs a temporary of live's size."""
        for shadows, live in self._direct:
            for parts, part, _ in _chunks(shadows, live):
                yield parts, part


def _compact(pair: ShadowPair) -> bool:
    return pair.shadows[0].dtype in (torch.bfloat16, torch.float16)


def _here(pair: ShadowPair) -> bool:
    """In memory that a compiled pass can reach: the host's, and no subclass that pretends to have some."""
    return all(
        t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter)
        for t in (pair.live, *pair.shadows)
    )


def _worth(pairs: Sequence[ShadowPair]) -> bool:
    """Compiling pays, and does not change a bit."""
    return (
        sum(len(pair.live) for pair in pairs if _here(pair)) >= WORTH
        and cpu_numba.available()
        and _contracts()
    )


@lru_cache(maxsize=1)
def _contracts() -> bool:
    """torch's lerp rounds once after multiplying and adding ([Note: two ways, the same bits]), tried on some numbers."""
    start, end = ((torch.arange(1003) * factor % 1009 - 504) / 1009 for factor in (71, 917))
    step = (end - start).double()
    near, far = (
        11 / 32 + 2.0**-20,
        23 / 32 + 2.0**-20,
    )  # float64 holds their products with a step exactly
    return all(
        torch.equal(torch.lerp(start, end, weight), (base.double() + share * step).float())
        for weight, base, share in ((near, start, near), (far, end, far - 1))
    )


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


def _runs(
    pairs: Sequence[tuple[list[Tensor], Tensor]],
) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """Merge neighbours on both sides; then group short pairs whose shadows touch."""
    merged = list(_merge(pairs))
    yield from ([pair] for pair in merged if len(pair[1]) >= SHORT)
    group: list[tuple[list[Tensor], Tensor]] = []
    size = 0
    for shadows, live in (pair for pair in merged if len(pair[1]) < SHORT):
        if group and not (
            size + len(live) <= PACK
            and _all_touch(group[-1][0], shadows)
            and (live.dtype, live.device) == (group[-1][1].dtype, group[-1][1].device)
        ):
            yield group
            group, size = [], 0
        group.append((shadows, live))
        size += len(live)
    if group:
        yield group


def _alike(
    pairs: Sequence[tuple[list[Tensor], Tensor]],
) -> Iterator[list[tuple[list[Tensor], Tensor]]]:
    """Pairs of one dtype and device on either side, at most one pack together."""
    kinds: dict[tuple[torch.dtype | torch.device, ...], list[tuple[list[Tensor], Tensor]]] = {}
    for shadows, live in pairs:
        kinds.setdefault((live.dtype, live.device, shadows[0].dtype, shadows[0].device), []).append(
            (shadows, live)
        )
    for group in kinds.values():
        start, size = 0, 0
        for i, (_, live) in enumerate(group):
            if size + len(live) > PACK:
                yield group[start:i]
                start, size = i, 0
            size += len(live)
        yield group[start:]


def _merge(pairs: Sequence[tuple[list[Tensor], Tensor]]) -> Iterator[tuple[list[Tensor], Tensor]]:
    last: tuple[list[Tensor], Tensor] | None = None
    for shadows, live in pairs:
        if last and _all_touch(last[0], shadows) and _touch(last[1], live):
            last = (
                [_join([a, b]) for a, b in zip(last[0], shadows, strict=True)],
                _join([last[1], live]),
            )
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
