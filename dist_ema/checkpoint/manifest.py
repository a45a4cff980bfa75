"""ema.json: what a saved folder says about itself."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from .safetensors import is_file_name
from .strict_json import dump, parse_json, read_json

__all__ = ["FORMAT", "META", "changed", "group_aliases", "read_meta", "resumable", "stamp"]


FORMAT = 1


META = "ema.json"


def stamp(meta: dict[str, Any]) -> bytes:
    """ema.json, with the CRC-32 of everything else in it under "crc32". Raises ValueError for what JSON cannot hold."""
    try:
        told: dict[str, Any] = parse_json(
            dump(meta)
        )  # as it will be read: JSON makes texts of keys, and sorts those
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{META} cannot hold {brief(meta.get('extra', meta))}: {error}.") from None
    return dump(told | {"crc32": _check_meta(told)})


def changed(meta: dict[str, Any]) -> bool:
    """Whether ema.json says something else than `stamp` wrote, however the JSON is laid out."""
    return meta.get("crc32") != _check_meta(meta)


def _check_meta(meta: dict[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "crc32"}
    return f"{zlib.crc32(dump(rest)):08x}"


def group_aliases(aliases: Mapping[str, str]) -> dict[str, list[str]]:
    """name -> its further names, in their order, from further name -> name."""
    lists: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        lists.setdefault(name, []).append(alias)
    return lists


def read_meta(folder: Path) -> dict[str, Any]:
    """ema.json, its format checked. Raises ValueError."""
    where = folder / META
    if not os.path.lexists(where):
        raise ValueError(f"{folder} holds no {META}: it is no average saved by dist_ema.")
    meta = read_json(where)
    version = meta.get("format")
    if type(version) is not int or version < 1:
        raise ValueError(f"{where} names no format.")
    if version > FORMAT:
        raise ValueError(
            f"{folder} holds format {brief(version)}; this dist_ema reads up to {FORMAT}. Upgrade dist_ema."
        )
    files = meta.get("files")
    if not isinstance(files, dict) or not all(_is_place(name) for name in files):
        raise ValueError(f"{where} lists no files.")
    averages = meta.get("averages", {})
    if not isinstance(averages, dict) or not all(
        _is_place(f"averages/{label}/x.safetensors") for label in averages
    ):
        raise ValueError(f"{where} names averages that lie elsewhere.")
    return meta


def _is_place(name: Any) -> bool:
    """A file of the folder, or of one of its further averages."""
    if not isinstance(name, str):
        return False
    *folders, file = name.split("/")
    plain = len(folders) == 2 and folders[0] == "averages" and folders[1] not in ("", ".", "..")
    return is_file_name(file) and name.isprintable() and (not folders or plain)


def resumable(path: Path) -> bool:
    """Whether `ema.save` wrote the folder."""
    try:
        return (path / META).exists() and read_meta(path).get("kind") == "ema"
    except ValueError:  # nothing that a run could resume from
        return False
