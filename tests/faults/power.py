"""What a disk can hold after a power loss: the recorded operations, replayed without some of them.

[Note: what survives]  The model is that of ALICE (Pillai et al., OSDI 2014) at its weakest: between
two fsyncs the disk may take data, sizes and names in any order. An fsync of a file makes its data
and size durable, and not its name. An fsync of a folder makes the names in it durable. A rename or
exchange is one step. So a state is: the operations that an fsync before the crash made durable, and
any subset of the others before the crash.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import shim
from .shim import Operation
from .verbs import Case

__all__ = ["Loss", "lose_power"]

SUBSETS = 40  # of operations in flight, at each moment, beside the systematic ones
BLOCK = 512  # bytes that reach the disk together

Tree = list[tuple[str, bytes | None]]  # path and content of every file; None for a folder


@dataclass(frozen=True)
class Step:
    """What one operation changes, in the smallest parts that a disk takes.

    kind: 'data', 'size', or 'names'.
    inode: Of the file or folder.
    names: (folder's inode, name, inode or None) of each entry that is set or removed.
    synced: The inode whose fsync makes the step durable.
    rank: Who did it.
    """

    kind: str
    synced: int
    inode: int = 0
    offset: int = 0
    size: int = 0
    data: bytes = b""
    names: tuple[tuple[int, str, int | None], ...] = ()
    rank: int = 0


@dataclass
class Disk:
    """Files and folders by inode."""

    content: dict[int, bytearray] = field(default_factory=dict)
    entries: dict[int, dict[str, int]] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk(
            {inode: bytearray(data) for inode, data in self.content.items()},
            {inode: dict(names) for inode, names in self.entries.items()},
        )

    def apply(self, step: Step) -> None:
        if step.kind == "names":
            for folder, name, inode in step.names:
                if inode is None:
                    self.entries[folder].pop(name, None)
                else:
                    self.entries[folder][name] = inode
            return
        content = self.content[step.inode]
        if step.kind == "size":
            del content[step.size :]
            content.extend(bytes(step.size - len(content)))
        else:  # what lies behind the end is not seen
            data = step.data[: max(0, len(content) - step.offset)]
            content[step.offset : step.offset + len(data)] = data

    def tree(self, folder: int, path: str = "") -> Iterator[tuple[str, bytes | None]]:
        """(path, content; None for a folder) below a folder."""
        for name, inode in sorted(self.entries[folder].items()):
            below = f"{path}/{name}"
            if inode in self.entries:
                yield below, None
                yield from self.tree(inode, below)
            else:
                yield below, bytes(self.content[inode])


class Recording:
    """The steps of recorded operations, and which of them are durable when.

    apart: Ranks are on machines of their own: an fsync reaches what its own rank did.
    """

    def __init__(
        self, root: Path, before: Path, operations: Sequence[Operation], apart: bool = False
    ) -> None:
        self._root = str(root)
        self._inodes = itertools.count(1)
        self.first, self._now = Disk(entries={0: {}}), Disk()
        self._read(before, 0)
        self._now = self.first.copy()
        self.steps: list[Step] = []
        # One for each operation: how many steps came until then, and the steps made durable.
        self.moments: list[tuple[int, frozenset[int]]] = [(0, frozenset())]
        self._durable: set[int] = set()
        self._rank, self._apart = 0, apart
        for operation in operations:
            self._rank = operation.rank
            if operation.code == 0 and not operation.path.endswith(" (deleted)"):
                self._add(operation)
            self.moments.append((len(self.steps), frozenset(self._durable)))

    def _read(self, folder: Path, inode: int) -> None:
        for each in sorted(folder.iterdir()):
            new = self._new(self.first, each.is_dir())
            self.first.entries[inode][each.name] = new
            if each.is_dir():
                self._read(each, new)
            else:
                self.first.content[new] = bytearray(each.read_bytes())

    def _new(self, disk: Disk, is_folder: bool) -> int:
        inode = next(self._inodes)
        if is_folder:
            disk.entries[inode] = {}
        else:
            disk.content[inode] = bytearray()
        return inode

    def _find(self, path: str) -> tuple[int, str, int | None]:
        """The folder, the name, and the inode of a path, now."""
        words = [word for word in path[len(self._root) :].split("/") if word]
        folder, name, inode = 0, "", 0
        for word in words:
            folder, name = inode, word
            found = self._now.entries[folder].get(word)
            if found is None:
                assert word == words[-1], f"{path} lies in no folder"
                return folder, name, None
            inode = found
        return folder, name, inode

    def _do(self, step: Step) -> None:
        step = replace(step, rank=self._rank)
        self.steps.append(step)
        self._now.apply(step)

    def _names(self, *names: tuple[int, str, int | None]) -> None:
        self._do(Step("names", names[-1][0], names=names))

    def _add(self, operation: Operation) -> None:
        folder, name, inode = self._find(operation.path)
        if operation.name in ("open", "mkdir"):
            self._create(operation, folder, name, inode)
        elif operation.name == "fsync":
            self._durable |= {
                i
                for i, step in enumerate(self.steps)
                if step.synced == inode and (not self._apart or step.rank == operation.rank)
            }
        elif operation.name in ("unlink", "rmdir"):
            self._names((folder, name, None))
        elif operation.name == "link":
            self._names((*self._find(operation.second)[:2], inode))
        elif operation.name == "rename":
            self._names((folder, name, None), (*self._find(operation.second)[:2], inode))
        elif operation.name == "exchange":
            other_folder, other_name, other = self._find(operation.second)
            self._names((folder, name, other), (other_folder, other_name, inode))
        else:
            assert inode is not None, f"{operation} of a file that was never made"
            self._write(operation, inode)

    def _create(self, operation: Operation, folder: int, name: str, inode: int | None) -> None:
        if inode is None:
            made = self._new(self._now, operation.name == "mkdir")
            # Content and entries begin empty on disk; only the name can be lost.
            if made in self._now.entries:
                self.first.entries[made] = {}
            else:
                self.first.content[made] = bytearray()
            self._names((folder, name, made))
        elif operation.name == "open" and operation.size & os.O_TRUNC:
            self._do(Step("size", inode, inode))

    def _write(self, operation: Operation, inode: int) -> None:
        size = len(self._now.content[inode])
        if operation.name == "write":
            end = operation.offset + operation.size
        elif operation.name == "fallocate":
            end = max(size, operation.offset + operation.size)
        else:
            assert operation.name == "truncate", operation
            self._do(Step("size", inode, inode, size=operation.size))
            return
        if end > size:
            self._do(Step("size", inode, inode, size=end))
        for at in range(0, len(operation.data), BLOCK):
            data = operation.data[at : at + BLOCK]
            self._do(Step("data", inode, inode, operation.offset + at, data=data))

    def check(self) -> None:
        """The replay of everything equals what lies on disk: no operation was missed."""
        for path, content in self._now.tree(0):
            real = Path(self._root + path)
            assert real.is_dir() if content is None else real.read_bytes() == content, path
        found = {path for path, _ in self._now.tree(0)}
        real_paths = {str(each)[len(self._root) :] for each in Path(self._root).rglob("*")}
        assert found == real_paths, found ^ real_paths

    def states(self, draw: random.Random) -> Iterator[tuple[int, Disk]]:
        """(moment, disk) for the subsets of what is in flight at each moment, each subset once."""
        seen: set[tuple[frozenset[int], bool]] = set()
        for moment, (count, durable) in enumerate(self.moments):
            in_flight = [i for i in range(count) if i not in durable]
            for taken in subsets(in_flight, draw):
                key = (durable | taken, moment == len(self.moments) - 1)
                if key not in seen:
                    seen.add(key)
                    yield moment, self._disk(durable | taken, count)

    def _disk(self, taken: frozenset[int], count: int) -> Disk:
        disk = self.first.copy()
        for i in range(count):
            if i in taken:
                disk.apply(self.steps[i])
        return disk


def subsets(steps: Sequence[int], draw: random.Random) -> Iterator[frozenset[int]]:
    """All subsets of a few steps; of many those without one, with one, prefixes and random ones."""
    if len(steps) <= 6:
        for n in range(len(steps) + 1):
            yield from map(frozenset, itertools.combinations(steps, n))
        return
    everything = frozenset(steps)
    for i, step in enumerate(steps):
        yield frozenset(steps[:i])
        yield everything - {step}
        yield frozenset({step})
    yield everything
    for _ in range(SUBSETS):
        share = draw.random()
        yield frozenset(step for step in steps if draw.random() < share)


@dataclass
class Loss:
    """How many different states there are, and those that lost a version."""

    states: int = 0
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.states} states after a power loss, {len(self.lost)} lost"
        return "\n  ".join([head, *self.lost])


def lose_power(
    case: Case,
    folder: Path,
    limit: int | None = None,
    operations: Sequence[Operation] | None = None,
) -> Loss:
    """Read every state that a write can leave when power is lost.

    A state before the verb returned may hold the old or the new version, a later one the new one.

    Args:
        case: The verb.
        folder: An empty folder, by its real path.
        limit: Of the states that are read, chosen at random; None reads all.
        operations: What ranks did in folder/root, over a copy of folder/before; None records it.
    """
    root, draw = folder / "root", random.Random(0)
    if operations is None:
        operations = record(case, folder)
    recording = Recording(root, folder / "before", operations, case.apart)
    recording.check()
    found: dict[tuple[bytes, bool], tuple[int, Tree]] = {}
    for moment, disk in recording.states(draw):
        tree = list(disk.tree(0))
        digest = hashlib.sha256(repr(tree).encode()).digest()
        found.setdefault((digest, moment == len(operations)), (moment, tree))
    states = list(found.values())
    if limit is not None and limit < len(states):
        states = draw.sample(states, limit)
    loss = Loss()
    for loss.states, (moment, tree) in enumerate(states, 1):
        returned = moment == len(operations)
        put(tree, root)
        allowed = {case.target} if returned else {case.last, case.target}
        if text := read_back(case, root, allowed):
            after = "the return" if returned else operations[moment - 1] if moment else "nothing"
            loss.lost.append(f"after {after}: {text}")
    return loss


def record(case: Case, folder: Path) -> list[Operation]:
    """The operations of a write in folder/root, over a copy of folder/before."""
    root, before = folder / "root", folder / "before"
    before.mkdir(parents=True)
    for version in case.before:
        case.write(before, version)
    shutil.copytree(before, root)
    shim.arm(root, log=folder / "log", disk=case.disk)
    try:
        case.write(root, case.target)
    finally:
        shim.disarm()
    seen = shim.read_log(folder / "log")
    return [*seen, *case.unseen(seen)]


def put(tree: Tree, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, content in tree:
        if content is None:
            os.mkdir(f"{root}{path}")
        else:
            Path(f"{root}{path}").write_bytes(content)


def read_back(case: Case, root: Path, allowed: set[int | None]) -> str:
    """What is wrong with a state; '' where nothing is."""
    try:
        version = case.newest(root)
        if version not in allowed:
            return f"found version {version}, expected one of {allowed}"
        case.write(root, case.following)
        version = case.newest(root)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if version == case.following else f"the next write left version {version}"
