"""Every verb on damaged files: python -m tests.fuzz --files 1000 [--seed 0] [--forms ema pt]

Each verb runs in a process of its own with 512 MB of address space (those of torch's libraries come
on top where a verb imports it) and 10 s. A case fails if the verb

- ends by a signal, by an exit code that is none of ours, or prints a traceback,
- starts a process, opens a socket, or writes, renames or removes anything outside OUT,
- leaves anything beside OUT, or changes what it reads,
- exits with 0 although what it says or wrote is not what another reader finds in the file, or
- exits with another code and says nothing, or leaves an OUT.

Files of torch come last, because the limit of the others has no room for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from . import BYTES, MODEL, Draw, damaged
from .containers import ARCHIVE_CHANGES, DCP_CHANGES

MEMORY = 512 << 20  # bytes of address space
SECONDS = 10
REPORT = 3  # the descriptor that the audit writes to
Weights = dict[str, tuple[str, tuple[int, ...], bytes]]


@dataclass(frozen=True)
class Form:
    """A form of checkpoint: the changes that damage it, and its share of the files."""

    changes: Mapping[str, Draw] | None
    share: int
    file: str = ""  # the verbs take this file of the folder


FORMS = {
    "ema": Form(None, 30),
    "hf": Form(MODEL, 10),
    "file": Form(
        {k: v for k, v in MODEL.items() if k not in ("exchange", "index")}, 15, "x.safetensors"
    ),
    "dcp": Form(BYTES | {"flip": MODEL["flip"]} | DCP_CHANGES, 20),
    "pt": Form(BYTES | {"flip": MODEL["flip"]} | ARCHIVE_CHANGES, 25, "x.pt"),
}


def build(folder: Path) -> None:
    """A sound checkpoint of each form. Imports torch."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    from dist_ema import EMA, Power

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    ema = EMA(model, decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.10)])
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update()
    ema.save(folder / "ema", max_shard_size=150)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "hf").mkdir()
    files = {"model-00001-of-00002.safetensors": 0, "model-00002-of-00002.safetensors": 1}
    where = {name: list(files)[i % 2] for i, name in enumerate(weights)}
    for file in files:
        own = {name: value for name, value in weights.items() if where[name] == file}
        save_file(own, folder / "hf" / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "file").mkdir()
    save_file(weights, folder / "file" / "x.safetensors")
    dcp.save({"model": weights, "step": 3}, checkpoint_id=folder / "dcp", no_dist=True)
    (folder / "pt").mkdir()
    named = {f"module.{name}": value for name, value in weights.items()}
    table = {"n_averaged": torch.tensor(9), **named}
    torch.save({"epoch": 3, "model_ema": table, "model": weights}, folder / "pt" / "x.pt")


# --- what another reader finds --------------------------------------------------------------------


def weights_of(path: Path) -> Weights | None:
    """name -> dtype, shape, bytes, as the safetensors library reads them; None if it does not."""
    from safetensors import deserialize

    try:
        files = [path]
        if path.is_dir():
            index = path / "model.safetensors.index.json"
            listed = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}
            alone = [each.name for each in path.glob("*.safetensors")]
            files = [path / name for name in sorted(set(listed.values()) or alone)]
        return {
            name: (value["dtype"], tuple(value["shape"]), bytes(value["data"]))
            for file in files
            for name, value in deserialize(file.read_bytes())
        }
    except Exception:
        return None


def tensors_of(path: Path) -> set[str]:
    """The hash of each tensor in a file of torch.save, as torch reads it without mapping it."""
    import torch

    found: set[str] = set()
    try:
        nodes = [torch.load(path, map_location="cpu", weights_only=True)]
    except Exception:
        return found
    for node in nodes:
        if isinstance(node, torch.Tensor):
            raw = node.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.add(hashlib.sha256(raw).hexdigest())
        elif isinstance(node, (dict, list, tuple)) and len(nodes) < 10_000:
            nodes.extend(node.values() if isinstance(node, dict) else node)
    return found


