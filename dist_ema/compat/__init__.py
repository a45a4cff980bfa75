"""The averages that people already have in their scripts, over `EMA`: same names, same arguments, same keys in checkpoints.

Each module is one package or snippet that it stands in for; the import line is all that changes in a script.
"""

from __future__ import annotations

__all__ = ()
