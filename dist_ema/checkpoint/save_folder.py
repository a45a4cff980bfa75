"""The temporary folder of a save, on the first rank: refused, made, sealed, put in place."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import atomic, crc32, disk, manifest, retention, safetensors, versions
from .request import SaveRequest

__all__ = ["disk_errors", "make", "put_in_place"]


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
    """Raise ValueError where nothing can be written. Leftovers of dead writers are removed."""
    path = request.path
    if request.verb == "export":
        retention.refuse_pickle(path)
    if request.keep is not None:
        # Now, because `advance` runs when the save is already in place.
        retention.refuse(path, request.keep)
    disk.ensure(path.parent)
    if request.numbered or request.keep is not None:
        retention.remove_leftovers(path)
    # Before leftovers go: one of them may be the only whole version.
    atomic.recover(path)
    atomic.remove_leftovers(path)
    _refuse_foreign(request)


def _refuse_foreign(request: SaveRequest, temporary: Path | None = None) -> None:
    """Raise ValueError for a target that is not ours. temporary: Our folder in it."""
    path = request.path
    if not path.exists():
        return
    if request.verb == "publish":
        raise ValueError(
            f"{path} exists. Does another trainer publish to {path.parent}? Give each its own "
            "folder."
        )
    retention.refuse_form(path, request.one_file, ships=request.verb == "export")
    if request.verb == "export":
        return
    if not (path / manifest.META).exists() and set(path.iterdir()) - {temporary}:
        raise ValueError(
            f"{path} holds files but no {manifest.META}: it is not ours to replace. Choose another "
            "path."
        )
    if foreign := retention.foreign(path, temporary):
        raise ValueError(
            f"{path} holds {', '.join(foreign[:3])}, which ema.save() did not write and would "
            "remove. Choose another path."
        )


def put_in_place(request: SaveRequest, folder: Path, sums: dict[str, int]) -> list[str]:
    """Seal the temporary folder and put it in place.

    Args:
        request: The files to write.
        folder: The temporary folder, which holds all weights.
        sums: What the ranks' bytes add to the check sum of the files, by their number.

    Returns:
        A sentence for everything that is not as it should be.
    """
    with disk_errors(request):
        _refuse_foreign(request, folder)  # once more, for what has come meanwhile
        if request.one_file:
            atomic.publish(folder / request.path.name, request.path)
            disk.remove(folder)
            return []
        _seal(request, folder, sums)
        atomic.publish(folder, request.path)
        if request.keep is None:
            return []
        return retention.advance(request.path, request.keep, request.leases, request.keep_at_most)


def _seal(request: SaveRequest, folder: Path, sums: dict[str, int]) -> None:
    """Complete the temporary folder: ema.json, indexes, and what an export keeps of others."""
    published = versions.facts_of(request.manifest) or {"beside": ()}
    texts = {manifest.META: request.full_manifest(_table(request, sums)).to_bytes()}
    for average, plan in zip(request.averages, request.plans, strict=True):
        if len(plan) > 1:
            bare = {Path(name).name: file for name, file in plan.items()}
            texts[average.prefix + safetensors.INDEX] = safetensors.index(bare)
        for name, text in average.form.texts.items():
            # A config that the user put there stays; that of an adapter belongs to its weights.
            is_kept = name in published["beside"] or (request.path / name).exists()
            if average.form.is_adapter or not is_kept:
                texts[average.prefix + name] = text
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        disk.sync(folder / name)
    if request.verb == "export" and request.path.exists():
        # What this export replaces, whatever the number of its shards was.
        stale = {path.name for path in request.path.glob("model-*-of-*.safetensors")}
        stale |= {"model.safetensors", safetensors.INDEX, manifest.META}
        stale |= {safetensors.ADAPTER, safetensors.ADAPTER_CONFIG}  # loaders would add it again
        retention.carry_over(request.path, folder, stale)
    for name in published["beside"]:
        # A hub's cache holds relative links, which lead nowhere from here.
        disk.link_or_copy(os.path.realpath(f"{request.beside}/{name}"), folder / name)
    # Children first, so that a folder on disk names only what is on disk.
    for inner in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        disk.sync(inner)


def _table(request: SaveRequest, sums: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Size and check sum of every file ([Note: check sums] in crc32)."""
    table = {}
    for number, (name, file) in enumerate(request.files.items()):
        head = crc32.RangeSum(file.size)
        # The first rank wrote the header, and all ranks what lies behind it.
        head.add(0, file.head)
        check_sum = crc32.check_sum(file.size, [head.contribution, sums.get(str(number), 0)])
        table[name] = {"size": file.size, "crc32": check_sum}
    return table
