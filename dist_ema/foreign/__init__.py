"""Checkpoints that other tools wrote. No torch."""

__all__ = ()
