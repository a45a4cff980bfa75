"""The safetensors format: `Entry`, headers, shards, indexes and names of files; written and parsed.

    ema-001000/
      model.safetensors     or model-00001-of-00004.safetensors ... and INDEX
      ema.json              clock, schedules, aliases, check sums ...

The header fixes where every weight lies before anything is written, so ranks write their own
regions into place. The bytes depend on the weights alone: keys are sorted by dtype size
(descending) and name, and the header is padded to 8 bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

from ..dtypes import NUMPY
from ..packing import packs
from ..text import size_of
from . import disk, strict_json

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "INDEX",
    "ITEMSIZE",
    "PICKLES",
    "Entry",
    "SafetensorsFile",
    "find_model",
    "header",
    "header_of",
    "in_order",
    "index",
    "is_file_name",
    "is_model_name",
    "is_shard",
    "plan",
    "read_header",
    "read_index",
    "read_model",
]


INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of peft
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar")  # as files of torch.save are called
STEMS = ("model", "diffusion_pytorch_model")  # of transformers, and of diffusers
MOST = 1 << 63  # below which torch counts elements and bytes
MOST_DIMS = 64
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_MODEL = re.compile(rf"({'|'.join(STEMS)})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
_CONVERT = " `dist-ema convert` reads what torch.save and torch.distributed.checkpoint write."
ITEMSIZE = {kind: dtype.itemsize for kind, dtype in NUMPY.items()}  # bytes


@dataclass(frozen=True)
class Entry:
    """One weight in a file; begin and end are bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsFile:
    """One safetensors file: its header bytes and where every weight lies behind them."""

    head: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.head) + max((entry.end for entry in self.entries.values()), default=0)


def in_order(entries: Mapping[str, Entry]) -> list[str]:
    """The weights as they lie in their file."""
    return sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))


# --- writing -------------------------------------------------------------------------------------


def header(
    entries: dict[str, Entry],
    metadata: dict[str, str] | None = None,
    order: Sequence[str] | None = None,
) -> SafetensorsFile:
    """Lay the weights out in `order`, or in the canonical order, which their names determine."""
    if "__metadata__" in entries:
        raise ValueError(
            "a weight is called __metadata__, which safetensors keeps for itself. Give it another "
            "name."
        )
    placed, at = {}, 0
    for name in order or sorted(entries, key=lambda name: (-ITEMSIZE[entries[name].dtype], name)):
        entry = entries[name]
        placed[name] = Entry(entry.dtype, entry.shape, at, at + entry.nbytes)
        at += entry.nbytes
    table: dict[str, Any] = {
        "__metadata__": {"format": "pt"} | dict(sorted((metadata or {}).items()))
    }
    for name, entry in placed.items():
        table[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (entry.begin, entry.end),
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # The weights behind it begin at a multiple of 8, so that they can be mapped.
    text += b" " * (-len(text) % 8)
    return SafetensorsFile(struct.pack("<Q", len(text)) + text, placed)


def plan(entries: dict[str, Entry], max_shard_size: int | str) -> dict[str, SafetensorsFile]:
    """The files of a model by name.

    Each holds at most max_shard_size (bytes, or '5GB'), unless one weight is larger.
    """
    most = size_of(max_shard_size)
    shards = list(packs(sorted(entries), lambda name: entries[name].nbytes, most))
    if len(shards) <= 1:
        return {"model.safetensors": header(entries)}
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    return {
        file: header({name: entries[name] for name in names})
        for file, names in zip(files, shards, strict=True)
    }


def index(files: dict[str, SafetensorsFile]) -> bytes:
    """model.safetensors.index.json, as Hugging Face writes it."""
    where = {name: file for file, content in files.items() for name in content.entries}
    total = sum(entry.nbytes for content in files.values() for entry in content.entries.values())
    return strict_json.dump(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    )


def read_header(path: Path) -> SafetensorsFile:
    """The header, checked against the file's size. Raises ValueError if it is unsound."""
    with disk.open_regular(path) as file:
        return header_of(file, path)


def header_of(file: BinaryIO, path: Path) -> SafetensorsFile:
    """`read_header` of a file that is open; path: what errors call it."""
    size = os.fstat(file.fileno()).st_size
    # A file of less than 8 bytes is filled up here, and refused by its size.
    length = struct.unpack("<Q", (disk.read_exactly(file, 8) + bytes(8))[:8])[0]
    if size < 8 or length > min(strict_json.MOST_JSON, size - 8):
        # The first bytes of another format are an enormous length.
        more = _CONVERT if length > strict_json.MOST_JSON else ""
        raise ValueError(
            f"{path} is no safetensors file, or is cut short: {size} bytes, header of {length}."
            f"{more}"
        )
    text = disk.read_exactly(file, length)
    try:
        table = strict_json.parse_json(text)
        metadata = table.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in table.items()}
        if metadata is not None and not _is_texts(metadata):
            raise ValueError("metadata must map texts to texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} has a broken safetensors header: {type(error).__name__}: {error}."
        ) from None
    at = 0
    # Neither gaps nor overlaps: two weights on the same bytes would pass every other check.
    for name in in_order(entries):
        entry = entries[name]
        if entry.begin != at or entry.end - entry.begin != entry.nbytes:
            raise ValueError(
                f"{path}: {name} lies at bytes {entry.begin} to {entry.end}, expected "
                f"{entry.nbytes} from {at}."
            )
        at = entry.end
    if size != 8 + length + at:
        raise ValueError(
            f"{path} holds {size} bytes, its header describes {8 + length + at}. It was cut short "
            "or damaged."
        )
    return SafetensorsFile(struct.pack("<Q", length) + text, entries, metadata or {})


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _entry(value: dict[str, Any]) -> Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if value["dtype"] not in ITEMSIZE:
        raise ValueError(f"unknown dtype {brief(value['dtype'])}")
    # `type`, because a bool is an int too.
    if not all(type(n) is int and 0 <= n < MOST for n in (begin, end, *shape)):
        raise ValueError(f"offsets and shape must be whole numbers, got {brief(value)}")
    # NOTE: a 0 in the shape hides any other size in it from the count of bytes, but not from torch.
    if len(shape) > MOST_DIMS or math.prod(n for n in shape if n) >= MOST:
        raise ValueError(f"a shape of {len(shape)} dimensions that cannot be: {brief(shape)}")
    return Entry(value["dtype"], shape, begin, end)


