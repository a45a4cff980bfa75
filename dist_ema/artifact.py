"""The saved form, written by ranks.

Ranks of one host write the bytes that they answer for straight into place: no gather, no copy of the model. Ranks of
several hosts stream to the first rank, which writes: two NFS clients that write neighbouring bytes of one page can lose
one of them. Either way the bytes are the same, and nothing is seen under its name before it is whole.

[Note: one decides]  Disks and files can differ between ranks. What depends on them is decided on the first rank
(`Ranks.decide`) or agreed on (`Ranks.attempt`) before the next collective, so an error is an error everywhere.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import commit, format
from .layout import DTYPES, Box, Slot, kinds, parts, runs
from .ranks import Ranks
from .wire import Part, stream

__all__ = ["Job", "Tree", "write"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tree:
    """The model files of one average: in the folder itself, or under averages/LABEL."""

    slots: list[Slot]
    own_buffers: dict[str, Tensor]
    spec: dict[str, Any]  # of its schedule
    label: str = ""

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
class Job:
    """What to write, and where. mode: 'direct', 'stream', or None to choose by whether all ranks share a host."""

    verb: str  # save: a folder that is replaced as one; export: also a single file, or files put into a folder
    path: Path
    trees: list[Tree]
    meta: dict[str, Any]
    max_shard_size: int | str = "5GB"
    mode: str | None = None
    dtype: torch.dtype | None = None

    @property
    def one_file(self) -> bool:
        return self.verb == "export" and self.path.suffix == ".safetensors"

    def plan(self, tree: Tree) -> dict[str, format.File]:
        """The files by name. Raises ValueError for a dtype that they cannot hold."""
        if self.mode not in (None, "direct", "stream"):
            raise ValueError(f"mode must be 'direct', 'stream' or None, got {self.mode!r}.")
        table = {slot.name: format.Entry(self._kind(slot), slot.shard.shape) for slot in tree.slots}
        if not self.one_file:
            return {tree.prefix + name: file for name, file in format.plan(table, self.max_shard_size).items()}
        names = {alias: name for name, aliases in tree.aliases.items() for alias in aliases}
        return {self.path.name: format.header(table, names)}

    def _kind(self, slot: Slot) -> str:
        """save: the average's dtype. export: the model's, or the one asked for where it floats."""
        kind = slot.average.dtype if self.verb == "save" else slot.shard.dtype
        if self.dtype is not None and kind.is_floating_point:
            kind = self.dtype
        if kind not in _NAMES:
            raise ValueError(
                f"{slot.name} is {kind}, which safetensors cannot hold. Pass dtype=, or leave it out with only=."
            )
        return _NAMES[kind]

    def full_meta(self, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        first, *others = self.trees
        return self.meta | {
            "format": format.FORMAT,
            "files": files,
            "averaged": sorted(slot.name for slot in first.slots if slot.shadow is not None),
            "schedules": [tree.spec for tree in self.trees],
            "averages": {tree.label: {"own_buffers": tree.own_names} for tree in others},
            "own_buffers": first.own_names,
            "aliases": first.aliases,
            "dtypes": {slot.name: str(slot.shard.dtype).removeprefix("torch.") for slot in first.slots},
            "versions": {"dist_ema": format.VERSION, "torch": torch.__version__},
        }


def write(ranks: Ranks, job: Job) -> None:
    """Write the job's folder or file. *Collective*, atomic. *Cost*: one window of 16 MB at most."""
    plans: list[dict[str, format.File]] = []
    ranks.attempt(job.verb, lambda: plans.extend(job.plan(tree) for tree in job.trees))
    files = {name: file for plan in plans for name, file in plan.items()}
    hosts = ranks.exchange(job.verb, socket.gethostname())
    direct = job.mode == "direct" or (job.mode is None and len(set(hosts)) == 1)
    folder = Path(ranks.decide(job.verb, lambda: str(_prepare(job, files))))
    try:
        sums: dict[str, list[int]] = {}
        for tree, plan in zip(job.trees, plans, strict=True):
            for said in _write_tree(ranks, job.verb, folder, tree, plan, direct):
                for name, contribution in said.items():
                    sums.setdefault(name, []).append(contribution)
        ranks.decide(job.verb, lambda: _finish(job, folder, files, sums))
    except BaseException:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_tree(
    ranks: Ranks, verb: str, folder: Path, tree: Tree, files: dict[str, format.File], direct: bool
) -> list[dict[str, int]]:
    """Put every rank's bytes into place. Returns what each adds to the check sum of every file. *Collective*."""
    work = _Writer(folder, files, [slot.name for slot in tree.slots])
    mine = list(parts(tree.slots, tree.own_buffers))
    try:
        if direct:
            return ranks.attempt(verb, lambda: work.all(mine))[1]
        stream(ranks, *kinds(tree.slots), mine, work.part_or_note)
        return ranks.attempt(verb, work.close if ranks.first else dict)[1]
    finally:
        work.abandon()


