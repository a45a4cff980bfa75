"""`Blend`: a weighted sum of models like one another, the rest taken; totals a window at a time.

    blend = Blend([(model, 0.25), (other, 0.75)], rest=other, summed=frozenset(names))
    write(out, blend, ...)

Products are summed in float64 and rounded once. One window of one model is in memory at a time, and
one file open: a thousand checkpoints need no more of either than two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _version
from ..checkpoint import atomic, manifest, safetensors
from ..dtypes import FLOATS, TO_TORCH, Floats, fitted, float_dtype, widen
from ..text import some
from . import model_card, sums, writer
from .sources import Source, is_equal, windows

__all__ = ["WINDOW", "Blend", "alike", "locate", "numeric", "write"]

WINDOW = 1 << 19  # elements: 2 MB as read, 4 of the sum, 4 of the product
AHEAD = 2  # windows that are read before they are asked for
MOST_OPEN = 64  # models whose files stay open


@dataclass(frozen=True)
class Blend:
    """The sum of factor times model for some weights, and the other weights of one model."""

    terms: Sequence[tuple[Source, float]]
    rest: Source  # gives names, shapes, aliases, and whatever is not summed
    summed: frozenset[str]
    # of floating weights; the others stay as in rest
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _checked(self) -> dict[int, sums.Checked]:
        """`Checked` of every model that is read, by the model's id."""
        return {
            id(model): sums.Checked(model)
            for model in (self.rest, *(model for model, weight in self.terms if weight))
        }

    @cached_property
    def _scratch(self) -> NDArray[np.float64]:
        """The sum and the product of a window."""
        return np.empty((2, 2 * WINDOW))

    @property
    def entries(self) -> dict[str, safetensors.Entry]:
        return {
            name: safetensors.Entry(self._dtype(name), entry.shape)
            for name, entry in self.rest.entries.items()
        }

    def _dtype(self, name: str) -> str:
        return float_dtype(self.rest.entries[name].dtype, self.dtypes.get(name))

    def content(self, name: str) -> Iterator[sums.Window]:
        """The bytes of a weight, in windows. *Cost*: 32 MB, with those in flight."""
        was, dtype = self.rest.entries[name].dtype, self._dtype(name)
        if name not in self.summed:
            for window in windows(self._checked[id(self.rest)], name):
                yield window.cast(name, was, dtype)
            return
        count = self.rest.entries[name].nbytes // safetensors.ITEMSIZE[was]
        factors = [(model, weight) for model, weight in self.terms if weight]  # 0 * NaN is NaN
        reads = (
            partial(self._values, model, locate(model, name, self.rest), begin, count)
            for begin in range(0, count, WINDOW)
            for model, _ in factors
        )
        with ThreadPoolExecutor(1) as reader:  # it ends with the weight, whatever is raised
            values = _read_ahead(reader, reads)
            for _ in range(0, count, WINDOW):
                total: Any = None
                for (_, weight), term in zip(factors, values, strict=False):
                    # Fresh pages for each product would cost more than the sum.
                    scratch = self._scratch[int(total is not None), : len(term)]
                    # A multiplication that casts takes twice as long as a cast and one in place.
                    np.copyto(scratch, term)
                    np.multiply(scratch, weight, out=scratch)
                    total = scratch if total is None else np.add(total, scratch, out=total)
                # What is in flight must not lie in the scratch.
                total = total.copy() if dtype == "F64" else total
                yield sums.Window(fitted(name, total, _real(dtype)))

    def _values(self, model: Source, name: str, begin: int, count: int) -> Floats:
        """Of a window that begins at an element. A complex number is two values."""
        dtype, end = model.entries[name].dtype, min(begin + WINDOW, count)
        size = safetensors.ITEMSIZE[dtype]
        try:
            window = self._checked[id(model)].read(name, begin * size, end * size)
        finally:
            if len(self.terms) > MOST_OPEN:
                model.close()  # it opens again by itself
        return widen(window.data, _real(dtype))

    def check(self) -> None:
        """Raise ValueError for a model that is not what its ema.json says. Once."""
        for each in self._checked.values():
            each.finish()


