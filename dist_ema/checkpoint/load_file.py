"""`load_file`, `locate`, `OpenFile`: where a saved model lies, its tensors mapped or in windows.

A folder that `ema.save` wrote has an ema.json. Any other safetensors model has none: an export as
one file, a Hugging Face folder.

`OpenFile` is checked, summed and read through one handle. So a save that replaces the file in
between cannot mix two versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dtypes import TO_TORCH
from ..sharding.geometry import Box, byte_runs, bytes_of, split_box
from . import atomic, crc32, disk, manifest, pointers, safetensors

__all__ = [
    "DTYPES",
    "KINDS",
    "Aliases",
    "Location",
    "OpenFile",
    "OpenWeight",
    "load_file",
    "locate",
    "refuse_unlisted",
    "with_aliases",
]

# The dtypes of safetensors as torch has them, and back.
DTYPES: dict[str, torch.dtype] = {kind: getattr(torch, name) for kind, name in TO_TORCH.items()}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def load_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The complete state_dict of a saved average or of any safetensors model.

    Every alias is restored, so `model.load_state_dict(load_file(path), strict=True)` passes.

    Args:
        path: A folder, or one .safetensors file.

    Raises:
        ValueError: A header, a size or the index is unsound. Sums are not compared
            (`dist-ema verify` does).

    Note:
        *Aliases*: the tensors are pages of the file, copied when they are written to.
    """
    return atomic.read_one_version(pointers.follow(atomic.real(path)), _load_file)


def _load_file(path: Path) -> dict[str, Tensor]:
    place = locate(path)
    folder = Path(place.folder)
    files = safetensors.read_model(folder, place.model)
    if place.manifest is not None:
        refuse_unlisted(folder, files, place.listed)
    weights = {
        name: tensor for file in files for name, tensor in _mapped(folder / file, files[file])
    }
    return with_aliases(folder / place.model, weights, place.aliases)


def _mapped(path: Path, file: safetensors.SafetensorsFile) -> Iterable[tuple[str, Tensor]]:
    """Every weight of the file as pages of it."""
    # Copy on write, so that training on these tensors leaves the file alone.
    pages = np.memmap(path, np.uint8, "c")
    if len(pages) != file.size:
        raise ValueError(
            f"{path} became shorter while it was read. Was it replaced? Read it again."
        )
    for name, entry in file.entries.items():
        start, dtype = len(file.head) + entry.begin, DTYPES[entry.dtype]
        raw = torch.from_numpy(pages[start : start + entry.nbytes])
        # NOTE: other writers pack at any byte, and views of a wider dtype need alignment.
        raw = raw if start % dtype.itemsize == 0 else raw.clone()
        yield (
            name,
            raw.view(dtype).view(entry.shape)
            if entry.nbytes
            else torch.empty(entry.shape, dtype=dtype, device="cpu"),
        )


# --- where the files lie --------------------------------------------------------------------------


Aliases = dict[str, list[str]]  # name in the file -> further names of the same weight


class Location(NamedTuple):
    """A saved model at a path, as JSON values, of which ranks compare a hash."""

    folder: str
    model: str  # the index, or the only file
    aliases: Aliases
    manifest: dict[str, Any] | None  # ema.json; None too where one file of its folder is named
    listed: dict[str, dict[str, Any]]  # size and check sum of the files, as far as they are known


def locate(path: Path, read_headers: bool = True) -> Location:
    """Find a model.

    Args:
        path: A folder or a file.
        read_headers: Compare ema.json with the headers of the files too.

    Raises:
        ValueError: It is no model, or an ema.json is not sound.
    """
    path = atomic.whole(pointers.follow(atomic.real(path)))
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: there is no folder and no file to read an average from."
        )
    if not path.is_dir():
        return _locate_file(path)
    saved = manifest.read(path)
    if saved is None:
        if (path / "averages").exists():
            raise ValueError(
                f"{path} holds further averages, and no {manifest.META}: it is not all of what "
                "ema.save() wrote."
            )
        return Location(str(path), safetensors.find_model(path), {}, None, {})
    files = (manifest.read_files(path, saved),) if read_headers else ()
    manifest.refuse_damaged(path, saved, *files)
    model = safetensors.find_model(path)
    return Location(str(path), model, saved.aliases, saved.to_json(), saved.files_of(""))


