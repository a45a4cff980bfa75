"""python -m tests.emulated [PROGRAMS]: random programs on the emulated device, 100 by default."""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from . import load, schedule
from .test_random_actions import OPTIONS, play, same

load()
warnings.filterwarnings("ignore", message=r"ema\..*no update came")
for seed in range(int(sys.argv[1]) if sys.argv[1:] else 100):
    for options in OPTIONS:
        with tempfile.TemporaryDirectory() as folder:
            want = play(seed, False, Path(folder) / "inline", options)
            assert same(want, play(seed, True, Path(folder) / "late", options)), (seed, options)
            with schedule(random=0.1, seed=seed):
                got = play(seed, True, Path(folder) / "random", options)
            assert same(want, got), (seed, options, "random")
    print(f"program {seed}: side stream and host thread are bit-identical to inline", flush=True)
