"""Drop-ins for the averages that scripts have already, over `EMA`.

Each module stands in for one package or snippet: same names, same arguments, same keys in
checkpoints. The import line is all that changes in a script.
"""

from __future__ import annotations

__all__ = ()
