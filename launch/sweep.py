"""Choose the decay after training: store two averages 32 times, then reconstruct any width.

    python launch/sweep.py     the table and plot of docs/choosing-a-decay.md
    python launch/sweep.py --seeds 1 --epochs 10 --out runs/quick

One process on the CPU. The model, the data and the numbers are those of launch/train.py. Some
widths are also tracked during training, to compare the reconstructed averages with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import train
from torch import Tensor

from dist_ema import EMA, Power, load_file
from dist_ema.posthoc import Snapshots
from dist_ema.service import sweep as golden

STORED = (0.05, 0.10)
TRACKED = (0.02, 0.03, 0.07, 0.12, 0.15, 0.20)
SWEPT = tuple(round(0.02 + 0.01 * i, 2) for i in range(24))  # 0.02 to 0.25


@dataclass(frozen=True)
class Trained:
    """A finished run: where its snapshots are, and the averages that were tracked, by sigma_rel."""

    run: train.Run
    snapshots: Path
    tracked: dict[float, dict[str, Tensor]]


def train_and_store(
    out: Path, *, epochs: int, seed: int, snapshots: int, tracked: Sequence[float]
) -> Trained:
    """Train, store the two averages `snapshots` times, track others."""
    args = train.parse(
        ["--device", "cpu", "--epochs", str(epochs), "--seed", str(seed), "--out", str(out)]
    )
    train.check(args)
    run = train.build(train.join(args), args)
    ema = EMA(run.model, decay=[Power(sigma_rel=sigma) for sigma in STORED], buffers="average")
    beside = EMA(run.model, decay=[Power(sigma_rel=sigma) for sigma in tracked], buffers="average")
    for each in (ema, beside):
        each.attach(run.optimizer)
    every = epochs * args.steps_per_epoch / snapshots

    def store() -> None:
        ema.snapshot(out / "snapshots", every=every)  # saves when it is due

    for epoch in range(1, epochs + 1):
        train.train_epoch(run, epoch, store)
    return Trained(
        run, out / "snapshots", {sigma: beside.gather(i) for i, sigma in enumerate(tracked)}
    )


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all floating weights together."""
    names = [name for name, weight in b.items() if weight.is_floating_point()]
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    return float((apart / sum(float(b[name].double().square().sum()) for name in names)) ** 0.5)


def sweep(trained: Trained, out: Path, sigmas: Sequence[float]) -> list[dict[str, Any]]:
    """Mix, evaluate, and compare with what was tracked: one row per width."""
    store, rows = Snapshots(trained.snapshots), []
    for sigma in sigmas:
        target = Power(sigma_rel=sigma)
        fit = store.fit(target)
        place = out / f"sigma-{sigma:.3f}"
        store.write(place, target, fit, force=True)
        mixed = load_file(place)
        trained.run.model.load_state_dict(mixed)
        row = {
            "sigma_rel": sigma,
            "residual": fit.residual,
            "gain": fit.gain,
            **train.evaluate(trained.run),
        }
        if sigma in trained.tracked:
            row["distance"] = distance(mixed, trained.tracked[sigma])
        rows.append(row)
    return rows


def search(trained: Trained, out: Path, rows: list[dict[str, Any]]) -> None:
    """Find the best width with a third of the evaluations, and say whether the table agrees."""

    def loss(place: Path, _: float) -> float:
        trained.run.model.load_state_dict(load_file(place))
        return train.evaluate(trained.run)["loss"]

    # A short run expresses fewer widths than the table has.
    narrowest, widest = golden.expressible(Snapshots(trained.snapshots))
    low, high = max(SWEPT[0], narrowest), min(SWEPT[-1], widest)
    found = golden.sweep(trained.snapshots, out / "search", loss, low=low, high=high, evaluations=8)
    best = min(rows, key=lambda row: row["loss"])["sigma_rel"]
    low, high = found.interval
    print(
        f"search: {found.best.mean:.4f} at sigma_rel {found.best.sigma_rel:g} after "
        f"{len(found.candidates)} evaluations; between {low:.3f} and {high:.3f}, where the table's "
        f"{best:g} {'lies' if low <= best <= high else 'does not lie'}"
    )


