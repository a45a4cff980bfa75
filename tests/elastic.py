"""Saved under one wrapper and world, loaded under another: the same bits, the same clock, the same
file again.

    python -m tests.elastic                     8 x 8 pairs of wrappers, about ten minutes
    python -m tests.elastic --table pipelines   8 x 8 pairs: ZeRO, pipelines and experts
    python -m tests.elastic --table three       2 x 2 x 2 ranks: a pipeline of FSDP2 over tensor
                                                parallel, and the mesh in each order

Every pair carries a float32 and a bfloat16 average that end inside an interval of `attach`.

How to read a failure: the table has a row for each wrapper that saved, and a column for each that
loaded; an assertion names what differs beyond that.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ema import EMA, Power
from dist_ema.checkpoint import safetensors
from tests import _pipelines
from tests._models import Net
from tests._oracle import Training
from tests._ranks import run_ranks

Row = tuple[str, int]  # a wrapper of the parity table, and how many ranks

WRAPPERS: tuple[list[Row], list[Row]] = (  # that save, that load
    [
        ("none", 1), ("ddp", 2), ("fsdp1 orig", 3), ("fsdp2", 4),
        ("fsdp2 tp", 4), ("hsdp", 4), ("zero1", 3), ("zero3", 2),
    ],
    [
        ("none", 1), ("ddp", 3), ("fsdp1 orig", 2), ("fsdp2", 2),
        ("fsdp2 tp", 4), ("hsdp", 4), ("zero1", 2), ("zero3", 3),
    ],
)  # fmt: skip
PIPELINES: tuple[list[Row], list[Row]] = (
    [
        ("fsdp2", 3), ("zero1", 3), ("zero2", 2), ("zero3", 3),
        ("pp", 2), ("pp fsdp2", 4), ("pp interleaved", 2), ("fsdp2 ep", 4),
    ],
    [
        ("none", 1), ("zero1", 2), ("zero2", 3), ("zero3", 2),
        ("pp", 4), ("pp fsdp2", 4), ("pp interleaved", 2), ("fsdp2 ep", 4),
    ],
)  # fmt: skip
NAMES = ["fp32", "bf16"]
SCHEDULE = Power(gamma=2.0)
EVERY = 4
LIVE = "core.seen"  # counts the forward passes of the model that saves


def divisible() -> Net:
    """What all wrappers take: tensor parallel divides the hidden size, DeepSpeed has no scalars."""
    return Net(hidden=8, scalar=False)


def layered() -> _pipelines.Model:
    """What a pipeline cuts: three experts in each layer."""
    return _pipelines.make(experts=3)


def start(kind: str, make: Callable[..., Any]) -> Any:
    """A model under a wrapper, or in stages, that can be trained."""
    if kind.startswith("pp"):
        local = 2 if kind == "pp interleaved" else 1
        wrapper = "fsdp2" if kind == "pp fsdp2" else "none"
        depth = 2 if wrapper == "fsdp2" else dist.get_world_size()
        return _pipelines.Pipeline(wrapper, local, depth, experts=3)
    return Training(kind, make, _pipelines.batch) if make is layered else Training(kind, make)


def averages(run: Any) -> dict[str, EMA]:
    """A plain one and a compact one, which averages buffers; both end inside an interval."""
    return {
        "fp32": EMA(run.model, SCHEDULE),
        "bf16": EMA(run.model, SCHEDULE, dtype=torch.bfloat16, buffers="average"),
    }


def save_one(kind: str, folder: str, make: Callable[[], Any] = Net) -> None:
    run = start(kind, make)
    found = averages(run)
    for ema in found.values():
        ema.attach(*run.optimizers, every=EVERY, elapsed=3.0)
    run.train(6)
    with found["fp32"].swap() as ema:
        for buffer in ema.model.buffers():
            if buffer.is_floating_point():
                buffer += 0.25 * (dist.get_rank() + 1)  # recalibrated, differently on every rank
    for name, ema in found.items():
        ema.save(f"{folder}/{kind}-{name}", max_shard_size=600, extra={"epoch": 6})
        full = ema.gather()
        if full:
            torch.save(full, f"{folder}/{kind}-{name}.pt")


def load_all(
    kind: str,
    folder: str,
    sources: Sequence[str],
    make: Callable[[], Any] = Net,
    left_out: Container[tuple[str, str]] = (),
) -> dict[str, bool]:
    """Whether every average that the sources saved is the same here, by "source name".

    left_out: (source, name) of what is not looked at.
    """
    held = {}
    for source in sources:
        run = start(kind, make)
        for name, ema in averages(run).items():
            if (source, name) in left_out:
                continue
            path = f"{folder}/{source}-{name}"
            ema.load(path)
            assert (ema.now, ema.metrics()["updates"]) == (12.0, 1)
            assert (ema.weights.clock.steps, ema.weights.clock.pending) == (6, 6.0)
            full = ema.gather()
            again = f"{path}-from-{kind}-{dist.get_world_size()}"
            ema.save(again, max_shard_size=600, extra={"epoch": 6})
            if full:
                want = torch.load(f"{path}.pt")
                held[f"{source} {name}"] = full.keys() == want.keys() and all(
                    torch.equal(full[k], want[k]) for k in want if k != LIVE
                )
            ema.attach(*run.optimizers, every=EVERY, elapsed=3.0)
            run.train(1)
            assert ema.metrics()["updates"] == 1
            run.train(1)
            assert ema.metrics()["updates"] == 2
            assert ema.now == 24.0
            ema.detach()
    return held


def refuse_other_bytes(first: Path, again: Path) -> None:
    """What was saved again has the headers and the bytes of what it was loaded from."""
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        before, after = (_without_live_values(folder / shard) for folder in (first, again))
        assert before == after, f"{again / shard} has other bytes than {first / shard}"


def _without_live_values(path: Path) -> bytes:
    file, raw = safetensors.read_header(path), bytearray(path.read_bytes())
    if LIVE in file.entries:
        entry, start = file.entries[LIVE], len(file.head)
        raw[start + entry.begin : start + entry.begin + entry.nbytes] = b""
    return bytes(raw)


def convert(
    folder: Path, sources: Sequence[str], kind: str, world: int, make: Callable[[], Any]
) -> list[bool]:
    """Load what every source saved; whether both averages of each were exact."""
    held = run_ranks(world, load_all, kind, str(folder), sources, make, timeout=3600)[0]
    assert len(held) == len(NAMES) * len(sources)
    for source in sources:
        for name in NAMES:
            first = folder / f"{source}-{name}"
            refuse_other_bytes(first, folder / f"{first.name}-from-{kind}-{world}")
    return [all(held[f"{source} {name}"] for name in NAMES) for source in sources]


def print_pairs(saved: Sequence[Row], loaded: Sequence[Row], make: Callable[[], Any]) -> bool:
    """Every pair of them; whether all are exact."""
    sources, columns = [kind for kind, _ in saved], []
    with tempfile.TemporaryDirectory() as folder:
        for kind, world in saved:
            run_ranks(world, save_one, kind, folder, make, timeout=3600)
            print(f"saved under {kind} on {world} ranks", flush=True)
        for kind, world in loaded:
            columns.append(convert(Path(folder), sources, kind, world, make))
            print(f"loaded under {kind} on {world} ranks: {sum(columns[-1])} exact", flush=True)
    print("\nsaved under".ljust(18), *(f"{kind} {world}".rjust(16) for kind, world in loaded))
    for i, (kind, world) in enumerate(saved):
        cells = ["+" if column[i] else "DIFFERS" for column in columns]
        print(f"{kind} {world}".ljust(17), *(cell.rjust(16) for cell in cells))
    exact, pairs = sum(map(sum, columns)), len(saved) * len(loaded)
    print(f"\n{exact} of {pairs} pairs are exact.")
    return exact == pairs


def print_three_dimensions() -> bool:
    """A pipeline of FSDP2 over tensor parallel: the parity table's columns, in each order."""
    from tests.test_pipelines import check_pipeline

    failed = 0
    for order in itertools.permutations(("pp", "dp", "tp")):
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = run_ranks(8, check_pipeline, "fsdp2 tp", 1, folder, order, timeout=3600)
                wrong = sorted({name for row in rows for name, held in row.items() if not held})
            except AssertionError as error:
                wrong = str(error).strip().splitlines()[-1:]
        failed += bool(wrong)
        print(" x ".join(order).ljust(14), *(wrong or ["all columns hold"]), flush=True)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.elastic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", default="wrappers", choices=["wrappers", "pipelines", "three"])
    parser.add_argument("--only", default="", help="of the rows, those whose name holds this")
    asked = parser.parse_args()
    if asked.table == "three":
        raise SystemExit(not print_three_dimensions())
    table, make = (WRAPPERS, divisible) if asked.table == "wrappers" else (PIPELINES, layered)
    saved, loaded = ([row for row in rows if asked.only in row[0]] for rows in table)
    raise SystemExit(not print_pairs(saved, loaded, make))


if __name__ == "__main__":
    main()
