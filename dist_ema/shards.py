"""What PyTorch did to the model -> list[Shard].

This is the one module that knows wrappers. DDP, FSDP1, FSDP2, HSDP, tensor parallel, torch.compile and activation
checkpointing are dissolved here into plain records; nothing after this file asks who wrapped what.

[Note: regions]  A rank holds one *region* of every weight: a box of the full weight, and a range [begin, end) of that
box's row-major order.

    DTensor, Shard(0)      FSDP1 flat, one process     HSDP: the box is split again over the replicas
    +-----------+ rank 0   +-----+=====+ rank 0        +-----------+
    |###########|          |     |#####|               |###########| rank 0 \\ the same box,
    +-----------+          |#####|#####| rank 1        |-----------|         | two ranges
    |           | rank 1   |#####|     |               |           | rank 2 /
    +-----------+          +=====+-----+               +-----------+
      a box, all of it       all of it, a range          a box, a range

[Note: storage order]  A dense permuted weight (channels_last) is recorded in the order in which it lies in memory: its
`order` lists the dimensions from slowest to fastest, and box and range speak of the permuted weight.

[Note: stale roots]  After a forward without backward FSDP keeps weights unsharded, and the next forward reads that copy
whatever the shards hold by then. Every verb that writes shards, or that must find them in `parameters()`, calls
`reshard` first, and `swap` calls it on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import TrainingState
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Model",
    "ModelShards",
    "Parameters",
    "Region",
    "Shard",
    "before_state_dict",
    "blocker",
    "canonical",
    "entrances",
    "find_shards",
    "frozen_by_inductor",
    "module_of",
    "redescribe",
    "register",
    "registered",
    "replaced",
    "reshard",
    "side_store",
    "unwrapped",
]

Kind = Literal["trainable", "frozen", "buffer"]
Model = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

# The child under which each wrapper keeps the module that it wraps.
_WRAPPED: tuple[tuple[type, str], ...] = (
    (DistributedDataParallel, "module"),
    (DataParallel, "module"),
    (FullyShardedDataParallel, "_fsdp_wrapped_module"),
    (CheckpointWrapper, "_checkpoint_wrapped_module"),
)


@dataclass(frozen=True)
class Region:
    """A box of a weight and a range of the box's row-major order ([Note: regions])."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@dataclass
class Shard:
    """This rank's part of one named weight or buffer, found once and kept.

    `held` is what the rank's memory holds, `read()` returns those elements as they lie in the model's storage.
    *Aliases* the model.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]  # of the full weight, row-major
    tensor: Tensor  # the Parameter (or buffer) that the model registers
    place: tuple[nn.Module, str]  # where it is registered
    local_region: Region  # in storage order
    local_tensor: Callable[[], Tensor]  # the tensor whose storage holds the elements, read afresh
    storage_offset: int = 0  # where `held` begins in raw, in elements
    order: tuple[int, ...] | None = None  # [Note: storage order]; None: row-major
    replicas: tuple[dist.ProcessGroup, ...] = ()  # groups that hold `held` too, outermost first
    flat: bool = False  # cut with its neighbours as one flat sequence over its replicas
    owner_ranks: tuple[int, ...] = ()  # global ranks that hold one copy of the weight together; (): each its own
    dense: bool = True  # False: strided or expanded, so `read` gives a copy and nothing can be averaged in place
    average_frozen: bool = False  # averaged whether or not it needs a gradient now
    is_writer: bool = True  # of several such copies, the one that files are written from
    persistent: bool = True  # part of state_dict()
    aliases: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return self.local_tensor().dtype

    @property
    def trainable(self) -> bool:
        return self.kind != "buffer" and (self.average_frozen or self.tensor.requires_grad)

    def read(self) -> Tensor:
        """The held elements. Shape [held.numel]. *Aliases* the model's storage, shares its version counter."""
        raw = self.local_tensor().detach()
        return raw.as_strided((self.local_region.numel,), (1,), raw.storage_offset() + self.storage_offset)

    def write(self, elements: Tensor) -> None:
        """Put `elements`, one per held element, into the model's storage, where `read` gives a copy too."""
        now = self.read()
        if self.dense:
            now.copy_(elements)
        elif not torch.equal(now, elements.to(now)):
            tensor = registered(self) if self.kind == "buffer" else self.tensor
            assert tensor is not None
            once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())  # expanded
            tensor.detach()[once].copy_(elements.view(tensor.shape)[once])

    def local(self, elements: Tensor) -> Tensor:
        """`elements`, one per held element, in the shape and strides of the local tensor; a range of an FSDP1 flat parameter
        stays one-dimensional. *Aliases* `elements`."""
        raw = self.tensor._local_tensor if isinstance(self.tensor, DTensor) else self.tensor
        if getattr(raw, "_fsdp_flattened", False):
            return elements
        return elements.as_strided(raw.shape, raw.stride()) if self.dense else elements.view(raw.shape)

    def shaped(self, elements: Tensor) -> Tensor:
        """The same as the model shows its own: a DTensor over the same mesh, if `elements` lie on its devices."""
        local = self.local(elements)
        if not isinstance(self.tensor, DTensor) or local.device.type != self.tensor.device_mesh.device_type:
            return local
        mesh, placements = self.tensor.device_mesh, self.tensor.placements
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=self.tensor.shape, stride=self.tensor.stride()
        )


