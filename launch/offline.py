"""How fast verbs of the command line pass over a model, beside `cp` and the tools that take sums.

    python launch/offline.py                 models of 1 GB, five rounds
    python launch/offline.py --realtime      ahead of all other programs (root on Linux)

One round runs every row once, in turns, because other programs load a shared machine. A model is
1 GB of fp32 weights in four files with an ema.json, and lies in the page cache. Rates are bytes of
one model per second of wall time. `cp` copies one model and syncs every file, as verbs that write
do. Below the table: what each pass over the bytes takes of one core, measured between the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_ema.checkpoint import crc32, disk, safetensors
from dist_ema.offline import average, diff, export, verify
from dist_ema.text import size as size_text
from dist_ema.text import size_of

WEIGHTS = 64
BLOCK = 4 << 20


def make(folder: Path, name: str, total: int, seed: int) -> Path:
    """A model as dist_ema exports it: random fp32 weights, four files, their sums in ema.json."""
    draw = np.random.default_rng(seed)
    n = total // 4 // WEIGHTS
    file = safetensors.header(
        {f"layers.{i}.weight": safetensors.Entry("F32", (n,)) for i in range(WEIGHTS)}
    )
    with open(raw := folder / f"{name}.safetensors", "wb") as out:
        out.write(file.head)
        for _ in range(WEIGHTS):
            out.write(draw.standard_normal(n, dtype=np.float32).tobytes())
    export.export(raw, folder / name, max_shard_size=total // 4 + (1 << 20))
    raw.unlink()
    return folder / name


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def rows(a: Path, b: Path, out: Path) -> dict[str, Callable[[], Any]]:
    files = sorted(map(str, a.glob("*.safetensors")))

    def copy() -> None:
        subprocess.run(["cp", "-r", a, out], check=True)
        for each in (*out.iterdir(), out):
            disk.sync(each)

    def sums() -> None:
        tools = [
            subprocess.Popen([tool, *files], stdout=subprocess.DEVNULL)
            for tool in ("cksum", "sha256sum")
        ]
        assert not any(tool.wait() for tool in tools)

    def checked() -> None:
        assert verify.verify(a).sound

    return {
        "cp + fsync": copy,
        "export": lambda: export.export(a, out),
        "export --dtype bfloat16": lambda: export.export(a, out, dtype="bfloat16"),
        "average of two": lambda: average.average([str(a), str(b)], str(out), progress=silent),
        "cksum, sha256sum in parallel": sums,
        "verify, both sums": checked,
        "diff": lambda: diff.diff(a, b),
    }


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds, with those of child processes."""

    def cpu() -> float:
        used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(each.ru_utime + each.ru_stime for each in used)

    before, begin = cpu(), time.perf_counter()
    work()
    return time.perf_counter() - begin, cpu() - before


def passes(a: Path, out: Path) -> dict[str, float]:
    """CPU seconds per GB of one thread for each pass: what no arrangement of threads avoids."""
    block, values = np.empty(BLOCK, np.uint8), np.ones(BLOCK // 4, np.float32)
    product, total = np.ones((2, BLOCK // 4))
    file = max(a.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    count = file.stat().st_size // BLOCK

    def read(fd: int, at: int) -> None:
        disk.read_into(fd, file, block.data, at * BLOCK)

    def blend(fd: int, at: int) -> None:
        np.copyto(product, values)
        np.multiply(product, 0.5, out=product)
        np.add(total, product, out=total)

    calls: dict[str, Callable[[int, int], Any]] = {
        "read": read,
        "CRC-32": lambda fd, at: crc32.of_bytes(block.data),
        "SHA-256": lambda fd, at: hashlib.sha256(block.data),
        "multiply and add in float64": blend,
        "write": lambda fd, at: os.pwrite(fd, block.data, at * BLOCK),
    }
    found = {}
    for name, call in calls.items():
        fd = os.open(*((out, os.O_CREAT | os.O_WRONLY) if name == "write" else (file, os.O_RDONLY)))
        begin = time.thread_time()
        for at in range(count):
            call(fd, at)
        found[name] = (time.thread_time() - begin) / (count * BLOCK) * 1e9
        os.close(fd)
    out.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--size", type=size_of, default="1GB", help="of a model (default %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--folder", help="a disk to write to (default: that of temporary files)")
    parser.add_argument("--realtime", action="store_true", help="run ahead of other programs")
    arguments = parser.parse_args()
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    total = arguments.size
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        a, b = make(folder, "a", total, 0), make(folder, "b", total, 1)
        out, found = folder / "out", dict[str, list[tuple[float, float]]]()
        takes = dict[str, list[float]]()
        calls = rows(a, b, out)
        for _ in range(arguments.repeat):
            for title, work in calls.items():
                os.sync()
                # NOTE: what is removed just before leaves memory that a host need not give anew.
                shutil.rmtree(out, ignore_errors=True)
                found.setdefault(title, []).append(timed(work))
            shutil.rmtree(out, ignore_errors=True)
            for title, seconds in passes(a, out).items():
                takes.setdefault(title, []).append(seconds)
    limits = dict.fromkeys(list(calls)[1:4], "cp + fsync")
    limits["verify, both sums"] = "cksum, sha256sum in parallel"
    print(f"{size_text(total)} of fp32, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | GB/s | CPU seconds | of cp or the tools | at best |\n|---|---:|---:|---:|---:|")
    for title, runs in found.items():
        walls = [wall for wall, _ in runs]
        cells = [f"{total / 1e9 / statistics.median(walls):.2f}"]
        cells.append(f"{statistics.median(cpu for _, cpu in runs):.2f}")
        if title in limits:
            others = [wall for wall, _ in found[limits[title]]]
            ratios = [other / wall for wall, other in zip(walls, others, strict=True)]
            cells += [f"{statistics.median(ratios):.2f}", f"{min(others) / min(walls):.2f}"]
        print(f"| {title} | {' | '.join(cells + [''] * (4 - len(cells)))} |")
    print("\n| one pass | CPU seconds per GB |\n|---|---:|")
    for title, each in takes.items():
        print(f"| {title} | {min(each):.2f} |")


if __name__ == "__main__":
    main()
