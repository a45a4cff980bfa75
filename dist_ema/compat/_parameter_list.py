"""`ParameterListAverage`: shadows as a list of tensors, one for each parameter that a loop passes.

[Note: what a rank sees]  A tensor of the list has the form of its parameter: plain, a DTensor over
the same mesh under FSDP2, this rank's range of it under FSDP1. Under DDP every rank holds all of
it, so loops may evaluate on one rank. Only construction and `copy_to` are collective, and only
where the model is sharded.

[Note: other parameters]  Loops pass the parameters anew at every step. The same ones cost a
comparison. A wrapper may put DTensors in their place, or a cast may change their form. Then the EMA
is built anew on what came, with the shadows and the clock of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..averaging.swap_registry import Reads
from ..checkpoint import dcp
from ..ema import EMA
from ..schedules import Schedule
from ..sharding import discovery, ownership, records, wrappers
from ..sharding.parameters import Model, Parameters
from . import _tensor_forms

__all__ = ["Device", "ParameterListAverage", "as_model"]

Device = torch.device | str | None


def as_model(
    parameters: Model, *, average_frozen: bool = False, only_trainable: bool = False
) -> nn.Module:
    """The model that an EMA of these parameters is built on.

    Args:
        parameters: with or without names, or their module.
        average_frozen: average frozen ones too.
        only_trainable: leave out those of a module that need no gradient now.

    Returns:
        The parameters in their order, those of a module under their names. FSDP1's cannot be held
            from outside, so under FSDP1 the module is returned.
    """
    if isinstance(parameters, nn.Module):
        inner = wrappers.unwrapped(parameters)
        flattened = any(getattr(p, "_fsdp_flattened", False) for p in inner.parameters())
        if flattened or isinstance(inner, Parameters):
            return inner
        named = inner.named_parameters()
        parameters = [(name, p) for name, p in named if p.requires_grad or not only_trainable]
    return Parameters(parameters, average_frozen)


class ParameterListAverage:
    """The shadows of a model or of a list of parameters ([Note: what a rank sees]).

    The shadows are float32, or float64 where a parameter is. Every update brings its own decay.

    Args:
        model: what `as_model` gave, or any module.
        decay: the schedule that files name.
        buffers: "average" averages a module's floating buffers and lists the others.

    Attributes:
        names: the names of the parameters, in the order of the list.
        weights: the extension API of the EMA.

    Raises:
        ValueError: as `EMA` does.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule,
        buffers: Literal["copy", "average"] = "copy",
    ) -> None:
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in model.parameters())
        dtype = torch.float64 if wide else torch.float32
        self._use(EMA(model, decay, dtype=dtype, split=False, buffers=buffers))

    def _use(self, ema: EMA, dtype: torch.dtype | None = None) -> None:
        self._ema, self.weights, model = ema, ema.weights, ema.model
        if dtype == torch.float16:  # as the originals of lists do; EMA(dtype=) refuses it
            self.weights.reallocate(dtype, self.weights.placement.device)
            self.weights.use_engine()
        if isinstance(model, Parameters):
            self.names = list(model.tensors)
        else:
            listed = self.weights.selection.buffers == "average"
            self.names = [
                state.name
                for state in self.weights.states
                if state.shard.persistent and (listed or state.shard.kind != "buffer")
            ]

    def _options(self) -> dict[str, Any]:
        """The arguments that make an EMA of another model like this one."""
        placement = self.weights.placement
        return {
            "decay": self._ema.schedule,
            "dtype": torch.float32 if placement.dtype == torch.float16 else placement.dtype,
            "device": placement.device,
            "split": False,
            "buffers": self.weights.selection.buffers,
        }

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which follow their copy of the parameters."""
        if len(self.weights.find().members) > 1:
            raise RuntimeError(
                "a sharded average cannot be copied or pickled: use average.save(path) and "
                "average.load(path)."
            )
        return {
            "ema": {"model": self._ema.model, **self._options()},
            "dtype": self.weights.placement.dtype,
            "average": self._ema.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._use(EMA(**state["ema"]), state["dtype"])
        self._ema.load_state_dict(state["average"])

    @property
    def ema(self) -> EMA:
        """The EMA behind the list; another one after [Note: other parameters]."""
        self.follow()
        return self._ema

    # --- [Note: other parameters] ---------------------------------------------------------------

    def follow(self, parameters: Model | None = None) -> None:
        """Average `parameters` from now on, or the same parameters wherever they lie now.

        Raises:
            ValueError: `parameters` differ in number or shape.

        Note:
            *Collective* where they are other ones, and sharded.
        """
        model = self._model_of(parameters)
        if model is not self._ema.model or any(
            map(_tensor_forms.changed_form, self.weights.states)
        ):
            self._move_to(model)

    def _model_of(self, parameters: Model | None) -> nn.Module:
        """The model in use if `parameters` are its parameters, else another one."""
        model = self._ema.model
        if parameters is None or parameters is model:
            return model
        if not isinstance(model, Parameters):
            return wrappers.unwrapped(parameters) if isinstance(parameters, nn.Module) else model
        named, averaged = self._named(parameters), model.tensors
        if all(tensor is averaged[name] for name, tensor in named):
            return model
        # Finds the shards of what FSDP2 unsharded, which may be the parameters in use.
        listed = Parameters(named, model.average_frozen)
        same = all(tensor is averaged[name] for name, tensor in listed.tensors.items())
        return model if same else listed

    def _named(self, parameters: Model) -> list[tuple[str, Tensor]]:
        """`parameters` under the names of this list. Raises ValueError if their number differs."""
        if isinstance(parameters, Parameters):
            parameters = parameters.tensors.values()
        elif isinstance(parameters, nn.Module):
            parameters = parameters.parameters()
        tensors = [item[1] if isinstance(item, tuple) else item for item in parameters]
        if len(tensors) != len(self.names):
            raise ValueError(
                f"the average holds {len(self.names)} parameters, and {len(tensors)} were given. "
                "Pass those that it was built on."
            )
        return list(zip(self.names, tensors, strict=True))

    def parameters_of(self, model: nn.Module) -> Model:
        """The parameters of `model` under the names of this list.

        Raises:
            ValueError: some are missing there, or trainable there and not averaged here.
        """
        inner, listed = wrappers.unwrapped(model), set(self.names)
        if not isinstance(self._ema.model, Parameters):
            return inner
        registered = {wrappers.canonical(name): p for name, p in inner.named_parameters()}
        mismatched = [name for name in self.names if name not in registered]
        mismatched += [n for n, p in registered.items() if p.requires_grad and n not in listed]
        if mismatched:
            raise ValueError(
                f"the model and the average differ in {', '.join(mismatched[:5])}. Pass the model "
                "that the average was built on."
            )
        return [registered[name] for name in self.names]

    @torch.no_grad()
    def _move_to(self, model: nn.Module) -> None:
        old, ema = self.weights, EMA(model, **self._options())
        # The update in flight belongs to the old average.
        old.settle()
        differing = {state.name for state in old.states} ^ {s.name for s in ema.weights.states}
        if differing:
            names = ", ".join(sorted(differing)[:5])
            raise ValueError(f"the average and what was given differ in {names}.")
        average = ema.weights.averages[0]
        try:
            copies, average.own_buffers = dcp.match(dcp.state(old.averages[0]), average)
        except ValueError as error:
            raise ValueError(
                f"the average does not fit what was given: {error} A sharded average is gathered "
                "by copy_to."
            ) from None
        for shadow, value in copies:
            shadow.copy_(value)
        ema.weights.set_clock(old.clock_to_dict())
        self._use(ema, old.placement.dtype)

    # --- verbs ----------------------------------------------------------------------------------

    @torch.no_grad()
    def update(
        self, decay: float, parameters: Model | None = None, copy_frozen: bool = False
    ) -> None:
        """Move the shadows towards the parameters.

        Args:
            decay: the decay of this update; 0 copies.
            parameters: as the loop has them now.
            copy_frozen: copy what needs no gradient now.

        Raises:
            ValueError: the decay is outside of [0, 1], or `parameters` does not fit.

        Note:
            No collective while the parameters are the same.
        """
        self.follow(parameters)
        self._ema.update(decay=decay)
        for state in self.weights.averages[0].averaged if copy_frozen else ():
            if not state.shard.tensor.requires_grad and state.shadow is not None:
                self.weights.settle()
                state.shadow.copy_(state.source)

    @property
    def _states(self) -> dict[str, ownership.ParamState]:
        """The states by name, in the order of `names`; a tied weight has several names."""
        by_name = {n: s for s in self.weights.states for n in s.shard.names}
        return {name: by_name[name] for name in self.names}

    @property
    def shadows(self) -> dict[str, Tensor]:
        """The shadows by name, in the order of `names`, no update in flight. *Aliases* the average.

        What cannot be averaged (integers) is the live tensor.
        """
        self.follow()
        self.weights.refuse("shadows", Reads.WHOLE_MODEL)
        self.weights.settle()
        self.weights.follow()
        return {
            name: state.shard.shaped(
                state.local if state.shadow is None else _tensor_forms.own_storage(state.shadow)
            )
            for name, state in self._states.items()
        }

    @torch.no_grad()
    def fill(self, values: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Overwrite shadows with tensors of their form, or with full ones.

        Args:
            values: in the order of the list; or by name, and then what is missing keeps its shadow.

        Raises:
            ValueError: number or shapes differ; nothing has changed then.
        """
        by_name = values if isinstance(values, Mapping) else dict(self._named(values))
        self.follow()
        self.weights.refuse("load_state_dict", Reads.SHADOWS)
        self.weights.ready()
        _tensor_forms.overwrite(
            [
                (state.shard, state.shadow, by_name[name])
                for name, state in self._states.items()
                if name in by_name
            ]
        )

    @torch.no_grad()
    def keep(self, parameters: Model | None = None, device: str | None = None) -> list[Tensor]:
        """Copies of what this rank holds of the parameters.

        Args:
            parameters: other parameters than those of the list.
            device: the device of the copies; None: beside the parameters.
        """
        return [
            shard.shaped(shard.read().to(device, copy=True))
            for shard in self._shards_of("store", parameters)
        ]

    @torch.no_grad()
    def put_back(self, kept: Sequence[Tensor], parameters: Model | None = None) -> None:
        """Write what `keep` gave into the parameters.

        Raises:
            ValueError: number or shapes differ; nothing has changed then.
        """
        shards = self._shards_of("restore", parameters)
        if len(shards) != len(kept):
            raise ValueError(
                f"{len(kept)} weights were kept, and {len(shards)} were given. "
                "Give the same parameters to store() and restore()."
            )
        _tensor_forms.overwrite(
            [(shard, shard.read(), value) for shard, value in zip(shards, kept, strict=True)]
        )

    def _shards_of(self, verb: str, parameters: Model | None) -> list[records.Shard]:
        """The records of parameters that are not swapped, and that no update reads now."""
        self.follow()
        model = self._ema.model if parameters is None else as_model(parameters)
        # The search frees what FSDP holds unsharded: the next forward reads what is written here.
        shards = discovery.find_shards(model).shards
        self.weights.refuse(verb, Reads.WHOLE_MODEL, (shard.tensor for shard in shards))
        self.weights.settle()
        by_name = {name: shard for shard in shards for name in shard.names}
        names = model.tensors if isinstance(model, Parameters) else self.names
        return [by_name[name] for name in names]

    def to(self, device: Device = None, dtype: torch.dtype | None = None) -> None:
        """Move and cast the shadows. Raises ValueError if the dtype does not float."""
        self.ema.to(device, None if dtype == torch.float16 else dtype)
        self._use(self._ema, dtype)

    def copy_to(self, parameters: Model | None = None) -> None:
        """Write the shadows into other parameters, by default into their own.

        Note:
            *Collective* where the average is sharded.
        """
        self.follow()
        parameters = self._ema.model if parameters is None else parameters
        listed = isinstance(self._ema.model, Parameters)
        self._ema.copy_to(self._named(parameters) if listed else parameters)