def _read_ahead(
    reader: ThreadPoolExecutor, reads: Iterable[Callable[[], Floats]]
) -> Iterator[Floats]:
    """The results of `reads`, in order. The thread makes the next ones meanwhile."""
    coming = deque[Future[Floats]]()
    for read in reads:
        coming.append(reader.submit(read))
        if len(coming) > AHEAD:
            yield coming.popleft().result()
    for each in coming:
        yield each.result()


def _real(dtype: str) -> str:
    """Sums of complex numbers are sums of their parts."""
    return "F32" if dtype == "C64" else dtype


def numeric(dtype: str) -> bool:
    """Whether weights of that dtype can be averaged."""
    return _real(dtype) in FLOATS


def _sort(dtype: str) -> str:
    return "complex" if dtype == "C64" else "floating" if dtype in FLOATS else "whole"


def locate(model: Source, name: str, like: Source) -> str:
    """The name that `model` has for a weight of `like`, which may tie it to others.

    Raises:
        KeyError: It has none.
    """
    for each in (name, *(alias for alias, of in like.aliases.items() if of == name)):
        if each in model.entries or each in model.aliases:
            return each if each in model.entries else model.aliases[each]
    raise KeyError(name)


def alike(models: Sequence[Source], like: Source, names: Sequence[str] | None = None) -> None:
    """Raise ValueError with every difference in names, shapes and kinds of number.

    names: Those to be compared, by default all.
    """
    found = [
        difference
        for model in models
        if model is not like
        for difference in _differences(model, like, names)
    ]
    if found:
        raise ValueError(
            f"the models do not hold the same weights as {like.path}, {len(found)} differences: "
            f"{some(found, 20, '; ')}."
        )


def _differences(model: Source, like: Source, names: Sequence[str] | None) -> Iterator[str]:
    wanted = sorted(like.entries) if names is None else names
    for name in wanted:
        try:
            here, there = model.entries[locate(model, name, like)], like.entries[name]
        except KeyError:
            yield f"{model.path} lacks {name}"
            continue
        if here.shape != there.shape:
            shapes = list(here.shape), list(there.shape)
            yield f"{name} is {shapes[0]} in {model.path}, {shapes[1]} in {like.path}"
        elif _sort(here.dtype) != _sort(there.dtype):
            yield f"{name} is {here.dtype} in {model.path}, {there.dtype} in {like.path}"
    if names is None:
        known = {*like.entries, *like.aliases}
        for name in sorted(model.entries):
            others = {alias for alias, of in model.aliases.items() if of == name}
            if not known & {name, *others}:
                yield f"{model.path} has {name} besides"
            elif name in like.aliases and not is_equal(
                model, name, model, locate(model, like.aliases[name], like)
            ):
                yield (
                    f"{name} is tied to {like.aliases[name]} in {like.path}, another weight in "
                    f"{model.path}"
                )


def write(
    out: Path,
    blend: Blend,
    facts: manifest.Manifest,
    *,
    max_shard_size: int | str | None = None,
    force: bool = False,
    tick: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the blend as a model to ship. Atomic.

    A folder gets an ema.json, and what lies beside the model of `rest`.

    Args:
        out: A folder, or a file that ends in .safetensors.
        blend: What is written.
        facts: Clock, schedules and extra for ema.json.
        max_shard_size: Of each file in a folder, by default 5 GB.
        force: Replace a model at `out`.
        tick: Receives how many bytes were written.

    Note:
        *Cost*: 32 MB.
    """
    entries = blend.entries
    out = atomic.real(out)  # through a link
    files = writer.lay_out(out, entries, blend.rest.aliases, max_shard_size)
    origin = blend.rest.manifest or manifest.Manifest()
    full = replace(
        facts,
        kind="export",
        weights=origin.weights,
        averaged=sorted(blend.summed),
        aliases=manifest.group_aliases(dict(sorted(blend.rest.aliases.items()))),
        dtypes={name: TO_TORCH[entry.dtype] for name, entry in entries.items()},
        versions={"dist_ema": _version.VERSION},
    )
    others = model_card.beside(blend.rest.path, out, full, entries)
    writer.write(
        out, files, blend.content, full, beside=others, force=force, tick=tick, check=blend.check
    )
