"""Processes, progress and files. The main process never imports torch: a server does it once, and
forks the others.

[Note: killed] A cell's file appears by a rename when it is done, so a killed study does the cell
again that it was at; the language model goes on from its last checkpoint. Workers wait for the end
of the main process in a thread and end with it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from . import files
from .sizes import Cell, Size

__all__ = ["StudyError", "result_of", "run"]

RANKS = 2
STOPPED = -(1 << 62)  # steps done: do not begin what the pool has handed out already
Say = Callable[[str], None]


class StudyError(RuntimeError):
    """A process of the study ended without its result."""


def run(todo: Sequence[Cell], size: Size, out: Path, workers: int) -> None:
    """Do these cells; each leaves out/NAME.json.

    Raises what a cell raised, and StudyError if a process died.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "sklearn.datasets", "dist_ema.ema"]
    )
    counter = context.Value("q", 0)
    with progress(sum(cell.cost for cell in todo)) as (show, say):
        done = 0

        def finished(cell: Cell) -> None:
            nonlocal done
            done += 1
            seconds = json.loads(result_of(out, cell).read_text())["seconds"]
            say(f"{done:3d}/{len(todo)}  {cell.name}  {seconds:.0f} s")

        def poll() -> None:
            show(counter.value)

        for cell in todo:
            if cell.experiment == "language":
                _on_ranks(context, cell, size, out, counter, poll)
                finished(cell)
        alone = [cell for cell in todo if cell.experiment != "language"]
        if alone:
            pool = ProcessPoolExecutor(workers, context, _begin, (counter,))
            try:
                waiting = {pool.submit(_cell, cell, size, out): cell for cell in alone}
                _collect(waiting, poll, finished)
            except BaseException:  # Ctrl-C too
                counter.value = STOPPED
                raise
            finally:  # NOTE: no `with pool`: leaving that takes back the order to cancel
                pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    waiting: dict[Future[None], Cell], poll: Callable[[], None], finished: Callable[[Cell], None]
) -> None:
    while waiting:
        ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        poll()
        for future in ready:
            cell = waiting.pop(future)
            try:
                future.result()
            except Exception as error:
                if isinstance(error, BrokenProcessPool):
                    time.sleep(1)  # Ctrl-C ends workers too, and may reach this process after them
                raise StudyError(f"{cell.name}: {type(error).__name__}: {error}") from error
            finished(cell)


def result_of(out: Path, cell: Cell) -> Path:
    return out / f"{cell.name}.json"


# --- in the processes -----------------------------------------------------------------------------


_counter: Any = None


def _begin(counter: Any) -> None:
    """What every process does first."""
    global _counter
    # Ctrl-C reaches every process of the terminal. This one ends by it, without a traceback: not
    # even out of the import, so before it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch

    _counter = counter
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
    os._exit(1)


def _tick(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _cell(cell: Cell, size: Size, out: Path) -> None:
    if _counter.value < 0:
        return
    began = time.monotonic()
    result = importlib.import_module(f"{__package__}.{cell.experiment}").run(cell, size, _tick)
    _write(cell, out, result, time.monotonic() - began)


def _write(cell: Cell, out: Path, result: dict[str, Any], seconds: float) -> None:
    files.write(
        result_of(out, cell),
        {"cell": cell.name, "seconds": round(seconds, 1), **files.rounded(result)},
    )


def _on_ranks(
    context: Any, cell: Cell, size: Size, out: Path, counter: Any, poll: Callable[[], None]
) -> None:
    """A cell of two processes, judged by the file that they leave: gloo may abort at the exit."""
    scratch = out / ".scratch" / cell.name
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "rendezvous").unlink(missing_ok=True)
    arguments = (cell, size, out, scratch, counter)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    try:
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.1)
            poll()
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    for rank in ranks:
        rank.kill() if rank.exitcode is None and any(each.exitcode for each in ranks) else None
        rank.join()
    if not result_of(out, cell).exists():
        raise StudyError(
            f"{cell.name}: the ranks ended with codes "
            f"{[rank.exitcode for rank in ranks]}; see above."
        )
    shutil.rmtree(out / ".scratch")


def _rank(rank: int, cell: Cell, size: Size, out: Path, scratch: Path, counter: Any) -> None:
    _begin(counter)
    import torch.distributed as dist

    began = time.monotonic()
    where = f"file://{(scratch / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    module = importlib.import_module(f"{__package__}.{cell.experiment}")
    result = module.work(rank, RANKS, size, scratch, _tick)
    if rank == 0:
        _write(cell, out, result, time.monotonic() - began)
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)


# --- what the person sees -------------------------------------------------------------------------


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[int], None], Say]]:
    """(show the count, say a line): a bar on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield lambda count: None, lambda text: print(text, flush=True)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("study"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
    )
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda count: bar.update(task, completed=count),
            lambda text: bar.console.print(text, highlight=False),
        )
