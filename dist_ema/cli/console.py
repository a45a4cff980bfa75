"""What the verbs of the command line share: options, tables, exit codes, progress. No torch.

Names come from files, so each text passes through `printable` before it reaches a terminal.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..text import Tick, printable, shortened, size_of

if TYPE_CHECKING:
    from ..schedules import Window

__all__ = [
    "CURVE",
    "DTYPES",
    "FINE",
    "JSON",
    "MODE",
    "PROBLEM",
    "USAGE",
    "WHICH",
    "WIDEST",
    "WINDOW",
    "Arguments",
    "Verb",
    "add_arguments",
    "checked",
    "columns",
    "count",
    "number",
    "out",
    "out_json",
    "progress",
    "say",
    "show",
    "whole_from",
    "window_of",
    "writing",
]

FINE, PROBLEM, USAGE = 0, 1, 2  # exit codes
FIGURES = 36  # columns of a progress line: bytes, their rate, the time left, spaces between
WIDEST = math.sqrt(1 / 12)  # the width of the plain mean, as a share of the training
DTYPES = {  # as --dtype has them -> as safetensors does
    "bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64",
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip

Arguments: TypeAlias = Mapping[str, Mapping[str, Any]]  # name -> the options of add_argument
JSON: Arguments = {"--json": {"action": "store_true", "help": "print JSON"}}
MODE: Arguments = {
    "--mode": {
        "choices": ("min", "max"),
        "default": "min",
        "help": "which value is best (default min)",
    }
}
WHICH = {
    "default": "0",
    "metavar": "NAME",
    "help": "of several averages: its number, label or schedule",
}


class Verb(NamedTuple):
    """A verb of the command line."""

    name: str
    text: str  # the line for the list of verbs, an empty line, the description, the examples
    arguments: Arguments
    run: Callable[[argparse.Namespace], int]  # returns the exit code
    codes: str = "0 all is well, 1 a problem was found"  # what the exit codes mean
    one_of: Arguments = MappingProxyType({})  # which exclude each other
    one_is_required: bool = False
    add_groups: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def add_to(self, verbs: Any) -> None:
        """Add the parser to what add_subparsers returned."""
        summary, _, rest = self.text.partition("\n\n")
        description, _, examples = rest.partition("\nexamples:\n")
        parser: argparse.ArgumentParser = verbs.add_parser(
            self.name,
            help=summary,
            description=description,
            epilog=f"examples:\n{examples}\nexit code: {self.codes}, 2 the command is wrong",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # The parser too, so that a verb can report wrong usage of its own.
        parser.set_defaults(run=self.run, verb=parser)
        add_arguments(parser, self.arguments)
        if self.one_of:
            group = parser.add_mutually_exclusive_group(required=self.one_is_required)
            add_arguments(group, self.one_of)
        self.add_groups(parser)


def add_arguments(parser: Any, arguments: Arguments) -> None:
    """Add arguments to a parser, or to a group of one."""
    for name, options in arguments.items():
        parser.add_argument(name, **options)


def writing(dtype: str) -> Arguments:
    """The arguments of a verb that writes a model. dtype: the default of its floating weights."""
    return {
        "--max-shard-size": {
            "type": checked(size_of),
            "metavar": "SIZE",
            "help": "of each file in a folder (default 5GB)",
        },
        "--dtype": {
            "choices": DTYPES,
            "metavar": "TYPE",
            "help": f"of floating weights: bf16, fp16, fp32 or fp64 (default: {dtype})",
        },
        "--force": {
            "action": "store_true",
            "help": "replace a model at OUT; what lies beside it stays",
        },
        **JSON,
    }


def checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """An argument's type: the text itself, if `parse` takes it; its ValueError is wrong usage."""

    def same(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return text

    return same


def number(
    what: str, allowed: Callable[[Any], bool], parse: Callable[[str], Any] = float
) -> Callable[[str], Any]:
    """An argument's type: a number that is `allowed`; others are wrong usage, 'must be `what`'."""

    def parsed(text: str) -> Any:
        try:
            value = parse(text)
        except (OverflowError, ValueError):
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parsed


def whole_from(least: int) -> Callable[[str], Any]:
    """An argument's type: a whole number that is not below `least`."""
    return number(f"a whole number from {least}", lambda value: value >= least, parse=int)


CURVE: Mapping[str, Any] = {
    "choices": ["linear", "minus-sqrt", "cosine"],  # of schedules.CURVES
    "help": "a virtual cooldown: weights as the decay of a learning rate over --window gives them",
}
WINDOW: Arguments = {
    "--window": {
        "type": number("positive", lambda value: 0 < value < math.inf),
        "metavar": "LENGTH",
        "help": "of --curve, in units of the clock",
    }
}


def window_of(options: argparse.Namespace) -> Window | None:
    """The window that --curve and --window describe; one without the other is wrong usage."""
    from ..schedules import Window  # which imports numpy

    if (options.curve is None) != (options.window is None):
        raise argparse.ArgumentTypeError("--curve and --window go together.")
    return None if options.curve is None else Window(options.window, options.curve)


# An argument's type: how many lines to show.
count = number(
    "a whole number or 'all'",
    lambda value: value >= 0,
    lambda text: sys.maxsize if text == "all" else int(text),
)


def columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines, each column as wide as its widest cell. The first row is the header."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def out(lines: Iterable[str]) -> None:
    """Lines to stdout, in whatever encoding it has."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        # A terminal of another encoding must not end the verb.
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def out_json(value: Any) -> None:
    """One JSON document to stdout. Raises ValueError for NaN and infinity."""
    out([json.dumps(value, indent=2, allow_nan=False)])


def show(options: argparse.Namespace, facts: Any, lines: Iterable[str]) -> int:
    """The result of a verb: JSON where --json asks for it, else lines."""
    if options.json:
        out_json(facts)
    else:
        out(lines)
    return FINE


_ARGUMENT = re.compile(r"\b([Pp]ass|with) (force|inert|like|which)=(True|'[^']*'|\[[^\]]*\])?")


def _as_option(argument: re.Match[str]) -> str:
    values = re.findall("'([^']*)'", argument[3] or "")
    options = [f"--{argument[2]} {value}" for value in values] or [f"--{argument[2]}"]
    return f"{argument[1]} {' '.join(options)}"


def say(sentence: str, code: int) -> int:
    """One sentence to stderr; returns the exit code that goes with it.

    The library's errors name arguments (`Pass force=True`), the command's user knows options.
    """
    sentence = _ARGUMENT.sub(_as_option, sentence)
    print(f"dist-ema: {printable(sentence)}", file=sys.stderr)
    return code


@contextmanager
def progress(what: str, total: int) -> Iterator[Tick]:
    """A bar on stderr over `total` bytes, on terminals; yields the function that moves it."""
    # A log would fill with the frames of a bar.
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

    console = Console(stderr=True)
    width = console.width // 4
    cells = (
        TextColumn("{task.description}", markup=False),  # a path may hold [brackets]
        BarColumn(width),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # rich would cut the cells on the right, the bar among them, to make room for a long path.
    what = shortened(printable(what), max(9, console.width - width - FIGURES))
    with Progress(*cells, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
