"""`ModuleAverage`: a copy of the model that an EMA averages into, whatever model comes next.

[Note: the copy]  `EMA(model, into=copy)` averages into the memory of a copy: a deep copy of the
model without DDP and torch.compile around it, or what `module_fn` builds. A model under FSDP cannot
be copied. Without `module_fn` its average lies beside it, each rank its shard, and no module can be
evaluated: `average.swap()` puts it into the model.

[Note: which model]  `update(model)` names the model anew each time. A wrapper that was put around
it since is the same model. Another model, or the same one with other dtypes or other trainable
weights, is averaged from then on into the same copy. The `EMA` is built again around it, and the
copy keeps what it holds.

[Note: one rank alone]  Under DDP every rank has a whole copy, and nothing here sends a message. So
scripts may keep the average on one rank only. Under FSDP construction is collective.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..averaging import drop_in_rules, storage_watch
from ..averaging.swap_registry import Reads
from ..checkpoint import dcp
from ..ema import EMA
from ..schedules import Schedule
from ..sharding import discovery, tree_changes, wrappers

__all__ = ["Device", "ModuleAverage", "ModuleFn", "UpdateRule"]

ModuleFn = Callable[[], nn.Module]
Device = torch.device | str | int | None
UpdateRule = Callable[[Sequence[tuple[Tensor, Tensor]]], None]


class ModuleAverage:
    """The copy of a model, and the `EMA` that averages into it.

    Methods are collective only where they say so.

    Args:
        model: as it is trained.
        decay: the schedule that files name; each update brings its own decay.
        module_fn: builds the copy. None makes one where that can be done ([Note: the copy]).
        device: the device of the copy, or of the shadows if there is no copy.
        dtype: the same.
        buffers: as for `EMA`.
        only: as for `EMA`.
        fresh: overwrite the copy with the live weights.
        evaluates: put the copy into evaluation mode.
        seed: the seed of stochastic rounding.

    Attributes:
        module: the copy.
        given: the model as the last update named it, with its wrappers; None after a deep copy.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule,
        module_fn: ModuleFn | None = None,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        buffers: Literal["copy", "average"] = "average",
        only: Callable[[str], bool] | None = None,
        fresh: bool = True,
        evaluates: bool = False,
        seed: int = 0,
    ) -> None:
        live = _inside_wrappers(model)
        self.given: nn.Module | None = model
        self._seed = seed
        self.module: nn.Module | None = None if module_fn is None else module_fn()
        self._options: dict[str, Any] = {"decay": decay, "buffers": buffers, "only": only}
        self._ema: EMA | None = None
        if self.module is None and discovery.find_shards(live).sharded:
            # A copy keeps the dtypes of the model; shadows without one are wide enough for it.
            wide = any(p.dtype == torch.float64 for p in live.parameters() if p.requires_grad)
            default = torch.float64 if wide else torch.float32
            self._options |= {"device": device, "dtype": dtype or default}
        else:
            if self.module is None:
                self.module = copy.deepcopy(live)
            if device is not None or dtype is not None:
                self.module.to(device=device, dtype=dtype)
            if evaluates:
                self.module.eval()
        self._build(live, keep=not fresh)

    # --- [Note: which model] --------------------------------------------------------------------

    @property
    def average(self) -> EMA:
        """The `EMA`. Raises RuntimeError after a deep copy, until an update names the model."""
        if self._ema is None:
            raise RuntimeError("this copy of an average has no model: the next update names one.")
        return self._ema

    @property
    def ema(self) -> nn.Module:
        """The copy, no update in flight.

        Raises RuntimeError where FSDP shards the model and no module holds the average.
        """
        if self.module is None:
            raise RuntimeError(self._no_module)
        if self._ema is not None:
            self._ema.weights.sync_teacher()
        return self.module

    @property
    def _no_module(self) -> str:
        return (
            f"{type(self.average.model).__name__} is sharded by FSDP and cannot be copied: no "
            "module holds the average. Pass module_fn=, which builds and wraps another instance, "
            "or put the average into the model: `with NAME.average.swap()`."
        )

    def follow(self, model: nn.Module) -> None:
        """Average `model` from now on. *Collective* where it is sharded, and another one."""
        live = _inside_wrappers(model)
        if self._ema is None or live is not self._ema.model or self._must_rebuild():
            self._build(live, keep=True)
        self.given = model

    def choose(self, model: nn.Module, only: Callable[[str], bool]) -> None:
        """Average what `only` says of `model` from now on, and go on from the copy."""
        self._options["only"] = only
        self._build(wrappers.unwrapped(model), keep=True)

    @torch.no_grad()
    def _build(self, live: nn.Module, keep: bool) -> None:
        old = None if self._ema is None else self._ema.weights
        if self.module is None and old is not None:
            raise RuntimeError(f"the average belongs to another model. {self._no_module}")
        copied = [] if self.module is None else discovery.find_shards(self.module).shards
        if old is not None and old.teacher is not None:
            old.settle()
            # Or the new EMA would be refused, because this teacher has a writer.
            old.teacher.release()
        # The new EMA copies the live weights into its teacher.
        kept = [(shard, shard.read().clone()) for shard in copied if keep]
        with _thawed(live, [] if old is None else old.names()):
            ema = EMA(live, into=self.module, **self._options)
        ema.weights.reseed(self._seed)
        for shard, value in kept:
            shard.write(value)
        if old is not None:
            # The clock goes on: decays of a warm-up must not begin again.
            ema.weights.set_clock(old.clock_to_dict())
            storage_watch.refuse_shared(ema.weights.averages)
        self._ema = ema
        unwritten = {
            state.name: state.shard
            for state in ema.weights.states
            if state.shadow is None and state.teacher_copy is None
        }
        # Pairs of the copy and the model that the EMA does not write: what `only` leaves out,
        # and buffers that no file holds.
        self._unwritten = [(s, unwritten[s.name]) for s in copied if s.name in unwritten]

    def _must_rebuild(self) -> bool:
        """The engine refuses what became of the model or the copy, and every weight is still there.

        The originals read the model by its names at every update, whatever was replaced or cast.
        """
        weights = self.average.weights
        if weights.teacher is not None and weights.is_tree_moved:
            try:
                weights.follow(tree=True)
            except RuntimeError:
                shards = [state.shard for state in weights.states]
                changes = tree_changes.compare_inventory(weights.model, shards)
                if changes.gone or changes.new_trainable:
                    raise
                return True
        return False

    # --- moving ---------------------------------------------------------------------------------

    @torch.no_grad()
    def move(self, model: nn.Module, by: float | UpdateRule) -> None:
        """Move towards `model`. No collective, no host sync.

        Args:
            model: as it is now ([Note: which model]).
            by: a decay, where 0 copies; or a function of (shadow, live) views of what this rank
                averages.
        """
        self.follow(model)
        # An update copies frozen weights and buffers too, so none of them may be swapped.
        weights = self.average.weights
        weights.refuse("update", Reads.WHOLE_MODEL)
        if weights.teacher is not None:  # all of them, as the originals do
            weights.teacher.forget_copies()
        if callable(by):
            drop_in_rules.move_by(weights, by)
        else:
            self.average.update(decay=by)
        if self.module is None:  # an update ends what was recalibrated, as in a copy
            self.average.reset_buffers()

    @torch.no_grad()
    def copy_rest(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Copy live into the copy where the `EMA` does not write it."""
        for copied, live in self._unwritten:
            if wanted(copied.name):
                copied.write(live.read())

    @torch.no_grad()
    def pull(
        self, model: nn.Module, weight: float, weight_of: Callable[[str], float] = lambda _: 1.0
    ) -> None:
        """Move the model towards the average.

        Args:
            model: that of the average.
            weight: the weight of the average; 1 copies.
            weight_of: the same by name, of what the `EMA` does not write.

        Note:
            *Collective* under HSDP.
        """
        self.follow(model)
        self.average.weights.refuse("update_model_with_ema", Reads.WHOLE_MODEL)
        drop_in_rules.pull(self.average.weights, weight)
        for copied, live in self._unwritten:
            if live.dtype.is_floating_point:
                average = copied.read().to(live.read())
                live.write(live.read().lerp_(average, weight_of(copied.name)))

    # --- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the copy.

        Where there is no copy: as torch.distributed.checkpoint takes it, a plain tensor where this
        rank holds a whole one, else a `FlatRange`. *Aliases* the average.
        """
        if self.module is not None:
            return self.ema.state_dict()
        weights = self.average.weights
        weights.refuse("state_dict", Reads.WHOLE_MODEL)
        weights.ready()
        return dcp.whole(weights.averages[0].persistent, weights.averages[0].own_buffers)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave on as many ranks, or full weights.

        Prefixes of wrappers may stay.

        Note:
            *Collective* under FSDP.
        """
        named = self.named_here(state)
        if self.module is not None:
            self.ema.load_state_dict(named)
            return
        whole = self.average.state_dict()
        (average,) = whole["averages"].values()
        missing = [key for key in (*average["weights"], *average["buffers"]) if key not in named]
        if missing:
            raise ValueError(
                f"the state_dict lacks {', '.join(missing[:5])} of the average. Pass what "
                "state_dict() of such a drop-in gave."
            )
        own = [key not in average["weights"] for key in sorted(average["buffers"])]
        average |= {
            "weights": named,
            "buffers": {key: named[key] for key in average["buffers"]},
            "own_by_name": torch.tensor(own, dtype=torch.uint8, device="cpu"),
        }
        self.average.load_state_dict(whole)

    def named_here(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint without prefixes of wrappers that the copy lacks."""
        if self.module is not None and discovery.find_shards(self.module).sharded:
            return dict(weights)  # FSDP1 has names of its own, and its state_dict is collective
        # A model may have a child called `module`, so only keys that fit nothing else are cut.
        known, named = self.state_dict(), {}
        for name, value in weights.items():
            inner = wrappers.canonical(name)
            spellings = (name, inner, inner.removeprefix("module."))
            named[next((one for one in spellings if one in known), name)] = value
        return named

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which learn their model at the next update."""
        if self.module is None:
            raise RuntimeError(f"the average cannot be copied or pickled: {self._no_module}")
        return {**vars(self), "_ema": None, "given": None, "_unwritten": []}


def _inside_wrappers(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"this average takes a module, got {type(model).__name__}. For parameters use "
            "dist_ema.EMA."
        )
    return wrappers.unwrapped(model)


@contextmanager
def _thawed(model: nn.Module, averaged: Sequence[str]) -> Iterator[None]:
    """Let averaged weights that are frozen by now look trainable, so that a new EMA keeps them."""
    frozen = [
        p
        for name, p in model.named_parameters()
        if not p.requires_grad and wrappers.canonical(name) in averaged
    ]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
