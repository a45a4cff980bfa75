"""Other people's training loops, which call `EMA` at the right moments.

Nothing is decided here. Only the module of a framework imports it.
"""

from __future__ import annotations

import os

__all__ = ["existing"]


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
