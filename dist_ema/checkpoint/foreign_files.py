"""Files in a save that dist_ema did not write (config, tokenizer, card), and how they are kept."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from . import atomic, manifest, safetensors

__all__ = ["carry_over", "companions", "foreign"]

WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".index.json",
    ".msgpack",
    ".pt",
    ".pth",
    ".safetensors",
)


def foreign(folder: Path) -> list[str]:
    """The files in a save that dist_ema did not write; [] where ema.json cannot be read."""
    try:
        found = manifest.read(folder)
    except (OSError, ValueError):
        return []
    if found is None or not found.files:
        return []
    indexes = {(Path(name).parent / safetensors.INDEX).as_posix() for name in found.files}
    there = {
        each.relative_to(folder).as_posix()
        for each in folder.rglob("*")
        if (each.is_symlink() or not each.is_dir())
        and not _is_of_nfs(each)
        and each.name != safetensors.ADAPTER_CONFIG
    }
    return sorted(there - found.files.keys() - indexes - {manifest.META})


def companions(folder: Path) -> list[str]:
    """The files of a model that hold no weights: a config, a tokenizer."""
    plain = [each.name for each in folder.iterdir() if each.is_file()]
    hidden = (".", manifest.META)
    return sorted(
        name for name in plain if not name.endswith(WEIGHTS) and not name.startswith(hidden)
    )


def carry_over(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Link or copy what lies in the folder `old` into `new`, which will take its place.

    Args:
        old: The folder that is in place.
        new: The complete new version; what it holds already stays.
        replaced: The names of the model files in `old`, which end with it.
    """
    shutil.copymode(old, new)
    for each in sorted(old.iterdir()):
        if each.name in replaced or (new / each.name).exists() or each == new or _is_of_nfs(each):
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.copytree(each, new / each.name, symlinks=True, copy_function=atomic.link_or_copy)
        else:
            atomic.link_or_copy(each, new / each.name)


def _is_of_nfs(path: Path) -> bool:
    """NFS keeps a removed file as .nfsID while a process reads it."""
    return path.name.startswith(".nfs")
