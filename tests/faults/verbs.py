"""What the faults are tried on: every verb that writes, and how its result is read back.

Every element of version n is n, so a mixture of two versions is seen.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import EMA, load_file
from dist_ema.cli import main
from dist_ema.distributed.machines import MACHINE
from dist_ema.offline.verify import verify
from dist_ema.schedules import Power

from .shim import Disk, Operation

__all__ = ["Case", "ema_cases", "rank_cases"]

WHOLE = Disk()
TWO_RENAMES = Disk(exchange=False)
FIXED = Disk(fixed=True)
SMALL = "500B"  # the size of shards that divides the model


@dataclass(frozen=True)
class Case:
    """A verb that writes version after version under one folder.

    Attributes:
        write: Writes a version into the folder, or raises.
        newest: The newest version that readers find there, None where there is none. Raises
            AssertionError for a version that is not whole.
        before: The versions in place when the fault comes.
        disk: What the file system can do.
        rewrites: The verb writes the same version again.
        unseen: The last operations, which the shim does not see, from those that it saw.
        apart: Each rank is on a machine of its own.
        set_timeout: Sets the seconds after which a rank gives up on another one.
    """

    name: str
    write: Callable[[Path, int], None]
    newest: Callable[[Path], int | None]
    before: tuple[int, ...] = ()
    disk: Disk = WHOLE
    rewrites: bool = False
    unseen: Callable[[list[Operation]], list[Operation]] = lambda seen: []
    apart: bool = False
    set_timeout: Callable[[float], None] = lambda seconds: None

    @property
    def last(self) -> int | None:
        return max(self.before, default=None)

    @property
    def target(self) -> int:
        return (self.last or 0) + (not self.rewrites)

    @property
    def following(self) -> int:
        return self.target + (not self.rewrites)


class Model(nn.Module):
    """Trained, frozen and empty weights, and a buffer. The empty one can have a file to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(40, 5))
        self.frozen = nn.Parameter(torch.zeros(30), requires_grad=False)
        self.second = nn.Parameter(torch.zeros(20, 10))
        self.void = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("mean", torch.zeros(4))

    def fill(self, version: int) -> None:
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(version)


def constant(weights: dict[str, Tensor]) -> int:
    """The version of weights that are all of one version."""
    found = {value for weight in weights.values() for value in weight.double().flatten().tolist()}
    versions = {round(value) for value in found}
    assert len(versions) == 1, f"values of several versions: {sorted(found)}"
    assert all(abs(value - round(value)) < 1e-3 for value in found), f"no version: {sorted(found)}"
    return versions.pop()


def model_version(path: Path) -> int | None:
    """The version of a file or folder: `verify` finds it sound, and `load_file` reads it."""
    try:
        verdict = verify(path)
    except FileNotFoundError:
        return None
    assert verdict.sound, f"{path.name} is not sound: {'; '.join(verdict.problems)}"
    return constant(load_file(path))


