"""The command line: it parses, prints and exits; `offline` does the work.

Parsing imports neither numpy nor torch.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from .._version import VERSION
from ..text import sentence
from . import checks, convert, models, plan, published, reading, widths
from .console import FINE, PROBLEM, USAGE, say

__all__ = ["build_parser", "main"]

VERBS = (
    reading.INSPECT,
    checks.VERIFY,
    models.EXPORT,
    reading.DIFF,
    convert.CONVERT,
    models.AVERAGE,
    widths.RECONSTRUCT,
    widths.SWEEP,
    plan.PLAN,
    published.WATCH,
    published.BOARD,
    checks.DOCTOR,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Wrong usage exits with code 2, through argparse."""
    # A stream that the shell closed (`>&-`) is None here.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    parser = build_parser()
    # parse_args would answer an unknown option with the usage of the whole command.
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.verb.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.run is None:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, as `| head`, has ended
        return FINE
    # A path that is not there is wrong usage, like an option.
    except (FileNotFoundError, argparse.ArgumentTypeError) as error:
        return say(sentence(error), USAGE)
    except (ImportError, OSError, ValueError) as error:
        return say(sentence(error), PROBLEM)
    except ArithmeticError as error:
        return say(f"these numbers are too large to compute with: {error}.", PROBLEM)
    except RecursionError:  # from Python 3.12 on, JSON is read deeper than it is written
        return say("a file holds values that are nested too deeply to print.", PROBLEM)
    except KeyboardInterrupt:
        return say("stopped; nothing half-written was left behind.", 130)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ema",
        description="Look into, ship, compare and combine averaged weights, "
        "without a GPU or a process group.",
        epilog="`dist-ema VERB --help` explains a verb, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"dist-ema {VERSION}")
    parser.set_defaults(run=None, verb=parser)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for verb in VERBS:
        verb.add_to(verbs)
    return parser
