"""What to write, and what follows from it: the files, their ema.json, and the temporary folder.

The first rank makes that folder before the first byte, and completes and puts it in place last.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _version
from ..distributed.transfer import Block
from ..sharding.ownership import ParamState, saved_blocks, saved_dtype
from ..text import size_of
from . import atomic, crc32, disk, manifest, retention, safetensors, versions
from .library_files import FileForm
from .load_file import KINDS
from .manifest import Manifest

__all__ = [
    "AverageFiles",
    "SaveRequest",
    "WeightRecord",
    "disk_errors",
    "make_folder",
    "put_in_place",
]


class WeightRecord(NamedTuple):
    """What files and ema.json say of a weight, as JSON values."""

    shape: tuple[int, ...]
    dtype: str  # of the model
    saved_dtype: str
    averaged: bool
    own: bool  # a recalibrated buffer
    aliases: list[str]


@dataclass(frozen=True)
class AverageFiles:
    """The model files of one average: in the folder itself, or under averages/LABEL.

    states: what this rank holds.
    inventory_of_all: the inventory of ranks that hold other weights too; None says that all hold
        the same.
    """

    states: list[ParamState]
    own_buffers: dict[str, Tensor]
    schedule: dict[str, Any]
    label: str = ""
    alone: bool = False  # this rank writes everything
    writes: bool = True  # this rank does not leave its part to others
    form: FileForm = field(default_factory=FileForm)
    inventory_of_all: dict[str, WeightRecord] | None = None

    @property
    def blocks(self) -> list[Block]:
        """The blocks that this rank writes. *Aliases* shadows and live weights."""
        if not self.writes:
            return []
        return list(saved_blocks(self.states, self.own_buffers, self.alone))

    @property
    def prefix(self) -> str:
        return f"averages/{self.label}/" if self.label else ""

    def name_of(self, state: ParamState) -> str:
        """The name of a weight in the files."""
        return self.form.name_of(state.name)

    @cached_property
    def inventory(self) -> dict[str, WeightRecord]:
        """Every weight of the files, by its name there."""
        if self.inventory_of_all is not None:
            return self.inventory_of_all
        return {
            self.name_of(state): WeightRecord(
                state.shard.shape,
                _text(state.shard.dtype),
                _text(saved_dtype(state, self.own_buffers)),
                state.shadow is not None,
                state.name in self.own_buffers,
                sorted(map(self.form.name_of, state.shard.aliases)),
            )
            for state in self.states
        }

    @property
    def aliases(self) -> dict[str, list[str]]:
        return {name: record.aliases for name, record in self.inventory.items() if record.aliases}

    @property
    def own_names(self) -> list[str]:
        return sorted(name for name, record in self.inventory.items() if record.own)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class SaveRequest:
    """A request of files to write.

    verb: 'save' replaces a folder as one; 'export' also writes one file, or keeps foreign files;
        'publish' replaces nothing.
    manifest: as far as it does not follow from the averages and the files.
    mode: 'direct', 'stream', or None to choose by what the ranks see of each other.
    keep: how many of the numbered saves beside it are kept.
    numbered: what killed saves of the run left under lower numbers is removed, as with keep.
    leases: the leases of published versions; what is leased stays beside `keep`, `keep_at_most` in
        all.
    beside: the folder whose files without weights a version gets.
    note: takes the outcome of background work, an error or None, and gives remarks.
    """

    verb: str
    path: Path
    averages: list[AverageFiles]
    manifest: Manifest
    max_shard_size: int | str = "5GB"
    mode: str | None = None
    dtype: torch.dtype | None = None
    keep: int | None = None
    numbered: bool = False
    leases: versions.LeaseWatch | None = None
    keep_at_most: int = 0
    beside: Path | None = None
    note: Callable[..., list[str]] | None = None

    @property
    def one_file(self) -> bool:
        return self.verb == "export" and self.path.suffix == ".safetensors"

    def refuse_unsound(self) -> None:
        """Raise ValueError for arguments that nothing can be written with."""
        if not isinstance(self.manifest.extra, dict):
            raise ValueError(f"extra must be a dict of JSON values, got {self.manifest.extra!r}.")
        self.manifest.to_bytes()
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise ValueError(
                f"dtype must be a floating dtype, like torch.bfloat16, got {self.dtype!r}."
            )
        if self.mode not in (None, "direct", "stream"):
            raise ValueError(f"mode must be 'direct', 'stream' or None, got {self.mode!r}.")
        size_of(self.max_shard_size)

    @cached_property
    def plans(self) -> list[dict[str, safetensors.SafetensorsFile]]:
        """The files of each average by name.

        Raises:
            ValueError: They cannot hold a dtype.
        """
        return [self._plan(average) for average in self.averages]

    @property
    def files(self) -> dict[str, safetensors.SafetensorsFile]:
        """The files of all averages by name."""
        return {name: file for plan in self.plans for name, file in plan.items()}

    def _plan(self, average: AverageFiles) -> dict[str, safetensors.SafetensorsFile]:
        table = {
            name: safetensors.Entry(self._kind_of(name, record), record.shape)
            for name, record in average.inventory.items()
        }
        if self.one_file:
            names = {alias: name for name, aliases in average.aliases.items() for alias in aliases}
            return {self.path.name: safetensors.header(table, names)}
        files = safetensors.plan(table, self.max_shard_size)
        if average.form.is_adapter:
            files = {safetensors.ADAPTER: safetensors.header(table)}
        return {average.prefix + name: file for name, file in files.items()}

    def _kind_of(self, name: str, record: WeightRecord) -> str:
        """save: the average's dtype. export: the model's, or the one asked for where it floats."""
        dtype: torch.dtype = getattr(
            torch, record.saved_dtype if self.verb == "save" else record.dtype
        )
        if self.dtype is not None and dtype.is_floating_point:
            dtype = self.dtype
        if dtype not in KINDS:
            raise ValueError(
                f"{name} is {dtype}, which safetensors cannot hold. Pass dtype=, or leave it out "
                "with only=."
            )
        return KINDS[dtype]

    def full_manifest(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """The complete ema.json. files: size and check sum of every file."""
        first, *others = self.averages
        return replace(
            self.manifest,
            files=files,
            averaged=sorted(name for name, record in first.inventory.items() if record.averaged),
            schedules=[average.schedule for average in self.averages],
            averages={further.label: further.own_names for further in others},
            own_buffers=first.own_names,
            aliases=first.aliases,
            dtypes={name: record.dtype for name, record in first.inventory.items()},
            versions={"dist_ema": _version.VERSION, "torch": torch.__version__},
        )


# --- the temporary folder -------------------------------------------------------------------------


def disk_errors(request: SaveRequest) -> AbstractContextManager[None]:
    """Errors of the disk say the path, and of a full one what is needed."""
    return disk.disk_errors(request.path, sum(file.size for file in request.files.values()))


def make_folder(request: SaveRequest) -> Path:
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
    manifest.refuse_form(path, request.one_file, ships=request.verb == "export")
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
            atomic.remove(folder)
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
            is_kept = name in published["beside"] or (request.path / name).exists()
            if average.form.is_adapter or not is_kept:
                texts[average.prefix + name] = text
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        atomic.sync(folder / name)
    if request.verb == "export" and request.path.exists():
        stale = {path.name for path in request.path.glob("model-*-of-*.safetensors")}
        stale |= {"model.safetensors", safetensors.INDEX, manifest.META}
        stale |= {safetensors.ADAPTER, safetensors.ADAPTER_CONFIG}  # loaders would add it again
        retention.carry_over(request.path, folder, stale)
    for name in published["beside"]:
        atomic.link_or_copy(f"{request.beside}/{name}", folder / name)
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
