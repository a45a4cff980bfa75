"""Folders of torch.distributed.checkpoint, read a window at a time in one process. No torch, and nothing unpickled.

    step-1000/
      .metadata             a pickle: every name with its shape, its chunks (offsets, sizes), and where each chunk lies
      __0_0.distcp ...      per rank: chunk after chunk, each a whole archive as torch.save writes it

Both are read by `pickles`, which runs nothing. A weight is put together from its chunks: each is a
box of the full weight, so it is a list of runs of elements that lie side by side in both. What is
no tensor is listed, and left unread.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import regular_file, safetensors
from ..dtypes import TORCH, Bytes, gathered
from . import torch_zip, unpickler
from .unpickler import Record, record

__all__ = ["META", "Folder"]

META = ".metadata"
_NO_TENSOR = "no tensor"
_MOST_DIMENSIONS = 64
_MOST_PICKLE = 1 << 20  # bytes of the pickle that describes one tensor

_OTHERS = (  # which safetensors cannot hold: listed, and left unread
    "complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2", "quint8", "qint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16",
    "bits1x8", "bits2x4", "bits4x2",
)  # fmt: skip
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip


def _sizes(*args: Any) -> tuple[int, ...]:
    """torch.Size([...])"""
    (values,) = args
    if len(values) > _MOST_DIMENSIONS or not all(
        type(n) is int and 0 <= n < 1 << 63 for n in values
    ):
        raise TypeError("sizes that are none")
    return tuple(values)


def _mapping(*args: Any) -> dict[str, Any]:
    if args:
        raise TypeError
    return {}


_WORDS: dict[str, Any] = {
    **{f"torch.{name}": kind for name, kind in TORCH.items()},
    **{f"torch.{name}": f"torch.{name}" for name in _OTHERS},
    "torch.Size": _sizes,
    "torch.device": record("device"),
    "collections.OrderedDict": _mapping,
}
_CHECKPOINT = "torch.distributed.checkpoint"
_PLAN = {
    **_WORDS,
    **{
        f"{_CHECKPOINT}.metadata.{name}": record(name)
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties": record("TensorProperties"),
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING": record("_MEM_FORMAT_ENCODING"),
    f"{_CHECKPOINT}.filesystem._StorageInfo": record("_StorageInfo"),
    "torch.serialization._get_layout": record("layout"),
    **{f"pathlib.{kind}Path": record("path") for kind in ("Posix", "PurePosix", "Windows", "PureWindows")},
    **{f"pathlib._local.{kind}Path": record("path") for kind in ("Posix", "PurePosix", "Windows", "PureWindows")},
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: str | None  # None: bytes, read as any
    record: str


class _Tensor(NamedTuple):
    """Where the elements of a tensor lie in a storage, in elements."""

    storage: _Storage
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def _storage(pid: Any) -> _Storage:
    word, kind, name, *_ = pid
    if word != "storage" or type(name) is not str or type(kind) is not _Kind:
        raise TypeError
    return _Storage(kind.dtype, f"data/{name}")


class _Kind(NamedTuple):
    dtype: str | None


def _tensor(*args: Any) -> _Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
    storage, begin, shape, strides, *_ = args
    if (
        type(storage) is not _Storage
        or type(begin) is not int
        or begin < 0
        or any(args[6:])
        or storage.dtype is None
    ):
        raise TypeError
    return _Tensor(storage, begin, _sizes(shape), _sizes(strides), storage.dtype)


def _typed_tensor(*args: Any) -> _Tensor:
    """torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
    storage, begin, shape, strides, _, _, dtype, *_ = args
    if (
        type(storage) is not _Storage
        or type(begin) is not int
        or begin < 0
        or any(args[7:])
        or type(dtype) is not str
    ):
        raise TypeError
    return _Tensor(storage, begin, _sizes(shape), _sizes(strides), dtype)


def _parameter(*args: Any) -> _Tensor:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks)"""
    if type(args[0]) is not _Tensor:
        raise TypeError
    return args[0]


_ITEM = {
    **_WORDS,
    **{f"torch.{name}Storage": _Kind(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": _Kind(None),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


# --- what .metadata says --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """A box of a weight, and the bytes of a file that hold it as an archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str = ""
    begin: int = 0
    length: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


