"""Precise BN: `recalibrate` gives BatchNorm the statistics of the weights in the model now.

    with ema.swap():
        recalibrate(model, loader)      # the average keeps these statistics, live restores its own

A running mean lags behind moving weights, and it never fits averaged ones. Here a number of batches
go through the model, and every BatchNorm takes the mean and variance of all that it saw. Each layer
normalises by its own batch, as it does in training (Wu & Johnson 2021, section 3).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, suppress
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import collectives
from ..distributed.ranks import Ranks
from ..sharding import derived, discovery, torch_internals, wrappers
from ..text import warn
from .layer_watch import LayerWatch, Moments, watched

__all__ = ["recalibrate"]

LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_END = object()
_Steps = Generator[tuple[Any, bool], None, None]  # a batch, and whether it counts


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    num_batches: int = 200,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Give every BatchNorm of `model` the mean and variance of what it sees over `loader`.

    The statistics are those of the data of all ranks together, and equal on all ranks. The variance
    is the unbiased one, as BatchNorm keeps it. The singular vectors of every spectral norm, in both
    styles, are refreshed by power iterations for the weights that the model holds now. Nothing else
    changes, and if anything raises, nothing does.

    Args:
        model: The model, in any wrapper.
        loader: The batches of this rank. Ranks may have different numbers and sizes of batches.
        num_batches: How many batches each rank runs at most.
        forward: Calls the model with a batch. By default tuples and lists give their first element
            and mappings their values as keywords, on the model's device.
        progress: Show a bar on the first rank, if stderr is a terminal.
        group: The ranks whose data count, where no wrapper defines them.

    Returns:
        The number of batches that this rank ran.

    Raises:
        ValueError: `num_batches` is no whole number from 1, `group` does not hold this rank, or the
            model has neither a BatchNorm that tracks statistics nor a spectral norm. Or there is no
            data, or a layer, which is named, saw NaN, infinity or what its dtype cannot hold.

    Note:
        *Collective*: one reduction per layer. *Cost*: one layer's input in float64 at a time. A
        layer that the forward does not reach keeps its statistics, with a warning.
    """
    if not hasattr(num_batches, "__index__") or num_batches < 1:
        raise ValueError(f"num_batches must be a whole number, at least 1, got {num_batches!r}.")
    inner = wrappers.unwrapped(model)
    layers = {
        name or type(m).__name__: m
        for name, m in inner.named_modules()
        if isinstance(m, LAYERS) and m.running_mean is not None
    }
    with derived.refreshed_vectors(inner) as vectors:
        if not layers and not vectors:
            raise ValueError(
                f"{type(inner).__name__} has no BatchNorm that tracks statistics and no spectral "
                "norm: nothing to recalibrate."
            )
        return _recalibrate(
            model, inner, layers, vectors, loader, num_batches, forward, progress, group
        )


