"""Sentences on ranks that disagree or are silent: `Exchange`, which ranks and calls, the cause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

__all__ = [
    "Exchange",
    "RanksDifferError",
    "argument_text",
    "call_text",
    "clash",
    "digest",
    "error_text",
    "failed",
    "names",
    "silence",
    "two_positions",
    "usual_cause",
]


class Exchange(NamedTuple):
    """An exchange: its number, the verb, and how many exchanges of that verb came before it."""

    number: int
    verb: str
    step: int
    arguments: int = 0  # a digest, in the first exchange of a verb

    def key(self, name: str) -> str:
        return f"{self.number}/{name}"

    def code(self, ranks: int) -> int:
        """A hash of the call, of as many bits as the counter has room for in the sum of `ranks`."""
        return digest([self.verb, self.step, self.arguments]) >> (4 + (ranks - 1).bit_length())

    def __str__(self) -> str:
        return call_text(self.verb)

    @property
    def position(self) -> str:
        return f"step {self.step} of {self}" if self.step else str(self)


class RanksDifferError(ValueError):
    """Ranks passed different arguments to one call."""


def digest(value: Any) -> int:
    """A hash of numbers, texts, bytes and lists of them, to compare what is too long to send."""
    return crc32(repr(value).encode())


def argument_text(value: Any) -> str:
    """The argument of a call as a text that two ranks can compare: no address, keys sorted."""
    if isinstance(value, dict):
        entries = sorted(f"{key!r}: {argument_text(entry)}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def call_text(verb: str) -> str:
    return f"{verb}(...)" if verb in ("EMA", "recalibrate") else f"ema.{verb}()"


def error_text(error: BaseException) -> str:
    # NOTE: the block is closed before an interrupt at its very end could be raised in it.
    name = "KeyboardInterrupt" if isinstance(error, GeneratorExit) else type(error).__name__
    return f"{name}: {error}"


def failed(exchange: Exchange, rank: int, text: str) -> str:
    """rank: a global one."""
    return f"{exchange} failed on rank {rank}: {text}"


def names(ranks: Sequence[int]) -> str:
    """ranks: global ones."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def two_positions(*positions: tuple[Exchange, int]) -> str:
    """positions: (exchange, global rank)."""
    (one, low), (two, high) = sorted(positions, key=lambda position: position[1])
    return (
        f"rank {low} is in {one.position} and rank {high} in {two.position}: every rank must call "
        "the collective verbs, in the same order."
    )


def silence(exchange: Exchange, missing: Sequence[int], size: int, timeout: float) -> str:
    """The error that names the `missing` global ranks, of `size` in all."""
    who = names(missing)
    if exchange.step:
        return f"{exchange}: {who} gave no sign of life for {timeout:g} s. Dead, or hung?"
    hint = usual_cause(exchange, len(missing), size)
    return f"{exchange} is collective, and {who} did not enter it within {timeout:g} s{hint}."


def usual_cause(exchange: Exchange, missing: int, size: int) -> str:
    """A hint where one rank alone has entered a verb."""
    if exchange.step or missing < size - 1:
        return ""
    return (
        ". Is it called under a condition like `if rank == 0:`? Call it on every rank, and leave "
        "the rest inside the condition"
    )


def clash(*calls: tuple[int, Exchange, dict[str, str]]) -> Exception:
    """The error for two (global rank, exchange, arguments) at once, the lower rank first."""
    (low, one, first), (high, two, second) = calls
    if one._replace(arguments=0) != two._replace(arguments=0):
        return RuntimeError(two_positions((one, low), (two, high)))
    differences = [
        f"{name} is {first.get(name, 'not given')[:100]} on rank {low} and "
        f"{second.get(name, 'not given')[:100]} on rank {high}"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]
    return RanksDifferError(
        f"{one}: {'; '.join(differences[:5])}. Every rank must pass the same arguments and take "
        "the same steps."
    )
