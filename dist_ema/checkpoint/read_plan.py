"""`ReadPlan`: which saved weight fills which average; `Differences` of a saved form and a model.

The averages that are to be filled are paired with the saved ones by their schedules, and weights by
their names. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..averaging.average import whole_modules
from ..schedules import from_dict
from ..sharding import geometry, ownership
from ..text import some
from . import location, manifest, open_file, safetensors

__all__ = [
    "Differences",
    "LoadTarget",
    "ReadPlan",
    "converts",
    "match_schedules",
    "plan_resume",
    "plan_start",
]


class LoadTarget(NamedTuple):
    """An average that is to be filled."""

    schedule: dict[str, Any]
    states: list[ownership.ParamState]  # of all that the model persists
    names: dict[str, str]  # name in the files -> the model's, where they differ
    elsewhere: frozenset[str] = frozenset()  # what the model holds elsewhere, or will


@dataclass
class Differences:
    """How one folder and the model differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    of_another_kind: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)  # which is no difference that matters

    @property
    def _lists(self) -> dict[str, list[str]]:
        return {what: names for what, names in vars(self).items() if what != "passed_over"}

    @property
    def count(self) -> int:
        return sum(map(len, self._lists.values()))

    @property
    def are_fatal(self) -> bool:
        """Whether nothing can be loaded, with strict=False either."""
        return bool(self.reshaped or self.of_another_kind)

    def text(self) -> str:
        """`1 missing (a), 2 reshaped (b: ...; c: ...)`"""
        return ", ".join(
            f"{len(names)} {what.replace('_', ' ')} ({some(names, between='; ')})"
            for what, names in self._lists.items()
            if names
        )

    def warnings(self, folder: Path) -> Iterator[str]:
        """One sentence for each kind of difference that does no harm."""
        for names, text in (
            (self.missing, "lacks {}: what is averaged starts from the live value there."),
            (self.unexpected, "holds {}, which the model lacks: left out."),
            (
                self.passed_over,
                "holds recalibrated buffers ({}) of a module whose buffers are others now: the "
                "average uses the model's.",
            ),
        ):
            if names:
                yield f"{folder} {text.format(some(names, between='; '))}"


@dataclass
class ReadPlan:
    """The source of one average, and, once it was compared, the weights that fill it."""

    folder: Path
    target: LoadTarget
    aliases: location.Aliases
    model: str = "model.safetensors"
    whole: bool = False  # the folder must hold the complete model, not only what is averaged
    own_buffers: Sequence[str] = ()
    listed: dict[str, dict[str, Any]] | None = None  # size and check sum of its files, if known
    chosen: dict[str, open_file.OpenWeight] = field(default_factory=dict)  # by the model's names
    differences: Differences = field(default_factory=Differences)

    def compare(self, saved_weights: dict[str, open_file.OpenWeight]) -> None:
        """Choose from the weights of the folder, and note every difference."""
        report, states = self.differences, self.target.states
        saved_weights = {
            self.target.names.get(name, name): weight for name, weight in saved_weights.items()
        }
        # Own buffers that nothing in the files fills.
        lost = set(self.own_buffers)
        state_names = {name for state in states for name in state.shard.names}
        report.unexpected += sorted(saved_weights.keys() - state_names - self.target.elsewhere)
        for state in states:
            names = [name for name in state.shard.names if name in saved_weights]
            # Names that the file ties are one weight there; others must hold the same bytes.
            held = list(dict.fromkeys(saved_weights[name] for name in names))
            own = state.name in self.own_buffers
            wanted = self.whole or own or state.shadow is not None
            if not wanted and (state.teacher_copy is None or not held):
                continue  # what a teacher holds beside the average is taken where it is
            if not held:
                report.missing.append(state.name)
            elif state.is_copied_buffer and not own:
                continue  # the live model's counts, in whatever shape it has
            elif held[0].entry.shape != state.shard.shape:
                # NOTE: observers and growing banks change their shape after recalibration.
                if not state.is_copied_buffer:
                    on_disk, shape = held[0].entry.shape, state.shard.shape
                    report.reshaped.append(f"{state.name}: {on_disk} on disk, {shape} in the model")
            elif not converts(held[0].dtype, state.average.dtype):
                report.of_another_kind.append(
                    f"{state.name}: {held[0].dtype} on disk, {state.average.dtype} in the model"
                )
            else:
                _refuse_untied(state, held)
                self.chosen[state.name] = held[0]
                lost.discard(state.name)
        self._keep_whole_modules(lost)

    def _keep_whole_modules(self, lost: set[str]) -> None:
        """Own buffers of a module that lacks one of these, or has it otherwise, are passed over."""
        kept = whole_modules(self.own_buffers, lost)
        target_names = {state.name for state in self.target.states}
        self.differences.passed_over += sorted(
            target_names.intersection(self.own_buffers).difference(kept)
        )
        self.own_buffers = kept

    def frozen_warnings(self, saved: manifest.Manifest, where: str) -> Iterator[str]:
        """Sentences on what is averaged now and was frozen when it was saved, or the reverse."""
        saved_names = set(saved.averaged).union(
            *(saved.aliases.get(name, ()) for name in saved.averaged)
        )
        was_averaged = {self.target.names.get(name, name) for name in saved_names}
        thawed = sorted(
            state.name
            for state in self.target.states
            if state.shadow is not None and state.name in self.chosen.keys() - was_averaged
        )
        if thawed:
            yield f"{where} holds live values of {', '.join(thawed[:5])}, which were frozen then."
        frozen = sorted(
            state.name
            for state in self.target.states
            if state.name in was_averaged and state.shadow is None and not state.shard.trainable
            if state.shard.kind != "buffer"
        )
        if frozen:
            yield (
                f"{where} holds averages of {', '.join(frozen[:5])}, which are frozen now: their "
                "live values count. Load before you freeze them to keep the averages."
            )


