"""`dist-ema inspect`: what is in this file or folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..text import listed, printable, some
from .console import (
    FINE,
    PROBLEM,
    Arguments,
    columns,
    count,
    say,
    show,
)

if TYPE_CHECKING:
    from ..offline.report import ModelReport, Total

__all__ = ["ARGUMENTS", "TEXT", "run"]

TEXT = """\
say what is in a saved average, an exported model or any safetensors file

Say what is in a saved average (ema.save), an exported model (ema.export), a Hugging Face folder, a
torch.distributed.checkpoint folder or one .safetensors file. Only headers are read, so it takes a
moment for any size. Contradictions between ema.json and the headers are listed on stderr.

examples:
  dist-ema inspect run/ema-001000                   clock, schedule, files, the first weights
  dist-ema inspect model.safetensors --weights all  every weight
  dist-ema inspect out/ --json                      the same for programs
"""

SHOWN = 20  # weights in the table, by default


ARGUMENTS: Arguments = {
    "path": {"metavar": "PATH", "help": "a folder, or one .safetensors file"},
    "--json": {
        "action": "store_true",
        "help": "print JSON, with every weight unless --weights says less",
    },
    "--weights": {
        "type": count,
        "metavar": "N",
        "help": f"weights to list, or 'all' (default {SHOWN})",
    },
}


def run(options: argparse.Namespace) -> int:
    from ..offline.report import report_on

    report = report_on(options.path)
    values = report.to_json()
    values["weights"] = dict(list(values["weights"].items())[: options.weights])
    show(options, values, _text(report, SHOWN if options.weights is None else options.weights))
    for problem in report.problems:
        say(f"{report.path}: ema.json is not sound: {problem}.", PROBLEM)
    return PROBLEM if report.problems else FINE


def _text(report: ModelReport, shown: int) -> Iterator[str]:
    yield printable(f"{report.path}: {_kind(report)}")
    yield ""
    yield from columns(list(_facts(report)))
    listed = list(report.weights.items())[:shown]
    if listed:
        rows = [
            (name, entry.dtype, str(list(entry.shape)), _role(report, name))
            for name, (_, entry) in listed
        ]
        yield ""
        yield from columns([("weight", "dtype", "shape", "role"), *rows])
    if len(report.weights) > shown:
        yield f"... and {len(report.weights) - shown} of {len(report.weights)} more: --weights all"


def _kind(report: ModelReport) -> str:
    kinds = {
        "ema": "an average to resume from",
        "export": "a model to ship, exported by dist_ema",
        "model": "a safetensors model, not written by dist_ema",
        "file": "a safetensors file",
        "other": "a checkpoint of another form",
    }
    version = report.to_json()["format"]
    return kinds.get(report.kind, report.kind) + (f" (format {version})" if version else "")


def _facts(report: ModelReport) -> Iterator[tuple[str, str]]:
    """(term, value) for each line of the summary."""
    facts = report.manifest
    if report.has_manifest:
        yield from _history(report)
        rest = "" if facts.weights == "all" else "; frozen weights and buffers are not in the files"
        yield "averaged", f"{len(facts.averaged)} weights{rest}"
        if len(report.averages) == 1:
            yield "own buffers", ", ".join(facts.own_buffers) or "none"
    yield from (("alias", f"{alias} is {name}") for alias, name in report.aliases.items())
    yield "in all", _total(report.averages[0].total)
    yield from ((dtype, _total(total)) for dtype, total in report.totals.items())
    for name, file in report.files.items():
        sums = ", ".join(f"{kind} {value}" for kind, value in report.manifest.sums_of(name).items())
        yield "file", f"{name}: {file.size:,} bytes, {sums or 'no check sum'}"
    for why in sorted(set(report.others.values())):
        yield (
            "left out",
            f"{why}: {some([name for name in report.others if report.others[name] == why], SHOWN)}",
        )


def _history(report: ModelReport) -> Iterator[tuple[str, str]]:
    from ..offline.model_card import format_clock, format_schedule

    facts, attach = report.manifest, report.manifest.attach
    if facts.clock:
        yield "clock", format_clock(facts.clock)
    specs = list(map(format_schedule, facts.schedules))
    if len(report.averages) == 1:
        yield from (("schedule", spec) for spec in specs)
    else:  # a line for each, with what is its own
        for i, tree in enumerate(report.averages):
            where = f"averages/{tree.label}" if tree.label else "in the folder itself"
            own = ", ".join(facts.own_buffers_of(tree.label)) or "none"
            spec = specs[i] if i < len(specs) else "no schedule"
            yield f"average {i}", f"{spec}, {where}: {_total(tree.total)}; own buffers {own}"
    yield "attach", listed(attach) if attach else "updated by hand"
    if facts.extra:
        yield "extra", ", ".join(facts.extra)
    yield "versions", listed(facts.versions)


def _total(total: Total) -> str:
    return f"weights {total.weights:,}, parameters {total.parameters:,}, bytes {total.bytes:,}"


def _role(report: ModelReport, name: str) -> str:
    return (
        "averaged"
        if name in report.manifest.averaged
        else "own buffer"
        if name in report.manifest.own_buffers
        else ""
    )
