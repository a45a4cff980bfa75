"""The work of the command line: files in, files or facts out; one process, no GPU, a bounded amount of memory."""

__all__ = ()