@dataclass
class ModelShards:
    """Every weight and buffer of a model as this rank holds it, and the ranks that hold the model together."""

    shards: list[Shard]
    members: list[int]  # global ranks; one entry: a world of one
    group: dist.ProcessGroup | None  # of exactly those ranks, where the wrapper has one
    sharded: list[nn.Module]  # the FSDP modules, for `reshard` and `blocker`
    unfilled: list[tuple[str, tuple[nn.Module, str]]]  # name and place of buffers of the state_dict that are None


class Parameters(nn.Module):
    """Parameters that came without their module, under their names, or under 0, 1, ... in their order.

    What a module would tell is not known of them: that DDP replicates them, that the model registers another object now,
    which buffers belong to them. FSDP2's are found through its own records, FSDP1's cannot be held from outside.

    always: frozen ones are averaged too, as loops may freeze and thaw them at any step.
    """

    def __init__(self, given: Iterable[Tensor] | Iterable[tuple[str, Tensor]], always: bool = False) -> None:
        super().__init__()
        self.average_frozen = always
        if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable):
            raise ValueError(f"{_TAKES}, got {type(given).__name__}.")
        self.nameless = False
        for i, item in enumerate(given):
            name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (str(i), item)
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"{_TAKES}, got {type(item).__name__} as number {i}.")
            if getattr(tensor, "_fsdp_flattened", False):
                raise ValueError(
                    f"parameter {name} belongs to FSDP1, which moves its parameters at every forward: pass the model."
                )
            name = canonical(name)
            if name in self._parameters:
                raise ValueError(f"two parameters are called {name}.")
            self._parameters[name] = tensor  # type: ignore[assignment]
            self.nameless |= not isinstance(item, tuple)
        self.owners = self._find_owners()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What was given, by name; in place of a copy that FSDP2 unsharded, the shard."""
        return self._parameters  # type: ignore[return-value]

    def _find_owners(self) -> list[nn.Module]:
        """The FSDP2 modules around. A copy that one of them unsharded gives way to the shard ([Note: stale roots])."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._parameters.items():
            names.setdefault(id(tensor), []).append(name)
        owners: list[nn.Module] = []
        for module, record in fsdp2_records():
            copies = [getattr(record, f"_{kind}_param", None) for kind in ("unsharded", "sharded_post_forward")]
            mine = [name for one in (record.sharded_param, *copies) for name in names.get(id(one), [])]
            self._parameters.update(dict.fromkeys(mine, record.sharded_param))
            if mine and module not in owners:
                owners.append(module)
        return owners


_TAKES = "EMA takes a module, parameters, or pairs of a name and a parameter"


def module_of(model: Model) -> nn.Module:
    """The model, or a module around the parameters that were given in its place."""
    return model if isinstance(model, nn.Module) else Parameters(model)


