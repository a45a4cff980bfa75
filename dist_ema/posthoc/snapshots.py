"""`Snapshots`: the averages that `ema.snapshot` stored, and writing a mixture of them. No torch.

    ema = EMA(model, decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.10)])
    ...
    ema.snapshot("run/snapshots", every=1000)                    # in the loop, after each step
    ...
    posthoc.reconstruct("run/snapshots", "out", sigma_rel=0.07)  # any time later, without a GPU

The arithmetic, and what "nearest" means, is in `profiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..averaging.clock import Clock
from ..checkpoint import manifest
from ..dtypes import FLOATS, TORCH
from ..offline import blend, same_weights, sources, writer
from ..schedules import Power, Schedule, from_dict, schedule
from ..text import some
from .profiles import Fit, Mixer, Profile, coefficients

__all__ = ["REFUSED", "WARNED", "Profile", "Snapshots", "Stored", "coefficients", "reconstruct"]

WARNED = 0.05  # residual above which a profile is not well met
REFUSED = 0.5  # and above which it is another profile


@dataclass(frozen=True)
class Stored:
    """One average of one snapshot."""

    snapshot: Path  # the folder, with ema.json, frozen weights and buffers
    label: str  # '' of the first average, else the name of its folder under averages/
    profile: Profile
    clock: dict[str, Any]
    averaged: tuple[str, ...]
    dtypes: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.snapshot.name}/{self.label}" if self.label else self.snapshot.name

    @property
    def files(self) -> Path:
        return self.snapshot / "averages" / self.label if self.label else self.snapshot


class Snapshots:
    """The stored averages of one run, ordered by the clock.

    Args:
        where: A folder of snapshots, or the snapshots themselves.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A snapshot is damaged, or there are fewer than two averages.
    """

    def __init__(self, where: str | Path | Sequence[str | Path]) -> None:
        self._where = [where] if isinstance(where, (str, Path)) else list(where)
        folders = _folders(self._where)
        averages = [stored for folder in folders for stored in _stored(folder)]
        if len(averages) < 2:
            raise ValueError(
                f"{', '.join(map(str, self._where)) or 'an empty list'} holds {len(averages)} "
                "stored averages; mixing takes at least 2. Store some with EMA(model, "
                "decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.10)]) and ema.snapshot(folder, "
                "every=...)."
            )
        self.stored = sorted(
            averages,
            key=lambda stored: (stored.profile.now, stored.snapshot.name, stored.label),
        )
        profiles = [stored.profile for stored in self.stored]
        self._mixer = lru_cache(maxsize=None)(partial(Mixer, profiles))

    @property
    def skipped(self) -> int:
        """Updates that the device refused, which the profiles count as made."""
        return max(stored.profile.updates - int(stored.clock["accepted"]) for stored in self.stored)

    def moment(self, at: float | None = None) -> tuple[float, int]:
        """(clock, updates) of the last update until `at`."""
        return self._mixer(at).now, self._mixer(at).updates

    def fit(self, target: Schedule, at: float | None = None) -> Fit:
        """The mixture nearest to `target` at `at`, by default at the last snapshot."""
        return self._mixer(at).fit(target)

    def shape(self, target: Schedule, fit: Fit, at: float | None = None) -> tuple[Any, Any, Any]:
        """The clock, the target's profile and the mixture's, to be plotted."""
        return self._mixer(at).shape(target, fit)

    def refuse_place(self, out: str | Path) -> None:
        """Raise ValueError where a mixture would lie among the snapshots, as if it were one."""
        for snapshot in self._where:
            writer.refuse_place(snapshot, out)

    def refuse(self, target: Schedule, fit: Fit, at: float | None = None) -> None:
        """Raise ValueError where the mixture would be far from `target`."""
        if fit.residual > REFUSED:
            nows = [stored.profile.now for stored in self.stored]
            last = max(now for now in nows if at is None or now <= at)
            more = "" if at in (None, last) else f", or mix as of {last:g}, the snapshot before"
            stored_schedules = sorted({repr(stored.profile.schedule) for stored in self.stored})
            raise ValueError(
                f"{target!r} cannot be mixed from what was stored: the nearest misses "
                f"{fit.residual:.0%} of its profile. There are {len(self.stored)} averages of "
                f"{', '.join(stored_schedules)}: ask for one nearer to them, or store more{more}."
            )

    def write(
        self,
        out: str | Path,
        target: Schedule,
        fit: Fit,
        *,
        at: float | None = None,
        dtype: str | None = None,
        max_shard_size: int | str | None = None,
        force: bool = False,
        tick: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write the mixture as a model to ship, atomically.

        Frozen weights and buffers come from the newest snapshot in it.

        Args:
            out: A folder, or a name that ends in .safetensors.
            target: The schedule that the mixture imitates.
            fit: From `fit`.
            at: The clock of the moment.
            dtype: The dtype of floating weights ('BF16', torch.bfloat16 ...); None takes the
                model's own.
            max_shard_size: The size limit of each file in a folder, by default 5 GB.
            force: Replace a model at `out`.
            tick: Receives the number of bytes written.

        Note:
            *Cost*: 32 MB, whatever the model and the number of snapshots.
        """
        self.refuse_place(out)
        if dtype is not None:
            dtype = _floating(dtype)
        mixed = [
            (stored, weight)
            for stored, weight in zip(self.stored, fit.weights, strict=True)
            if weight
        ]
        newest = mixed[-1][0]
        newest_model = sources.open_model(newest.snapshot)
        terms = [(sources.open_model(stored.files), weight) for stored, weight in mixed]
        models = [model for model, _ in terms]
        with ExitStack() as stack:
            for model in (newest_model, *models):
                stack.enter_context(model)
            self._refuse_mixed([stored for stored, _ in mixed], models, newest_model)
            # Shadows may have another dtype than the model had: ema.json has the model's.
            own = {n: TORCH[kind] for n, kind in newest.dtypes.items() if TORCH.get(kind) in FLOATS}
            dtypes = own if dtype is None else dict.fromkeys(newest_model.entries, dtype)
            mixture = blend.Blend(terms, newest_model, frozenset(newest.averaged), dtypes)
            facts = self._facts(target, fit, at, mixed)
            mixture.write(Path(out), facts, max_shard_size=max_shard_size, force=force, tick=tick)

    def _refuse_mixed(
        self, mixed: list[Stored], models: list[sources.Source], newest_model: sources.Source
    ) -> None:
        """Raise ValueError with all differences where the snapshots are not of one model."""
        newest = mixed[-1]
        for stored in mixed:
            apart = sorted(set(stored.averaged) ^ set(newest.averaged))
            if apart:
                raise ValueError(
                    f"{stored.snapshot} and {newest.snapshot} do not average the same weights: "
                    f"{some(apart)} only in one of them."
                )
        same_weights.refuse_different(models, newest_model, newest.averaged)

    def _facts(
        self, target: Schedule, fit: Fit, at: float | None, mixed: list[tuple[Stored, float]]
    ) -> manifest.Manifest:
        """The clock of the moment, the imitated schedule, and the mixture."""
        now, updates = self.moment(at)
        made_of = {
            "weights": {stored.name: weight for stored, weight in mixed},
            "residual": fit.residual,
            "condition": fit.condition,
        }
        return manifest.Manifest(
            clock=mixed[-1][0].clock
            | {"now": now, "updates": updates, "accepted": updates, "pending": 0.0},
            schedules=[target.to_dict()],
            extra={"reconstruct": made_of},
        )


