"""`.metadata` of a torch.distributed.checkpoint folder, parsed and checked; no code is run.

`.metadata` is a pickle: every name with its shape and its chunks (offsets, sizes), and the bytes of
a file that hold each chunk. `unpickler` reads it, and every number is checked before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import disk, safetensors
from ..dtypes import TORCH
from . import unpickler

__all__ = ["META", "NAMES", "NO_TENSOR", "Chunk", "Table", "read", "sizes"]

META = ".metadata"
NO_TENSOR = "no tensor"
_MAX_DIMENSIONS = 64
_MAX_NAME = 200  # characters of a name in an error
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_UNSUPPORTED = (  # which safetensors cannot hold: listed, and left unread
    "complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16",
    "bits1x8", "bits2x4", "bits4x2",
)  # fmt: skip
_RECORDS = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip


def sizes(*args: Any) -> tuple[int, ...]:
    """torch.Size([...]), checked."""
    (lengths,) = args
    sound = all(type(length) is int and 0 <= length < 1 << 63 for length in lengths)
    if len(lengths) > _MAX_DIMENSIONS or not sound:
        raise TypeError("sizes that are none")
    return tuple(lengths)


def _empty_mapping() -> dict[str, Any]:  # with arguments, which torch does not pickle, a TypeError
    return {}


# The allow-lists: what stands for a name, a function that the pickle may call or a value.
NAMES: dict[str, Any] = {
    **{f"torch.{name}": kind for name, kind in TORCH.items()},
    **{f"torch.{name}": f"torch.{name}" for name in _UNSUPPORTED},
    "torch.Size": sizes,
    "torch.device": unpickler.record("device"),
    "collections.OrderedDict": _empty_mapping,
}
_NAMES = {
    **NAMES,
    **{
        f"torch.distributed.checkpoint.metadata.{name}": unpickler.record(name) for name in _RECORDS
    },
    **{
        f"torch.distributed._shard.sharded_tensor.metadata.{name}": unpickler.record(kind)
        for name, kind in (
            ("TensorProperties", "TensorProperties"),
            ("MEM_FORMAT_ENCODING", "_MEM_FORMAT_ENCODING"),
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": unpickler.record("_StorageInfo"),
    "torch.serialization._get_layout": unpickler.record("layout"),
    **{
        f"{where}.{name}": unpickler.record("path")
        for where in ("pathlib", "pathlib._local")
        for name in _PATHS
    },
}


@dataclass(frozen=True)
class Chunk:
    """A box of a weight, and the bytes of a file that hold it as an archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str = ""
    begin: int = 0
    length: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


class Table(NamedTuple):
    """What `.metadata` names."""

    weights: dict[str, tuple[safetensors.Entry, list[Chunk]]]
    others: dict[str, str]  # name -> why it is not among the weights
    paths: dict[str, tuple[str, ...]]  # name -> the keys that led to it in the state_dict


def read(path: Path) -> Table:
    """Read `.metadata`. Raises ValueError for anything that torch does not write."""
    unpickled = unpickler.read(disk.beginning(path, unpickler.MAX_BYTES + 1), _NAMES, str(path))
    try:
        fields = _fields(unpickled, "Metadata")
        places = {
            _index(index): _fields(place, "_StorageInfo")
            for index, place in fields["storage_data"].items()
        }
        return _table(fields["state_dict_metadata"], places, fields.get("planner_data"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"{path} is not as torch.distributed.checkpoint writes it: {kind}{str(error)[:200]}."
        ) from None


def _fields(value: Any, kind: str) -> dict[str, Any]:
    if (
        not isinstance(value, unpickler.Record)
        or value.kind != kind
        or not isinstance(value.state, dict)
    ):
        found = value.kind if isinstance(value, unpickler.Record) else type(value).__name__
        raise ValueError(f"expected a {kind}, found a {found}")
    return value.state


def _index(value: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _fields(value, "MetadataIndex")
    offset = fields.get("offset")
    return _name(fields["fqn"]), None if offset is None else sizes(offset)


def _name(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a name that is no text")
    return value


def _table(metadata: Any, places: Mapping[Any, dict[str, Any]], plan: Any) -> Table:
    table = Table({}, {}, {})
    for name, value in metadata.items():
        table.paths[_name(name)] = _path(name, plan)
        if isinstance(value, unpickler.Record) and value.kind == "BytesStorageMetadata":
            table.others[name] = NO_TENSOR
            continue
        fields = _fields(value, "TensorStorageMetadata")
        dtype, shape = _dtype(fields["properties"]), sizes(fields["size"])
        if dtype not in safetensors.ITEMSIZE:
            table.others[name] = f"of {dtype}, which safetensors cannot hold"
            continue
        chunks = [
            _chunk(name, dtype, shape, _fields(chunk, "ChunkStorageMetadata"), places)
            for chunk in fields["chunks"]
        ]
        if sum(chunk.numel for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {name[:_MAX_NAME]} do not cover its shape")
        table.weights[name] = safetensors.Entry(dtype, shape), chunks
    return table


def _path(name: str, plan: Any) -> tuple[str, ...]:
    """The keys of a name: the default planner flattens a nested state_dict, and keeps them."""
    keys = plan.get(name) if type(plan) is dict else None
    if type(keys) is not tuple or not 0 < len(keys) <= _MAX_DIMENSIONS:
        return (name,)
    return tuple(map(str, keys)) if all(type(key) in (str, int) for key in keys) else (name,)


def _dtype(properties: Any) -> str:
    """The first field of TensorProperties, which older versions of torch pickle as a tuple."""
    state = properties.state if isinstance(properties, unpickler.Record) else None
    if not state or properties.kind != "TensorProperties":
        raise ValueError(f"expected TensorProperties, found a {type(properties).__name__}")
    return _name(state["dtype"] if isinstance(state, dict) else state[0])


def _chunk(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    fields: dict[str, Any],
    places: Mapping[Any, dict[str, Any]],
) -> Chunk:
    chunk, label = Chunk(sizes(fields["offsets"]), sizes(fields["sizes"])), name[:_MAX_NAME]
    if not len(shape) == len(chunk.offsets) == len(chunk.sizes) or any(
        begin + size > whole
        for begin, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    ):
        raise ValueError(f"a chunk of {label} lies outside its shape")
    place = places.get((name, chunk.offsets))
    if place is None and chunk.numel:
        raise ValueError(f"{META} names no file for a chunk of {label}")
    if place is None:
        return chunk
    if transforms := place.get("transform_descriptors"):
        raise ValueError(
            f"{label} went through {transforms!r:.100}, which only its writer can undo"
        )
    file, (begin, length) = place["relative_path"], sizes((place["offset"], place["length"]))
    plain = type(file) is str and file == os.path.basename(file) and "\0" not in file
    if not plain or file in ("", ".", ".."):
        raise ValueError(f"{label} lies in {file!r:.100}, which is no file of the folder")
    if chunk.numel * safetensors.ITEMSIZE[dtype] > length:
        raise ValueError(f"a chunk of {label} is larger than the {length} bytes that hold it")
    return replace(chunk, file=file, begin=begin, length=length)
