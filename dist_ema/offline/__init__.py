"""The work of the command line: files in, files or facts out, in one process with bounded memory."""

__all__ = ()
