"""Zip archives as torch.save writes them: where their records lie. No torch.

A record is stored, not compressed, so a tensor's bytes can be read or mapped at their place in the
file. Any other archive is refused with the reason.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["Read", "records"]

Read: TypeAlias = Callable[[int, int], bytes]  # bytes [begin, end) of the archive

_MAX_DIRECTORY = 16 << 20  # bytes; about 150,000 records
_ENCRYPTED = 1  # of a record's flags
_UNSOUND = (  # what zipfile raises
    EOFError, LookupError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def records(read: Read, size: int, where: str) -> dict[str, tuple[int, int]]:
    """Find the records of an archive.

    Args:
        read: Gives bytes [begin, end) of the archive.
        size: The size of the archive, in bytes.
        where: The file, for error messages.

    Returns:
        Record -> the begin and end of its bytes. The folder that torch puts every record into is
        left out of the names.

    Raises:
        ValueError: The archive is damaged, or a record is compressed, encrypted, doubled or
            overlaps another.
    """
    file = _Slice(read, size)
    try:
        with zipfile.ZipFile(file) as archive:
            return dict(_places(archive, file))
    except _UNSOUND as error:
        why = f"{error}" if type(error) is ValueError else f"{error}; it is damaged or cut short"
        raise ValueError(f"{where} is no sound archive of torch.save: {why}.") from None


def _places(archive: zipfile.ZipFile, file: _Slice) -> Iterator[tuple[str, tuple[int, int]]]:
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise ValueError(
            "it is a TorchScript program. Load it with torch.jit, and save its state_dict()"
        )
    free, names = 0, set()  # free: where the bytes behind the records so far begin
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.filename.split("/", 1)[-1]
        if name in names:
            raise ValueError(f"it holds {name} twice")
        names.add(name)
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                f"{name} is compressed. Unpack it, and zip it again without compression"
            )
        # `open` compares the record's own header with the directory, and ends behind it.
        with archive.open(info):
            begin = file.tell()
        if info.header_offset < free:
            raise ValueError(f"{name} overlaps another record")
        free = begin + info.file_size
        if free > archive.start_dir:
            raise ValueError(f"{name} reaches beyond the records")
        yield name, (begin, free)


class _Slice(io.RawIOBase):
    """The archive as a file that zipfile can read, through a function that reads from any place."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        count = left if count < 0 else min(count, left)
        if count > _MAX_DIRECTORY:
            raise ValueError(
                f"a directory of {count:,} bytes; dist_ema reads up to {_MAX_DIRECTORY:,}"
            )
        data = self._read(self._at, self._at + count)
        self._at += count
        return data
