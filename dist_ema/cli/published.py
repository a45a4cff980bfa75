"""`dist-ema watch` and `board`: options, the ledger as a table, the page written or served."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import printable
from .console import (
    FINE,
    MODE,
    PROBLEM,
    Verb,
    checked,
    columns,
    number,
    out,
    say,
    whole_from,
)

if TYPE_CHECKING:
    from ..service.ledger import Record

__all__ = ["BOARD", "WATCH"]

# --- watch ----------------------------------------------------------------------------------------


def _address(url: str) -> None:
    from ..service.notify import refuse_address

    refuse_address(url)


def _watch(options: argparse.Namespace) -> int:
    from ..offline import plotting
    from ..service import ledger, notify, watch

    if options.plot:
        if not options.metric:
            options.verb.error("--plot needs --metric")
        plotting.refuse(options.plot)
    path = options.ledger or options.folder / ledger.NAME
    task = options.task or options.notify or "exec"
    if options.exec or options.notify:
        work = (
            partial(watch.run_command, options.exec)
            if options.exec
            else partial(notify.notify, options.notify)
        )
        watch.Watch(
            options.folder,
            work,
            ledger.Ledger(path, task, options.expiry, options.metric, options.mode),
            # A server that is behind would load the versions in between for nothing.
            newest=options.newest or bool(options.notify),
            jobs=options.jobs,
            retries=options.retries,
            timeout=options.timeout,
            expiry=options.expiry,
            report=_report_json if options.json else partial(_report, options.metric),
        ).run()
    elif not path.exists():
        return say(f"{path} does not exist: nothing was watched there yet. Pass --exec.", PROBLEM)
    # The ledger also has what other watchers did, and what was done before a restart.
    records = [
        record for record in ledger.read_records(path) if record.task == task or not options.exec
    ]
    if not options.json:
        sign = -1 if options.mode == "max" else 1
        out(_table(records, ledger.best_of(records, options.metric, sign)))
    elif not (options.exec or options.notify):
        for record in records:
            _report_json(record)
    if options.plot:
        watch.plot(options.plot, records, options.metric)
    done = [record for record in records if record.state == ledger.DONE]
    if options.metric and done and not any(options.metric in record.metrics for record in done):
        return say(f"no version has the metric {options.metric!r}: {_LAST_LINE}.", PROBLEM)
    return PROBLEM if any(record.state == ledger.FAILED for record in records) else FINE


_LAST_LINE = 'the last line of JSON that the command prints has to name it, like {"loss": 0.31}'


def _report(metric: str | None, record: Record) -> None:
    found = ", ".join(f"{name} {value:g}" for name, value in record.metrics.items()) or "done"
    if metric and metric not in record.metrics:
        found += f", without {metric!r}"
    text = f"version {record.version}, step {record.step}: {record.error or found}"
    out([printable(f"{text} ({record.seconds:.1f} s)")])


def _report_json(record: Record) -> None:
    print(json.dumps(asdict(record)), flush=True)


def _table(records: list[Record], best: Record | None) -> Iterator[str]:
    names = sorted({name for record in records for name in record.metrics})
    several = len({record.task for record in records}) > 1
    rows = [
        (
            *[record.task] * several,
            str(record.version) + (" best" if record is best else ""),
            str(record.step),
            record.state,
            *(f"{record.metrics[name]:g}" if name in record.metrics else "-" for name in names),
            f"{record.seconds:.1f}",
            record.error,
        )
        for record in records
    ]
    head = (*["task"] * several, "version", "step", "state", *names, "seconds", "error")
    yield from columns([head, *rows])


WATCH = Verb(
    "watch",
    """\
run a command for every version that a training publishes, or tell a server

ema.publish(FOLDER, every=...) writes versions behind training; this runs a command for each of
them, or has an inference server load the newest. A ledger (SQLite, in FOLDER) holds what was done,
so each version is done once, over restarts and over several watchers, on one host or many. The last
line of JSON that the command prints is kept: {"loss": 0.31, "live_loss": 0.35}. With --metric the
file FOLDER/best names the best version, which keep= then leaves alone. A watcher waits for a folder
that is not there yet, and ends when a file called FOLDER/stop lies there. Without --exec and
--notify it prints what the ledger holds.

