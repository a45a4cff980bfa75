"""Other people's training loops, which call `EMA` at the right moments.

Nothing is decided here. Only the module of a framework imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

__all__ = ["existing", "refuse_another"]


def existing(
    path: str,
    checkpoint: str | os.PathLike[str],
    writer: str = "EMACallback",
    cure: str = "Load its weights and start a new training",
) -> str:
    """The path of the average of a checkpoint. Raises ValueError if nothing lies there."""
    if not os.path.exists(path):
        raise ValueError(
            f"{checkpoint} holds no average ({path}): it was saved without {writer}. {cure}, and "
            "the average starts from them."
        )
    return path


def refuse_another(callback: object, callbacks: Iterable[object]) -> None:
    """Raise ValueError if a trainer has another callback of this class."""
    if any(isinstance(other, type(callback)) and other is not callback for other in callbacks):
        raise ValueError(
            "a trainer takes one EMACallback: two would save to one place and swap in each other's "
            "evaluations. Pass several averages to one, EMACallback(decay=[a, b])."
        )
