"""The temporary folder of a save: made before the first byte, completed and put in place last.

All of this is done by the first rank.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import atomic, crc32, disk, foreign_files, manifest, retention, safetensors, versions
from .request import SaveRequest

__all__ = ["disk_errors", "finish", "make"]


def disk_errors(request: SaveRequest) -> AbstractContextManager[None]:
    """Errors of the disk say the path, and of a full one what is needed."""
    return disk.disk_errors(request.path, sum(file.size for file in request.files.values()))


def make(request: SaveRequest) -> Path:
    """Refuse a target that is not ours, then make the temporary folder, every file at full size."""
    with disk_errors(request):
        _refuse_target(request)
        with atomic.temporary_folder(request.path) as folder:
            for name, file in request.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with open(folder / name, "wb") as handle:
                    disk.reserve(handle.fileno(), file.size)
                    disk.write_at(handle.fileno(), file.head, 0)
                    if file.size == len(file.head):  # its weights are empty: no rank will sync it
                        os.fsync(handle.fileno())
        return folder


def _refuse_target(request: SaveRequest) -> None:
    """Raise ValueError for a target that is not ours. Leftovers of dead writers are removed."""
    path = request.path
    if request.keep is not None:
        retention.refuse(path, request.keep)
    try:
        atomic.ensure(path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be made: {error.filename} is a file.") from None
    if request.numbered or request.keep is not None:
        retention.remove_leftovers(path)
    atomic.recover(path)
    atomic.remove_leftovers(path)
    if request.one_file and path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, or a folder without the suffix.")
    if request.one_file or not path.exists():
        return
    if request.verb == "publish":
        raise ValueError(
            f"{path} exists. Does another trainer publish to {path.parent}? Give each its own "
            "folder."
        )
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file. Give a folder, or let export write a name that ends in "
            ".safetensors."
        )
    if request.verb == "export":
        if manifest.is_resumable(path):
            raise ValueError(
                f"{path} is an average to resume from: its clock would be lost. Choose another "
                "path."
            )
    elif any(path.iterdir()) and not (path / manifest.META).exists():
        raise ValueError(
            f"{path} holds files but no {manifest.META}: it is not ours to replace. Choose another "
            "path."
        )
    elif foreign := foreign_files.foreign(path):
        raise ValueError(
            f"{path} holds {', '.join(foreign[:3])}, which ema.save() did not write and would "
            "remove. Choose another path."
        )


def finish(request: SaveRequest, folder: Path, sums: dict[str, int]) -> list[str]:
    """Seal the temporary folder and put it in place.

    Args:
        request: What was asked for.
        folder: It holds all weights.
        sums: What the ranks' bytes add to the check sum of the files, by their number.

    Returns:
        Remarks.
    """
    with disk_errors(request):
        if request.one_file:
            atomic.publish(folder / request.path.name, request.path)
            atomic.remove(folder)
            return []
        _seal(request, folder, sums)
        atomic.publish(folder, request.path)
        if request.keep is None:
            return []
        watch = request.publication
        bounds = () if watch is None else (watch.leases, watch.keep_at_most)
        return retention.advance(request.path, request.keep, *bounds)


def _seal(request: SaveRequest, folder: Path, sums: dict[str, int]) -> None:
    """Complete the temporary folder: ema.json, indexes, and what an export keeps of others."""
    published = versions.facts_of(request.manifest) or {"beside": ()}
    texts = {manifest.META: request.full_manifest(_table(request, sums)).to_bytes()}
    for average, plan in zip(request.averages, request.plans, strict=True):
        if len(plan) > 1:
            bare = {Path(name).name: file for name, file in plan.items()}
            texts[average.prefix + safetensors.INDEX] = safetensors.index(bare)
        for name, text in average.form.texts.items():
            kept = name in published["beside"] or (request.path / name).exists()
            if average.form.is_adapter or not kept:
                texts[average.prefix + name] = text
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        atomic.sync(folder / name)
    if request.verb == "export" and request.path.exists():
        stale = {path.name for path in request.path.glob("model-*-of-*.safetensors")}
        stale |= {"model.safetensors", safetensors.INDEX, manifest.META}
        stale |= {safetensors.ADAPTER, safetensors.ADAPTER_CONFIG}  # loaders would add it again
        foreign_files.carry_over(request.path, folder, stale)
    for name in published["beside"]:
        assert request.publication is not None
        atomic.link_or_copy(f"{request.publication.beside}/{name}", folder / name)
    for inner in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        atomic.sync(inner)


def _table(request: SaveRequest, sums: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Size and check sum of every file ([Note: check sums] in crc32)."""
    table = {}
    for number, (name, file) in enumerate(request.files.items()):
        head = crc32.RangeSum(file.size)
        head.add(0, file.head)
        added = [head.contribution, sums.get(str(number), 0)]
        table[name] = {"size": file.size, "crc32": crc32.check_sum(file.size, added)}
    return table
