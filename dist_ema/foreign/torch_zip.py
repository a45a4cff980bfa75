"""Zip archives as torch.save writes them: where their records lie. No torch.

Records are stored, not compressed, so a tensor's bytes can be read straight from the file; whatever is compressed,
encrypted or spread over several archives is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Read", "records"]

Read: TypeAlias = Callable[[int, int], bytes]  # bytes [begin, end) of the archive

_MOST_DIRECTORY = 16 << 20  # bytes; about 150,000 records
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # the number stands elsewhere, in 64 bits


def records(read: Read, size: int, where: str) -> dict[str, tuple[int, int]]:
    """Record -> where its bytes begin and end in the archive. Raises ValueError for anything unsound, naming `where`.

    The name of the folder that torch puts everything into is left out.
    """
    try:
        begin, length, count = _directory(read, size)
        if length > _MOST_DIRECTORY or begin < 0 or begin + length > size:
            raise ValueError(f"a directory of {length} bytes at {begin}")
        found = _entries(read, read(begin, begin + length), count, size)
    except (IndexError, UnicodeDecodeError, ValueError, struct.error) as error:
        raise ValueError(f"{where} is no sound archive of torch.save: {error}.") from None
    return {name.split("/", 1)[-1]: place for name, place in found.items()}


def _directory(read: Read, size: int) -> tuple[int, int, int]:
    """Where the directory begins, its bytes, its entries."""
    if size < _END.size:
        raise ValueError(f"it has only {size} bytes")
    sign, *_, count, length, begin, comment = _END.unpack(read(size - _END.size, size))
    if sign != b"PK\5\6" or comment:
        raise ValueError("it has no end, so it was cut short")
    at = size - _END.size - _LOCATOR.size
    if at >= 0:
        sign, _, begin64, _ = _LOCATOR.unpack(read(at, at + _LOCATOR.size))
        if sign == b"PK\6\7" and begin64 + _END64.size <= at:
            sign, *_, count, length, begin = _END64.unpack(read(begin64, begin64 + _END64.size))
            if sign != b"PK\6\6":
                raise ValueError("its second end is damaged")
    return begin, length, count


def _entries(read: Read, directory: bytes, count: int, size: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    at = 0
    while at < len(directory):
        sign, _, _, flags, method, _, _, _, packed, length, names, extras, notes, _, _, _, place = (
            _ENTRY.unpack_from(directory, at)
        )
        at += _ENTRY.size
        name, extra = (
            directory[at : at + names].decode(),
            directory[at + names : at + names + extras],
        )
        at += names + extras + notes
        if sign != b"PK\1\2" or at > len(directory) or name in found:
            raise ValueError("its directory is damaged")
        packed, length, place = _wide(extra, packed, length, place)
        if method or packed != length or flags & 1:
            raise ValueError(f"{name} is compressed or encrypted")
        found[name] = _place(read, place, length, size)
    if len(found) != count:
        raise ValueError(f"its directory holds {len(found)} records, it speaks of {count}")
    return found


def _wide(extra: bytes, packed: int, length: int, place: int) -> tuple[int, int, int]:
    """Numbers beyond 32 bits stand in an extra field, in this order, those that need it."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            length, packed, place = (
                next(numbers, value) if value == _FULL else value
                for value in (length, packed, place)
            )
        at += 4 + size
    return packed, length, place


def _place(read: Read, at: int, length: int, size: int) -> tuple[int, int]:
    """The bytes behind a record's own header."""
    if at + _LOCAL.size > size:
        raise ValueError("its directory points beyond its end")
    sign, *_, names, extras = _LOCAL.unpack(read(at, at + _LOCAL.size))
    begin = at + _LOCAL.size + names + extras
    if sign != b"PK\3\4" or begin + length > size:
        raise ValueError("its directory points to no record")
    return begin, begin + length
