"""`write_model`: a model laid out in shards, streamed to files by one process, summed, published.

No torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from .. import _version
from ..checkpoint import atomic, disk, manifest, pointers, retention, safetensors
from ..text import Tick, size_of
from . import model_card, sums

__all__ = ["lay_out", "refuse_place", "refuse_target", "write", "write_model"]

Files: TypeAlias = dict[str, safetensors.SafetensorsFile]


def lay_out(
    out: Path,
    entries: dict[str, safetensors.Entry],
    aliases: Mapping[str, str],
    max_shard_size: int | str | None = None,
    order: Sequence[str] | None = None,
) -> Files:
    """The files of a model, by name: those of a folder, or one if `out` ends in .safetensors.

    Args:
        out: The folder or file to write.
        entries: Dtype and shape of each weight.
        aliases: Further name -> weight. One file has them in its header, for want of an ema.json.
        max_shard_size: The size limit of each file in a folder, by default 5 GB.
        order: The order of the weights in the one file, by default our own.

    Raises:
        ValueError: `max_shard_size` is not a size, or the one file would be larger.
    """
    if out.suffix != ".safetensors":
        return safetensors.plan(entries, "5GB" if max_shard_size is None else max_shard_size)
    total = sum(entry.nbytes for entry in entries.values())
    if max_shard_size is not None and total > size_of(max_shard_size):
        raise ValueError(
            f"{out.name} is one file of {total} bytes, max_shard_size is {max_shard_size}. Name a "
            "folder."
        )
    return {out.name: safetensors.header(entries, dict(aliases), order)}


def refuse_place(read: str | Path, out: str | Path) -> None:
    """Raise ValueError where writing `out` would replace what is read, or write into it."""
    where, real = map(atomic.real, (out, pointers.follow(Path(read))))
    if where == real:
        raise ValueError(f"{out} is {read} itself. Name another path.")
    if real in where.parents:
        raise ValueError(f"{out} lies inside {read}. Name a path outside of it.")
    if where in real.parents:
        raise ValueError(f"{read} lies inside {out}, which would be replaced. Name another path.")


def refuse_target(path: Path, force: bool, temporary: Path | None = None) -> None:
    """Raise ValueError where `path` may not be written. A link stands for what it leads to.

    With force only a model is replaced; what lies beside it stays. temporary: A folder of the next
    version, which may lie inside.
    """
    path = atomic.real(path)
    if path.is_symlink():
        raise ValueError(f"{path} is a link that leads to itself. Name another path.")
    retention.refuse_pickle(path)
    if not path.exists():
        return
    if not force:
        raise ValueError(f"{path} exists. Pass force=True to replace it, or name another path.")
    retention.refuse_form(path, path.suffix == ".safetensors", ships=True)
    if path.is_dir() and set(path.iterdir()) - {temporary} and not any(path.glob("*.safetensors")):
        raise ValueError(
            f"{path} holds files but no model: it is not ours to replace. Choose another path."
        )


def write_model(
    out: Path,
    entries: dict[str, safetensors.Entry],
    aliases: Mapping[str, str],
    content: Callable[[Sequence[str]], Iterable[sums.FileWindow]],
    facts: manifest.Manifest,
    *,
    beside: Path | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
    tick: Tick = lambda count: None,
    check: Callable[[], object] = lambda: None,
) -> manifest.Manifest:
    """Write a model to ship, laid out as Hugging Face does. Returns its ema.json, without files.

    Args:
        out: A folder, or a file that ends in .safetensors.
        entries: Dtype and shape of each weight.
        aliases: Further name -> weight.
        content: As for `write`.
        facts: The ema.json, as far as `entries` and `aliases` do not tell it.
        beside: A model whose config, tokenizer and card a folder gets.
        max_shard_size: The size limit of each file in a folder, by default 5 GB.
        force: Replace a model at `out`.
        tick: Receives how many bytes were written.
        check: As for `write`.
    """
    out = atomic.real(out)  # through a link
    full = replace(
        facts,
        kind="export",
        aliases=manifest.group_aliases(aliases),
        versions={"dist_ema": _version.VERSION},
    )
    write(
        out,
        lay_out(out, entries, aliases, max_shard_size),
        content,
        full,
        beside={} if beside is None else model_card.beside(beside, out, full, entries),
        force=force,
        tick=tick,
        check=check,
    )
    return full


def write(
    path: Path,
    files: Files,
    content: Callable[[Sequence[str]], Iterable[sums.FileWindow]],
    facts: manifest.Manifest,
    *,
    beside: Mapping[str, bytes | Path] = MappingProxyType({}),
    index: str = safetensors.INDEX,
    force: bool = False,
    tick: Tick = lambda count: None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write a folder, or one file if `path` ends in .safetensors.

    Atomic: a temporary sibling is written, synced, and renamed.

    Args:
        path: Where it goes.
        files: The files of the model, by name.
        content: Gives the bytes of weights in order, in any windows. It is asked once for the
            weights of each file, and must not change a window before that is released.
        facts: The ema.json of a folder, whose `files` are filled in here.
        beside: Other files of a folder: name -> content, or a file to copy.
        index: The name of a folder's index, where it holds several files.
        force: Replace a model at `path`.
        tick: Receives how many bytes were written.
        check: Called when they are; if it raises, nothing is put in place.

    Note:
        *Cost*: five times what `content` yields at a time.
    """
    refuse_target(path, force)
    with disk.disk_errors(path, sum(file.size for file in files.values())):
        disk.ensure(path.parent)
        # Before leftovers go: one of them may be the only whole version.
        atomic.recover(path)
        atomic.remove_leftovers(path)
        with atomic.temporary_folder(path) as folder:
            sizes_and_sums = {
                name: _write_file(folder / name, file, content, tick)
                for name, file in files.items()
            }
            # What was read may be damaged; then nothing is put in place.
            check()
            refuse_target(path, force, folder)  # once more, for what has come meanwhile
            if path.suffix == ".safetensors":
                atomic.publish(folder / next(iter(files)), path)
                disk.remove(folder)
                return
            texts = {**beside, manifest.META: replace(facts, files=sizes_and_sums).to_bytes()}
            # A single shard of a pattern is found through its index only.
            if len(files) > 1 or any(map(safetensors.is_shard, files)):
                texts[index] = safetensors.index(files)
            for name, text in texts.items():
                if isinstance(text, Path):
                    shutil.copyfile(text, folder / name)
                else:
                    (folder / name).write_bytes(text)
                disk.sync(folder / name)
            if path.is_dir():
                retention.carry_over(path, folder, _names_of_model(path) | {manifest.META})
            for inner in {file.parent for file in folder.rglob("*")}:
                disk.sync(inner)
            atomic.publish(folder, path)


