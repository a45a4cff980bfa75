"""The averages: how they are kept, moved, swapped in and measured."""

__all__ = ()
