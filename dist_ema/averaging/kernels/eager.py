"""`UpdatePlan`: one update as a list of steps over torch's own kernels.

The formula is always `lerp`: it is an exact fixed point, where `mul_` then `add_` moves constants
and drifts. A plan is made once per set of addresses and holds every view that an update needs, so
that an update allocates and decides nothing. Its steps, and what each of them moves:

    step       pairs                                          how                          bytes
    Pass       in host memory, where numba is worth it        one compiled pass (cpu_plan)
    Direct     one dtype, neighbours merged                   one lerp_ each               12, fp32
               long, of another dtype                         through a 4 MB scratch       10, bf16
    Packed     short, shadows end to end                      cat into a scratch, one lerp_
               short, shadows anywhere                        one foreach lerp_, cat if cast
    Rounded    16-bit shadows                                 fp32 in a scratch, [Note: rounding]

[Note: the same bits]  Compiled and eager plans give the same bits (but for the payload of a NaN),
so a rank may take either. This holds where torch's own lerp is one fused multiply-add, as that of
a pass is, which depends on the processor: `cpu_plan.passes_same_bits` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...packing import packs
from ...sharding.numbering import Numbering
from . import cpu_plan, rounding
from .pairs import ShadowPair, Weights, join, merge

__all__ = [
    "PACK",
    "SCRATCH",
    "SHORT",
    "Direct",
    "Packed",
    "Rounded",
    "ShadowPair",
    "UpdatePlan",
]

SCRATCH = 1 << 20  # elements in one window: 4 MB of fp32; 256 KB is slower than no windows at all
SHORT = 16 << 10  # elements below which tensors are packed
PACK = 16 << 10  # elements in one pack: one thread moves it, and waiting for a second costs more


@dataclass(frozen=True)
class Direct:
    """Live as it lies, or cast in a scratch."""

    shadows: list[Tensor]
    live: Tensor
    cast: Tensor | None = None  # of the shadows' dtype and device; then live is one window

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        # A guarded move needs a temporary of live's size, so it goes in windows.
        for shadows, live, _ in _windows(self) if guard else [(self.shadows, self.live, 0)]:
            ready = live if self.cast is None else self.cast.copy_(live)
            _move(shadows, ready, weights, guard)


@dataclass(frozen=True)
class Packed:
    """Short live tensors, packed into scratches where something is cast or shadows are joined."""

    shadows: list[list[Tensor]]  # per average: one joined shadow, or one per live tensor
    lives: list[Tensor]
    packed: Tensor | None  # scratch for lives, end to end
    cast: Tensor | None  # scratch of the shadows' dtype and device
    ready: list[Tensor]  # what the shadows move towards: views of a scratch, or lives

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        if self.packed is not None:
            torch.cat(self.lives, out=self.packed)
            if self.cast is not None:
                self.cast.copy_(self.packed)
        for shadows, weight in zip(self.shadows, weights, strict=True):
            if isinstance(weight, float) and not guard and len(shadows) > 1:
                torch._foreach_lerp_(shadows, self.ready, weight)
            else:
                for shadow, live in zip(shadows, self.ready, strict=True):
                    _move([shadow], live, [weight], guard)


@dataclass(frozen=True)
class Rounded:
    """16-bit shadows: fp32 arithmetic in a scratch, rounded stochastically ([Note: rounding])."""

    pair: ShadowPair  # one window of a weight
    start: int  # of the window in the weight's elements here
    wide: Tensor  # scratch, fp32
    seed: int
    halved: Numbering | None  # the numbers of pairs that share a hash, where they lie together

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        pair, live = self.pair, self.pair.live.to(self.wide.device, torch.float32)
        key = rounding.noise_key(self.seed, update, pair.name)
        start, stop = self.start, self.start + len(live)
        if self.halved is None:
            low = rounding.draw_bits(key, pair.indices(start, stop), pair.huge)
        else:
            pairs = self.halved(start // 2, (stop + 1) // 2)
            low = rounding.draw_bits_of_pairs(key, pairs, pair.huge)[: len(live)]
        for shadow, weight in zip(pair.shadows, weights, strict=True):
            _move([self.wide.copy_(shadow)], live, [weight], guard)
            shadow.copy_(rounding.ROUND[shadow.dtype](self.wide, low))


def _move(shadows: list[Tensor], live: Tensor, weights: Weights, guard: bool) -> None:
    """guard: keep a shadow, element by element, where live is not finite."""
    for shadow, weight in zip(shadows, weights, strict=True):
        end = torch.where(live.isfinite(), live, shadow) if guard else live
        if isinstance(weight, Tensor):
            weight = weight.to(shadow.device, shadow.dtype)
        shadow.lerp_(end, weight)


class UpdatePlan:
    """The steps of one update over `pairs`.

    Each live element is read once, whatever the number of averages.

    Args:
        pairs: What to move.
        seed: The seed of the noise of rounding.
        passes: Take compiled passes wherever there is one, or never. None: where they are worth
            it and give the bits of torch.

    Note:
        *Aliases*: the plan keeps the tensors. *Cost*: two scratches of at most 4 MB per dtype and
        device in use. Compiled: a second at the first plan, and no scratch.
    """

    def __init__(
        self, pairs: Sequence[ShadowPair], seed: int = 0, passes: bool | None = None
    ) -> None:
        self.pairs, self.seed = list(pairs), seed
        # Each knows all its addresses, and has `run(weights, update, guard)`.
        self.steps: list[cpu_plan.Pass | Direct | Packed | Rounded] = []
        self.scratch: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        left_pairs = [pair for pair in pairs if pair.live.numel()]
        if passes or (passes is None and cpu_plan.is_worth_it(left_pairs)):
            compiled, left_pairs = cpu_plan.plan_passes(left_pairs, seed)
            self.steps += compiled
        merged = list(merge(pair for pair in left_pairs if not pair.rounds))
        for pair in merged:
            if len(pair) >= SHORT:
                self._add_direct(pair)
        self._add_short([pair for pair in merged if len(pair) < SHORT])
        for pair in left_pairs:
            if pair.rounds:
                self._add_rounded(pair)

    def _add_direct(self, pair: ShadowPair) -> None:
        # Several shadows share one read of live while its window is in the cache.
        whole = pair.is_uniform and len(pair.shadows) == 1
        for shadows, live, _ in [(pair.shadows, pair.live, 0)] if whole else _windows(pair):
            cast = None if pair.is_uniform else self._cut(shadows[0], len(live))
            self.steps.append(Direct(shadows, live, cast))

    def _add_short(self, pairs: list[ShadowPair]) -> None:
        """Packs whose shadows lie end to end; the others in packs of one dtype and device."""
        apart: list[ShadowPair] = []
        for pack in packs(pairs, len, PACK, lambda a, b: b.follows(a) and _kind(a) == _kind(b)):
            if len(pack) == 1:
                apart += pack
            else:
                self._add_packed(pack, joined=True)
        for kind in dict.fromkeys(map(_kind, apart)):
            for pack in packs([pair for pair in apart if _kind(pair) == kind], len, PACK):
                if len(pack) == 1:
                    self._add_direct(pack[0])
                else:
                    self._add_packed(pack, joined=False)

    def _add_packed(self, pack: list[ShadowPair], joined: bool) -> None:
        """joined: the shadows of the pack lie end to end."""
        first, lives, n = pack[0], [pair.live for pair in pack], sum(map(len, pack))
        columns = [list(column) for column in zip(*(pair.shadows for pair in pack), strict=True)]
        if joined:
            columns = [[join(column)] for column in columns]
        packed = self._cut(lives[0], n, PACK) if joined or not first.is_uniform else None
        cast = None if first.is_uniform else self._cut(first.shadows[0], n)
        scratch = packed if cast is None else cast
        ready = lives if scratch is None else list(scratch.split([len(x) for x in columns[0]]))
        self.steps.append(Packed(columns, lives, packed, cast, ready))

    def _add_rounded(self, pair: ShadowPair) -> None:
        halved = pair.indices.halved if isinstance(pair.indices, Numbering) else None
        for shadows, live, start in _windows(pair):
            wide = self._cut(shadows[0], len(live), dtype=torch.float32)
            part = replace(pair, shadows=shadows, live=live)
            self.steps.append(Rounded(part, start, wide, self.seed, halved))

    def _cut(
        self, like: Tensor, n: int, size: int = SCRATCH, dtype: torch.dtype | None = None
    ) -> Tensor:
        """n elements of the scratch of that size for the dtype and device of `like`."""
        key = (dtype or like.dtype, like.device, size)
        if key not in self.scratch:
            self.scratch[key] = torch.empty(size, dtype=key[0], device=like.device)
        return self.scratch[key][:n]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes."""
        return [t for pair in self.pairs for t in pair.tensors] + list(self.scratch.values())

    def run(self, weights: Weights, update: int, guard: bool = False) -> None:
        """Move every shadow towards live. No host sync.

        Args:
            weights: 1 - decay of each average: floats, or fp32 [] on the shadows' device.
            update: Number of the update, a part of the key of the noise.
            guard: Keep the shadow, element by element, where live is not finite.
        """
        for step in self.steps:
            step.run(weights, update, guard)


def _windows(pair: ShadowPair | Direct) -> Iterator[tuple[list[Tensor], Tensor, int]]:
    """Views of at most SCRATCH elements each, and where they start."""
    for start in range(0, len(pair.live), SCRATCH):
        stop = start + SCRATCH
        yield [shadow[start:stop] for shadow in pair.shadows], pair.live[start:stop], start


def _kind(pair: ShadowPair) -> tuple[torch.dtype | torch.device, ...]:
    shadow = pair.shadows[0]
    return pair.live.dtype, pair.live.device, shadow.dtype, shadow.device
