"""What the command line prints: columns, sentences and progress bars. No torch.

Names come from files, so nothing reaches a terminal before `printable` has looked at it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "FINE",
    "PROBLEM",
    "USAGE",
    "add_verb",
    "columns",
    "listed",
    "out",
    "out_json",
    "printable",
    "progress",
    "say",
    "size",
]

FINE, PROBLEM, USAGE = 0, 1, 2  # exit codes


def add_verb(
    verbs: Any, name: str, line: str, text: str, examples: str, run: Callable[[argparse.Namespace], int]
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


def columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as text, each column as wide as its widest cell."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def printable(text: str) -> str:
    """What would move the cursor is shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(values: dict[str, Any]) -> str:
    """`now 100, updates 10`"""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def size(count: float) -> str:
    """1.23 GB"""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"


def out(lines: Iterable[str]) -> None:
    """Lines to stdout, in whatever encoding it has."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def out_json(value: Any) -> None:
    """One JSON document to stdout."""
    out([json.dumps(value, indent=2)])


def say(sentence: str, code: int) -> int:
    """One sentence to stderr; returns the exit code that goes with it."""
    print(f"dist-ema: {printable(sentence)}", file=sys.stderr)
    return code


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over `total` bytes, if somebody is looking; yields the function that moves it."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console  # 0.1 s, for terminals alone
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
