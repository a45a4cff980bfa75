"""What is in a file or folder: no torch, and no more memory than the headers take."""

from __future__ import annotations

from pathlib import Path

from . import report
from .sources import open_model

__all__ = ["inspect"]


def inspect(path: str | Path) -> report.ModelReport:
    """What is in a saved average, an export, a Hugging Face folder, a .safetensors file, or whatever else `source` opens.

    Raises FileNotFoundError if nothing is there, ValueError if it is no model or its weights cannot be told.
    """
    if report.native(path):
        return report.report_on(path)
    with open_model(path) as model:
        return report.of_source(model)
