"""Other people's checkpoints, as one tree of tables whatever their form on disk, and their names.

A file of torch.save, a folder of torch.distributed.checkpoint, safetensors of Hugging Face or
diffusers: each becomes mappings and lists with a `recognise.Leaf` for each tensor. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint import disk, manifest, safetensors
from ..foreign import recognise, torch_dcp, torch_save
from ..foreign.recognise import FoundAverage, Leaf
from ..sharding.wrapper_names import canonical
from .sources import Safetensors, Source, locate, pickled

__all__ = ["ObjectTree", "give_names", "open_tree", "read_json", "without_wrappers"]

_TORCH_FILES = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.tar")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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


def _leaves_of(model: Source) -> dict[str, Leaf]:
    """The weights of a model, by name."""
    return {
        name: Leaf(entry.dtype, tuple(entry.shape), partial(model.read, name), (id(model), name))
        for name, entry in model.entries.items()
    }


def open_tree(path: Path, inert: Sequence[str], stack: ExitStack) -> ObjectTree:
    """Raises FileNotFoundError, and ValueError for what is no checkpoint."""
    path = locate(path)
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
    left = {name: why for name, why in folder.others.items() if name not in folder.unsupported}
    return ObjectTree(_lists(root), "dcp", False, folder.unsupported, left)


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
    indices = [each.name for each in path.glob("*.safetensors.index.json")]
    files = sorted(each.name for each in path.glob("*.safetensors"))
    if len(indices) == 1 or len(files) == 1:
        indexed = safetensors.read_index(path, indices[0]).values() if len(indices) == 1 else files
        names = sorted(set(indexed))
        models = [stack.enter_context(Safetensors(path / name)) for name in names]
        root = {name: leaf for model in models for name, leaf in _leaves_of(model).items()}
        return ObjectTree(root, "safetensors", extra=_of_config(path / "config.json"))
    # One pickle among files without weights is what is meant.
    others = sorted(each for pattern in _TORCH_FILES for each in path.glob(pattern))
    if len(others) == 1 and not files:
        return _open_file(others[0], inert, stack)
    there = ", ".join([*files, *(each.name for each in others)][:5])
    raise ValueError(
        f"{path} holds {'several checkpoints: ' + there if there else 'no checkpoint'}. Name one "
        "file."
    )


def _of_config(path: Path) -> dict[str, Any]:
    """The settings that diffusers' EMAModel.save_pretrained puts into config.json.

    Without it the folder is a model.
    """
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict) or "optimization_step" not in config:
        return {}
    values = {name: recognise.scalar(config.get(name)) for name in recognise.DIFFUSERS}
    return {name: value for name, value in values.items() if value is not None}


def read_json(path: Path) -> Any:
    try:
        with disk.disk_errors(path):
            return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def _open_file(path: Path, inert: Sequence[str], stack: ExitStack) -> ObjectTree:
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    # Files are told by their first bytes, because any name may hold either form.
    if path.suffix == ".safetensors" or not pickled(path):
        return ObjectTree(_leaves_of(stack.enter_context(Safetensors(path))), "safetensors")
    root, unsupported = torch_save.load(path, inert)
    if not isinstance(root, (dict, list)):
        raise ValueError(
            f"{path} holds a {type(root).__name__}, not a table of tensors. Save state_dict() of "
            "it."
        )
    return ObjectTree(root, "torch", True, unsupported)


# --- names ---------------------------------------------------------------------------------------


def give_names(
    found: FoundAverage, names: Mapping[str, Leaf] | Sequence[str], ordered: bool
) -> FoundAverage:
    """Give a list of tensors the names of the model's parameters, in their order.

    Args:
        found: An average with `nameless` tensors.
        names: The live model, or the names alone. Its statistics and integers are no parameters,
            and become `rest`.
        ordered: Whether the mapping has the model's order. Where it is sorted by name, only a
            unique shape tells.

    Raises:
        ValueError: The number, a shape or the order does not fit.
    """
    if not isinstance(names, Mapping):
        return replace(found, weights=_pair(found, list(names)), nameless=())
    # A tied weight is one parameter.
    first = {leaf.key: name for name, leaf in reversed(list(names.items()))}
    parameters = {
        name: leaf
        for name, leaf in names.items()
        if leaf.dtype.startswith(("F", "BF", "C"))
        # A list of parameters holds no buffers, and a state_dict does.
        and name.rpartition(".")[2] not in _STATISTICS
        and name in first.values()
    }
    weights = _pair(found, list(parameters)) if ordered else _by_shape(found, parameters)
    for name, leaf in weights.items():
        if leaf.shape != parameters[name].shape:
            raise ValueError(
                f"{name} is {leaf.shape} by its place in the list, {parameters[name].shape} in the "
                "model. Either they are of two models, or the list leaves out parameters: give "
                "their names as a JSON list."
            )
    return replace(found, weights=weights, nameless=(), rest=names)


def _pair(found: FoundAverage, names: list[str]) -> dict[str, Leaf]:
    if len(set(names)) != len(found.nameless):
        raise ValueError(
            f"{len(found.nameless)} tensors without names, and {len(set(names))} names for them. "
            "Give the names of exactly the parameters that were averaged, as a JSON list."
        )
    return dict(zip(names, found.nameless, strict=True))


def _by_shape(found: FoundAverage, parameters: Mapping[str, Leaf]) -> dict[str, Leaf]:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, leaf in parameters.items():
        by_shape.setdefault(leaf.shape, []).append(name)
    _pair(found, list(parameters))
    for shadow in found.nameless:
        fits = by_shape.get(shadow.shape, [])
        if len(fits) != 1:
            raise ValueError(
                f"a tensor of shape {shadow.shape} has no name, and {len(fits)} weights of the "
                f"model have that shape ({', '.join(fits[:3])}). It comes from a format whose file "
                "sorts them by name, so their order is lost. Give torch.save(model.state_dict(), "
                "'live.pt'), or a JSON list of the names in model.named_parameters()."
            )
    return {by_shape[shadow.shape][0]: shadow for shadow in found.nameless}


def without_wrappers(weights: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Cut what wrappers add to names. Raises ValueError where two names become one."""
    # DDP renames every weight; a model may also have a child called `module`.
    ddp = all(old.startswith("module.") for old in weights)
    cut: dict[str, str] = {}  # new name -> old
    for old in weights:
        new = canonical(old.removeprefix("module.") if ddp else old)
        if new in cut:
            raise ValueError(
                f"{old} and {cut[new]} are both {new} without their wrappers. Choose one of the "
                "two tables by its key, or a prefix of its names."
            )
        cut[new] = old
    return {new: weights[old] for new, old in cut.items()}
