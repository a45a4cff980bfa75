"""A module that is the average of another one: what the drop-ins of this shape share.

[Note: the copy]  A deep copy of the model without DDP and torch.compile around it, or what `module_fn` builds, is given to
`EMA(model, into=copy)`: its own memory is the average. A model under FSDP cannot be copied. Without `module_fn` its average
is kept beside it, each rank its shard, and there is no module to evaluate: `average.swap()` lends it to the model.

[Note: which model]  `update(model)` names the model anew each time. A wrapper put around it since is the same model. Another
one, or the same one elsewhere, in another dtype or with other weights trainable, is averaged from then on into the same
copy: the `EMA` is built again around it, and what the copy holds stays.

[Note: one rank alone]  Under DDP every rank has a whole copy, and nothing here sends a message, so that scripts may keep
the average on one rank only. Under FSDP construction is collective.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..averaging.averages import Reads
from ..averaging.swap import broadcast_to_replicas
from ..checkpoint import dcp
from ..ema import EMA
from ..recipes import batchnorm
from ..schedules import Schedule
from ..sharding import discovery, records, wrappers
from ..sharding.records import Shard

__all__ = [
    "CopiedModule",
    "Count",
    "Holder",
    "ModuleAverage",
    "ModuleFn",
    "evaluating",
    "recalibrate_all",
]

ModuleFn = Callable[[], nn.Module]


class ModuleAverage:
    """The copy, the `EMA` that moves it, and which model that follows. Methods are collective only where they say so.

    model: as it is trained. module: the copy, see [Note: the copy]; None makes one where that can be done.
    options: of `EMA`: the schedule that files name, `buffers`, `only`. device, dtype: of the copy, or of the shadows if
    there is none. fresh: overwrite the copy with live.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module | None,
        decay: float | Schedule,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        fresh: bool = True,
        **options: Any,
    ) -> None:
        live = wrappers.unwrapped(model)
        shards_of_live = discovery.find_shards(live)
        self.given: nn.Module | None = model  # as the last update named it, with its wrappers
        self.why = ""  # there is no copy
        self._options = options | {"decay": decay}
        self._ema: EMA | None = None
        self._seen: tuple[Any, ...] = ()
        self._rest: list[
            tuple[Shard, Shard]
        ] = []  # of the copy and the model: what the EMA does not write
        if module is None and shards_of_live.sharded:
            self.why = (
                f"{type(live).__name__} is sharded by FSDP and cannot be copied: no module holds the average. "
                "Pass module_fn=, which builds and wraps another instance, or lend the average to the model: "
                "`with NAME.average.swap()`."
            )
            wide = any(
                shard.trainable and shard.dtype == torch.float64 for shard in shards_of_live.shards
            )
            self._options |= {
                "device": device,
                "dtype": dtype or (torch.float64 if wide else torch.float32),
            }
            self.module: nn.Module | None = None
        else:
            self.module = copy.deepcopy(live) if module is None else module
            if device is not None or dtype is not None:
                self.module.to(device=device, dtype=dtype)
        self._build(live, keep=not fresh)

    # --- which model -------------------------------------------------------------------------------------------

    @property
    def average(self) -> EMA:
        """The `EMA`: its schedule is named in files, but each update brings its own decay."""
        if self._ema is None:
            self._build(wrappers.unwrapped(self.live), keep=True)
            assert self._ema is not None
        return self._ema

    @property
    def live(self) -> nn.Module:
        """The model, as the last update named it."""
        if self.given is None:
            raise RuntimeError(
                "this copy of an average has no model yet: the next update names one."
            )
        return self.given

    @property
    def evaluated(self) -> nn.Module:
        """The copy, no update under way. Raises RuntimeError where there is none."""
        if self.module is None:
            raise RuntimeError(self.why)
        if self._ema is not None:
            self._ema.weights.sync_teacher()
        return self.module

    def follow(self, model: nn.Module) -> None:
        """[Note: which model]. Collective where the model is sharded and another one."""
        live = wrappers.unwrapped(model)
        if self._ema is None or live is not self._ema.model or self._signature() != self._seen:
            self._build(live, keep=True)
        self.given = model

    def _build(self, live: nn.Module, keep: bool) -> None:
        if self.module is None and self._ema is not None:
            ours = [slot.shard for slot in self._ema.weights.states]
            if _weights(discovery.find_shards(live).shards) != _weights(ours):
                raise RuntimeError(f"the average belongs to another model. {self.why}")
            return
        old = None if self._ema is None else self._ema.weights
        if old is not None:
            old.settle()
        before = [] if self.module is None else discovery.find_shards(self.module).shards
        kept = [(shard, shard.read().clone()) for shard in before if keep]
        self._ema = EMA(live, into=self.module, **self._options)
        with torch.no_grad():
            for shard, value in kept:
                shard.write(value)
        if old is not None:
            self._ema.weights.set_clock(old.clock_to_dict())
            if old.teacher is not None:
                old.teacher.release()
        self._seen, self._rest = self._signature(), self._left_over(self._ema)

    def _left_over(self, ema: EMA) -> list[tuple[Shard, Shard]]:
        slots = [
            slot for slot in ema.weights.states if slot.shadow is None and slot.teacher_copy is None
        ]
        copied = (
            [] if self.module is None or not slots else discovery.find_shards(self.module).shards
        )
        mine = {shard.name: shard for shard in copied}
        return [(mine[slot.name], slot.shard) for slot in slots if slot.name in mine]

    def _signature(self) -> tuple[Any, ...]:
        """What tells at little cost that the model or the copy is not what it was."""
        average = self.average.weights
        if average.teacher is None or average.teacher.sharded:
            return ()
        weights = [slot.shard for slot in average.states if slot.shard.kind != "buffer"]
        mine = list(average.teacher._given.values())
        first = average.averages[0].averaged[0]
        looks = [
            shard.local_tensor() for shard in (first.shard, average.teacher._given[first.name])
        ]
        return (
            [shard.trainable for shard in weights],
            any(records.replaced(shard) for shard in [*weights, *mine]),
            [(raw.data_ptr(), raw.device, raw.dtype) for raw in looks],
        )

    # --- moving ------------------------------------------------------------------------------------------------

    def update(self, model: nn.Module, decay: float) -> None:
        """One move towards `model`; 0 copies. No collective, no host sync."""
        self.follow(model)
        self.average.update(decay=decay)
        self._forget_buffers()

    @torch.no_grad()
    def update_by(
        self, model: nn.Module, rule: Callable[[Sequence[tuple[Tensor, Tensor]]], None]
    ) -> None:
        """One move by a function of the user's, given (shadow, live) views of what this rank averages."""
        self.follow(model)
        self.average.weights.move_by(rule)
        self._forget_buffers()

    def _forget_buffers(self) -> None:
        """An update ends what was recalibrated: a copy would be overwritten by it too."""
        if self.module is None:
            self.average.reset_buffers()

    @torch.no_grad()
    def copy_rest(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Into the copy, what the `EMA` does not write: what `only` leaves out, and buffers that no file holds."""
        for mine, live in self._rest:
            if wanted(mine.name):
                mine.write(live.read())

    @torch.no_grad()
    def pull(self, weight: float, rest: Callable[[str], float] = lambda _: 1.0) -> None:
        """The other way round: the model moves towards the average; 1 copies. rest: the weight of what the `EMA` does not
        write. *Collective* under HSDP."""
        ema = self.average
        ema.weights.pull(weight)
        broadcast_to_replicas(ema.weights.averages[0].averaged, ema.weights.placement.split)
        for mine, live in self._rest:
            if live.dtype.is_floating_point:
                live.write(live.read().lerp_(mine.read().to(live.read()), rest(mine.name)))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def entries(self) -> dict[str, Tensor]:
        """Where there is no copy: what its state_dict would hold, as torch.distributed.checkpoint takes it: plain tensors
        where this rank holds a whole one, else `dcp.FlatRange`. *Aliases* the shadows."""
        average = self.average.weights
        average.refuse("ema.state_dict", Reads.WHOLE_MODEL)
        average.ready()
        return dcp.whole(average.averages[0].persistent, average.averages[0].own_buffers)

    def fill(self, entries: Mapping[str, Tensor]) -> None:
        """Take what is averaged, and floating buffers, from `entries` of as many ranks or full weights. *Collective*."""
        state = self.average.state_dict()
        ((name, mine),) = state["averages"].items()
        ours = {
            kind: {key: entries[key] for key in mine[kind] if key in entries}
            for kind in ("weights", "buffers")
        }
        missing = [key for kind in ours for key in mine[kind] if key not in ours[kind]]
        if missing:
            raise ValueError(f"the state_dict lacks {', '.join(missing[:5])} of the average.")
        own = torch.tensor(
            [key not in mine["weights"] for key in mine["buffers"]], dtype=torch.uint8
        )
        self.average.load_state_dict(state | {"averages": {name: {**ours, "own": own}}})

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Full weights by name, wrappers' prefixes allowed. *Collective* where there is no copy, or a sharded one."""
        named = self.named_here(weights)
        if self.module is None:
            self.fill(named)
        else:
            self.evaluated.load_state_dict(named)

    def named_here(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds, its names without the wrappers that the copy does not have."""
        if self.module is not None and discovery.find_shards(self.module).sharded:
            # NOTE: FSDP1 has names of its own, and its state_dict is collective.
            return dict(weights)
        known = self.entries() if self.module is None else self.module.state_dict()
        named = {}
        for name, value in weights.items():
            inner = wrappers.canonical(name)
            tries = (name, inner, inner.removeprefix("module."))
            named[next((each for each in tries if each in known), name)] = value
        return named

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the copy, for pickles too: the next update tells it its model."""
        if self.module is None:
            raise RuntimeError(f"the average cannot be copied or pickled: {self.why}")
        return self.__dict__ | {"_ema": None, "given": None, "_seen": (), "_rest": []}


def evaluating(
    model: nn.Module, module_fn: ModuleFn | None, decay: float | Schedule, **options: Any
) -> ModuleAverage:
    """A `Copied` whose copy, where there is one, is in evaluation mode."""
    copied = ModuleAverage(model, module_fn and module_fn(), decay, **options)
    if copied.module is not None:
        copied.module.eval()
    return copied


def _weights(of: Sequence[Shard]) -> set[int]:
    """Which tensors they are. Buffers may be registered anew at any time."""
    return {id(shard.tensor) for shard in of if shard.kind != "buffer"}


def recalibrate_all(
    model: nn.Module, loader: Iterable[Any], device: Any = None, group: Any = None
) -> None:
    """`recalibrate` over every batch, whose first element goes to `device`. A model without BatchNorm is left alone."""

    def forward(module: nn.Module, batch: Any) -> Any:
        given = batch[0] if isinstance(batch, (list, tuple)) else batch
        return module(given if device is None else given.to(device))

    if any(
        isinstance(each, batchnorm.LAYERS) and each.running_mean is not None
        for each in model.modules()
    ):
        batchnorm.recalibrate(
            model, loader, sys.maxsize, forward=forward, progress=False, group=group
        )


class Holder:
    """No module itself: `ema` is the module that holds the average, in evaluation mode."""

    _copied: ModuleAverage

    @property
    def ema(self) -> nn.Module:
        """Raises RuntimeError where the model is sharded by FSDP and no module holds its average."""
        return self._copied.evaluated

    @property
    def average(self) -> EMA:
        """The `EMA` behind it: `average.save` for files that any number of ranks can load, `average.swap` under FSDP."""
        return self._copied.average

    def state_dict(self) -> dict[str, Tensor]:
        """That of `ema`; where there is none, what this rank holds of the average, for `torch.distributed.checkpoint` or a
        file of each rank's own. *Aliases* the average."""
        return self._copied.entries() if self._copied.module is None else self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave on as many ranks, or full weights. *Collective* under FSDP."""
        self._copied.load(state)


class CopiedModule(nn.Module):
    """A module with the average as a child, and beside it numbers that checkpoints hold."""

    child = "module"
    _copied: ModuleAverage | None = None

    @property
    def copied(self) -> ModuleAverage:
        if self._copied is None:
            raise RuntimeError(
                f"{type(self).__name__} has no average yet: the first update makes it."
            )
        return self._copied

    @property
    def average(self) -> EMA:
        """The `EMA` behind it: `average.save` for files that any number of ranks can load, `average.swap` under FSDP."""
        return self.copied.average

    def _keep(self, copied: ModuleAverage) -> None:
        self._copied = copied
        if copied.module is not None:
            self._modules[self.child] = copied.module

    def __getattr__(self, name: str) -> Any:
        # NOTE: only what is found nowhere else comes here, children included.
        if name == self.child:
            return self.copied.evaluated
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._copied is not None and self._copied.module is None:
            destination.update(
                {
                    f"{prefix}{self.child}.{key}": value
                    for key, value in self._copied.entries().items()
                }
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        start = f"{prefix}{self.child}."
        if self._copied is not None:
            mine = {
                key: state_dict.pop(key)
                for key in [key for key in state_dict if key.startswith(start)]
            }
            named = self._copied.named_here(
                {key.removeprefix(start): value for key, value in mine.items()}
            )
            if self._copied.module is None:
                self._copied.fill(named)
            else:
                state_dict.update({start + key: value for key, value in named.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Count:
    """The number in a buffer, read from its device only when somebody else wrote it."""

    def __init__(self) -> None:
        self._value, self._of, self._version = 0, torch.tensor(0), -1

    def of(self, buffer: Tensor) -> int:
        if buffer is not self._of or buffer._version != self._version:
            self._value = int(buffer)
            self._of, self._version = buffer, buffer._version
        return self._value

    def up(self, buffer: Tensor) -> int:
        """One more. Returns what it was."""
        value = self.of(buffer)
        buffer.add_(1)
        self._value, self._version = value + 1, buffer._version
        return value

    def __reduce__(self) -> tuple[type[Count], tuple[()]]:
        """NOTE: the version of a copied tensor says nothing of what was known of the first."""
        return Count, ()