class Verbs:
    """The state that the cases share: a model, its average, and the sources of offline verbs."""

    def __init__(
        self, sources: Path, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    ) -> None:
        self._sources = sources
        self._model = Model()
        self._ema = EMA(wrap(self._model), [0.5, 0.9], timeout=120)
        self._reader = EMA(Model(), [0.5, 0.9])

    def set_timeout_of(self, other: Verbs) -> Callable[[float], None]:
        def set_both(seconds: float) -> None:
            self._ema.timeout = other._ema.timeout = seconds

        return set_both

    def _fill(self, version: int) -> EMA:
        self._model.fill(version)
        self._ema.reset()
        return self._ema

    def save(self, name: str, **options: Any) -> Callable[[Path, int], None]:
        return lambda root, version: self._fill(version).save(root / name, **options)

    def save_behind(self, root: Path, version: int) -> None:
        """The next verb waits for the file, and raises what went wrong."""
        ema = self._fill(version)
        ema.save(root / "ema", wait=False)
        ema.load(root / "ema")

    def save_keep(self, root: Path, version: int) -> None:
        self._fill(version).save(root / f"ema-{version:03}", keep=2)

    def save_keep_again(self, root: Path, version: int) -> None:
        """Over the newest save, from the second version on."""
        self._fill(version).save(root / f"ema-{min(version, 2):03}", keep=2)

    def export(self, name: str, **options: Any) -> Callable[[Path, int], None]:
        return lambda root, version: self._fill(version).export(root / name, **options)

    def export_changing(self, root: Path, version: int) -> None:
        """Several files and one file in turn, beside a file of somebody else."""
        (root / "out").mkdir(exist_ok=True)
        config = root / "out" / "config.json"
        if not config.exists():
            config.write_bytes(b"{}")
        size = SMALL if version % 2 else "5GB"
        self._fill(version).export(root / "out", max_shard_size=size)

    def snapshot(self, root: Path, version: int) -> None:
        """As a run that starts anew: the clock names the folder."""
        self._model.fill(version)
        ema = EMA(self._model, [Power(sigma_rel=0.05), Power(sigma_rel=0.1)])
        ema.update(elapsed=version)
        ema.snapshot(root / "snapshots", every=1)

    def command(self, *words: str) -> Callable[[Path, int], None]:
        """`dist-ema ...`; {source} and {root} are filled in."""

        def write(root: Path, version: int) -> None:
            source = self._sources / str(version)
            filled = [word.format(source=source, root=root) for word in words]
            errors = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                code = main(filled)
            if code:
                raise RuntimeError(errors.getvalue())

        return write

    def prepare(self, versions: range) -> None:
        """The sources of offline verbs, one folder for each version."""
        for version in versions:
            folder = self._sources / str(version)
            self.save("a")(folder, version)
            self.save("b")(folder, version)
            torch.save({"state_dict": self._model.state_dict()}, folder / "c.pt")
            ema = EMA(self._model, [Power(sigma_rel=0.05), Power(sigma_rel=0.1)])
            for _ in range(2):
                ema.update(elapsed=100)
                ema.snapshot(folder / "snapshots", every=100)

    def reading(self, root: Path, out: Path) -> dict[str, Callable[[], None]]:
        """Verbs that read what lies in `root` (see `prepare`); an output comes to `out`."""

        def run(*words: str) -> Callable[[], None]:
            def verb() -> None:
                shutil.rmtree(out, ignore_errors=True)
                errors = io.StringIO()
                filled = [word.format(root=root, out=out) for word in words]
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
                    code = main(filled)
                if code:
                    assert not list(out.parent.glob("*out*")), "something was left"
                    raise RuntimeError(errors.getvalue())

            return verb

        def load() -> None:
            self._reader.load(root / "a")
            assert constant({"first": self._reader.gather()["first"]}) == 1

        lines = {
            "inspect": ("inspect", "{root}/a"),
            "verify": ("verify", "{root}/a"),
            "diff": ("diff", "{root}/a", "{root}/b"),
            "export": ("export", "{root}/a", "{out}"),
            "convert": ("convert", "{root}/c.pt", "{out}", "--key", "state_dict"),
            "average": ("average", "{root}/a", "{root}/b", "{out}"),
            "reconstruct": ("reconstruct", "{root}/snapshots", "{out}", "--sigma-rel", "0.07"),
        }
        calls: dict[str, Callable[[], None]] = {"load": load}
        calls["load_file"] = lambda: self._load_file(root / "a")
        return calls | {f"dist-ema {name}": run(*line) for name, line in lines.items()}

    def _load_file(self, path: Path) -> None:
        assert constant(load_file(path)) == 1

    # --- reading back ---------------------------------------------------------------------------

    def resumed(self, path: Path) -> int | None:
        """The version of a save, which `load` reads too."""
        version = model_version(path)
        if version is not None:
            self._reader.load(path)
            for which in range(2):
                weights = self._reader.gather(which)
                assert constant({name: weights[name] for name in ("first", "second")}) == version
        return version

    def saved(self, root: Path) -> int | None:
        return self.resumed(root / "ema")

    def kept(self, root: Path) -> int | None:
        """Every save beside `latest` is whole, and `latest` names one."""
        # A save that a writer has put aside is read by its own name.
        names = {each.name.removeprefix(".").split(".")[0] for each in root.glob("*ema-*")}
        found = {name: self.resumed(root / name) for name in sorted(names)}
        versions = [version for version in found.values() if version is not None]
        if not (root / "latest").exists():
            assert not versions, "no pointer to the saves"
            return None
        version = self.resumed(root / "latest")
        assert version in versions, f"latest is version {version}, the saves are {found}"
        assert len(versions) >= min(2, version or 0), f"fewer saves than keep=: {found}"
        return version

    def snapped(self, root: Path) -> int | None:
        found = [model_version(path) for path in sorted((root / "snapshots").glob("[0-9]*"))]
        return found[-1] if found else None


def exported(name: str) -> Callable[[Path], int | None]:
    return lambda root: model_version(root / name)


def beside_config(root: Path) -> int | None:
    out = root / "out"
    if out.is_dir():
        assert (out / "config.json").read_bytes() == b"{}", "another's file is gone"
        if len(list(out.iterdir())) == 1:
            return None
    return model_version(out)


