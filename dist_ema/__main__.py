"""`python -m dist_ema` is the command `dist-ema`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
