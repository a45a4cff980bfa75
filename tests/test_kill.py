"""Ranks that save over and over are killed at random moments: what stands there is one whole
version, and not an old one.

    python tests/test_kill.py --kills 50    50 kills in each mode, about a second each
    python tests/test_kill.py --kills 50 --mode fallback

Each round starts two ranks on what the last kill left, kills one or both (SIGKILL) while they
overwrite `average`, and looks at a copy: so the next round's first save has to tidy up by itself.
`fallback` does without RENAME_EXCHANGE, and is killed between its two renames too.

How to read a failure: the message names the seed, the mode and the round; --seed repeats the same
choices, though not the same moments. In `stages` the ranks are stages of a pipeline.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODES = ("direct", "stream", "fallback", "behind", "stages")
KILLS = int(os.environ.get("DIST_EMA_KILLS", "2"))  # in each mode


# --- the ranks ------------------------------------------------------------------------------------


def save_for_ever(rank: int, folder: Path, store: str, mode: str, first: int, between: int) -> None:
    """Save version after version, every element being its number, and note each one that returned.

    between: die after so many first renames of the fallback, before the second; 0: never.
    """
    import torch
    import torch.distributed as dist
    from torch import nn

    from dist_ema import EMA
    from dist_ema.checkpoint import atomic

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if mode == "fallback":
        atomic.exchange = lambda a, b: False
        _die_between_renames(atomic, between)
    model = nn.Sequential(
        nn.Linear(400, 500), nn.Linear(500, 300, bias=False).requires_grad_(False)
    )
    if mode == "stages":
        ema = EMA([nn.Sequential(OrderedDict({str(rank): model[rank]}))], 0.5)
    else:
        ema = EMA(nn.parallel.DistributedDataParallel(model), 0.5)
    log = os.open(folder / f"returned-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for version in itertools.count(first):
        for p in model.parameters():
            torch.nn.init.constant_(p, version)
        ema.reset()
        way: Any = {"stream": "stream", "behind": None}.get(mode, "direct")
        ema.save(
            folder / "run" / "average",
            mode=way,
            extra={"version": version},
            max_shard_size="700KB",
            wait=mode != "behind",
        )
        os.write(log, f"{version}\n".encode())


def _die_between_renames(atomic: Any, after: int) -> None:
    real, count = atomic.os.rename, itertools.count(1)

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        if ".old-" in str(target) and next(count) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.os.rename = rename


# --- the killer -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a mode went through."""

    kills: int = 0
    saves: int = 0
    missing: int = 0  # times that nothing stood under the name until somebody recovered it
    leftovers: int = 0  # times that a temporary was left
    newer: int = 0  # times that a version was in place whose save had not returned


def torment(folder: Path, mode: str, kills: int, seed: int) -> Tally:
    """Kill `kills` times and look each time."""
    choose, tally, version = random.Random(f"{seed} {mode}"), Tally(), 0
    (folder / "run").mkdir(parents=True)
    for number in range(kills):
        between = choose.randrange(1, 6) if mode == "fallback" and number % 2 else 0
        _round(folder, mode, version + 1, between, choose)
        try:
            version = _look(folder, mode, tally)
        except Exception as error:
            raise AssertionError(
                f"{mode}, kill {number + 1} of {kills}, seed {seed}: {error}"
            ) from error
        tally.kills += 1
    tally.saves = version
    return tally


def _round(folder: Path, mode: str, first: int, between: int, choose: random.Random) -> None:
    """Start two ranks, let them save, kill one or both at a random moment, then whoever is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests._ranks"])
    store = folder / f"store-{first}"
    ranks = [
        context.Process(
            target=save_for_ever, args=(rank, folder, str(store), mode, first, between), daemon=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        if between:
            ranks[0].join(120)
        else:
            _wait_for(folder, first + (mode == "behind"))  # so that one is in place
            time.sleep(choose.uniform(0, 0.25))
            assert all(rank.exitcode is None for rank in ranks), f"a rank ended by itself: {ranks}"
        victims = choose.choice([[0], [1], [0, 1]])
        for victim in victims:
            _kill(ranks[victim])
        time.sleep(choose.choice([0, choose.uniform(0, 0.1)]))
    finally:
        for rank in ranks:
            _kill(rank)
            rank.join()
    codes = [
        rank.exitcode for rank in ranks
    ]  # whoever is left may see it and raise before it is killed too
    assert set(codes) <= {-signal.SIGKILL, 1}, codes
    assert -signal.SIGKILL in codes, codes
    store.unlink(missing_ok=True)


def _kill(rank: Any) -> None:
    if rank.exitcode is None:
        os.kill(rank.pid, signal.SIGKILL)


def _wait_for(folder: Path, version: int) -> None:
    """Until a save of this round has returned."""
    deadline = time.monotonic() + 120
    while _returned(folder) < version:
        assert time.monotonic() < deadline, "no save returned within two minutes"
        time.sleep(0.01)


def _returned(folder: Path) -> int:
    """The highest version whose save returned on some rank."""
    lines = [line for path in folder.glob("returned-*") for line in path.read_text().splitlines()]
    return max(map(int, lines), default=0)


def _look(folder: Path, mode: str, tally: Tally) -> int:
    """The version that a copy of the run holds. Everything about it is checked."""
    from dist_ema import load_file
    from dist_ema.checkpoint import atomic, crc32, manifest, safetensors

    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "run", copy)
    path, last = copy / "average", _returned(folder)
    tally.leftovers += any(".tmp-" in name for name in os.listdir(copy))
    if not path.exists():
        assert mode == "fallback", "an exchange leaves no moment without a version"
        tally.missing += 1
    atomic.recover(path)
    saved = manifest.read(path)
    assert saved is not None
    files = safetensors.read_model(path)
    assert files.keys() == saved.files.keys()
    assert len(files) == 3
    for name, said in saved.files.items():
        data, total = (path / name).read_bytes(), crc32.RangeSum(said["size"])
        total.add(0, data)
        assert (len(data), crc32.check_sum(len(data), [total.contribution])) == (
            said["size"],
            said["crc32"],
        ), name
    version: int = saved.extra["version"]
    for name, weight in load_file(path).items():
        assert (weight == version).all(), f"{name} is not of version {version}"
    # NOTE: behind training a call returns while its own version is under way, and after the one
    # before was put in place.
    oldest = last - 1 if mode == "behind" else last
    assert oldest <= version <= last + 2, f"version {version} stands there, {last} had returned"
    tally.newer += version > last
    return version


@pytest.mark.parametrize("mode", MODES)
def test_killed(mode: str, tmp_path: Path) -> None:
    """A few kills in each mode; DIST_EMA_KILLS=50 for the full harness."""
    tally = torment(tmp_path, mode, KILLS, seed=random.randrange(10**6))
    assert tally.kills == KILLS
    assert tally.saves >= KILLS
    if mode == "fallback":
        assert tally.missing >= KILLS // 2, "killed between the renames, and recovered"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in each mode")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the file system to test, made anew; default: a temporary one",
    )
    args = parser.parse_args(words)
    import tempfile

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for mode in args.mode:
            print(torment(Path(folder) / mode, mode, args.kills, args.seed), mode, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests import test_kill

    test_kill.main()