def find_shards(model: nn.Module, replicated: dist.ProcessGroup | None = None) -> ModelShards:
    """Dissolve the wrappers of `model`. Names are canonical: no module., _orig_mod., _fsdp_wrapped_module. ...

    replicated: the ranks that hold the same plain parameters, where no DDP says so.

    Raises ValueError for what cannot be averaged by elements: meta tensors, strided or expanded weights, Partial
    placements, FSDP1 over tensor parallel.
    """
    sharded: list[nn.Module] = [m for m in model.modules() if isinstance(m, (FSDPModule, FullyShardedDataParallel))]
    if isinstance(model, Parameters):
        sharded = model.owners
    reshard(sharded)
    flats = dict(flat_parameters(model))
    seen: dict[Any, Shard] = {}
    unfilled: list[tuple[str, tuple[nn.Module, str]]] = []
    walk = list(walk_modules(model, ddp=None if replicated is None else Replicated(replicated, frozenset())))
    for prefix, module, ddp in walk:
        for name, tensor, flat in _parameters(module, flats):
            key = id(tensor) if flat is None else flat.key
            if key in seen:
                seen[key].aliases.append(prefix + name)
                continue
            around = ddp if ddp and prefix + name not in ddp.parameters_to_ignore else None
            seen[key] = (flat or _plain)(prefix + name, tensor, (module, name), around)
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            if buffer is None:
                if persistent:
                    unfilled.append((prefix + name, (module, name)))
                    continue
                buffer = registered_buffer(prefix + name, (module, name))  # a cache that is still to be filled
            which = id(buffer) if module._buffers[name] is buffer else (id(module), name)
            if which in seen:
                seen[which].aliases.append(prefix + name)
                continue
            # NOTE: never split by rank; BatchNorm's differ between DDP ranks even after broadcast_buffers=True.
            shard = _plain(prefix + name, buffer, (module, name), None)
            shard.persistent = persistent
            seen[which] = shard
    shards = list(seen.values())
    for shard in shards if isinstance(model, Parameters) and model.average_frozen else ():
        shard.average_frozen = shard.dense and shard.dtype.itemsize > 1  # the others can be copied, but not averaged
    members, group = _members([ddp for _, _, ddp in walk if ddp], shards, flats)
    _choose_writers(shards, members)
    return ModelShards(shards, members, group, sharded, unfilled)


def reshard(sharded: list[nn.Module]) -> None:
    """Free every unsharded copy of the weights, so that the next forward reads the shards ([Note: stale roots])."""
    for module in sharded:
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            # NOTE: before the first forward there is nothing unsharded and no event queue yet.
            if handle is not None and handle.uses_sharded_strategy and module._is_root is not None:
                _reshard(module, handle, True)


def blocker(sharded: list[nn.Module]) -> str | None:
    """Why the shards may not be written or read now, or None."""
    for module in sharded:
        if isinstance(module, FullyShardedDataParallel) and module.training_state != TrainingState.IDLE:
            return "inside FSDP.summon_full_params() or a forward: what is written to the shards there is lost"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DDP, DataParallel and torch.compile around it: a forward that is no collective of theirs. FSDP stays."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or (
        is_compiled(model) and not isinstance(model, FSDPModule)
    ):
        model = model._modules[_wrapped_name(model) or ""]  # type: ignore[assignment]
    return model


