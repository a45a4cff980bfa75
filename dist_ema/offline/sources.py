"""`open_model`: files of any origin as a table of weights, read in windows; which average of them.

    with sources.open_model(path) as model:
        for name, entry in model.entries.items():
            for raw in sources.windows(model, name): ...

Whatever the form on disk, a model is a table of names and a way to read bytes of each. A window is
4 MB, whatever the size of the weight. No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..checkpoint import atomic, disk, manifest, pointers, safetensors
from ..dtypes import Bytes
from ..foreign import torch_dcp
from ..schedules import Schedule, from_dict, from_text

__all__ = [
    "WINDOW",
    "Safetensors",
    "Source",
    "Weights",
    "choose",
    "find",
    "locate",
    "open_model",
    "pickled",
    "ranges",
    "read_at",
    "refuse_unsupported",
    "windows",
]

WINDOW = 4 << 20  # bytes

_OF_AVERAGE = re.compile(r"(^|\.)averages\.average_\d+\.weights\.")  # of EMA.state_dict


def read_at(fd: int, path: Path | str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
    """Bytes [begin, end) of an open file. Raises ValueError where it is shorter."""
    data = np.empty(end - begin, np.uint8) if into is None else into
    disk.read_into(fd, path, data.data, begin)
    return data


class Weights(Protocol):
    """A model as a table of names, and the bytes of each."""

    path: Path
    entries: dict[str, safetensors.Entry]

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further name -> name."""

    def read(self, name: str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
        """Bytes [begin, end) of a weight. into: Memory for them."""

    def close(self) -> None:
        """Let go what reading has opened. The next `read` opens it again."""


def ranges(begin: int, end: int, window: int = WINDOW) -> Iterator[tuple[int, int]]:
    """[begin, end) in ranges of `window`, the last one shorter."""
    for at in range(begin, end, window):
        yield at, min(at + window, end)


def windows(model: Weights, name: str, window: int = WINDOW) -> Iterator[Bytes]:
    """The bytes of a weight in order, `window` at a time (whole elements). *Cost*: one window."""
    for begin, end in ranges(0, model.entries[name].nbytes, window):
        yield model.read(name, begin, end)


def locate(path: Path) -> Path:
    """The path of the whole version, through links and interrupted replacements.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    path = atomic.whole(pointers.follow(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    return path


def find(path: str | Path) -> Path:
    """The folder or file of safetensors at `path`.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It cannot hold a model, or is one to convert.
    """
    path = locate(Path(path))
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir())
        pickles = [name for name in names if name.endswith(safetensors.PICKLES)]
        has_model = torch_dcp.META in names or any(".safetensors" in name for name in names)
        if pickles and not has_model:
            raise ValueError(
                f"{path} holds no safetensors. It does hold {', '.join(pickles[:3])}: "
                "`dist-ema convert` makes safetensors of it."
            )
    elif not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    elif path.suffix == ".json":
        raise manifest.folder_is_meant(path)
    elif pickled(path):
        raise ValueError(
            f"{path} is a pickled checkpoint, no safetensors file. `dist-ema convert {path} OUT` "
            "makes one."
        )
    return path


def pickled(path: Path) -> bool:
    """Whether the first bytes are those of a zip archive or of a bare pickle, as torch.save writes.

    A header of safetensors is never as long as these bytes would mean.
    """
    first = disk.beginning(path, 8)
    # safetensors begins with the length of the header in 8 bytes, the highest of them 0.
    return any(first[3:]) and (
        first[:4] == b"PK\x03\x04" or (first[0] == 0x80 and 2 <= first[1] <= 5)
    )


def choose(saved: manifest.Manifest | None, which: int | str) -> str:
    """The label of an average, by its number, label, schedule's name, or a call that makes it.

    Raises:
        ValueError: None or several fit; the error lists what there is.
    """
    saved = saved or manifest.Manifest()
    text, asked = str(which), from_text(str(which))
    fits, there = [], []
    # An export may have fewer schedules than averages.
    schedules = [*map(_schedule_of, saved.schedules), *[None] * len(saved.labels)]
    for i, (label, schedule) in enumerate(zip(saved.labels, schedules, strict=False)):
        name, call = ("", "") if schedule is None else (type(schedule).__name__, repr(schedule))
        if (text and text in (str(i), label, name, call)) or (asked and asked == schedule):
            fits.append(label)
        there.append(f"{i}: {call or label or 'the only one'}")
    if len(fits) != 1:
        raise ValueError(
            f"there is {'more than one' if fits else 'no'} average {which!r}; there are "
            f"{', '.join(there)}."
        )
    return fits[0]


def _schedule_of(spec: Any) -> Schedule | None:
    try:
        return from_dict(spec)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def open_model(path: str | Path, which: int | str = 0) -> Source:
    """Open a saved average, an export, a folder of Hugging Face or torch, or a .safetensors file.

    Args:
        path: The folder or file.
        which: Which of several averages. Those behind the first are completed with the weights that
            the first alone has.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no model, its headers are unsound, or `which` is not there.
    """
    path = find(path)
    if (path / torch_dcp.META).exists():
        # Folders of torch hold one model, so any other `which` is refused.
        choose(None, which)
        return torch_dcp.Folder(path)
    return Safetensors(path, which)


def refuse_unsupported(model: Source) -> None:
    """Raise ValueError where a checkpoint holds no model, or tensors that its copy would lack."""
    if inside := next(filter(_OF_AVERAGE.search, model.entries), None):
        raise ValueError(
            f"{model.path} holds averages among other state ({inside}): `dist-ema convert "
            f"{model.path} OUT` makes a model of one."
        )
    if model.unsupported:
        name, why = next(iter(model.unsupported.items()))
        more = f", and so would {len(model.unsupported) - 1} more" * (len(model.unsupported) > 1)
        raise ValueError(
            f"{model.path}: {name} would be left out ({why}){more}. `dist-ema inspect` lists them."
        )


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Safetensors(disk.OpenFiles):
    """A folder or file of safetensors.

    Attributes:
        manifest: ema.json of this folder, if dist_ema wrote it.
        listed: What an ema.json says of the files, wherever it lies; None if there is none.
        label: The label of the average that is read.
    """

    others: Mapping[str, str] = {}  # every tensor is among the entries
    unsupported: Mapping[str, str] = {}

    def __init__(self, path: Path, which: int | str = 0) -> None:
        self.path = path
        super().__init__(path if path.is_dir() else path.parent)
        self._top = self._folder
        self._saved: manifest.Manifest | None = None
        self.manifest, self.listed = self._read_manifest()
        self.label = choose(self.manifest, which)
        self.files = (
            safetensors.read_model(path)
            if path.is_dir()
            else {path.name: safetensors.read_header(path)}
        )
        if self.label:
            self.files |= self._further()
        self._where = {
            name: (file, content)
            for file, content in self.files.items()
            for name in content.entries
        }
        self.entries = {name: content.entries[name] for name, (_, content) in self._where.items()}
        self.aliases = self._aliases()
        # A save may replace a file between its header and its first window.
        self._stamps = {file: _stamp(os.stat(self._folder / file)) for file in self.files}
        self._known = set[str]()

    def _read_manifest(self) -> tuple[manifest.Manifest | None, dict[str, dict[str, Any]] | None]:
        """`manifest` and `listed`. One file, and a further average's folder, have them elsewhere.

        Raises:
            ValueError: ema.json is damaged.
        """
        inside = self._folder.parent.name == "averages"
        top = self._folder.parent.parent if inside else self._folder
        saved = manifest.read(top)
        if saved is None:
            return None, None
        self._top, self._saved = top, saved
        # Its own sum is compared later: `inspect` shows a file that was edited by hand.
        manifest.refuse_damaged(top, replace(saved, is_changed=False))
        # A single file, or a further average, knows its sums and nothing else of ema.json.
        if self.path == top:
            return saved, saved.files
        listed = saved.files_of(self._folder.name if inside else "")
        return None, listed if self.path.is_dir() or self.path.name in listed else None

    def refuse_changed(self) -> None:
        """Raise ValueError where ema.json was changed. Only what reads weights refuses that."""
        if self._saved is not None:
            manifest.refuse_damaged(self._top, self._saved)

    def _further(self) -> dict[str, safetensors.SafetensorsFile]:
        """The files under averages/LABEL.

        Raises:
            ValueError: Buffers of the first average would be taken for this one's.
        """
        assert self.manifest is not None, "only ema.json knows labels"
        # Frozen weights and buffers come from the first average, and must fit this one too.
        own = self.manifest.own_buffers_of(self.label)
        foreign = sorted(set(self.manifest.own_buffers) - set(own))
        if foreign:
            raise ValueError(
                f"{self.path} holds {', '.join(foreign[:3])} as recalibrated for its first average "
                f"only, so {self.label} is not complete in it. Recalibrate inside ema.swap(which) "
                "before ema.save(), or use ema.export(which=...)."
            )
        inside = f"averages/{self.label}"
        files = safetensors.read_model(self._folder / inside)
        return {f"{inside}/{name}": file for name, file in files.items()}

    def _aliases(self) -> dict[str, str]:
        """Further name -> name in the files: of ema.json, and of the headers."""
        listed = self.manifest.aliases if self.manifest else {}
        aliases = {alias: name for name, more in listed.items() for alias in more}
        for file in self.files.values():
            aliases |= file.metadata
        return {
            alias: name
            for alias, name in aliases.items()
            if alias not in self.entries and name in self.entries
        }

    def read(self, name: str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
        """Bytes [begin, end) of a weight. into: Memory for them."""
        file, start = self.place(name)
        return self.raw(file, start + begin, start + end, into)

    def place(self, name: str) -> tuple[str, int]:
        """The file that holds a weight, and the byte at which it begins there."""
        file, content = self._where[name]
        return file, len(content.head) + content.entries[name].begin

    def raw(self, file: str, begin: int, end: int, into: Bytes | None = None) -> Bytes:
        """Bytes [begin, end) of a file.

        Raises:
            ValueError: It is another file than the headers were read from, or a shorter one.
        """
        # NOTE: to join paths anew for every window takes a tenth of the time of its read.
        return read_at(self.fd(file), f"{self._folder}/{file}", begin, end, into)

    def fd(self, name: str) -> int:
        """The descriptor of a file. Raises ValueError if a save replaced it since the header."""
        if name in self._open:
            return self._open[name]
        fd, head = super().fd(name), self.files[name].head
        same = _stamp(os.fstat(fd)) == self._stamps[name]
        if same and name not in self._known:  # the stamp was taken after the header was read
            same = read_at(fd, self._folder / name, 0, len(head)).tobytes() == head
            self._known.add(name)
        if not same:
            raise ValueError(f"{self._folder / name} was replaced while it was read. Try again.")
        return fd


# A model in files. Weights are dense and row-major, whatever lies on disk.
Source: TypeAlias = Safetensors | torch_dcp.Folder