def is_explained(form: str, source: Path, good: Path, out: Weights) -> bool:
    """Whether everything that was converted is in the source.

    NOTE: torch itself reads wrong bytes where the offset of a record in the directory was changed
    and its mapping reads the right ones. So what is in the sound file is right too.
    """
    if form == "dcp":
        data = b"".join(path.read_bytes() for path in sorted(source.glob("*.distcp")))
        return all(raw in data for _, _, raw in out.values())
    if form == "pt":
        held = tensors_of(source) | tensors_of(good)
        return all(hashlib.sha256(raw).hexdigest() in held for _, _, raw in out.values())
    held_weights = weights_of(source)
    if held_weights is None:
        return False
    held_bytes = Counter(raw for _, _, raw in held_weights.values())
    return Counter(raw for _, _, raw in out.values()) <= held_bytes


@dataclass(frozen=True)
class Case:
    """A damaged checkpoint, and the sound ones it is compared with."""

    form: str
    source: Path
    good: Path
    out: Path
    mixed: Weights  # what `reconstruct` makes of the sound one

    def lines(self) -> Iterator[list[str]]:
        source, good, out = map(str, (self.source, self.good, self.out))
        yield ["inspect", source]
        yield ["convert", source, out]
        yield ["convert", source, "--list"]
        yield ["export", source, out]
        if self.form == "pt":  # for `convert` alone: the others refuse it alike, as `export` does
            return
        yield ["inspect", source, "--json"]
        yield ["verify", source]
        yield ["diff", source, good]
        yield ["export", good, out, "--like", source]
        yield ["average", source, good, out]
        yield ["reconstruct", source, out, "--sigma-rel", "0.07"]

    def is_right(self, line: list[str]) -> bool:
        """Whether a verb that exited with 0 was right to."""
        verb, found = line[0], weights_of(self.out)
        sound = weights_of(self.good)
        has_manifest = self.form == "ema" and os.path.lexists(self.source / "ema.json")
        held = sound if has_manifest else weights_of(self.source)
        if verb == "inspect" or "--list" in line:
            return True
        if verb in ("verify", "diff"):
            if self.form == "dcp":  # nothing in it can be compared
                return True
            if verb == "diff":
                return weights_of(self.source) == sound
            return held is not None and (not has_manifest or weights_of(self.source) == sound)
        if found is None:
            return False
        if verb == "reconstruct":
            return found == self.mixed
        if "--like" in line:
            kept = {name for name, value in found.items() if value[0] == sound[name][0]}  # type: ignore[index]
            return all(found[name] == sound[name] for name in kept)  # type: ignore[index]
        if verb == "average":
            return self.form == "dcp" or held is None or found.keys() == held.keys()
        if self.form == "dcp" or verb == "convert":
            return is_explained(self.form, self.source, self.good, found)
        return found == held


# --- one verb in a process ----------------------------------------------------------------------


def limit() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = MEMORY + (now if "torch" in sys.modules else 0)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STARTS = re.compile(
    r"os\.(system|exec|fork|posix_spawn|spawn|startfile)|subprocess\.|socket\.|pty\."
)
_CHANGES = re.compile(r"os\.(rename|remove|mkdir|rmdir|link|symlink|truncate|chmod|chown|utime)$")


