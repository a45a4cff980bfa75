"""`dist-ema inspect` and `diff`: options, and tables of files, weights and their distances."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ..text import listed, plural, printable, some
from .console import FINE, PROBLEM, WHICH, Verb, columns, count, number, progress, say, show

if TYPE_CHECKING:
    from ..offline.diff import Difference
    from ..offline.report import ModelReport, Total

__all__ = ["DIFF", "INSPECT"]

SHOWN = 20  # lines of a table, by default


# --- inspect --------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    from ..offline.report import report_on

    report = report_on(options.path)
    values = report.to_json()
    values["weights"] = dict(list(values["weights"].items())[: options.weights])
    show(
        options,
        values,
        _text_of_inspect(report, SHOWN if options.weights is None else options.weights),
    )
    # On stderr, so that what --json prints stays JSON.
    for problem in report.problems:
        say(f"{report.path}: ema.json is not sound: {problem}.", PROBLEM)
    return PROBLEM if report.problems else FINE


def _text_of_inspect(report: ModelReport, shown: int) -> Iterator[str]:
    yield printable(f"{report.path}: {_kind(report)}")
    yield ""
    yield from columns(list(_facts(report)))
    rows = [
        (name, entry.dtype, str(list(entry.shape)), _role(report, name))
        for name, (_, entry) in list(report.weights.items())[:shown]
    ]
    if rows:
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
        yield "averaged", f"{plural(len(facts.averaged), 'weight')}{rest}"
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
    if attach or facts.clock:  # models from elsewhere have neither
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


INSPECT = Verb(
    "inspect",
    """\
say what is in a saved average, an exported model or any safetensors file

Say what is in a saved average (ema.save), an exported model (ema.export), a Hugging Face folder, a
torch.distributed.checkpoint folder or one .safetensors file. Only headers are read, so it takes a
moment for any size. Contradictions between ema.json and the headers are listed on stderr.

examples:
  dist-ema inspect run/ema-001000                   clock, schedule, files, the first weights
  dist-ema inspect model.safetensors --weights all  every weight
  dist-ema inspect out/ --json                      the same for programs
""",
    {
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
    },
    _inspect,
)


# --- diff -----------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> int:
    from ..offline.diff import diff

    difference = diff(
        options.a,
        options.b,
        which=(options.which_a, options.which_b),
        bar=partial(progress, "compare"),
    )
    facts = _to_json(difference, options.threshold, options.weights)
    shown = SHOWN if options.weights is None else options.weights
    show(options, facts, _text_of_diff(difference, options.threshold, shown))
    return FINE if difference.same(options.threshold) else PROBLEM


def _to_json(difference: Difference, threshold: float | None, shown: int | None) -> dict[str, Any]:
    rows = {
        row.name: {
            "distance": row.distance if math.isfinite(row.distance) else None,
            "largest": row.largest if math.isfinite(row.largest) else None,
            "changed": row.changed,
            "elements": row.elements,
            "dtypes": list(row.dtypes),
        }
        for row in difference.rows[:shown]
    }
    return {
        "a": difference.a,
        "b": difference.b,
        "same": difference.same(threshold),
        "compared": len(difference.rows),
        "threshold": threshold,
        "beyond": len(difference.beyond(threshold)),
        "missing": difference.missing,
        "unexpected": difference.unexpected,
        "reshaped": difference.reshaped,
        "weights": rows,
    }


def _text_of_diff(difference: Difference, threshold: float | None, shown: int) -> Iterator[str]:
    beyond = difference.beyond(threshold)
    allowed = "" if threshold is None else f" by more than {threshold:g}"
    verdict = f"{len(beyond):,} differ{allowed}" if beyond else f"none differs{allowed}"
    yield printable(
        f"{plural(len(difference.rows), 'weight')} of {difference.a} and {difference.b} compared, "
        f"{verdict}"
    )
    yield from (printable(f"missing     {name} (in A alone)") for name in difference.missing)
    yield from (printable(f"unexpected  {name} (in B alone)") for name in difference.unexpected)
    yield from (
        printable(f"reshaped    {name}: {was} in A, {now} in B")
        for name, (was, now) in difference.reshaped.items()
    )
    rows = difference.beyond(None)
    if rows[:shown]:
        yield ""
        cells = [
            (
                row.name,
                f"{row.distance:.3e}",
                f"{row.largest:.3e}",
                f"{row.changed:,} of {row.elements:,}",
                " -> ".join(dict.fromkeys(row.dtypes)),
            )
            for row in rows[:shown]
        ]
        yield from columns([("weight", "distance", "max |A-B|", "changed", "dtype"), *cells])
    if len(rows) > shown:
        yield f"... and {len(rows) - shown:,} of {len(rows):,} more: --weights all"


DIFF = Verb(
    "diff",
    """\
compare two models, weight by weight, the farthest first

Compare two models of any form that dist-ema reads. The distance of a weight is ||A - B|| / ||A||,
in float64; integers and booleans are compared exactly. Names that only one of the two has, other
shapes and other dtypes are listed. Tied weights are compared under each name that both know.

examples:
  dist-ema diff run/ema-001000 run/ema-002000          how far the average moved
  dist-ema diff run/ema-001000 out/ --threshold 0.01   is the bf16 export within 1 % of it?
  dist-ema diff run/ema run/ema --which-b 1            two averages of one folder
  dist-ema diff a.safetensors b.safetensors --json     every weight, for programs
""",
    {
        "a": {"metavar": "A", "help": "a folder, or one .safetensors file"},
        "b": {"metavar": "B", "help": "what is compared with it"},
        "--threshold": {
            "type": number("a distance, 0 or larger", lambda value: 0 <= value < math.inf),
            "metavar": "X",
            "help": "distances up to X, and other dtypes, are the same",
        },
        "--weights": {
            "type": count,
            "metavar": "N",
            "help": f"rows to print, or 'all' (default {SHOWN}; --json: all)",
        },
        "--which-a": {**WHICH, "help": "of several averages in A: number, label or schedule"},
        "--which-b": {**WHICH, "help": "of several averages in B: number, label or schedule"},
        "--json": {"action": "store_true", "help": "print JSON; an infinite distance is null"},
    },
    _diff,
    codes="0 the same, 1 they differ",
)
