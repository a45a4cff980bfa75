"""`ema.save` on every rank: who writes which bytes of which file, staged, summed and sealed.

Ranks of one machine write their regions straight into place: no gather, no copy of the model. Ranks
of several machines stream to the first rank, which writes. NFS forces that: of two clients that
write neighbouring bytes of one page, one can lose its bytes. Either way the bytes are the same, and
nothing appears under its name before it is whole.

[Note: one decides]  Disks and files can differ between ranks. What depends on them is decided on
the first rank (`Ranks.run_on_first`) or compared (`Ranks.run_on_all`) before the next collective.
So an error on one rank is an error on all.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _version
from ..averaging.kernels.eager import SCRATCH
from ..distributed.coordinator import Ranks, digest
from ..distributed.transfer import Block, FileTransferGroup, stream
from ..sharding.arena import ALIGN
from ..sharding.geometry import Box, runs
from ..sharding.ownership import ParamState, saved_blocks, saved_dtype, saved_dtypes
from . import atomic, crc32, foreign_files, manifest, retention, safetensors, versions
from .background import BackgroundTask
from .library_files import FileForm
from .manifest import Manifest
from .publishing import Publication
from .torch_dtypes import DTYPES, KINDS

__all__ = ["AverageFiles", "FileWriter", "SaveRequest", "Writer", "machine_id"]


@dataclass(frozen=True)
class AverageFiles:
    """The model files of one average: in the folder itself, or under averages/LABEL."""

    states: list[ParamState]
    own_buffers: dict[str, Tensor]
    schedule: dict[str, Any]
    label: str = ""
    staged: list[Block] | None = None  # copies, in place of what the states hold by now
    alone: bool = False  # this rank writes everything
    form: FileForm = field(default_factory=FileForm)

    @cached_property
    def blocks(self) -> list[Block]:
        """What this rank writes. *Aliases* shadows and live weights, unless copies are staged."""
        return (
            list(saved_blocks(self.states, self.own_buffers, self.alone))
            if self.staged is None
            else self.staged
        )

    @property
    def prefix(self) -> str:
        return f"averages/{self.label}/" if self.label else ""

    def name_of(self, state: ParamState) -> str:
        """In the files."""
        return self.form.name_of(state.name)

    @property
    def aliases(self) -> dict[str, list[str]]:
        return {
            self.name_of(state): sorted(map(self.form.name_of, state.shard.aliases))
            for state in self.states
            if state.shard.aliases
        }

    @property
    def own_names(self) -> list[str]:
        own = (state for state in self.states if state.name in self.own_buffers)
        return sorted(map(self.name_of, own))


@dataclass(frozen=True)
class SaveRequest:
    """What to write, and where.

    verb: 'save' replaces a folder as one; 'export' also writes one file, or keeps foreign files;
        'publish' replaces nothing.
    manifest: as far as it does not follow from the averages and the files.
    mode: 'direct', 'stream', or None to choose by what the ranks see of each other.
    keep: how many of the numbered saves beside it are kept.
    numbered: what killed saves of the run left under lower numbers is removed, as with keep.
    publication: of which this is a version; it takes the errors of background work.
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
    publication: Publication | None = None

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

    def plan(self, average: AverageFiles) -> dict[str, safetensors.SafetensorsFile]:
        """The files of an average by name. Raises ValueError for a dtype that they cannot hold."""
        table = {
            average.name_of(state): safetensors.Entry(
                self._kind_of(state, average), state.shard.shape
            )
            for state in average.states
        }
        if not self.one_file:
            files = safetensors.plan(table, self.max_shard_size)
            if average.form.is_adapter:
                files = {safetensors.ADAPTER: safetensors.header(table)}
            return {average.prefix + name: file for name, file in files.items()}
        names = {alias: name for name, aliases in average.aliases.items() for alias in aliases}
        return {self.path.name: safetensors.header(table, names)}

    def _kind_of(self, state: ParamState, average: AverageFiles) -> str:
        """save: the average's dtype. export: the model's, or the one asked for where it floats."""
        saved = self.verb == "save"
        dtype = saved_dtype(state, average.own_buffers) if saved else state.shard.dtype
        if self.dtype is not None and dtype.is_floating_point:
            dtype = self.dtype
        if dtype not in KINDS:
            raise ValueError(
                f"{state.name} is {dtype}, which safetensors cannot hold. Pass dtype=, or leave it "
                "out with only=."
            )
        return KINDS[dtype]

    def with_blocks(self, take: Callable[[list[Block]], list[Block]]) -> SaveRequest:
        """The same request with other blocks of each average."""
        averages = [replace(each, staged=take(each.blocks)) for each in self.averages]
        return replace(self, averages=averages)

    def full_manifest(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """What goes into ema.json. files: size and check sum of every file."""
        first, *others = self.averages
        return replace(
            self.manifest,
            files=files,
            averaged=sorted(
                first.name_of(state) for state in first.states if state.shadow is not None
            ),
            schedules=[each.schedule for each in self.averages],
            averages={each.label: each.own_names for each in others},
            own_buffers=first.own_names,
            aliases=first.aliases,
            dtypes={
                first.name_of(state): str(state.shard.dtype).removeprefix("torch.")
                for state in first.states
            },
            versions={"dist_ema": _version.VERSION, "torch": torch.__version__},
        )


class Writer:
    """Writes one request at a time, now or in the background. Made on all ranks together, and kept.

    [Note: background saves]  Ranks interleave background work and training in different orders. So
    the background has keys and a connection of its own, and streams have a process group of their
    own ([Note: turns] in transfer).
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks.with_own_messages()
        self._transfer: FileTransferGroup | None = None
        self._background = BackgroundTask()

    @property
    def busy(self) -> bool:
        """A background request is being written."""
        return self._background.busy

    def finish(self) -> list[str]:
        """Wait for the background request; return its remarks. Raises RuntimeError if it failed."""
        return self._background.finish()

    def write(self, request: SaveRequest, timeout: float, wait: bool = True) -> list[str]:
        """Write the folder or file that is asked for, atomically.

        Args:
            request: what to write, and where.
            timeout: seconds that a rank waits for the others.
            wait: False writes in the background.

        Returns:
            Remarks on what is not as it should be.

        Note:
            *Collective*. *Cost*: two windows of 16 MB at most; with wait=False also a copy of this
            rank's share in host memory.
        """
        self._ranks.timeout = timeout
        if not wait:
            request = self._staged(request)
        prepared = self._prepare(request)
        if wait:
            return self._carry_out(prepared)
        self._background.start(
            f"ema.{request.verb}({str(request.path)!r}, wait=False)",
            lambda: self._carry_out_together(prepared),
        )
        return []

    def _carry_out_together(self, prepared: _PreparedSave) -> list[str]:
        """Write it, and stay until all ranks know the outcome: this process may serve the store."""
        publication, error = prepared.request.publication, None
        try:
            remarks = self._carry_out(prepared)
        except Exception as caught:
            if publication is None:
                raise
            remarks, error = [], caught
        else:
            with suppress(RuntimeError):
                self._ranks.all_gather_json(prepared.request.verb)
        if publication is not None:
            remarks = remarks + publication.note(error, aloud=self._ranks.first)
        return remarks

    def _staged(self, request: SaveRequest) -> SaveRequest:
        """The request with its blocks copied, or the same error on all ranks. *Collective*."""
        staged: list[SaveRequest] = []
        self._ranks.run_on_all(request.verb, lambda: staged.append(request.with_blocks(_stage)))
        return staged[0]

    def _prepare(self, request: SaveRequest) -> _PreparedSave:
        """Check everything before the first byte is written; reserve the space. *Collective*."""
        ranks = self._ranks
        plans: list[dict[str, safetensors.SafetensorsFile]] = []

        def plan() -> None:
            request.refuse_unsound()
            plans.extend(request.plan(average) for average in request.averages)

        ranks.run_on_all(request.verb, plan)
        files = {name: file for each in plans for name, file in each.items()}
        folder = Path(ranks.run_on_first(request.verb, lambda: str(_make(request, files))))
        try:
            direct = self._is_direct(request, folder, files)
            if not direct and self._transfer is None and ranks.size > 1:
                self._transfer = FileTransferGroup(ranks)
        except BaseException:
            self._abandon(folder)
            raise
        return _PreparedSave(request, plans, files, folder, None if direct else self._transfer)

    def _is_direct(
        self, request: SaveRequest, folder: Path, files: dict[str, safetensors.SafetensorsFile]
    ) -> bool:
        """Whether ranks write into place: they share one machine and the folder, or `mode` says so.

        *Collective*. Raises ValueError where the ranks would write different files.
        """
        here = machine_id() if any(average.blocks for average in request.averages) else None
        asked = digest(
            [
                request.mode,
                [average.schedule for average in request.averages],
                [(name, file.head) for name, file in files.items()],
            ]
        )
        messages = self._ranks.all_gather_json(
            request.verb, [here, here is None or os.path.isdir(folder), asked]
        )
        machines, sees, wanted = zip(*messages, strict=True)
        if len(set(wanted)) > 1:
            raise ValueError(
                f"ema.{request.verb}(): the ranks ask for different files. which, dtype, "
                "max_shard_size and mode must be alike on all of them."
            )
        blind = [rank for rank, seen in zip(self._ranks.members, sees, strict=True) if not seen]
        if request.mode == "direct" and blind:
            raise RuntimeError(
                f"ema.{request.verb}(mode='direct'): rank {blind[0]} does not see the folder "
                f"{folder.parent} that rank {self._ranks.members[0]} writes to. Choose a file "
                "system that all ranks share, or pass mode='stream'."
            )
        one_machine = len(set(machines) - {None}) < 2
        return request.mode == "direct" or (request.mode is None and not blind and one_machine)

    def _carry_out(self, prepared: _PreparedSave) -> list[str]:
        """Write what was prepared, here or in a thread. *Collective*."""
        ranks, verb = self._ranks, prepared.request.verb
        writers = prepared.writers()
        sums: list[dict[str, int]] = []
        try:
            if prepared.transfer is None:
                _, sums = ranks.run_on_all(verb, lambda: prepared.write(writers))
            else:
                prepared.stream(ranks, writers)
            remarks = ranks.run_on_first(verb, lambda: _finish(prepared, sums or [_close(writers)]))
            return remarks if ranks.first else []
        except BaseException as error:
            self._transfer = None  # it may be broken
            if not isinstance(error, atomic.NotDurableError):  # the earlier version lies there
                self._abandon(prepared.folder)
            raise
        finally:
            for writer in writers:
                writer.abandon()

    def _abandon(self, folder: Path) -> None:
        if self._ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _PreparedSave:
    """A request whose files exist in a temporary folder, at their full size, without weights."""

    request: SaveRequest
    plans: list[dict[str, safetensors.SafetensorsFile]]
    files: dict[str, safetensors.SafetensorsFile]
    folder: Path
    transfer: FileTransferGroup | None  # None: every rank writes into place

    def writers(self) -> list[FileWriter]:
        return [
            FileWriter(self, plan, list(map(average.name_of, average.states)))
            for average, plan in zip(self.request.averages, self.plans, strict=True)
        ]

    def disk_errors(self) -> AbstractContextManager[None]:
        return atomic.disk_errors(self.request.path, _total(self.files))

    def write(self, writers: list[FileWriter]) -> dict[str, int]:
        """Put the blocks of this rank into place."""
        for average, writer in zip(self.request.averages, writers, strict=True):
            for block in average.blocks:
                writer.write_block(*block)
        return _close(writers)

    def stream(self, ranks: Ranks, writers: list[FileWriter]) -> None:
        """Put the blocks of all ranks into place, on the first rank. *Collective*."""
        assert self.transfer is not None
        for average, writer in zip(self.request.averages, writers, strict=True):
            stream(
                ranks,
                self.transfer,
                self.request.verb,
                *saved_dtypes(average.states, average.own_buffers),
                average.blocks,
                writer.write_block,
            )


def _close(writers: list[FileWriter]) -> dict[str, int]:
    """What was added to the check sum of every file."""
    return {name: added for writer in writers for name, added in writer.close().items()}


def machine_id() -> str:
    """An id of the running kernel, which containers of one machine share with its page cache."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _stage(blocks: list[Block]) -> list[Block]:
    """Copy into one staging buffer on the host, pinned for an accelerator, and wait for it."""
    sizes = [-(-data.nbytes // ALIGN) * ALIGN for _, _, data in blocks]
    devices = {data.device for _, _, data in blocks if data.device.type != "cpu"}
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=bool(devices))
    copies = []
    for (number, offsets, data), room in zip(blocks, buffer.split(sizes), strict=True):
        copy = room[: data.nbytes].view(data.dtype).view(data.shape)
        copies.append(Block(number, offsets, copy.copy_(data, non_blocking=True)))
    for device in devices:
        torch.accelerator.synchronize(device)
    return copies


def _make(request: SaveRequest, files: dict[str, safetensors.SafetensorsFile]) -> Path:
    """Refuse a target that is not ours, then make the temporary folder, every file at full size."""
    with atomic.disk_errors(request.path, _total(files)):
        _refuse_target(request)
        with atomic.temporary_folder(request.path) as folder:
            for name, file in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with open(folder / name, "wb") as handle:
                    atomic.reserve(handle.fileno(), file.size)
                    atomic.write_at(handle.fileno(), file.head, 0)
                    if file.size == len(file.head):  # its weights are empty: no rank will sync it
                        os.fsync(handle.fileno())
        return folder


def _total(files: dict[str, safetensors.SafetensorsFile]) -> int:
    """The bytes of all files."""
    return sum(file.size for file in files.values())


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


class FileWriter:
    """Puts blocks into their places and keeps the check sums of what it wrote."""

    def __init__(
        self,
        prepared: _PreparedSave,
        files: dict[str, safetensors.SafetensorsFile],
        names: Sequence[str],
    ) -> None:
        self._where = {weight: name for name, file in files.items() for weight in file.entries}
        self._prepared, self._files, self._names = prepared, files, names
        self._open: dict[str, atomic.Target] = {}
        self._sums = {name: crc32.RangeSum(file.size) for name, file in files.items()}

    def write_block(self, number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        """A block of the weight with that number, in the dtype of the file."""
        weight = self._names[number]
        name = self._where[weight]
        file = self._files[name]
        entry = file.entries[weight]
        dtype = DTYPES[entry.dtype]
        raw = _cast(weight, data, dtype).contiguous().view(-1).view(torch.uint8)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]
        done, base = 0, len(file.head) + entry.begin
        with self._prepared.disk_errors():
            if name not in self._open:
                self._open[name] = atomic.Target(self._prepared.folder / name)
            for start, n in runs(Box(offsets, tuple(data.shape)), entry.shape):
                run = view[done : done + n * dtype.itemsize]
                self._open[name].write(run, base + start * dtype.itemsize)
                self._sums[name].add(base + start * dtype.itemsize, run)
                done += n * dtype.itemsize

    def close(self) -> dict[str, int]:
        with self._prepared.disk_errors():
            for target in self._open.values():
                target.sync()
        self.abandon()
        return {name: each.contribution for name, each in self._sums.items()}

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


def _finish(prepared: _PreparedSave, sums: list[dict[str, int]]) -> list[str]:
    """Seal the temporary folder and put it in place. Returns remarks."""
    request, folder = prepared.request, prepared.folder
    with prepared.disk_errors():
        if request.one_file:
            atomic.publish(folder / request.path.name, request.path)
            atomic.remove(folder)
            return []
        _seal(prepared, sums)
        atomic.publish(folder, request.path)
        if request.keep is None:
            return []
        watch = request.publication
        bounds = () if watch is None else (watch.leases, watch.keep_at_most)
        return retention.advance(request.path, request.keep, *bounds)


def _seal(prepared: _PreparedSave, sums: list[dict[str, int]]) -> None:
    """Complete the temporary folder: ema.json, indexes, and what an export keeps of others."""
    request, folder, files = prepared.request, prepared.folder, prepared.files
    texts = {manifest.META: request.full_manifest(_table(files, sums)).to_bytes()}
    for average, plan in zip(request.averages, prepared.plans, strict=True):
        if len(plan) > 1:
            bare = {Path(name).name: file for name, file in plan.items()}
            texts[average.prefix + safetensors.INDEX] = safetensors.index(bare)
        for name, text in average.form.texts.items():
            if average.form.is_adapter or not (request.path / name).exists():
                texts[average.prefix + name] = text
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        atomic.sync(folder / name)
    if request.verb == "export" and request.path.exists():
        stale = {path.name for path in request.path.glob("model-*-of-*.safetensors")}
        stale |= {"model.safetensors", safetensors.INDEX, manifest.META}
        stale |= {safetensors.ADAPTER, safetensors.ADAPTER_CONFIG}  # loaders would add it again
        foreign_files.carry_over(request.path, folder, stale)
    published = versions.facts_of(request.manifest) or {"beside": ()}
    for name in published["beside"]:
        assert request.publication is not None
        atomic.link_or_copy(f"{request.publication.beside}/{name}", folder / name)
    for inner in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        atomic.sync(inner)


def _table(
    files: dict[str, safetensors.SafetensorsFile], sums: list[dict[str, int]]
) -> dict[str, dict[str, Any]]:
    """Size and check sum of every file, from what each rank wrote ([Note: check sums] in crc32)."""
    table = {}
    for name, file in files.items():
        head = crc32.RangeSum(file.size)
        head.add(0, file.head)
        added = [head.contribution, *(of_rank[name] for of_rank in sums)]
        table[name] = {"size": file.size, "crc32": crc32.check_sum(file.size, added)}
    return table
