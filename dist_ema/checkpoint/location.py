"""`Location`: where a saved model lies: its folder, its index, its aliases, its ema.json. No torch.

A folder that `ema.save` wrote has an ema.json. Any other safetensors model has none: an export as
one file, a Hugging Face folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from . import atomic, manifest, pointers, safetensors

__all__ = ["Aliases", "Location", "locate", "refuse_unlisted", "with_aliases"]

Aliases = dict[str, list[str]]  # name in the file -> further names of the same weight


class Location(NamedTuple):
    """A saved model at a path, as JSON values, of which ranks compare a hash."""

    folder: str
    model: str  # the index, or the only file
    aliases: Aliases
    manifest: dict[str, Any] | None  # ema.json; None too where one file of its folder is named
    listed: dict[str, dict[str, Any]]  # size and check sum of the files, as far as they are known


def locate(path: Path, read_headers: bool = True) -> Location:
    """Find a model.

    Args:
        path: A folder or a file.
        read_headers: Compare ema.json with the headers of the files too.

    Raises:
        ValueError: It is no model, or an ema.json is not sound.
    """
    path = atomic.whole(pointers.resolve(path))
    if not path.exists():
        raise ValueError(
            f"{path} does not exist: there is no folder and no file to read an average from."
        )
    if not path.is_dir():
        return _locate_file(path)
    saved = manifest.read(path)
    if saved is None:
        if (path / "averages").exists():
            raise ValueError(
                f"{path} holds further averages, and no {manifest.META}: it is not all of what "
                "ema.save() wrote."
            )
        return Location(str(path), safetensors.find_model(path), {}, None, {})
    headers = manifest.read_files(path, saved) if read_headers else None
    manifest.refuse_damaged(path, saved, headers)
    return Location(
        str(path),
        safetensors.find_model(path),
        saved.aliases,
        saved.to_json(),
        saved.files_of(""),
    )


def _locate_file(path: Path) -> Location:
    """One file of a model, or its index. The ema.json beside it tells its check sum."""
    if path.name == manifest.META:
        raise manifest.folder_is_meant(path)
    saved = manifest.read(path.parent) or manifest.Manifest()
    if saved.files:
        manifest.refuse_damaged(path.parent, saved)
    aliases = {} if path.suffix == ".json" else _aliases_of_file(path, saved)
    listed = saved.files_of("")
    if path.name != safetensors.INDEX or len(listed) < 2:
        listed = {path.name: listed[path.name]} if path.name in listed else {}
    return Location(str(path.parent), path.name, aliases, None, listed)


def _aliases_of_file(path: Path, found: manifest.Manifest) -> Aliases:
    """Exports of one file keep aliases in its header, folders in the ema.json beside it."""
    header = safetensors.read_header(path)
    entries = header.entries
    aliases = manifest.group_aliases(
        {
            alias: name
            for alias, name in header.metadata.items()
            if name in entries and alias not in entries and alias != "format"
        }
    )
    if path.name in found.files:
        aliases |= {name: others for name, others in found.aliases.items() if name in entries}
    return aliases


def refuse_unlisted(
    folder: Path, files: dict[str, safetensors.SafetensorsFile], listed: dict[str, Any]
) -> None:
    """Raise ValueError unless the files of the model are those that were summed, and as long."""
    unlisted = sorted(files.keys() ^ listed.keys())
    if unlisted:
        raise ValueError(
            f"{folder} is damaged: {manifest.META} and the model's files disagree on "
            f"{', '.join(unlisted[:3])}. Restore the folder, or take an earlier save."
        )
    for name, file in files.items():
        if file.size != listed[name]["size"]:
            raise ValueError(
                f"{folder / name} is damaged: it holds {file.size} bytes, {manifest.META} says "
                f"{listed[name]['size']}. Restore the file, or take an earlier save."
            )


def with_aliases(where: Path, table: dict[str, Any], aliases: Aliases) -> dict[str, Any]:
    table = dict(table)
    for name, others in aliases.items():
        for other in others if name in table else ():
            if other in table:
                raise ValueError(
                    f"{where} is damaged: {other} is listed as another name of {name}, and is a "
                    "weight itself."
                )
            table[other] = table[name]
    return table
