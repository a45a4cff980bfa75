"""One HTML page of a run: its published versions, evaluations, leases and charts. No torch.

It needs no network. Every text on it comes from files that others wrote, so all of it passes
through `_escape`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

from ..checkpoint import leases, manifest, pointers, versions
from ..text import printable, sentence, size
from .ledger import NAME, Points, Record, curves, finite_numbers, read_records

__all__ = ["build", "serve"]

Facts: TypeAlias = dict[str, Any]  # of a version
Row: TypeAlias = tuple[bool, list[Any]]  # whether it is the best, and its cells

_STYLE = """\
:root{color-scheme:light dark;--line:#8885;--a:#0a8f7f;--b:#c2571a}
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.25rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
tr.best td{font-weight:600;color:var(--a)}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}
svg{width:320px;height:200px}svg text{font-size:11px;fill:currentColor}
.a{stroke:var(--a);fill:var(--a);color:var(--a)}.b{stroke:var(--b);fill:var(--b);color:var(--b)}
polyline{fill:none!important;stroke-width:1.5}
"""


def build(folder: Path, metrics: Path | None = None, ledger: Path | None = None) -> str:
    """The page, as it is now.

    Args:
        folder: The folder of published versions.
        metrics: Lines of JSON that the training wrote; by default metrics.jsonl beside the folder.
        ledger: The ledger of `dist-ema watch`; by default in the folder.

    Raises:
        FileNotFoundError: There is no folder.
        ValueError: It is one saved model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    versions.refuse_model(folder)
    published = dict(_read_versions(folder))
    records = read_records(ledger or folder / NAME)
    rows = _read_rows(metrics or folder.parent / "metrics.jsonl")
    latest, best = (pointers.named(folder / name) for name in (pointers.LATEST, pointers.BEST))
    parts = [
        f"<h1>{_escape(str(folder))}</h1>",
        f"<p>{_summary(folder, published, latest, best)}</p>",
        '<div class="charts">',
        *_charts(records, rows),
        "</div><h2>Versions</h2>",
        _table(*_version_rows(folder, published, best)),
        "<h2>Evaluations</h2>",
        _table(*_record_rows(records, best)),
        "<h2>Leases</h2>",
        _table(["version", "host", "pid", "expiry"], _lease_rows(folder)),
    ]
    head = f"<meta charset=utf-8><title>{_escape(folder.name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def serve(port: int, folder: Path, metrics: Path | None, ledger: Path | None) -> None:
    """Serve the page on this machine, built anew for each request, until an interrupt."""
    build(folder, metrics, ledger)  # refuses now, not in a request

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # who asked is gone
                super().handle()

        def do_GET(self) -> None:
            try:
                code, text = 200, build(folder, metrics, ledger)
            except (OSError, ValueError) as error:  # of files that were there when it began
                code, text = 503, f"<!doctype html><meta charset=utf-8>{_escape(sentence(error))}\n"
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    # This machine alone, because no password is asked for.
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


# --- what there is -------------------------------------------------------------------------------


def _read_versions(folder: Path) -> Iterator[tuple[str, Facts]]:
    """What each version says about itself, and its bytes."""
    for path in versions.numbered(folder).values():
        with suppress(OSError, ValueError):  # it is gone, or damaged
            saved = manifest.read(path)
            facts = None if saved is None else versions.facts_of(saved)
            if saved is not None and facts is not None:
                manifest.refuse_damaged(path, saved)
                facts["bytes"] = sum(file.get("size", 0) for file in saved.files.values())
                yield path.name, facts


def _read_rows(path: Path) -> list[dict[str, float]]:
    """The numbers of each line, {"live": {"loss": 1}} as live.loss."""
    rows = []
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(RecursionError, ValueError):
                rows.append(finite_numbers(dict(_flat("", json.loads(line)))))
    return rows


