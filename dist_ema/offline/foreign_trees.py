"""`open_tree`: a foreign folder or file, whatever its form, opened as one `ObjectTree` of leaves.

A file of torch.save, a folder of torch.distributed.checkpoint, safetensors of Hugging Face or
diffusers: each becomes mappings and lists with a `recognise.Leaf` for each tensor. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import disk, manifest, safetensors
from ..foreign import recognise, torch_dcp, torch_save
from . import sources

__all__ = ["ObjectTree", "open_tree", "read_json"]

_TORCH_FILES = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.tar")


@dataclass
class ObjectTree:
    """A checkpoint, opened. ordered: its tables have the model's order."""

    root: Any
    form: str  # "dcp", "torch", "safetensors"
    ordered: bool = False
    # name -> why: the tensors that cannot be converted, and what is no tensor
    unsupported: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def _leaves_of(model: sources.Source) -> dict[str, recognise.Leaf]:
    return {
        name: recognise.Leaf(
            entry.dtype, tuple(entry.shape), partial(model.read, name), (id(model), name)
        )
        for name, entry in model.entries.items()
    }


def open_tree(path: Path, inert: Sequence[str], stack: ExitStack) -> ObjectTree:
    """Raises FileNotFoundError, and ValueError for what is no checkpoint."""
    path = sources.locate(path)
    if not path.is_dir():
        return _open_file(path, inert, stack)
    if (path / torch_dcp.META).exists():
        return _open_dcp(stack.enter_context(torch_dcp.Folder(path)))
    return _open_folder(path, inert, stack)


def _open_dcp(folder: torch_dcp.Folder) -> ObjectTree:
    root: dict[str, Any] = {}
    for name, leaf in _leaves_of(folder).items():
        *above, last = folder.paths[name]
        node = root
        for key in above:
            # DCP flattens nested tables into paths; this builds the tables again.
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{folder.path}: {name} lies inside another tensor.")
        node[last] = leaf
    return ObjectTree(
        _lists(root),
        "dcp",
        unsupported=folder.unsupported,
        left={name: why for name, why in folder.others.items() if name not in folder.unsupported},
    )


def _lists(node: Any) -> Any:
    """Mappings numbered from 0 were lists."""
    if not isinstance(node, dict):
        return node
    values = {key: _lists(value) for key, value in node.items()}
    numbered = [str(i) for i in range(len(values))]
    is_list = bool(values) and values.keys() == set(numbered)
    return [values[key] for key in numbered] if is_list else values


def _open_folder(path: Path, inert: Sequence[str], stack: ExitStack) -> ObjectTree:
    """A folder of Hugging Face, diffusers, or with one checkpoint in it."""
    if (path / manifest.META).exists():
        raise ValueError(
            f"{path} is dist_ema's own already: `dist-ema export {path} OUT` makes a model of it."
        )
    indices = [file.name for file in path.glob("*.safetensors.index.json")]
    tensor_files = {file.name for file in path.glob("*.safetensors")}
    if len(indices) == 1 or len(tensor_files) == 1:
        if len(indices) == 1:
            tensor_files = set(safetensors.read_index(path, indices[0]).values())
        root: dict[str, recognise.Leaf] = {}
        for file in sorted(tensor_files):
            root |= _leaves_of(stack.enter_context(sources.Safetensors(path / file)))
        return ObjectTree(root, "safetensors", extra=_settings_of(path / "config.json"))
    # One pickle among files without weights is what is meant.
    torch_files = sorted(file for pattern in _TORCH_FILES for file in path.glob(pattern))
    if len(torch_files) == 1 and not tensor_files:
        return _open_file(torch_files[0], inert, stack)
    there = ", ".join([*sorted(tensor_files), *(file.name for file in torch_files)][:5])
    raise ValueError(
        f"{path} holds {'several checkpoints: ' + there if there else 'no checkpoint'}. Name one "
        "file."
    )


def _settings_of(config_path: Path) -> dict[str, Any]:
    """The settings of an EMAModel of diffusers; {} where config.json is that of a model alone."""
    config = read_json(config_path) if config_path.is_file() else {}
    # EMAModel.save_pretrained adds its own settings to the config of the model.
    if not isinstance(config, dict) or "optimization_step" not in config:
        return {}
    settings = {name: recognise.scalar(config.get(name)) for name in recognise.DIFFUSERS}
    return {name: value for name, value in settings.items() if value is not None}


def read_json(path: Path) -> Any:
    """The value in a JSON file of another program."""
    try:
        with disk.disk_errors(path):
            return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def _open_file(path: Path, inert: Sequence[str], stack: ExitStack) -> ObjectTree:
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    # Files are told by their first bytes, because any name may hold either form.
    if path.suffix == ".safetensors" or not sources.pickled(path):
        return ObjectTree(_leaves_of(stack.enter_context(sources.Safetensors(path))), "safetensors")
    root, unsupported = torch_save.load(path, inert)
    if not isinstance(root, (dict, list)):
        kind = "tensor" if isinstance(root, recognise.Leaf) else type(root).__name__
        raise ValueError(f"{path} holds one {kind}, not a table of tensors. Save a state_dict().")
    return ObjectTree(root, "torch", True, unsupported)
