"""Folders of torch.distributed.checkpoint, read a window at a time in one process. No torch.

    step-1000/
      .metadata             the table of contents: see `dcp_metadata`
      __0_0.distcp ...      per rank: chunk after chunk, each an archive as torch.save writes it

A weight is put together from its chunks. A chunk is a box of the full weight, so it is a list of
runs of elements that lie side by side in both. Entries that are no tensors are listed, and left
unread.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import disk, safetensors
from ..dtypes import Bytes, gathered
from . import dcp_metadata, torch_zip, unpickler
from .dcp_metadata import META, NAMES, NO_TENSOR, Chunk, sizes

__all__ = ["META", "Folder", "chunk_runs"]

_MAX_PICKLE = 1 << 20  # bytes of the pickle that describes one tensor
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip


# --- the pickle of one tensor ---------------------------------------------------------------------


class _Storage(NamedTuple):
    dtype: str | None  # None: bytes, read as any
    record: str


class _Tensor(NamedTuple):
    """A tensor as a view of a storage: offset, shape and strides in elements."""

    storage: _Storage
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def _storage(pid: Any) -> _Storage:
    """A persistent id: ('storage', type, record, location, numel)."""
    word, dtype, name, *_ = pid
    if word != "storage" or type(name) is not str:
        raise TypeError("no storage")
    return _Storage(dtype, f"data/{name}")


def _tensor(
    storage: Any, begin: Any, shape: Any, strides: Any, _: Any, __: Any, *more: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)"""
    return _typed_tensor(storage, begin, shape, strides, _, __, storage.dtype, *more)


