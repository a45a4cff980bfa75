"""Virtual cooldown: does an average of a run at a constant rate equal a run that decays it?

    python launch/cooldown.py                 the whole study
    python launch/cooldown.py --quick         the same with fewer and shorter runs of the GPT
    python launch/cooldown.py --page RESULTS  the tables of a results file again

At some moments of a run at a constant learning rate, and for some windows, a real branch goes back
by the window and decays the rate linearly to 0. Against its validation loss stand averages of the
constant run over that window: of every step (`Window`), and merges of 5, 10 and 20 checkpoints.
Every comparison is within a seed. Three tasks:

    teacher   a student learns a teacher from a stream with noise, at four rates
    gpt       a small GPT (of launch/studies/language.py) learns Python's own source, at two rates
    digits    an MLP learns 300 digits by heart, a third of them with wrong labels

OUT gets one JSON file with all losses; the tables are made of it and of nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import train
from studies import files, language
from torch import Tensor, nn

from dist_ema import EMA, Window

POINTS = (5, 10, 20)
WARM = 50
NOISE = 0.5  # of the teacher's answers, whose own spread is 1
LEARNED, WRONG = 300, 100  # digits, and how many of them have wrong labels

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Runs:
    """Runs of one task. Windows are multiples of 20 steps, for the merges."""

    task: str
    seeds: int
    rates: tuple[float, ...]
    ends: tuple[int, ...]
    windows: tuple[int, ...]
    batch: int
    width: int
    layers: int = 1


def small(seeds: int) -> tuple[Runs, ...]:
    return (
        Runs("teacher", seeds, (0.005, 0.01, 0.02, 0.04), (3000,), (600,), 8, 64),
        Runs("digits", seeds, (0.003, 0.03), (1500,), (400,), 32, 64),
    )


GPT = Runs("gpt", 3, (0.003, 0.03), (600, 800, 1000), (40, 80, 160), 2, 32, 2)
LARGE = Runs("gpt", 3, (0.003, 0.03), (3000, 4000, 5000), (200, 400, 800), 2, 64, 2)
PLANS = {
    "full": (*small(8), LARGE),
    "quick": (*small(4), GPT),
    "smoke": (
        Runs("teacher", 2, (0.01,), (40,), (20,), 8, 8),
        Runs("digits", 2, (0.01,), (40,), (20,), 8, 8),
        Runs("gpt", 2, (0.003,), (40, 60), (20,), 2, 32, 1),
    ),
}


# --- the tasks ------------------------------------------------------------------------------------


class Task:
    """What a run trains on.

    Attributes:
        model: To be trained.
        batch: The loss of a model on the batch with that number, which follows from the seed.
        loss: The loss of a model on data for validation.
    """

    def __init__(self, model: nn.Module, batch: Callable[[nn.Module, int], Tensor], loss: Loss):
        self.model, self.batch, self.loss = model, batch, torch.no_grad()(loss)


def teacher(runs: Runs, seed: int) -> Task:
    """A stream: no input comes twice. The loss is the expected square with the noise in it."""

    def network(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))

    torch.manual_seed(seed)
    truth, student = network(16).requires_grad_(False), network(runs.width)
    for layer in truth.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1.4 / math.sqrt(layer.in_features))
    seen = torch.randn(4096, 8)
    centre, spread = truth(seen).mean(), truth(seen).std()

    def batch(model: nn.Module, number: int) -> Tensor:
        generator = train.draw(seed, number)
        x = torch.randn(runs.batch, 8, generator=generator)
        noise = NOISE * torch.randn(runs.batch, 1, generator=generator)
        return F.mse_loss(model(x), (truth(x) - centre) / spread + noise)

    def loss(model: nn.Module) -> Tensor:
        return F.mse_loss(model(seen), (truth(seen) - centre) / spread) + NOISE**2

    return Task(student, batch, loss)


def gpt(runs: Runs, seed: int) -> Task:
    """Windows of a text that is read by far less than once."""
    torch.manual_seed(seed)
    text, other = language.corpus()
    places = torch.linspace(0, len(other) - language.CONTEXT - 1, 64).long()
    tests = language.windows(other, places)

    def batch(model: nn.Module, number: int) -> Tensor:
        generator = train.draw(seed + 100, number)
        at = torch.randint(0, len(text) - language.CONTEXT, (runs.batch,), generator=generator)
        return language.next_byte_loss(model, language.windows(text, at))

    def loss(model: nn.Module) -> Tensor:
        return language.next_byte_loss(model, tests)

    return Task(language.Gpt(runs.width, runs.layers), batch, loss)


def digits(runs: Runs, seed: int) -> Task:
    """A few images, again and again, with labels that only a model that over-fits can learn."""
    torch.manual_seed(seed)
    data = train.load_digits(torch.device("cpu"))
    labels = data.labels[:LEARNED].clone()
    labels[:WRONG] = (labels[:WRONG] + 1 + torch.arange(WRONG) % 9) % 10
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, runs.width), nn.ReLU())
    model.extend((nn.Linear(runs.width, runs.width), nn.ReLU(), nn.Linear(runs.width, 10)))

    def batch(model: nn.Module, number: int) -> Tensor:
        at = torch.randint(0, LEARNED, (runs.batch,), generator=train.draw(seed, number))
        return F.cross_entropy(model(data.images[at]), labels[at])

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(data.test_images), data.test_labels)

    return Task(model, batch, loss)


TASKS = {"teacher": teacher, "gpt": gpt, "digits": digits}


# --- one run --------------------------------------------------------------------------------------


class Run:
    """A task and an optimizer, which can be put back to an earlier step."""

    def __init__(self, runs: Runs, rate: float, seed: int) -> None:
        self.task, self.rate = TASKS[runs.task](runs, seed), rate
        self.model = self.task.model
        betas = (0.9, 0.95 if runs.task == "gpt" else 0.999)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=betas, weight_decay=0.01, fused=True
        )

    def step(self, number: int, scale: float = 1.0) -> None:
        """The step with that number, from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scale * min(1.0, number / WARM)
        self.task.batch(self.model, number).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> float:
        return float(self.task.loss(self.model))

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
    return float(run.task.loss(model))


