"""Ranks together: messages over the store, bytes over collectives and TCP connections."""

__all__ = ()