def _typed_tensor(
    storage: Any, begin: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *more: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor_v3: the same, and a dtype.

    Further metadata: a lazy conjugate.
    """
    if type(storage) is not _Storage or type(dtype) is not str or any(more):
        raise TypeError("no plain tensor")
    return _Tensor(storage, sizes((begin,))[0], sizes(shape), sizes(strides), dtype)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks)"""
    if type(tensor) is not _Tensor:
        raise TypeError("no tensor")
    return tensor


_NAMES = {
    **NAMES,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": None,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


# --- runs -----------------------------------------------------------------------------------------


class _Runs(NamedTuple):
    """A weight as runs of elements, in its order."""

    begins: NDArray[np.int64]  # in the weight
    lengths: NDArray[np.int64]
    chunks: NDArray[np.int64]  # the number of the chunk
    inside: NDArray[np.int64]  # where the run begins in the chunk


def chunk_runs(shape: tuple[int, ...], chunks: Sequence[Chunk]) -> _Runs:
    """The runs of a weight. Raises ValueError where the chunks overlap or leave a gap."""
    rows: list[tuple[NDArray[np.int64], ...]] = []
    for i, chunk in enumerate(chunks):
        if chunk.numel:
            begins, length = _of_chunk(shape, chunk)
            count = np.arange(len(begins))
            lengths, numbers = np.full_like(count, length), np.full_like(count, i)
            rows.append((begins, lengths, numbers, count * length))
    unsorted = [np.concatenate(column) for column in zip(*rows, strict=True)]
    order = np.argsort(unsorted[0], kind="stable")
    runs = _Runs(*(column[order] for column in unsorted))
    # The chunks hold as many elements as the weight, so a gap comes with an overlap.
    if (runs.begins[:-1] + runs.lengths[:-1] != runs.begins[1:]).any():
        raise ValueError("its chunks overlap")
    return runs


def _of_chunk(shape: tuple[int, ...], chunk: Chunk) -> tuple[NDArray[np.int64], int]:
    """The begins of a chunk's runs in the weight, in the chunk's order, and their length.

    A run spans the last dimensions that the chunk has in full, and its own range of the one before.
    """
    whole = len(shape)
    while whole > 0 and chunk.sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(map(math.prod, zip(chunk.offsets, strides, strict=True)))
    begins = np.array([first], np.int64)
    for size, stride in zip(chunk.sizes[:outer], strides[:outer], strict=True):
        begins = (begins[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return begins, math.prod(chunk.sizes[outer:])


# --- the folder -----------------------------------------------------------------------------------


class Folder(disk.OpenFiles):
    """A folder of torch.distributed.checkpoint as a `Source`.

    Names are those of the state_dict, its keys joined by dots.

    Attributes:
        others: Name -> why it is not among the entries.
        paths: Name -> the keys that it is made of.
    """

    # What only dist_ema writes down.
    aliases: Mapping[str, str] = {}
    files: Mapping[str, safetensors.SafetensorsFile] = {}
    label = ""
    manifest = listed = None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.weights, self.others, self.paths = dcp_metadata.read(path / META)
        self.entries = {
            name: replace(entry, end=entry.nbytes) for name, (entry, _) in self.weights.items()
        }
        self._refuse_unsound()
        self._runs = lru_cache(maxsize=1)(self._make_runs)
        self._places = lru_cache(maxsize=4096)(self._make_place)

    @property
    def unsupported(self) -> dict[str, str]:
        """The entries of `others` that are tensors: without them it is another model."""
        return {name: why for name, why in self.others.items() if why != NO_TENSOR}

    def _refuse_unsound(self) -> None:
        """Files that are cut short, and chunks that share bytes: a small folder, a large model."""
        placed = sorted(
            (chunk.file, chunk.begin, chunk.begin + chunk.length, name)
            for name, (_, chunks) in self.weights.items()
            for chunk in chunks
            if chunk.file
        )
        ends: dict[str, int] = {}
        for file, _, end, _ in placed:
            ends[file] = max(ends.get(file, 0), end)
        for file, end in ends.items():
            path = self.path / file
            if not path.is_file():
                raise ValueError(
                    f"{self.path / META} names {file}, which is not there. Was every rank's file "
                    "copied?"
                )
            if path.stat().st_size < end:
                raise ValueError(
                    f"{path} holds {path.stat().st_size} bytes, and {META} names {end}. It was cut "
                    "short."
                )
        for (file, _, end, name), (next_file, next_begin, _, other) in pairwise(placed):
            if next_file == file and next_begin < end:
                raise ValueError(
                    f"{self.path}: {other[:200]}: its chunks overlap those of {name[:200]} in "
                    f"{file}. It was not written by torch.distributed.checkpoint, or is damaged."
                )

    def _make_runs(self, name: str) -> _Runs:
        entry, chunks = self.weights[name]
        try:
            return chunk_runs(entry.shape, chunks)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name} cannot be put together: {error}.") from None

    def read(self, name: str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
        """Bytes [begin, end) of a weight. into: Memory for them."""
        entry = self.entries[name]
        data = np.empty(end - begin, np.uint8) if into is None else into
        if begin == end:
            return data
        size = safetensors.ITEMSIZE[entry.dtype]
        runs = self._runs(name)
        at = bisect_right(runs.begins, begin // size) - 1
        while begin < end:
            start = begin - int(runs.begins[at]) * size  # in the run
            stop = min(int(runs.lengths[at]) * size, start + end - begin)
            inside = int(runs.inside[at]) * size
            window = data[len(data) - (end - begin) :][: stop - start]
            self._fill(name, int(runs.chunks[at]), inside + start, window)
            begin, at = begin + stop - start, at + 1
        return data

    def _fill(self, name: str, chunk: int, begin: int, into: Bytes) -> None:
        """Bytes of a chunk, from `begin` of its dense elements on."""
        file, start, tensor = self._places(name, chunk)
        if not _dense(tensor):
            into[:] = self._gathered(file, start, tensor, begin, begin + len(into))
            return
        disk.read_into(self.fd(file), self.path / file, into.data, start + begin)

    def _gathered(self, file: str, start: int, tensor: _Tensor, begin: int, end: int) -> Bytes:
        """Bytes of a tensor that was saved with its dimensions in another order.

        NOTE: mapped, because they lie apart.
        """
        reach = 1 + _last(tensor)
        size = safetensors.ITEMSIZE[tensor.dtype]
        raw = np.memmap(self.path / file, np.uint8, "r", start, (reach * size,))
        return gathered(raw, 0, tensor.shape, tensor.strides, size, begin, end)

    def _make_place(self, name: str, number: int) -> tuple[str, int, _Tensor]:
        """The file, where the tensor's first element lies in it, and how the others follow."""
        entry, chunks = self.weights[name]
        chunk = chunks[number]
        where = f"{self.path / chunk.file}: {name[:200]}"

        def read(begin: int, end: int) -> bytes:
            data = bytearray(end - begin)
            path = self.path / chunk.file
            disk.read_into(self.fd(chunk.file), path, memoryview(data), chunk.begin + begin)
            return bytes(data)

        records = torch_zip.records(read, chunk.length, where)
        begin, end = records.get("data.pkl", (0, 0))
        first, last = records.get("byteorder", (0, 0))
        order = read(first, min(last, first + len(b"little"))) or b"little"
        if not 0 < end - begin <= _MAX_PICKLE or order != b"little":
            raise ValueError(f"{where} is no tensor that dist_ema can read.")
        tensor = unpickler.read(read(begin, end), _NAMES, where, _storage)
        if type(tensor) is not _Tensor or tensor[2::2] != (chunk.sizes, entry.dtype):
            raise ValueError(
                f"{where} is not the tensor that {META} names: {entry.dtype} {chunk.sizes}."
            )
        begin, end = records.get(tensor.storage.record, (0, 0))
        if not _fits(tensor, end - begin):
            raise ValueError(f"{where} reaches beyond its storage of {end - begin} bytes.")
        begin += tensor.begin * safetensors.ITEMSIZE[entry.dtype]
        return chunk.file, chunk.begin + begin, tensor


def _dense(tensor: _Tensor) -> bool:
    """Row-major. The stride of a dimension of one element means nothing."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _last(tensor: _Tensor) -> int:
    """The offset of the last element from the first."""
    steps = zip(tensor.shape, tensor.strides, strict=True)
    return sum((size - 1) * stride for size, stride in steps)


def _fits(tensor: _Tensor, nbytes: int) -> bool:
    """Every element lies in the storage, and none of them twice, as far as sizes tell."""
    if len(tensor.shape) != len(tensor.strides):
        return False
    reach = max(tensor.begin + _last(tensor) + 1, math.prod(tensor.shape))
    return reach * safetensors.ITEMSIZE[tensor.dtype] <= nbytes