def _recalibrate(
    model: nn.Module,
    inner: nn.Module,
    layers: dict[str, Any],
    vectors: list[Tensor],
    loader: Iterable[Any],
    num_batches: int,
    forward: Callable[[nn.Module, Any], Any] | None,
    progress: bool,
    group: dist.ProcessGroup | None,
) -> int:
    model_shards = discovery.find_shards(model)
    members = model_shards.members if group is None else _members_of(group)
    group = group or model_shards.group
    ranks = Ranks(
        members,
        group,
        torch_internals.side_store,
        device=model_shards.device,
        verb="recalibrate",
    )
    watch = LayerWatch({name: Moments.none(layer.running_mean) for name, layer in layers.items()})
    steps = _steps(loader, num_batches, ranks if model_shards.sharded else None)
    if progress and ranks.first and sys.stderr.isatty():
        steps = _under_bar(steps, loader, num_batches)

    def run() -> list[int]:
        with (
            closing(steps),  # a bar leaves the terminal at once, whatever is raised
            watched(inner, layers, watch),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            for batch, watch.counting in steps:
                (forward or _forward)(inner, batch)
                watch.batches += watch.counting
        return [ranks.rank] if watch.batches else []

    # The lowest rank with data: ranks with other batches iterated vectors another number of times.
    source = ranks.run_and_reduce("recalibrate", run, _lowest)[1]
    if not source:
        raise ValueError("recalibrate() saw no data: the loader gave no batch on any rank.")
    moments: dict[str, Moments] = {}

    def share() -> None:
        if ranks.group is not None and vectors:
            collectives.broadcast(
                [(source[0], vector) for vector in vectors], ranks.group, ranks.wait_for
            )
        moments.update((name, local.over(ranks)) for name, local in watch.moments.items())

    ranks.run_transfer("recalibrate", share)
    _refuse(moments, layers)
    with torch.no_grad():
        for name, module in layers.items():
            if moments[name].count:
                module.running_mean.copy_(moments[name].mean)  # type: ignore[union-attr]
                module.running_var.copy_(moments[name].variance)  # type: ignore[union-attr]
    return watch.batches


def _members_of(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group, this one among them."""
    # torch gives who is not in a new group another object, or the group all the same.
    if isinstance(group, dist.ProcessGroup):
        members = dist.get_process_group_ranks(group)
        if dist.get_rank() in members:
            return members
    raise ValueError(
        "recalibrate(group=) must be a process group that holds this rank. Call it on the ranks of "
        "the group alone."
    )


def _lowest(ranks: list[list[int]]) -> list[int]:
    return sorted(rank for announced in ranks for rank in announced)[:1]


# --- running the batches --------------------------------------------------------------------------


def _steps(loader: Iterable[Any], most: int, sharded: Ranks | None) -> _Steps:
    """Batches, and whether each counts.

    NOTE: a sharded forward is collective. So a rank that has run out of data repeats its last
    batch, uncounted, until all have.
    """
    batches = islice(loader, most)
    if sharded is None:
        yield from ((batch, True) for batch in batches)
        return
    last: Any = _END
    while True:
        batch, failure = _END, None
        try:
            batch = next(batches, _END)
        except Exception as error:  # raised when all know, as they would wait in the forward
            failure = error
        last = batch if batch is not _END else last
        more, lacking, failed = _any(sharded, batch is not _END, last is _END, failure is not None)
        if failure is not None:
            raise failure
        if failed or not more:
            return
        if lacking:
            raise ValueError(
                "recalibrate() of a sharded model needs at least one batch on every rank."
            )
        yield last, batch is not _END


def _any(ranks: Ranks, *flags: bool) -> list[bool]:
    """Whether each is true on some rank. *Collective*."""
    on_any = torch.tensor(flags, dtype=torch.float32, device=ranks.transfer_device())
    if ranks.size > 1:
        dist.all_reduce(on_any, dist.ReduceOp.MAX, group=ranks.group)
    return [bool(flag) for flag in on_any.tolist()]


def _forward(model: nn.Module, batch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def on_device(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: on_device(value) for key, value in batch.items()})
    return model(on_device(batch[0] if isinstance(batch, (tuple, list)) else batch))


def _under_bar(steps: _Steps, loader: Iterable[Any], most: int) -> _Steps:
    from rich.console import Console
    from rich.progress import Progress

    total = most
    with suppress(TypeError):  # a DataLoader of an iterable dataset has a length until it is asked
        total = min(most, len(loader))  # type: ignore[arg-type]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(steps, total, description="BatchNorm statistics")


# --- what must not be written ---------------------------------------------------------------------


def _refuse(moments: Mapping[str, Moments], layers: Mapping[str, Any]) -> None:
    """Raise for statistics that must not be written, the same way on every rank."""
    unreached = [name for name, seen in moments.items() if seen.count == 0]
    if moments and len(unreached) == len(moments):
        raise ValueError(
            "recalibrate() saw no data: the loader gave no batch on any rank, or no BatchNorm was "
            "reached."
        )
    problems = {name: seen.problem(layers[name]) for name, seen in moments.items() if seen.count}
    first = next(filter(None, problems.values()), "")
    if first:
        named = [name for name, problem in problems.items() if problem == first]
        raise ValueError(f"{', '.join(named[:5])} {first}")
    if unreached:
        warn(f"{', '.join(unreached[:5])} was not reached and keeps its statistics.")
