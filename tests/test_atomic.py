"""A new version appears whole or not at all: every step of a publication is interrupted once, on a
real file system.

How to read a failure: `step` counts the system calls that were let through before the interruption;
`kind` is what is published, a folder or a file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ema.checkpoint import atomic, disk

KINDS = ["folder", "file"]


class Killed(BaseException):
    """The process ends here."""


def make(path: Path, kind: str, text: str) -> Path:
    if kind == "file":
        path.write_text(text)
        return path
    (path / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (path / name).write_text(text)
    return path


def read(path: Path) -> str:
    """What stands at `path`, complete or not at all."""
    if path.is_file():
        return path.read_text()
    assert sorted(str(each.relative_to(path)) for each in path.rglob("*")) == ["a", "sub", "sub/b"]
    texts = {(path / name).read_text() for name in ("a", "sub/b")}
    assert len(texts) == 1, "half old, half new"
    return texts.pop()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without RENAME_EXCHANGE."""
    monkeypatch.setattr(atomic, "exchange", lambda a, b: False)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """End the process at the step-th rename, fsync or removal. Returns how many calls came."""
    count = 0

    def patch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == step:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    names = ("rename", "replace", "link", "fsync")
    for module, name in (*((os, name) for name in names), (shutil, "rmtree"), (atomic, "exchange")):
        patch(module, name)
    return lambda: count


# --- publish --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_new_path(kind: str, tmp_path: Path) -> None:
    """To a path that does not exist: one rename, nothing left over."""
    path = tmp_path / "ema-1"
    atomic.publish(make(atomic.temporary_sibling(path), kind, "new"), path)
    assert (read(path), names(tmp_path)) == ("new", ["ema-1"])


