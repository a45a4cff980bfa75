"""Ranks: messages over the store, bytes over the process group."""

__all__ = ()
