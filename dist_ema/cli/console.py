"""What verbs of the command line share: options, columns, sentences and progress bars. No torch.

Names come from files, so nothing reaches a terminal before `printable` has looked at it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..text import Tick, printable

__all__ = [
    "DTYPES",
    "FINE",
    "PROBLEM",
    "USAGE",
    "add_verb",
    "add_writing",
    "checked",
    "columns",
    "count",
    "out",
    "out_json",
    "progress",
    "say",
]


FINE, PROBLEM, USAGE = 0, 1, 2  # exit codes


DTYPES = {  # as --dtype has them -> as safetensors does
    "bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64",
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def add_verb(
    verbs: Any,
    name: str,
    line: str,
    text: str,
    examples: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """A verb's parser: one line for the list of verbs, a text and examples for its own --help."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=line,
        description=text,
        epilog=f"examples:\n{examples}\n\nexit code: 0 all is well, 1 a problem was found, 2 the command is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(run=run)
    return verb


def add_writing(verb: argparse.ArgumentParser, dtype: str) -> None:
    """What every verb takes that writes a model. dtype: of its floating weights, if nothing is said."""
    text = f"of floating weights: bf16, fp16, fp32 or fp64 (default: {dtype})"
    verb.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help=text)
    verb.add_argument(
        "--force", action="store_true", help="replace a model at OUT; what lies beside it stays"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")


def checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """An argument's type: the text as it is, where `parse` takes it. Its ValueError becomes wrong usage."""

    def same(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return text

    return same


def count(text: str) -> int:
    """An argument's type: how many lines to show."""
    if text == "all":
        return sys.maxsize
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or 'all', got {text!r}")
    return int(text)


def columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as text, each column as wide as its widest cell."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def out(lines: Iterable[str]) -> None:
    """Lines to stdout, in whatever encoding it has."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def out_json(value: Any) -> None:
    """One JSON document to stdout. Raises ValueError for numbers that JSON does not have."""
    out([json.dumps(value, indent=2, allow_nan=False)])


def say(sentence: str, code: int) -> int:
    """One sentence to stderr; returns the exit code that goes with it."""
    print(f"dist-ema: {printable(sentence)}", file=sys.stderr)
    return code


@contextmanager
def progress(what: str, total: int) -> Iterator[Tick]:
    """A bar on stderr over `total` bytes, if somebody is looking; yields the function that moves it."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console  # 0.1 s, for terminals alone
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*parts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda done: bar.advance(task, done)
