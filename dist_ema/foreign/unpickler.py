"""A restricted unpickler, which imports nothing and calls only what its caller allows. No torch.

A pickle is a program: GLOBAL imports, REDUCE calls what was imported. Here `find_class` looks into
an allow-list, and any other name ends the reading with an error that states it. A call builds a
plain value or an inert `Record`.

[Note: the pure Python unpickler]  `pickle.Unpickler`, in C, is safe from calls once `find_class` is
restricted, but not from its other opcodes. A large LONG_BINPUT index allocates that much memory,
and a BINBYTES header allocates the length it claims. BUILD sets attributes of functions and
classes, and the hash of a nested tuple as a key recurses without a limit. The Python class beside
it keeps its memo in a dict and reads no more than there is. A subclass can narrow its table of
opcodes.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["MAX_BYTES", "Record", "StandIn", "read", "record"]

MAX_BYTES = 128 << 20  # of a pickle; its objects take up to fifty times as much
_MAX_INT_BYTES = 16


@dataclass(eq=False, slots=True)
class Record:
    """An object of a pickle: the class it names, and its state. Hashed by identity."""

    kind: str
    state: Any = None


@dataclass(eq=False, slots=True)
class StandIn:
    """A function of the allow-list, on the stack. Only such may be called."""

    call: Callable[..., Any]


def record(kind: str) -> Callable[..., Record]:
    """The entry of an allow-list for a class whose objects become records."""
    return lambda *args: Record(kind)


def read(
    data: bytes,
    names: Mapping[str, Any],
    where: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Build the object that a pickle describes.

    Args:
        data: The pickle.
        names: The allow-list, 'module.name' -> a function that the pickle may call, or a value that
            it may not call.
        where: The file, for error messages.
        persistent: Makes an object from a persistent id, which torch uses for storages.

    Raises:
        ValueError: The pickle names something that is not in the list, is damaged, or is too large.

    Note:
        *Cost*: about fifty times the pickle.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"{where} is a pickle of {len(data):,} bytes; dist_ema reads up to {MAX_BYTES:,}."
        )
    unpickler = _Unpickler(data, names, where, persistent)
    try:
        return unpickler.load()
    except _RefusedError:
        raise
    except MemoryError:
        # NOTE: the traceback keeps the unpickler alive, and the sentence below needs memory.
        vars(unpickler).clear()
        raise ValueError(f"{where} is a pickle that needs more memory than there is.") from None
    except _DAMAGED as error:
        why = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise ValueError(
            f"{where} is a damaged pickle, at byte {unpickler.file.tell()}: {why}."
        ) from None


_DAMAGED = (
    AttributeError, EOFError, LookupError, OverflowError, TypeError, ValueError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip


class _RefusedError(ValueError):
    """The pickle is understood, but asks for something that is not done."""


class _Unpickler(pickle._Unpickler):
    """[Note: the pure Python unpickler]"""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(
        self,
        data: bytes,
        names: Mapping[str, Any],
        where: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file)
        self._names, self._where, self._persistent = names, where, persistent

    def refuse(self, what: str) -> NoReturn:
        raise _RefusedError(f"{self._where} {what}. Nothing in it was run.")

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._names:
            self.refuse(f"asks for {full[:200]}, which dist_ema refuses")
        known = self._names[full]
        return StandIn(known) if callable(known) else known

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            self.refuse("asks for an object outside itself, which dist_ema refuses")
        return self._persistent(pid)

    def call(self) -> None:
        """REDUCE, and NEWOBJ, which calls a class."""
        args, called = self.stack.pop(), self.stack.pop()  # pushed in the other order
        if type(called) is not StandIn or type(args) is not tuple:
            self.refuse(f"calls a {type(called).__name__} with a {type(args).__name__}")
        self.append(called.call(*args))

    def build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is not Record:
            self.refuse(f"sets the state of a {type(built).__name__}")
        built.state = state

    def extend(self, items: list[Any]) -> None:
        """APPEND and APPENDS."""
        if type(self.stack[-1]) is not list:
            self.refuse(f"appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """SETITEM and SETITEMS: a key, its value, the next key."""
        if type(self.stack[-1]) is not dict:
            self.refuse(f"sets items of a {type(self.stack[-1]).__name__}")
        for key in items[::2]:  # the time of a tuple's hash can be exponential in its depth
            if type(key) not in (str, int, float, bytes, Record):
                self.refuse(f"uses a {type(key).__name__} as a key")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def long1(self) -> None:
        count = self.read(1)[0]
        if count > _MAX_INT_BYTES:
            self.refuse(f"holds a number of {count} bytes")
        self.append(pickle.decode_long(self.read(count)))


class _Opcodes(dict[int, Callable[[Any], None]]):
    """Opcode -> the method that runs it.

    Those of Python 2, of extensions and of other pickles than torch's are left out.
    """

    def __missing__(self, code: int) -> Callable[[Any], None]:
        return lambda unpickler: unpickler.refuse(
            f"uses opcode {code:#04x}, which dist_ema does not follow"
        )


_INHERITED = (
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
    "BINBYTES", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL",
    "BINPERSID",
)  # fmt: skip
_Unpickler.dispatch = _Opcodes(
    {getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INHERITED}
)
_Unpickler.dispatch |= {
    pickle.REDUCE[0]: _Unpickler.call,
    pickle.NEWOBJ[0]: _Unpickler.call,
    pickle.BUILD[0]: _Unpickler.build,
    pickle.APPEND[0]: lambda unpickler: unpickler.extend([unpickler.stack.pop()]),
    pickle.APPENDS[0]: lambda unpickler: unpickler.extend(unpickler.pop_mark()),
    pickle.SETITEM[0]: lambda unpickler: unpickler.update(
        [unpickler.stack.pop(), unpickler.stack.pop()][::-1]
    ),
    pickle.SETITEMS[0]: lambda unpickler: unpickler.update(unpickler.pop_mark()),
    pickle.LONG1[0]: _Unpickler.long1,
    pickle.FRAME[0]: lambda unpickler: unpickler.read(8),  # frames only help buffered reading
}
