"""`Window`: the blocks of the last steps, and their shares under a curve that falls from 1 to 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .decays import Ranged, Uniform, take_number

__all__ = ["CURVES", "BlockMean", "Window"]

# The decay of a learning rate over a window: from 1 at t = 0 to 0 at t = 1.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "minus-sqrt": lambda t: 1 - math.sqrt(t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


@dataclass(frozen=True)
class Window(Ranged):
    """An average that stands for a decay of the learning rate over the last `length` units.

    A curve w falls from 1 to 0 over the window. The weights after an update that moves from a to b
    of the window get the share w(a) - w(b): a sum of c_j = w_j - w_(j+1) times weights is the
    run whose every step was scaled by w (WSM, arXiv 2507.17634). "linear" is the plain mean of the
    window.

    Every update is averaged, into the mean of one of `blocks` blocks ([Note: ring] in
    averaging.window_ring says where they lie). The window consists of whole blocks, and of what the
    block under way holds: it is `length` long when a block ends, else up to a block shorter. Within
    a block updates count by their units alone. That is exact for "linear"; for other curves `error`
    bounds it.

    Args:
        length: The length of the window, in units of the clock.
        curve: "linear", "minus-sqrt" (1 - sqrt(t)), "cosine", or a function on [0, 1] with w(0) = 1
            and w(1) = 0. A function cannot be tracked, as files cannot hold it: read it from a
            tracked window by `which=`.
        blocks: The number of blocks in the window.
        ring: A folder on a local disk, where full blocks lie in temporary files; None: host memory.

    Called like any schedule, it gives the decay of the mean of the block under way, where all
    updates move the clock by `elapsed`. An EMA knows where the block began, and takes any.
    """

    length: float
    curve: str | Callable[[float], float] = "linear"
    blocks: int = 16
    ring: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = take_number(self, "blocks")
        if not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"blocks must be a whole number from 1, got {blocks}.")
        known = self.curve in CURVES if isinstance(self.curve, str) else callable(self.curve)
        if not known:
            curves = ", ".join(CURVES)
            raise ValueError(f"curve must be {curves} or a function, got {self.curve!r}.")
        ends = self.scale(0.0), self.scale(1.0)
        if not max(abs(ends[0] - 1), abs(ends[1])) <= 1e-9:  # NaN is refused too
            raise ValueError(f"curve must fall from 1 to 0, got {ends[0]:g} and {ends[1]:g}.")

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        # The clock stands at multiples of `elapsed`: at the last one before this block.
        begin = math.floor(self.block_at(now) * self.block / elapsed + 1e-9) * elapsed
        return max(0.0, (now - elapsed - begin) / (now - begin))

    @property
    def block(self) -> float:
        """Units of the clock in one block."""
        return self.length / self.blocks

    def block_at(self, now: float) -> int:
        """The number of the block that an update at `now` belongs to."""
        return math.ceil(now / self.block - 1e-9) - 1

    def scale(self, t: float) -> float:
        """The curve at t in [0, 1] of the window."""
        return CURVES[self.curve](t) if isinstance(self.curve, str) else self.curve(t)

    def shares(self, begin: float, ends: Sequence[float]) -> list[float]:
        """The share of each part of a window that begins at `begin`, by where the parts end."""
        length = ends[-1] - begin
        at = [1.0, *(self.scale((end - begin) / length) for end in ends[:-1]), 0.0]
        return [before - after for before, after in pairwise(at)]

    def spans(self, other: Window) -> bool:
        """`other` can be mixed from the blocks of this one."""
        return self.blocks >= other.blocks and abs(self.block - other.block) < 1e-9 * self.block

    def error(self, updates: int) -> float:
        """How far block means are from the exact curve, as half the sum of |share - exact share|.

        No element of the average is further off than this times the spread of that element over
        the window.

        Args:
            updates: The number of updates in a full window; a multiple of `blocks`.
        """
        each = updates // self.blocks
        exact = self.shares(0, [float(i + 1) for i in range(updates)])
        means = self.shares(0, [float((i + 1) * each) for i in range(self.blocks)])
        return sum(abs(share - means[i // each] / each) for i, share in enumerate(exact)) / 2

    def to_dict(self) -> dict[str, Any]:
        """See `Schedule.to_dict`. Raises ValueError where the curve is a function."""
        if not isinstance(self.curve, str):
            raise ValueError(
                f"{self!r}: files cannot hold a function. Track a window with a named curve "
                f"({', '.join(CURVES)}), and read this one by which=."
            )
        return {key: value for key, value in super().to_dict().items() if key != "ring"}

    def __repr__(self) -> str:
        curve = self.curve if isinstance(self.curve, str) else self.curve.__qualname__
        return f"Window({self.length:g}, {curve!r}, blocks={self.blocks})"


@dataclass(frozen=True)
class BlockMean(Uniform):
    """A block of a saved window: the mean of the weights after each update in (begin, end].

    Args:
        size: Units of the clock in a full block.
        begin: The clock before the first update.
        end: The clock after the last one.
    """

    size: float
    begin: float
    end: float

    def __call__(self, now: float, elapsed: float = 1.0) -> float:
        return super().__call__(now - self.begin, elapsed)
