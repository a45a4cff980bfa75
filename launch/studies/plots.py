"""The PNGs: the mean over seeds as a line, their standard deviation as a band. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .results import Results, spread
from .sizes import DECAYS, HEADLINE, NOISES
from .verdicts import AVERAGE, LIVE, final

__all__ = ["draw"]

LIVE_COLOUR, COLOURS = "0.35", ("C0", "C1", "C2", "C3", "C4")
STATISTICS = {
    "copied": "copied from live",
    "averaged": "averaged with the weights",
    "recalibrated": "recalibrated",
}
Cells = list[dict[str, Any]]


def draw(results: Results, folder: Path) -> None:
    """A plot for every experiment that is complete."""
    if results.whole_table:
        _table(results, folder / "table.png")
        _statistics(results, folder / "statistics.png")
    for name, plot in (
        ("language", _language),
        ("forgetting", _forgetting),
        ("distillation", _distillation),
        ("resolution", _resolution),
        ("equivalence", _equivalence),
    ):
        cells = results.of(name)
        if cells:
            plot(cells, folder / f"{name}.png")


@contextmanager
def _panels(
    path: Path, count: int, width: float = 4.4, sharey: bool = False
) -> Iterator[list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape: dict[str, Any] = {
        "figsize": (width * count, 4),
        "layout": "constrained",
        "squeeze": False,
    }
    figure, axes = pyplot.subplots(1, count, sharey=sharey, **shape)
    for panel in axes[0]:
        panel.grid(alpha=0.25)
    yield list(axes[0])
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _band(
    panel: Any, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, **style: Any
) -> None:
    """runs: one list of values per seed."""
    both = [spread(values) for values in zip(*runs, strict=True)]
    mean, deviation = (
        [each[0] for each in both],
        [each[1] if each[1] == each[1] else 0.0 for each in both],
    )
    panel.plot(x, mean, label=label, **style)
    low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color=style.get("color"), alpha=0.15, lw=0)


def _percent(runs: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[100 * value for value in run] for run in runs]


def _table(results: Results, path: Path) -> None:
    """Accuracy over epochs: live and average of one run, and the run whose learning rate decays."""
    kinds = [
        ("", LIVE, "live", LIVE_COLOUR),
        ("", "live/recalibrated", "live, recalibrated BN", "C1"),
        ("-cosine", "live/recalibrated", "other run: cosine lr, recalibrated BN", "C2"),
        ("", AVERAGE, f"average, decay {HEADLINE}, recalibrated BN", "C0"),
    ]
    with _panels(path, len(NOISES)) as panels:
        for panel, noise in zip(panels, NOISES, strict=True):
            for kind, name, label, colour in kinds:
                cells = results.of("table", f"{noise}{kind}")
                epochs = [row["epoch"] for row in cells[0]["rows"]]
                runs = [[row["accuracy"][name] for row in cell["rows"]] for cell in cells]
                _band(panel, epochs, _percent(runs), label, color=colour)
            low = min(100 * value for value in final(results.of("table", f"{noise}"), LIVE))
            panel.set(
                title=f"{noise} % wrong labels",
                xlabel="epoch",
                ylabel="test accuracy, %",
                ylim=(max(0, low - 25), 100),
            )
        panels[0].legend(loc="lower right", fontsize=8)


def _statistics(results: Results, path: Path) -> None:
    """What becomes of each average with each kind of BatchNorm statistics."""
    names = [*map(str, DECAYS), "swa"]
    with _panels(path, len(NOISES), sharey=True) as panels:
        for panel, noise in zip(panels, NOISES, strict=True):
            cells = results.of("table", f"{noise}")
            for i, (kind, text) in enumerate(STATISTICS.items()):
                both = [
                    spread([100 * value for value in final(cells, f"{name}/{kind}")])
                    for name in names
                ]
                at = [x + 0.1 * (i - 1) for x in range(len(names))]
                panel.errorbar(
                    at,
                    [m for m, _ in both],
                    [d for _, d in both],
                    fmt="o",
                    capsize=3,
                    color=f"C{i}",
                    label=text,
                )
            mean, _ = spread([100 * value for value in final(cells, LIVE)])
            panel.axhline(
                mean, color=LIVE_COLOUR, ls="--", lw=1, label="live weights, own statistics"
            )
            panel.set_xticks(
                range(len(names)), ["SWA" if name == "swa" else name for name in names]
            )
            panel.set(
                title=f"{noise} % wrong labels",
                xlabel="decay of the average",
                ylabel="test accuracy, %" if panel is panels[0] else "",
            )
        panels[0].legend(title="BatchNorm statistics", loc="lower left", fontsize=8)


def _language(cells: Cells, path: Path) -> None:
    """Loss over steps, the same against live, and over sigma_rel afterwards."""
    (cell,) = cells
    rows = cell["rows"][min(2, len(cell["rows"]) - 1) :]
    live = {row["step"]: row["live"] for row in cell["rows"]}
    lines = [
        (f"average, {name} steps", colour, "-", rows, name)
        for name, colour in zip(_windows(rows), COLOURS, strict=False)
    ]
    for i, branch in enumerate(cell["branches"].values()):
        start = branch[0]["step"] - cell["rows"][0]["step"]  # one evaluation earlier
        line = [*(row for row in cell["rows"] if row["step"] == start), *branch]
        lines.append(
            ("branch: learning rate falls to 0" if i == 0 else "", "k", "--", line, "live")
        )
    with _panels(path, 3, 5) as (left, middle, right):
        left.plot(
            [row["step"] for row in rows],
            [row["live"] for row in rows],
            color=LIVE_COLOUR,
            label="live, constant rate",
        )
        middle.axhline(0, color=LIVE_COLOUR)
        for label, colour, style, line, name in lines:
            drawn: dict[str, Any] = {
                "color": colour,
                "ls": style,
                "lw": 1.2,
                "marker": "." if name == "live" else "",
            }
            steps = [row["step"] for row in line]
            left.plot(steps, [row[name] for row in line], label=label or None, **drawn)
            middle.plot(steps, [row[name] - live[row["step"]] for row in line], **drawn)
        left.set(title="validation loss", xlabel="step", ylabel="nats per byte")
        left.legend(fontsize=8)
        near = [
            row["live"] - live[row["step"]] for each in cell["branches"].values() for row in each
        ]
        middle.set(
            title="the same, less that of live",
            xlabel="step",
            ylabel="nats per byte (below 0: better than live)",
        )
        middle.set_ylim(1.4 * min(near) - 0.01, -0.8 * min(near) + 0.01)
        _sweep(right, cell)


def _windows(rows: Cells) -> list[str]:
    return [name for name in rows[0] if name.startswith("window")]


def _sweep(panel: Any, cell: dict[str, Any]) -> None:
    widths, last = [row["sigma_rel"] for row in cell["sweep"]], cell["rows"][-1]
    panel.plot(
        widths,
        [row["loss"] for row in cell["sweep"]],
        marker=".",
        color="C0",
        label="mixed from snapshots",
    )
    tracked = next(name for name in last if name.startswith("sigma_rel"))
    panel.plot(
        [float(tracked.split()[1])],
        [last[tracked]],
        "x",
        color="C3",
        ms=9,
        label="tracked during the run",
    )
    panel.axhline(last["live"], color=LIVE_COLOUR, ls="-", label="live, constant rate")
    decayed = cell["branches"][str(last["step"])][-1]["live"]
    panel.axhline(decayed, color="k", ls="--", lw=1, label="branch: learning rate at 0")
    panel.set(
        title=f"every width, at step {last['step']}",
        xlabel="sigma_rel of the average",
        ylabel="validation loss, nats per byte",
    )
    panel.legend(fontsize=8)


def _forgetting(cells: Cells, path: Path) -> None:
    steps = [row["step"] for row in cells[0]["rows"]]
    names = [name for name in cells[0]["rows"][0] if name != "step"]
    titles = ("first five digits", "other five digits", "mean of the two")
    with _panels(path, 3) as panels:
        for name, colour in zip(names, (LIVE_COLOUR, *COLOURS), strict=False):
            old, new = (
                [[row[name][half] for row in cell["rows"]] for cell in cells] for half in (0, 1)
            )
            mean = [
                [(a + b) / 2 for a, b in zip(*both, strict=True)]
                for both in zip(old, new, strict=True)
            ]
            label = "live" if name == "live" else f"average, {name} steps"
            for panel, runs in zip(panels, (old, new, mean), strict=True):
                _band(panel, steps, _percent(runs), label, color=colour)
        for panel, title in zip(panels, titles, strict=True):
            panel.set(
                title=title,
                xlabel="step of the fine-tuning on the other five",
                ylabel="test accuracy, %",
                ylim=(-2, 102),
            )
        panels[2].legend(fontsize=8)


def _distillation(cells: Cells, path: Path) -> None:
    names = [name for name in cells[0] if isinstance(cells[0][name], dict)]
    with _panels(path, 1, 7) as (panel,):
        for i, (kind, colour) in enumerate((("live", LIVE_COLOUR), ("average", "C0"))):
            runs = [[100 * cell[name][kind] for cell in cells] for name in names]
            at = [y + 0.15 * (1 - 2 * i) for y in range(len(names))]
            for y, values in zip(at, runs, strict=True):
                panel.plot(values, [y] * len(values), "o", color=colour, alpha=0.3, ms=4)
            both = [spread(values) for values in runs]
            panel.errorbar(
                [m for m, _ in both],
                at,
                xerr=[d for _, d in both],
                fmt="D",
                color=colour,
                capsize=3,
                label=kind,
            )
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set(xlabel="test accuracy, % (dots: seeds; bars: their standard deviation)")
        panel.legend(title="weights")


def _resolution(cells: Cells, path: Path) -> None:
    sides = [row["side"] for row in cells[0]["rows"]]
    texts = {
        "as trained": "as trained",
        "recalibrated": "recalibrated BN at that resolution",
        "fine-tuned": "FixRes: classifier and last norm fine-tuned",
    }
    with _panels(path, 1, 7) as (panel,):
        for colour, (name, text) in zip(COLOURS, texts.items(), strict=False):
            runs = [[row[name] for row in cell["rows"]] for cell in cells]
            _band(panel, sides, _percent(runs), text, color=colour, marker=".")
        panel.axvline(16, color="grey", ls=":", lw=1, label="side of the training crops")
        panel.set(xlabel="side of the test images, pixels", ylabel="test accuracy, %")
        panel.legend(fontsize=8)


def _equivalence(cells: Cells, path: Path) -> None:
    def curve(run: str, decay: float, key: str) -> list[list[float]]:
        return [[row[key] for row in cell[run] if row["decay"] == decay] for cell in cells]

    lines = [
        ("small", 0.999, "batch 32, decay 0.999", LIVE_COLOUR, "-"),
        ("large", 0.999**2, "batch 64, decay 0.999²", "C0", "--"),
        ("large", 0.999, "batch 64, decay 0.999 left as it was", "C3", "-"),
    ]
    with _panels(path, 3) as (left, middle, right):
        for run, decay, label, colour, style in lines:
            near = min({row["decay"] for row in cells[0][run]}, key=lambda each: abs(each - decay))
            epochs = sorted({row["epoch"] for row in cells[0][run]})
            _band(left, epochs, curve(run, near, "loss"), label, color=colour, ls=style)
            _band(middle, epochs, curve(run, near, "gone"), label, color=colour, ls=style)
        left.set(title="test loss of the average", xlabel="epoch", ylabel="cross entropy")
        middle.set(
            title="distance from where averaging began",
            xlabel="epoch",
            ylabel="norm of the difference",
        )
        middle.legend(fontsize=8)
        names = [
            row["shadow"]
            for row in cells[0]["shadows"]
            if row["decay"] == 0.999 and row["shadow"] != "live"
        ]
        for i, decay in enumerate((0.99, 0.999)):
            rows = [[row for row in cell["shadows"] if row["decay"] == decay] for cell in cells]
            both = [spread([100 * _row(each, name)["way"] for each in rows]) for name in names]
            at = [y + 0.18 * (2 * i - 1) for y in range(len(names))]
            right.barh(
                at,
                [m for m, _ in both],
                0.34,
                xerr=[d for _, d in both],
                color=f"C{i}",
                label=f"decay {decay}",
            )
        right.set_yticks(
            range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8
        )
        right.invert_yaxis()
        right.set(title="how far the shadow came", xlabel="% of the way of fp32, every step")
        right.legend(fontsize=8)


def _row(rows: Cells, name: str) -> dict[str, Any]:
    return next(row for row in rows if row["shadow"] == name)
