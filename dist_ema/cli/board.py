"""`dist-ema board`: one page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from .console import FINE, Arguments, number, out

__all__ = ["ARGUMENTS", "TEXT", "run"]

TEXT = """\
a page to look at: versions, evaluations, leases and curves of a published folder, as one HTML file

The page is plain HTML with inline SVG: no script, nothing from the network. It shows the versions
in FOLDER and who has them leased, what `dist-ema watch` found with the best marked, and from the
training's metrics.jsonl the distance between live and average and the metrics of both. --serve
builds it anew for each look, on this machine alone.

examples:
  dist-ema board run/published --out board.html
  dist-ema board run/published --serve 8000
  dist-ema board run/published --metrics run/metrics.jsonl --out board.html
"""
ARGUMENTS: Arguments = {
    "folder": {"metavar": "FOLDER", "help": "the folder given to ema.publish"},
    "--out": {"metavar": "HTML", "help": "the file to write (default FOLDER/../board.html)"},
    "--serve": {
        "type": number("a port, 0 for any", lambda port: 0 <= port < 1 << 16, parse=int),
        "metavar": "PORT",
        "help": "serve it on 127.0.0.1 in place of writing a file",
    },
    "--metrics": {
        "metavar": "FILE",
        "help": "lines of JSON of the training (default FOLDER/../metrics.jsonl)",
    },
    "--ledger": {"metavar": "FILE", "help": "of dist-ema watch (default FOLDER/ledger.sqlite)"},
}


def run(options: argparse.Namespace) -> int:
    from ..service import page

    folder = Path(options.folder)
    sources = [Path(each) if each else None for each in (options.metrics, options.ledger)]
    if options.serve is not None:
        page.serve(options.serve, folder, *sources)
        return FINE
    text = page.build(folder, *sources)
    where = Path(options.out) if options.out else folder.parent / "board.html"
    where.write_text(text, encoding="utf-8")
    out([str(where)])
    return FINE