def _flat(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _summary(
    folder: Path, published: dict[str, Facts], latest: str | None, best: str | None
) -> str:
    texts = [
        f"{len(published)} versions, {size(sum(facts['bytes'] for facts in published.values()))}"
    ]
    texts += [f"{word} {name}" for word, name in (("latest", latest), ("best", best)) if name]
    for newest in list(published.values())[-1:]:
        texts += [
            f"{newest.get('average')}",
            f"step {newest.get('step')}",
            f"clock {newest.get('now')}",
            f"{newest.get('skipped')} skipped in this training",
        ]
    if (folder / versions.STOP).exists():
        texts.append("the training has stopped")
    return _escape(" · ".join(texts))


def _version_rows(
    folder: Path, published: dict[str, Facts], best: str | None
) -> tuple[list[str], list[Row]]:
    given = {name: facts.get("metrics") or {} for name, facts in published.items()}
    live = sorted({key for metrics in given.values() for key in metrics})
    leased = [path.name.rpartition(".")[0] for path in leases.read_all(folder)]
    rows = [
        (
            name == best,
            [
                *(name, facts.get("step"), facts.get("now"), size(facts["bytes"])),
                leased.count(name),
                *map(given[name].get, live),
            ],
        )
        for name, facts in published.items()
    ]
    return ["version", "step", "clock", "size", "leases", *live], rows


def _record_rows(records: Sequence[Record], best: str | None) -> tuple[list[str], list[Row]]:
    names = sorted({name for record in records for name in record.metrics})
    rows = [
        (
            versions.name_of(record.version) == best,
            [
                *(record.task, record.version, record.step, record.state, record.attempts),
                f"{record.seconds:.1f}",
                *map(record.metrics.get, names),
                record.error,
            ],
        )
        for record in records
    ]
    return ["task", "version", "step", "state", "attempts", "seconds", *names, "error"], rows


def _lease_rows(folder: Path) -> list[Row]:
    keys = ("host", "pid", "expiry")
    return [
        (False, [path.name.rpartition(".")[0], *map(leases.lease_facts(content).get, keys)])
        for path, content in leases.read_all(folder).items()
    ]


# --- HTML ----------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def _table(header: Sequence[str], rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{_cell(title)}</th>" for title in header)
    body = [
        f"<tr{' class=best' * best}>{''.join(f'<td>{_cell(value)}</td>' for value in cells)}</tr>"
        for best, cells in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _charts(records: Sequence[Record], rows: Sequence[dict[str, float]]) -> Iterator[str]:
    """Charts of evaluations over steps, live beside average, and of the training's rows."""
    names = sorted({name for record in records for name in record.metrics})
    for name in names:
        if not (name.startswith("live_") and name[5:] in names):
            yield _chart(name, *curves(records, name))
    keys = sorted({key for row in rows for key in row})
    clock = next((key for key in ("step", "averaging.now", "now", "epoch") if key in keys), None)
    for key in keys:
        other = key.replace("ema.", "live.", 1)
        if key.startswith("ema.") and other in keys:
            yield _chart(key[4:], _over(rows, clock, key), _over(rows, clock, other))
        elif key.rpartition(".")[2] in ("distance", "decay"):
            yield _chart(key, _over(rows, clock, key), [])


def _over(rows: Iterable[dict[str, float]], clock: str | None, key: str) -> Points:
    return [(row.get(clock or "", i), row[key]) for i, row in enumerate(rows) if key in row]


def _chart(title: str, average: Points, live: Points) -> str:
    points = [*average, *live]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    # A single point, and a flat curve, have no extent to divide by.
    wide, tall = (right - left) or 1, (high - low) or 1

    def curve(kind: str, pairs: Points) -> str:
        places = [
            (50 + 250 * (x - left) / wide, 165 - 145 * (y - low) / tall) for x, y in sorted(pairs)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places)
        return f'<g class="{kind}"><polyline points="{line}"/>{dots}</g>'

    texts = [(46, 25, "end", f"{high:.4g}"), (46, 168, "end", f"{low:.4g}")]
    texts += [(50, 182, "start", f"{left:g}"), (300, 182, "end", f"{right:g}")]
    labels = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{_escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    axes = '<path d="M50 20V165H300" fill="none" stroke="currentColor" stroke-opacity=".4"/>'
    name = _escape(title)
    legend = ": <span class=a>average</span>, <span class=b>live</span>" if live else ""
    return (
        f'<figure><figcaption>{name}{legend}</figcaption><svg viewBox="0 0 320 200" role="img" '
        f'aria-label="{name}">{axes}{labels}{curve("b", live)}{curve("a", average)}</svg></figure>'
    )
