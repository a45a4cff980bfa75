"""Check sums as bytes go by: `FileSums` of a file, `Checked` readings of a model. No torch."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import NamedTuple

import numpy as np

from ..checkpoint import crc32, manifest, safetensors
from ..dtypes import Bytes, cast
from .sources import Safetensors, Weights, ranges

__all__ = ["Checked", "FileSums", "FileWindow", "Reading"]

IN_FLIGHT = 4  # windows that wait for a thread, at most


class FileWindow(NamedTuple):
    """Bytes on their way into a file.

    Attributes:
        crc32: The CRC-32 of the bytes, where it is known already.
        release: Called after the last read of `data`, so that its memory can be used again.
    """

    data: Bytes
    crc32: int | None = None
    release: Callable[[], object] | None = None

    def cast(self, name: str, was: str, now: str) -> FileWindow:
        """The window with the bytes of weight `name` in another dtype."""
        return self if was == now else FileWindow(cast(name, self.data, was, now))


class FileSums:
    """CRC-32 and, if asked for, SHA-256 of a file, beside the caller's reads.

    SHA-256 and each of the `sinks` have a thread, which takes the windows in their order, and
    releases the interpreter's lock. The caller must not write into a window again.
    """

    def __init__(
        self, head: bytes, with_sha256: bool, *sinks: Callable[[FileWindow], object]
    ) -> None:
        self._crc32 = crc32.of_bytes(head)
        self._sha256 = hashlib.sha256(head) if with_sha256 else None
        calls = [self._add_sha256, *sinks] if with_sha256 else sinks
        self._threads = [(ThreadPoolExecutor(1), call) for call in calls]
        self._in_flight: deque[tuple[FileWindow, list[Future[object]]]] = deque()

    def add(self, window: FileWindow) -> None:
        """Begin to add the bytes that come next."""
        # Bounds the memory: a slow disk holds up the reader.
        self._wait(IN_FLIGHT - 1)
        calls = [thread.submit(call, window) for thread, call in self._threads]
        self._in_flight.append((window, calls))
        known = crc32.of_bytes(window.data.data) if window.crc32 is None else window.crc32
        self._crc32 = crc32.appended(self._crc32, known, len(window.data))

    def _add_sha256(self, window: FileWindow) -> None:
        assert self._sha256 is not None
        self._sha256.update(window.data.data)

    def _wait(self, left: int) -> None:
        """Wait until at most `left` windows are in flight."""
        while len(self._in_flight) > left:
            window, calls = self._in_flight.popleft()
            for call in calls:
                call.result()
            if window.release is not None:
                window.release()

    def to_json(self) -> dict[str, str]:
        """The sums by kind, as ema.json has them."""
        self._wait(0)
        sums = {"crc32": f"{self._crc32:08x}"}
        return sums if self._sha256 is None else sums | {"sha256": self._sha256.hexdigest()}

    def __enter__(self) -> FileSums:
        return self

    def __exit__(self, *_: object) -> None:
        for thread, _call in self._threads:
            thread.shutdown(cancel_futures=True)


class Reading:
    """Bytes of a weight, to be read in order by one thread.

    Attributes:
        crc32: The CRC-32 of those that were read, if a sum asks for it.
    """

    def __init__(
        self, model: Weights, name: str, begin: int, end: int, add: Callable[[int], None] | None
    ) -> None:
        self.model, self.dtype = model, model.entries[name].dtype
        self.crc32: int | None = None
        self._name, self._at, self._end, self._add = name, begin, end, add

    def read(self, into: Bytes) -> Bytes:
        """The next bytes, as many as `into` has. *Aliases* it."""
        begin, self._at = self._at, self._at + len(into)
        self.model.read(self._name, begin, self._at, into)
        if self._add is not None:
            self.crc32 = crc32.of_bytes(into.data, self.crc32 or 0)
            # Added as one range, when the last step was read.
            if self._at == self._end:
                self._add(self.crc32)
        return into

    def window(self) -> FileWindow:
        """The bytes that were not read yet, as one window."""
        return FileWindow(self.read(np.empty(self._end - self._at, np.uint8)), self.crc32)


class Checked:
    """Windows of a model, summed as they go by: damaged files must not become a sound copy.

    *Cost*: the windows; `finish` reads what was not asked for. Without sums to compare, nothing.
    """

    def __init__(self, model: Weights) -> None:
        self._model, self.entries = model, model.entries
        self._summed: Safetensors | None = None
        if isinstance(model, Safetensors):
            model.refuse_changed()
            self._summed = model if model.listed is not None else None
        self._sums = {
            name: crc32.RangeSum(file.size)
            for name, file in (self._summed.files.items() if self._summed else ())
        }
        self._lock = Lock()  # of the sums: several threads read one model
        self._seen: dict[tuple[str, str], int] = {}  # (file, weight) -> bytes in its sum

    def windows(self, name: str) -> Iterator[FileWindow]:
        """The bytes of a weight in order."""
        for begin, end in ranges(0, self.entries[name].nbytes):
            yield self.reading(name, begin, end).window()

    def reading(self, name: str, begin: int, end: int) -> Reading:
        """Bytes [begin, end) of a weight, for a thread to read in steps. Calls give the order.

        Ranges in order count once, however often they are read.
        """
        add = None
        if self._summed is not None:
            file, at = self._summed.place(name)
            # Only what continues the sum is added, so that a window read twice counts once.
            if begin == self._seen.get((file, name), 0):
                self._seen[file, name] = end
                add = partial(self._add, file, at + begin, end - begin)
        return Reading(self._model, name, begin, end, add)

    def _add(self, file: str, at: int, n: int, crc: int) -> None:
        with self._lock:
            self._sums[file].add_known(at, n, crc)

    def finish(self) -> None:
        """Raise ValueError for a file that is not what ema.json says, and close the model. Once."""
        if self._summed is None:
            return
        with self._summed as model:
            for name, file in model.files.items():
                # The sum is of the whole file: header and weights that nothing has asked for.
                for begin, end in self._unseen(name, file):
                    self._sums[name].add(begin, model.raw(name, begin, end).data)
                actual = crc32.check_sum(file.size, [self._sums[name].contribution])
                recorded = (model.listed or {}).get(name, {}).get("crc32")
                if recorded != actual:
                    where = model.path / name if model.path.is_dir() else model.path
                    raise ValueError(
                        f"{where} is damaged: its CRC-32 is {actual}, {manifest.META} says "
                        f"{recorded}."
                    )

    def _unseen(self, name: str, file: safetensors.SafetensorsFile) -> Iterator[tuple[int, int]]:
        """The byte ranges of a file that were not read, in windows."""
        head = len(file.head)
        yield from ranges(0, head)
        for weight, entry in file.entries.items():
            seen = self._seen.get((name, weight), 0)
            yield from ranges(head + entry.begin + seen, head + entry.end)
