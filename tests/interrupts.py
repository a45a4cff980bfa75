"""An interrupt (Ctrl-C) of one rank at any line of a verb: the others raise at once, not in time.

    python -m tests.interrupts [--only save load]    every third line of every verb, on two ranks
    python -m tests.interrupts --step 1              every line

After each interrupt the ranks are in step: the next verbs work.

How to read a failure: the message names the verb and the line that was interrupted.
"""

from __future__ import annotations

import argparse
import linecache
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dist_ema
from dist_ema import EMA
from tests._models import Net
from tests._ranks import run_ranks
from tests._wrappers import wrap

HERE = Path(dist_ema.__file__).parent
ROOMS = ("ema.py", "verbs/*.py", "checkpoint/*.py", "averaging/gather.py", "distributed/*.py")
FILES = {str(path) for room in ROOMS for path in HERE.glob(room)}
# The threads of these look for the others while they wait, so their lines have no end.
WAITS = {"_await", "_poll", "counted", "of", "has", "completes", "wait_for", "_run", "__getattr__"}
# A second interrupt would come while the first one is reported.
REPORTS = {"report", "publish_failure", "error_text", "failed", "entering"}
TIMEOUT = 60.0
VERBS = ("save", "stream", "behind", "export", "load", "gather", "copy_to", "metrics", "rescan")


class Interrupter:
    """Raises KeyboardInterrupt at one executed line of a verb, in this thread.

    Args:
        line: Which one; -1 for none.
    """

    def __init__(self, line: int) -> None:
        self.line, self.seen, self.place = line, 0, ""

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name in WAITS | REPORTS | {"__del__"}:
            return None
        if event == "line" and not self.seen:
            # Before this the verb has not begun: the rank is as late as one that never calls it.
            self.seen = int(".entering(" in linecache.getline(code.co_filename, frame.f_lineno))
        elif event == "line" and not self.place:
            self.seen += 1
            if self.seen == self.line:
                self.place = f"{code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def run(self, work: Callable[[], Any]) -> BaseException | None:
        """What was raised."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        except (KeyboardInterrupt, RuntimeError) as error:
            return error
        finally:
            sys.settrace(before)
        return None


class Interrupted:
    """An average on two ranks, of which the second one is interrupted."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.ema = EMA(wrap("ddp", Net()), 0.5, timeout=TIMEOUT)
        self.other = Net()
        self.ema.save(folder / "kept")

    def call(self, verb: str) -> None:
        ema, folder = self.ema, self.folder
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: ema.save(folder / "new"),
            "stream": lambda: ema.save(folder / "new", mode="stream"),
            "behind": lambda: ema.save(folder / "new", wait=False),
            "export": lambda: ema.export(folder / "out"),
            "load": lambda: ema.load(folder / "kept"),
            "gather": ema.gather,
            "copy_to": lambda: ema.copy_to(self.other),
            "metrics": ema.metrics,
            "rescan": ema.rescan,
        }
        calls[verb]()

    def interrupt(self, verb: str, line: int) -> bool:
        """Whether there was such a line."""
        interrupter = Interrupter(line if dist.get_rank() == 1 else -1)
        began = time.monotonic()
        error = interrupter.run(lambda: self.call(verb))
        told = isinstance(error, RuntimeError) and "KeyboardInterrupt" in str(error)
        last = self.folder / "place"  # for the other rank, should that one fail
        if interrupter.place:
            last.write_text(interrupter.place)
        place = f"{verb}, line {line}, {last.read_text() if last.exists() else ''}"
        assert error is None or told or interrupter.place, f"{place}: {error}"
        self.go_on(place)
        assert time.monotonic() - began < TIMEOUT, f"{place}: a rank waited for the timeout"
        return any_rank(bool(interrupter.place))

    def go_on(self, place: str) -> None:
        """The next verbs work, once a rank that was at the end of its verb has heard of it."""
        for _ in range(3):
            try:
                self.ema.metrics()
                break
            except RuntimeError as error:
                assert "KeyboardInterrupt" in str(error), f"{place}: {error}"
        self.ema.save(self.folder / "new")


def any_rank(value: bool) -> bool:
    total = torch.tensor(int(value))
    dist.all_reduce(total)
    return bool(total)


def between_messages(folder: str, verbs: tuple[str, ...], first: int, step: int) -> list[int]:
    """Interrupt every `step`-th line of the verbs; returns how many lines of each."""
    warnings.simplefilter("ignore", UserWarning)
    interrupted, counts = Interrupted(Path(folder)), []
    for verb in verbs:
        interrupted.call(verb)  # connections are made once
        line = first
        while interrupted.interrupt(verb, line):
            line += step
        counts.append(line)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.interrupts", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--step", type=int, default=3)
    options = parser.parse_args()
    for verb in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = run_ranks(
                2, between_messages, folder, (verb,), 2, options.step, timeout=7200, server=True
            )
        print(f"{verb}: {found[1][0] // options.step} interrupts, 0 outlasted", flush=True)


if __name__ == "__main__":
    main()