def find_model(folder: Path) -> str:
    """The index or only file of a model: a name of Hugging Face, else the only candidate."""
    names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    whole_files = [name for name in names if name.endswith(".safetensors") and not is_shard(name)]
    endings = (".safetensors.index.json", ".safetensors")
    usual = [stem + ending for stem in STEMS for ending in endings if stem + ending in names]
    candidates = usual[:1] or indexes or whole_files
    if len(candidates) == 1:
        return candidates[0]
    more = _CONVERT if names else ""
    if candidates:
        more = f" It does hold {', '.join(candidates[:3])}: name the one to read."
    elif model_folders := sorted(path.parent.name for path in folder.glob("[!.]*/*.safetensors")):
        more = f" Folders in it do, {model_folders[-1]} for one: name the one to read."
    raise ValueError(f"{folder} holds no model.safetensors and no {INDEX}.{more}")


def read_model(
    folder: Path, name: str | None = None, read: Callable[[str], SafetensorsFile] | None = None
) -> dict[str, SafetensorsFile]:
    """The files of a model folder by name, each checked; the index must agree with them.

    Args:
        folder: where they lie.
        name: the index or the only file; None stands for what `find_model` finds.
        read: gives the header of a file; None reads it and closes the file.
    """
    name = find_model(folder) if name is None else name
    read = read or (lambda file: read_header(folder / file))
    if name.endswith(".safetensors"):
        return {name: read(name)}
    weights = read_index(folder, name)
    files = {file: read(file) for file in sorted(set(weights.values()))}
    file_of_weight = {weight: file for file, content in files.items() for weight in content.entries}
    if file_of_weight != weights:
        mismatched = sorted(file_of_weight.items() ^ weights.items())[:3]
        raise ValueError(f"{folder / name} and the files disagree on {mismatched}.")
    return files


def read_index(folder: Path, name: str = INDEX) -> dict[str, str]:
    """weight -> file, of files that exist beside the index."""
    where = folder / name
    weights = strict_json.read_json(where).get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(is_file_name(file) for file in weights.values())
    ):
        raise ValueError(
            f"{where} has no sound weight_map: it must map weights to files beside it."
        )
    missing = [file for file in sorted(set(weights.values())) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{where} names {', '.join(missing[:3])}, which {folder} does not hold.")
    return weights


def is_shard(name: str) -> bool:
    """Whether a file is one of several of a model, by its name."""
    return _SHARD.fullmatch(name) is not None


def is_model_name(name: str) -> bool:
    """Whether a loader takes a file for a model, a part of one, or an index, by its name."""
    return _MODEL.fullmatch(name) is not None


def is_file_name(name: Any) -> bool:
    """A file beside the index, nothing that leads out of the folder."""
    plain = isinstance(name, str) and name.isprintable() and name == os.path.basename(name)
    return plain and name.endswith(".safetensors")
