"""Other people's training loops, each of which decides nothing here: they call `EMA` at the right moments.

Only the module of a framework imports it.
"""

from __future__ import annotations

__all__ = ()
