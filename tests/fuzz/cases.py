"""The forms of checkpoints that are damaged, the verbs that read them, and what is right."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import BYTES, MODEL, Draw
from .containers import ARCHIVE_CHANGES, DCP_CHANGES

__all__ = ["FORMS", "Case", "Form", "Weights", "build", "mix", "preload", "weights_of"]

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


def mix(root: Path) -> None:
    """What `reconstruct` makes of the sound checkpoint, as root/mixed."""
    from dist_ema.cli import main

    main(["reconstruct", str(root / "good" / "ema"), str(root / "mixed"), "--sigma-rel", "0.07"])


def preload() -> None:
    """Import what the verbs need, once in place of once for each run."""
    import safetensors

    import dist_ema.offline.average
    import dist_ema.offline.convert
    import dist_ema.offline.diff
    import dist_ema.offline.export
    import dist_ema.offline.verify
    import dist_ema.posthoc.mixtures

    assert safetensors
    assert dist_ema.posthoc.mixtures


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
            assert sound is not None
            kept = {name for name, value in found.items() if value[0] == sound[name][0]}
            return all(found[name] == sound[name] for name in kept)
        if verb == "average":
            return self.form == "dcp" or held is None or found.keys() == held.keys()
        if self.form == "dcp" or verb == "convert":
            return is_explained(self.form, self.source, self.good, found)
        return found == held