def _prepare(job: Job, files: dict[str, format.File]) -> Path:
    """Refuse a target that is not ours, then make the temporary folder with every file at its full size."""
    path = job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    commit.recover(path)
    commit.sweep(path)
    if job.one_file and path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, or a folder without the suffix.")
    if not job.one_file and path.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is a file. Give a folder, or let export write a name that ends in .safetensors.")
        if job.verb == "save" and any(path.iterdir()) and not (path / format.META).exists():
            raise ValueError(
                f"{path} holds files but no {format.META}: it is not ours to replace. Choose another path."
            )
    folder = commit.temporary(path)
    folder.mkdir()
    try:
        for name, file in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as handle:
                commit.reserve(handle.fileno(), file.size)
                commit.write_at(handle.fileno(), file.head, 0)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


class _Writer:
    """Puts parts into their places and keeps the check sums of what it wrote."""

    def __init__(self, folder: Path, files: dict[str, format.File], names: Sequence[str]) -> None:
        self.where = {weight: name for name, file in files.items() for weight in file.entries}
        self._folder, self._files, self._names = folder, files, names
        self._open: dict[str, int] = {}
        self._error: Exception | None = None
        self._sums = {name: format.Sum(file.size) for name, file in files.items()}

    def all(self, mine: Sequence[Part]) -> dict[str, int]:
        for part in mine:
            self.part(*part)
        return self.close()

    def part_or_note(self, number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        """`part`, but an error waits for `close`: the senders must get rid of what they send."""
        if self._error is None:
            try:
                self.part(number, offsets, data)
            except Exception as error:  # raised by close
                self._error = error

    def part(self, number: int, offsets: tuple[int, ...], data: Tensor) -> None:
        name = self.where[self._names[number]]
        file = self._files[name]
        entry = file.entries[self._names[number]]
        if name not in self._open:
            self._open[name] = self._reach(self._folder / name)
        dtype = DTYPES[entry.dtype]
        raw = memoryview(data.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at, base = 0, len(file.head) + entry.begin
        for start, n in runs(Box(offsets, tuple(data.shape)), entry.shape):
            chunk = raw[at : at + n * dtype.itemsize]
            commit.write_at(self._open[name], chunk, base + start * dtype.itemsize)
            self._sums[name].add(base + start * dtype.itemsize, chunk)
            at += n * dtype.itemsize

    @staticmethod
    def _reach(path: Path) -> int:
        try:
            return os.open(path, os.O_WRONLY)
        except FileNotFoundError:
            raise RuntimeError(
                f"{path} is not visible here: ranks must share a file system, or pass mode='stream'."
            ) from None

    def close(self) -> dict[str, int]:
        if self._error is not None:
            raise self._error
        for fd in self._open.values():
            os.fsync(fd)
        self.abandon()
        return {name: sum_.contribution for name, sum_ in self._sums.items()}

    def abandon(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _finish(job: Job, folder: Path, files: dict[str, format.File], sums: dict[str, list[int]]) -> None:
    """Seal the temporary folder and put it in place."""
    if job.one_file:
        alone = commit.temporary(job.path)
        os.rename(folder / job.path.name, alone)
        folder.rmdir()
        return commit.publish(alone, job.path)
    texts = {format.META: format.dump(job.full_meta(_table(files, sums)))}
    for tree in job.trees:
        own = {Path(name).name: file for name, file in files.items() if Path(name).parent == Path(tree.prefix)}
        if len(own) > 1:
            texts[tree.prefix + format.INDEX] = format.index(own)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
        commit.sync(folder / name)
    for inner in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        commit.sync(inner)
    if job.verb == "export" and job.path.exists():
        return _merge(folder, job.path, [*files, *texts])
    return commit.publish(folder, job.path)


def _table(files: dict[str, format.File], sums: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Size and check sum of every file, from what each rank wrote into it ([Note: check sums] in format)."""
    table = {}
    for name, file in files.items():
        head = format.Sum(file.size)
        head.add(0, file.head)
        table[name] = {"size": file.size, "crc32": format.check_sum(file.size, [head.contribution, *sums[name]])}
    return table


def _merge(folder: Path, path: Path, names: list[str]) -> None:
    """Replace one file after another, then drop the model files of an earlier export that are no longer named.

    NOTE: the index goes first and comes last, so that a reader in between is refused, and never sees shards of two models.
    """
    last = [name for name in (format.INDEX, format.META) if name in names]
    for name in (format.INDEX, format.META):
        (path / name).unlink(missing_ok=True)
    commit.sync(path)
    for name in [name for name in names if name not in last] + last:
        os.replace(folder / name, path / name)
    for old in [*path.glob("model-*-of-*.safetensors"), path / "model.safetensors"]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    commit.sync(path)
    folder.rmdir()
