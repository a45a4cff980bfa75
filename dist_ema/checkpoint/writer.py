"""`Writer`: `ema.save` on every rank: prepare, place, send and write blocks; behind training too.

Ranks of one machine write their regions straight into place: no gather, no copy of the model. The
ranks of several machines send each byte to the machine that writes it ([Note: routes] in machines),
and all machines write at once. Either way the bytes are the same, and nothing appears under its
name before it is whole.

[Note: one decides]  Disks and files can differ between ranks. What depends on them is decided on
the first rank (`Ranks.run_on_first`) or compared (`Ranks.run_on_all`) before the next collective.
So an error on one rank is an error on all.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..averaging.executors import run_shielded
from ..distributed import diagnosis
from ..distributed.machines import Routes
from ..distributed.ranks import Ranks
from . import atomic, crc32, disk, placing, save_folder
from .background import BackgroundTask
from .request import SaveRequest

__all__ = ["Writer"]


@dataclass(frozen=True)
class _PreparedSave:
    """A request whose files exist in a temporary folder, at their full size, without weights.

    routes: None where every rank writes into place.
    """

    request: SaveRequest
    folder: Path
    placer: placing.BlockPlacer
    routes: Routes | None = None


class Writer:
    """Writes one request at a time, now or in the background. Made on all ranks together, and kept.

    Attributes:
        background: Writes a request while the caller goes on ([Note: background saves]).

    [Note: background saves]  Ranks interleave background work and training in different orders. So
    the background has keys and connections of its own ([Note: files] in connections). What the
    verb does before it returns has not: an interrupt is reported where the others wait.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._behind: Ranks | None = None
        self.background = BackgroundTask()

    def write(self, request: SaveRequest, wait: bool = True) -> list[str]:
        """Write the folder or file that is asked for, atomically.

        Args:
            request: what to write, and where.
            wait: False writes in the background.

        Returns:
            Remarks on what is not as it should be.

        Note:
            *Collective*. *Cost*: two windows of 16 MB at most; with wait=False also a copy of this
            rank's share in host memory.
        """
        if wait:
            return self._carry_out(self._prepare(request, stage=False), self._ranks)
        # Made at the first save behind training: it takes two more connections to the store.
        if self._behind is None:
            self._behind = self._ranks.with_own_messages()
        # `ema.timeout` may have been set since.
        self._behind.timeout = self._ranks.timeout
        devices = {state.local.device for files in request.averages for state in files.states}
        # NOTE: an interrupt after the last message would leave the others alone behind training.
        run_shielded(partial(self._begin, request, self._behind), devices, self._ranks.timeout)
        return []

    def _begin(self, request: SaveRequest, behind: Ranks) -> None:
        prepared = self._prepare(request, stage=True)
        try:
            if prepared.routes is not None:
                behind.connections(request.verb)  # now: the process group may be gone later
            # Step 1: all ranks have entered the verb, so one that is silent from here on is dead or
            # hung.
            behind.begin(request.verb, step=1)
            self.background.start(
                f"ema.{request.verb}({str(request.path)!r}, wait=False)",
                lambda: self._carry_out_together(prepared, behind),
            )
        except BaseException:
            self._abandon(prepared.folder)
            raise

    def _carry_out_together(self, prepared: _PreparedSave, ranks: Ranks) -> list[str]:
        """Write, and stay until all ranks know the outcome: this process may serve the store."""
        note, error = prepared.request.note, None
        try:
            remarks = self._carry_out(prepared, ranks)
        except Exception as caught:
            if note is None:
                raise
            remarks, error = [], caught
        else:
            with suppress(RuntimeError):
                ranks.run_on_all(prepared.request.verb, lambda: None)
        if note is not None:
            remarks = remarks + note(error, aloud=ranks.first)
        return remarks

    def _prepare(self, request: SaveRequest, stage: bool) -> _PreparedSave:
        """Check everything before the first byte is written; reserve the space. *Collective*."""
        request.refuse_unsound()  # alike on all ranks, which have compared their arguments

        def make() -> str:
            self._refuse_other_parts(request)
            return str(save_folder.make(request))

        folder = Path(self._ranks.run_on_first(request.verb, make))
        try:
            placer, seen = self._place(request, folder, stage)
            return _PreparedSave(request, folder, placer, self._routes(request, folder, seen))
        except BaseException:
            self._abandon(folder)
            raise

    def _refuse_other_parts(self, request: SaveRequest) -> None:
        """Raise ValueError if an average of other weights on other ranks is saved to the path."""
        weights = {name for files in request.averages for name in files.inventory}
        claim = str(diagnosis.digest(sorted(weights)))
        members, earlier_claim = self._ranks.claim(str(request.path), claim)
        if earlier_claim != claim:
            raise ValueError(
                f"ema.{request.verb}(): ranks {members} save other weights to {request.path}, and "
                "one would replace the other. For the stages of a pipeline build "
                "EMA([stage, ...]) on every rank; else give each average a path of its own."
            )

    def _place(
        self, request: SaveRequest, folder: Path, stage: bool
    ) -> tuple[placing.BlockPlacer, list[int]]:
        """The placer of this rank's blocks, and which ranks see the folder. *Collective*.

        stage: Take copies of the blocks.

        Raises:
            ValueError: The ranks would write different files.
            RuntimeError: The folder is gone.
        """
        ranks, verb, made = self._ranks, request.verb, list[placing.BlockPlacer]()
        error: Exception | None = None
        try:
            heads = [(name, file.head) for name, file in request.files.items()]
        except Exception as caught:  # raised below, where the others learn that this rank differs
            heads, error = [], caught
        schedules = [files.schedule for files in request.averages]
        # A digest, because names and headers grow with the model.
        ranks.compare({"files": diagnosis.digest([schedules, heads])})
        # Another machine may not share the disk of the first rank.
        sees = os.path.isdir(folder)

        def ready() -> bool:
            if error is not None:
                raise error
            made.append(placing.BlockPlacer(request))
            if stage:
                made[0].stage()
            return not sees

        try:
            # One exchange compares the digests, counts who sees no folder, and passes an error on.
            blind = ranks.count_on_all(verb, ready)
        except diagnosis.RanksDifferError as error:
            raise ValueError(
                f"ema.{verb}(): the ranks ask for different files. which, dtype, max_shard_size "
                "and mode must be alike on all of them."
            ) from error
        if blind == ranks.size:
            raise RuntimeError(
                f"ema.{verb}(): {folder} is gone, in which the files were made. What removes "
                f"hidden folders from {folder.parent}?"
            )
        return made[0], ranks.gather(verb, int(sees), list) if blind else [1] * ranks.size

    def _routes(self, request: SaveRequest, folder: Path, seen: list[int]) -> Routes | None:
        """Which ranks write what. None: all write into place, as they share machine and folder.

        *Collective*.

        Raises:
            RuntimeError: A rank that must write does not see the folder.
        """
        ranks, verb, blind = self._ranks, request.verb, not all(seen)
        if request.mode == "direct":
            if blind:
                raise RuntimeError(
                    f"ema.{verb}(mode='direct'): rank {ranks.members[seen.index(0)]} does not see "
                    f"the folder {folder.parent} that rank {ranks.members[0]} writes to. Choose a "
                    "file system that all ranks share, or pass mode='stream'."
                )
            return None
        machines = ranks.machines(verb)
        # A machine on which no rank sees the folder writes nothing.
        writers = [[rank for rank in on_machine if seen[rank]] for on_machine in machines.ranks]
        writers = list(filter(None, writers))
        if len(machines.ranks) == 1:
            if not blind and (request.mode is None or ranks.size == 1):
                return None
            # The first rank that sees the folder writes for its machine.
            writers = [[writers[0][0]]]
        return Routes([f.size for f in request.files.values()], machines, writers, ranks.rank)

    def _carry_out(self, prepared: _PreparedSave, ranks: Ranks) -> list[str]:
        """Write what was prepared, here or in a thread. *Collective*."""
        request, remarks = prepared.request, list[str]()
        files = disk.FileWriter(
            prepared.folder, list(request.files), partial(save_folder.disk_errors, request)
        )
        on_machines = prepared.routes is not None or request.mode == "direct"

        def write() -> dict[str, int]:
            if prepared.routes is None:
                for run in prepared.placer.runs():
                    files.write(*run)
            # NOTE: the first rank wrote the head of every file, and the fsync of another machine
            # may not reach that.
            files.sync(every=ranks.first and on_machines)
            return prepared.placer.contributions()

        def finish(sums: dict[str, int]) -> None:
            remarks.extend(save_folder.put_in_place(request, prepared.folder, sums))

        try:
            if prepared.routes is not None:
                _exchange(ranks, request.verb, prepared.routes, prepared.placer, files)
            ranks.run_and_reduce(request.verb, write, crc32.combine, finish)
            return remarks
        except BaseException as error:
            if not isinstance(error, atomic.NotDurableError):  # the earlier version lies there
                self._abandon(prepared.folder)
            raise
        finally:
            files.close()

    def _abandon(self, folder: Path) -> None:
        if self._ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def _exchange(
    ranks: Ranks,
    verb: str,
    routes: Routes,
    placer: placing.BlockPlacer,
    files: disk.FileWriter,
) -> None:
    """Send every byte to a rank that writes it, and write what others send. *Collective*."""
    connections = ranks.connections(verb)
    with connections.receiving(files.write) as receiver:

        def send() -> None:
            for number, runs in placer.runs_by_range(routes):
                peer = routes.peers[number]
                if peer != ranks.rank:
                    connections.send(peer, receiver.watched(runs))
                    continue
                for run in receiver.watched(runs):
                    files.write(*run)

        try:
            ranks.run_transfer(verb, send)
        except RuntimeError as error:
            # An error of this receiver was published by a sender that learned of it.
            raise (receiver.error or error) from None