def watch(allowed: Path) -> None:
    """Write a line to REPORT for each process, socket or change outside the `allowed` folder."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        paths: list[Any] = []
        if _STARTS.match(event):
            os.write(REPORT, f"{event}{arguments!r:.200}\n".encode())
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            paths = [arguments[0]]
        elif _CHANGES.match(event):
            paths = [each for each in arguments if isinstance(each, (str, bytes, os.PathLike))]
        at = (
            arguments[-1] if arguments and event != "open" else None
        )  # a folder's descriptor, or -1
        base = f"/proc/self/fd/{at}" if isinstance(at, int) and at > 2 else ""
        for path in paths:
            if isinstance(path, int):
                continue
            real = os.path.realpath(os.path.join(base, os.fsdecode(path)))
            if not Path(real).is_relative_to(allowed) and real != os.devnull:
                os.write(REPORT, f"{event}: {real}\n".encode())

    sys.addaudithook(audit)


def run(action: Callable[[], Any], folder: Path, allowed: Path) -> tuple[int, str, str]:
    """(exit code, or -signal; what it printed to stderr; what it must not have done).

    folder: for the output. allowed: where it may write.
    """
    names = [folder / "stdout", folder / "stderr", folder / "report"]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(action, names, allowed)
    until = time.monotonic() + SECONDS
    status: int | None = None
    while status is None and time.monotonic() < until:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), *(
        path.read_text(errors="replace") for path in names[1:]
    )


def _child(action: Callable[[], Any], names: list[Path], allowed: Path) -> NoReturn:
    code: Any = 99
    try:
        opened = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in names]
        for i, fd in zip((1, 2, REPORT), opened, strict=True):
            os.dup2(fd, i)
        limit()
        watch(allowed)
        code = action()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: kind, size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def problems(case: Case, line: list[str], folder: Path) -> Iterator[str]:
    """Everything that is wrong with how a verb took a case."""
    from dist_ema.cli import main

    before = snapshot(case.source.parent)
    code, err, report = run(lambda: main(line), folder, case.out.parent)
    if code not in (0, 1, 2):
        yield f"ended with {code}: {err[-300:]}"
    if "Traceback" in err:
        yield f"traceback: {err[-600:]}"
    if report:
        yield f"did what it must not: {report[:300]}"
    if snapshot(case.source.parent) != before:
        yield "changed what it read"
    beside = sorted(path.name for path in case.out.parent.iterdir() if path != case.out)
    if beside:
        yield f"left {beside} behind"
    if code and case.out.exists():
        yield "left an OUT although it failed"
    if code and not err and line[0] != "diff":
        yield "failed without a word"
    if len(err) > 20_000:
        yield f"said {len(err)} characters"
    if code == 0 and not case.is_right(line):
        yield "silent success: it is not what another reader finds"


# --- all of them ----------------------------------------------------------------------------------


def fuzz(files: int, seed: int, forms: list[str], verbose: bool) -> int:
    """Run, print every failure, and return their number."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    failures, outcomes = 0, Counter[str]()
    try:
        _in_child(lambda: build(root / "good"), root)
        case = root / "case"
        total = sum(FORMS[name].share for name in forms)
        for name in forms:
            if name == "pt":
                import torch

                torch.set_num_threads(1)
            form = FORMS[name]
            good = root / "good" / name
            mixed = _mixed(root) if name == "ema" else {}
            source = case / "from" / "a"
            for label, _ in islice(
                damaged(good, source, seed, form.changes), max(1, files * form.share // total)
            ):
                fuzzed = Case(
                    name, source / form.file, good / form.file, case / "to" / "out", mixed
                )
                for line in fuzzed.lines():
                    shutil.rmtree(case / "to", ignore_errors=True)
                    (case / "to").mkdir(parents=True)
                    found = list(problems(fuzzed, line, root))
                    outcomes[f"{name} {line[0]}: {'failed' if found else 'held'}"] += 1
                    failures += bool(found)
                    for problem in found:
                        print(
                            f"{name}, seed {seed}, {label}: {' '.join(line)}\n  {problem}",
                            flush=True,
                        )
            if verbose:
                print(f"{name}: done", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for what, count in sorted(outcomes.items()):
        print(f"{count:6} {what}")
    print(f"{files} files, {sum(outcomes.values())} runs, {failures} failures")
    return failures


def _mixed(root: Path) -> Weights:
    from dist_ema.cli import main

    line = ["reconstruct", str(root / "good" / "ema"), str(root / "mixed"), "--sigma-rel", "0.07"]
    _in_child(lambda: main(line), root)
    found = weights_of(root / "mixed")
    assert found
    return found


def _in_child(action: Callable[[], Any], root: Path) -> None:
    """In another process, because it may import torch."""
    (root / "good").mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def _preload() -> None:
    """Once, in place of once for each run."""
    import safetensors

    import dist_ema.offline.average
    import dist_ema.offline.convert
    import dist_ema.offline.diff
    import dist_ema.offline.export
    import dist_ema.offline.verify
    import dist_ema.posthoc.report

    assert safetensors
    assert dist_ema.posthoc.report


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    parser = argparse.ArgumentParser(description="Every verb on damaged files.")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    _preload()
    sys.exit(bool(fuzz(options.files, options.seed, options.forms, options.verbose)))
