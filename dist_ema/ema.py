"""`class EMA`: every public verb, its documentation, its arguments, the order of calls beneath.

Every collective verb does the same things in the same order. It refuses what is not
allowed now, all ranks enter together, the module tree is walked, and the engine settles. Only then
is the room called that does the work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from numbers import Real
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .averaging import gather, metrics, stepped_weights, teacher
from .averaging.average import OWN, Placement, Selection, refuse_dtype, shadow_device
from .averaging.averages import AveragedWeights
from .averaging.clock import Clock
from .averaging.optimizer_hooks import Attachment
from .averaging.swap import WeightSwap
from .averaging.swap_registry import Reads
from .checkpoint import atomic, dcp, dcp_keys, library_files, stages
from .checkpoint.request import AverageFiles, SaveRequest
from .schedules import Schedule, schedule, schedule_list
from .sharding import derived, parameters, records, torch_internals
from .sharding.ownership import ParamState
from .text import warn
from .verbs.entry import VerbEntry, Which
from .verbs.likely_mistakes import warn_if_doubled, warn_if_idle, warn_of_unexplained_keys
from .verbs.loading import load
from .verbs.publisher import Publication, Publisher
from .verbs.saving import Saving, interval

__all__ = ["EMA"]

P = ParamSpec("P")
T = TypeVar("T")


def _outside_autograd(method: Callable[Concatenate[EMA, P], T]) -> Callable[Concatenate[EMA, P], T]:
    """Run outside autograd and inference mode, whose shadows could not be updated outside it."""

    @wraps(method)
    def run(self: EMA, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def _collective(method: Callable[Concatenate[EMA, P], T]) -> Callable[Concatenate[EMA, P], T]:
    """Outside autograd; an interrupt is an error on the other ranks."""

    @wraps(method)
    def run(self: EMA, *args: P.args, **kwargs: P.kwargs) -> T:
        entry = self._entry
        ranks = entry.needed if method.__name__ in ("gather", "tensors") else entry.ranks
        with ranks.entering(method.__name__):
            return method(self, *args, **kwargs)

    return _outside_autograd(run)  # type: ignore[arg-type]


class EMA:
    """An exponential moving average of a model's weights; each rank keeps its own shard of it.

    Args:
        model: As it will be trained: plain, DDP, FSDP1, FSDP2, HSDP, tensor parallel, compiled,
            checkpointed. Wrap first. Or its parameters, with or without names:
            `model.parameters()`, `model.named_parameters()`. Or the list of the stages of a
            pipeline that this rank holds ([Note: stages]).
        decay: A float (`Constant`), a schedule of `dist_ema`, or a list of them: several averages
            that read each live weight once.
        dtype: The dtype of the shadows: float32, float64, or bfloat16 (compact, rounded
            stochastically).
        device: The device of the shadows; None keeps each beside its weight, "cpu" averages in
            pinned host memory.
        split: Divide replicated weights (DDP, HSDP) among the ranks that hold them. With False
            every rank keeps a full copy: where all weights are replicated (DDP), `swap`, `gather`
            and `export` are local then, and one rank may call them alone. A process group says that
            plain weights are replicated over it, and divides them too.
        buffers: "copy" takes buffers from the live model when the average is used. "average"
            averages the floating ones. A regex or a predicate on names averages those that it
            chooses. "own", with into=, leaves those of the teacher alone.
        only: A regex searched in names, or a predicate on them. The rest is treated like frozen
            weights.
        into: A module, or stages, built and wrapped like the model, whose weights become the
            average ([Note: into]).
        timeout: Seconds that a rank waits for the others to enter a verb; `ema.timeout` changes it
            later.

    Raises:
        ValueError: A weight cannot be averaged, or nothing matches; the weights are named.

    Note:
        *Collective*: construction and every verb but `update`, `attach`, `detach` and `state_dict`.
        *Cost*: 4 bytes per element of this rank's shard (of 1/replicas of it), and 8 MB of scratch.

    [Note: stages]  The stages of a rank are one EMA, each wrapped or not. Weights have the names
    that the stages give them. All ranks of the job call the collective verbs together, and make one
    model of it: one file, one `gather`. Replicas are sought inside a stage alone, on the ranks of
    its wrappers. A weight that stands on two stages must have equal bits, and is written once.

    [Note: into]  Mean teacher, DINO, BYOL: the shadows are the teacher's own memory, in its dtype,
    divided as it is divided. Live overwrites it now and at `load`, and its weights need no gradient
    from now on. Frozen weights follow when live ones are written. Buffers are those of live at the
    last update, averaged, or with `buffers="own"` the teacher's: in training mode its BatchNorm
    keeps statistics of its own, and files hold those. What `only=` leaves out is not touched. Names
    that the teacher alone has stay as they are. The teacher may run, be saved, copied and compiled
    like any module.

    Attributes:
        weights: The `AveragedWeights` of this rank: the extension API for drop-ins and
            integrations.
    """

    @_outside_autograd
    def __init__(
        self,
        model: parameters.ModelOrStages,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        split: bool | dist.ProcessGroup = True,
        buffers: str | Callable[[str], bool] = "copy",
        only: str | Callable[[str], bool] | None = None,
        into: parameters.ModelOrStages | None = None,
        timeout: float = 300.0,
    ) -> None:
        refuse_dtype(dtype)
        schedules, selection = schedule_list(decay), Selection(only, buffers)
        if into is not None:
            teacher.refuse_beside_teacher(schedules, dtype, device)
        elif buffers == OWN:
            raise ValueError("buffers='own' needs into=: the buffers are those of the teacher.")
        device = shadow_device(device)
        if not isinstance(split, (bool, dist.ProcessGroup)):
            raise ValueError(f"split must be True, False or a process group, got {split!r}.")
        # into=: the teacher's memory is the shadow, so nothing is divided.
        placement = Placement(
            split is not False and into is None,
            dtype,
            device,
            None if isinstance(split, bool) else split,
        )
        self.weights = AveragedWeights(
            parameters.module_of(model),
            schedules,
            selection,
            placement,
            None if into is None else parameters.module_of(into),
        )
        arguments = {
            "decay": schedules,
            "dtype": dtype,
            "buffers": buffers,
            "only": only,
            "split": split,
            "into": into is not None,
            # Ranks have accelerators of their own, so their numbers may differ.
            "device": None if device is None else device.type,
        }
        # Collective from here on: a rank whose arguments were refused above never comes, and is
        # named.
        self._entry = VerbEntry(self.weights, arguments, timeout)
        self._saving = Saving(self._entry)
        self._publisher = Publisher(self._entry, self._saving)
        # After the ranks agree: an engine may start a thread.
        self.weights.use_engine()

    # --- update -----------------------------------------------------------------------------------

    @_outside_autograd
    def update(
        self,
        elapsed: float = 1.0,
        *,
        decay: float | Schedule | None = None,
        guard: bool | None = None,
    ) -> None:
        """Move the average towards the live weights. No collective, no host sync.

        Args:
            elapsed: Steps, images or tokens since the last update ([Note: elapsed] in schedules).
            decay: Replaces the schedule for this update alone, for loops that compute a decay
                themselves; 0 copies. The clock moves all the same, and files name the schedule.
            guard: Keep the shadow, element by element, where live is not finite. None: as `attach`
                was asked to.

        Raises:
            RuntimeError: Inside `swap`, or a weight changed its form since the EMA was built.
            ValueError: The schedule cannot take this elapsed.
        """
        weights = self.weights
        weights.refuse("ema.update", Reads.LIVE)
        # A number that a loop computes is checked like a schedule.
        once = None if decay is None else schedule(decay)
        if not weights.clock.started:
            trial = replace(weights.clock)  # an update that is refused begins nothing
            trial.start()
            trial.decays([once or average.schedule for average in weights.averages], float(elapsed))
            weights.begin()
        attached = self._entry.attached
        if guard is None:
            guard = attached is not None and attached.guard
        weights.move(float(elapsed), guard=guard, once=once)
        if attached is not None:
            warn_if_doubled(self._entry)
        weights.before_step()  # no hook will wait for the read
        weights.updated()

    def attach(
        self,
        *optimizers: Optimizer,
        every: int = 1,
        start: int = 0,
        elapsed: float | Callable[[], float] = 1.0,
        overlap: bool | float = True,
        guard: bool = False,
    ) -> Attachment:
        """Update after every step that really happened.

        The average takes weights as the step leaves them. What the loop writes after it (a clamp)
        comes with the next step: call `update` at the end of the loop to average that.

        Args:
            optimizers: All that step the model. An update comes when each has stepped since the
                last one. In a loop of G, D, D that is at the step of G, before the two of D: call
                `update` at the end of the round to average those with it. Under DeepSpeed the
                engine.
            every: Steps between updates; the decay accounts for all of them.
            start: The step at which the shadow is seeded from live and averaging begins.
            elapsed: Units of the clock per step, a number or a callable.
            overlap: Run behind the next forward, on a side stream of an accelerator or in a host
                thread (device="cpu"). False is the bit-identical reference. A share like 0.25
                limits the Triton kernel to as many programs at once as that share of the
                accelerator's multiprocessors; elsewhere it is like True.
            guard: Keep the shadow, element by element, where live is not finite.

        Returns:
            A handle with `remove()`.

        Raises:
            ValueError: An argument is wrong, or an optimizer trains the teacher or cannot be
                hooked: a wrapper may write after its inner step. Call `update` after its `step()`
                then.
            RuntimeError: Something is attached already.
        """
        weights, entry = self.weights, self._entry
        if weights.teacher is not None:
            weights.teacher.refuse_training(optimizers)
        # Before anything is hooked, so that a refusal leaves nothing behind.
        stepped_weights.refuse_beside_masters(weights.averages[0].averaged, optimizers)
        if entry.attached is not None:
            raise RuntimeError(
                "ema.attach() was called before. Call ema.detach() first, or list all optimizers "
                "in one call."
            )
        if not (isinstance(overlap, Real) and 0 <= overlap <= 1):
            raise ValueError(
                f"overlap must be True, False or a share between 0 and 1, got {overlap!r}."
            )
        weights.use_engine(overlap)
        # The engine is chosen by now: `overlap` is known to the first hook.
        attachment = Attachment(weights, optimizers, every, start, elapsed, guard)
        attachment.arguments = {
            "attach(every=)": every,
            "attach(start=)": start,
            "attach(elapsed=)": elapsed,
            "attach(guard=)": guard,
            "attach(overlap=)": overlap,
            # A rank may hold more stages than another.
            "attach(optimizers=)": 0 if entry.is_staged else len(optimizers),
        }
        entry.attachment = attachment
        stepped_weights.warn_of_others(weights, optimizers)
        return attachment

    def detach(self) -> None:
        """Take off what `attach` put on the optimizers. Idempotent."""
        if self._entry.attachment is not None:
            self._entry.attachment.remove()

    @_outside_autograd
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> EMA:
        """Move the shadows to `device` and cast them to `dtype`; None leaves that as it is.

        The update in flight is waited for, and what `attach` put on stays: the next updates run
        where the shadows lie now. A cast to bfloat16 rounds to nearest. No collective, but call it
        alike on every rank.

        Args:
            device: Where the shadows go.
            dtype: float32, float64 or bfloat16.

        Returns:
            The EMA.

        Raises:
            RuntimeError: Inside `swap`, or with into=, where the shadows are the teacher's weights.
            ValueError: The dtype is none of float32, float64 and bfloat16, or the device is none.

        Note:
            *Cost*: the old shadows and the new ones together, until it returns.
        """
        weights = self.weights
        if dtype is not None:
            refuse_dtype(dtype)
        device = shadow_device(device)
        if weights.teacher is not None:
            raise RuntimeError(
                "ema.to() of an EMA with into=: the shadows are the teacher's weights. Build the "
                "EMA after teacher.to(...)."
            )
        weights.refuse("ema.to", Reads.SHADOWS)
        weights.ready()
        placement = weights.placement
        dtype = dtype or placement.dtype
        device = device or placement.device
        if (dtype, device) != (placement.dtype, placement.device):
            weights.reallocate(dtype, device)
        return self

    # --- the average in use -----------------------------------------------------------------------

    @contextmanager
    def swap(self, which: Which = 0) -> Iterator[EMA]:
        """Put the average into the model, weights and buffers, for the block. *Collective*.

        Live weights and buffers are restored bit for bit, whatever the block raises, and so are
        shadows that the block did not write. What it writes is named in a warning at the exit:

        - A swapped weight (Embedding(max_norm), a clamp): the write becomes the average's, in every
          dtype, placement and wrapper; of replicas, the owner's.
        - Another weight (a merge by hand): the write stays, nothing is restored. One through
          `.data` or NumPy is not noticed, but merge_adapter() that is left merged is.
        - A persistent buffer (BatchNorm, an observer): all persistent buffers of its module become
          the average's own, until `reset_buffers()`, unless one of them changed its shape.

        Caches of weights are dropped at both ends: `parametrize.cached()`, autocast, and what a
        module in eval mode drops in its own `train(True)`. Serialise inside the block:
        `state_dict()` refers to the model's memory, and holds live weights again after the block.

        A rank that leaves by an exception makes the others raise RuntimeError at their exit, after
        restoring. The exit waits for ranks that are still in the block, however long they evaluate.
        One that died or was stopped there is named after `timeout` seconds. With `split=False` on
        replicated weights the swap is local, and no rank waits for another. An interrupt (Ctrl-C,
        an alarm) comes when the ranks are whole again; a second one, or `timeout` seconds after the
        first, does not wait for other ranks.

        Args:
            which: Which of several averages, by number or schedule, here and in the other verbs.

        Raises:
            RuntimeError: Inside another swap of this EMA, or the model cannot be reached. At the
                exit: the swap of another EMA that was entered inside is still open. If a broadcast
                to replicas fails, they hold parts of the average: the EMA refuses every verb until
                the model's weights were loaded again, and then the average by `load`.

        Note:
            *Cost*: 4 MB where shadow and weight have one dtype, else a copy of this rank's shard.
            Two reads of the averaged elements, to notice writes.
        """
        # One exchange: after it the ranks are in their blocks, and their exits tell of errors.
        with self._entry.needed.entering("swap", exchanges=1):
            swap = self._prepare_swap(which)
            error: BaseException | None = None
            try:
                try:
                    swap.enter()
                    # An evaluation may take longer than the timeout of the ranks that are done.
                    with swap.ranks.heartbeats():
                        yield self
                except BaseException as caught:
                    error = caught
                    raise
                finally:
                    swap.leave(error)
            finally:
                swap.leave(error)  # after an interrupt between the lines above; else idempotent
            # After the weights are restored: a warning may be an error in the caller's tests.
            warn(*swap.remarks)

    @_outside_autograd
    def _prepare_swap(self, which: Which) -> WeightSwap:
        weights = self.weights

        def prepare() -> None:
            if weights.teacher is not None:
                raise RuntimeError(
                    "ema.swap() of an EMA with into=: the teacher is the average, so evaluate the "
                    "teacher."
                )
            if torch_internals.frozen_by_inductor(weights.model):
                raise RuntimeError(
                    "ema.swap() cannot reach what was compiled with "
                    "torch._inductor.config.freezing: turn it off."
                )
            # peft's layers compute with base weights in which the adapter is merged.
            if merged := derived.merged_modules(weights.model):
                raise RuntimeError(
                    f"ema.swap() while adapters are merged into {', '.join(merged[:5])}: the model "
                    "computes with what was merged, which is live. Call unmerge_adapter() before."
                )
            weights.ready()

        ranks = self._entry.needed
        average = self._entry.begin("swap", Reads.SHADOWS, which, prepare, ranks=ranks)
        warn_if_idle("swap", weights)
        # Nothing has been written: an error up to here leaves the model alone.
        return WeightSwap(weights, average, ranks, self._entry.leads(ranks))

    @_collective
    def gather(self, which: Which = 0) -> dict[str, Tensor]:
        """The complete state_dict, on the host of the first rank; {} elsewhere. *Collective*.

        Averaged weights come in the shadows' dtype, frozen weights and buffers from the live model,
        with every alias: it passes `load_state_dict(strict=True)`.

        Note:
            With `split=False` on replicated weights it is local, and every rank that calls it gets
            the state_dict. *Cost*: the model on the first rank's host, 16 MB windows elsewhere.
        """
        entry, ranks = self._entry, self._entry.needed
        average = entry.begin("gather", Reads.WHOLE_MODEL, which, ranks=ranks)
        warn_if_idle("gather", self.weights)
        warn_of_unexplained_keys("gather", self.weights)
        # What the weights of other stages are; None where all ranks know all of them.
        forms: dict[str, gather.Form] | None = None
        if entry.is_staged:
            entry.compare_shared("gather")
            files = [AverageFiles(average.persistent, average.own_buffers, {})]
            forms = stages.forms(*stages.unite("gather", ranks, entry.stage, files))
        return gather.full(ranks, average.persistent, average.own_buffers, forms)

    @_collective
    def tensors(self, which: Which = 0) -> Iterator[tuple[str, Tensor]]:
        """Each averaged or frozen weight in turn, full, on every rank. *Collective*, to the end.

        No second model is made, and the live model is not touched: for transports that send the
        average to an inference server (`dist_ema.integrations.vllm.EMASource`). Buffers are left
        out. Do not train before the last weight has come.

        Args:
            which: See `swap`.

        Note:
            *Cost*: 256 MB of full weights at a time, or one weight.
        """
        self._entry.refuse_staged("tensors")
        ranks = self._entry.needed
        average = self._entry.begin("tensors", Reads.WHOLE_MODEL, which, ranks=ranks)
        states = [state for state in average.persistent if state.shard.kind != "buffer"]
        return gather.full_weights(ranks, states, average.own_buffers)

    @_collective
    def copy_to(self, module: parameters.Model, which: Which = 0) -> None:
        """Write the average into another model, however it is wrapped. *Collective*.

        Frozen weights and buffers are written too.

        Args:
            module: Or its parameters, in the order or under the names that this EMA was given.
            which: See `swap`.

        Raises:
            ValueError: The two models do not hold the same weights; they are named.
        """
        self._entry.refuse_staged("copy_to")
        average = self._entry.begin("copy_to", Reads.WHOLE_MODEL, which)
        target = parameters.module_of(module)  # once: parameters may come from a generator
        # Modules may hold values that they computed from their weights.
        with derived.caches_dropped(target):
            gather.copy_into(self._entry.ranks, average.persistent, average.own_buffers, target)
        self.weights.mark()

    # --- files ------------------------------------------------------------------------------------

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
        """Write a folder to resume from, itself a safetensors model. *Collective*, atomic.

        With `only=` the folder holds the averaged weights alone. The first of several averages lies
        in the folder, the others under averages/. For a PeftModel whose averaged weights belong to
        one adapter it holds that adapter, and `PeftModel.from_pretrained` opens it.

        Args:
            path: The folder.
            max_shard_size: The size limit of each file: bytes, or a text like "5GB".
            mode: "direct": every rank writes its own bytes into place. "stream": bytes go to the
                machine that writes them, all machines at once; on one machine to the first rank.
                None: direct on one machine, stream across machines.
            extra: A dict of JSON values to keep in ema.json; finite numbers only.
            keep: `path` must end in a number. Keep the highest numbers of the folders that
                are called alike, up to this one. The file `latest` beside them names this one, and
                `load` follows it.
            wait: False copies what this rank writes to the host and returns; a thread writes behind
                training. The next save or export waits for it and raises what went wrong; the end
                of the program waits too.

        Note:
            *Cost*: no gather. With wait=False this rank's share once more in host memory, until it
            is written.
        """
        saving = self._saving
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "mode": mode, "keep": keep}
        request = partial(saving.all_averages, path, "ema", mixed=True, extra=extra, **options)
        arguments = {"path": os.fspath(path), "extra": extra, "wait": wait} | options
        saving.write("save", request, arguments, wait=wait)

    @_outside_autograd
    def export(
        self,
        path: str | Path,
        *,
        which: Which = 0,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        mode: Literal["direct", "stream"] | None = None,
        merged: bool = False,
    ) -> None:
        """Write the file to ship: the complete model, in its own dtypes or `dtype`. *Collective*.

        A model of transformers or diffusers gives the folder its config.json. For a PeftModel whose
        averaged weights all belong to adapters the folder holds the adapters, as `save_pretrained`
        lays them out: the one called default in it, another one in a folder of its own name.

        Args:
            path: A folder (what else it holds, like config.json, stays), or one file ending in
                .safetensors.
            which: See `swap`.
            dtype: The dtype of all floating weights.
            max_shard_size: See `save`.
            mode: See `save`.
            merged: Write the model of a PeftModel with the active adapters merged into it, under
                the names that it has without them. It is written inside a `swap`, with a copy of
                the weights that adapters sit on.

        Raises:
            ValueError: A finite value would become infinite in `dtype`, or `merged` is asked of
                what cannot be merged.

        Note:
            With `split=False` on replicated weights it is local: every rank that calls it writes
            the files, one rank after another.
        """
        model, saving, target = self.weights.model, self._saving, atomic.real(path)
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "mode": mode, "dtype": dtype}
        arguments = {"path": os.fspath(path), "merged": merged} | options

        def request(
            form: library_files.FileForm, states: list[ParamState] | None = None
        ) -> SaveRequest:
            average, where = self.weights.used(which), target / form.folder
            return saving.one_average("export", where, average, form, merged=states, **options)

        if merged:
            saving.finish()
            persistent = self.weights.average(which).persistent
            with self.swap(which), library_files.merged(model, persistent, dtype) as (states, form):
                saving.submit(request(form, states), self._entry.needed, which, arguments)
            return
        one_file = target.suffix == ".safetensors"
        forms = [] if one_file else library_files.adapters_of(model, self.names())
        for form in forms or [library_files.complete_form(model, dtype)]:
            saving.write("export", partial(request, form), arguments, which)

    @_outside_autograd
    def snapshot(
        self, folder: str | Path, *, every: float, dtype: torch.dtype | None = None
    ) -> Path | None:
        """Save all averages as folder/0000001000 when the clock passes a multiple of `every`.

        Call it in each step. `posthoc.reconstruct` chooses a decay from such snapshots after
        training. *Collective* when it saves; all ranks know by their clocks.

        Args:
            folder: Where the snapshots lie.
            every: Units of the clock between two of them.
            dtype: torch.bfloat16 stores half; such a snapshot has no clock to resume with.

        Returns:
            The path, or None where nothing was saved.
        """
        every = interval(every)
        if not self._saving.passes("snapshot", folder, every):
            return None
        # Ten digits, so that names sort as their clocks do; a fraction where epochs are counted.
        now = round(self.weights.clock.now, 6)
        path = atomic.real(Path(folder) / f"{int(now):010}{f'{now % 1:.6f}'[1:].rstrip('.0')}")
        # The first rank alone, as listing a network folder is slow.
        folders = path.parent.glob("[0-9]*") if self._entry.ranks.first else ()
        names = [saved.name for saved in folders]
        clocks = {name: float(name) for name in names if name.replace(".", "", 1).isdecimal()}
        later = [name for name in sorted(clocks, key=clocks.__getitem__) if clocks[name] > now]
        if later:
            warn(
                f"{folder} holds snapshots of a later clock ({later[0]} ...). If they are of "
                "another run, move them away: averages of two runs cannot be mixed."
            )
        kind = "export" if dtype else "ema"
        saving = self._saving
        request = partial(saving.all_averages, path, kind, mixed=False, dtype=dtype, numbered=True)
        arguments = {"folder": os.fspath(folder), "every": every, "dtype": dtype}
        saving.write("save", request, arguments)
        return path

    @_collective
    def publish(
        self,
        folder: str | Path,
        *,
        every: float = 1000,
        keep: int = 3,
        keep_at_most: int | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
        which: Which = 0,
        beside: str | Path | None = None,
        max_shard_size: int | str = "5GB",
        mode: Literal["direct", "stream"] | None = None,
    ) -> Publication:
        """From now on, publish a version each time the clock passes a multiple of `every`.

        A version is a complete model in `folder`/version-000001 and so on, written behind training,
        and never changed. For a PeftModel whose averaged weights all belong to one adapter it is
        that adapter, in peft's form. `dist_ema.follow` and `dist-ema watch` pick versions up. A
        version that is due while an earlier one is written is skipped and counted. What the disk
        refuses is a warning, and training goes on. *Collective*, as is each update that publishes.

        Args:
            folder: The folder of the versions. One training publishes to it at a time.
            every: Units of the clock between two versions.
            keep: The versions that stay. A version that a reader has leased stays too, and so does
                the one that `best` names.
            keep_at_most: The versions that stay in all, leased or not; by default 4 x keep.
            dtype: The dtype of all floating weights; None takes the model's own.
            which: See `swap`.
            beside: A folder whose config.json, tokenizer and other files without weights each
                version gets too, as links where the disk has them, for loaders that need them.
            max_shard_size: See `save`.
            mode: See `save`.

        Returns:
            A handle with `remove()`, counters, and `metrics`, which go into the next versions.

        Raises:
            RuntimeError: This EMA publishes already.
            ValueError: An argument is wrong.

        Note:
            *Cost* to the step that publishes: one copy of this rank's share into host memory.
        """
        form = {"dtype": dtype, "max_shard_size": max_shard_size, "mode": mode}
        return self._publisher.begin(folder, every, keep, keep_at_most, which, beside, form)

    @_collective
    def load(self, path: str | Path, *, strict: bool = True, verify: bool = True) -> None:
        """Go on from a saved average, of any world size and wrapper. *Collective*.

        The live model is not touched.

        Args:
            path: What `save` wrote is resumed with its clock; an EMA whose `attach(start=...)` is
                not reached goes on too. Any other safetensors model (an export, a Hugging Face
                folder, its index, one file) is a start: the averaged weights are read, in any
                floating dtype. The clock is that of a new EMA, and frozen weights and buffers in
                the file are passed over.
            strict: Names must agree. With False, weights that the folder lacks start from live,
                weights that the model lacks are left out, and a warning names them. Another shape
                always raises, as its values would be lost.
            verify: Compare the files' check sums first, each rank a part of every file. Only what
                dist_ema wrote has them.

        Raises:
            ValueError: The folder is damaged, or differs from the model; all differences are named.
                Nothing has changed.
            RuntimeError: The disk failed while reading. The average is a new one then: equal to
                live, its clock at 0.

        Note:
            *Cost*: only the slices that this rank keeps are read, through a window of 4 MB.
        """
        self._saving.finish()
        arguments = {"path": os.fspath(path), "strict": strict, "verify": verify}
        self._entry.begin("load", Reads.LIVE | Reads.REPLACED, arguments=arguments)
        load(self._entry, path, strict=strict, verify=verify)

    # --- state_dict, for torch.distributed.checkpoint ---------------------------------------------

    @_outside_autograd
    def state_dict(self) -> dict[str, Any]:
        """Tensors for `dcp.save({"ema": ema})` and `dcp.load`, under any wrapper.

        *Aliases* the shadows.

        Weights are plain tensors where this rank averages all of one, else `FlatRange`.
        """
        weights = self.weights
        if any(average.ring for average in weights.averages):
            raise RuntimeError(
                "ema.state_dict() of an EMA with a Window: DCP's keys must not depend on how many "
                "blocks are full. Save and load it by ema.save() and ema.load()."
            )
        weights.refuse("ema.state_dict", Reads.WHOLE_MODEL)
        weights.ready()
        # Numbers in a tensor, because DCP pickles all else.
        clock = [float(value) for value in weights.clock_to_dict().values()]
        return {
            "averages": dcp_keys.Averages(weights.averages),
            "clock": torch.tensor(clock, dtype=torch.float64, device="cpu"),
        }

    @_collective
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave and DCP filled, or full weights by name. *Collective*.

        An average that was saved with another schedule goes on with that of this EMA, and a
        warning names both.

        Raises:
            ValueError: Something is missing or does not fit (RuntimeError on other ranks). Nothing
                has changed then.
        """
        weights = self.weights

        def check() -> tuple[dict[str, Any], tuple[list[dcp.Matched], list[str]]]:
            names, saved = list(weights.clock_to_dict()), state.get("clock")
            if not isinstance(saved, Tensor) or saved.shape != (len(names),):
                raise ValueError(
                    f"the state_dict of the EMA lacks clock, a tensor of {len(names)} numbers. "
                    "Pass what ema.state_dict() gave."
                )
            clock = dict(zip(names, saved.tolist(), strict=True))
            # Refuses what is unsound before anything is changed.
            Clock().set(clock)
            return clock, dcp_keys.match_all(state.get("averages", {}), weights.averages)

        self._entry.begin("load_state_dict", Reads.SHADOWS | Reads.REPLACED)
        clock, (matched, remarks) = self._entry.ranks.run_on_all("load_state_dict", check)
        warn(*remarks)
        for average, (copies, own_buffers) in zip(weights.averages, matched, strict=True):
            for shadow, value in copies:
                shadow.copy_(value)
            average.own_buffers = {} if weights.teacher else dict(own_buffers)
        weights.resume(clock)

    # --- the rest ---------------------------------------------------------------------------------

    @_collective
    def reset(self) -> None:
        """Begin again: the shadow is live, the clock 0, no buffer recalibrated. *Collective*."""
        self._entry.begin("reset", Reads.LIVE)
        attached = self._entry.attached
        # With a start the new average begins there, as the first one did.
        late = attached is not None and attached.start > 0
        self.weights.begin_again(started=not late)

    def reset_buffers(self) -> None:
        """Forget recalibrated buffers: the average takes the live model's again."""
        self.weights.refuse("ema.reset_buffers", Reads.SHADOWS)
        for average in self.weights.averages:
            average.own_buffers = {}

    @_collective
    def rescan(self) -> None:
        """Take the model for what it is now. *Collective*.

        A weight that was replaced, added or unfrozen is averaged from now on, seeded from live.
        What is gone is dropped. Everything else keeps its average.
        """
        weights = self.weights
        model_shards: list[records.ModelShards] = []

        def prepare() -> None:
            weights.reshard()
            weights.settle()
            # Found inside the verb: what fails on one rank is told to all.
            model_shards.append(weights.find(self.timeout))

        self._entry.begin("rescan", Reads.WHOLE_MODEL, prepare=prepare)
        self._entry.adopt("rescan", model_shards[0])

    @_outside_autograd
    def metrics(self, which: Which = 0, *, distance: bool = True) -> dict[str, float]:
        """The metrics of an average, as plain numbers to log.

        | key | meaning |
        | --- | --- |
        | decay, half_life | of the last update, in units of the clock |
        | now, updates | the clock; moves of the shadow, skipped ones included |
        | bytes | of shadows beside their weights, on this rank |
        | pinned | bytes in host memory on this rank, windows included |
        | update_ms | the time that the last finished update took, 0 before the first |
        | stall_ms | what it added to the step: the wait of the device, or the work in the hook |
        | lag | updates submitted but not finished |
        | skipped | updates that the device refused; with distance=False as far as it is known |
        | distance | norm(live - average) / norm(live) of the model, each element counted once |
        | replicas_agree | copies on several ranks have the same bits: shadows, a sample of live |

        Args:
            which: See `swap`.
            distance: False leaves out distance and replicas_agree. Then the verb is local and never
                waits, for loops that log on one rank only; else it is *collective*.

        Raises:
            RuntimeError: Inside `swap`, where live is the average, unless distance=False.

        Note:
            *Cost* of the distance: the engine settles, live and shadow are read once in windows,
            and each rank sends one short message.
        """
        weights, entry = self.weights, self._entry
        host_metrics = metrics.known(weights, weights.average(which))
        if not distance:
            return host_metrics

        def measure() -> dict[str, Any]:
            weights.refuse("ema.metrics", Reads.LIVE)
            weights.reshard()
            weights.settle()
            weights.follow(tree=True)
            # A window is mixed from its ring only after updates have settled.
            average = weights.used(which)
            return metrics.measure(
                average.averaged,
                weights.clock.started,
                weights.placement.split,
                entry.ranks,
                len(entry.stage),
            )

        with entry.ranks.entering("metrics"):
            if entry.is_staged:
                entry.begin("metrics", Reads.LIVE, which)
                entry.compare_shared("metrics")
            entry.ranks.begin("metrics", entry.common(which, {}))
            _, (apart, alike) = entry.ranks.run_and_reduce(
                "metrics", measure, metrics.combine, metrics.conclude
            )
        return host_metrics | {
            "skipped": weights.skipped,
            "distance": apart,
            "replicas_agree": alike,
        }

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
        """The schedule of the first average."""
        return self.weights.averages[0].schedule

    @property
    def timeout(self) -> float:
        """Seconds that a rank waits for the others to enter a verb."""
        return self._entry.ranks.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._entry.set_timeout(seconds)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an EMA can be neither copied nor pickled, nor can a module that owns one: it "
            "averages one model in place. Build another EMA for a copy of the model, and carry "
            "the average over with save() and load()."
        )

    def names(self) -> list[str]:
        """The canonical names of what is averaged."""
        return self.weights.names()

    def __len__(self) -> int:
        return len(self.weights.averages[0].averaged)

    def __repr__(self) -> str:
        weights = self.weights
        states = weights.averages[0].averaged
        held = sum(state.averaged_region.numel for state in states)
        total = sum(math.prod(state.shard.shape) for state in states)
        shadows = (state.shadow for state in states if state.shadow is not None)
        first = next(shadows, torch.empty(0))  # a stage may have nothing to average
        dtype = first.dtype if weights.teacher else weights.placement.dtype
        into = f" into {type(weights.teacher.module).__name__}" if weights.teacher else ""
        schedules = ", ".join(average.name for average in weights.averages)
        buffers = sum(state.shard.kind == "buffer" for state in states)
        count = f"{len(self) - buffers} weights" + (f" and {buffers} buffers" if buffers else "")
        return (
            f"EMA({schedules}, {count}, {held:,} of {total:,} elements here, "
            f"{str(dtype).removeprefix('torch.')}{into}, {first.device}, now={self.now:g})"
        )
