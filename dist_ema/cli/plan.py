"""`dist-ema plan`: choose the decay before training, and know what it costs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..text import size
from .console import FINE, USAGE, add_verb, columns, out, out_json, say

if TYPE_CHECKING:
    from ..offline.plan import Cost, Pace

__all__ = ["add"]

FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "plan",
        "convert decay, half-life, window and sigma_rel; scale with the batch; count memory and time",
        "Plan an average before training: what a decay means in steps, samples and tokens, what it becomes at\n"
        "another batch size, and what the average costs on each rank. Numbers may end in k, M, B or T.",
        "  dist-ema plan --decay 0.9999\n"
        "  dist-ema plan --half-life 500k --unit samples --batch-size 256 --scale-batch 2\n"
        "  dist-ema plan --sigma-rel 0.1 --length 100k --plot decay.png\n"
        "  dist-ema plan --params 7B --world 64 --wrapper fsdp --weights bf16 --bandwidth 3350",
        _plan,
    )
    _add_decay(verb.add_argument_group("the decay (one of the first four)"))
    _add_cost(verb.add_argument_group("the cost"))
    verb.add_argument("--plot", metavar="PNG", help="impulse response and decay (needs matplotlib)")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_decay(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--decay", type=_decay, metavar="D", help="per step, between 0 and 1")
    which.add_argument(
        "--half-life",
        type=_number,
        metavar="N",
        help="after so many --unit, half of the average is left",
    )
    which.add_argument("--window", type=_number, metavar="N", help="1 / (1 - decay), in --unit")
    which.add_argument(
        "--sigma-rel",
        type=_share,
        metavar="S",
        help="width as a share of --length (Karras et al. 2023)",
    )
    group.add_argument(
        "--unit", choices=["steps", "samples", "tokens"], default="steps", help="default: steps"
    )
    group.add_argument("--length", type=_number, metavar="N", help="of the training, in --unit")
    group.add_argument(
        "--batch-size", type=_number, metavar="N", help="samples per step, of all ranks together"
    )
    group.add_argument("--tokens-per-sample", type=_number, metavar="N", help="the sequence length")
    group.add_argument(
        "--scale-batch",
        type=_number,
        metavar="K",
        help="also the same average at K times the batch",
    )
    group.add_argument(
        "--every",
        type=_whole,
        default=1,
        metavar="K",
        help="update only every K steps: decay^K (default 1)",
    )


def _add_cost(group: Any) -> None:
    group.add_argument(
        "--params", type=_number, metavar="N", help="parameters of the model, like 7B"
    )
    group.add_argument("--world", type=_whole, default=1, metavar="N", help="ranks (default 1)")
    group.add_argument(
        "--wrapper", choices=["none", "ddp", "fsdp", "hsdp"], help="default: ddp on several ranks"
    )
    group.add_argument(
        "--averages", type=_whole, default=1, metavar="N", help="how many at once (default 1)"
    )
    group.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the average (default fp32)"
    )
    group.add_argument(
        "--weights",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the live weights (default fp32)",
    )
    group.add_argument(
        "--device",
        choices=["gpu", "cpu"],
        default="gpu",
        help="where the average lies (default gpu)",
    )
    group.add_argument(
        "--bandwidth",
        type=_number,
        metavar="GB/s",
        help="of that memory (2000 on a gpu, 50 on a cpu)",
    )
    group.add_argument(
        "--link", type=_number, metavar="GB/s", help="between gpu and host, for --device cpu (25)"
    )


def _number(text: str) -> float:
    match = re.fullmatch(r"([0-9_.]+(?:e[+-]?\d+)?)([kmbgt]?)", text.lower())
    try:
        value = float(match[1]) * FACTORS[match[2]] if match else math.nan
    except (OverflowError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, like 500k or 7B, got {text!r}")
    return value


def _whole(text: str) -> int:
    value = _number(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(value)


def _decay(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _decay(text)
    if value >= math.sqrt(1 / 12):
        raise argparse.ArgumentTypeError(
            f"must be below 0.2887, the width of the plain mean, got {text!r}"
        )
    return value


def _plan(options: argparse.Namespace) -> int:
    from ..offline import plan as offline

    given = {key: getattr(options, key) for key in ("decay", "half_life", "window", "sigma_rel")}
    asked = any(value is not None for value in given.values())
    if not asked and options.params is None:
        return say(
            "nothing to plan: give --decay, --half-life, --window or --sigma-rel, or --params.",
            USAGE,
        )
    if not asked and (options.plot or options.scale_batch):
        return say(
            "--plot and --scale-batch need --decay, --half-life, --window or --sigma-rel.", USAGE
        )
    pace = other = cost = None
    if asked:
        units = {"unit": options.unit, "length": options.length}
        pace = offline.pace(
            **given, **units, batch_size=options.batch_size, tokens=options.tokens_per_sample
        )
        other = offline.scaled(pace, options.scale_batch) if options.scale_batch else None
    if options.params is not None:
        wrapper = options.wrapper or ("ddp" if options.world > 1 else "none")
        keys = ("world", "dtype", "weights", "device", "averages", "bandwidth", "link")
        cost = offline.cost(
            options.params, wrapper=wrapper, **{key: getattr(options, key) for key in keys}
        )
    if options.plot:
        offline.plot(options.plot, pace, other)  # type: ignore[arg-type]
    if options.json:
        parts = {"pace": pace, "scaled": other, "cost": cost}
        out_json({name: part.plain() for name, part in parts.items() if part is not None})
        return FINE
    out(_of_pace(pace, options.every) if pace else ())
    out(_of_scaling(pace, other, options.scale_batch) if pace and other else ())
    out(_of_cost(cost, options) if cost else ())
    return FINE


def _of_pace(pace: Pace, every: int) -> Iterator[str]:
    yield from columns([("", *pace.units), *_paces(pace)])
    yield ""
    yield from columns(list(_facts(pace, every)))
    yield ""
    yield "half-life  half of the average is younger"
    yield "window     1 / (1 - decay): the mean age, plus one"
    yield "width      standard deviation of the ages; by the length of the training it is sigma_rel"
    yield ""


def _paces(pace: Pace) -> Iterator[tuple[str, ...]]:
    for word, steps in (
        ("half-life", pace.half_life),
        ("window", pace.window),
        ("width", pace.width),
    ):
        yield word, *(_count(steps * count) for count in pace.units.values())
    if pace.length is not None:
        yield "training", *(_count(pace.length * count) for count in pace.units.values())


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _digits(decay: float, least: int = 8) -> str:
    """As many as it takes to tell 1 - decay: 0.9999999965 is not 1."""
    return f"{decay:.{max(least, 4 - math.floor(math.log10(1 - decay)))}g}"


def _facts(pace: Pace, every: int) -> Iterator[tuple[str, str]]:
    yield "decay per step", _digits(pace.decay, 10)
    if every > 1:
        yield (
            f"decay per {every} steps",
            f"{pace.decay**every:.10g}  (attach(every={every}) takes it by itself)",
        )
    yield "as Constant", f"EMA(model, decay={_digits(pace.decay)})"
    unit = [unit for unit in pace.units if unit != "steps"]
    if unit:
        count = pace.units[unit[-1]]
        ema = f"EMA(model, decay=HalfLife({pace.half_life * count:.6g}))"
        yield "as HalfLife", f"{ema}, attach(optimizer, elapsed={count:g})"
    if pace.length is not None:
        yield "sigma_rel", f"{pace.sigma_rel:.4g}"
        yield (
            "of the start is left",
            f"{pace.start_left:.3g} of the average, at the end of training",
        )
        if pace.gamma is not None:
            yield (
                "as Power",
                f"EMA(model, decay=Power(sigma_rel={pace.sigma_rel:.4g}))  (gamma {pace.gamma:.4g})",
            )
        else:
            yield "as Power", "none: wider than the plain mean of the whole training (0.2887)"


def _of_scaling(pace: Pace, other: Pace, factor: float) -> Iterator[str]:
    yield f"at {factor:g} times the batch: decay^{factor:g}, so that as many samples are remembered (Busbridge et al. 2023)"
    rows = [("decay per step", _digits(pace.decay), _digits(other.decay))]
    for unit, count in pace.units.items():
        then = other.half_life * other.units[unit]
        rows.append((f"half-life in {unit}", _count(pace.half_life * count), _count(then)))
    yield from columns([("", "now", "then"), *rows])
    yield "It goes with the optimizer's own: learning rate x K for SGD, x sqrt(K) for Adam. HalfLife in samples just stays."
    yield ""


def _of_cost(cost: Cost, options: argparse.Namespace) -> Iterator[str]:
    world, averages = options.world, options.averages
    share = (
        f"{_count(options.params)} / {world}"
        if cost.elements < options.params
        else _count(options.params)
    )
    bytes_each = f"{4 if options.dtype == 'fp32' else 2} bytes" + (
        f" x {averages} averages" if averages > 1 else ""
    )
    live = 4 if options.weights == "fp32" else 2
    rates = _rates(options, bool(cost.copied))
    rows = [
        ("elements on a rank", f"{cost.elements:,}", share),
        (
            f"average, in {options.device} memory",
            size(cost.memory.shadows),
            f"elements x {bytes_each}",
        ),
        ("scratch", size(cost.memory.scratch), "fixed"),
    ]
    if cost.copied:
        rows.append(("window in host memory", size(cost.memory.window), f"elements x {live} bytes"))
        rows.append(
            ("copied to the host", size(cost.copied), "per update, behind the next forward")
        )
    rows += [
        ("moved by an update", size(cost.moved), f"elements x ({live} read + 2 x {bytes_each})"),
        (
            "time of an update",
            f"{cost.seconds * 1e3:,.4g} ms",
            f"at {rates}; the limit, not a promise",
        ),
        ("saved artifact", size(cost.saved), "by all ranks together, each its own part"),
        ("a full copy instead", size(cost.copies), "on every rank, as deepcopy averages do"),
    ]
    yield from columns([("per rank", "", "because"), *rows])


def _rates(options: argparse.Namespace, linked: bool) -> str:
    from ..offline.plan import BANDWIDTH

    def said(value: float | None, known: float) -> str:
        return f"{value:g} GB/s" if value else f"{known:g} GB/s (assumed)"

    text = said(options.bandwidth, BANDWIDTH[options.device])
    return f"{text}, link {said(options.link, BANDWIDTH['link'])}" if linked else text