class _Table(NamedTuple):
    """name -> the weight and its chunks; name -> why it is no weight; name -> the keys that led to it in the state_dict."""

    weights: dict[str, tuple[safetensors.Entry, list[_Chunk]]]
    others: dict[str, str]
    paths: dict[str, tuple[str, ...]]


def _table(path: Path) -> _Table:
    """Read .metadata. Raises ValueError for whatever is not as torch writes it."""
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    size = path.stat().st_size
    if size > unpickler.MAX_BYTES:
        raise ValueError(
            f"{path} holds {size:,} bytes; dist_ema reads up to {unpickler.MAX_BYTES:,}."
        )
    said = unpickler.read(path.read_bytes(), _PLAN, str(path))
    try:
        state = _state(said, "Metadata")
        places = {
            _key(index): _state(info, "_StorageInfo")
            for index, info in state["storage_data"].items()
        }
        return _sort(state["state_dict_metadata"], places, state.get("planner_data"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not as torch.distributed.checkpoint writes it: {_brief(error)}."
        ) from None


def _brief(error: Exception) -> str:
    return (
        str(error)[:200]
        if isinstance(error, ValueError)
        else f"{type(error).__name__}: {str(error)[:100]}"
    )


def _state(value: Any, kind: str) -> dict[str, Any]:
    """The fields of a dataclass."""
    if not isinstance(value, Record) or value.kind != kind or not isinstance(value.state, dict):
        raise ValueError(f"something else stands where a {kind} must")
    return value.state


def _key(index: Any) -> tuple[str, tuple[int, ...] | None]:
    fields = _state(index, "MetadataIndex")
    name, offset = fields["fqn"], fields.get("offset")
    if type(name) is not str:
        raise TypeError("a name that is no text")
    return name, None if offset is None else _sizes(offset)


def _sort(said: Any, places: Mapping[Any, dict[str, Any]], plan: Any) -> _Table:
    table = _Table({}, {}, {})
    for name, value in said.items():
        if type(name) is not str or type(value) is not Record:
            raise TypeError("a name that is no text")
        table.paths[name] = _path(name, plan)
        if value.kind == "BytesStorageMetadata":
            table.others[name] = _NO_TENSOR
            continue
        fields = _state(value, "TensorStorageMetadata")
        dtype, shape = _dtype(fields["properties"]), _sizes(fields["size"])
        if dtype not in safetensors.ITEMSIZE:
            table.others[name] = f"of {dtype}, which safetensors cannot hold"
            continue
        chunks = [
            _chunk(name, shape, _state(each, "ChunkStorageMetadata"), places)
            for each in fields["chunks"]
        ]
        if sum(chunk.numel for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {name[:200]} do not cover its shape")
        table.weights[name] = safetensors.Entry(dtype, shape), chunks
    return table


def _path(name: str, plan: Any) -> tuple[str, ...]:
    """The planner flattens a nested state_dict, and keeps the keys.

    Other planners leave names as they are.
    """
    keys = plan.get(name) if type(plan) is dict else None
    sound = (
        type(keys) is tuple
        and keys
        and len(keys) <= 64
        and all(type(key) in (str, int) for key in keys)
    )
    return tuple(map(str, keys)) if keys and sound else (name,)


def _dtype(properties: Any) -> str:
    if (
        not isinstance(properties, Record)
        or properties.kind != "TensorProperties"
        or not properties.state
    ):
        raise ValueError("something else stands where TensorProperties must")
    first = properties.state["dtype"] if isinstance(properties.state, dict) else properties.state[0]
    if type(first) is not str:
        raise ValueError("a dtype that is none")
    return first


def _chunk(
    name: str, shape: tuple[int, ...], said: dict[str, Any], places: Mapping[Any, dict[str, Any]]
) -> _Chunk:
    offsets, sizes = _sizes(said["offsets"]), _sizes(said["sizes"])
    inside = len(shape) == len(offsets) == len(sizes)
    if not inside or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a chunk of {name[:200]} lies outside its shape")
    box = _Chunk(offsets, sizes)
    place = places.get((name, offsets))
    if place is None:
        if box.numel:
            raise ValueError(f"a chunk of {name[:200]} lies nowhere")
        return box
    if place.get("transform_descriptors"):
        raise ValueError(
            f"{name[:200]} went through {place['transform_descriptors']!r:.100}, which only its "
            "writer can undo"
        )
    file, begin, length = place["relative_path"], place["offset"], place["length"]
    if (
        type(file) is not str
        or file != os.path.basename(file)
        or file in ("", ".", "..")
        or "\0" in file
    ):
        raise ValueError(f"{name[:200]} lies in {file!r:.100}, which is no file of the folder")
    _sizes((begin, length))
    if box.numel > length:
        raise ValueError(f"a chunk of {name[:200]} is larger than the {length} bytes that hold it")
    return replace(box, file=file, begin=begin, length=length)


# --- runs -----------------------------------------------------------------------------------------


class _Runs(NamedTuple):
    """A weight as runs of elements, in its order: where each begins in the weight, in which chunk, and where in that."""

    begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    chunks: NDArray[np.int64]
    inside: NDArray[np.int64]


def _runs(shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> _Runs:
    """Raises ValueError where the chunks overlap, or leave a hole."""
    parts = [(i, *_of_chunk(shape, chunk)) for i, chunk in enumerate(chunks) if chunk.numel]
    begins = np.concatenate([begins for _, begins, _ in parts])
    lengths = np.concatenate([np.full(len(begins), run) for _, begins, run in parts])
    which = np.concatenate([np.full(len(begins), i) for i, begins, _ in parts])
    inside = np.concatenate([np.arange(len(begins)) * run for _, begins, run in parts])
    order = np.argsort(begins, kind="stable")
    found = _Runs(begins[order], lengths[order], which[order], inside[order])
    ends = found.begins + found.lengths
    if (
        ends[:-1] != found.begins[1:]
    ).any():  # that they hold as many elements as the weight is known
        raise ValueError("its chunks overlap")
    return found


def _of_chunk(shape: tuple[int, ...], chunk: _Chunk) -> tuple[NDArray[np.int64], int]:
    """Where its runs begin in the weight, in the order of its own elements, and how long each is.

    A run spans the last dimensions that the chunk has in full, and its part of the one before.
    """
    whole = len(shape)
    while whole > 0 and chunk.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(o * s for o, s in zip(chunk.offsets, strides, strict=True))
    begins = np.array([first], np.int64)
    for size, stride in zip(chunk.sizes[:outer], strides[:outer], strict=True):
        begins = (begins[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return begins, math.prod(chunk.sizes[outer:])


# --- the folder -----------------------------------------------------------------------------------


class Folder:
    """A folder of torch.distributed.checkpoint as a `Source`. Names are those of the state_dict, its keys joined by dots.

    others: name -> why it is not among the entries. paths: name -> the keys that it is made of.
    """

    aliases: Mapping[str, str] = {}
    meta: dict[str, Any] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._weights, self.others, self.paths = _table(path / META)
        self.entries = {
            name: replace(entry, end=entry.nbytes) for name, (entry, _) in self._weights.items()
        }
        self._refuse_cut()
        self._open: dict[str, int] = {}
        self._runs = lru_cache(maxsize=1)(self._make_runs)
        self._places = lru_cache(maxsize=4096)(self._make_place)

    @property
    def unsupported(self) -> dict[str, str]:
        """Of the others those that are tensors: without them it is another model."""
        return {name: why for name, why in self.others.items() if why != _NO_TENSOR}

    def _refuse_cut(self) -> None:
        ends: dict[str, int] = {}
        for _, chunks in self._weights.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.begin + chunk.length)
        for file, end in ends.items():
            path = self.path / file
            if file and not path.is_file():
                raise ValueError(
                    f"{self.path / META} speaks of {file}, which is not there. Was every rank's "
                    "file copied?"
                )
            if file and path.stat().st_size < end:
                raise ValueError(
                    f"{path} holds {path.stat().st_size} bytes, {META} speaks of {end}. It was cut "
                    "short."
                )

    def _make_runs(self, name: str) -> _Runs:
        entry, chunks = self._weights[name]
        try:
            return _runs(entry.shape, chunks)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name} cannot be put together: {error}.") from None

    def read(self, name: str, begin: int, end: int) -> Bytes:
        entry = self.entries[name]
        data = np.empty(end - begin, np.uint8)
        if begin == end:
            return data
        size = safetensors.ITEMSIZE[entry.dtype]
        runs = self._runs(name)
        at = bisect_right(runs.begins, begin // size) - 1
        while begin < end:
            start = begin - int(runs.begins[at]) * size  # in the run
            stop = min(int(runs.lengths[at]) * size, start + end - begin)
            inside = int(runs.inside[at]) * size
            part = data[len(data) - (end - begin) :][: stop - start]
            self._fill(name, int(runs.chunks[at]), inside + start, part)
            begin, at = begin + stop - start, at + 1
        return data

    def _fill(self, name: str, chunk: int, begin: int, into: Bytes) -> None:
        """Bytes of a chunk, from `begin` of its dense elements on."""
        file, start, tensor = self._places(name, chunk)
        if not _dense(tensor):
            into[:] = self._gathered(file, start, tensor, begin, begin + len(into))
            return
        regular_file.read_into(self._fd(file), self.path / file, into.data, start + begin)

    def _gathered(self, file: str, start: int, tensor: _Tensor, begin: int, end: int) -> Bytes:
        """Bytes of a tensor that was saved with its dimensions in another order.

        NOTE: mapped, because they lie apart.
        """
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        size = safetensors.ITEMSIZE[tensor.dtype]
        raw = np.memmap(self.path / file, np.uint8, "r", start, (span * size,))
        return gathered(raw, 0, tensor.shape, tensor.strides, size, begin, end)

    def _make_place(self, name: str, number: int) -> tuple[str, int, _Tensor]:
        """The file, where the tensor's first element lies in it, and how the others follow."""
        entry, chunks = self._weights[name]
        chunk = chunks[number]
        where = f"{self.path / chunk.file}: {name[:200]}"
        read = partial(self._pread, chunk)
        records = torch_zip.records(read, chunk.length, where)
        begin, end = records.get("data.pkl", (0, 0))
        first, last = records.get("byteorder", (0, 0))
        if not 0 < end - begin <= _MOST_PICKLE or read(first, min(last, first + 6)) not in (
            b"",
            b"little",
        ):
            raise ValueError(f"{where} is no tensor that dist_ema can read.")
        tensor = unpickler.read(read(begin, end), _ITEM, where, _storage)
        if type(tensor) is not _Tensor or (tensor.dtype, tensor.shape) != (
            entry.dtype,
            chunk.sizes,
        ):
            raise ValueError(
                f"{where} is not the tensor that {META} speaks of: {entry.dtype} {chunk.sizes}."
            )
        begin, end = records.get(tensor.storage.record, (0, 0))
        first = begin + tensor.begin * safetensors.ITEMSIZE[entry.dtype]
        if not _fits(tensor, end - begin):
            raise ValueError(f"{where} reaches beyond its storage of {end - begin} bytes.")
        return chunk.file, chunk.begin + first, tensor

    def _pread(self, chunk: _Chunk, begin: int, end: int) -> bytes:
        data = os.pread(self._fd(chunk.file), max(end - begin, 0), chunk.begin + begin)
        if len(data) != max(end - begin, 0):
            raise ValueError(f"{self.path / chunk.file} became shorter while it was read.")
        return data

    def _fd(self, file: str) -> int:
        if file not in self._open:
            self._open[file] = os.open(self.path / file, os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dense(tensor: _Tensor) -> bool:
    """Row-major. The stride of a dimension of one element means nothing."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _fits(tensor: _Tensor, nbytes: int) -> bool:
    """Every element lies in the storage, and none of them twice, as far as sizes tell."""
    size = safetensors.ITEMSIZE[tensor.dtype]
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    return (
        len(tensor.shape) == len(tensor.strides)
        and max(tensor.begin + last + 1, math.prod(tensor.shape)) * size <= nbytes
    )
