"""What keeps a teacher in step with the average, besides the updates that write its memory."""

from __future__ import annotations

from collections.abc import Sequence

from ..sharding import derived, wrappers
from ..sharding.ownership import ParamState
from ..sharding.records import Shard
from .teacher import Teacher

__all__ = ["TeacherSync"]


class TeacherSync:
    """Copies what is not averaged (frozen weights, buffers), and knows whether the teacher may be read.

    `is_stale`: it was written since its last forward, so FSDP may hold an old unsharded copy ([Note: stale roots] in
    sharding.wrappers).
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.is_stale = False
        self._params: list[ParamState] = []
        self._copied_versions: list[int] = []

    def adopt(self, params: Sequence[ParamState]) -> None:
        """Keep the copies of these from now on; each is copied at the next sync."""
        self._params = [param for param in params if param.teacher_copy is not None]
        self.forget_copies()

    def forget_copies(self) -> None:
        """The next `copy_frozen` copies everything."""
        self._copied_versions = [-1 for _ in self._params]

    def copy_frozen(self) -> None:
        """Frozen weights follow whenever live was written, by `load_state_dict` for one."""
        for i, param in enumerate(self._params):
            written = param.local._version != self._copied_versions[i] or not param.shard.dense
            if param.shard.kind != "buffer" and written:
                _copy(param)
                self._copied_versions[i] = param.local._version
                self.is_stale = True

    def copy_buffers(self) -> None:
        """Buffers follow at every update."""
        for param in self._params:
            if param.shard.kind == "buffer":
                _copy(param)

    def follow(self, params: Sequence[ParamState]) -> None:
        """Bind the shadows and copies anew where the teacher's storages moved.

        Raises:
            RuntimeError: A weight of the teacher has another dtype, device or size now.
        """
        moved = self.teacher.moved
        for param in [param for param in params if param.name in moved]:
            old = param.teacher_copy if param.shadow is None else param.shadow
            new = self.teacher.memory(param.name)
            assert old is not None
            if (new.dtype, new.device, len(new)) != (old.dtype, old.device, len(old)):
                raise RuntimeError(
                    f"{param.name} of the teacher was {old.dtype} on {old.device} with {len(old)} "
                    f"elements here, and is now {new.dtype} on {new.device} with {len(new)}. "
                    "Build the EMA after teacher.to(...)."
                )
            if param.shadow is None:
                param.teacher_copy = new
            else:
                param.shadow = new

    def reshard(self) -> None:
        """The teacher's next forward reads what was written."""
        wrappers.reshard(self.teacher.sharded)
        self.is_stale = False
        with derived.caches_dropped(self.teacher.module):
            pass  # the teacher's weights were written already

    @property
    def shards(self) -> list[Shard]:
        """Whose addresses count: the teacher's memory, and the frozen weights that are copied into it."""
        frozen = [param.shard for param in self._params if param.shard.kind != "buffer"]
        return self.teacher.written + [shard for shard in frozen if shard.dense]


def _copy(param: ParamState) -> None:
    """Read afresh: modules may register a new buffer at every step."""
    assert param.teacher_copy is not None
    param.teacher_copy.copy_(param.shard.read())
