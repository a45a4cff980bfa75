"""`VerbEntry`: the ranks of an EMA, who of them must come to a verb, and what they compare."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch.distributed as dist

from ..averaging.average import Average
from ..averaging.averages import AveragedWeights
from ..averaging.optimizer_hooks import Attachment
from ..averaging.swap_registry import Reads
from ..checkpoint import stages
from ..distributed.ranks import Ranks
from ..schedules import Schedule, plain_number
from ..sharding import consistency, parameters, records, torch_internals
from ..text import warn

__all__ = ["VerbEntry", "Which"]

Which = int | str | Schedule


def _checked_timeout(seconds: float) -> float:
    number = plain_number(seconds)
    # No thread waits longer than TIMEOUT_MAX, some 290 years.
    if number is None or not 0 < number <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout must be a positive number of seconds, got {seconds!r}.")
    return float(number)


class VerbEntry:
    """The ranks of an EMA, and how they begin a verb together.

    Args:
        weights: What the EMA averages; it adopts the model here.
        arguments: The arguments of the constructor, alike on every rank.
        timeout: Seconds that a rank waits for the others.

    Attributes:
        ranks: Those that hold the model; of the stages of a pipeline, all ranks of the job.
        alone: This rank, for verbs that are local here.
        stage: The global ranks that hold the same weights as this one.
        is_staged: The model is the stages that this rank holds.
        attachment: What `attach` returned last.
        by_hand: The clock's updates at the last one that was called beside an attached optimizer,
            and how often in succession one such followed a single attached one.

    Note:
        *Collective*.
    """

    def __init__(self, weights: AveragedWeights, arguments: dict[str, Any], timeout: float) -> None:
        timeout = _checked_timeout(timeout)
        model_shards = weights.find(timeout)
        self.weights, self.stage = weights, model_shards.members
        self.attachment: Attachment | None = None
        self.by_hand = 0, 0
        self.is_staged = isinstance(weights.model, parameters.Stages)
        entering, their_group = self.stage, model_shards.group
        if self.is_staged and dist.is_initialized():
            # Stages hold different weights, and all ranks write the one set of files.
            entering, their_group = list(range(dist.get_world_size())), None
        self.ranks = weights.ranks = Ranks(
            entering, their_group, torch_internals.side_store, timeout, model_shards.device
        )
        self.alone = Ranks([self.ranks.members[self.ranks.rank]], None, torch_internals.side_store)
        self._everyone: Ranks | None = None
        self._may_be_alone = False  # every rank averages the whole model
        self.ranks.begin("EMA", arguments)
        # From here on an interrupt on one rank is told to those that wait.
        with self.ranks.entering("EMA"):
            self.adopt("EMA", model_shards)

    def adopt(self, verb: str, model_shards: records.ModelShards) -> None:
        """Average the model as `model_shards` describes it, where all ranks hold it alike.

        Raises:
            ValueError: They do not, or nothing can be averaged.
        """

        def adopt() -> bool:
            self.weights.adopt(model_shards)
            return self._averages_all

        self._may_be_alone = self.ranks.count_on_all(verb, adopt) == self.ranks.size
        self.stage = model_shards.members
        states = self.weights.states
        has_shadow = [state.shadow is not None for state in states]
        consistency.on_weights(verb, self.ranks, self.stage, states, has_shadow)
        if self.is_staged:
            lacking = self.ranks.gather(verb, self.weights.inventory.lacks, stages.lacking)
            if lacking:
                raise ValueError(lacking)
            self.compare_shared(verb)

    def compare_shared(self, verb: str) -> None:
        """Decide which stage writes a weight that several hold. *Collective*."""
        if self.is_staged:
            stages.compare_shared(verb, self.ranks, self.stage, self.weights.averages)

    def refuse_staged(self, verb: str) -> None:
        """Raise RuntimeError for a verb that the stages of a pipeline do not have."""
        if self.is_staged:
            raise RuntimeError(
                f"ema.{verb}() of the stages of a pipeline: no rank holds the whole model. Use "
                "save() and load(), gather() for the whole model on rank 0, or into=[stages] for "
                "another model in the same stages."
            )

    def leads(self, ranks: Ranks) -> bool:
        """This is the first rank that holds this model, or this stage of it."""
        return ranks.members[ranks.rank] == self.stage[0] if ranks is self.ranks else ranks.first

    @property
    def attached(self) -> Attachment | None:
        """The attachment whose hooks are on the optimizers now."""
        attachment = self.attachment
        return attachment if attachment is not None and attachment.active else None

    @property
    def _averages_all(self) -> bool:
        """Whether each rank averages the whole model."""
        if self.ranks.size == 1 or self.is_staged or self.weights.placement.split:
            return False
        shards = (state.shard for state in self.weights.states)
        return all(shard.local_region.numel == math.prod(shard.shape) for shard in shards)

    @property
    def needed(self) -> Ranks:
        """The ranks that must enter `swap`, `gather` and `export`: one where each has it all."""
        return self.alone if self._may_be_alone and self._averages_all else self.ranks

    def everyone(self, verb: str) -> Ranks:
        """The ranks that write files together: all of the job for an unwrapped model in one.

        The first call is *collective*, and names its verb.
        """
        alone = self.ranks.size == 1 and dist.is_initialized() and dist.get_world_size() > 1
        if alone and self._everyone is None:
            job, store = range(dist.get_world_size()), torch_internals.side_store
            self._everyone = Ranks(job, None, store, self.ranks.timeout, verb=verb)
        return self._everyone or self.ranks

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of all verbs from now on."""
        seconds = _checked_timeout(seconds)
        for ranks in filter(None, (self.ranks, self._everyone)):
            ranks.timeout = seconds

    def begin(
        self,
        verb: str,
        reads: Reads,
        which: Which = 0,
        prepare: Callable[[], None] | None = None,
        arguments: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> Average:
        """Begin a verb: all ranks come, were called alike and can go on, or raise. *Collective*.

        Args:
            verb: As the user called it.
            reads: What it reads or writes.
            which: The average that it uses.
            prepare: What must work on every rank; None: `AveragedWeights.ready`.
            arguments: Alike on every rank.
            ranks: Those that come; None: all that hold the model.
        """
        weights, ranks = self.weights, ranks or self.ranks

        def ready() -> bool:
            weights.refuse(f"ema.{verb}", reads)
            weights.average(which)
            # After the refusals: it waits for updates, and may free unsharded weights.
            (prepare or weights.ready)()
            if ranks.size == 1 or Reads.WHOLE_MODEL not in reads:
                return False
            return not consistency.sampled_alike(weights.states, ranks)

        ranks.begin(verb, self.common(which, arguments or {}))
        if ranks.count_on_all(
            verb, ready
        ):  # every rank learned this, so all of them exchange what differs
            warn(
                f"ema.{verb}(): {consistency.name_replicas(verb, ranks, weights.states)}, which "
                "should hold replicas, so the average holds parts of both. Was one rank's model "
                "written by hand, or does each rank step alone (local SGD)?"
            )
        return weights.used(which)

    def common(self, which: Which, arguments: dict[str, Any]) -> dict[str, Any]:
        """The facts that all ranks must share: `arguments`, and what led to the averages."""
        names = [average.name for average in self.weights.averages]
        # A number and a name may mean the same average.
        if isinstance(which, Integral) and 0 <= int(which) < len(names):
            which = names[int(which)]
        common = {
            **arguments,
            "which": str(which),
            **self.weights.clock.to_dict(),
            "dtype of the shadows": str(self.weights.placement.dtype),
            "(decay, elapsed) of the last update": [a.last for a in self.weights.averages],
        }
        # Hooks that differ would let the ranks drift apart, so all verbs compare them.
        if self.attached is not None:
            common |= self.attached.arguments
        return common
