"""`FileSums`: CRC-32 and SHA-256 of a file, on threads beside the reads and writes. No torch."""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import Future, ThreadPoolExecutor

from ..dtypes import Bytes

__all__ = ["FileSums"]


class FileSums:
    """CRC-32 and, if asked for, SHA-256 of a file, on threads beside the caller's reads and writes.

    NOTE: zlib and hashlib release the interpreter's lock. One window is summed while the caller
    makes the next, so it must not write into a window again.
    """

    def __init__(self, head: bytes, with_sha256: bool) -> None:
        self._crc32 = zlib.crc32(head)
        self._sha256 = hashlib.sha256(head) if with_sha256 else None
        self._pool = ThreadPoolExecutor(2)
        self._adding: list[Future[None]] = []

    def add(self, data: Bytes) -> None:
        """Begin to add the bytes that come next. Waits for those before."""
        self._wait()
        self._adding = [self._pool.submit(self._add_crc32, data)]
        if self._sha256 is not None:
            self._adding.append(self._pool.submit(self._sha256.update, data.data))

    def _add_crc32(self, data: Bytes) -> None:
        self._crc32 = zlib.crc32(data.data, self._crc32)

    def _wait(self) -> None:
        for each in self._adding:
            each.result()

    def to_json(self) -> dict[str, str]:
        """The sums by kind, as ema.json has them."""
        self._wait()
        sums = {"crc32": f"{self._crc32:08x}"}
        return sums if self._sha256 is None else sums | {"sha256": self._sha256.hexdigest()}

    def __enter__(self) -> FileSums:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
