"""`Checked`: a model whose bytes are compared with their check sums as they are read. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint import crc32, manifest, safetensors
from .sources import WINDOW, Safetensors, Source
from .sums import Window

__all__ = ["Checked"]


class Checked:
    """Windows of a model, summed as they go by: damaged files must not become a sound copy.

    *Cost*: the windows; `finish` reads what was not asked for. Without sums to compare, nothing.
    """

    def __init__(self, model: Source) -> None:
        self._model, self.entries = model, model.entries
        self._summed: Safetensors | None = None
        if isinstance(model, Safetensors):
            model.refuse_changed()
            self._summed = model if model.listed is not None else None
        files = self._summed.files if self._summed else {}
        self._sums = {name: crc32.RangeSum(file.size) for name, file in files.items()}
        self._seen: dict[tuple[str, str], int] = {}  # (file, weight) -> bytes that were summed

    def read(self, name: str, begin: int, end: int) -> Window:
        """Bytes [begin, end) of a weight. Windows in order count once, however often read."""
        raw = self._model.read(name, begin, end)
        if self._summed is not None:
            file, at = self._summed.place(name)
            if begin == self._seen.get((file, name), 0):
                self._seen[file, name] = end
                return Window(raw, self._sums[file].add(at + begin, raw.data))
        return Window(raw)

    def finish(self) -> None:
        """Raise ValueError for a file that is not what ema.json says, and close the model. Once."""
        if self._summed is None:
            return
        with self._summed as model:
            for name, file in model.files.items():
                for begin, end in self._unseen(name, file):
                    self._sums[name].add(begin, model.raw(name, begin, end).data)
                found = crc32.check_sum(file.size, [self._sums[name].contribution])
                recorded = (model.listed or {}).get(name, {}).get("crc32")
                if recorded != found:
                    where = model.path / name if model.path.is_dir() else model.path
                    raise ValueError(
                        f"{where} is damaged: its CRC-32 is {found}, {manifest.META} says "
                        f"{recorded}."
                    )

    def _unseen(self, name: str, file: safetensors.SafetensorsFile) -> Iterator[tuple[int, int]]:
        """The byte ranges of a file that were not read, in windows."""
        head = len(file.head)
        ranges = [(0, head)]
        ranges += [
            (head + entry.begin + self._seen.get((name, weight), 0), head + entry.end)
            for weight, entry in file.entries.items()
        ]
        for begin, end in ranges:
            yield from ((at, min(at + WINDOW, end)) for at in range(begin, end, WINDOW))
