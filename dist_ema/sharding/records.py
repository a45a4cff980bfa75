"""`Shard`, `Region`: the record of a weight: which elements this rank holds, and where they lie.

[Note: words]  Five words for a part of a weight, and no others.

    region   which elements: a box of the full weight, and a range of the box's row-major order
    box      a hyper-rectangle: offsets and sizes
    block    a box with its data, in transit to a file or another rank
    window   a bounded buffer that blocks pass through
    run      elements or bytes that follow each other without a gap

[Note: regions]  A rank holds one region of every weight.

    DTensor, Shard(0)      FSDP1 flat, one process     HSDP: the replicas divide what they hold
    +-----------+ rank 0   +-----+=====+ rank 0        +-----------+
    |###########|          |     |#####|               |###########| rank 0 \\ the same box,
    +-----------+          |#####|#####| rank 1        |-----------|         | two ranges
    |           | rank 1   |#####|     |               |           | rank 2 /
    +-----------+          +=====+-----+               +-----------+
      a box, all of it       all of it, a range          a box, a range

[Note: storage order]  A dense permuted weight (channels_last) is recorded in the order in which it
lies in memory. `order` lists the dimensions from slowest to fastest, and the region is one of the
permuted weight.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .torch_classes import is_dtensor, is_flattened

__all__ = [
    "Kind",
    "ModelShards",
    "Region",
    "Shard",
    "group_ranks",
    "register",
    "registered",
    "registered_buffer",
    "uncollected",
]


Kind = Literal["trainable", "frozen", "buffer"]


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
    """The elements of one named weight or buffer that this rank holds, found once and kept.

    *Aliases* the model.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]  # of the full weight, row-major
    tensor: Tensor  # the Parameter (or buffer) that the model registers
    place: tuple[nn.Module, str]  # where it is registered
    local_region: Region  # in storage order
    local_tensor: Callable[[], Tensor]  # the tensor whose storage holds the elements, read afresh
    storage_offset: int = 0  # of the local region in the local tensor, in elements
    order: tuple[int, ...] | None = None  # [Note: storage order]; None: row-major
    replicas: tuple[dist.ProcessGroup, ...] = ()  # groups that hold the region too, outermost first
    cut: tuple[int, int] | None = None  # (start, end of all) in a sequence that a wrapper divides
    master: Callable[[], Tensor] | None = None  # 1-D, holds what the optimizer steps, read afresh
    master_offset: int = 0  # of the averaged region in the master, in elements
    owner_ranks: tuple[int, ...] = ()  # global ranks that share one copy of the weight; (): none do
    dense: bool = True  # False: strided, expanded, conjugated; `read` copies, nothing is averaged
    opaque: bool = False  # a subclass whose memory is not the weight: carried by name alone
    average_frozen: bool = False  # averaged whether or not it needs a gradient now
    flat_parameter: Tensor | None = None  # FSDP1's around the weight; it counts its own writes
    is_writer: bool = True  # of several copies that are no replicas, the one that files hold
    written_elsewhere: bool = False  # an earlier stage of the pipeline holds and writes it too
    persistent: bool = True  # part of state_dict()
    aliases: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of a tied weight, that of the files first."""
        return (self.name, *self.aliases)

    @property
    def dtype(self) -> torch.dtype:
        return self.local_tensor().dtype

    @property
    def trainable(self) -> bool:
        return self.kind != "buffer" and (self.average_frozen or self.tensor.requires_grad)

    def read(self) -> Tensor:
        """The elements of the local region: [local_region.numel].

        *Aliases* the model's storage, and shares its version counter.
        """
        local = self.local_tensor().detach()
        offset = local.storage_offset() + self.storage_offset
        return local.as_strided((self.local_region.numel,), (1,), offset)

    def write(self, elements: Tensor) -> None:
        """Put `elements`, in the order of `read`, into the model's storage, strided or not."""
        now = self.read()
        if self.dense:
            # A module may assign a buffer under inference mode, which is written only there.
            with torch.inference_mode(now.is_inference()):
                now.copy_(elements)
        elif not torch.equal(now, elements.to(now)):
            tensor = registered(self) if self.kind == "buffer" else self.tensor
            assert tensor is not None
            # Each element once, where it is expanded.
            once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
            tensor.detach()[once].copy_(elements.view(tensor.shape)[once])

    def local(self, elements: Tensor) -> Tensor:
        """`elements`, in the order of `read`, in the shape and strides of the local tensor.

        A range of an FSDP1 or ZeRO-3 parameter stays one-dimensional. *Aliases* `elements`.
        """
        local = self.tensor._local_tensor if is_dtensor(self.tensor) else self.tensor
        if is_flattened(local) or hasattr(local, "ds_tensor"):
            return elements
        if not self.dense:
            return elements.view(local.shape)
        return elements.as_strided(local.shape, local.stride())

    def shaped(self, elements: Tensor) -> Tensor:
        """`local`; a DTensor where the weight is one and `elements` lie on its mesh's devices."""
        local, like = self.local(elements), self.tensor
        if not is_dtensor(like) or local.device.type != like.device_mesh.device_type:
            return local
        return type(like).from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


@dataclass
class ModelShards:
    """Every weight and buffer of a model as this rank holds it, and the ranks that share it."""

    shards: list[Shard]
    members: list[int]  # global ranks; one entry: a world of one
    group: dist.ProcessGroup | None  # of exactly those ranks, where the wrapper has one
    sharded: list[nn.Module]  # the FSDP modules, for `reshard` and `blocker`

    @property
    def device(self) -> torch.device | None:
        """The device of the first weight that does not lie in host memory, if there is one."""
        devices = (shard.local_tensor().device for shard in self.shards)
        return next((device for device in devices if device.type != "cpu"), None)


@lru_cache(maxsize=16)
def group_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The global ranks, asked once: a weight must not cost more in a larger world."""
    return tuple(dist.get_process_group_ranks(group))


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn garbage collection off for the block, which makes many records and no cycles.

    The collector took half of the time.
    """
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()


def registered(shard: Shard) -> Tensor | None:
    """The tensor object that the model registers for a buffer now."""
    return _buffer(shard.place)


def register(shard: Shard, tensor: Tensor | None) -> None:
    """Put a buffer's tensor object back in its place."""
    if registered(shard) is not tensor:
        shard.place[0]._buffers[shard.place[1]] = tensor


def registered_buffer(place: tuple[nn.Module, str]) -> Tensor:
    """What lies in a buffer's place: nothing where the module set it to None or deleted it."""
    buffer = _buffer(place)
    return torch.empty(0, device="cpu") if buffer is None else buffer


def _buffer(place: tuple[nn.Module, str]) -> Tensor | None:
    try:
        return place[0]._buffers[place[1]]  # of a scripted module, which have no `get`, too
    except KeyError:
        return None
