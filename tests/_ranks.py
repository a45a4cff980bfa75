"""Ranks for multi-process tests: gloo processes that report through result files.

How to read a failure: `run_ranks` raises with the traceback of the first rank that failed.
A rank that left no result is named with its exit code. Inside a rank a check is a plain assert.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What every rank would import anew: torch's late modules, and those of the files of tests. A ZeRO
# engine compiles a function, which imports the whole compiler.
PRELOAD = [
    "dist_ema.ema",
    "pytest",
    "tests._oracle",
    "tests._ranks",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
]


def run_ranks(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    timeout: float = 150.0,
    allow_dead: bool = False,
    method: str = "forkserver",
    server: bool = False,
    backend: str = "gloo",
) -> list[Any]:
    """Run `work(*args)` on `world` ranks.

    Args:
        world: How many ranks.
        work: A function at the top level of a module.
        args: Its arguments; they are pickled.
        timeout: Seconds after which the ranks are killed.
        allow_dead: Accept ranks that leave no result.
        method: "fork" for ranks that go on with what this process has imported and set.
        server: Keep the store in this process, for tests that stop ranks. A store in a file has a
            lock, and a rank that is stopped while it holds the lock blocks all ranks.
        backend: Of the default group. Where "emulated" is in it, each rank has such a device.

    Returns:
        What `work` returned on every rank, None for a dead one.
    """
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOAD)
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if server else None
    )
    with tempfile.TemporaryDirectory() as folder:
        place = f"{work.__module__}:{work.__qualname__}"
        port = store.port if store else None
        ranks = [
            context.Process(
                target=_rank, args=(rank, world, folder, port, place, args, backend), daemon=True
            )
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        return [_read(Path(folder), rank, codes[rank], allow_dead) for rank in range(world)]


def run_program(code: str, *arguments: str, timeout: float = 150.0) -> str:
    """Run a program in a process of its own, where torch is imported already.

    Args:
        code: The text of the program.
        arguments: Its sys.argv, but for the first.
        timeout: Seconds after which it is killed.

    Returns:
        What it printed. Where it failed, AssertionError is raised with its errors.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_program, args=(code, arguments, folder))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        printed, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        assert process.exitcode == 0, f"exit code {process.exitcode}\n{printed}\n{errors}"
        return printed


def _program(code: str, arguments: tuple[str, ...], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{folder}/{name}", "wb") as file:
            os.dup2(file.fileno(), number)
    gc.freeze()
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _read(folder: Path, rank: int, code: int | None, allow_dead: bool) -> Any:
    path = folder / f"result-{rank}.pt"
    if not path.exists():
        if allow_dead:
            return None
        raise AssertionError(f"rank {rank} left no result (exit code {code}; None: it hung)")
    kind, value = torch.load(path, weights_only=False)
    if kind == "error":
        raise AssertionError(f"on rank {rank}:\n{value}")
    return value


def _rank(
    rank: int,
    world: int,
    folder: str,
    port: int | None,
    place: str,
    args: tuple[Any, ...],
    backend: str,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    gc.freeze()  # what is imported stays; a collection need not look at it
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    _allow_torch_warnings()
    store: dist.Store = (
        dist.TCPStore("127.0.0.1", port)
        if port is not None
        else dist.FileStore(f"{folder}/rendezvous", world)
    )
    if "emulated" in backend:
        emulated = importlib.import_module("tests.emulated")
        emulated.load().schedule(False, 0.0, 0, emulated.PATIENCE)
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        module, name = place.split(":")
        outcome = ("value", getattr(importlib.import_module(module), name)(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    torch.save(outcome, f"{folder}/part-{rank}.pt")
    os.rename(f"{folder}/part-{rank}.pt", f"{folder}/result-{rank}.pt")
    if outcome[0] == "value":
        with contextlib.suppress(Exception):
            dist.barrier()
    os._exit(0)  # gloo aborts now and then in a normal exit, after everything passed


def _allow_torch_warnings() -> None:
    """torch warns of its own plans inside FSDP1, DTensor and DCP; ours stay errors."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
    # torch 2.8, now and then
    warnings.filterwarnings("ignore", message="Deallocating Tensor that still has live PyObject")
    warnings.filterwarnings(
        "ignore", message=r".*(NO_SHARD|FSDP|barrier\(\)|device_id|grad\.sizes).*"
    )


def raises(kind: type[BaseException], *words: str) -> contextlib.AbstractContextManager[None]:
    """Inside a rank: the block must raise `kind`, and the message must hold all words."""

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        try:
            yield
        except kind as error:
            assert all(word in str(error) for word in words), f"{error} lacks one of {words}"
        else:
            raise AssertionError(f"{kind.__name__} was not raised")

    return guard()
