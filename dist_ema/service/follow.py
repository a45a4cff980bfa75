"""`follow`: published versions as they come, each one once, whole, and leased while it is in use.

    for version in dist_ema.follow("run/published"):
        version.load_into(model)
        print(version.step, evaluate(model))

A follower polls, because network file systems send no events. It needs nothing of the trainer but
the folder, which may come later, and survives whatever happens to it ([Note: leases] in
checkpoint.leases).
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import leases, manifest, versions
from ..text import warn

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["POLL", "Follower", "Version", "follow", "open_version"]

POLL = 0.5  # seconds between two looks


class Version:
    """A published version that this process has leased.

    Attributes:
        path: Its folder, a complete safetensors model. It stays until `release`.
        number: The number of the version; newer is higher.
        step: The step of the training.
        metadata: What the publisher says: version, id, step, now, average, time, metrics.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], lease: leases.Lease) -> None:
        self.path, self.metadata, self._lease = path, metadata, lease
        self.number, self.step = int(metadata["version"]), int(metadata["step"])

    def load_into(self, module: nn.Module) -> None:
        """Write the weights into a module in place, each rank into its own shards.

        Args:
            module: The same model, however it is wrapped, in any floating dtype.

        Raises:
            ValueError: The module holds other weights; they are named, and nothing was written.

        Note:
            *Cost*: pages of the files, no second model.
        """
        from ..checkpoint.load_into import load_into

        load_into(self.path, module)

    def state_dict(self) -> dict[str, Tensor]:
        """The complete state_dict. *Aliases* pages of the files, which outlive `release`."""
        from ..checkpoint.load_file import load_file

        return load_file(self.path)

    def release(self) -> None:
        """The version is not in use any more, and may be removed. Idempotent."""
        self._lease.release()

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Version({self.number}, step={self.step}, {os.fspath(self.path)!r})"


def open_version(path: Path, expiry: float = leases.EXPIRY) -> Version | None:
    """Lease a version. None where it is gone, or no new readers may come.

    Args:
        path: Its folder.
        expiry: Seconds after the death of this process until the lease counts no more.
    """
    try:
        lease = leases.Lease(path, expiry)
    except FileNotFoundError:
        return None
    try:
        saved = manifest.read(path)
        metadata = None if saved is None else versions.facts_of(saved)
        if saved is not None and metadata is not None:
            # A version appears whole, so damage came later, or is not of dist_ema.
            manifest.refuse_damaged(path, saved, manifest.read_files(path, saved))
            return Version(path, metadata, lease)
    except (KeyError, OSError, TypeError, ValueError) as error:
        # Gone meanwhile is no fault to warn of.
        if path.is_dir():
            warn(f"{path} is passed over: {error}")
    lease.release()
    return None


class Follower:
    """The iterator that `follow` returns, for `for` and `async for`."""

    def __init__(
        self, folder: Path, timeout: float | None, every: bool, after: int, poll: float
    ) -> None:
        self._folder, self._every, self._poll = folder, every, poll
        self._timeout = math.inf if timeout is None else timeout
        self._last, self._asked = after, 0.0
        self._version: Version | None = None

    def __iter__(self) -> Follower:
        return self

    def __next__(self) -> Version:
        self._asked = time.monotonic()
        while (version := self._next_version()) is None:
            if self._is_over:
                raise StopIteration
            time.sleep(self._poll)
        return version

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Version:
        self._asked = time.monotonic()
        # In a thread: a network file system may hold up the event loop for seconds.
        while (version := await asyncio.to_thread(self._next_version)) is None:
            if self._is_over:
                raise StopAsyncIteration
            await asyncio.sleep(self._poll)
        return version

    @property
    def _is_over(self) -> bool:
        # The stop file counts when every version before it was handed out.
        waited = time.monotonic() - self._asked
        return waited > self._timeout or versions.is_stopped(self._folder, self._last)

    def _next_version(self) -> Version | None:
        """The next version, if there is one; the one before is released."""
        self.close()
        versions_here = versions.numbered(self._folder)
        if versions_here and max(versions_here) < self._last:
            self._last = 0  # the folder was emptied, and a new run began
        new_numbers = [number for number in versions_here if number > self._last]
        for number in new_numbers if self._every else new_numbers[-1:]:
            self._last, self._version = number, open_version(versions_here[number])
            if self._version is not None:
                return self._version
        return None

    def close(self) -> None:
        """Release the version that was taken last. Idempotent."""
        if self._version is not None:
            self._version.release()


def follow(
    folder: str | Path,
    timeout: float | None = None,
    every: bool = True,
    *,
    after: int = 0,
    poll: float = POLL,
) -> Follower:
    """Iterate over the versions that `ema.publish` writes to a folder, each of them once.

    `for` and `async for` take it. A version is leased until the next one is asked for, so it stays
    while you use it. The trainer may be killed, restarted and rewound meanwhile: then numbers go
    on, and steps begin again where it does.

    Args:
        folder: As `ema.publish` has it. It need not exist yet.
        timeout: Seconds without a new version after which the iteration ends; None waits for ever.
            A file called `stop` in the folder ends it too, after the versions that are there.
        every: False passes over all but the newest version.
        after: The number of a version: begin behind it.
        poll: Seconds between two looks.

    Returns:
        An iterator of `Version`.

    Raises:
        ValueError: The folder is one saved model, or a number of seconds is none.
    """
    versions.refuse_model(Path(folder))
    # A timeout of nan would never pass.
    if timeout is not None and not (isinstance(timeout, Real) and timeout >= 0):
        raise ValueError(f"timeout must be a number of seconds from 0, or None, got {timeout!r}.")
    if not (isinstance(poll, Real) and 0 <= poll < math.inf):
        raise ValueError(f"poll must be a number of seconds from 0, got {poll!r}.")
    if not hasattr(after, "__index__"):
        raise ValueError(f"after must be the number of a version, got {after!r}.")
    return Follower(Path(folder), timeout, every, after, poll)