def mean(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Row by row over the seeds; of distances the largest."""
    rows = []
    for same in zip(*runs, strict=True):
        row = {
            key: sum(each[key] for each in same) / len(same) for key in same[0] if key != "distance"
        }
        rows.append(
            row
            | (
                {"distance": max(each["distance"] for each in same)}
                if "distance" in same[0]
                else {}
            )
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| sigma_rel | test loss | test accuracy | residual | against tracked |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seen = f"{row['distance']:.1e}" if "distance" in row else ""
        lines.append(
            f"| {row['sigma_rel']:.2f} | {row['loss']:.4f} | {row['accuracy']:.2%} "
            f"| {row['residual']:.2%} | {seen} |"
        )
    return "\n".join(lines)


def plot(path: Path, runs: list[list[dict[str, Any]]], live: list[dict[str, float]]) -> None:
    """Loss and accuracy over sigma_rel: each seed, their mean, and the live weights at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sigmas = [row["sigma_rel"] for row in runs[0]]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key in zip(panels, ("loss", "accuracy"), strict=True):
        for rows in runs:
            panel.plot(sigmas, [row[key] for row in rows], color="C0", lw=0.8, alpha=0.4)
        both = [row[key] for row in mean(runs)]
        panel.plot(
            sigmas, both, color="C0", lw=2, marker=".", label="mixed afterwards: mean of the seeds"
        )
        for sigma in STORED:
            panel.axvline(sigma, color="grey", lw=0.8, ls=":")
        panel.set(xlabel="sigma_rel (dotted: stored)", ylabel=f"test {key}")
        panel.legend(title=f"live, at the end: {sum(each[key] for each in live) / len(live):.3f}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("sweep.py", description=(__doc__ or "").split("\n")[0])
    whole = train._number(int, "a whole number of 1 or more", lambda n: n >= 1)
    parser.add_argument("--epochs", type=whole, default=20, metavar="N", help="of one run (20)")
    parser.add_argument(
        "--snapshots",
        type=whole,
        default=32,
        metavar="N",
        help="of the two averages, over the run (32)",
    )
    parser.add_argument(
        "--seeds", type=whole, default=4, metavar="N", help="runs; the table has their mean (4)"
    )
    text = "folder for sweep.json, sweep.png and seed-*/, which are replaced (runs/sweep)"
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help=text)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    earlier = list(args.out.glob("seed-*"))  # nothing else in the folder is ours to remove
    if earlier and not (args.out / "sweep.json").exists():
        parser.error(
            f"--out {args.out} holds {earlier[0].name}, but no sweep.json: "
            "name another, or remove it"
        )
    for old in earlier:
        shutil.rmtree(old)
    runs, live = [], []
    for seed in range(args.seeds):
        out = args.out / f"seed-{seed}"
        trained = train_and_store(
            out, epochs=args.epochs, seed=seed, snapshots=args.snapshots, tracked=TRACKED
        )
        live.append(train.evaluate(trained.run))
        runs.append(sweep(trained, out, SWEPT))
        best = min(runs[-1], key=lambda row: row["loss"])
        print(
            f"seed {seed}: live loss {live[-1]['loss']:.4f}, "
            f"best {best['loss']:.4f} at sigma_rel {best['sigma_rel']:g}"
        )
        search(trained, out, runs[-1])
    (args.out / "sweep.json").write_text(json.dumps({"runs": runs, "live": live}, indent=2) + "\n")
    plot(args.out / "sweep.png", runs, live)
    print(table(mean(runs)))
    print(f"live: {sum(each['loss'] for each in live) / len(live):.4f}", end=", ")
    print(f"{sum(each['accuracy'] for each in live) / len(live):.2%}; {args.out / 'sweep.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
