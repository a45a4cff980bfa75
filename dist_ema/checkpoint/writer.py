"""The saved form, written by ranks.

Ranks of one machine write the bytes that they answer for straight into place: no gather, no copy of the model. Ranks of
several machines stream to the first rank, which writes: two NFS clients that write neighbouring bytes of one page can lose
one of them. Either way the bytes are the same, and nothing is seen under its name before it is whole.

[Note: one decides]  Disks and files can differ between ranks. What depends on them is decided on the first rank
(`Ranks.decide`) or agreed on (`Ranks.attempt`) before the next collective, so an error is an error everywhere.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _version
from ..averaging.kernels.eager import SCRATCH
from ..distributed.coordinator import Ranks, digest
from ..distributed.transfer import Block, FileTransferGroup, stream_to_writers
from ..sharding.arena import ALIGN
from ..sharding.geometry import Box, runs
from ..sharding.ownership import ParamState, saved_blocks, saved_dtype, saved_dtypes
from . import atomic, crc32, manifest, retention, safetensors
from .background import BackgroundTask
from .torch_dtypes import DTYPES

__all__ = ["AverageFiles", "SaveRequest", "Writer"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class AverageFiles:
    """The model files of one average: in the folder itself, or under averages/LABEL."""

    slots: list[ParamState]
    own_buffers: dict[str, Tensor]
    spec: dict[str, Any]  # of its schedule
    label: str = ""
    taken: list[Block] | None = None  # instead of what the slots hold by now

    @cached_property
    def parts(self) -> list[Block]:
        """What this rank writes. *Aliases* shadows and live weights, unless copies were taken."""
        return (
            list(saved_blocks(self.slots, self.own_buffers)) if self.taken is None else self.taken
        )

    @property
    def prefix(self) -> str:
        return f"averages/{self.label}/" if self.label else ""

    @property
    def aliases(self) -> dict[str, list[str]]:
        return {slot.name: sorted(slot.shard.aliases) for slot in self.slots if slot.shard.aliases}

    @property
    def own_names(self) -> list[str]:
        return sorted(slot.name for slot in self.slots if slot.name in self.own_buffers)


@dataclass(frozen=True)
class SaveRequest:
    """What to write, and where. mode: 'direct', 'stream', or None to choose by what the ranks see of each other."""

    verb: str  # save: a folder that is replaced as one; export: also a single file, or files put into a folder
    path: Path
    trees: list[AverageFiles]
    meta: dict[str, Any]
    max_shard_size: int | str = "5GB"
    mode: str | None = None
    dtype: torch.dtype | None = None
    keep: int | None = None  # of the numbered saves beside it

    @property
    def one_file(self) -> bool:
        return self.verb == "export" and self.path.suffix == ".safetensors"

    def plan(self, tree: AverageFiles) -> dict[str, safetensors.SafetensorsFile]:
        """The files by name. Raises ValueError for a dtype that they cannot hold, and for extra= that is no JSON."""
        if not isinstance(self.meta["extra"], dict):
            raise ValueError(f"extra must be a dict of JSON values, got {self.meta['extra']!r}.")
        manifest.stamp(self.meta)
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise ValueError(
                f"dtype must be a floating dtype, like torch.bfloat16, got {self.dtype!r}."
            )
        if self.mode not in (None, "direct", "stream"):
            raise ValueError(f"mode must be 'direct', 'stream' or None, got {self.mode!r}.")
        table = {
            slot.name: safetensors.Entry(self._kind(slot, tree), slot.shard.shape)
            for slot in tree.slots
        }
        if not self.one_file:
            return {
                tree.prefix + name: file
                for name, file in safetensors.plan(table, self.max_shard_size).items()
            }
        names = {alias: name for name, aliases in tree.aliases.items() for alias in aliases}
        return {self.path.name: safetensors.header(table, names)}

    def _kind(self, slot: ParamState, tree: AverageFiles) -> str:
        """save: the average's dtype. export: the model's, or the one asked for where it floats."""
        which = saved_dtype(slot, tree.own_buffers) if self.verb == "save" else slot.shard.dtype
        if self.dtype is not None and which.is_floating_point:
            which = self.dtype
        if which not in _NAMES:
            raise ValueError(
                f"{slot.name} is {which}, which safetensors cannot hold. Pass dtype=, or leave it out with only=."
            )
        return _NAMES[which]

    def with_parts(self, take: Callable[[list[Block]], list[Block]]) -> SaveRequest:
        """The same job with other parts in each tree."""
        return replace(self, trees=[replace(tree, taken=take(tree.parts)) for tree in self.trees])

    def full_meta(self, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        first, *others = self.trees
        return self.meta | {
            "format": manifest.FORMAT,
            "files": files,
            "averaged": sorted(slot.name for slot in first.slots if slot.shadow is not None),
            "schedules": [tree.spec for tree in self.trees],
            "averages": {tree.label: {"own_buffers": tree.own_names} for tree in others},
            "own_buffers": first.own_names,
            "aliases": first.aliases,
            "dtypes": {
                slot.name: str(slot.shard.dtype).removeprefix("torch.") for slot in first.slots
            },
            "versions": {"dist_ema": _version.VERSION, "torch": torch.__version__},
        }


class Writer:
    """Writes jobs, one at a time, now or behind training. Made together on all ranks, and kept between saves.

    [Note: behind]  What happens behind training must not meet what training does, in another order on another rank. So
    messages have names and a connection of their own, streams a process group of their own ([Note: turns] in wire).
    """

    def __init__(self, ranks: Ranks, open_store: Callable[[str], dist.Store]) -> None:
        def open_another(prefix: str) -> dist.Store:
            # NOTE: a connection that waits is locked, and training would wait with it.
            return open_store(prefix).clone()  # type: ignore[attr-defined, no-any-return]

        self._ranks = (
            ranks
            if ranks.size == 1
            else Ranks(ranks.members, ranks.group, open_another, ranks.timeout)
        )
        self._line: FileTransferGroup | None = None
        self._behind = BackgroundTask()

    def finish(self) -> list[str]:
        """Wait for the job behind training. Returns its remarks, or raises RuntimeError if it failed."""
        return self._behind.finish()

    def write(self, job: SaveRequest, timeout: float, wait: bool = True) -> list[str]:
        """Write the job's folder or file. Returns remarks of what is not as it should be. *Collective*, atomic.

        *Cost*: two windows of 16 MB at most; with wait=False also a copy of this rank's share in host memory.
        """
        self._ranks.timeout = timeout
        if not wait:
            job = self._staged(job)
        ready = self._prepare(job)
        if wait:
            return self._carry_out(ready)
        self._behind.start(
            f"ema.{job.verb}({str(job.path)!r}, wait=False)", lambda: self._stay(ready)
        )
        return []

    def _stay(self, ready: _PreparedSave) -> list[str]:
        """Write it, and go on until all have heard what came of it: the process that ends first may serve the messages."""
        remarks = self._carry_out(ready)
        with suppress(RuntimeError):
            self._ranks.all_gather_json(ready.job.verb)
        return remarks

    def _staged(self, job: SaveRequest) -> SaveRequest:
        """The job with copies of what it writes, or the same error on all ranks. *Collective*."""
        copies: list[SaveRequest] = []
        self._ranks.run_on_all(job.verb, lambda: copies.append(job.with_parts(_stage)))
        return copies[0]

    def _prepare(self, job: SaveRequest) -> _PreparedSave:
        """Everything that can be known before the first byte is written, and the space for all of them. *Collective*."""
        ranks = self._ranks
        plans: list[dict[str, safetensors.SafetensorsFile]] = []
        ranks.run_on_all(job.verb, lambda: plans.extend(job.plan(tree) for tree in job.trees))
        files = {name: file for plan in plans for name, file in plan.items()}
        folder = Path(ranks.run_on_first(job.verb, lambda: str(_make(job, files))))
        try:
            direct = self._is_direct(job, folder, files)
            if not direct and self._line is None and ranks.size > 1:
                self._line = FileTransferGroup(ranks)
        except BaseException:
            self._abandon(folder)
            raise
        return _PreparedSave(job, plans, files, folder, None if direct else self._line)

    def _is_direct(
        self, job: SaveRequest, folder: Path, files: dict[str, safetensors.SafetensorsFile]
    ) -> bool:
        """Ranks write into place where they are of one machine and all see the folder, or are told to. *Collective*.

        Raises ValueError where they would write parts of different files.
        """
        here = _machine() if any(tree.parts for tree in job.trees) else None
        asked = digest(
            [
                job.mode,
                [tree.spec for tree in job.trees],
                [(name, file.head) for name, file in files.items()],
            ]
        )
        said = self._ranks.all_gather_json(
            job.verb, [here, here is None or os.path.isdir(folder), asked]
        )
        if any(theirs != said[0][2] for _, _, theirs in said):
            raise ValueError(
                f"ema.{job.verb}(): the ranks ask for different files. which, dtype, max_shard_size and mode must be "
                "alike on all of them."
            )
        blind = [
            rank for rank, (_, sees, _) in zip(self._ranks.members, said, strict=True) if not sees
        ]
        if job.mode == "direct" and blind:
            raise RuntimeError(
                f"ema.{job.verb}(mode='direct'): rank {blind[0]} does not see the folder {folder.parent} that rank "
                f"{self._ranks.members[0]} writes to. Choose a file system that all ranks share, or pass mode='stream'."
            )
        machines = {machine for machine, _, _ in said if machine is not None}
        return job.mode == "direct" or (job.mode is None and not blind and len(machines) < 2)

    def _carry_out(self, ready: _PreparedSave) -> list[str]:
        """Write what was prepared, here or in a thread. *Collective*."""
        ranks, verb = self._ranks, ready.job.verb
        writers = ready.writers()
        try:
            if ready.line is None:
                _, said = ranks.run_on_all(verb, lambda: ready.write(writers))
            else:
                ready.collect(ranks, writers)
            remarks = ranks.run_on_first(
                verb, lambda: _finish(ready, said if ready.line is None else [_close(writers)])
            )
            return remarks if ranks.first else []
        except BaseException:
            self._line = None  # it may be broken
            self._abandon(ready.folder)
            raise
        finally:
            for writer in writers:
                writer.abandon()

    def _abandon(self, folder: Path) -> None:
        if self._ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _PreparedSave:
    """A job whose files lie in a temporary folder, at their full size, without their weights."""

    job: SaveRequest
    plans: list[dict[str, safetensors.SafetensorsFile]]
    files: dict[str, safetensors.SafetensorsFile]
    folder: Path
    line: FileTransferGroup | None

    def writers(self) -> list[_FileWriter]:
        trees = zip(self.job.trees, self.plans, strict=True)
        return [
            _FileWriter(self.folder, plan, [slot.name for slot in tree.slots])
            for tree, plan in trees
        ]

    def write(self, writers: list[_FileWriter]) -> dict[str, int]:
        """Put what this rank answers for into place."""
        for tree, writer in zip(self.job.trees, writers, strict=True):
            for part in tree.parts:
                writer.part(*part)
        return _close(writers)

    def collect(self, ranks: Ranks, writers: list[_FileWriter]) -> None:
        """Put what all ranks answer for into place, on the first one. *Collective*."""
        assert self.line is not None
        for tree, writer in zip(self.job.trees, writers, strict=True):
            stream_to_writers(
                ranks,
                self.line,
                self.job.verb,
                *saved_dtypes(tree.slots, tree.own_buffers),
                tree.parts,
                writer.part,
            )


def _close(writers: list[_FileWriter]) -> dict[str, int]:
    """What was added to the check sum of every file."""
    return {name: added for writer in writers for name, added in writer.close().items()}


def _machine() -> str:
    """What ranks of one machine have in common: its kernel, and with it one page cache, whatever containers are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _stage(mine: list[Block]) -> list[Block]:
    """Copies in one block of host memory, pinned if they come from an accelerator. Waits until they are there."""
    sizes = [-(-data.nbytes // ALIGN) * ALIGN for _, _, data in mine]
    devices = {data.device for _, _, data in mine if data.device.type != "cpu"}
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=bool(devices))
    copies = []
    for (number, offsets, data), room in zip(mine, block.split(sizes), strict=True):
        copy = room[: data.nbytes].view(data.dtype).view(data.shape)
        copies.append((number, offsets, copy.copy_(data, non_blocking=True)))
    for device in devices:
        torch.accelerator.synchronize(device)
    return copies


def _make(job: SaveRequest, files: dict[str, safetensors.SafetensorsFile]) -> Path:
    """Refuse a target that is not ours, then make the temporary folder with every file at its full size."""
    _refuse(job)
    folder = atomic.temporary_sibling(job.path)
    folder.mkdir()
    try:
        for name, file in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as handle:
                atomic.reserve(handle.fileno(), file.size)
                atomic.write_at(handle.fileno(), file.head, 0)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _refuse(job: SaveRequest) -> None:
    """Raise ValueError for a target that is not ours. What died writers of ours left there is tidied up."""
    path = job.path
    if job.keep is not None:
        retention.refuse(path, job.keep)
    try:
        atomic.ensure(path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be made: {error.filename} is a file.") from None
    atomic.recover(path)
    atomic.remove_leftovers(path)
    if job.one_file and path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, or a folder without the suffix.")
    if job.one_file or not path.exists():
        return
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file. Give a folder, or let export write a name that ends in .safetensors."
        )
    if job.verb == "export":
        if manifest.resumable(path):
            raise ValueError(
                f"{path} is an average to resume from: its clock would be lost. Choose another path."
            )
    elif any(path.iterdir()) and not (path / manifest.META).exists():
        raise ValueError(
            f"{path} holds files but no {manifest.META}: it is not ours to replace. Choose another path."
        )
    elif foreign := _strangers(path):
        raise ValueError(
            f"{path} holds {', '.join(foreign[:3])}, which ema.save() did not write and would remove. Choose another path."
        )


def _strangers(path: Path) -> list[str]:
    """What else lies in a save. Of a damaged one nobody can tell, and a new version is what it needs."""
    try:
        return retention.foreign(path)
    except ValueError:
        return []


class _FileWriter:
    """Puts parts into their places and keeps the check sums of what it wrote."""

    def __init__(
        self, folder: Path, files: dict[str, safetensors.SafetensorsFile], names: Sequence[str]
    ) -> None:
        self._where = {weight: name for name, file in files.items() for weight in file.entries}
        self._folder, self._files, self._names = folder, files, names
        self._open: dict[str, atomic.Target] = {}
        self._sums = {name: crc32.RangeSum(file.size) for name, file in files.items()}

    def part(self, number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        name = self._where[self._names[number]]
        file = self._files[name]
        entry = file.entries[self._names[number]]
        if name not in self._open:
            self._open[name] = atomic.Target(self._folder / name)
        dtype = DTYPES[entry.dtype]
        cast = _cast(self._names[number], data, dtype).contiguous().view(-1).view(torch.uint8)
        raw = memoryview(cast.numpy())  # type: ignore[arg-type]
        at, base = 0, len(file.head) + entry.begin
        for start, n in runs(Box(offsets, tuple(data.shape)), entry.shape):
            chunk = raw[at : at + n * dtype.itemsize]
            self._open[name].write(chunk, base + start * dtype.itemsize)
            self._sums[name].add(base + start * dtype.itemsize, chunk)
            at += n * dtype.itemsize

    def close(self) -> dict[str, int]:
        for target in self._open.values():
            target.sync()
        self.abandon()
        return {name: sum_.contribution for name, sum_ in self._sums.items()}

    def abandon(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _cast(name: str, data: Tensor, dtype: torch.dtype) -> Tensor:
    """On the host. Raises ValueError where a finite value would become infinite or NaN."""
    new = data.to(dtype)
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(data.dtype).max:
        for was, now in zip(
            data.reshape(-1).split(SCRATCH), new.reshape(-1).split(SCRATCH), strict=True
        ):
            if not bool((now.float().isfinite() | ~was.isfinite()).all()):
                raise ValueError(
                    f"{name} holds values that are too large for {dtype}. Choose another dtype."
                )
    return new.cpu()


def _finish(ready: _PreparedSave, added: list[dict[str, int]]) -> list[str]:
    """Seal the temporary folder and put it in place. Returns remarks."""
    job, folder, files = ready.job, ready.folder, ready.files
    if job.one_file:
        alone = atomic.temporary_sibling(job.path)
        os.rename(folder / job.path.name, alone)
        folder.rmdir()
        atomic.publish(alone, job.path)
        return []
    texts = {manifest.META: manifest.stamp(job.full_meta(_table(files, added)))}
    for tree in job.trees:
        own = {
            Path(name).name: file
            for name, file in files.items()
            if Path(name).parent == Path(tree.prefix)
        }
        if len(own) > 1:
            texts[tree.prefix + safetensors.INDEX] = safetensors.index(own)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        atomic.sync(folder / name)
    for inner in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        atomic.sync(inner)
    if job.verb == "export" and job.path.exists():
        _merge(folder, job.path, [*files, *texts])
    else:
        atomic.publish(folder, job.path)
    return [] if job.keep is None else retention.advance(job.path, job.keep)


def _table(
    files: dict[str, safetensors.SafetensorsFile], added: list[dict[str, int]]
) -> dict[str, dict[str, Any]]:
    """Size and check sum of every file, from what each rank wrote into it ([Note: check sums] in format)."""
    table = {}
    for name, file in files.items():
        head = crc32.RangeSum(file.size)
        head.add(0, file.head)
        sums = [head.contribution, *(each[name] for each in added)]
        table[name] = {"size": file.size, "crc32": crc32.check_sum(file.size, sums)}
    return table


def _merge(folder: Path, path: Path, names: list[str]) -> None:
    """Replace one file after another, then drop the model files of an earlier export that are no longer named.

    NOTE: the index goes first and comes last, so that a reader in between is refused, and never sees shards of two models.
    """
    last = [name for name in (safetensors.INDEX, manifest.META) if name in names]
    for name in (safetensors.INDEX, manifest.META):
        (path / name).unlink(missing_ok=True)
    atomic.sync(path)
    for name in [name for name in names if name not in last] + last:
        os.replace(folder / name, path / name)
    for old in [*path.glob("model-*-of-*.safetensors"), path / "model.safetensors"]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    atomic.sync(path)
    folder.rmdir()
