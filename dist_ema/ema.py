"""class EMA: the clock and the order of calls.

Every verb does the same things in the same order: refuse what is not allowed now, enter together, follow weights that
moved, let the engine settle, and only then hand over to the room that does the work.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .averaging import gather, metrics
from .averaging.averages import Average, AveragedWeights
from .averaging.clock import Clock
from .averaging.optimizer_hooks import Attachment
from .averaging.swap import WeightSwap, broadcast_to_replicas
from .averaging.teacher import Teacher
from .checkpoint import dcp, reader, writer
from .distributed.coordinator import FOREVER, Ranks
from .schedules import Schedule
from .schedules import schedule as coerce
from .sharding import consistency, discovery, parameters, records, wrappers

__all__ = ["EMA"]

P = ParamSpec("P")
T = TypeVar("T")
Which = int | str | Schedule
_NEW = Clock().to_dict() | {"accepted": 0}  # the clock of an EMA that was just built


def _outside_autograd(method: Callable[Concatenate[EMA, P], T]) -> Callable[Concatenate[EMA, P], T]:
    """Run outside autograd and inference mode: a shadow made inside inference mode could never be updated outside."""

    @wraps(method)
    def run(self: EMA, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def _refuse_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float64 or bfloat16, got {dtype}.")


def _refuse_beside_into(schedules: Sequence[Schedule], dtype: torch.dtype, device: Any) -> None:
    if len(schedules) > 1:
        raise ValueError(
            f"into= takes one average, got {len(schedules)} decays. Build one EMA per teacher."
        )
    if device is not None or dtype != torch.float32:
        raise ValueError(
            f"device={device!r}, dtype={dtype} together with into=: the shadows are the teacher's weights. Move and cast the "
            "teacher before building the EMA."
        )


def _stacklevel_of_caller() -> int:
    """The stacklevel of a warning that points at the user's line, however deep in here it is raised."""
    frame, level = sys._getframe(1), 1
    here = (str(Path(__file__).parent), contextlib.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, level = frame.f_back, level + 1
    return level


def _combine_exits(said: list[Any]) -> dict[str, Any]:
    """Which rank left a swap by an exception, and which buffers were recalibrated.

    NOTE: DDP rewrites the other ranks' buffers in every forward, so the first rank says which.
    """
    errors = [[rank, each["error"]] for rank, each in enumerate(said) if each and "error" in each]
    return {"error": errors[0] if errors else None, "changed": (said[0] or {}).get("changed", [])}


def _real(path: str | Path) -> Path:
    """Where a link leads: the temporary must lie beside the folder itself, on the same file system."""
    return Path(os.path.realpath(path))


class EMA:
    """An exponential moving average of a model's weights, each rank keeping its own shard of it.

    model: as it will be trained: plain, DDP, FSDP1, FSDP2, HSDP, tensor parallel, compiled, checkpointed. Wrap first. Or
        its parameters, with or without names: `model.parameters()`, `model.named_parameters()`.
    decay: a float (`Constant`), a schedule of `dist_ema`, or a list of them: several averages, each live weight read once.
    dtype: of the shadows: float32, float64, or bfloat16 (compact, rounded stochastically).
    device: of the shadows; None keeps each beside its weight.
    split: divide replicated weights (DDP, HSDP) among the ranks that hold them. A process group: plain weights are
        replicated over it, though no DDP says so, and divided too.
    buffers: 'copy' takes them from the live model when the average is used, 'average' averages the floating ones.
    only: a regex searched in names, or a predicate on them; the rest is treated like frozen weights.
    into: a module, built and wrapped like the model, whose weights become the average ([Note: into]).

    *Collective*: construction and every verb but `update`, `attach`, `detach` and `state_dict`.
    *Cost*: 4 bytes per element of this rank's shard (of 1/replicas of it), and 8 MB of scratch.

    Raises ValueError where a weight cannot be averaged or nothing matches, naming the weights.

    [Note: into]  Mean teacher, DINO, BYOL: the shadows are the teacher's own memory, in its dtype, cut as it is cut. It is
    overwritten with live, now and by `load`, and its weights need no gradient from now on. Frozen weights follow when live
    ones are written; buffers are live's of the last update, or averaged. What `only=` leaves out is not touched: without
    BatchNorm's buffers a teacher in training mode keeps statistics of its own. Names that the teacher alone has stay as
    they are. The teacher may run, be saved, copied and compiled like any module; `swap` has nothing to lend.
    """

    @_outside_autograd
    def __init__(
        self,
        model: parameters.Model,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        split: bool | dist.ProcessGroup = True,
        buffers: Literal["copy", "average"] = "copy",
        only: str | Callable[[str], bool] | None = None,
        into: parameters.Model | None = None,
    ) -> None:
        _refuse_dtype(dtype)
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers must be 'copy' or 'average', got {buffers!r}.")
        self._dtype, self._device = dtype, None if device is None else torch.device(device)
        if not isinstance(split, (bool, dist.ProcessGroup)):
            raise ValueError(f"split must be True, False or a process group, got {split!r}.")
        self._split, self._replicated = (
            split is not False,
            None if isinstance(split, bool) else split,
        )
        schedules = [coerce(each) for each in (decay if isinstance(decay, Sequence) else [decay])]
        if not schedules or len(set(schedules)) < len(schedules):
            raise ValueError(f"decay must name one or more different schedules, got {decay!r}.")
        if into is not None:
            _refuse_beside_into(schedules, dtype, device)
            self._split = False
        module = parameters.module_of(model)
        self.weights = AveragedWeights(module, schedules, only=only, buffers=buffers)
        self._attachment: Attachment | None = None
        self._looked: dict[str, float] = {}  # the clock at the last `snapshot` into each folder
        found = discovery.find_shards(module, self._replicated)
        self._ranks = Ranks(found.members, found.group, wrappers.side_store)
        self._everyone: Ranks | None = None
        if into is not None:
            self.weights.teacher = Teacher(into, self.weights.sync_teacher)
        self._writer: writer.Writer | None = None
        self._adopt("EMA", found)
        self._overlap: bool | None = None
        self._use_engine()

    def _use_engine(self) -> None:
        """As `attach` asked for; by itself an update waits for nobody in host memory only."""
        self.weights.use_engine(
            self._on_host if self._overlap is None else self._overlap, self._on_host
        )

    @property
    def _on_host(self) -> bool:
        if self.weights.teacher is not None:
            return self.weights.far_on_host
        return self._device is not None and self._device.type == "cpu"

    def _adopt(self, verb: str, found: records.ModelShards) -> None:
        average = self.weights
        self._ranks.run_on_all(
            verb, lambda: average.adopt(found, self._split, self._dtype, self._device)
        )
        consistency.on_weights(
            verb, self._ranks, average.states, [slot.shadow is not None for slot in average.states]
        )

    def _enter(
        self, verb: str, which: Which = 0, prepare: Callable[[], None] | None = None
    ) -> Average:
        """What every collective verb begins with: all ranks come, mean the same average and can go on, or all raise."""
        average = self.weights

        def ready() -> int | None:
            average.refuse(f"ema.{verb}")
            number = average.averages.index(average.average(which))
            (prepare or average.ready)()
            return number if len(average.averages) > 1 else None

        self._ranks.begin(verb)
        _, asked = self._ranks.run_on_all(
            verb, ready, combine=lambda said: sorted({each or 0 for each in said})
        )
        if len(asked) > 1:
            names = " and ".join(average.averages[number].name for number in asked)
            raise ValueError(f"ema.{verb}(): the ranks ask for different averages: {names}.")
        number: int = asked[0]
        return average.averages[number]

    def _warn_if_idle(self, verb: str) -> None:
        if self.weights.idle:
            warnings.warn(
                f"ema.{verb}(): the weights were written since the last call, and no update came. Was ema.attach() given "
                "the optimizer that steps, or ema.update() called? (A replayed CUDA graph runs no hooks.)",
                stacklevel=_stacklevel_of_caller(),
            )

    # --- update ------------------------------------------------------------------------------------------------

    @_outside_autograd
    def update(self, elapsed: float = 1.0, *, decay: float | Schedule | None = None) -> None:
        """Move the average towards the live weights. elapsed: steps, images or tokens since the last update.

        decay: of this move alone, in place of the schedule's, for loops that compute one themselves; 0 copies. The clock
        moves all the same, and files name the schedule. No collective, no host sync.

        Raises RuntimeError inside `swap`, ValueError for an elapsed that the schedule cannot take ([Note: elapsed] in
        schedule).
        """
        average = self.weights
        average.refuse("ema.update")
        once = None if decay is None else coerce(decay)
        if not average.clock.started:
            trial = replace(average.clock)  # an update that is refused begins nothing
            trial.start()
            trial.move([once or profile.schedule for profile in average.averages], float(elapsed))
            average.begin()
        average.move(float(elapsed), once=once)
        average.before_step()  # without hooks nobody else would wait for the read

    def attach(
        self,
        *optimizers: Optimizer,
        every: int = 1,
        start: int = 0,
        elapsed: float | Callable[[], float] = 1.0,
        overlap: bool = True,
        guard: bool = False,
    ) -> Attachment:
        """Update after every step that really happened; after the last-listed optimizer, if there are several.

        every: steps between updates; the decay accounts for all of them. start: the step at which the shadow is seeded
        from live and averaging begins. elapsed: units per step, a number or a callable. overlap: run behind the next
        forward, on a side stream of an accelerator or in a host thread (device="cpu"); False is the bit-identical
        reference. guard: keep the shadow, element by element, where live is not finite. Returns a handle with `remove()`.
        """
        if self.weights.teacher is not None:
            self.weights.teacher.refuse_training(optimizers)
        if self._attachment is not None and self._attachment.active:
            raise RuntimeError(
                "ema.attach() was called before. Call ema.detach() first, or list all optimizers in one call."
            )
        self._overlap = overlap
        self._use_engine()
        self._attachment = Attachment(
            self.weights,
            self.weights.clock,
            optimizers,
            every,
            start,
            elapsed,
            guard,
        )
        return self._attachment

    def detach(self) -> None:
        """Take off what `attach` put on the optimizers."""
        if self._attachment is not None:
            self._attachment.remove()

    @_outside_autograd
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> EMA:
        """Move the shadows to `device` and cast them to `dtype`; None leaves that as it is. Returns the EMA.

        The update under way is waited for, and what `attach` put on stays: the next updates run where the shadows lie now,
        in host memory by a thread. A cast to bfloat16 rounds to nearest. No collective, but do the same on every rank.

        Raises RuntimeError inside `swap` and with into=, where the shadows are the teacher's weights, ValueError for a dtype
        that is none of float32, float64 and bfloat16. *Cost*: the old shadows and the new ones together, until it returns.
        """
        average = self.weights
        if dtype is not None:
            _refuse_dtype(dtype)
        if average.teacher is not None:
            raise RuntimeError(
                "ema.to() of an EMA with into=: the shadows are the teacher's weights. Build the EMA after teacher.to(...)."
            )
        average.refuse("ema.to")
        average.ready()
        kind, place = dtype or self._dtype, self._device if device is None else torch.device(device)
        average.reallocate(kind, place)
        self._dtype, self._device = kind, place
        self._use_engine()
        return self

    # --- the average in use ------------------------------------------------------------------------------------

    @contextmanager
    def swap(self, which: Which = 0) -> Iterator[EMA]:
        """Lend the average to the model: inside the block its weights and buffers are the average's. *Collective*.

        which: of several averages, by number or schedule, here and in the other verbs.

        Live weights, buffers and shadows are restored bit for bit, whatever the block raises. Floating buffers that the
        block changed (recalibrated BatchNorm) become the average's own until `reset_buffers()`. *Cost*: 4 MB where shadow
        and weight have one dtype, else a copy of this rank's shard. A rank that leaves by an exception makes the others
        raise RuntimeError at their exit, after restoring.
        """
        profile, loan = self._apply_swap(which)
        error: BaseException | None = None
        try:
            yield self
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._restore_swap(profile, loan, error)

    @_outside_autograd
    def _apply_swap(self, which: Which) -> tuple[Average, WeightSwap]:
        average = self.weights

        def prepare() -> None:
            if average.teacher is not None:
                raise RuntimeError(
                    "ema.swap() of an EMA with into=: the teacher is the average, so evaluate the teacher."
                )
            if wrappers.frozen_by_inductor(average.model):
                raise RuntimeError(
                    "ema.swap() cannot reach a model compiled with torch._inductor.config.freezing: turn it off."
                )
            average.ready()

        profile = self._enter("swap", which, prepare)
        self._warn_if_idle("swap")
        loan = WeightSwap(profile.states, profile.own_buffers)
        try:
            self._ranks.run_on_all("swap", loan.apply)
            average.lend(True)
            broadcast_to_replicas(profile.averaged, self._split)
        except BaseException:
            loan.restore()
            average.lend(False)
            average.mark()
            raise
        return profile, loan

    @_outside_autograd
    def _restore_swap(
        self, profile: Average, loan: WeightSwap, error: BaseException | None
    ) -> None:
        average = self.weights
        buffers: dict[str, Tensor] = {}
        said: dict[str, Any] = {}
        raised = error
        try:
            if error is None:
                buffers, said["changed"] = loan.floating_buffers()
        except Exception as caught:  # told to the others like an error of the block
            raised = caught
        if raised is not None:
            said["error"] = f"{type(raised).__name__}: {raised}"
        try:
            left = self._ranks.all_gather_json(
                "swap", said if any(said.values()) else None, FOREVER, combine=_combine_exits
            )
        finally:
            average.reshard()
            loan.restore()
        # NOTE: not in `finally`: while replicas are not whole again, the model still counts as lent.
        broadcast_to_replicas(profile.averaged, self._split)
        average.lend(False)
        average.mark()
        if raised is not error:
            raise raised  # type: ignore[misc]
        if left["error"] and error is None:
            rank, text = left["error"]
            raise RuntimeError(
                f"rank {self._ranks.members[rank]} left ema.swap() by an exception: {text}"
            )
        profile.own_buffers |= {name: buffers[name] for name in left["changed"] if error is None}

    @_outside_autograd
    def gather(self, which: Which = 0) -> dict[str, Tensor]:
        """The complete state_dict, on the host of the first rank; {} elsewhere. *Collective*.

        Averaged weights in the shadows' dtype, frozen weights and buffers from the live model, every alias: it passes
        `load_state_dict(strict=True)`. *Cost*: the model on the first rank's host, 16 MB windows elsewhere.
        """
        profile = self._enter("gather", which)
        self._warn_if_idle("gather")
        return gather.full(self._ranks, profile.states, profile.own_buffers, torch.device("cpu"))

    @_outside_autograd
    def copy_to(self, module: parameters.Model, which: Which = 0) -> None:
        """Write the average, the frozen weights and the buffers into `module`, however it is wrapped. *Collective*.

        module: or its parameters, in the order or under the names that this EMA was given.
        Raises ValueError with the names if the two models do not hold the same weights.
        """
        profile = self._enter("copy_to", which)
        gather.copy_into(self._ranks, profile.states, profile.own_buffers, module)
        self.weights.mark()

    # --- files -------------------------------------------------------------------------------------------------

    @_outside_autograd
    def save(
        self,
        path: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        mode: Literal["direct", "stream"] | None = None,
        extra: dict[str, Any] | None = None,
        keep: int | None = None,
        wait: bool = True,
    ) -> None:
        """Write the average as a folder to resume from, itself a safetensors model. *Collective*, atomic.

        With `only=` the folder holds the averaged weights alone; of several averages the first lies in the folder, the
        others under averages/. extra: a dict of JSON values to keep in ema.json, finite numbers only. keep: the path ends
        in a number; of the folders that are called alike, keep those with the highest numbers up to this one, and have the
        file `latest` beside them name this one (`load` follows it). wait: False copies what this rank writes to the host
        and returns; a thread writes behind training. The next save or export waits for it and raises what went wrong, so
        does the end of the program wait. *Cost*: every rank writes its own bytes into place, no gather; across machines the
        first rank writes, unless mode='direct'. wait=False: this rank's share once more in host memory, pinned on an
        accelerator, until it is written.
        """
        trees, meta = self._average_files(), self._meta("ema") | {"extra": extra or {}}
        self._write(
            writer.SaveRequest("save", _real(path), trees, meta, max_shard_size, mode, keep=keep),
            wait,
        )

    @_outside_autograd
    def export(
        self,
        path: str | Path,
        *,
        which: Which = 0,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        mode: Literal["direct", "stream"] | None = None,
    ) -> None:
        """Write the file to ship: the complete model, in the model's own dtypes or in `dtype`. *Collective*.

        path: a folder (what else it holds, like config.json, stays), or one file ending in .safetensors.
        Raises ValueError where a finite value would become infinite in `dtype`.
        """
        profile = self.weights.average(which)
        meta = self._meta("export") | {"weights": "all"}
        tree = writer.AverageFiles(
            profile.persistent, dict(profile.own_buffers), profile.schedule.to_dict()
        )
        self._write(
            writer.SaveRequest("export", _real(path), [tree], meta, max_shard_size, mode, dtype)
        )

    @_outside_autograd
    def snapshot(
        self, folder: str | Path, *, every: float, dtype: torch.dtype | None = None
    ) -> Path | None:
        """Save all averages as folder/0000001000 when the clock passes a multiple of `every`; to be called in each step.

        What `posthoc.reconstruct` chooses a decay from after training. dtype: torch.bfloat16 stores half; such a snapshot
        has no clock to resume with. *Collective* when it saves; all ranks know by their clocks. Returns the path, or None.
        """
        if not 0 < every < math.inf:
            raise ValueError(f"every must be positive and finite, got {every}.")
        clock, last = self.weights.clock, self.weights.averages[0].last
        before = self._looked.get(str(folder), clock.now - (last[1] if last else 0.0))
        self._looked[str(folder)] = clock.now
        if clock.now // every <= before // every:
            return None
        path = _real(Path(folder) / f"{int(clock.now):010}")
        later = (
            [each.name for each in path.parent.glob("[0-9]*") if each.name > path.name]
            if self._ranks.first
            else []
        )
        if later:
            warnings.warn(
                f"{folder} holds snapshots of a later clock ({min(later)} ...). If they are of another run, move them away: "
                "averages of two runs cannot be mixed.",
                stacklevel=_stacklevel_of_caller(),
            )
        meta = self._meta("ema" if dtype is None else "export")
        self._write(writer.SaveRequest("save", path, self._average_files(), meta, dtype=dtype))
        return path

    def _average_files(self) -> list[writer.AverageFiles]:
        """The first average as a complete model (with `only=`, what is averaged), the others without what they share."""
        average = self.weights
        trees = []
        for i, profile in enumerate(average.averages):
            slots = [
                slot
                for slot in profile.persistent
                if slot.shadow is not None
                or slot.name in profile.own_buffers
                or (i == 0 and average.only is None)
            ]
            label = f"{i}-{type(profile.schedule).__name__}" if i else ""
            trees.append(
                writer.AverageFiles(
                    slots, dict(profile.own_buffers), profile.schedule.to_dict(), label
                )
            )
        return trees

    def _write(self, job: writer.SaveRequest, wait: bool = True) -> None:
        self._finish_writing()
        self._enter(job.verb)
        self._warn_if_idle(job.verb)
        if isinstance(self.weights.model, parameters.Parameters) and self.weights.model.nameless:
            warnings.warn(
                f"ema.{job.verb}(): the parameters came without names, so the files call them by their place in the list: "
                "0, 1, ... Pass model.named_parameters() or the model for files that a model can load.",
                stacklevel=_stacklevel_of_caller(),
            )
        alone = self._ranks.size == 1 and dist.is_initialized() and dist.get_world_size() > 1
        if alone and self._everyone is None:
            self._everyone = Ranks(
                range(dist.get_world_size()), None, wrappers.side_store, self._ranks.timeout
            )
        ranks = self._everyone or self._ranks
        if alone:  # a model that nobody wrapped, in a job of several ranks: the first one writes, if all hold the same
            consistency.on_averages(
                job.verb, ranks, [slot for tree in job.trees for slot in tree.slots]
            )
            job = job if ranks.first else job.with_parts(lambda _: [])
        if self._writer is None:
            self._writer = writer.Writer(ranks, wrappers.side_store)
        self._warn_each(self._writer.write(job, self.timeout, wait))

    def _finish_writing(self) -> None:
        """No save is under way behind training after this. Raises RuntimeError if the last one failed."""
        if self._writer is not None:
            self._warn_each(self._writer.finish())

    def _warn_each(self, remarks: list[str]) -> None:
        for text in remarks:
            warnings.warn(text, stacklevel=_stacklevel_of_caller())

    def _meta(self, kind: str) -> dict[str, Any]:
        attached = self._attachment
        return {
            "kind": kind,
            "weights": "all" if self.weights.only is None else "averaged",
            "clock": self.weights.clock_to_dict(),
            "attach": None if attached is None else attached.to_dict(),
            "rounding": {"seed": self.weights.seed},
            "extra": {},
        }

    @_outside_autograd
    def load(self, path: str | Path, *, strict: bool = True, verify: bool = True) -> None:
        """Go on from a saved average, of any world size and wrapper. *Collective*. The live model is not touched.

        path: what `save` wrote is resumed with its clock; an EMA whose `attach(start=...)` is not reached goes on too. Any
        other safetensors model (an export, a Hugging Face folder, its index, one file) is a start: the averaged weights are
        read, in any floating dtype, the clock is that of a new EMA, frozen weights and buffers in it are passed over.

        strict: names must agree. With strict=False weights that the folder lacks start from live and weights that the model
        lacks are left out, and a warning names them; another shape always raises, as its values would be lost. verify:
        compare the files' check sums first, each rank a part of every file; only what dist_ema wrote has them.

        Raises ValueError with all differences, or if the folder is damaged; nothing has changed then. If the disk fails
        after that, in the middle of reading, the error leaves a new average: equal to live, its clock at 0. *Cost*: only
        the slices that this rank keeps are read, through a window of 4 MB.
        """
        self._finish_writing()
        self._enter("load")
        average = self.weights
        readers = [
            reader.LoadTarget(each.schedule.to_dict(), each.persistent) for each in average.averages
        ]
        with reader.open_checkpoint(
            self._ranks, path, readers, strict=strict, verify=verify
        ) as found:
            for text in found.warnings:
                warnings.warn(text, stacklevel=_stacklevel_of_caller())
            try:
                own = found.fill(self._ranks)
            except BaseException:
                self._begin_again(started=True)
                raise
        for profile, buffers in zip(average.averages, own, strict=True):
            profile.own_buffers = {
                name: value for name, value in buffers.items() if average.teacher is None
            }
        average.set_clock(found.clock or _NEW)
        average.forget_mark()

    # --- state_dict, for torch.distributed.checkpoint ----------------------------------------------------------

    @_outside_autograd
    def state_dict(self) -> dict[str, Any]:
        """Tensors for `dcp.save({"ema": ema})` and `dcp.load`, under any wrapper. *Aliases* the shadows.

        Weights are plain tensors where this rank averages all of one, else `dcp.FlatRange`.
        """
        average = self.weights
        average.refuse("ema.state_dict")
        average.ready()
        states = {
            p.name: dcp.state(p.averaged, p.floating_buffers, p.own_buffers)
            for p in average.averages
        }
        clock = [float(value) for value in average.clock_to_dict().values()]
        return {"averages": states, "clock": torch.tensor(clock, dtype=torch.float64)}

    @_outside_autograd
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, after DCP filled it, or with full weights from elsewhere. *Collective*.

        Raises ValueError for what is missing or does not fit (RuntimeError on other ranks); nothing has changed then.
        """
        average = self.weights
        matched: list[tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]] = []
        clock: dict[str, Any] = {}

        def check() -> None:
            lacks = [p.name for p in average.averages if p.name not in state.get("averages", {})]
            if lacks or "clock" not in state:
                raise ValueError(f"the state_dict of the EMA lacks {', '.join(lacks) or 'clock'}.")
            clock.update(zip(average.clock_to_dict(), state["clock"].tolist(), strict=True))
            Clock().set(clock)
            matched.extend(
                dcp.match(state["averages"][p.name], p.averaged, p.floating_buffers)
                for p in average.averages
            )

        self._enter("load_state_dict")
        self._ranks.run_on_all("load_state_dict", check)
        for profile, (copies, own) in zip(average.averages, matched, strict=True):
            for shadow, value in copies:
                shadow.copy_(value)
            profile.own_buffers = {
                name: value for name, value in own.items() if average.teacher is None
            }
        average.set_clock(clock)
        average.forget_mark()

    # --- the rest ----------------------------------------------------------------------------------------------

    @_outside_autograd
    def reset(self) -> None:
        """Begin again: the shadow is the live model, the clock is 0, recalibrated buffers are forgotten. *Collective*."""
        self._enter("reset")
        late = (
            self._attachment is not None and self._attachment.active and self._attachment.start > 0
        )
        self._begin_again(started=not late)

    def _begin_again(self, started: bool) -> None:
        self.weights.copy_live()
        for profile in self.weights.averages:
            profile.own_buffers = {}
        self.weights.set_clock(_NEW | {"started": started})

    def reset_buffers(self) -> None:
        """Forget recalibrated buffers: the average takes the live model's again."""
        self.weights.refuse("ema.reset_buffers")
        for profile in self.weights.averages:
            profile.own_buffers = {}

    @_outside_autograd
    def rescan(self) -> None:
        """Average weights that became trainable since, seeded from live. *Collective*."""
        average = self.weights
        found: list[records.ModelShards] = []

        def prepare() -> None:
            average.reshard()
            average.settle()
            average.follow(replaced=True, newly_trainable=False)
            found.append(discovery.find_shards(average.model, self._replicated))

        self._enter("rescan", prepare=prepare)
        self._adopt("rescan", found[0])

    @_outside_autograd
    def metrics(self, which: Which = 0, *, distance: bool = True) -> dict[str, float]:
        """What there is to log, as plain numbers. *Collective* where the model is sharded or replicated, unless
        distance=False, which is local and never waits: for loops that log on one rank only.

        decay, half_life    of the last update, in units of the clock
        now, updates        the clock; moves of the shadow, skipped ones included
        bytes, pinned       of shadows beside their weights; in host memory, windows included. On this rank
        update_ms           the time that the last finished update took, 0 before the first
        stall_ms            what it added to the training step: the wait of the device, or the work in the hook
        lag                 updates submitted but not finished
        skipped             updates that the device refused; with distance=False as far as it has told by now
        distance            |live - average| / |live|, over the whole model, each element counted once
        replicas_agree      shadows of weights that several ranks average whole have the same bits on all of them

        Raises RuntimeError inside `swap`, where live is the average, unless distance=False. *Cost* of the distance: the
        engine settles, live and shadow are read once in chunks, and each rank sends one short message.
        """
        average, profile = self.weights, self.weights.average(which)
        known = average.report(profile)
        if not distance:
            return known

        def measure() -> dict[str, Any]:
            average.refuse("ema.metrics")
            average.reshard()
            average.settle()
            average.follow(replaced=True, newly_trainable=False)
            return metrics.measure(
                profile.averaged, average.clock.started, self._split, self._ranks.size
            )

        self._ranks.begin("metrics")
        _, (apart, agree) = self._ranks.run_on_all("metrics", measure, metrics.compare)
        return known | {"skipped": average.skipped, "distance": apart, "replicas_agree": agree}

    @property
    def model(self) -> nn.Module:
        """The live model, as it was given."""
        return self.weights.model

    @property
    def now(self) -> float:
        """The clock after the last update, in the user's units."""
        return self.weights.clock.at(self.schedule)

    @property
    def schedule(self) -> Schedule:
        """Of the first average."""
        return self.weights.averages[0].schedule

    @property
    def timeout(self) -> float:
        """Seconds that a rank waits for the others to enter a verb (300)."""
        return self._ranks.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._ranks.timeout = seconds
        if self._everyone is not None:
            self._everyone.timeout = seconds

    def names(self) -> list[str]:
        """The canonical names of what is averaged."""
        return [slot.name for slot in self.weights.averages[0].averaged]

    def __len__(self) -> int:
        return len(self.weights.averages[0].averaged)

    def __repr__(self) -> str:
        slots = self.weights.averages[0].averaged
        held = sum(slot.averaged_region.numel for slot in slots)
        total = sum(math.prod(slot.shard.shape) for slot in slots)
        first = next(slot.shadow for slot in slots if slot.shadow is not None)
        dtype = self._dtype if self.weights.teacher is None else first.dtype
        into = (
            ""
            if self.weights.teacher is None
            else f" into {type(self.weights.teacher.module).__name__}"
        )
        schedules = ", ".join(profile.name for profile in self.weights.averages)
        buffers = sum(slot.shard.kind == "buffer" for slot in slots)
        weights = f"{len(self) - buffers} weights" + (f" and {buffers} buffers" if buffers else "")
        return (
            f"EMA({schedules}, {weights}, {held:,} of {total:,} elements here, "
            f"{str(dtype).removeprefix('torch.')}{into}, {first.device}, now={self.now:g})"
        )
