"""Saved under one wrapper and world, loaded under another: the same bits, the same clock, the same
file again.

    python -m tests.elastic        8 x 8 pairs of wrappers, about ten minutes

Every pair carries a float32 and a bfloat16 average that end inside an interval of `attach`.

How to read a failure: the table has a row for each wrapper that saved, and a column for each that
loaded; an assertion names what differs beyond that.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dist_ema import EMA, Power
from dist_ema.checkpoint import safetensors
from tests._models import Net
from tests._oracle import Training
from tests._ranks import run_ranks

Row = tuple[str, int]  # a wrapper of the parity table, and how many ranks

SAVED: list[Row] = [
    ("none", 1), ("ddp", 2), ("fsdp1 orig", 3), ("fsdp2", 4),
    ("fsdp2 tp", 4), ("hsdp", 4), ("zero1", 3), ("zero3", 2),
]  # fmt: skip
LOADED: list[Row] = [
    ("none", 1), ("ddp", 3), ("fsdp1 orig", 2), ("fsdp2", 2),
    ("fsdp2 tp", 4), ("hsdp", 4), ("zero1", 2), ("zero3", 3),
]  # fmt: skip
NAMES = ["fp32", "bf16"]
SCHEDULE = Power(gamma=2.0)
EVERY = 4
LIVE = "core.seen"  # counts the forward passes of the model that saves


def divisible() -> Net:
    """What all wrappers take: tensor parallel divides the hidden size, DeepSpeed has no scalars."""
    return Net(hidden=8, scalar=False)


def averages(run: Training) -> dict[str, EMA]:
    """A plain one and a compact one; both end inside an interval."""
    return {
        "fp32": EMA(run.model, SCHEDULE),
        "bf16": EMA(run.model, SCHEDULE, dtype=torch.bfloat16),
    }


def save_one(kind: str, folder: str, make: Callable[[], Net] = Net) -> None:
    run = Training(kind, make)
    found = averages(run)
    for ema in found.values():
        ema.attach(run.optimizer, every=EVERY, elapsed=3.0)
    run.train(6)
    with found["fp32"].swap():
        for buffer in run.model.buffers():
            if buffer.is_floating_point():
                buffer += 0.25 * (dist.get_rank() + 1)  # recalibrated, differently on every rank
    for name, ema in found.items():
        ema.save(f"{folder}/{kind}-{name}", max_shard_size=600, extra={"epoch": 6})
        full = ema.gather()
        if full:
            torch.save(full, f"{folder}/{kind}-{name}.pt")


def load_all(
    kind: str, folder: str, sources: Sequence[str], make: Callable[[], Net] = Net
) -> dict[str, bool]:
    """Whether every average that the sources saved is the same here, by "source name"."""
    held = {}
    for source in sources:
        run = Training(kind, make)
        for name, ema in averages(run).items():
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
                    torch.equal(full[k], want[k]) for k in ema.names()
                )
            ema.attach(run.optimizer, every=EVERY, elapsed=3.0)
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


def convert(folder: Path, sources: Sequence[str], kind: str, world: int) -> list[bool]:
    """Load what every source saved; whether both averages of each were exact."""
    held = run_ranks(world, load_all, kind, str(folder), sources, divisible, timeout=3600)[0]
    assert len(held) == len(NAMES) * len(sources)
    for source in sources:
        for name in NAMES:
            first = folder / f"{source}-{name}"
            refuse_other_bytes(first, folder / f"{first.name}-from-{kind}-{world}")
    return [all(held[f"{source} {name}"] for name in NAMES) for source in sources]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.elastic", description=__doc__)
    parser.add_argument("--only", default="", help="of the rows, those whose name holds this")
    only = parser.parse_args().only
    saved = [row for row in SAVED if only in row[0]]
    loaded = [row for row in LOADED if only in row[0]]
    sources, columns = [kind for kind, _ in saved], []
    with tempfile.TemporaryDirectory() as folder:
        for kind, world in saved:
            run_ranks(world, save_one, kind, folder, divisible, timeout=3600)
            print(f"saved under {kind} on {world} ranks", flush=True)
        for kind, world in loaded:
            columns.append(convert(Path(folder), sources, kind, world))
            print(f"loaded under {kind} on {world} ranks: {sum(columns[-1])} exact", flush=True)
    print("\nsaved under".ljust(14), *(f"{kind} {world}".rjust(13) for kind, world in loaded))
    for i, (kind, world) in enumerate(saved):
        cells = ["+" if column[i] else "DIFFERS" for column in columns]
        print(f"{kind} {world}".ljust(13), *(cell.rjust(13) for cell in cells))
    exact, pairs = sum(map(sum, columns)), len(saved) * len(loaded)
    print(f"\n{exact} of {pairs} pairs are exact.")
    if exact < pairs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
