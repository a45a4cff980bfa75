"""Draw docs/picture.svg and docs/picture-dark.svg: the shards of four ranks, and one weight's path.

    python launch/picture.py

The curves are computed: a weight that jumps around its optimum, and its average at decay 0.95
(Debiased).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

from dist_ema import Debiased

WORLD, STEPS = 4, 150
LIGHT = {
    "ink": "#1f2933",
    "soft": "#5f6b7a",
    "live": "#8fa3bf",
    "average": "#00796b",
    "empty": "#e4e9ef",
}
DARK = {
    "ink": "#e6eaf0",
    "soft": "#9aa6b5",
    "live": "#7388a8",
    "average": "#4db6ac",
    "empty": "#313a48",
}


def text(
    x: float, y: float, words: str, kind: str = "ink", size: int = 14, anchor: str = "start"
) -> str:
    place = f'x="{x}" y="{y}" class="{kind}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}>{words}</text>"


def column(x: float, y: float, held: set[int], kind: str) -> list[str]:
    """One rank's memory for a model of WORLD shards; the shards that it does not hold are pale."""
    shards = []
    for shard in range(WORLD):
        fill = kind if shard in held else "empty"
        shards.append(
            f'<rect x="{x}" y="{y + 17 * shard}" width="26" height="15" rx="2" class="{fill}"/>'
        )
    return shards


def ranks(y: float, title: str, live_is_whole: bool) -> list[str]:
    """The live weights and the average on every rank."""
    drawn = [text(20, y - 14, title)]
    for rank in range(WORLD):
        x = 20 + 116 * rank
        drawn += column(x, y, set(range(WORLD)) if live_is_whole else {rank}, "live")
        drawn += column(x + 34, y, {rank}, "average")
        drawn.append(text(x + 30, y + 86, f"rank {rank}", "soft", 12, "middle"))
    return drawn


def curve() -> list[str]:
    """A live weight and its average over the steps."""
    draw, schedule = random.Random(7), Debiased(0.95)
    noise = average = 0.0
    lines: tuple[list[str], list[str]] = ([], [])
    for step in range(1, STEPS + 1):
        noise = 0.5 * noise + draw.gauss(0.0, 0.16)
        live = 1.0 - math.exp(-step / 25) + noise
        average += (1.0 - schedule(now=step)) * (live - average)
        for points, value in zip(lines, (live, average), strict=True):
            points.append(f"{545 + 2.6 * step:.1f},{270 - 140 * value:.1f}")
    drawn = ['<path d="M545 60V290H940" class="axis"/>', text(940, 310, "steps", "soft", 12, "end")]
    for points, kind, width in zip(lines, ("live", "average"), (1.6, 3), strict=True):
        drawn.append(
            f'<polyline points="{" ".join(points)}" '
            f'class="line {kind}-line" stroke-width="{width}"/>'
        )
    return drawn


def picture(colours: dict[str, str]) -> str:
    style = [f".{name}{{fill:{colour}}}" for name, colour in colours.items()]
    style += [f".{name}-line{{stroke:{colours[name]}}}" for name in ("live", "average")]
    style += [
        ".line{fill:none;stroke-linejoin:round}",
        f".axis{{fill:none;stroke:{colours['soft']}}}",
    ]
    style.append(
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    )
    drawn = [
        text(20, 28, "Who holds which shard, on 4 ranks", size=16),
        *ranks(74, "FSDP: each rank averages the shard that it holds", live_is_whole=False),
        *ranks(210, "DDP: each rank averages a quarter of the model", live_is_whole=True),
        text(545, 28, "One weight over the steps", size=16),
        *curve(),
        '<rect x="20" y="318" width="14" height="14" rx="2" class="live"/>',
        text(40, 330, "live weights, as the optimizer moves them", "soft", 13),
        '<rect x="345" y="318" width="14" height="14" rx="2" class="average"/>',
        text(365, 330, "the average: fp32, updated without communication", "soft", 13),
    ]
    label = (
        "Each of four ranks holds a quarter of the average. "
        "The average of a weight is smooth where the live weight jumps."
    )
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 345" '
        f'role="img" aria-label="{label}">'
    )
    return "\n".join([head, f"<style>{''.join(style)}</style>", *drawn, "</svg>", ""])


if __name__ == "__main__":
    docs = Path(__file__).resolve().parent.parent / "docs"
    for name, colours in (("picture", LIGHT), ("picture-dark", DARK)):
        (docs / f"{name}.svg").write_text(picture(colours))