def entrances(module: nn.Module, sharded: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The modules whose forward reads weights: (module, whether it is `module` itself, a wrapper or what it wraps)."""
    outer = {id(each) for each in sharded} | {id(each) for prefix, each, _ in walk_modules(module) if not prefix}
    inside = [*sharded, *module.modules()]
    return [(m, id(m) in outer) for m in dict.fromkeys(inside) if id(m) in outer or m._parameters or m._buffers]


def before_state_dict(module: nn.Module, hook: Callable[..., None]) -> RemovableHandle:
    """Run `hook` before `module.state_dict()`, and before FSDP1's own hook, which reads the weights already."""
    hooks = module._state_dict_pre_hooks
    handle: RemovableHandle = module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    for other in [key for key in hooks if key != handle.id]:
        hooks[other] = hooks.pop(other)
    return handle


def frozen_by_inductor(model: nn.Module) -> bool:
    """Inductor copied the weights into its code (config.freezing), so a swap would not be seen."""
    config = sys.modules.get("torch._inductor.config")
    return bool(getattr(config, "freezing", False)) and any(is_compiled(module) for module in model.modules())


def replaced(shard: Shard) -> bool:
    """The model registers another tensor object now (load_state_dict(assign=True), a new Parameter)."""
    module, name = shard.place
    if getattr(shard.tensor, "_is_flat_param", False):
        return False
    return shard.kind != "buffer" and module._parameters.get(name) is not shard.tensor


def registered(shard: Shard) -> Tensor | None:
    """The tensor object that the model registers for a buffer now."""
    return shard.place[0]._buffers.get(shard.place[1])


def register(shard: Shard, tensor: Tensor | None) -> None:
    """Put a buffer's tensor object back in its place."""
    if registered(shard) is not tensor:
        shard.place[0]._buffers[shard.place[1]] = tensor


def redescribe(shard: Shard) -> None:
    """Describe what lies in a buffer's place now. Only for caches (in no state_dict), which may become any size."""
    now = _plain(shard.name, registered_buffer(shard.name, shard.place), shard.place, None)
    shard.shape, shard.local_region, shard.order, shard.local_tensor, shard.dense = (
        now.shape,
        now.local_region,
        now.order,
        now.local_tensor,
        now.dense,
    )


def side_store(prefix: str) -> dist.Store:
    """The store of the default process group, for messages that are no collectives."""
    return dist.PrefixStore(prefix, _get_default_store())


# --- walking -----------------------------------------------------------------------------------------------------


def walk_modules(
    module: nn.Module, prefix: str = "", ddp: Replicated | None = None
) -> Iterator[tuple[str, nn.Module, Replicated | None]]:
    """(canonical prefix, module, the DDP around it) in the order of named_modules(), shared modules at every path."""
    inner = _wrapped_name(module)
    if isinstance(module, DistributedDataParallel):
        ignored = frozenset(prefix + canonical(name) for name in module.parameters_to_ignore)
        ddp = Replicated(module.process_group, ignored)
    yield prefix, module, ddp
    for name, child in module._modules.items():
        if child is not None:
            yield from walk_modules(child, prefix if name == inner else f"{prefix}{name}.", ddp)


@dataclass(frozen=True)
class Replicated:
    """What DDP says of the weights below it."""

    group: dist.ProcessGroup
    parameters_to_ignore: frozenset[str]


def is_compiled(module: nn.Module) -> bool:
    """NOTE: fully_shard(torch.compile(block)) makes a subclass of it."""
    return "_orig_mod" in module._modules and any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)


def _wrapped_name(module: nn.Module) -> str | None:
    if is_compiled(module):
        return "_orig_mod"
    return next((child for kind, child in _WRAPPED if isinstance(module, kind)), None)


def canonical(name: str) -> str:
    """The name that a weight or module has where nothing is wrapped; for DDP start inside (`bare`)."""
    inner = {child for _, child in _WRAPPED if child.startswith("_")} | {"_orig_mod"}
    return ".".join(part for part in name.split(".") if part not in inner)


def _parameters(
    module: nn.Module, flats: dict[tuple[int, str], FlatSlice]
) -> Iterator[tuple[str, Tensor, FlatSlice | None]]:
    """(name, tensor, slice of an FSDP1 flat parameter or None) of the module's own parameters, in their order."""
    own = [name for name, p in module._parameters.items() if p is not None and not getattr(p, "_is_flat_param", False)]
    hidden = [name for owner, name in flats if owner == id(module) and name not in own]
    for name in own + hidden:
        flat = flats.get((id(module), name))
        tensor = module._parameters[name] if flat is None else flat.tensor
        assert tensor is not None
        yield name, tensor, flat


# --- one record --------------------------------------------------------------------------------------------------


def _plain(name: str, tensor: Tensor, place: tuple[nn.Module, str], ddp: Replicated | None) -> Shard:
    if is_lazy(tensor):
        raise ValueError(f"{name} is not initialised yet. Run one forward through the lazy module, then build the EMA.")
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device. Materialise the model (to_empty, then load), then build the EMA."
        )
    kind: Kind = "buffer" if place[1] in place[0]._buffers else "trainable" if tensor.requires_grad else "frozen"
    if isinstance(tensor, DTensor):
        return _dtensor(name, kind, tensor, place)
    dense, order = storage_order(tensor.shape, tensor.stride())
    sizes = tuple(tensor.shape) if order is None else tuple(tensor.shape[i] for i in order)
    whole = Region((0,) * len(sizes), sizes, 0, tensor.numel())
    # NOTE: modules may register a new tensor under a buffer's name at any time; a Parameter must stay the same object.
    raw = partial(registered_buffer, name, place) if kind == "buffer" else lambda: tensor
    if not dense:
        raw = partial(_copied, raw)
    shard = Shard(name, kind, tuple(tensor.shape), tensor, place, whole, raw, 0, order, dense=dense)
    if ddp:
        shard.replicas, shard.flat = (ddp.group,), True
        shard.owner_ranks = tuple(dist.get_process_group_ranks(ddp.group))
    return shard


def _copied(raw: Callable[[], Tensor]) -> Tensor:
    return raw().detach().contiguous()