def _locate_file(path: Path) -> Location:
    """One file of a model, or its index. The ema.json beside it tells its check sum."""
    if path.name == manifest.META:
        raise manifest.folder_is_meant(path)
    saved = manifest.read(path.parent) or manifest.Manifest()
    if saved.files:
        manifest.refuse_damaged(path.parent, saved)
    aliases = {} if path.suffix == ".json" else _aliases_of_file(path, saved)
    listed = saved.files_of("")
    if path.name != safetensors.INDEX or len(listed) < 2:
        listed = {path.name: listed[path.name]} if path.name in listed else {}
    return Location(str(path.parent), path.name, aliases, None, listed)


def _aliases_of_file(path: Path, found: manifest.Manifest) -> Aliases:
    """Exports of one file keep aliases in its header, folders in the ema.json beside it."""
    header = safetensors.read_header(path)
    entries = header.entries
    aliases = manifest.group_aliases(
        {
            alias: name
            for alias, name in header.metadata.items()
            if name in entries and alias not in entries and alias != "format"
        }
    )
    if path.name in found.files:
        aliases |= {name: others for name, others in found.aliases.items() if name in entries}
    return aliases


def refuse_unlisted(
    folder: Path, files: dict[str, safetensors.SafetensorsFile], listed: dict[str, Any]
) -> None:
    """Raise ValueError unless the files of the model are those that were summed, and as long."""
    unlisted = sorted(files.keys() ^ listed.keys())
    if unlisted:
        raise ValueError(
            f"{folder} is damaged: {manifest.META} and the model's files disagree on "
            f"{', '.join(unlisted[:3])}. Restore the folder, or take an earlier save."
        )
    for name, file in files.items():
        if file.size != listed[name]["size"]:
            raise ValueError(
                f"{folder / name} is damaged: it holds {file.size} bytes, {manifest.META} says "
                f"{listed[name]['size']}. Restore the file, or take an earlier save."
            )


def with_aliases(where: Path, table: dict[str, Any], aliases: Aliases) -> dict[str, Any]:
    table = dict(table)
    for name, others in aliases.items():
        for other in others if name in table else ():
            if other in table:
                raise ValueError(
                    f"{where} is damaged: {other} is listed as another name of {name}, and is a "
                    "weight itself."
                )
            table[other] = table[name]
    return table


# --- an open file ---------------------------------------------------------------------------------


WINDOW = 4 << 20  # bytes read at a time


class OpenFile:
    """The file, open from the moment that its header was read until `close`."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, disk.open_regular(path)
        try:
            self.header = safetensors.header_of(self._handle, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._handle.close()

    def read(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Blocks of a box, each at most a window. *Aliases*: the next block overwrites this one."""
        entry = self.header.entries[name]
        dtype, begin = DTYPES[entry.dtype], len(self.header.head) + entry.begin
        blocks = list(split_box(box, WINDOW // dtype.itemsize))
        buffer = torch.empty(
            max(block.numel for block in blocks) * dtype.itemsize, dtype=torch.uint8, device="cpu"
        )
        view = bytes_of(buffer)
        for block in blocks:
            for start, part in byte_runs(block, entry.shape, view, dtype.itemsize):
                disk.read_into(self._handle.fileno(), self.path, part, begin + start)
            size = block.numel * dtype.itemsize
            yield block, buffer[:size].view(dtype).view(block.sizes)

    def contribution(self, rank: int, size: int) -> int:
        """What this rank's bytes add to the check sum of the file ([Note: check sums] in crc32)."""
        total = self.header.size
        # Equal shares of the bytes, whatever lies in them.
        at, end = total * rank // size, total * (rank + 1) // size
        range_sum, buffer = crc32.RangeSum(total), memoryview(bytearray(min(WINDOW, end - at)))
        while at < end:
            part = buffer[: min(WINDOW, end - at)]
            disk.read_into(self._handle.fileno(), self.path, part, at)
            range_sum.add(at, part)
            at += len(part)
        return range_sum.contribution


class OpenWeight(NamedTuple):
    """A weight in an open file, under the name that the file has for it."""

    file: OpenFile
    name: str

    @property
    def entry(self) -> safetensors.Entry:
        return self.file.header.entries[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]
