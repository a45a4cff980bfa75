"""Drop-ins for the averages that scripts have already, over `EMA`.

Each module stands in for one package or snippet: same names, same arguments, same keys in
checkpoints. The import line is all that changes in a script. Where a library builds the average
itself, a script has no such line: `install` puts the drop-in where the library looks it up.
"""

from __future__ import annotations

from ._install import Installed, install

__all__ = ["Installed", "install"]