def study(runs: Runs, rate: float, seed: int) -> list[dict[str, Any]]:
    """All losses of one run: of the constant rate and its averages, then of the branches."""
    run = Run(runs, rate, seed)
    ema = EMA(run.model, [Window(window) for window in runs.windows])
    ema.attach(run.optimizer)
    spacing = min(runs.windows) // max(POINTS)
    starts = {end - window for end in runs.ends for window in runs.windows}
    past: dict[int, list[Tensor]] = {}
    states, rows = {}, []
    for number in range(1, max(runs.ends) + 1):
        run.step(number)
        if number % spacing == 0:
            past[number] = [weight.detach().clone() for weight in run.model.parameters()]
            past.pop(number - max(runs.windows), None)
        if number in starts:
            states[number] = run.state(), run.loss()
        for window in runs.windows if number in runs.ends else ():
            row: dict[str, Any] = {"task": runs.task, "rate": rate, "seed": seed, "end": number}
            row |= {"window": window, "before": states[number - window][1], "live": run.loss()}
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
        run.back(states[end - window][0])
        for number in range(end - window + 1, end + 1):
            run.step(number, (end - number + 1) / window)
        row["branch"] = run.loss()
    return rows


# --- the tables -----------------------------------------------------------------------------------

PAIRED = "merge 10 less linear"
KINDS = {"before": "at its start", "live": "no average", "linear": "every step"}
KINDS |= {f"merge {points}": f"{points} points" for points in reversed(POINTS)}
KINDS |= {PAIRED: "10 points less every step", "minus-sqrt": "minus-sqrt", "cosine": "cosine"}


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Markdown, of a results file and of nothing else."""
    text = (
        f"{results['name'].capitalize()} study, {results['cpu_seconds'] / 60:.1f} minutes of one "
        "CPU. Each cell is the distance of a validation loss from that of the real branch, in "
        "percent of it: mean over seeds and moments, ± the standard error over seeds."
    )
    yield from textwrap.wrap(text, 100)
    for runs in results["runs"]:
        chosen = [row for row in results["rows"] if row["task"] == runs["task"]]
        yield from ("", *_table(runs, chosen))


def _table(runs: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    ends = ", ".join(map(str, runs["ends"]))
    yield f"**{runs['task']}**: {runs['seeds']} seeds, branches that end at {ends} steps."
    yield ""
    yield "| Rate | Window | Branch | " + " | ".join(KINDS.values()) + " |"
    yield "|---" * (len(KINDS) + 3) + "|"
    for rate in runs["rates"]:
        for window in runs["windows"]:
            some = [row for row in rows if (row["rate"], row["window"]) == (rate, window)]
            branch = sum(row["branch"] for row in some) / len(some)
            cells = [_cell(some, kind) for kind in KINDS]
            yield f"| {rate:g} | {window} | {branch:.4f} | " + " | ".join(cells) + " |"


def _cell(rows: list[dict[str, Any]], kind: str) -> str:
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        distance = row["merge 10"] - row["linear"] if kind == PAIRED else row[kind] - row["branch"]
        by_seed.setdefault(row["seed"], []).append(100 * distance / row["branch"])
    means = [sum(values) / len(values) for values in by_seed.values()]
    mean = sum(means) / len(means)
    spread = sum((each - mean) ** 2 for each in means) / max(1, len(means) - 1)
    return f"{mean:+.2f} ± {math.sqrt(spread / len(means)):.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cooldown.py", formatter_class=form, description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer and shorter runs of the GPT")
    size.add_argument("--smoke", action="store_true", help="a few steps: does it run at all")
    size.add_argument("--page", type=Path, metavar="RESULTS", help="train nothing, print tables")
    parser.add_argument("--out", type=Path, metavar="JSON", help="default: runs/cooldown-SIZE.json")
    args = parser.parse_args(arguments)
    if args.page is not None:
        print("\n".join(tables(json.loads(args.page.read_text()))))
        return 0
    torch.set_num_threads(1)
    name = "quick" if args.quick else "smoke" if args.smoke else "full"
    out = args.out or Path(f"runs/cooldown-{name}.json")
    try:  # now, and not after the training
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        parser.error(f"--out {out} cannot be written: {error.strerror}")
    rows: list[dict[str, Any]] = []
    for runs in PLANS[name]:
        for rate in runs.rates:
            for seed in range(runs.seeds):
                rows += study(runs, rate, seed)
                spent = f"{time.process_time():.0f} s of the CPU"
                print(f"{runs.task} {rate:g} seed {seed}: {spent}", file=sys.stderr, flush=True)
    facts = {"name": name, "cpu_seconds": round(time.process_time())}
    facts |= {"runs": [asdict(runs) for runs in PLANS[name]]}
    files.write(out, facts | {"rows": files.rounded(rows)})
    print("\n".join(tables(json.loads(out.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
