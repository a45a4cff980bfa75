"""`SaveRequest`: what a save asks for; `AverageFiles`: the inventory of its weights, its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _version
from ..distributed.collectives import Block
from ..sharding.ownership import ParamState, saved_blocks, saved_dtype
from ..text import size_of
from . import safetensors
from .leases import LeaseWatch
from .library_files import FileForm
from .manifest import Manifest
from .open_file import KINDS

__all__ = [
    "AverageFiles",
    "SaveRequest",
    "WeightRecord",
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

    @cached_property
    def inventory(self) -> dict[str, WeightRecord]:
        """Every weight of the files, by its name there."""
        if self.inventory_of_all is not None:
            return self.inventory_of_all
        return {
            self.form.name_of(state.name): WeightRecord(
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
    leases: LeaseWatch | None = None
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
        # Raises for what JSON cannot hold, before a byte is written.
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
            # One file has no ema.json beside it, so its header tells the aliases.
            names = {alias: name for name, aliases in average.aliases.items() for alias in aliases}
            return {self.path.name: safetensors.header(table, names)}
        files = safetensors.plan(table, self.max_shard_size)
        if average.form.is_adapter:
            # peft looks for one file of this name.
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
            cure = "Pass dtype=." if dtype.is_floating_point else "Cast it in the model."
            if self.verb == "save":
                cure = "Cast it in the model, or leave it out with only=."
            raise ValueError(f"{name} is {dtype}, which safetensors cannot hold. {cure}")
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
