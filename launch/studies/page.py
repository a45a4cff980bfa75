"""results.md, from the files of results and nothing else. No torch.

Text that must be true of any numbers is written here; everything that depends on them is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from . import plots, verdicts
from .results import Results, churn, fluctuation, paired, spread
from .sizes import DECAYS, HEADLINE, NOISES
from .verdicts import Verdict, final, lasting

__all__ = ["text", "write"]

Cells = list[dict[str, Any]]


def write(out: Path) -> Path:
    """OUT/results.md and its plots in OUT/results/. Returns the page."""
    results = Results.read(out / "results")
    plots.draw(results, out / "results")
    page = out / "results.md"
    page.write_text(text(results))
    return page


def text(results: Results) -> str:
    """The page as Markdown."""
    parts = [_head(results)]
    for name, title, section in (
        ("table", "Live weights and averages, clean and wrong labels", _table),
        (
            "language",
            "A language model: constant learning rate, averages, decayed branches",
            _language,
        ),
        ("forgetting", "Forgetting", _forgetting),
        ("distillation", "Distillation with few labels", _distillation),
        ("resolution", "FixRes", _resolution),
        ("equivalence", "What should make no difference", _equivalence),
    ):
        there = results.whole_table if name == "table" else results.of(name)
        parts.append(
            f"## {title}\n\n" + (section(results) if there else "Not run, or not complete.")
        )
    return _fill("\n\n".join([*parts, _how(results)])) + "\n"


def _fill(page: str) -> str:
    """Paragraphs and list items in lines of 100; tables, code, headings, images as they are."""
    blocks = []
    for block in page.split("\n\n"):
        if block.startswith("- "):
            block = "\n".join(fill(item, 100, subsequent_indent="  ") for item in block.split("\n"))
        elif not block.startswith(("|", "#", "!", "```")):
            block = fill(
                " ".join(block.split()), 100, break_long_words=False, break_on_hyphens=False
            )
        blocks.append(block)
    return "\n\n".join(blocks)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(each) + " |" for each in [head, rule, *rows])


def _percent(values: Sequence[float], digits: int = 1) -> str:
    mean, deviation = spread(values)
    return f"{100 * mean:.{digits}f} ± {100 * deviation:.{digits}f}"


def _verdicts(found: Sequence[Verdict]) -> str:
    return _rows(
        ["published", "here", "verdict"],
        [[each.published, each.here, f"**{each.word}**"] for each in found],
        left=3,
    )


# --- head and foot --------------------------------------------------------------------------------


def _head(results: Results) -> str:
    size, machine = results.size, results.facts["machine"]
    found = [verdict for each in _all_verdicts(results) for verdict in each]
    agree = sum(verdict.agrees for verdict in found)
    small = (
        ""
        if size.name == "full"
        else f"\n\n**This is a {size.name} study: too small to prove anything.**"
    )
    return f"""# Results: does averaging help?

`launch/study.py` trains, compares, and writes this page from its files of results: every number,
verdict and plot below is computed, and the page of the committed results is compared with a new one
in the tests. {_count(results)} on a machine with {machine["cores"]} CPU cores and no GPU; what was
chosen beforehand is the average that verdicts speak of (decay {HEADLINE}, with recalibrated
BatchNorm statistics) and the rule: a difference counts if it is more than two standard errors over
the seeds, seed by seed. Tables have mean ± standard deviation over the seeds, differences have mean
± standard error; in plots, lines are means and bands or bars standard deviations.{small}

Of {len(found)} comparisons with what others have published, {agree} agree; each section says which
do not. The models are small and the tasks are easy: what carries over to large ones is the
mechanism, not the size of the numbers."""


def _count(results: Results) -> str:
    return f"{len(results.found)} runs, {results.size.seeds} seeds (one of the language model),"


def _all_verdicts(results: Results) -> list[list[Verdict]]:
    found = [verdicts.of_table(results)] if results.whole_table else []
    found += [verdicts.of_language(cell) for cell in results.of("language")]
    if results.of("distillation"):
        found.append(verdicts.of_distillation(results.of("distillation")))
    if results.of("resolution"):
        found.append(verdicts.of_resolution(results.of("resolution"), 16))
    return found


def _how(results: Results) -> str:
    facts = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    box = facts["machine"]
    machine = f"{box['cores']} cores, {box['architecture']}, {box['system']}"
    commands = list(dict.fromkeys(session["command"] for session in facts["sessions"]))
    workers = ", ".join(dict.fromkeys(str(session["workers"]) for session in facts["sessions"]))
    wall = sum(session["seconds"] for session in facts["sessions"]) / 60
    two = sum(
        cell["seconds"] for name, cell in results.found.items() if name.startswith("language")
    )
    one = sum(
        cell["seconds"] for name, cell in results.found.items() if not name.startswith("language")
    )
    return f"""## How to repeat it

