"""`Count`: the number in a buffer, read from the device only after another writer."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Count"]


class Count:
    """The value of a buffer, read from its device only after another writer changed it."""

    def __init__(self) -> None:
        self._value, self._buffer, self._version = 0.0, torch.tensor(0), -1

    def of(self, buffer: Tensor) -> float:
        """The number in the buffer."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._value, self._buffer, self._version = buffer.item(), buffer, buffer._version
        return self._value

    def up(self, buffer: Tensor) -> float:
        """Add one. Returns what it was."""
        before = self.of(buffer)
        buffer.add_(1)
        self._value, self._version = before + 1, buffer._version
        return before

    def __reduce__(self) -> tuple[type[Count], tuple[()]]:
        """The version of a copied tensor says nothing of what was known of the first."""
        return Count, ()
