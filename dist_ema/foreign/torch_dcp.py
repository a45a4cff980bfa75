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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import disk, safetensors
from ..dtypes import Bytes, gathered
from . import dcp_metadata, pickled_tensor, torch_zip
from .dcp_metadata import META, NO_TENSOR, Chunk
from .pickled_tensor import PickledTensor

__all__ = ["META", "Folder", "chunk_runs"]

_MAX_PICKLE = 1 << 20  # bytes of the pickle that describes one tensor


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
            rows.append(
                (begins, np.full_like(count, length), np.full_like(count, i), count * length)
            )
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
    begins = np.array([sum(map(math.prod, zip(chunk.offsets, strides, strict=True)))], np.int64)
    for size, stride in zip(chunk.sizes[:outer], strides[:outer], strict=True):
        begins = (begins[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return begins, math.prod(chunk.sizes[outer:])


# --- the folder -----------------------------------------------------------------------------------


class Folder(disk.OpenFiles):
    """A folder of torch.distributed.checkpoint as a `Source`.

    Names are those of the state_dict, its keys joined by dots.

    Attributes:
        weights, others, paths: The `dcp_metadata.Table`.
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
            window = data[len(data) - (end - begin) :][: stop - start]
            self._fill(name, int(runs.chunks[at]), int(runs.inside[at]) * size + start, window)
            begin, at = begin + stop - start, at + 1
        return data

    def _fill(self, name: str, chunk: int, begin: int, into: Bytes) -> None:
        """Bytes of a chunk, from `begin` of its dense elements on."""
        file, start, tensor = self._places(name, chunk)
        if tensor.is_dense:
            disk.read_into(self.fd(file), self.path / file, into.data, start + begin)
            return
        # Saved with its dimensions in another order: mapped, because the bytes lie apart.
        size = safetensors.ITEMSIZE[tensor.dtype]
        raw = np.memmap(self.path / file, np.uint8, "r", start, ((1 + tensor.last) * size,))
        end = begin + len(into)
        into[:] = gathered(raw, 0, tensor.shape, tensor.strides, size, begin, end)

    def _make_place(self, name: str, number: int) -> tuple[str, int, PickledTensor]:
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
        tensor = pickled_tensor.read(read(begin, end), where)
        expected = chunk.sizes, entry.dtype
        if type(tensor) is not PickledTensor or (tensor.shape, tensor.dtype) != expected:
            raise ValueError(
                f"{where} is not the tensor that {META} names: {entry.dtype} {chunk.sizes}."
            )
        begin, end = records.get(tensor.storage.record, (0, 0))
        if not tensor.fits(end - begin):
            raise ValueError(f"{where} reaches beyond its storage of {end - begin} bytes.")
        begin += tensor.begin * safetensors.ITEMSIZE[entry.dtype]
        return chunk.file, chunk.begin + begin, tensor
