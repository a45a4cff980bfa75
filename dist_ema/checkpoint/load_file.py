"""`load_file`: the complete state_dict of a saved model, its tensors mapped from the files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import atomic, location, pointers, safetensors
from .open_file import DTYPES

__all__ = ["load_file"]


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
    return atomic.read_one_version(pointers.resolve(path), _map_files)


def _map_files(path: Path) -> dict[str, Tensor]:
    place = location.locate(path)
    folder = Path(place.folder)
    files = safetensors.read_model(folder, place.model)
    if place.manifest is not None:
        location.refuse_unlisted(folder, files, place.listed)
    weights = {
        name: tensor for file in files for name, tensor in _mapped(folder / file, files[file])
    }
    return location.with_aliases(folder / place.model, weights, place.aliases)


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
