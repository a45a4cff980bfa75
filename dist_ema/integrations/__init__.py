"""Other people's training loops, which call `EMA` at the right moments.

Nothing is decided here. Only the module of a framework imports it.
"""

__all__ = ()
