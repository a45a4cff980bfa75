"""`BackgroundTask`: one task at a time in a thread behind training, and its error afterwards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["BackgroundTask"]

log = logging.getLogger("dist_ema")


class BackgroundTask:
    """Runs one task at a time in a thread.

    The thread is no daemon, so the interpreter waits for it before it exits (`os._exit` and a
    signal do not wait). An error is logged when it happens, because there may be no next call.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._what, self._outcome = "", Future[list[str]]()

    def start(self, what: str, work: Callable[[], list[str]]) -> None:
        """Run `work`, which returns remarks. Call `finish` first."""
        assert self._thread is None
        self._what, self._outcome = what, Future()

        def run() -> None:
            try:
                self._outcome.set_result(work())
            except BaseException as error:
                log.error("%s failed behind training: %s", what, error)
                self._outcome.set_exception(error)

        thread = threading.Thread(target=run, name="dist_ema files", daemon=False)
        thread.start()  # which may fail
        self._thread = thread

    @property
    def busy(self) -> bool:
        """A task is running."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> list[str]:
        """Wait for the task and return its remarks. Raises RuntimeError, once, if it failed."""
        if self._thread is None:
            return []
        self._thread.join()
        self._thread = None
        # The traceback of an error holds the staging buffer, so it is not kept.
        outcome, self._outcome = self._outcome, Future()
        error = outcome.exception()
        if error is not None:
            raise RuntimeError(f"{self._what} failed behind training: {error}") from error
        return outcome.result()
