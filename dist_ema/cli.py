"""The command line: it parses, prints and exits; `offline` does the work.

A verb is one function that adds its parser and one that runs it and returns the exit code. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import offline
from .format import META

__all__ = ["main"]

FINE, PROBLEM, USAGE = 0, 1, 2
SHOWN = 20  # weights in the table, if nothing is said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Wrong usage leaves through argparse, with code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        print(f"dist-ema {_version()}")
        return FINE
    if options.run is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        return FINE
    except FileNotFoundError as error:
        return _say(str(error), USAGE)
    except (OSError, ValueError) as error:
        return _say(str(error), PROBLEM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ema",
        description="Look into what dist_ema saved or exported, without torch, a GPU or a process group.",
        epilog="`dist-ema VERB --help` explains a verb, with an example.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=None)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for add in (_add_inspect,):
        add(verbs)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, for --version alone

    try:
        return version("dist-ema")
    except PackageNotFoundError:
        return "(run from its source, not installed)"


# --- inspect -----------------------------------------------------------------------------------------------------


def _add_inspect(verbs: Any) -> None:
    verb = verbs.add_parser(
        "inspect",
        help="say what is in a saved average, an exported model or any safetensors file",
        description="Say what is in a saved average (ema.save), an exported model (ema.export), a Hugging Face folder\n"
        "or one .safetensors file. Only headers are read, so it takes a moment for any size.",
        epilog="examples:\n"
        "  dist-ema inspect run/ema-001000                   clock, schedule, files, the first weights\n"
        "  dist-ema inspect model.safetensors --weights all  every weight\n"
        "  dist-ema inspect out/ --json                      the same for programs\n\n"
        "exit code: 0 all is well, 1 the artifact has a problem, 2 the command is wrong",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("path", metavar="PATH", help="a folder, or one .safetensors file")
    verb.add_argument("--json", action="store_true", help="print JSON, with every weight unless --weights says less")
    verb.add_argument("--weights", type=_count, metavar="N", help=f"weights to list, or 'all' (default {SHOWN})")
    verb.set_defaults(run=_inspect)


def _count(text: str) -> int:
    if text == "all":
        return sys.maxsize
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or 'all', got {text!r}")
    return int(text)


def _inspect(options: argparse.Namespace) -> int:
    report = offline.inspect(options.path)
    if options.json:
        values = report.plain()
        values["weights"] = dict(list(values["weights"].items())[: options.weights])
        _print([json.dumps(values, indent=2)])
    else:
        _print(_text(report, SHOWN if options.weights is None else options.weights))
    for problem in report.problems:
        _say(f"{report.path}: {META} is not sound: {problem}.", PROBLEM)
    return PROBLEM if report.problems else FINE


def _text(report: offline.Report, shown: int) -> Iterator[str]:
    yield _printable(f"{report.path}: {_kind(report)}")
    yield ""
    yield from _columns(list(_facts(report)))
    listed = list(report.weights.items())[:shown]
    if listed:
        rows = [(name, entry.dtype, str(list(entry.shape)), _role(report, name)) for name, (_, entry) in listed]
        yield ""
        yield from _columns([("weight", "dtype", "shape", ""), *rows])
    if len(report.weights) > shown:
        yield f"... and {len(report.weights) - shown} of {len(report.weights)} more: --weights all"


def _kind(report: offline.Report) -> str:
    kinds = {
        "ema": "an average to resume from",
        "export": "a model to ship, exported by dist_ema",
        "model": "a safetensors model, not written by dist_ema",
        "file": "a safetensors file",
    }
    version = report.meta.get("format")
    return kinds.get(report.kind, report.kind) + (f" (format {version})" if version else "")


def _facts(report: offline.Report) -> Iterator[tuple[str, str]]:
    """(word, what is to be said of it) for each line of the summary."""
    meta = report.meta
    if meta.get("format"):
        yield from _history(meta)
        rest = "" if meta.get("weights") == "all" else "; frozen weights and buffers are not in the files"
        yield "averaged", f"{len(meta['averaged'])} weights{rest}"
        yield "own buffers", ", ".join(map(str, meta["own_buffers"])) or "none"
    yield from (("alias", f"{alias} is {name}") for alias, name in report.aliases.items())
    yield "in all", _total(report.total)
    yield from ((dtype, _total(total)) for dtype, total in report.totals.items())
    for name, file in report.files.items():
        sums = ", ".join(f"{kind} {value}" for kind, value in report.sums(name).items())
        yield "file", f"{name}: {file.size:,} bytes, {sums or 'no check sum'}"


def _history(meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    clock, attach = dict(sorted(meta["clock"].items(), key=lambda item: item[0] != "now")), meta.get("attach")
    started = clock.pop("started", True)
    yield "clock", _listed(clock) + ("" if started else ", not started")
    yield from (("schedule", _call(spec)) for spec in meta["schedules"])
    yield "attach", _listed(attach) if isinstance(attach, dict) else "updated by hand"
    if meta["extra"]:
        yield "extra", ", ".join(meta["extra"])
    yield "versions", _listed(meta["versions"])


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _total(total: offline.Total) -> str:
    return f"weights {total.weights:,}, parameters {total.parameters:,}, bytes {total.bytes:,}"


def _call(spec: Any) -> str:
    """Power(sigma_rel=0.1) from {"name": "Power", "sigma_rel": 0.1}."""
    if not isinstance(spec, dict):
        return str(spec)
    return f"{spec.get('name')}({', '.join(f'{key}={value!r}' for key, value in spec.items() if key != 'name')})"


def _role(report: offline.Report, name: str) -> str:
    return "averaged" if name in report.meta["averaged"] else "own buffer" if name in report.meta["own_buffers"] else ""


# --- printing ----------------------------------------------------------------------------------------------------


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as text, each column as wide as its widest cell."""
    rows = [tuple(map(_printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _printable(text: str) -> str:
    """Names come from files: what would move the cursor is shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print(lines: Iterable[str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def _say(sentence: str, code: int) -> int:
    """One sentence to stderr; returns the exit code that goes with it."""
    print(f"dist-ema: {_printable(sentence)}", file=sys.stderr)
    return code