def ema_cases(sources: Path) -> list[Case]:
    """All writing verbs. sources: a folder for what the offline verbs read."""
    verbs = Verbs(sources)
    verbs.prepare(range(1, 5))
    file, folder = exported("model.safetensors"), exported("out")
    shards = verbs.export("out", max_shard_size=SMALL)
    cases = [
        Case("save new", verbs.save("ema"), verbs.saved),
        Case("save over", verbs.save("ema"), verbs.saved, (1,)),
        Case("save over, two renames", verbs.save("ema"), verbs.saved, (1,), TWO_RENAMES),
        Case("save over, fixed folder", verbs.save("ema"), verbs.saved, (1,), FIXED),
        Case("save shards over", verbs.save("ema", max_shard_size=SMALL), verbs.saved, (1,)),
        Case("save wait=False", verbs.save_behind, verbs.saved, (1,)),
        Case("save keep=", verbs.save_keep, verbs.kept, (1, 2)),
        Case("save keep=, again", verbs.save_keep_again, verbs.kept, (1, 2), TWO_RENAMES),
        Case("snapshot", verbs.snapshot, verbs.snapped, (1,)),
        Case("export file new", verbs.export("model.safetensors"), file),
        Case("export file over", verbs.export("model.safetensors"), file, (1,)),
        Case("export folder new", verbs.export("out"), folder),
        Case("export shards over", shards, folder, (1,)),
        Case("export folder over", verbs.export_changing, beside_config, (1,)),
        Case(
            "export folder over, two renames",
            verbs.export_changing,
            beside_config,
            (1,),
            TWO_RENAMES,
        ),
        Case("export folder over, fixed", verbs.export_changing, beside_config, (1,), FIXED),
    ]
    return cases + _command_cases(verbs)


def rank_cases(wrap: Callable[[nn.Module], nn.Module]) -> list[Case]:
    """Verbs that every rank calls; `newest` is for one of them."""
    verbs, saved = Verbs(Path(), wrap), exported("ema")
    dealt = Verbs(Path(), wrap)
    file, apart = exported("model.safetensors"), partial(replace, apart=True)
    shards = _on_machines(dealt.save("ema", max_shard_size=SMALL))
    one_file = _on_machines(dealt.export("model.safetensors"))
    cases = [
        Case("save over", verbs.save("ema"), saved, (1,)),
        Case("save over, streamed", verbs.save("ema", mode="stream"), saved, (1,)),
        Case("save wait=False", verbs.save_behind, saved, (1,)),
        Case("export folder over", verbs.export_changing, beside_config, (1,)),
        apart(Case("save over, direct", verbs.save("ema", mode="direct"), saved, (1,))),
        apart(Case("save shards over, 2 machines", shards, saved, (1,))),
        apart(Case("export file over, 2 machines", one_file, file, (1,))),
    ]
    return [replace(case, set_timeout=verbs.set_timeout_of(dealt)) for case in cases]


def _on_machines(write: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    """Each rank takes itself for a machine."""

    def call(root: Path, version: int) -> None:
        os.environ[MACHINE] = f"host {dist.get_rank() if dist.is_initialized() else 0}"
        try:
            write(root, version)
        finally:
            del os.environ[MACHINE]

    return call


def _command_cases(verbs: Verbs) -> list[Case]:
    file, folder = "{root}/model.safetensors", "{root}/out"
    shards = ("--max-shard-size", SMALL)
    words = {
        "dist-ema export file": ("export", "{source}/a", file),
        "dist-ema export folder": ("export", "{source}/a", folder),
        "dist-ema average": ("average", "{source}/a", "{source}/b", folder, *shards),
        "dist-ema convert": ("convert", "{source}/c.pt", folder, "--key", "state_dict"),
        "dist-ema reconstruct": (
            "reconstruct",
            "{source}/snapshots",
            folder,
            "--sigma-rel",
            "0.07",
        ),
    }
    cases = []
    for name, command in words.items():
        look = exported(Path(file if "file" in name else folder).name)
        write = verbs.command(*command, "--force")
        cases += [Case(f"{name} new", write, look), Case(f"{name} over", write, look, (1,))]
    saves, seals = verbs.save("ema"), verbs.command("verify", "--seal", "{root}/ema")

    def seal(root: Path, version: int) -> None:
        if not (root / "ema").exists():
            saves(root, version)
        seals(root, version)

    return [*cases, Case("dist-ema verify --seal", seal, verbs.saved, (1,), rewrites=True)]
