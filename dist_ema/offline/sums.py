"""`FileSums`: CRC-32 and SHA-256 of a file, on threads beside the reads and writes. No torch."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..checkpoint import crc32
from ..dtypes import Bytes, cast

__all__ = ["FileSums", "Window"]

IN_FLIGHT = 4  # windows that wait for a thread, at most


class Window(NamedTuple):
    """Bytes on their way into a file, and their CRC-32 where it is known already."""

    data: Bytes
    crc32: int | None = None

    def cast(self, name: str, was: str, now: str) -> Window:
        """Of weight `name`, in another dtype."""
        return self if was == now else Window(cast(name, self.data, was, now))


class FileSums:
    """CRC-32 and, if asked for, SHA-256 of a file, on threads beside the caller's reads.

    Each sum and each of the `sinks` has a thread, which takes the windows in their order. zlib,
    hashlib and writes release the interpreter's lock. The caller must not write into a window
    again.
    """

    def __init__(self, head: bytes, with_sha256: bool, *sinks: Callable[[Window], object]) -> None:
        self._crc32 = zlib.crc32(head)
        self._sha256 = hashlib.sha256(head) if with_sha256 else None
        calls = [self._add_crc32, self._add_sha256] if with_sha256 else [self._add_crc32]
        self._threads = [(ThreadPoolExecutor(1), call) for call in (*calls, *sinks)]
        self._in_flight: deque[list[Future[object]]] = deque()

    def add(self, window: Window) -> None:
        """Begin to add the bytes that come next."""
        self._wait(IN_FLIGHT - 1)
        self._in_flight.append([thread.submit(call, window) for thread, call in self._threads])

    def _add_crc32(self, window: Window) -> None:
        found = zlib.crc32(window.data.data) if window.crc32 is None else window.crc32
        self._crc32 = crc32.appended(self._crc32, found, len(window.data))

    def _add_sha256(self, window: Window) -> None:
        assert self._sha256 is not None
        self._sha256.update(window.data.data)

    def _wait(self, left: int) -> None:
        """Until at most `left` windows are in flight."""
        while len(self._in_flight) > left:
            for each in self._in_flight.popleft():
                each.result()

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
