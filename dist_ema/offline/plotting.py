"""Axes that become a PNG, where matplotlib is installed. No torch."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import disk

__all__ = ["panels", "refuse"]


def refuse(path: str | Path) -> None:
    """Raise before any long work.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No PNG can be written there.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a plot is a PNG, got {path}: name a file that ends in .png.")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'dist-ema[plot]'.")


@contextmanager
def panels(path: str | Path, count: int) -> Iterator[list[Any]]:
    """`count` axes side by side to draw into, which become a PNG."""
    refuse(path)
    # NOTE: not by pyplot, whose backend and open figures belong to the user's program.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    yield list(figure.subplots(1, count, squeeze=False)[0])
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    with disk.disk_errors(Path(path), png.tell()):
        Path(path).write_bytes(png.getvalue())