```sh
{chr(10).join(commands)}
```

{wall:.0f} minutes in {_sessions(facts)} with {workers} workers: {one / 60:.0f} minutes of one core
for the digits, {two / 60:.0f} minutes of two for the language model. Machine: {machine}. Versions:
{versions}. The time is that on the clock, whatever else the machine had to do. The language model
learns the source of the Python that runs it, so another Python has other losses. The same machine
and versions give the same files, interrupted or not, but for the seconds in them. What is there is
not done again, so remove it first or name another `--out`. `--quick` is the same in three minutes,
`--only NAME` one experiment, `--page` this page again."""


def _sessions(facts: dict[str, Any]) -> str:
    count = len(facts["sessions"])
    return "one session" if count == 1 else f"{count} sessions"


# --- the sections ---------------------------------------------------------------------------------


def _table(results: Results) -> str:
    size = results.size
    kinds = [("live", "own"), ("live", "recalibrated")]
    kinds += [
        (name, kind)
        for name in (*map(str, DECAYS), "swa")
        for kind in ("copied", "averaged", "recalibrated")
    ]
    blocks = []
    for noise in NOISES:
        rows = [_method(results.of("table", f"{noise}"), *kind) for kind in kinds]
        rows += [
            _method(results.of("table", f"{noise}-cosine"), "live", kind, " (cosine lr)")
            for kind in ("own", "recalibrated")
        ]
        head = [
            "weights",
            "BatchNorm statistics",
            "last epoch, %",
            "last quarter, %",
            "fluctuation, points",
            "churn, %",
        ]
        blocks.append(f"### {noise} % wrong labels\n\n" + _rows(head, rows, left=2))
    reasons = "\n\n".join(verdicts.why(results))
    return f"""scikit-learn's digits at 16 x 16 pixels, turned, scaled, shifted and with noise; the
network of launch/train.py (14,458 weights, BatchNorm), SGD with momentum at a constant learning
rate of 0.1, batch 32, {size.epochs} epochs of {size.steps_per_epoch} steps; {size.tests} test
images. A share of the training labels is wrong, the same ones for every seed. All averages of a run
come from that one run; SWA is the mean of the live weights after each epoch of the last quarter.
*Last epoch* is the test accuracy after it, *last quarter* its mean over the epochs of that quarter;
*fluctuation* the standard deviation of its change from one epoch to the next in the last quarter;
*churn* the share of test images on which two seeds differ, over all pairs (the standard error of a
difference by leaving out one seed after the other).

{_verdicts(verdicts.of_table(results))}

