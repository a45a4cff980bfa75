"""A reader of pickles that runs nothing: every name that a pickle may use stands for something of ours. No torch.

A pickle is a program for a stack machine whose GLOBAL opcodes import, and whose REDUCE calls what was imported. Here GLOBAL
looks into a table that the caller gives, and anything that is not in it ends the reading by name. Nothing is imported, no
attribute is looked up, and what a call makes is a value or a `Record`, which holds what it was given and does nothing.

The machine does not recurse, and works no longer than the pickle is long: keys of dicts are texts, numbers and records,
because the hash of nested tuples takes time exponential in their depth.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

__all__ = ["MOST", "Record", "read", "record"]

MOST = 128 << 20  # bytes of a pickle; its objects take up to fifty times as much
_MOST_INT = 16  # bytes
_MOST_LINE = 1000

Call = Callable[..., Any]


class Record:
    """What a pickle says of one object: the class it names, what it was made from, what was put in. Hashed by identity."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, *args: Any) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None


def record(kind: str) -> Call:
    """What to put into the table for a class whose objects are to be kept as records."""
    return lambda *args: Record(kind, *args)


def read(data: bytes, names: Mapping[str, Any], where: str, persistent: Call | None = None) -> Any:
    """The object that a pickle describes.

    names: 'module.name' -> what stands for it: a function of ours (the pickle may call it), or a value (it may not).
    persistent: makes an object from the ids that torch uses for storages. Raises ValueError, with `where` in it, for a name
    that is not in the table, and for anything unsound. *Cost*: about fifty times the pickle.
    """
    if len(data) > MOST:
        raise ValueError(
            f"{where} is a pickle of {len(data):,} bytes; dist_ema reads up to {MOST:,}."
        )
    machine = _Machine(data, names, where, persistent)
    try:
        return machine.run()
    except _RefusedError:
        raise
    except (IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise ValueError(
            f"{where} is a damaged pickle, at byte {machine.at}: {type(error).__name__}."
        ) from None


class _RefusedError(ValueError):
    """What the pickle asks for is understood, and not done."""


class _Name:
    """A function of the table, on the stack. Only such may be called."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call


class _Machine:
    """The stack, the memo, and one method per opcode."""

    def __init__(
        self, data: bytes, names: Mapping[str, Any], where: str, persistent: Call | None
    ) -> None:
        self._data, self._names, self._where, self._persistent = data, names, where, persistent
        self.at = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, steps = self._data, _STEPS
        while True:
            code = data[self.at]
            self.at += 1
            step = steps.get(code)
            if step is None:
                if code == _STOP:
                    return self._stack.pop()
                self._refuse(f"uses opcode {code:#04x}, which dist_ema does not follow")
            step(self)

    def _refuse(self, what: str) -> NoReturn:
        raise _RefusedError(f"{self._where} {what}. Nothing in it was run.")

    # --- what is read from the pickle itself

    def _take(self, count: int) -> bytes:
        taken = self._data[self.at : self.at + count]
        self.at += (
            count  # beyond the end there is no further opcode, so what is too short is found there
        )
        return taken

    def _number(self, form: str, size: int) -> int:
        (value,) = struct.unpack(form, self._take(size))
        return int(value)

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + _MOST_LINE)
        if end < 0:
            raise IndexError
        line = self._data[self.at : end]
        self.at = end + 1
        return line.decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _text(self, form: str, size: int) -> None:
        self._push(str(self._take(self._number(form, size)), "utf-8", "surrogatepass"))

    def _bytes(self, form: str, size: int) -> None:
        self._push(self._take(self._number(form, size)))

    def _long(self) -> None:
        count = self._number("<B", 1)
        if count > _MOST_INT:
            self._refuse(f"holds a number of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    # --- the stack

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _tuple(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(items)

    def _get(self, form: str, size: int) -> None:
        self._push(self._memo[self._number(form, size)])

    def _put(self, form: str, size: int) -> None:
        self._memo[self._number(form, size)] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            self._refuse(f"appends to a {type(target).__name__}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            self._refuse(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bytes, Record):
                self._refuse(f"uses a {type(key).__name__} as a key")
            target[key] = value

    # --- names, and calls of what they stand for

    def _name(self, name: str) -> None:
        if name not in self._names:
            self._refuse(f"asks for {name[:200]}, which dist_ema refuses")
        known = self._names[name]
        self._push(_Name(known) if callable(known) else known)

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._name(f"{module}.{name}")

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            self._refuse("names a global by something that is no text")
        self._name(f"{module}.{name}")

    def _call(self) -> None:
        args, called = self._stack.pop(), self._stack.pop()
        if type(called) is not _Name or type(args) is not tuple:
            self._refuse(f"calls a {type(called).__name__}, which dist_ema refuses")
        self._push(called.call(*args))

    def _build(self) -> None:
        state, built = self._stack.pop(), self._stack[-1]
        if type(built) is not Record:
            self._refuse(f"sets the state of a {type(built).__name__}, which dist_ema refuses")
        built.state = state

    def _storage(self) -> None:
        if self._persistent is None:
            self._refuse("asks for an object outside itself, which dist_ema refuses")
        self._push(self._persistent(self._stack.pop()))


_STOP = pickle.STOP[0]
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: lambda m: m._take(1),
        pickle.FRAME: lambda m: m._take(8),
        pickle.MARK: _Machine._mark,
        pickle.POP: lambda m: m._stack.pop(),
        pickle.POP_MARK: _Machine._since_mark,
        pickle.NONE: lambda m: m._push(None),
        pickle.NEWTRUE: lambda m: m._push(True),
        pickle.NEWFALSE: lambda m: m._push(False),
        pickle.BININT: lambda m: m._push(m._number("<i", 4)),
        pickle.BININT1: lambda m: m._push(m._number("<B", 1)),
        pickle.BININT2: lambda m: m._push(m._number("<H", 2)),
        pickle.LONG1: _Machine._long,
        pickle.BINFLOAT: _Machine._float,
        pickle.SHORT_BINUNICODE: lambda m: m._text("<B", 1),
        pickle.BINUNICODE: lambda m: m._text("<I", 4),
        pickle.BINUNICODE8: lambda m: m._text("<Q", 8),
        pickle.SHORT_BINBYTES: lambda m: m._bytes("<B", 1),
        pickle.BINBYTES: lambda m: m._bytes("<I", 4),
        pickle.EMPTY_LIST: lambda m: m._push([]),
        pickle.EMPTY_DICT: lambda m: m._push({}),
        pickle.EMPTY_TUPLE: lambda m: m._push(()),
        pickle.TUPLE: lambda m: m._push(tuple(m._since_mark())),
        pickle.TUPLE1: lambda m: m._tuple(1),
        pickle.TUPLE2: lambda m: m._tuple(2),
        pickle.TUPLE3: lambda m: m._tuple(3),
        pickle.APPEND: lambda m: m._append([m._stack.pop()]),
        pickle.APPENDS: lambda m: m._append(m._since_mark()),
        pickle.SETITEM: lambda m: m._set([*reversed([m._stack.pop(), m._stack.pop()])]),
        pickle.SETITEMS: lambda m: m._set(m._since_mark()),
        pickle.BINGET: lambda m: m._get("<B", 1),
        pickle.LONG_BINGET: lambda m: m._get("<I", 4),
        pickle.BINPUT: lambda m: m._put("<B", 1),
        pickle.LONG_BINPUT: lambda m: m._put("<I", 4),
        pickle.MEMOIZE: _Machine._memoize,
        pickle.GLOBAL: _Machine._global,
        pickle.STACK_GLOBAL: _Machine._stack_global,
        pickle.REDUCE: _Machine._call,
        pickle.NEWOBJ: _Machine._call,
        pickle.BUILD: _Machine._build,
        pickle.BINPERSID: _Machine._storage,
    }.items()
}
