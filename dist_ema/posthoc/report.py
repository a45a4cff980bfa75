"""`dist-ema reconstruct`: one mixture for each width, its fit reported and plotted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..offline import plotting, writer
from ..offline.sources import open_model
from ..schedules import Power, Schedule
from .profiles import Fit
from .snapshots import WARNED, Snapshots

__all__ = ["Mixture", "ReconstructReport", "reconstruct"]


@dataclass(frozen=True)
class Mixture:
    """One target, its fit, and where it was written."""

    target: Schedule
    fit: Fit
    out: Path | None

    @property
    def name(self) -> str:
        """The width of a power function, else the schedule."""
        return _name(self.target)

    @property
    def poor(self) -> bool:
        return self.fit.residual > WARNED

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target.to_dict(),
            "sigma_rel": getattr(self.target, "sigma_rel", None),
            "residual": self.fit.residual,
            "condition": self.fit.condition,
            "largest": self.fit.largest,
            "gain": self.fit.gain,
            "sum": sum(self.fit.weights),
            "out": None if self.out is None else str(self.out),
        }


@dataclass(frozen=True)
class ReconstructReport:
    """The stored averages and the mixtures of them."""

    snapshots: Snapshots
    at: tuple[float, int]
    mixtures: list[Mixture]

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.snapshots.stored]

    def to_json(self) -> dict[str, Any]:
        stored = [
            {
                "name": each.name,
                "schedule": each.profile.schedule.to_dict(),
                "now": each.profile.now,
            }
            for each in self.snapshots.stored
        ]
        made = [
            mixture.to_json() | {"weights": dict(zip(self.names, mixture.fit.weights, strict=True))}
            for mixture in self.mixtures
        ]
        return {
            "at": self.at[0],
            "updates": self.at[1],
            "skipped": self.snapshots.skipped,
            "stored": stored,
            "mixtures": made,
        }


def reconstruct(
    where: str,
    out: str | None,
    targets: Sequence[Schedule],
    *,
    folders: bool = False,
    at: float | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    plot: str | None = None,
    progress: Callable[[str, int], Any],
) -> ReconstructReport:
    """Write one model per target. Whatever can be refused is refused before the first.

    Args:
        where: The folder of snapshots.
        out: The model to write; None only reports.
        targets: What they imitate.
        folders: Of power functions: write to out/sigma-0.030 and so on, in place of `out` itself.
        at: The clock of the moment, by default of the last snapshot.
        dtype: Of floating weights, by default the model's own.
        max_shard_size: Of each file.
        force: Replace a model at `out`.
        plot: A PNG to draw.
        progress: Shows a bar over so many bytes.
    """
    run = Snapshots(where)
    fits = {target: run.fit(target, at) for target in targets}
    for target, fit in fits.items() if out is not None else ():
        run.refuse(target, fit)
    places = _places(out, [_sigma(target) for target in targets], folders)
    for place in places:
        run.refuse_place(place)
        writer.refuse_target(place, force)
    if plot is not None:
        _draw(plot, run, fits, at)
    for place, target in zip(places, targets, strict=False):
        with progress(_name(target), _bytes(run)) as tick:
            run.write(
                place,
                target,
                fits[target],
                at=at,
                dtype=dtype,
                max_shard_size=max_shard_size,
                force=force,
                tick=tick,
            )
    mixtures = [
        Mixture(target, fits[target], places[i] if places else None)
        for i, target in enumerate(targets)
    ]
    return ReconstructReport(run, run.moment(at), mixtures)


def _sigma(target: Schedule) -> float:
    return getattr(target, "sigma_rel", None) or 0.0


def _name(target: Schedule) -> str:
    return f"{target.sigma_rel:g}" if isinstance(target, Power) else repr(target)


def _places(out: str | None, sigmas: Sequence[float], folders: bool) -> list[Path]:
    if out is None:
        return []
    if not folders:
        return [Path(out)]
    digits = next(
        n for n in (3, 4, 6, 12) if len({f"{sigma:.{n}f}" for sigma in sigmas}) == len(sigmas)
    )
    return [Path(out) / f"sigma-{sigma:.{digits}f}" for sigma in sigmas]


def _bytes(run: Snapshots) -> int:
    """About the size of one mixture, for the bar."""
    with open_model(run.stored[-1].snapshot) as model:
        return sum(entry.nbytes for entry in model.entries.values())


def _draw(plot: str, run: Snapshots, fits: dict[Schedule, Fit], at: float | None) -> None:
    """Target and mixture over the clock, and the residual over sigma_rel."""
    with plotting.panels(plot, 2) as (left, right):
        some = list(fits)[:: max(1, len(fits) // 4)]
        for number, target in enumerate(some):
            clock, wanted, mixed = run.shape(target, fits[target], at)
            left.plot(clock, wanted, color=f"C{number}", lw=3, alpha=0.35, label=_name(target))
            left.plot(clock, mixed, color=f"C{number}", lw=1, ls="--")
        left.set(
            xlabel="clock", ylabel="share of an update", title="target (wide) and mixture (dashed)"
        )
        left.legend(title="sigma_rel")
        residuals = [max(fit.residual, 1e-6) for fit in fits.values()]
        right.semilogy([_sigma(target) for target in fits], residuals, marker=".")
        right.axhline(WARNED, color="grey", lw=0.8)
        right.set(
            xlabel="sigma_rel", ylabel="residual", title="share of the profile that is missed"
        )
