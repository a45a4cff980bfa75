"""The work of the command line: files in, files or facts out, one process, bounded memory."""

__all__ = ()
