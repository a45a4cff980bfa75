"""What of earlier saves is refused, kept or removed: `keep=`, `latest`, files that are not ours.

Deleting is the most dangerous thing that a library does. A folder is removed only if its name has
the same stem and a number, and it is complete. It must hold nothing but what dist_ema wrote.
Numbers beyond the new one belong to a run that was rewound, and stay. Files that dist_ema did not
write (config, tokenizer, card) are kept.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from . import atomic, disk, manifest, pointers, safetensors, strict_json, versions
from .leases import LeaseWatch

__all__ = [
    "advance",
    "carry_over",
    "companions",
    "foreign",
    "refuse",
    "refuse_form",
    "refuse_pickle",
    "remove_leftovers",
]


_CLOCK = re.compile(r"[0-9]{10,}(\.[0-9]+)?")  # as `ema.snapshot` names its folders


def refuse(path: Path, keep: int) -> None:
    """Raise ValueError, before anything is written, where `advance` would have to."""
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep must be a whole number of saves, at least 1, got {keep!r}.")
    stem, number = _split(path.name)
    if number < 0:
        raise ValueError(
            f"keep={keep} needs a name that ends in a number, like ema-001000, got {path.name}."
        )
    latest = path.parent / pointers.LATEST
    if os.path.lexists(latest):
        name = pointers.named(latest)
        if name is None or _split(name)[0] != stem:
            raise ValueError(
                f"{latest} exists and names no {stem}NUMBER: it is not ours to replace. Save with "
                "keep= into a folder of its own."
            )


def refuse_pickle(path: Path) -> None:
    """Raise ValueError for a name that would be that of a folder, and is that of a pickle."""
    if path.suffix in safetensors.PICKLES and not path.is_dir():
        raise ValueError(
            f"{path} is named as a pickle, and safetensors are written. Name {path.stem} for a "
            f"folder, or {path.stem}.safetensors for one file."
        )


def refuse_form(path: Path, one_file: bool, *, ships: bool) -> None:
    """Raise ValueError where what is to be written must not replace what is there.

    Args:
        path: What is there.
        one_file: A file is to be written, else a folder.
        ships: A model to ship is to be written, which must not replace an average to resume from.
    """
    if one_file and path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, or a folder without the suffix.")
    if not one_file and not path.is_dir():
        raise ValueError(
            f"{path} is a file. Give a folder; a model to ship may also have a name that ends in "
            ".safetensors."
        )
    if ships and not one_file and _is_resumable(path):
        raise ValueError(
            f"{path} is an average to resume from: replaced, its clock would be lost. Choose "
            "another path."
        )


def _is_resumable(path: Path) -> bool:
    try:
        saved = manifest.read(path)
    except (OSError, ValueError):
        return False
    return saved is not None and saved.kind == "ema"


def advance(
    path: Path, keep: int, leases: LeaseWatch | None = None, keep_at_most: int = 0
) -> list[str]:
    """Point to the published `path`, and remove all but the last `keep` saves up to its number.

    Args:
        path: The save.
        keep: How many stay, this one included.
        leases: The leases of published versions: what is leased stays too, and so does the best.
        keep_at_most: How many stay with them.

    Returns:
        A sentence for every save that should have been removed and was not.
    """
    # First, so that `latest` never names a save that goes.
    pointers.point(path)
    names = [name for name in os.listdir(path.parent) if _precedes(name, path.name)]
    newest_first = sorted(names, key=lambda name: (_split(name)[1], name), reverse=True)
    folders = [path.parent / name for name in newest_first if name != path.name]
    old = [folder for folder in folders if _is_save(folder, leases is not None)][keep - 1 :]
    if leases is not None:
        # The best version stays, however old it is.
        best = pointers.named(path.parent / pointers.BEST)
        old = [folder for folder in old if folder.name != best]
        try:
            stays = leases.retire([folder.name for folder in old])
        except OSError as error:
            return [f"{path.parent}: versions beyond keep={keep} stay for now: {error}."]
        leased = [folder for folder in old if folder.name in stays][: keep_at_most - keep]
        old = [folder for folder in old if folder not in leased]
    return [remark for folder in old if (remark := _retire(folder)) is not None]


def remove_leftovers(path: Path) -> None:
    """Finish or remove what killed saves left whose stem is that of `path`, up to its number.

    The saves of a run have one writer, this one.
    """
    for name in os.listdir(path.parent):
        leftover = re.fullmatch(r"\.(.+)\.(gone|old|tmp)-[0-9a-f]{32}", name, re.DOTALL)
        if leftover is None:
            continue
        if not (_precedes(leftover[1], path.name) or _is_earlier(leftover[1], path.name)):
            continue
        if leftover[2] == "gone":
            disk.remove(path.parent / name)
        else:
            atomic.recover(path.parent / leftover[1])
            atomic.remove_leftovers(path.parent / leftover[1])


def _split(name: str) -> tuple[str, int]:
    """ema-001000 -> ('ema-', 1000); -1 where there is no number."""
    match = re.fullmatch(r"(.*?)([0-9]+)", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, -1)


def _precedes(name: str, last: str) -> bool:
    """Whether it is the name of a save of the same run, up to the number of the `last` one."""
    (stem, number), (last_stem, last_number) = _split(name), _split(last)
    return stem == last_stem and 0 <= number <= last_number


def _is_earlier(name: str, last: str) -> bool:
    """Whether both are the clocks of snapshots, which may have fractions, in this order."""
    return all(map(_CLOCK.fullmatch, (name, last))) and float(name) <= float(last)


def _is_save(folder: Path, published: bool) -> bool:
    """Whether it is a folder that `save` or `publish` completed, and no link to one."""
    # What a link leads to may belong to another run.
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        saved = manifest.read(folder)
        if saved is None or not saved.files or saved.problems():
            return False
        if versions.facts_of(saved) is None if published else saved.kind != "ema":
            return False
        paths = {folder / name: entry["size"] for name, entry in saved.files.items()}
        return all(
            not path.is_symlink() and safetensors.read_header(path).size == size
            for path, size in paths.items()
        )
    except (OSError, ValueError):
        return False


def _retire(folder: Path) -> str | None:
    """Rename a save, so that no reader finds half of it, and remove it. Returns what failed."""
    try:
        saved = manifest.read(folder)
        facts = (versions.facts_of(saved) if saved is not None else None) or {}
        ours = {*facts.get("beside", ()), *facts.get("texts", ())}
        others = [name for name in foreign(folder) if name not in ours]
        if others:
            return (
                f"{folder} is kept beyond keep=: it holds {', '.join(others[:3])}, which "
                "ema.save() did not write."
            )
        gone = atomic.temporary_sibling(folder, "gone")
        os.rename(folder, gone)
        disk.sync(folder.parent)  # or a crash could undo the rename of a folder that lacks files
        shutil.rmtree(gone)
    except OSError as error:
        return f"{folder} should have gone by keep=, and could not be removed: {error}."
    return None


# --- files that dist_ema did not write ------------------------------------------------------------


_OF_A_SAVE = re.compile(
    r"(averages/[^/]+/)?(model(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?"
    rf"|{re.escape(safetensors.ADAPTER)})"
)
WEIGHTS = (
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".index.json",
    ".msgpack",
    ".pt",
    ".pth",
    ".safetensors",
)


def foreign(folder: Path, temporary: Path | None = None) -> list[str]:
    """The files in a save that dist_ema did not write.

    Where ema.json is damaged, those are ours that have the names of a save.

    temporary: A folder of the next save, which may lie inside.
    """
    listed: Collection[str] = ()
    is_ours = True  # ema.json
    with suppress(OSError, ValueError):
        values = strict_json.read_json(folder / manifest.META)
        is_ours = "format" in values
        listed = manifest.Manifest.from_json(values).files
    indexes = {(Path(name).parent / safetensors.INDEX).as_posix() for name in listed}
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not _is_of_nfs(path)
        and temporary not in path.parents
        and path.name != safetensors.ADAPTER_CONFIG
    }
    ours = {*listed, *indexes} if listed else set(filter(_OF_A_SAVE.fullmatch, present))
    if is_ours:
        ours.add(manifest.META)
    return sorted(present - ours)


def companions(folder: Path) -> list[str]:
    """The files of a model that hold no weights: a config, a tokenizer."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted(
        name
        for name in names
        if not name.endswith(WEIGHTS) and not name.startswith((".", manifest.META))
    )


def carry_over(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Link or copy what lies in the folder `old` into `new`, which will take its place.

    Args:
        old: The folder that is in place.
        new: The complete new version; what it holds already stays.
        replaced: The names of the model files in `old`, which end with it.
    """
    # An exchange of the folders exchanges their permissions too.
    shutil.copymode(old, new)
    for path in sorted(old.iterdir()):
        if path.name in replaced or (new / path.name).exists() or path == new or _is_of_nfs(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=disk.link_or_copy)
        else:
            disk.link_or_copy(path, new / path.name)


def _is_of_nfs(path: Path) -> bool:
    """NFS keeps a removed file as .nfsID while a process reads it."""
    return path.name.startswith(".nfs")
