"""A verb on a damaged checkpoint: in bounds of memory and time, watched, and judged."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from .cases import Case

__all__ = ["SECONDS", "Outcome", "in_child", "limit", "problems", "run", "snapshot", "watch"]

MEMORY = 512 << 20  # bytes of address space
SECONDS = 10
REPORT = 3  # the descriptor that the audit writes to
Outcome = tuple[int, str, str]  # exit code, or -signal; stderr; what it must not have done


def limit() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = MEMORY + (now if "torch" in sys.modules else 0)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STARTS = re.compile(
    r"os\.(system|exec|fork|posix_spawn|spawn|startfile)|subprocess\.|socket\.|pty\."
)
_CHANGES = re.compile(r"os\.(rename|remove|mkdir|rmdir|link|symlink|truncate|chmod|chown|utime)$")


def watch(allowed: Path, report: Callable[[str], object]) -> None:
    """Report each process, socket or change outside the `allowed` folder, for good."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        paths: list[Any] = []
        if _STARTS.match(event):
            report(f"{event}{arguments!r:.200}\n")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            paths = [arguments[0]]
        elif _CHANGES.match(event):
            paths = [each for each in arguments if isinstance(each, (str, bytes, os.PathLike))]
        at = (
            arguments[-1] if arguments and event != "open" else None
        )  # a folder's descriptor, or -1
        base = f"/proc/self/fd/{at}" if isinstance(at, int) and at > 2 else ""
        for path in paths:
            if isinstance(path, int):
                continue
            real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
            if not Path(real).is_relative_to(allowed) and real != os.devnull:
                report(f"{event}: {real}\n")

    sys.addaudithook(audit)


def run(action: Callable[[], Any], folder: Path, allowed: Path) -> Outcome:
    """In a process of its own. folder: for the output. allowed: where it may write."""
    names = [folder / "stdout", folder / "stderr", folder / "report"]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(action, names, allowed)
    until = time.monotonic() + SECONDS
    status: int | None = None
    while status is None and time.monotonic() < until:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), *(
        path.read_text(errors="replace") for path in names[1:]
    )


def _child(action: Callable[[], Any], names: list[Path], allowed: Path) -> NoReturn:
    code: Any = 99
    try:
        opened = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in names]
        for i, fd in zip((1, 2, REPORT), opened, strict=True):
            os.dup2(fd, i)
        limit()
        watch(allowed, lambda line: os.write(REPORT, line.encode()))
        code = action()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


def in_child(action: Callable[[], Any]) -> None:
    """Run what prepares the cases in another process, because it may import torch."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: kind, size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def problems(case: Case, line: list[str], run_line: Callable[[], Outcome]) -> Iterator[str]:
    """Everything that is wrong with how a verb took a case."""
    before = snapshot(case.source.parent)
    code, err, report = run_line()
    if code not in (0, 1, 2):
        yield f"ended with {code}: {err[-300:]}"
    if "Traceback" in err:
        yield f"traceback: {err[-600:]}"
    if report:
        yield f"did what it must not: {report[:300]}"
    if snapshot(case.source.parent) != before:
        yield "changed what it read"
    beside = sorted(path.name for path in case.out.parent.iterdir() if path != case.out)
    if beside:
        yield f"left {beside} behind"
    if code and case.out.exists():
        yield "left an OUT although it failed"
    if code and not err and line[0] != "diff":
        yield "failed without a word"
    if len(err) > 20_000:
        yield f"said {len(err)} characters"
    if code == 0 and not case.is_right(line):
        yield "silent success: it is not what another reader finds"