In COMMAND {path}, {step} and {version} are replaced. --notify takes the address of SGLang
(http://host:port/update_weights_from_disk) or vLLM (http://host:port/collective_rpc, started with
VLLM_SERVER_DEV_MODE=1); both must see FOLDER under the same path. Adapters go to /load_lora_adapter
of SGLang, /v1/load_lora_adapter of vLLM.

examples:
  dist-ema watch run/published --exec 'python eval.py {path} {step}' --metric loss
  dist-ema watch run/published --exec 'python eval.py {path}' --jobs 4 --newest --timeout 3600
  dist-ema watch run/published --notify http://localhost:30000/update_weights_from_disk
  dist-ema watch run/published --plot loss.png --metric loss     the ledger as a table and a plot
""",
    {
        "folder": {"metavar": "FOLDER", "type": Path, "help": "the folder given to ema.publish"},
        "--metric": {"metavar": "NAME", "help": "of the last line of JSON; FOLDER/best goes by it"},
        **MODE,
        "--newest": {
            "action": "store_true",
            "help": "pass over versions when behind (--notify always does)",
        },
        "--jobs": {
            "type": whole_from(1),
            "default": 1,
            "metavar": "N",
            "help": "versions at the same time (default 1)",
        },
        "--retries": {
            "type": whole_from(0),
            "default": 2,
            "metavar": "N",
            "help": "of what failed (default 2)",
        },
        "--timeout": {
            "type": number("a number of seconds", lambda value: 0 <= value < float("inf")),
            "metavar": "SECONDS",
            "help": "end after so long without a new version; 0: when all are done "
            "(default: never)",
        },
        "--expiry": {
            "type": number("a positive number", lambda value: 0 < value < float("inf")),
            "default": 60.0,
            "metavar": "SECONDS",
            "help": "until a dead watcher's version is done by another (default 60)",
        },
        "--task": {
            "metavar": "NAME",
            "help": "each version is done once per task (default: 'exec', or the address)",
        },
        "--ledger": {"metavar": "FILE", "type": Path, "help": "default FOLDER/ledger.sqlite"},
        "--plot": {
            "metavar": "PNG",
            "help": "the metric over the steps at the end; live too, if it is reported",
        },
        "--json": {"action": "store_true", "help": "print a line of JSON for each version"},
    },
    _watch,
    codes="0 every version is done, 1 some failed",
    one_of={
        "--exec": {"metavar": "COMMAND", "help": "a shell command for each version"},
        "--notify": {
            "metavar": "URL",
            "type": checked(_address),
            "help": "of a server that loads each version",
        },
    },
)


# --- board ----------------------------------------------------------------------------------------


def _board(options: argparse.Namespace) -> int:
    from ..checkpoint import disk
    from ..service import page

    shown = options.folder, options.metrics, options.ledger
    if options.serve is not None:
        page.serve(options.serve, *shown)
        return FINE
    for path in filter(None, shown[1:]):
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {what}.")
    data = page.build(*shown).encode()
    where = options.out or options.folder.parent / "board.html"
    with disk.disk_errors(where, len(data)):
        where.write_bytes(data)
    out([str(where)])
    return FINE


BOARD = Verb(
    "board",
    """\
a page to look at: versions, evaluations, leases and curves of a published folder, as one HTML file

The page is plain HTML with inline SVG: no script, nothing from the network. It shows the versions
in FOLDER and who has them leased, what `dist-ema watch` found with the best marked, and from the
training's metrics.jsonl the distance between live and average and the metrics of both. --serve
builds it anew for each look, on this machine alone.

examples:
  dist-ema board run/published --out board.html
  dist-ema board run/published --serve 8000
  dist-ema board run/published --metrics run/metrics.jsonl --out board.html
""",
    {
        "folder": {"metavar": "FOLDER", "type": Path, "help": "the folder given to ema.publish"},
        "--out": {
            "metavar": "HTML",
            "type": Path,
            "help": "the file to write (default FOLDER/../board.html)",
        },
        "--serve": {
            "type": number("a port, 0 for any", lambda port: 0 <= port < 1 << 16, parse=int),
            "metavar": "PORT",
            "help": "serve it on 127.0.0.1 in place of writing a file",
        },
        "--metrics": {
            "metavar": "FILE",
            "type": Path,
            "help": "lines of JSON of the training (default FOLDER/../metrics.jsonl)",
        },
        "--ledger": {
            "metavar": "FILE",
            "type": Path,
            "help": "of dist-ema watch (default FOLDER/ledger.sqlite)",
        },
    },
    _board,
)
