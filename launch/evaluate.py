"""Evaluate a saved model on the digits of launch/train.py, for `dist-ema watch` and `sweep`.

python launch/evaluate.py runs/digits/export     prints {"loss": 0.09, "accuracy": 0.97}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
import train

from dist_ema import load_file
from dist_ema.text import sentence


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", help="a saved average or an export of launch/train.py")
    path = parser.parse_args(arguments).path
    torch.set_num_threads(1)
    args = train.parse(["--device", "cpu"])
    train.check(args)
    run = train.build(train.join(args), args)
    try:
        run.model.load_state_dict(load_file(path))
    except (OSError, ValueError, RuntimeError) as error:  # no such file, damaged, another model
        parser.error(sentence(error))
    print(json.dumps(train.evaluate(run)))


if __name__ == "__main__":
    main()
