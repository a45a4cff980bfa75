"""What the verbs of `EMA` do: how ranks begin one together, and what files are asked for."""

__all__ = ()