def registered_buffer(name: str, place: tuple[nn.Module, str]) -> Tensor:
    buffer = place[0]._buffers.get(place[1])
    if buffer is None and place[1] in place[0]._non_persistent_buffers_set:
        return torch.empty(0)  # a cache that was dropped
    if buffer is None:
        raise RuntimeError(f"{name} is no buffer of the model any more. Call ema.rescan().")
    return buffer


def _dtensor(name: str, kind: Kind, tensor: DTensor, place: tuple[nn.Module, str]) -> Shard:
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"{name} has placements {placements}: a Partial weight is a sum still to be made. Redistribute it."
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    # NOTE: FSDP2 over TP splits right to left: _StridedShard (on the left) cuts what Shard (on the right) left over.
    shards = [i for i, p in enumerate(placements) if not p.is_replicate()]
    strided = [i for i in shards if type(placements[i]).__name__ == "_StridedShard"]
    for i in [i for i in shards if i not in strided] + strided[::-1]:
        dim: int = placements[i].dim  # type: ignore[attr-defined]
        step = -(-sizes[dim] // mesh.size(i))  # torch.chunk: full chunks first
        start = min(step * coordinate[i], sizes[dim])
        offsets[dim], sizes[dim] = offsets[dim] + start, min(step, sizes[dim] - start)
    local = tensor._local_tensor
    if tuple(local.shape) != tuple(sizes):
        raise ValueError(
            f"{name}: {placements} over {mesh} should leave {tuple(sizes)} here, found {tuple(local.shape)}."
        )
    dense, order = storage_order(local.shape, local.stride())
    if not dense:
        raise ValueError(
            f"{name}: the local tensor has shape {tuple(local.shape)} and strides {local.stride()}. {_DENSE}"
        )
    by = range(len(sizes)) if order is None else order
    held = Region(tuple(offsets[i] for i in by), tuple(sizes[i] for i in by), 0, local.numel())
    shard = Shard(name, kind, tuple(tensor.shape), tensor, place, held, lambda: tensor._local_tensor, 0, order)
    if kind != "buffer":
        shard.replicas = tuple(mesh.get_group(i) for i, p in enumerate(placements) if p.is_replicate())
    if shards or kind != "buffer":
        shard.owner_ranks = tuple(mesh.mesh.flatten().tolist())
    return shard


_DENSE = "Strided and expanded weights cannot be averaged in place: make it contiguous before building the EMA."


def storage_order(shape: torch.Size, stride: tuple[int, ...]) -> tuple[bool, tuple[int, ...] | None]:
    """Whether the elements lie without gaps, and the dimensions from slowest to fastest (None: their own order)."""
    if 0 in shape:
        return True, None
    order = sorted(range(len(shape)), key=lambda i: (-stride[i], i))
    real = [i for i in order if shape[i] != 1]
    step = 1
    for i in reversed(real):
        if stride[i] != step:
            return False, None
        step *= shape[i]
    return True, None if real == sorted(real) else tuple(order)


def fsdp2_records() -> Iterator[tuple[nn.Module, Any]]:
    """(module, what FSDP2 keeps of one parameter) of every model of this process."""
    states: list[tuple[nn.Module, Any]] = [(module, state()) for module, state in _module_state_mapping.items()]
    for module, state in states:
        if isinstance(module, FSDPModule) and state is not None:
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch 2.8: one
            yield from ((module, record) for group in groups if group is not None for record in group.fsdp_params)


# --- FSDP1 -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatSlice:
    """One original parameter inside an FSDP1 flat parameter."""

    owner: FullyShardedDataParallel
    index: int
    ranks: tuple[int, ...]  # that hold the flat parameter together, replicas included

    @property
    def key(self) -> tuple[int, int]:
        return id(self._flat), self.index

    @property
    def _flat(self) -> Any:
        return self.owner._handle.flat_param  # type: ignore[union-attr]

    @property
    def tensor(self) -> Tensor:
        params = self._flat._params  # use_orig_params=True
        return self._flat if params is None else params[self.index]  # type: ignore[no-any-return]

    def __call__(self, name: str, tensor: Tensor, place: tuple[nn.Module, str], ddp: Replicated | None) -> Shard:
        flat, handle = self._flat, self.owner._handle
        if flat.is_meta:
            raise ValueError(f"{name} is on the meta device. Pass param_init_fn to FSDP, then build the EMA.")
        if flat._param_extensions[self.index] is not None:
            raise ValueError(f"{name} is a DTensor inside FSDP1. Use fully_shard for tensor parallel models.")
        shape, info = tuple(flat._shapes[self.index]), flat._shard_param_infos[self.index]
        _, order = storage_order(flat._shapes[self.index], flat._strides[self.index])
        sizes = shape if order is None else tuple(shape[i] for i in order)
        begin, end = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
        held = Region((0,) * len(shape), sizes, begin, max(begin, end))
        sharded = handle.uses_sharded_strategy  # type: ignore[union-attr]
        outer = getattr(self.owner, "_inter_node_pg", None) if sharded else self.owner.process_group
        kind: Kind = "trainable" if tensor.requires_grad else "frozen"
        # The shard outside forward and backward; before the first forward the flat parameter itself.
        raw = partial(_local_shard, flat)
        shard = Shard(name, kind, shape, tensor, place, held, raw, info.offset_in_shard or 0, order)
        shard.replicas, shard.flat = () if outer is None else (outer,), not sharded
        shard.owner_ranks = self.ranks
        return shard


def _local_shard(flat: Any) -> Tensor:
    local: Tensor = getattr(flat, "_local_shard", flat)
    return local


def flat_parameters(model: nn.Module) -> Iterator[tuple[tuple[int, str], FlatSlice]]:
    """((id of the module, parameter name), slice) of all that FSDP1 flattened, tied names included."""
    for module in model.modules():
        if not isinstance(module, FullyShardedDataParallel) or module._handle is None:
            continue
        flat, ranks = module._handle.flat_param, tuple(fsdp1_members(module)[0])
        index = {}
        for i, info in enumerate(flat._param_infos):
            index[info.module, info.param_name] = i
            yield (id(info.module), info.param_name), FlatSlice(module, i, ranks)
        for shared in flat._shared_param_infos:
            first = index[shared.prim_module, shared.prim_param_name]
            yield (id(shared.module), shared.param_name), FlatSlice(module, first, ranks)


# --- who belongs together ----------------------------------------------------------------------------------------


def _members(
    replicated: list[Replicated], shards: list[Shard], flats: dict[tuple[int, str], FlatSlice]
) -> tuple[list[int], dist.ProcessGroup | None]:
    """The ranks that hold the model together: the widest mesh or group found, which must contain the others."""
    found: list[tuple[list[int], dist.ProcessGroup | None]] = []
    for shard in shards:
        if isinstance(shard.tensor, DTensor):
            mesh = shard.tensor.device_mesh
            found.append((sorted(mesh.mesh.flatten().tolist()), mesh.get_group() if mesh.ndim == 1 else None))
    found += [(dist.get_process_group_ranks(each.group), each.group) for each in dict.fromkeys(replicated)]
    # NOTE: in the order of the modules, not of a set: every rank must ask in the same order.
    found += [fsdp1_members(owner) for owner in dict.fromkeys(slice_.owner for slice_ in flats.values())]
    if not found:
        return [dist.get_rank() if dist.is_initialized() else 0], None
    widest = max(found, key=lambda entry: len(entry[0]))
    for members, _ in found:
        if not set(members) <= set(widest[0]):
            raise ValueError(
                f"the model's weights live on ranks {widest[0]} and on ranks {members}; EMA needs one set of ranks that "
                "holds the model together. Build one EMA per part with only=."
            )
    return widest


def fsdp1_members(owner: FullyShardedDataParallel) -> tuple[list[int], dist.ProcessGroup | None]:
    inner = dist.get_process_group_ranks(owner.process_group)
    outer = getattr(owner, "_inter_node_pg", None)
    if outer is None or not owner._handle.uses_sharded_strategy:  # type: ignore[union-attr]
        return inner, owner.process_group
    everyone: list[Any] = [None] * outer.size()
    dist.all_gather_object(everyone, inner, group=outer)
    return sorted(rank for ranks in everyone for rank in ranks), None


def _choose_writers(shards: list[Shard], members: list[int]) -> None:
    """Mark which copy of a weight is written where the ranks hold copies that nobody calls replicas: buffers, weights
    outside every wrapper or that DDP ignores, and weights on a part of the mesh."""
    mine = dist.get_rank() if dist.is_initialized() else 0
    for shard in shards:
        shard.is_writer = members[0] in shard.owner_ranks if shard.owner_ranks else members[0] == mine