def _write_file(
    path: Path,
    file: safetensors.SafetensorsFile,
    content: Callable[[Sequence[str]], Iterable[sums.FileWindow]],
    tick: Tick,
) -> dict[str, Any]:
    """Returns its line in ema.json: size and sums."""
    # The header is written by the caller's thread, windows by that of `FileSums`.
    written = len(file.head)
    with open(path, "wb") as handle:
        # Before the first byte, so that a full disk is found now.
        disk.reserve(handle.fileno(), file.size)
    target = disk.Target(path)

    def write_next(window: sums.FileWindow) -> None:
        nonlocal written
        target.write(window.data.data, written)
        written += len(window.data)

    with closing(target), sums.FileSums(file.head, True, write_next) as file_sums:
        target.write(memoryview(file.head), 0)
        for window in content(safetensors.in_order(file.entries)):
            file_sums.add(window)
            tick(len(window.data))
        line = {"size": file.size, **file_sums.to_json()}
        target.sync()
    assert written == file.size, f"{path.name} is {file.size} bytes, its content was not"
    return line


def _names_of_model(folder: Path) -> set[str]:
    """The files and index of the weights, by Hugging Face's names and by the index itself."""
    names = {file.name for file in folder.iterdir() if safetensors.is_model_name(file.name)}
    with suppress(OSError, ValueError):  # damaged: the usual names have to do
        names |= {safetensors.find_model(folder), *safetensors.read_model(folder)}
    return names
