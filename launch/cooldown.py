"""Virtual cooldown: does an average of a run at a constant rate equal a run that decays it?

    python launch/cooldown.py                 the whole study, 3 seeds
    python launch/cooldown.py --quick         3 seeds of a shorter run of a smaller model
    python launch/cooldown.py --page RESULTS  the table of a results file again

A small GPT (of launch/studies/language.py) trains on Python's own source at a constant learning
rate. At three moments and for three windows, a real branch goes back by the window and decays the
rate linearly to 0. Against its validation loss stand averages of the constant run over that window:
of every step (`Window`), and merges of 5, 10 and 20 checkpoints. Every comparison is within a seed.
OUT gets one JSON file with all losses; the table is made of it and of nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import train
from studies import files, language
from torch import Tensor, nn

from dist_ema import EMA, Window

POINTS = (5, 10, 20)
WARM = 50


@dataclass(frozen=True)
class Plan:
    """How large the study is. Windows are multiples of 20 steps, for the merges."""

    name: str
    seeds: int
    width: int
    layers: int
    batch: int
    rate: float
    ends: tuple[int, ...]
    windows: tuple[int, ...]
    gpt_windows: int  # of validation, as studies.language calls them


FULL = Plan("full", 3, 128, 4, 16, 3e-3, (2000, 3000, 4000), (200, 400, 800), 512)
QUICK = Plan("quick", 3, 64, 2, 8, 3e-3, (400, 600, 800), (80, 160, 320), 256)
SMOKE = Plan("smoke", 2, 32, 1, 2, 3e-3, (40, 60), (20,), 8)


class Run:
    """A model and its optimizer, which can be put back to an earlier step."""

    def __init__(self, plan: Plan, seed: int) -> None:
        torch.manual_seed(seed)
        self.plan, self.seed = plan, seed
        self.model: nn.Module = language.Gpt(plan.width, plan.layers)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1
        )

    def step(self, number: int, scale: float = 1.0) -> None:
        """The step with that number, from 1; its batch follows from seed and number."""
        text, plan = language.corpus()[0], self.plan
        where = train.draw(self.seed + 100, number)
        at = torch.randint(0, len(text) - language.CONTEXT, (plan.batch,), generator=where)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate * scale * min(1.0, number / WARM)
        language.next_byte_loss(self.model, language.windows(text, at)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> float:
        return float(language.validate(self.model, self.plan))  # type: ignore[arg-type]

    def state(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def back(self, state: tuple[Any, Any]) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(copy.deepcopy(state[1]))


def merged(run: Run, past: dict[int, list[Tensor]], steps: Sequence[int]) -> float:
    """The loss of the plain mean of the weights after these steps."""
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.copy_(torch.stack([past[step][i].double() for step in steps]).mean(0))
    return float(language.validate(model, run.plan))  # type: ignore[arg-type]


def study(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """All losses of one seed: of the constant run and its averages, then of the branches."""
    run = Run(plan, seed)
    ema = EMA(run.model, [Window(window) for window in plan.windows])
    ema.attach(run.optimizer)
    spacing = min(plan.windows) // max(POINTS)
    starts = {end - window for end in plan.ends for window in plan.windows}
    past: dict[int, list[Tensor]] = {}
    states, rows = {}, []
    for number in range(1, max(plan.ends) + 1):
        run.step(number)
        if number % spacing == 0:
            past[number] = [weight.detach().clone() for weight in run.model.parameters()]
            past.pop(number - max(plan.windows), None)
        if number in starts:
            states[number] = run.state()
        for window in plan.windows if number in plan.ends else ():
            row: dict[str, Any] = {"seed": seed, "end": number, "window": window}
            row["live"] = run.loss()
            for curve in ("linear", "minus-sqrt", "cosine"):
                with ema.swap(Window(window, curve)):
                    row[curve] = run.loss()
            for points in POINTS:
                apart = window // points
                steps = [number - j * apart for j in range(points)]
                row[f"merge {points}"] = merged(run, past, steps)
            rows.append(row)
    ema.detach()
    for row in rows:
        end, window = row["end"], row["window"]
        run.back(states[end - window])
        for number in range(end - window + 1, end + 1):
            run.step(number, (end - number + 1) / window)
        row["branch"] = run.loss()
    return rows


# --- the table ------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown, of a results file and of nothing else."""
    plan, rows, threads = results["plan"], results["rows"], results["threads"]
    ends = ", ".join(map(str, plan["ends"]))
    text = (
        f"{plan['name'].capitalize()} study: {results['parameters']:,} weights, "
        f"{plan['seeds']} seeds, branches that end at {ends} steps, "
        f"{results['seconds'] / 60:.0f} minutes on {threads} thread{'s' * (threads > 1)}. Distance "
        "of the validation loss from that of the real branch, in percent of it: mean over seeds "
        "and moments, ± the standard error over seeds."
    )
    yield from textwrap.wrap(text, 100)
    yield ""
    kinds = ["live", "linear", *(f"merge {points}" for points in reversed(POINTS))]
    kinds += ["minus-sqrt", "cosine"]
    heads = ["no average", "every step", *(f"{points} points" for points in reversed(POINTS))]
    heads += ["minus-sqrt", "cosine"]
    yield "| Window | Branch | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 2) + "|"
    for window in plan["windows"]:
        chosen = [row for row in rows if row["window"] == window]
        branch = sum(row["branch"] for row in chosen) / len(chosen)
        cells = [_cell(chosen, kind) for kind in kinds]
        yield f"| {window} steps | {branch:.4f} | " + " | ".join(cells) + " |"


def _cell(rows: list[dict[str, Any]], kind: str) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(100 * (row[kind] / row["branch"] - 1))
    means = [sum(values) / len(values) for values in by_seed.values()]
    mean = sum(means) / len(means)
    spread = sum((each - mean) ** 2 for each in means) / max(1, len(means) - 1)
    return f"{mean:+.2f} ± {math.sqrt(spread / len(means)):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cooldown.py", formatter_class=form, description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smaller model, shorter runs")
    size.add_argument("--smoke", action="store_true", help="a few steps: does it run at all")
    size.add_argument("--page", type=Path, metavar="RESULTS", help="train nothing, print the table")
    parser.add_argument("--out", type=Path, metavar="JSON", help="default: runs/cooldown-SIZE.json")
    args = parser.parse_args(arguments)
    if args.page is not None:
        print("\n".join(table(json.loads(args.page.read_text()))))
        return 0
    plan = QUICK if args.quick else SMOKE if args.smoke else FULL
    out = args.out or Path(f"runs/cooldown-{plan.name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    began, rows = time.monotonic(), []
    for seed in range(plan.seeds):
        rows += study(plan, seed)
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    model = language.Gpt(plan.width, plan.layers)
    facts = {"plan": asdict(plan), "parameters": sum(p.numel() for p in model.parameters())}
    facts |= {"seconds": round(time.monotonic() - began), "threads": torch.get_num_threads()}
    files.write(out, facts | {"rows": rows})
    print("\n".join(table(json.loads(out.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
