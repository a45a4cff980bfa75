"""Averages as a list or table of tensors, the form in which several packages keep them, over an EMA.

[Note: what a rank sees]  A tensor of the list has the form of its parameter: plain, or a DTensor over the same mesh under
FSDP2, or the rank's range of it under FSDP1. Replicas (DDP) are whole on every rank, so nothing here is a collective but
`Listed` itself and `copy_to`, and these only where the model is sharded: loops that evaluate on one rank of DDP go on.

[Note: other parameters]  Loops hand the parameters over anew at every step, from where they get them then. The same ones
cost a comparison. Where the model was moved, or a wrapper put DTensors in their place, the EMA is built anew on what came,
with the shadows and the clock of the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..averaging.averages import AveragedWeights, Reads
from ..ema import EMA
from ..schedules import Schedule
from ..sharding import discovery, geometry, parameters, records, wrappers
from ..sharding.ownership import ParamState

__all__ = ["ParameterListAverage", "Shadowed", "keep", "put_back", "source", "trainable"]


def source(given: parameters.Model, always: bool = False) -> nn.Module:
    """What an EMA is built on: the parameters in their order, those of a module under their names. FSDP1's cannot be held
    from outside their module, so there it is the module. always: frozen ones are averaged too."""
    if isinstance(given, nn.Module):
        inner = wrappers.unwrapped(given)
        if isinstance(inner, parameters.Parameters) or any(
            getattr(parameter, "_fsdp_flattened", False) for parameter in inner.parameters()
        ):
            return inner
        given = inner.named_parameters()
    return parameters.Parameters(given, always)


def trainable(model: nn.Module) -> nn.Module:
    """The same for those parameters of a module that need a gradient now."""
    inner = source(model)
    if not isinstance(inner, parameters.Parameters):
        return inner
    return parameters.Parameters(
        [(name, each) for name, each in inner.tensors.items() if each.requires_grad]
    )


class ParameterListAverage:
    """The shadows of a model or of a list of parameters, this rank's part of each ([Note: what a rank sees]).

    model: what `source` gave, or any module. decay: what files name; every update brings its own. buffers: a module's
    floating buffers are averaged, its other buffers listed. The shadows are float32, or float64 where a parameter is.
    Raises ValueError as `EMA` does.
    """

    def __init__(self, model: nn.Module, decay: float | Schedule, buffers: bool = False) -> None:
        self._decay, self._buffers = decay, buffers
        wide = any(
            parameter.dtype in (torch.float64, torch.complex128) for parameter in model.parameters()
        )
        self._dtype = torch.float64 if wide else torch.float32
        self._device: torch.device | None = None
        self._use(self._build(model))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which follow their copy of the parameters. Raises RuntimeError where they are sharded."""
        if self._ema._ranks.size > 1:
            raise RuntimeError(
                "a sharded average cannot be copied or pickled: use average.save(path) and average.load(path)."
            )
        table, clock = self.table, self._weights.clock_to_dict()
        kept = {name: self.__dict__[name] for name in ("_decay", "_buffers", "_dtype", "_device")}
        return kept | {"model": self._model, "table": table, "clock": clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, table, clock = (state.pop(name) for name in ("model", "table", "clock"))
        self.__dict__.update(state)
        self._use(self._build(model))
        self.fill_table(table)
        self._weights.set_clock(clock)

    def _build(self, model: nn.Module) -> EMA:
        buffers: Any = "average" if self._buffers else "copy"
        return EMA(
            model, self._decay, dtype=self._dtype, device=self._device, split=False, buffers=buffers
        )

    def _use(self, ema: EMA) -> None:
        self._ema, self._model = ema, ema.model
        self._seen: list[ParamState] | None = None
        self._given = (
            self._model.tensors if isinstance(self._model, parameters.Parameters) else None
        )
        if self._given is not None:
            self.names = list(self._given)
        else:
            self.names = [
                slot.name for slot in self._weights.states if _counts(slot.shard, self._buffers)
            ]

    @property
    def _slots(self) -> list[ParamState]:
        """In the order of `names`."""
        if self._weights.states is not self._seen:  # rescan makes new ones
            self._seen, by_name = self._weights.states, _by_name(self._ema)
            self._known_slots = [by_name[name] for name in self.names]
        return self._known_slots

    @property
    def ema(self) -> EMA:
        """The EMA behind the list; another one after the parameters became others ([Note: other parameters])."""
        self.follow()
        return self._ema

    # --- whose average it is -----------------------------------------------------------------------------------

    def follow(self, given: parameters.Model | None = None) -> None:
        """Average `given` from now on, or the same as before wherever it lies now ([Note: other parameters]).

        *Collective* where it is another model and sharded. Raises ValueError if number or shapes differ.
        """
        model = self._model if given is None else self._known(given)
        moved = [slot for slot in self._slots if slot.moved]
        if model is not self._model or any(self._otherwise(slot) for slot in moved):
            self._rebuild(model)
        elif moved:
            self._weights.settle()
            self._weights.follow()

    def _known(self, given: parameters.Model) -> nn.Module:
        """The model in use if `given` are its parameters, else another one."""
        if self._given is None:
            return wrappers.unwrapped(given) if isinstance(given, nn.Module) else self._model
        if given is self._model:
            return self._model
        assert isinstance(self._model, parameters.Parameters)
        mine, named = self._given, self.named(given)
        if all(tensor is mine[name] for name, tensor in named):
            return self._model
        other = parameters.Parameters(
            named, self._model.average_frozen
        )  # it knows copies that FSDP2 unsharded
        same = all(tensor is mine[name] for name, tensor in other.tensors.items())
        return self._model if same else other

    def named(self, given: parameters.Model) -> list[tuple[str, Tensor]]:
        """The parameters of `given`, with names or without, under the names of this list, in order.

        Raises ValueError if they are more or fewer.
        """
        items: Any = given.parameters() if isinstance(given, nn.Module) else given
        if isinstance(given, parameters.Parameters):
            items = given.tensors.items()
        tensors = [item[1] if isinstance(item, tuple) else item for item in items]
        if len(tensors) != len(self.names):
            raise ValueError(
                f"the average holds {len(self.names)} parameters, and {len(tensors)} were given."
            )
        return list(zip(self.names, tensors, strict=True))

    def of(self, model: nn.Module) -> parameters.Model:
        """The parameters of `model` that are called like those here, or the module itself where this list was given one.

        Raises ValueError for what it lacks, and for what is trainable there and not averaged here.
        """
        inner = wrappers.unwrapped(model)
        if self._given is None:
            return inner
        found = {
            wrappers.canonical(name): parameter for name, parameter in inner.named_parameters()
        }
        lacks = [name for name in self.names if name not in found]
        more = [
            name
            for name, parameter in found.items()
            if parameter.requires_grad and name not in self._given
        ]
        if lacks or more:
            raise ValueError(
                f"the model and the average differ in {', '.join((lacks + more)[:5])}."
            )
        return [found[name] for name in self.names]

    def _otherwise(self, slot: ParamState) -> bool:
        """What moved has another dtype, device or order now, which an EMA refuses to follow."""
        raw, old = slot.shard.local_tensor(), slot.local
        return slot.layout_changed or (raw.dtype, raw.device) != (old.dtype, old.device)

    def _rebuild(self, model: nn.Module) -> None:
        self._weights.settle()
        ema = self._build(model)
        before, after = _by_name(self._ema), _by_name(ema)
        odd = sorted(before.keys() ^ after.keys())
        if odd:
            raise ValueError(f"the average and what was given differ in {', '.join(odd[:5])}.")
        for name, slot in after.items():
            if slot.shadow is not None and before[name].shadow is not None:
                _carry(before[name], slot)
        ema.weights.set_clock(self._ema.weights.clock_to_dict())
        self._use(ema)

    # --- verbs -------------------------------------------------------------------------------------------------

    @property
    def _weights(self) -> AveragedWeights:
        return self._ema.weights

    @torch.no_grad()
    def update(
        self, decay: float, given: parameters.Model | None = None, copy_frozen: bool = False
    ) -> None:
        """Move towards live with this decay, 0 copies. copy_frozen: what needs no gradient now is copied.

        No collective while the parameters are the same. Raises ValueError for a decay outside of [0, 1].
        """
        self.follow(given)
        self._ema.update(decay=decay)
        frozen = [
            slot
            for slot in self._slots
            if slot.shadow is not None and not slot.shard.tensor.requires_grad
        ]
        if copy_frozen and frozen:
            self._weights.settle()
            for slot in frozen:
                assert slot.shadow is not None
                slot.shadow.copy_(slot.live)

    @property
    def shadows(self) -> list[Tensor]:
        """In the order of `names`, no update under way. *Aliases* the average; what cannot be averaged (integers) is live."""
        self.follow()
        self._weights.refuse("ema.state_dict", Reads.WHOLE_MODEL)
        self._weights.settle()
        return [
            slot.shard.shaped(slot.local if slot.shadow is None else _apart(slot.shadow))
            for slot in self._slots
        ]

    @property
    def table(self) -> dict[str, Tensor]:
        """What is averaged of them, by name."""
        return {
            name: its
            for name, its, slot in zip(self.names, self.shadows, self._slots, strict=True)
            if slot.shadow is not None
        }

    @property
    def first(self) -> bool:
        """Of the ranks that hold the average together, this is the one that writes files."""
        return self._ema._ranks.first

    def fill(self, values: Sequence[Tensor]) -> None:
        """Overwrite the shadows with tensors of their form, or full ones. Raises ValueError, and changes nothing, if number
        or shapes differ."""
        self.fill_table(dict(self.named(values)))

    @torch.no_grad()
    def fill_table(self, values: Mapping[str, Tensor]) -> None:
        """The same by name; names that are missing keep their shadows."""
        self.follow()
        self._weights.refuse("ema.load_state_dict", Reads.SHADOWS)
        chosen = [
            (slot, values[name])
            for name, slot in zip(self.names, self._slots, strict=True)
            if name in values
        ]
        for slot, value in chosen:
            _refuse_form(slot.name, slot.shard, value)
        self._weights.ready()
        for slot, value in chosen:
            if slot.shadow is not None:
                _put(slot.shard, slot.shadow, value)

    @torch.no_grad()
    def keep(self) -> dict[str, Tensor]:
        """Copies of the parameters themselves, by name."""
        self.follow()
        self._weights.ready()
        return {slot.name: slot.shard.shaped(slot.shard.read().clone()) for slot in self._slots}

    @torch.no_grad()
    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Write what `keep` gave into the parameters."""
        self.follow()
        self._weights.ready()
        for slot in self._slots:
            _put_into(slot.shard, kept[slot.name])

    def to(self, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
        """Move and cast the shadows, as `EMA.to` does."""
        self.ema.to(device, dtype)
        self._device = self._device if device is None else torch.device(device)
        self._dtype = dtype or self._dtype

    def copy_to(self, given: parameters.Model | None = None) -> None:
        """Write the shadows into other parameters, by default into their own. *Collective* where the average is sharded."""
        self.follow()
        given = self._model if given is None else given
        self._ema.copy_to(given if self._given is None else self.named(given))


class Shadowed:
    """A class around a `Listed` whose shadows are a list."""

    _listed: ParameterListAverage

    @property
    def average(self) -> EMA:
        """What saves, loads and exports in any layout."""
        return self._listed.ema

    @property
    def shadow_params(self) -> list[Tensor]:
        """One tensor per parameter, in their form, taken anew at every access. *Aliases* the average."""
        return self._listed.shadows

    @shadow_params.setter
    def shadow_params(self, values: list[Tensor]) -> None:
        self._listed.fill(values)


# --- weights kept aside ------------------------------------------------------------------------------------------


@torch.no_grad()
def keep(model: nn.Module, device: str | None = None, buffers: bool = False) -> list[Tensor]:
    """Copies of what this rank holds of every weight, in the model's order, on `device` or beside them."""
    return [shard.shaped(shard.read().to(device, copy=True)) for shard in _held(model, buffers)]


@torch.no_grad()
def put_back(model: nn.Module, kept: Sequence[Tensor], buffers: bool = False) -> None:
    """Write what `keep` gave into the weights. Raises ValueError, and changes nothing, if number or shapes differ."""
    held = _held(model, buffers)
    if len(held) != len(kept):
        raise ValueError(f"{len(kept)} weights were kept, and {len(held)} were given.")
    for shard, value in zip(held, kept, strict=True):
        _refuse_form(shard.name, shard, value)
    for shard, value in zip(held, kept, strict=True):
        _put_into(shard, value)


def _held(model: nn.Module, buffers: bool) -> list[records.Shard]:
    """NOTE: the search frees what FSDP holds unsharded, so the next forward reads what is written here."""
    found = discovery.find_shards(model)
    if not isinstance(model, parameters.Parameters):
        return [shard for shard in found.shards if _counts(shard, buffers)]
    by_name = {name: shard for shard in found.shards for name in (shard.name, *shard.aliases)}
    return [by_name[name] for name in model.tensors]


def _counts(shard: records.Shard, buffers: bool) -> bool:
    return shard.kind != "buffer" or (buffers and shard.persistent)


def _apart(elements: Tensor) -> Tensor:
    """The same memory as a storage of its own. *Aliases*.

    NOTE: with a view torch.save writes all that it is a view of, and a DTensor over one it cannot write.
    """
    start = elements.storage_offset() * elements.itemsize
    memory = elements.untyped_storage()[start : start + elements.nbytes]
    return elements.new_empty(0).set_(memory, 0, elements.shape, elements.stride())


def _by_name(ema: EMA) -> dict[str, ParamState]:
    return {name: slot for slot in ema.weights.states for name in (slot.name, *slot.shard.aliases)}


def _refuse_form(name: str, shard: records.Shard, value: Tensor) -> None:
    forms = {shard.shape, tuple(shard.local(shard.read()).shape)}
    if tuple(value.shape) not in forms:
        raise ValueError(f"{name} is {tuple(value.shape)}, and {shard.shape} in the model.")


def _put_into(shard: records.Shard, value: Tensor) -> None:
    """Overwrite what the model holds."""
    elements = shard.read()
    _put(shard, elements, value)
    if not shard.dense:  # `read` gave a copy
        shard.write(elements)


def _put(shard: records.Shard, elements: Tensor, value: Tensor) -> None:
    """Overwrite `elements`, one per held element, with a tensor of their form, or with the full weight."""
    form, value = shard.shaped(elements), value.detach()
    if type(value) is type(form) and value.shape == form.shape:
        form.copy_(value)
    elif tuple(value.shape) == shard.shape:
        for box, part in geometry.boxes_with_data(shard, shard.local_region, elements):
            part.copy_(value[box.slices])
    else:
        shard.local(elements).copy_(value)


def _carry(old: ParamState, new: ParamState) -> None:
    """The old shadow in place of live, as far as this rank has it. Raises ValueError if that is not far enough."""
    if old.shard.shape != new.shard.shape:
        raise ValueError(f"{new.name} is {new.shard.shape}, and {old.shard.shape} in the average.")
    assert old.shadow is not None
    assert new.shadow is not None
    left = new.averaged_region.numel
    for hole, to in geometry.boxes_with_data(new.shard, new.averaged_region, new.shadow):
        for box, part in geometry.boxes_with_data(old.shard, old.averaged_region, old.shadow):
            common = box.intersect(hole)
            if common is not None:
                to[common.within(hole)].copy_(part[common.within(box)])
                left -= common.numel
    if left:
        raise ValueError(
            f"{new.name}: the average is sharded, and this rank holds only a part of what was given. Use copy_to, which "
            "gathers."
        )
