"""`dist-ema plan`: options, and tables of half-life, window, width and what an average costs."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..text import size
from .console import JSON, WIDEST, Arguments, Verb, add_arguments, columns, number, show

if TYPE_CHECKING:
    from ..offline.plan import Cost, Pace

__all__ = ["PLAN"]

_WORDS = """
half-life  half of the average is younger
window     1 / (1 - decay): the mean age, plus one
width      standard deviation of the ages; by the length of the training it is sigma_rel
"""
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def _scaled(text: str) -> float:
    match = re.fullmatch(r"([0-9_.]+(?:e[+-]?\d+)?)([kmbgt]?)", text.lower())
    return float(match[1]) * FACTORS[match[2]] if match else math.nan


_number = number("a number above 0, like 500k or 7B", lambda value: 0 < value < math.inf, _scaled)
_whole = number(
    "a whole number of 1 or more",
    lambda value: value >= 1,
    lambda text: int(value) if (value := _scaled(text)).is_integer() else math.nan,
)
# One of these is given.
DECAYS: Arguments = {
    "--decay": {
        "type": number("between 0 and 1", lambda value: 0 < value < 1),
        "metavar": "D",
        "help": "per step, between 0 and 1",
    },
    "--half-life": {
        "type": _number,
        "metavar": "N",
        "help": "after so many --unit, half of the average is left",
    },
    "--window": {"type": _number, "metavar": "N", "help": "1 / (1 - decay), in --unit"},
    "--sigma-rel": {
        "type": number(
            f"above 0 and below {WIDEST:.4f}, the width of the plain mean",
            lambda value: 0 < value < WIDEST,
        ),
        "metavar": "S",
        "help": "width as a share of --length (Karras et al. 2023)",
    },
}
UNITS: Arguments = {
    "--unit": {
        "choices": ["steps", "samples", "tokens"],
        "default": "steps",
        "help": "default: steps",
    },
    "--length": {"type": _number, "metavar": "N", "help": "of the training, in --unit"},
    "--batch-size": {
        "type": _number,
        "metavar": "N",
        "help": "samples per step, of all ranks together",
    },
    "--tokens-per-sample": {"type": _number, "metavar": "N", "help": "the sequence length"},
    "--scale-batch": {
        "type": _number,
        "metavar": "K",
        "help": "also the same average at K times the batch",
    },
    "--every": {
        "type": _whole,
        "default": 1,
        "metavar": "K",
        "help": "update only every K steps: decay^K (default 1)",
    },
}
COST: Arguments = {
    "--params": {"type": _number, "metavar": "N", "help": "parameters of the model, like 7B"},
    "--world": {"type": _whole, "default": 1, "metavar": "N", "help": "ranks (default 1)"},
    "--wrapper": {
        "choices": ["none", "ddp", "fsdp", "hsdp"],
        "help": "default: ddp on several ranks",
    },
    "--averages": {
        "type": _whole,
        "default": 1,
        "metavar": "N",
        "help": "how many at once (default 1)",
    },
    "--dtype": {
        "choices": ["fp32", "bf16"],
        "default": "fp32",
        "help": "of the average (default fp32)",
    },
    "--weights": {
        "choices": ["fp32", "bf16"],
        "default": "fp32",
        "help": "of the live weights (default fp32)",
    },
    "--device": {
        "choices": ["gpu", "cpu"],
        "default": "gpu",
        "help": "where the average lies (default gpu)",
    },
    "--bandwidth": {
        "type": _number,
        "metavar": "GB/s",
        "help": "of that memory (2000 on a gpu, 50 on a cpu)",
    },
    "--link": {
        "type": _number,
        "metavar": "GB/s",
        "help": "between gpu and host, for --device cpu (25)",
    },
}


def _add_groups(verb: argparse.ArgumentParser) -> None:
    decay = verb.add_argument_group("the decay (one of the first four)")
    add_arguments(decay.add_mutually_exclusive_group(), DECAYS)
    add_arguments(decay, UNITS)
    add_arguments(verb.add_argument_group("the cost"), COST)


def _refuse_lacking(options: argparse.Namespace, has_decay: bool) -> None:
    """Name the options that others need."""
    if not has_decay and options.params is None:
        raise argparse.ArgumentTypeError(
            "nothing to plan: give --decay, --half-life, --window or --sigma-rel, or --params."
        )
    if not has_decay and (options.plot or options.scale_batch):
        raise argparse.ArgumentTypeError(
            "--plot and --scale-batch need --decay, --half-life, --window or --sigma-rel."
        )
    needed = {
        "--batch-size": options.unit != "steps" and options.batch_size is None,
        "--tokens-per-sample": options.unit == "tokens" and options.tokens_per_sample is None,
    }
    lacking = " and ".join(name for name, lacks in needed.items() if lacks)
    if has_decay and lacking:
        options.verb.error(f"--unit {options.unit} needs {lacking}")
    if options.sigma_rel is not None and options.length is None:
        options.verb.error("--sigma-rel needs --length")


def _plan(options: argparse.Namespace) -> int:
    from ..offline import plan as offline

    decays = {key: getattr(options, key) for key in ("decay", "half_life", "window", "sigma_rel")}
    has_decay = any(value is not None for value in decays.values())
    _refuse_lacking(options, has_decay)
    pace = other = cost = None
    if has_decay:
        pace = offline.pace(
            **decays,
            unit=options.unit,
            length=options.length,
            batch_size=options.batch_size,
            tokens=options.tokens_per_sample,
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
    parts = {"pace": pace, "scaled": other, "cost": cost}
    facts = {name: part.to_json() for name, part in parts.items() if part is not None}
    return show(options, facts, _text(options, pace, other, cost))


def _text(
    options: argparse.Namespace, pace: Pace | None, other: Pace | None, cost: Cost | None
) -> Iterator[str]:
    if pace:
        yield from _of_pace(pace, options.every)
    if pace and other:
        yield from _of_scaling(pace, other, options.scale_batch)
    if cost:
        yield from _of_cost(cost, options)


def _of_pace(pace: Pace, every: int) -> Iterator[str]:
    paces = {"half-life": pace.half_life, "window": pace.window, "width": pace.width}
    if pace.length is not None:
        paces["training"] = pace.length
    rows = [
        (word, *(_count(steps * count) for count in pace.units.values()))
        for word, steps in paces.items()
    ]
    yield from columns([("measure", *pace.units), *rows])
    yield ""
    yield from columns(list(_facts(pace, every)))
    yield _WORDS


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _digits(decay: float, least: int = 8) -> str:
    """The number of digits that tell 1 - decay: 0.9999999965 is not 1."""
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
        left = f"{pace.start_left:.3g} of the average, at the end of training"
        power = "none: wider than the plain mean of the whole training (0.2887)"
        if pace.gamma is not None:
            ema = f"EMA(model, decay=Power(sigma_rel={pace.sigma_rel:.4g}))"
            power = f"{ema}  (gamma {pace.gamma:.4g})"
        yield from (
            ("sigma_rel", f"{pace.sigma_rel:.4g}"),
            ("of the start is left", left),
            ("as Power", power),
        )


def _of_scaling(pace: Pace, other: Pace, factor: float) -> Iterator[str]:
    yield (
        f"at {factor:g} times the batch: decay^{factor:g}, so that the average remembers as many "
        "samples (Busbridge et al. 2023)"
    )
    rows = [("decay per step", _digits(pace.decay), _digits(other.decay))]
    for unit, count in pace.units.items():
        then = other.half_life * other.units[unit]
        rows.append((f"half-life in {unit}", _count(pace.half_life * count), _count(then)))
    yield from columns([("measure", "now", "then"), *rows])
    yield (
        "Scale the optimizer with it: learning rate x K for SGD, x sqrt(K) for Adam. A HalfLife in "
        "samples needs no change."
    )
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
        rows += [
            ("window in host memory", size(cost.memory.window), f"elements x {live} bytes"),
            ("copied to the host", size(cost.copied), "per update, behind the next forward"),
        ]
    rows += [
        ("moved by an update", size(cost.moved), f"elements x ({live} read + 2 x {bytes_each})"),
        (
            "time of an update",
            f"{cost.seconds * 1e3:,.4g} ms",
            f"at {rates}; the limit, not a promise",
        ),
        ("saved artifact", size(cost.saved), "by all ranks together"),
        ("a full copy instead", size(cost.copies), "on every rank, as deepcopy averages do"),
    ]
    yield from columns([("per rank", "value", "because"), *rows])


def _rates(options: argparse.Namespace, linked: bool) -> str:
    from ..offline.plan import BANDWIDTH

    def rate(given: float | None, assumed: float) -> str:
        return f"{given:g} GB/s" if given else f"{assumed:g} GB/s (assumed)"

    memory = rate(options.bandwidth, BANDWIDTH[options.device])
    return f"{memory}, link {rate(options.link, BANDWIDTH['link'])}" if linked else memory


PLAN = Verb(
    "plan",
    """\
convert decay, half-life, window and sigma_rel; scale with the batch; count memory and time

Plan an average before training: what a decay means in steps, samples and tokens, what it becomes at
another batch size, and what the average costs on each rank. Numbers may end in k, M, B or T.

examples:
  dist-ema plan --decay 0.9999
  dist-ema plan --half-life 500k --unit samples --batch-size 256 --scale-batch 2
  dist-ema plan --sigma-rel 0.1 --length 100k --plot decay.png
  dist-ema plan --params 7B --world 64 --wrapper fsdp --weights bf16 --bandwidth 3350
""",
    {
        "--plot": {"metavar": "PNG", "help": "impulse response and decay (needs matplotlib)"},
        **JSON,
    },
    _plan,
    add_groups=_add_groups,
)
