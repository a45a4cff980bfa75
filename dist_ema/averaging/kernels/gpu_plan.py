"""`FusedPlan`: one update on an accelerator, a launch for each dtype; probes that prove the kernel.

Nothing is sent to the device per update but the weights of the averages, and those only when they
changed.

[Note: proof]  The kernel is proved in Triton's interpreter alone. So the first plan of a kind moves
two small tensors by the kernel and by the fallback, and compares the bits. A kind is a device,
dtypes, a number of averages and the shape of the numbering. If bits differ, or Triton fails (it
needs a C compiler), a warning says so once per device, and the fallback is used there.
DIST_EMA_TRITON=0 in the environment leaves Triton alone.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

from ...sharding.numbering import Numbering
from . import gpu_launch
from .eager import UpdatePlan
from .pairs import ShadowPair, Weights
from .rounding import key_prefix, signed

__all__ = ["REFUSED", "FusedPlan", "is_proved"]

Fallback = Callable[[list[ShadowPair], int], UpdatePlan]


class FusedPlan:
    """One launch per dtype for one update over `pairs`: an `UpdatePlan` where `available` says yes.

    Args:
        pairs: What to move.
        seed: The seed of the noise of rounding.
        fallback: Makes the plan of the pairs that no launch takes; without it they raise
            ValueError. With it, the kernel must first give the bits of the fallback on its device
            ([Note: proof]).
        share: The share of the device's multiprocessors. At most so many programs are at work at
            once; 1: no limit. The bits are the same.

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
        by_kind: dict[gpu_launch.Kind, list[ShadowPair]] = {}
        others = []
        for pair in self.pairs:
            kind = gpu_launch.kind_of(pair, share)
            if kind is None or (fallback is not None and not is_proved(kind, fallback)):
                others.append(pair)
            elif len(pair):
                by_kind.setdefault(kind, []).append(pair)
        if others and fallback is None:
            names = ", ".join(pair.name for pair in others[:5])
            raise ValueError(
                f"{names}: no kernel takes these dtypes, devices or element numbers. Use "
                "UpdatePlan, or pass it as fallback=."
            )
        self.others = fallback(others, seed) if others and fallback is not None else None
        self.device_weights = {
            (kind.averages, kind.device): _Weights(kind.averages, kind.device) for kind in by_kind
        }
        self.launches = [
            gpu_launch.Launch(kind, group, self.device_weights[kind.averages, kind.device].values)
            for kind, group in by_kind.items()
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All that a run reads or writes; the stream that runs it must keep their memory."""
        tables = [table for launch in self.launches for table in launch.tables]
        others = [] if self.others is None else self.others.tensors
        return [t for pair in self.pairs for t in pair.tensors] + tables + others

    def run(self, weights: Weights, update: int, guard: bool = False) -> None:
        """Move every shadow towards live, on the current stream; as `UpdatePlan.run`.

        No host sync, and no memory of the device after the first call.
        """
        for on_device in self.device_weights.values():
            on_device.set(weights)
        head = signed(crc32(key_prefix(self.seed, update)))  # [Note: keys] in gpu_launch
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


# --- [Note: proof] --------------------------------------------------------------------------------

REFUSED: set[torch.device] = set()


@lru_cache(maxsize=256)
def is_proved(kind: gpu_launch.Kind, fallback: Fallback) -> bool:
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


def _is_equal(kind: gpu_launch.Kind, fallback: Fallback, guard: bool) -> bool:
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


def _probes(kind: gpu_launch.Kind, guard: bool) -> list[ShadowPair]:
    """Less than one program, and more than one; the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(n: int, dtype: torch.dtype) -> Tensor:
        # A default device or dtype of the caller's must not change what is compared.
        drawn = torch.randn(n, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(kind.device, dtype)

    sizes, strides = (7, 5, 3, 4), (1000, 92, 18, 1)  # no two of them can be joined
    first = gpu_launch.LEVELS - max(1, kind.levels)
    base = 5 << 40 if kind.huge else 4
    probes = []
    # An odd begin numbers elements one by one, an even one pairs of them.
    for n, begin in itertools.product((5, gpu_launch.BLOCK + 3), (1, 2)):
        probe_numbers = Numbering(begin, base, sizes[first:], strides[first:], kind.device)
        live = draw(n, kind.live)
        if guard:
            live[::3], live[1::7] = float("nan"), float("inf")
        shadows = [draw(n, kind.shadow) for _ in range(kind.averages)]
        probes.append(ShadowPair(f"probe.{n}.{begin}", shadows, live, probe_numbers, kind.huge))
    return probes
