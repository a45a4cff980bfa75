"""Weight averaging for distributed PyTorch: sharded, resumable, saved as safetensors.

Names are imported when they are first used, so `import dist_ema` and the command line stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.load_file import load_file
    from .ema import EMA
    from .schedules import (
        Constant,
        Cosine,
        Debiased,
        HalfLife,
        Power,
        Ramp,
        Ratio,
        Schedule,
        Uniform,
        Warmup,
        Window,
    )
    from .service.follow import follow

from . import _version

__version__ = _version.VERSION

__all__ = [
    "EMA",
    "Constant",
    "Cosine",
    "Debiased",
    "HalfLife",
    "Power",
    "Ramp",
    "Ratio",
    "Schedule",
    "Uniform",
    "Warmup",
    "Window",
    "follow",
    "load_file",
]

_ROOMS = {
    "EMA": "ema",
    "follow": "service.follow",
    "load_file": "checkpoint.load_file",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dist_ema' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dist_ema.{_ROOMS.get(name, 'schedules')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