@pytest.mark.parametrize("kind", KINDS)
def test_exchange(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an existing path: exchanged by one call, with no moment at which nothing stands
    there.
    """
    a, b = make(tmp_path / "a", "file", "a"), make(tmp_path / "b", "file", "b")
    if not atomic.exchange(a, b):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert (read(a), read(b)) == ("b", "a")
    path = (
        make(tmp_path / "run" / "ema", "folder", "old")
        if kind == "folder"
        else make(tmp_path / "ema", kind, "old")
    )
    new = make(atomic.temporary_sibling(path), kind, "new")
    monkeypatch.setattr(os, "rename", None)  # two renames would raise
    atomic.publish(new, path)
    assert read(path) == "new"
    assert [name for name in names(path.parent) if name.startswith(".")] == []


def test_exchange_says_what_failed(tmp_path: Path) -> None:
    """An error that is no missing support is raised with the path, not taken for one."""
    a = make(tmp_path / "a", "file", "a")
    with pytest.raises(FileNotFoundError, match="missing"):
        atomic.exchange(a, tmp_path / "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_two_renames(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RENAME_EXCHANGE: of folders the old aside, the new in, the old removed; files by one
    call.
    """
    no_exchange(monkeypatch)
    if kind == "file":
        monkeypatch.setattr(os, "rename", None)
    path = make(tmp_path / "ema", kind, "old")
    atomic.publish(make(atomic.temporary_sibling(path), kind, "new"), path)
    assert (read(path), names(tmp_path)) == ("new", ["ema"])


@pytest.mark.parametrize("exchange", [True, False])
def test_another_kind(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder takes the place of a file, and of a link, whose target is not touched."""
    if not exchange:
        no_exchange(monkeypatch)
    target = make(tmp_path / "target", "folder", "kept")
    (tmp_path / "link").symlink_to(target)
    for path in (make(tmp_path / "ema", "file", "old"), tmp_path / "link"):
        atomic.publish(make(atomic.temporary_sibling(path), "folder", "new"), path)
        assert read(path) == "new"
    assert names(tmp_path) == ["ema", "link", "target"]
    assert read(target) == "kept"


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name in the working folder: its parent is `.`"""
    monkeypatch.chdir(tmp_path)
    for text in ("old", "new"):
        atomic.publish(make(atomic.temporary_sibling(Path("ema")), "folder", text), Path("ema"))
        atomic.recover(Path("ema"))
        atomic.remove_leftovers(Path("ema"))
    assert (read(Path("ema")), names(tmp_path)) == ("new", ["ema"])


def test_the_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old version is back at once, for foreign readers."""
    path, real, calls = make(tmp_path / "ema", "folder", "old"), os.rename, []

    def rename(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "second rename")
        real(a, b)

    new = make(atomic.temporary_sibling(path), "folder", "new")
    no_exchange(monkeypatch)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="second rename"):
        atomic.publish(new, path)
    assert (read(path), read(new), len(names(tmp_path))) == ("old", "new", 2)


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_step(
    kind: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any rename, fsync or removal: after `recover` the old or the new stands there,
    whole; then nothing is left over. Recovery itself is interrupted at every step too.
    """
    seen = set()
    for step in range(30):
        for again in range(8):
            folder = tmp_path / f"{step}-{again}"
            folder.mkdir()
            path = make(folder / "ema", kind, "old")
            new = make(atomic.temporary_sibling(path), kind, "new")
            with monkeypatch.context() as patch:
                if not exchange:
                    no_exchange(patch)
                calls = kill_at(patch, step)
                killed = _runs_into_death(lambda: atomic.publish(new, path))  # noqa: B023
                assert killed == (calls() > step)
            with monkeypatch.context() as patch:
                kill_at(patch, again)
                _runs_into_death(lambda: atomic.recover(path))  # noqa: B023
            atomic.recover(path)
            seen.add(read(path))
            assert killed or read(path) == "new"
            atomic.remove_leftovers(path)
            assert names(folder) == ["ema"]
        if not killed:
            break
    assert not killed, "there are more steps than this test goes through"
    assert step >= (3 if exchange or kind == "file" else 5)
    assert seen == {"old", "new"}


def _runs_into_death(work: Callable[[], None]) -> bool:
    try:
        work()
    except Killed:
        return True
    return False


def test_recover_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short between the two renames: readers take the complete new version where it lies, and
    rename nothing; the next writer puts it in place and removes the old one.
    """
    path = _cut_between_renames(tmp_path, "ema", monkeypatch)
    before = names(tmp_path)
    assert read(atomic.whole(path)) == "new"
    assert names(tmp_path) == before
    atomic.recover(path)
    assert (read(path), names(tmp_path)) == ("new", ["ema"])


def test_recover_undoes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and the new version was removed: the old one comes back."""
    path = _cut_between_renames(tmp_path, "ema", monkeypatch)
    for new in tmp_path.glob(".ema.tmp-*"):
        shutil.rmtree(new)
    assert read(atomic.whole(path)) == "old"
    atomic.recover(path)
    assert (read(path), names(tmp_path)) == ("old", ["ema"])


def _cut_between_renames(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = make(folder / name, "folder", "old")
    new = make(atomic.temporary_sibling(path), "folder", "new")
    renames, real = [], os.rename

    def once(a: Path, b: Path) -> None:
        if renames:
            raise Killed
        renames.append(a)
        real(a, b)

    with monkeypatch.context() as patch:
        no_exchange(patch)
        patch.setattr(os, "rename", once)
        with pytest.raises(Killed):
            atomic.publish(new, path)
    assert not path.exists()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_recover_of_nothing(kind: str, tmp_path: Path) -> None:
    """Nothing was interrupted: nothing changes, and a path that never was is not made."""
    path = make(tmp_path / "ema", kind, "here")
    atomic.recover(path)
    atomic.recover(tmp_path / "never")
    assert (read(path), names(tmp_path)) == ("here", ["ema"])


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_disk_does_not_confirm(
    kind: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync behind the rename fails: the new version stays, the earlier folder too, and the
    error says so. The next write succeeds and leaves nothing.
    """
    path = make(tmp_path / "ema", kind, "old")
    real, calls = os.fsync, []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    if not exchange:
        no_exchange(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with (
            pytest.raises(atomic.NotDurableError, match="its durability is not certain") as caught,
            atomic.temporary_folder(path) as folder,
        ):
            (folder / "sub").mkdir()
            for name in ("a", "sub/b"):
                (folder / name).write_text("new")
            atomic.publish(folder if kind == "folder" else folder / "a", path)
    assert caught.value.filename == str(path)
    assert read(path) == "new"
    earlier = [each for each in tmp_path.iterdir() if each != path]
    if kind == "folder":
        assert str(earlier[0]) in str(caught.value)
        assert read(earlier[0]) == "old"
    atomic.recover(path)
    atomic.remove_leftovers(path)
    assert (read(path), names(tmp_path)) == ("new", ["ema"])


def forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder that cannot be renamed, and a complete new version inside it."""
    path = make(folder / "ema", "folder", "old")
    (path / "stale").write_text("old")
    monkeypatch.setattr(os.path, "ismount", lambda each: each == path)
    with atomic.temporary_folder(path) as new:
        (new / "sub").mkdir()
        for name in ("a", "sub/b"):
            (new / name).write_text("new")
    return path, new


def test_rolled_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point keeps its folder.

    Killed at any step, readers find a whole version, and the next writer finishes.
    """
    seen = set()
    for step in range(30):
        (tmp_path / str(step)).mkdir()
        path, new = forward(tmp_path / str(step), monkeypatch)
        inode = path.stat().st_ino
        with monkeypatch.context() as patch:
            calls = kill_at(patch, step)
            killed = _runs_into_death(lambda: atomic.publish(new, path))  # noqa: B023
            assert killed == (calls() > step)
        where = atomic.whole(path)
        seen.add((where / "a").read_text())
        assert (where / "a").read_text() == (where / "sub" / "b").read_text(), "half old, half new"
        for again in range(3):  # the next writer is killed too
            with monkeypatch.context() as patch:
                kill_at(patch, 2 * again)
                _runs_into_death(lambda: atomic.recover(path))  # noqa: B023
        atomic.recover(path)
        atomic.remove_leftovers(path)
        assert (path / "a").read_text() == (where / "a").read_text() if where == path else "new"
        assert path.stat().st_ino == inode
        if not killed:
            break
    assert not killed, "there are more steps than this test goes through"
    assert read(path) == "new", "nothing else is left"
    assert seen == {"old", "new"}
    assert step >= 6


def test_a_stale_file_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rolled forward: it would be part of the new version, so readers keep to the one inside."""
    path, new = forward(tmp_path, monkeypatch)
    real = Path.unlink

    def unlink(each: Path, *args: Any, **options: Any) -> None:
        if each.name == "stale":
            raise OSError(errno.EIO, "the disk fails", str(each))
        real(each, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(OSError, match="the disk fails"):
            atomic.publish(new, path)
    assert read(atomic.whole(path)) == "new"
    assert (path / "stale").exists()
    atomic.recover(path)
    assert read(path) == "new"


def test_rolled_forward_is_durable_before_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power lost in between would leave the version inside without some of its files."""
    path, new = forward(tmp_path, monkeypatch)
    calls: list[str] = []
    for module, name in ((os, "rename"), (disk, "sync"), (disk, "remove")):
        real = getattr(module, name)

        def call(*args: Any, real: Any = real, name: str = name) -> None:
            calls.append(f"{name} {' '.join(each.name for each in args)}")
            real(*args)

        monkeypatch.setattr(module, name, call)
    atomic.publish(new, path)
    token = new.name[-32:]
    assert calls[-3:] == [f"rename .new-{token} .tmp-{token}", "sync ema", f"remove .tmp-{token}"]


def test_rolled_forward_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index and ema.json get their names after the files that they name, so that none names a
    missing file.
    """
    path, new = forward(tmp_path, monkeypatch)
    for name in ("ema.json", "z"):
        (new / name).write_text("new")
    real, order = os.replace, []

    def replace(source: Path, target: Path) -> None:
        order.append(target.name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    atomic.publish(new, path)
    assert order == ["a", "b", "z", "ema.json"]


def test_a_reader_comes_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay elsewhere is gone when it is opened, because the writer has put it in place: read
    again.
    """
    path, real = make(tmp_path / "ema", "folder", "new"), atomic.whole
    places = iter([tmp_path / "gone", path])
    monkeypatch.setattr(atomic, "whole", lambda _: next(places))
    assert atomic.read_one_version(path, texts) == {"new"}
    monkeypatch.setattr(atomic, "whole", real)
    with pytest.raises(FileNotFoundError, match="never"):
        atomic.read_one_version(tmp_path / "never", texts)


def texts(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "sub/b")}


def test_errors_that_name_a_path_keep_it(tmp_path: Path) -> None:
    """Only what names none gets one, and a full disk its bytes."""
    for name, want in (("b", f"{tmp_path}/b"), (None, f"{tmp_path}/a")):
        with pytest.raises(OSError, match="error") as caught, disk.disk_errors(tmp_path / "a", 9):
            raise OSError(
                errno.EIO, os.strerror(errno.EIO), *([f"{tmp_path}/{name}"] if name else [])
            )
        assert (caught.value.filename, caught.value.errno) == (want, errno.EIO)


# --- leftovers ------------------------------------------------------------------------------------

AWKWARD = [
    "ema",
    "ema[1]",
    "e*a",
    "e?a",
    "[!x]",
    "ema]",
    "a b",
    "é",
    ".hidden",
    "ema.tmp-1",
    "ema.old-1",
]


@pytest.mark.parametrize("name", AWKWARD)
def test_sweep_takes_its_own(name: str, tmp_path: Path) -> None:
    """sweep removes what died writers of this name left, whatever characters are in it, and of no
    other name.
    """
    others = ["ema1", "exa", "x", "ema", "ema.tmp", "emaX", *AWKWARD]
    for other in {*others} - {name}:
        make(atomic.temporary_sibling(tmp_path / other), "folder", "theirs")
    before = names(tmp_path)
    make(atomic.temporary_sibling(tmp_path / name), "folder", "mine")
    make(atomic.temporary_sibling(tmp_path / name), "file", "mine")
    atomic.remove_leftovers(tmp_path / name)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", AWKWARD)
def test_recover_takes_its_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recover finishes what was interrupted under this name, and under no other."""
    path = _cut_between_renames(tmp_path, name, monkeypatch)
    before = names(tmp_path)
    for other in {*AWKWARD, "exa", "ema1"} - {name}:
        atomic.recover(tmp_path / other)
    assert names(tmp_path) == before
    atomic.recover(path)
    assert (read(path), names(tmp_path)) == ("new", [name])


def test_temporary(tmp_path: Path) -> None:
    """A hidden sibling, on the same file system, another one each time."""
    found = {atomic.temporary_sibling(tmp_path / "ema") for _ in range(50)}
    assert len(found) == 50
    assert {path.parent for path in found} == {tmp_path}
    assert all(path.name.startswith(".ema.tmp-") for path in found)


def test_ensure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new folder is on disk before anything lies in it: the one above it is synced, once."""
    real, synced = os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1]
    )
    for _ in range(2):
        disk.ensure(tmp_path / "a" / "b" / "c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ValueError, match="file is a file, and a folder is needed there"):
            disk.ensure(path)


# --- races ---------------------------------------------------------------------------------------


def numbers(path: Path) -> set[int]:
    """What the files of a folder hold, of whatever versions."""
    return set(map(int, texts(path)))


SECONDS = float(os.environ.get("DIST_EMA_RACE_SECONDS", "2"))


@pytest.mark.parametrize("exchange", [True, False])
def test_readers_while_a_writer_replaces(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three readers get whole versions only, and none that is older than what the writer had
    returned before they began. They rename nothing: a version that a reader puts back would be
    stale. DIST_EMA_RACE_SECONDS=20 for the long run.
    """
    if not exchange:
        no_exchange(monkeypatch)
    path = make(tmp_path / "ema", "folder", "0")
    deadline, returned, errors, reads = time.monotonic() + SECONDS, [0], [], [0, 0, 0]

    def look(reader: int) -> None:
        while time.monotonic() < deadline and not errors:
            least = returned[0]
            try:
                found = atomic.read_one_version(path, numbers)
                assert len(found) == 1, f"half {found}"
                assert found.pop() >= least, f"a version before {least}, which had returned"
                reads[reader] += 1
            except BaseException as error:
                errors.append(error)

    readers = [threading.Thread(target=look, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    while time.monotonic() < deadline and not errors:
        number = returned[0] + 1
        atomic.recover(path)
        atomic.remove_leftovers(path)
        with atomic.temporary_folder(path) as folder:
            (folder / "sub").mkdir()
            for name in ("a", "sub/b"):
                (folder / name).write_text(str(number))
            atomic.publish(folder, path)
        assert read(path) == str(number), "the version that was written stands there"
        returned[0] = number
    for reader in readers:
        reader.join()
    assert errors == []
    assert returned[0] > 5
    assert min(reads) > 5


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 100_001])
def test_reserve(size: int, tmp_path: Path) -> None:
    """The file has its full size at once, on disk, and reads as zeros."""
    path = tmp_path / "a"
    with open(path, "wb") as file:
        disk.reserve(file.fileno(), size)
    assert path.read_bytes() == bytes(size)
    assert os.stat(path).st_blocks * 512 >= size


def test_reserve_finds_a_full_disk(tmp_path: Path) -> None:
    """What does not fit is found before anything is written: here a limit on the size of files, a
    real EFBIG.
    """
    code = (
        "import os, resource, sys; from dist_ema.checkpoint import disk\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "disk.reserve(fd, 1 << 16)\n"
        "from pathlib import Path\n"
        "try:\n    with disk.disk_errors(Path(sys.argv[1]), 70_000):\n"
        "        disk.reserve(fd, (1 << 16) + 1)\n"
        "except OSError as error:\n    print(error.errno, os.fstat(fd).st_size)\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True
    )
    first, text = done.stdout.splitlines()
    assert first.split() == [str(errno.EFBIG), str(1 << 16)]
    assert re.search(rf": 70 kB are needed, .* [GT]B are free: '{tmp_path}/a'$", text)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_reserve_where_it_cannot(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot reserve still gets a file of the right size."""

    def cannot(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    with open(tmp_path / "a", "wb") as file:
        disk.reserve(file.fileno(), 77)
    assert (tmp_path / "a").stat().st_size == 77


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_reserve_passes_on(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or quota is raised, not truncated over."""

    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with open(tmp_path / "a", "wb") as file, pytest.raises(OSError) as caught:  # noqa: PT011
        disk.reserve(file.fileno(), 77)
    assert caught.value.errno == code


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_write_loops(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may move less than asked (2 GiB at most): the rest follows, at the right offsets."""
    real, calls = os.pwrite, []

    def short(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        return real(fd, data[:most], offset)

    monkeypatch.setattr(os, "pwrite", short)
    numbers = (
        np.random.default_rng(0).standard_normal(25).astype(np.float32)
    )  # a view that counts elements, not bytes
    with open(tmp_path / "a", "wb") as file:
        disk.reserve(file.fileno(), 120)
        disk.write_at(file.fileno(), memoryview(numbers), 10)
    assert (tmp_path / "a").read_bytes() == bytes(10) + numbers.tobytes() + bytes(10)
    assert len(calls) == -(-100 // most)


def test_write_in_any_order(tmp_path: Path) -> None:
    """Ranks write their parts in their own order; nothing is nothing."""
    with open(tmp_path / "a", "wb") as file:
        disk.write_at(file.fileno(), b"weights", 4)
        disk.write_at(file.fileno(), b"head", 0)
        disk.write_at(file.fileno(), b"", 2)
    assert (tmp_path / "a").read_bytes() == b"headweights"


def test_windows_go_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[Note: pages] in commit: what is written is handed on when a window is full, and given back
    with the next one.
    """
    real, hints = os.posix_fadvise, []

    def spy(fd: int, begin: int, n: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        hints.append((begin, begin + n))
        real(fd, begin, n, advice)

    monkeypatch.setattr(os, "posix_fadvise", spy)
    monkeypatch.setattr(disk, "WINDOW", 1000)
    (tmp_path / "a").touch()
    target, data = disk.Target(tmp_path / "a"), bytes(range(250)) * 20
    for at in (600, 0, 1200, 1800, 2400, 3000, 3600, 4200, 4800):
        target.write(memoryview(data)[at : at + 600], at)
    target.sync()
    target.close()
    windows = [(0, 1200), (1200, 2400), (2400, 3600), (3600, 4800)]
    assert hints == [windows[0], *windows[:2], *windows[1:3], *windows[2:]]
    assert (tmp_path / "a").read_bytes() == data
