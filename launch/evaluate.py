"""Evaluate a saved model on the digits of launch/train.py, for `dist-ema watch` and `sweep`.

python launch/evaluate.py runs/digits/export     prints {"loss": 0.09, "accuracy": 0.97}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import train

from dist_ema import load_file


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    args = train.parse(["--device", "cpu"])
    train.check(args)
    run = train.build(train.join(args), args)
    run.model.load_state_dict(load_file(path))
    print(json.dumps(train.evaluate(run)))


if __name__ == "__main__":
    main()
