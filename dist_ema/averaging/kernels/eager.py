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
a pass is, which depends on the processor: `passes_same_bits` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ...packing import packs
from ...sharding.geometry import Numbering
from . import cpu_plan
from .pairs import ShadowPair, Weights, join, merge
from .rounding import (
    draw_bits,
    draw_bits_of_pairs,
    noise_key,
    round_half_in_place,
    round_in_place,
)

__all__ = [
    "PACK",
    "SCRATCH",
    "SHORT",
    "WORTH",
    "Direct",
    "Packed",
    "Rounded",
    "ShadowPair",
    "Step",
    "UpdatePlan",
    "passes_same_bits",
]

SCRATCH = 1 << 20  # elements in one window: 4 MB of fp32; 256 KB is slower than no windows at all
SHORT = 16 << 10  # elements below which tensors are packed
PACK = 16 << 10  # elements in one pack: one thread moves it, and waiting for a second costs more
WORTH = 1 << 17  # elements; compiling for less takes longer than it ever saves


class Step(Protocol):
    """A part of an update that knows all its addresses."""

    def run(self, weights: Weights, update: int, guard: bool) -> None:
        """Move the shadows of this step; as `UpdatePlan.run`."""


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
        if self.packed is not None and self.cast is not None:
            self.cast.copy_(self.packed)
        for shadows, weight in zip(self.shadows, weights, strict=True):
            if isinstance(weight, float) and not guard and len(shadows) > 1:
                torch._foreach_lerp_(shadows, self.ready, weight)
                continue
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
        key = noise_key(self.seed, update, pair.name)
        start, stop = self.start, self.start + len(live)
        if self.halved is None:
            low = draw_bits(key, pair.indices(start, stop), pair.huge)
        else:
            pairs = self.halved(start // 2, (stop + 1) // 2)
            low = draw_bits_of_pairs(key, pairs, pair.huge)[: len(live)]
        for shadow, weight in zip(pair.shadows, weights, strict=True):
            _move([self.wide.copy_(shadow)], live, [weight], guard)
            bfloat16 = shadow.dtype == torch.bfloat16
            shadow.copy_((round_in_place if bfloat16 else round_half_in_place)(self.wide, low))


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
        self.steps: list[Step] = []
        self.scratch: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        left_pairs = [pair for pair in pairs if pair.live.numel()]
        if passes or (passes is None and _is_worth_it(left_pairs)):
            compiled, left_pairs = cpu_plan.plan_passes(left_pairs, seed)
            self.steps += compiled
        apart: list[ShadowPair] = []
        for group in _group(list(merge([pair for pair in left_pairs if not pair.rounds]))):
            if len(group) == 1 and len(group[0].live) < SHORT:
                apart += group
            else:
                self._add(group, joined=True)
        for group in _group_alike(apart):
            self._add(group, joined=False)
        for pair in left_pairs:
            if pair.rounds:
                self._add_rounded(pair)

    def _add(self, group: list[ShadowPair], joined: bool) -> None:
        """joined: the shadows of the group lie end to end."""
        first, lives = group[0], [pair.live for pair in group]
        if len(group) == 1:
            # Several shadows share one read of live while its window is in the cache.
            whole = first.is_uniform and len(first.shadows) == 1
            for shadows, live, _ in [(first.shadows, first.live, 0)] if whole else _windows(first):
                cast = None if first.is_uniform else self._cut(shadows[0], len(live))
                self.steps.append(Direct(shadows, live, cast))
            return
        columns = [list(column) for column in zip(*(pair.shadows for pair in group), strict=True)]
        if joined:
            columns = [[join(column)] for column in columns]
        n, packed, cast = sum(map(len, lives)), None, None
        if joined or not first.is_uniform:
            packed = self._cut(lives[0], n, PACK)
        if not first.is_uniform:
            cast = self._cut(first.shadows[0], n)
        scratch = packed if cast is None else cast
        ready = lives if scratch is None else list(scratch.split([len(x) for x in columns[0]]))
        self.steps.append(Packed(columns, lives, packed, cast, ready))

    def _add_rounded(self, pair: ShadowPair) -> None:
        halved = pair.indices.halved if isinstance(pair.indices, Numbering) else None
        for shadows, live, start in _windows(pair):
            wide = self._cut(shadows[0], len(live), dtype=torch.float32)
            window = replace(pair, shadows=shadows, live=live)
            self.steps.append(Rounded(window, start, wide, self.seed, halved))

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
        pairs = [tensor for pair in self.pairs for tensor in (*pair.shadows, pair.live)]
        return pairs + list(self.scratch.values())

    def run(self, weights: Weights, update: int, guard: bool = False) -> None:
        """Move every shadow towards live. No host sync.

        Args:
            weights: 1 - decay of each average: floats, or fp32 [] on the shadows' device.
            update: Number of the update, a part of the key of the noise.
            guard: Keep the shadow, element by element, where live is not finite.
        """
        for step in self.steps:
            step.run(weights, update, guard)


def _is_worth_it(pairs: Sequence[ShadowPair]) -> bool:
    """Compiling pays, and does not change a bit."""
    sizes = accumulate(pair.live.numel() for pair in pairs if cpu_plan.is_reachable(pair))
    return any(size >= WORTH for size in sizes) and cpu_plan.available() and passes_same_bits()


@lru_cache(maxsize=1)
def passes_same_bits() -> bool:
    """A pass rounds as torch's lerp does ([Note: the same bits]), tried on some numbers.

    Each of these products is rounded when it is not fused with the addition.
    """
    ramp = torch.arange(1003, device="cpu")
    start, end = ((ramp * factor % 1009 - 504).float() / 1009 for factor in (71, 917))
    for weight in (11 / 32 + 2.0**-20, 23 / 32 + 2.0**-20):  # on either side of 0.5
        shadow = start.clone()
        UpdatePlan([ShadowPair("", [shadow], end, torch.arange)], passes=True).run([weight], 0)
        if not torch.equal(shadow, torch.lerp(start, end, weight)):
            return False
    return True


def _windows(pair: ShadowPair | Direct) -> Iterator[tuple[list[Tensor], Tensor, int]]:
    """Views of at most SCRATCH elements each, and where they start."""
    for start in range(0, len(pair.live), SCRATCH):
        stop = start + SCRATCH
        yield [shadow[start:stop] for shadow in pair.shadows], pair.live[start:stop], start


def _kind(pair: ShadowPair) -> tuple[torch.dtype | torch.device, ...]:
    shadow = pair.shadows[0]
    return pair.live.dtype, pair.live.device, shadow.dtype, shadow.device


def _group(pairs: Sequence[ShadowPair]) -> Iterator[list[ShadowPair]]:
    """Long pairs one by one; short pairs in packs whose shadows lie end to end."""
    yield from ([pair] for pair in pairs if len(pair.live) >= SHORT)
    short = [pair for pair in pairs if len(pair.live) < SHORT]
    yield from packs(short, _length, PACK, lambda a, b: b.follows(a) and _kind(a) == _kind(b))


def _group_alike(pairs: Sequence[ShadowPair]) -> Iterator[list[ShadowPair]]:
    """Packs of pairs of one dtype and device on either side."""
    kinds = dict.fromkeys(map(_kind, pairs))
    for kind in kinds:
        yield from packs([pair for pair in pairs if _kind(pair) == kind], _length, PACK)


def _length(pair: ShadowPair) -> int:
    return len(pair.live)
