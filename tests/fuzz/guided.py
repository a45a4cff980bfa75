"""Coverage guidance: an input that reaches new code of a reader is kept, and changed again.

    pip install atheris
    python -m tests.fuzz --minutes 10 [--targets zip pickle] [--keep]

A target is one file of a sound checkpoint. libFuzzer changes its bytes, and every second time one
of the changes of this package does. The verbs run in this process, in the same bounds of memory and
time and with the same checks as on damaged files. `corpus/` holds the inputs that together reach
what is known to be reachable; --keep adds to it, and every run of `tests.fuzz` begins with it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import CHANGES, MODEL, Draw
from .cases import FORMS, Case, Weights, preload, weights_of
from .containers import ARCHIVE_CHANGES, DCP_CHANGES, change_pickle
from .sandbox import SECONDS, Outcome, limit, problems, watch

__all__ = ["TARGETS", "guide", "replay"]

CORPUS = Path(__file__).with_name("corpus")
LONGEST = 1 << 16  # bytes of an input


@dataclass(frozen=True)
class Target:
    """A file of a form of checkpoint, or a record of the archive that the file is."""

    form: str
    file: str
    changes: tuple[Draw, ...]
    record: str = ""


def _pickle(draw: random.Random, folder: Path) -> None:
    path = folder / "x.pt"
    path.write_bytes(change_pickle(draw, path.read_bytes()))


_FLAT = ("cut", "append", "flip", "blank", "length", "header", "header again")
TARGETS = {
    "header": Target("file", "x.safetensors", tuple(MODEL[name] for name in _FLAT)),
    "index": Target("hf", "model.safetensors.index.json", (MODEL["index"],)),
    "manifest": Target("ema", "ema.json", (CHANGES["meta"], CHANGES["clock"])),
    "zip": Target("pt", "x.pt", tuple(ARCHIVE_CHANGES.values())),
    "pickle": Target("pt", "x.pt", (_pickle,), "data.pkl"),
    "metadata": Target("dcp", ".metadata", (DCP_CHANGES["metadata"],)),
    "items": Target("dcp", "__0_0.distcp", (DCP_CHANGES["chunks"],)),
}


class Bench:
    """A checkpoint of which one file is replaced by each input, and the verbs that read it."""

    def __init__(self, target: Target, root: Path) -> None:
        self._target, form = target, FORMS[target.form]
        self._good, work = root / "good" / target.form, root / "work"
        self._source = work / "from" / "a"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self._good, self._source)
        mixed: Weights = (weights_of(root / "mixed") or {}) if target.form == "ema" else {}
        self._case = Case(
            target.form, self._source / form.file, self._good / form.file, work / "to/out", mixed
        )
        self._events: list[str] = []
        watch(self._case.out.parent, self._events.append)

    @property
    def sound(self) -> bytes:
        """The input that changes nothing."""
        data = (self._good / self._target.file).read_bytes()
        return _records(data)[self._target.record] if self._target.record else data

    def findings(self, data: bytes) -> Iterator[tuple[list[str], str]]:
        """(the verb's line, what is wrong with how it took the input)."""
        if self._target.record:
            data = _with_record(self._good / self._target.file, self._target.record, data)
        (self._source / self._target.file).write_bytes(data)
        for line in self._case.lines():
            shutil.rmtree(self._case.out.parent, ignore_errors=True)
            self._case.out.parent.mkdir()
            for problem in problems(self._case, line, lambda line=line: self._run(line)):
                yield line, problem

    def _run(self, line: list[str]) -> Outcome:
        from dist_ema.cli import main

        self._events.clear()
        errors, code = io.StringIO(), 99
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            try:
                code = main(line)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 98
            except BaseException:
                errors.write(traceback.format_exc())
        return code, errors.getvalue(), "".join(self._events)


def _records(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {info.filename.split("/", 1)[1]: opened.read(info) for info in opened.infolist()}


def _with_record(archive: Path, name: str, data: bytes) -> bytes:
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as written:
        for record, content in (_records(archive.read_bytes()) | {name: data}).items():
            written.writestr(zipfile.ZipInfo(f"archive/{record}"), content)
    return new.getvalue()


def _limited(target: Target) -> None:
    if target.form == "pt":  # the limit of the others has no room for torch
        import torch

        torch.set_num_threads(1)
    limit()


def replay(name: str, root: Path, stride: int) -> None:
    """Run the verbs on every `stride`-th input. Raises AssertionError for what is wrong."""
    _limited(TARGETS[name])
    bench = Bench(TARGETS[name], root)
    inputs = {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir())[::-stride]}
    for label, data in {"sound": bench.sound, **inputs}.items():
        found = list(bench.findings(data))
        assert not found, f"corpus/{name}/{label}: {found}"


# --- with atheris ---------------------------------------------------------------------------------


def guide(names: list[str], minutes: float, root: Path, keep: bool) -> int:
    """Fuzz each target in a process of its own. Returns the number of inputs that failed."""
    found = Path(tempfile.mkdtemp(prefix="fuzz-found-"))
    failures = 0
    for name in names:
        new, held = root / "corpus" / name, CORPUS / name
        new.mkdir(parents=True)
        held.mkdir(parents=True, exist_ok=True)
        common = [sys.executable, "-m", __spec__.name, name, str(root), str(found)]
        options = [
            f"-max_total_time={round(60 * minutes / len(names))}", f"-timeout={SECONDS}",
            f"-max_len={LONGEST}", "-rss_limit_mb=0", "-report_slow_units=60",
            f"-artifact_prefix={found}/{name}-",
        ]  # fmt: skip
        print(f"--- {name}", flush=True)
        done = subprocess.run([*common, *options, str(new), str(held)])
        if done.returncode:  # a signal, or SECONDS
            print(f"{name}: ended with {done.returncode}")
        failures += bool(done.returncode)
        if keep:
            subprocess.run(
                [*common, "-merge=1", "-use_counters=0", "-rss_limit_mb=0", str(held), str(new)],
                check=True,
            )
    failed = sorted(found.iterdir())
    print(f"{len(failed)} inputs failed" + (f", kept in {found}" if failed else ""))
    return failures + len(failed)


def _fuzz(name: str, root: Path, found: Path, options: list[str]) -> None:
    """libFuzzer's loop; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["dist_ema"], enable_loader_override=False):
        preload()
        from dist_ema import cli
    target = TARGETS[name]
    _limited(target)
    bench, known = Bench(target, root), set[str]()
    (root / "corpus" / name / "sound").write_bytes(bench.sound)
    cli.build_parser = functools.cache(cli.build_parser)  # half of the time of a verb
    scratch = Path(tempfile.mkdtemp(dir=root))

    def check(data: bytes) -> None:
        for line, problem in bench.findings(data):
            key = f"{line[0]} {problem[-80:]}"
            if key not in known:  # one input for each kind
                known.add(key)
                at = found / f"{name}-{len(known)}"
                at.write_bytes(data)
                print(f"{at}: {' '.join(line)}\n  {problem}", flush=True)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        draw, path = random.Random(seed), scratch / target.file
        changed = data
        if draw.random() < 0.5:
            path.write_bytes(data)
            with contextlib.suppress(Exception):  # the change needs what this input has not
                draw.choice(target.changes)(draw, scratch)
                changed = path.read_bytes()
        return changed[:longest] if changed != data else atheris.Mutate(data, longest)

    # -merge=1 starts this process again, by its first word.
    again = scratch.with_suffix(".sh")
    again.write_text(f'#!/bin/sh\nexec {shlex.join(sys.orig_argv[: -len(options)])} "$@"\n')
    again.chmod(0o700)
    atheris.Setup([str(again), *options], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1"}
    _fuzz(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