def plan_start(place: location.Location, targets: Sequence[LoadTarget]) -> list[ReadPlan]:
    """Every average starts from the one model; frozen weights and buffers may be in it or not."""
    listed = place.listed if place.manifest or place.listed else None
    return [
        ReadPlan(Path(place.folder), target, place.aliases, place.model, listed=listed)
        for target in targets
    ]


def plan_resume(
    place: location.Location,
    saved: manifest.Manifest,
    targets: Sequence[LoadTarget],
    remarks: list[str],
) -> list[ReadPlan]:
    """Each average gets the saved one with its schedule; the rest are paired in order."""
    path, schedules = Path(place.folder), saved.schedules
    if len(targets) > len(schedules):
        raise ValueError(f"{path} holds {len(schedules)} averages, this EMA has {len(targets)}.")
    plans = []
    for k, target in zip(
        match_schedules(schedules, [t.schedule for t in targets]), targets, strict=True
    ):
        if schedules[k] != target.schedule:
            remarks.append(
                f"{path} was averaged with {from_dict(schedules[k])!r}; this EMA goes on with "
                f"{from_dict(target.schedule)!r}."
            )
        label = saved.labels[k]
        folder = path / "averages" / label if label else path
        listed = saved.files_of(label)
        model = safetensors.INDEX if len(listed) > 1 else next(iter(listed))
        # Frozen weights and buffers lie only with the first average.
        whole = saved.weights == "all" and not k
        own = [target.names.get(name, name) for name in saved.own_buffers_of(label)]
        plans.append(ReadPlan(folder, target, place.aliases, model, whole, own, listed))
    return plans


def match_schedules(saved: Sequence[Any], wanted: Sequence[Any]) -> list[int]:
    """For each wanted schedule the index of the equal saved one, else of the next unmatched one."""
    equal = [saved.index(schedule) if schedule in saved else None for schedule in wanted]
    left = (k for k in range(len(saved)) if k not in equal)
    return [next(left) if k is None else k for k in equal]


def converts(there: torch.dtype, here: torch.dtype) -> bool:
    """Floats come from floats, complex numbers from complex ones, integers from any real dtype."""
    if there.is_complex or here.is_complex:
        return there.is_complex and here.is_complex
    return there.is_floating_point or not here.is_floating_point


def _refuse_untied(state: ownership.ParamState, held: Sequence[open_file.OpenWeight]) -> None:
    """Raise ValueError where names that are tied in the model hold different bytes in the file."""
    first, *others = held
    for other in others:
        pairs = zip(_blocks(state, first), _blocks(state, other), strict=True)
        same = first.entry.shape == other.entry.shape and first.dtype == other.dtype
        if not same or not all(
            torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
            for a, b in pairs
        ):
            raise ValueError(
                f"{first.name} and {other.name} are one weight in the model, and differ in "
                f"{first.file.path.parent}."
            )


def _blocks(state: ownership.ParamState, weight: open_file.OpenWeight) -> Iterator[Tensor]:
    """This rank's averaged region of a weight, a window at a time."""
    for box, _ in geometry.boxes_with_data(state.shard, state.averaged_region, state.live):
        yield from (data for _, data in weight.file.read(weight.name, box))