Published: [Morales-Brotons et al. 2024](https://arxiv.org/abs/2411.18704). Here: decay {HEADLINE}
with recalibrated statistics against the live weights with their own. Accuracy after the last epoch
was the measure to begin with; its mean over the last quarter was added after a first look at the
results, because live weights jump so much that their last epoch says little.

{reasons}

![test accuracy over epochs](results/table.png)

![accuracy by kind of BatchNorm statistics](results/statistics.png)

{(chr(10) * 2).join(blocks)}"""


def _method(cells: Cells, name: str, kind: str, remark: str = "") -> list[str]:
    key = f"{name}/{kind}"
    label = {"live": f"live{remark}", "swa": "SWA"}.get(name, f"average, decay {name}")
    steady = [fluctuation(cell, key) for cell in cells]
    return [
        label,
        kind,
        *map(_percent, (final(cells, key), lasting(cells, key), steady)),
        f"{100 * churn(cells, key):.1f}",
    ]


def _language(results: Results) -> str:
    (cell,) = results.of("language")
    size, sweep, last = results.size, cell["sweep"], cell["rows"][-1]
    windows = [name for name in last if name.startswith("window")]
    rows = []
    for end, branch in cell["branches"].items():
        row = next(each for each in cell["rows"] if each["step"] == int(end))
        rows.append(
            [end, *(f"{row[name]:.4f}" for name in ("live", *windows)), f"{branch[-1]['live']:.4f}"]
        )
    best = min(sweep, key=lambda row: row["loss"])
    tracked = next(name for name in last if name.startswith("sigma_rel"))
    mixed = next(row for row in sweep if row["sigma_rel"] == float(tracked.split()[1]))
    widths = [
        [f"{row['sigma_rel']:.2f}", f"{row['loss']:.4f}", f"{row['residual']:.1%}"] for row in sweep
    ]
    return f"""A GPT of {cell["parameters"]:,} weights learns bytes of the Python standard library's
source ({cell["bytes"][0] / 1e6:.1f} MB; every tenth file, {cell["bytes"][1] / 1e6:.1f} MB, is for
validation), on {cell["world"]} ranks under FSDP2: {size.gpt_steps} steps of {size.gpt_batch} x 128
bytes, AdamW at a constant learning rate of 0.003. Averages of several windows (1 / (1 - decay)
steps) are tracked in the same run. From three checkpoints a branch goes on with a learning rate
that falls to 0 within {size.gpt_decay} steps. One seed. Validation loss in nats per byte, where the
branches end:

{_rows(["step", "live", *windows, "decayed branch"], rows, left=0)}

{_verdicts(verdicts.of_language(cell))}

Published: [Hägele et al. 2024](https://arxiv.org/abs/2405.18392). "Comes close" means here that the
best of the windows closes at least half of the gap; the best is chosen after the fact, which is
what the sweep below makes cheap.

![validation loss over steps, and over sigma_rel](results/language.png)

Two Power averages were stored every {size.gpt_every} steps (`ema.snapshot`), and every other width
was mixed from them afterwards with `dist_ema.posthoc`. The best of those tried is sigma_rel
{best["sigma_rel"]:g} with {best["loss"]:.4f}, where live has {last["live"]:.4f}.
{_same(mixed["loss"], last[tracked], mixed["sigma_rel"])}

{_rows(["sigma_rel", "loss", "residual"], widths, left=0)}"""


def _same(mixed: float, tracked: float, sigma: float) -> str:
    return (
        f"At {sigma:g}, tracked during the run as well, the mixture has {mixed:.5f} "
        f"and the tracked average {tracked:.5f}: "
        f"{abs(mixed - tracked):.1e} apart."
    )


def _forgetting(results: Results) -> str:
    cells = results.of("forgetting")
    names = [name for name in cells[0]["rows"][0] if name != "step"]

    def peak(cell: dict[str, Any], name: str) -> dict[str, float]:
        row = max(cell["rows"], key=lambda row: sum(row[name]))
        return {
            "both": fmean(row[name]),
            "old": row[name][0],
            "new": row[name][1],
            "step": row["step"],
        }

    rows = []
    for name in names:
        best = [peak(cell, name) for cell in cells]
        ends = [cell["rows"][-1][name] for cell in cells]
        label = "live" if name == "live" else f"average, {name}"
        at = f"{fmean(each['step'] for each in best):.0f}"
        halves = [_percent([each[key] for each in best]) for key in ("both", "old", "new")]
        rows.append(
            [label, at, *halves, *(_percent([end[half] for end in ends]) for half in (0, 1))]
        )
    head = [
        "weights",
        "best at step",
        "mean of both, %",
        "old, %",
        "new, %",
        "old at the end, %",
        "new at the end, %",
    ]
    brake = max(names[1:], key=lambda name: fmean(peak(cell, name)["both"] for cell in cells))
    here = paired(
        [peak(cell, brake)["both"] for cell in cells],
        [peak(cell, "live")["both"] for cell in cells],
    )
    said = (
        "which is more than two standard errors"
        if here.beyond
        else "which is not beyond two standard errors"
    )
    ends = [
        f"{label[9:]} has {old} % of the old and {new} % of the new"
        for label, *_, old, new in (rows[1], rows[-1])
    ]
    return f"""Trained on the digits 0 to 4, fine-tuned on 5 to 9 at a learning rate of 0.02 without
ever seeing the first five again; asked among all ten. The averages begin as the model that knows
the first five, and BatchNorm's statistics are averaged with the weights.

{_rows(head, rows)}

*Best* is the evaluated step with the highest mean of both halves, for each kind of weights its own,
looked up on the test images. At its best moment the average with {brake} is {here.points()} points
from live at its own, {said}. The horizon decides when the average passes from the old to the new:
at the end {ends[0]}, {ends[1]}.

![accuracy on both halves over the steps of the fine-tuning](results/forgetting.png)"""


def _distillation(results: Results) -> str:
    cells = results.of("distillation")
    names = [name for name in cells[0] if isinstance(cells[0][name], dict)]
    rows = [
        [name, *(_percent([cell[name][kind] for cell in cells]) for kind in ("live", "average"))]
        for name in names
    ]
    return f"""150 training images have labels, the other 1,197 are images alone; 8 x 8 pixels. The
teacher is twice as wide as the student and learns from the same 150 labels; its average gives the
soft targets (temperature 2) on all images. The mean teacher is the student's own average
(`EMA(student, into=teacher)`, decay 0.99), which looks at another augmentation of each image. The
last row knows all labels. Test accuracy, %:

{_rows(["training", "live", "average, decay 0.99"], rows)}

{_verdicts(verdicts.of_distillation(cells))}

![test accuracy by method](results/distillation.png)"""


def _resolution(results: Results) -> str:
    cells = results.of("resolution")
    ways = ["as trained", "recalibrated", "fine-tuned"]
    sides = [row["side"] for row in cells[0]["rows"]]
    table = []
    for i, side in enumerate(sides):
        table.append(
            [str(side), *(_percent([cell["rows"][i][way] for cell in cells]) for way in ways)]
        )
    return f"""Trained on random parts of the images (half to the whole side) at 16 x 16 pixels, so
that strokes look larger than in whole images; tested on whole images at other sides. *Fine-tuned*:
classifier and last BatchNorm alone, three epochs at that side with the test's preprocessing
(`recipes.fixres`). All from the average of decay 0.99. Test accuracy, %:

{_rows(["side of the test images", *ways], table)}

{_verdicts(verdicts.of_resolution(cells, 16))}

Published: [Touvron et al. 2019](https://arxiv.org/abs/1906.06423).

![test accuracy by side](results/resolution.png)"""


def _equivalence(results: Results) -> str:
    cells = results.of("equivalence")
    rows = []
    for i, row in enumerate(cells[0]["shadows"]):
        same = [cell["shadows"][i] for cell in cells]
        distance, way = (_percent([each[key] for each in same]) for key in ("distance", "way"))
        rows.append(
            [
                f"{row['decay']}",
                row["shadow"],
                distance,
                way,
                _percent([each["accuracy"] for each in same]),
            ]
        )
    head = [
        "decay",
        "shadow",
        "apart from the first, % of its way",
        "way from the start, %",
        "accuracy, %",
    ]
    return f"""Runs of the digits task that go on from one that has found its way; averages begin
there. The first row of each decay is the reference: fp32, updated in every step. Distances are over
all weights, as shares of the way that the reference went; accuracy has recalibrated BatchNorm
statistics. *Rounded to nearest* is what a bf16 shadow does without stochastic rounding, done by
hand.

{_rows(head, rows, left=2)}

{_no_difference(cells)}

**Twice the batch.** A second run has batch 64 (SGD with the learning rate and the momentum that
correspond). With decay² its average should be that of batch 32 after the same number of images:

{_batch(cells)}

![what should make no difference](results/equivalence.png)"""


def _no_difference(cells: Cells) -> str:
    """One sentence per way of averaging, at the longer decay."""
    sentences = []
    for i, row in enumerate(cells[0]["shadows"]):
        if row["decay"] != 0.999 or row["shadow"] in ("live", "fp32, every step"):
            continue
        reference = next(
            k for k, each in enumerate(cells[0]["shadows"]) if each["decay"] == row["decay"]
        )
        way, apart = (
            fmean(cell["shadows"][i][key] for cell in cells) for key in ("way", "distance")
        )
        here = paired(*([cell["shadows"][k]["accuracy"] for cell in cells] for k in (i, reference)))
        verdict = (
            "makes no difference to way and accuracy"
            if abs(way - 1) < 0.05 and abs(here.mean) <= 2 * here.error + 1e-9
            else "makes a difference"
        )
        sentences.append(
            f"At decay 0.999 *{row['shadow']}* {verdict}: {way:.1%} of the way, "
            f"{here.points()} points. Its weights are "
            f"{apart:.1%} of the way apart from the reference."
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _batch(cells: Cells) -> str:
    def last(run: str, decay: float, key: str) -> list[float]:
        return [
            [row[key] for row in cell[run] if abs(row["decay"] - decay) < 1e-9][-1]
            for cell in cells
        ]

    def numbers(values: Sequence[float]) -> str:
        mean, deviation = spread(values)
        return f"{mean:.3f} ± {deviation:.3f}"

    small, large = (
        [row["decay"] for row in cells[0]["small"]][1],
        max(row["decay"] for row in cells[0]["large"]),
    )
    corrected = min(row["decay"] for row in cells[0]["large"])
    rows = []
    for label, run, decay in (
        (f"batch 32, decay {small:g}", "small", small),
        (f"batch 64, decay {small:g}² = {corrected:.6f}", "large", corrected),
        (f"batch 64, decay {large:g} left as it was", "large", large),
    ):
        share = [
            a / b
            for a, b in zip(last(run, decay, "gone"), last("small", small, "gone"), strict=True)
        ]
        rows.append([label, numbers(last(run, decay, "loss")), _percent(share)])
    return _rows(["run", "test loss of the average", "way from the start, % of batch 32"], rows)