def reconstruct(
    snapshots: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    sigma_rel: float | None = None,
    target: Schedule | None = None,
    at: float | None = None,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
) -> Fit:
    """Write the average that a schedule would have tracked.

    Args:
        snapshots: The folder given to `ema.snapshot`, or a list of saved averages.
        out: A folder, or a name that ends in .safetensors.
        sigma_rel: The width of a `Power` schedule; or give `target`.
        target: The schedule to imitate.
        at: The clock at the end of the average, by default of the last snapshot.
        dtype: The dtype of floating weights ('BF16', torch.bfloat16 ...), by default the model's
            own.
        max_shard_size: The size limit of each file in a folder, by default 5 GB.
        force: Replace a model at `out`.

    Returns:
        The weights of the mixture, and how near it comes.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: The snapshots cannot be mixed into it; nothing is written then.

    Note:
        *Cost*: 32 MB.
    """
    if (sigma_rel is None) == (target is None):
        raise ValueError(
            f"reconstruct takes one of sigma_rel and target, got sigma_rel={sigma_rel}, "
            f"target={target!r}."
        )
    wanted = Power(sigma_rel=sigma_rel) if target is None else schedule(target)
    run = Snapshots(snapshots)
    fit = run.fit(wanted, at)
    run.refuse(wanted, fit, at)
    run.write(out, wanted, fit, at=at, dtype=dtype, max_shard_size=max_shard_size, force=force)
    return fit


def _floating(dtype: Any) -> str:
    """The dtype as safetensors calls it, also from torch's name. Raises ValueError for no float."""
    kind = TORCH.get(str(dtype).removeprefix("torch."), dtype)
    if kind not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}.")
    return str(kind)


def _folders(snapshots: str | Path | Sequence[str | Path]) -> list[Path]:
    """The folder of each snapshot, for a folder of snapshots or a list of either."""
    if not isinstance(snapshots, (str, Path)):
        return [folder for snapshot in snapshots for folder in _folders(snapshot)]
    path = Path(snapshots)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the folder of snapshots that ema.snapshot wrote.")
    if (path / manifest.META).exists():
        return [path]
    inner = sorted(path.glob(f"*/{manifest.META}"))
    # A hidden folder is a save that is being written, or was interrupted.
    return [meta.parent for meta in inner if not meta.parent.name.startswith(".")]


def _stored(folder: Path) -> list[Stored]:
    """All averages of a snapshot, their profiles from ema.json."""
    saved = manifest.read(folder)
    if saved is None:
        raise ValueError(f"{folder} holds no {manifest.META}.")
    manifest.refuse_damaged(folder, saved)
    if not saved.clock.get("started") or len(saved.schedules) != len(saved.labels):
        raise ValueError(f"{folder} cannot be used as a snapshot: averaging had not started.")
    clock = Clock()
    clock.set(saved.clock)
    return [
        Stored(
            folder,
            label,
            Profile(from_dict(spec), clock.now, clock.updates, clock.before),
            saved.clock,
            tuple(saved.averaged),
            saved.dtypes,
        )
        for label, spec in zip(saved.labels, saved.schedules, strict=True)
    ]
