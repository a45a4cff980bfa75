"""What others do with published versions: follow, evaluate, serve, look. No torch at the top."""

__all__ = ()
