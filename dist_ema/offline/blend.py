"""`Blend`: the sum of factor times model over models in files, a window at a time. No torch.

    blend = Blend([(model, 0.25), (other, 0.75)], rest=other, summed=frozenset(names))
    blend.write(out, facts)

Products are summed in float64 and rounded once; where every factor is the same, the sum is
multiplied. Memory and open files do not grow with the checkpoints: one of them is read at a time,
and of more than 64 only one file is open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import crc32, manifest, safetensors
from ..dtypes import FLOATS, TO_TORCH, Bytes, fitted, float_dtype, widen
from ..text import Tick
from . import same_weights, sources, sums, writer

__all__ = ["WINDOW", "Blend", "numeric"]

WINDOW = 1 << 19  # elements that a thread sums at a time: 2 MB of float32
STEP = 1 << 17  # values that are read, multiplied and added while a cache holds them
THREADS = 2  # windows that are summed at a time
MOST_OPEN = 64  # models whose files stay open


@dataclass(frozen=True)
class Blend:
    """The sum of factor times model for some weights, and the other weights of one model."""

    terms: Sequence[tuple[sources.Source, float]]
    rest: sources.Source  # gives names, shapes, aliases, and whatever is not summed
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
        """For each window that is summed the values as they are read, the sum, and a product.

        They are used again, because fresh pages take as long as a product.
        """
        return np.empty((THREADS, 3, STEP))

    @cached_property
    def _spare(self) -> list[Bytes]:
        """Memory of windows that were written."""
        return []

    @property
    def entries(self) -> dict[str, safetensors.Entry]:
        return {
            name: safetensors.Entry(self._dtype(name), entry.shape)
            for name, entry in self.rest.entries.items()
        }

    def _dtype(self, name: str) -> str:
        return float_dtype(self.rest.entries[name].dtype, self.dtypes.get(name))

    def content(self, names: Sequence[str]) -> Iterator[sums.FileWindow]:
        """The bytes of weights in order, in windows. *Cost*: 32 MB, with those in flight."""
        # Threads must not share models whose files are closed after every read.
        threads = 1 if len(self.terms) > MOST_OPEN else THREADS
        with ThreadPoolExecutor(threads) as pool:  # it ends with the names, whatever is raised
            # Windows come out in the order of the file, whichever thread is done first.
            in_flight = deque[Future[sums.FileWindow]]()
            for call in self._calls(names):
                in_flight.append(pool.submit(call))
                if len(in_flight) == THREADS:  # the next one takes the scratch of the oldest
                    yield in_flight.popleft().result()
            for window in in_flight:
                yield window.result()

    def _calls(self, names: Sequence[str]) -> Iterator[Callable[[], sums.FileWindow]]:
        """A call for each window of the weights, which any thread may make."""
        scratches = cycle(self._scratch)
        for name in names:
            for begin, end in sources.ranges(0, prod(self.rest.entries[name].shape), WINDOW):
                if name in self.summed:
                    terms = [
                        (self._reading(model, name, begin, end), factor)
                        for model, factor in self.terms
                        if factor  # 0 * NaN is NaN
                    ]
                    size = safetensors.ITEMSIZE[self._dtype(name)]
                    memory = self._spare.pop() if self._spare else np.empty(0, np.uint8)
                    if len(memory) < (end - begin) * size:
                        memory = np.empty(WINDOW * size, np.uint8)
                    yield partial(self._sum, name, terms, end - begin, next(scratches), memory)
                else:
                    yield partial(self._copy, name, self._reading(self.rest, name, begin, end))

    def _reading(self, model: sources.Source, name: str, begin: int, end: int) -> sums.Reading:
        its_name = same_weights.locate(model, name, self.rest)
        size = safetensors.ITEMSIZE[model.entries[its_name].dtype]
        return self._checked[id(model)].reading(its_name, begin * size, end * size)

    def _copy(self, name: str, reading: sums.Reading) -> sums.FileWindow:
        return reading.window().cast(name, reading.dtype, self._dtype(name))

    def _sum(
        self,
        name: str,
        terms: Sequence[tuple[sums.Reading, float]],
        count: int,
        scratch: NDArray[np.float64],
        memory: Bytes,
    ) -> sums.FileWindow:
        """A window of `count` elements, in `memory`."""
        raw, *scratches = scratch
        dtype = self._dtype(name)
        size = safetensors.ITEMSIZE[dtype]
        data, step = memory[: count * size], STEP // 2 if dtype == "C64" else STEP
        # A sum of float64 could be infinite where that of products is not.
        is_mean = len({factor for _, factor in terms}) == 1 and all(
            reading.dtype != "F64" for reading, _ in terms
        )
        for begin in range(0, count, step):
            total: Any = None
            n = min(step, count - begin)
            for reading, factor in terms:
                read = reading.read(raw.view(np.uint8)[: n * safetensors.ITEMSIZE[reading.dtype]])
                # Every file stays open otherwise, and a process may hold 1,024.
                if len(self.terms) > MOST_OPEN:
                    reading.model.close()  # it opens again by itself
                values = widen(read, _real(reading.dtype))
                product = scratches[total is not None][: len(values)]
                # A multiplication that casts takes twice as long as a cast and one in place.
                np.copyto(product, values)
                if not is_mean:
                    np.multiply(product, factor, out=product)
                # The first product is the sum: fresh zeros would be one pass more.
                total = product if total is None else np.add(total, product, out=total)
            if is_mean:  # one multiplication for all models
                np.multiply(total, terms[0][1], out=total)
            fitted(name, total, _real(dtype), data[begin * size :][: n * size])
        return sums.FileWindow(data, crc32.of_bytes(data.data), partial(self._spare.append, memory))

    def check(self) -> None:
        """Raise ValueError for a model that is not what its ema.json says. Once."""
        for checked in self._checked.values():
            checked.finish()

    def write(
        self,
        out: Path,
        facts: manifest.Manifest,
        *,
        max_shard_size: int | str | None = None,
        force: bool = False,
        tick: Tick = lambda count: None,
    ) -> None:
        """Write it as a model to ship. Atomic. In a folder, with what lies beside `rest`.

        Args:
            out: A folder, or a file that ends in .safetensors.
            facts: Clock, schedules and extra for ema.json.
            max_shard_size: The size limit of each file in a folder, by default 5 GB.
            force: Replace a model at `out`.
            tick: Receives how many bytes were written.

        Note:
            *Cost*: 32 MB.
        """
        entries, origin = self.entries, self.rest.manifest or manifest.Manifest()
        writer.write_model(
            out,
            entries,
            dict(sorted(self.rest.aliases.items())),
            self.content,
            replace(
                facts,
                weights=origin.weights,
                averaged=sorted(self.summed),
                dtypes={name: TO_TORCH[entry.dtype] for name, entry in entries.items()},
            ),
            beside=self.rest.path,
            max_shard_size=max_shard_size,
            force=force,
            tick=tick,
            check=self.check,
        )


def _real(dtype: str) -> str:
    """Sums of complex numbers are sums of their parts."""
    return "F32" if dtype == "C64" else dtype


def numeric(dtype: str) -> bool:
    """Whether weights of that dtype can be averaged."""
    return _real(dtype) in FLOATS
