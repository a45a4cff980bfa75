"""`Updates`: the plan of an update over the shadows, which engine runs it, no captured graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from ..sharding.numbering import Numbering
from .average import Average
from .engines import Engine, Inline, Times, choose_engine
from .executors import has_streams, is_capturing
from .kernels import eager, gpu_launch, gpu_plan
from .kernels.pairs import ShadowPair, Weights

__all__ = ["Updates"]


class Updates:
    """How shadows move: a plan over their addresses, and when it runs.

    Attributes:
        engine: Runs the plan.
        overlap: As it was asked for last.
    """

    def __init__(self) -> None:
        self.engine: Engine = Inline()
        self.overlap: bool | float | None = None
        self._device: torch.device | None = None  # an accelerator that holds live weights
        self._inline: Engine = Inline()
        self._choice: Any = None

    @cached_property
    def plan(self) -> eager.UpdatePlan | gpu_plan.FusedPlan:
        """The plan of the weights, made (and perhaps compiled) by the first update of it."""
        devices = {shadow.device for pair in self._weights for shadow in pair.shadows}
        with torch.inference_mode(False), torch.no_grad():
            # One launch per dtype where a Triton kernel is right on the devices of all pairs.
            if devices and all(gpu_launch.available(device) for device in devices):
                return gpu_plan.FusedPlan(
                    self._weights, self._seed, eager.UpdatePlan, _share(self.overlap)
                )
            return eager.UpdatePlan(self._weights, self._seed)

    def renew(self, averages: Sequence[Average], seed: int) -> None:
        """Take other addresses: what an update needs of them is made once, never per step."""
        weights: list[ShadowPair] = []
        buffers: list[ShadowPair] = []
        for states in zip(*(average.states for average in averages), strict=True):
            shadows = [state.shadow for state in states if state.shadow is not None]
            if shadows:
                first = states[0]
                numbers = Numbering.of(first.shard, first.averaged_region, shadows[0].device)
                # Numbers beyond 32 bits cost a kernel more to hash.
                huge = math.prod(first.shard.shape) >= 1 << 32
                pair = ShadowPair(first.name, shadows, first.source, numbers, huge)
                (buffers if first.shard.kind == "buffer" else weights).append(pair)
        self._weights, self._seed = weights, seed
        self.__dict__.pop("plan", None)
        # Buffers are written by the next forward, so they are read before `run` returns. Modules
        # may replace them at every step, which leaves no time for tables on the device.
        self._buffers = eager.UpdatePlan(buffers, seed)

    def choose(
        self, asked: torch.device | None, overlap: bool | float | None, anew: bool = False
    ) -> None:
        """Choose when updates run. An engine of the right kind stays, with its thread and window.

        Args:
            asked: Where the user wants the shadows; None: beside their weights, or in a teacher.
            overlap: As `attach` asks for; None: an update overlaps in host memory only.
            anew: The shadows are other ones, which an engine that stayed would keep alive.
        """
        pairs = [*self._weights, *self._buffers.pairs]
        live = {pair.live.device for pair in pairs}
        shadows = {pair.shadows[0].device for pair in pairs}
        # A teacher in host memory beside a model on an accelerator is written there too.
        away = all(device.type != "cpu" for device in live)
        on_host = (asked is not None and asked.type == "cpu") or (
            away and {device.type for device in shadows} == {"cpu"}
        )
        devices = frozenset(live if on_host else live | shadows)
        self._device = next((device for device in live if has_streams(device)), None)
        before, self.overlap = _share(self.overlap), overlap
        if _share(overlap) != before:  # the plan of a launch has the share in it
            self.__dict__.pop("plan", None)
        choice = (on_host if overlap is None else overlap > 0, on_host, devices)
        if anew or choice != self._choice:
            self.engine = choose_engine(devices, on_host, choice[0])
            # For buffers, which the next forward may write at any time.
            self._inline = choose_engine(devices, on_host, overlap=False)
            self._choice = choice

    def refuse_capture(self, verb: str) -> None:
        """Raise RuntimeError where the device of the live weights records a graph."""
        if is_capturing(self._device):
            raise RuntimeError(
                f"{verb}() while a CUDA graph is captured: a replay runs neither hooks nor the "
                "clock of the average. Call ema.detach() before the capture, and ema.update() "
                "after each replay."
            )

    def run(self, weights: Weights, number: int, guard: bool) -> None:
        """One update. weights: 1 - decay of each average."""
        self.engine.update(self.plan, weights, number, guard)
        if self._buffers.pairs:
            self._inline.update(self._buffers, weights, number, guard)

    def times(self) -> Times:
        """The times of the engine, and of buffers, which are averaged before `run` returns."""
        times, buffers = self.engine.times(), self._inline.times()
        return replace(
            times,
            update_ms=times.update_ms + buffers.update_ms,
            stall_ms=times.stall_ms + buffers.stall_ms,
        )


def _share(overlap: bool | float | None) -> float:
    """The share of the device that an update may take: 1, unless `attach` was given less."""
    return float(overlap or 1)
