"""`dist-ema reconstruct`: a `Mixture` for each width: fitted, written, reported and plotted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..offline import plotting, sources, writer
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
        target = self.target
        return f"{target.sigma_rel:g}" if isinstance(target, Power) else repr(target)

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

    def to_json(self) -> dict[str, Any]:
        averages = self.snapshots.stored
        names = [average.name for average in averages]
        return {
            "at": self.at[0],
            "updates": self.at[1],
            "skipped": self.snapshots.skipped,
            "stored": [
                {"name": average.name, "schedule": average.profile.schedule.to_dict()}
                | {"now": average.profile.now}
                for average in averages
            ],
            "mixtures": [
                mixture.to_json() | {"weights": dict(zip(names, mixture.fit.weights, strict=True))}
                for mixture in self.mixtures
            ],
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
        folders: Write power functions to out/sigma-0.030 and so on, in place of `out` itself.
        at: The clock of the moment, by default of the last snapshot.
        dtype: The dtype of floating weights, by default the model's own.
        max_shard_size: The size limit of each file.
        force: Replace a model at `out`.
        plot: A PNG to draw.
        progress: Shows a bar over so many bytes.
    """
    run = Snapshots(where)
    mixtures = [
        Mixture(target, run.fit(target, at), place)
        for target, place in zip(targets, _places(out, targets, folders), strict=True)
    ]
    for mixture in mixtures:
        if mixture.out is not None:
            run.refuse(mixture.target, mixture.fit, at)
            run.refuse_place(mixture.out)
            writer.refuse_target(mixture.out, force)
    if plot is not None:
        _draw(plot, run, mixtures, at)
    for mixture in mixtures:
        if mixture.out is not None:
            with progress(mixture.name, _bytes(run)) as tick:
                run.write(
                    mixture.out,
                    mixture.target,
                    mixture.fit,
                    at=at,
                    dtype=dtype,
                    max_shard_size=max_shard_size,
                    force=force,
                    tick=tick,
                )
    return ReconstructReport(run, run.moment(at), mixtures)


def _sigma(target: Schedule) -> float:
    return getattr(target, "sigma_rel", None) or 0.0


def _places(out: str | None, targets: Sequence[Schedule], folders: bool) -> Sequence[Path | None]:
    if out is None or not folders:
        return [None if out is None else Path(out) for _ in targets]
    digits = next(
        n for n in (3, 4, 6, 12) if len({f"{_sigma(t):.{n}f}" for t in targets}) == len(targets)
    )
    return [Path(out) / f"sigma-{_sigma(target):.{digits}f}" for target in targets]


def _bytes(run: Snapshots) -> int:
    """About the size of one mixture, for the bar."""
    with sources.open_model(run.stored[-1].snapshot) as model:
        return sum(entry.nbytes for entry in model.entries.values())


def _draw(plot: str, run: Snapshots, mixtures: Sequence[Mixture], at: float | None) -> None:
    """Target and mixture over the clock, and the residual over sigma_rel."""
    with plotting.panels(plot, 2) as (left, right):
        for number, mixture in enumerate(mixtures[:: max(1, len(mixtures) // 4)]):
            clock, wanted, mixed = run.shape(mixture.target, mixture.fit, at)
            left.plot(clock, wanted, color=f"C{number}", lw=3, alpha=0.35, label=mixture.name)
            left.plot(clock, mixed, color=f"C{number}", lw=1, ls="--")
        left.set(
            xlabel="clock", ylabel="share of an update", title="target (wide) and mixture (dashed)"
        )
        left.legend(title="sigma_rel")
        residuals = [max(mixture.fit.residual, 1e-6) for mixture in mixtures]
        right.semilogy([_sigma(mixture.target) for mixture in mixtures], residuals, marker=".")
        right.axhline(WARNED, color="grey", lw=0.8)
        right.set(
            xlabel="sigma_rel", ylabel="residual", title="share of the profile that is missed"
        )
