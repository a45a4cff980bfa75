"""Other people's checkpoints into a model folder or file, through one window of memory.

A checkpoint of any form becomes a tree of tables. `recognise` finds the average in it and gives its
weights the model's names; the result is laid out as `export` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import _version
from ..checkpoint import atomic, manifest, safetensors
from ..checkpoint.manifest import Manifest
from ..dtypes import FLOATS, TO_TORCH, Bytes, cast
from ..foreign import recognise, torch_dcp, torch_save
from ..foreign.recognise import FoundAverage, Leaf
from ..text import plural, size, some
from . import writer
from .sources import WINDOW, Safetensors, Source, locate, pickled

__all__ = ["ConvertPlan", "ConvertRequest", "candidates", "plan", "write"]

_MAX_GROWTH = 4
_TORCH_FILES = ("*.pt", "*.pth", "*.ckpt", "*.bin", "*.tar")
_DIFFUSERS = (
    "optimization_step", "decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
)  # fmt: skip


@dataclass(frozen=True)
class ConvertRequest:
    """What is asked for. kind: one of foreign.KINDS, 'dcp', or 'auto'."""

    source: Path
    kind: str = "auto"  # or one of recognise.KINDS, or "dcp"
    key: str | None = None
    like: Path | None = None
    prefix: str = ""
    rest: str | None = None
    averaged_only: bool = False
    dtype: str | None = None  # of floating weights, as safetensors names it
    inert: Sequence[str] = ()
    max_size: int | None = None  # bytes to write at the most; None: four times those of the source


@dataclass(frozen=True)
class ConvertPlan:
    """The weights that will be written."""

    found: FoundAverage
    weights: Mapping[str, Leaf]  # by name, the rest included
    averaged: Sequence[str]
    aliases: Mapping[str, str]  # further name -> name
    dtypes: Mapping[str, str]  # name -> dtype in the output
    whole: bool  # with frozen weights and buffers, as far as the checkpoint has any
    notes: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def entries(self) -> dict[str, safetensors.Entry]:
        return {
            name: safetensors.Entry(self.dtypes[name], tuple(leaf.shape))
            for name, leaf in self.weights.items()
        }


@dataclass
class _ObjectTree:
    """A checkpoint, opened. ordered: its tables have the model's order."""

    root: Any
    form: str  # "dcp", "torch", "safetensors"
    ordered: bool = False
    # name -> why: the tensors that cannot be converted, and what is no tensor
    unsupported: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class _InFile:
    """A weight of a Source, as `foreign.Leaf`."""

    def __init__(self, model: Source, name: str) -> None:
        self._model, self._name = model, name
        self.dtype, self.shape = model.entries[name].dtype, tuple(model.entries[name].shape)
        self.key = (id(model), name)

    def read(self, begin: int, end: int) -> Bytes:
        return self._model.read(self._name, begin, end)


# --- what comes in --------------------------------------------------------------------------------


def _open(path: Path, inert: Sequence[str], stack: ExitStack) -> _ObjectTree:
    """Raises FileNotFoundError, and ValueError for what is no checkpoint."""
    path = locate(path)
    if not path.is_dir():
        return _open_file(path, inert, stack)
    if (path / torch_dcp.META).exists():
        return _open_dcp(stack.enter_context(torch_dcp.Folder(path)))
    return _open_folder(path, inert, stack)


def _open_dcp(folder: torch_dcp.Folder) -> _ObjectTree:
    root: dict[str, Any] = {}
    for name in folder.entries:
        *above, last = folder.paths[name]
        node = root
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{folder.path}: {name} lies inside another tensor.")
        node[last] = _InFile(folder, name)
    left = {name: why for name, why in folder.others.items() if name not in folder.unsupported}
    return _ObjectTree(_lists(root), "dcp", False, folder.unsupported, left)


def _lists(node: Any) -> Any:
    """Mappings numbered from 0 were lists."""
    if not isinstance(node, dict):
        return node
    values = {key: _lists(value) for key, value in node.items()}
    numbered = [str(i) for i in range(len(values))]
    is_list = bool(values) and values.keys() == set(numbered)
    return [values[key] for key in numbered] if is_list else values


def _open_folder(path: Path, inert: Sequence[str], stack: ExitStack) -> _ObjectTree:
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
        root = {name: _InFile(model, name) for model in models for name in model.entries}
        return _ObjectTree(root, "safetensors", extra=_of_config(path / "config.json"))
    others = sorted(each for pattern in _TORCH_FILES for each in path.glob(pattern))
    if len(others) == 1 and not files:
        return _open_file(others[0], inert, stack)
    there = ", ".join([*files, *(each.name for each in others)][:5])
    raise ValueError(
        f"{path} holds {'several checkpoints: ' + there if there else 'no checkpoint'}. Name one "
        "file."
    )


def _of_config(path: Path) -> dict[str, Any]:
    """What diffusers' EMAModel.save_pretrained puts into config.json.

    Without it the folder is a model.
    """
    config = _read_json(path) if path.is_file() else {}
    if not isinstance(config, dict) or "optimization_step" not in config:
        return {}
    values = {name: recognise.scalar(config.get(name)) for name in _DIFFUSERS}
    return {name: value for name, value in values.items() if value is not None}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def _open_file(path: Path, inert: Sequence[str], stack: ExitStack) -> _ObjectTree:
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file.")
    if path.suffix == ".safetensors" or not pickled(path):
        model = stack.enter_context(Safetensors(path))
        return _ObjectTree({name: _InFile(model, name) for name in model.entries}, "safetensors")
    root, unsupported = torch_save.load(path, inert)
    if not isinstance(root, (dict, list)):
        raise ValueError(
            f"{path} holds a {type(root).__name__}, not a table of tensors. Save state_dict() of "
            "it."
        )
    return _ObjectTree(root, "torch", True, unsupported)


# --- what is chosen -------------------------------------------------------------------------------


def candidates(request: ConvertRequest) -> tuple[list[FoundAverage], Mapping[str, str]]:
    """Every table that can be converted, averages first; and what is left unread, name -> why."""
    with ExitStack() as stack:
        tree = _open(request.source, request.inert, stack)
        return _found(tree), {**tree.left, **tree.unsupported}


def _found(tree: _ObjectTree) -> list[FoundAverage]:
    found = recognise.find(tree.root)
    if tree.extra:
        why = "config.json has an optimization_step: EMAModel.save_pretrained"
        found = [
            replace(each, kind="diffusers", why=why, average=True, extra=tree.extra)
            for each in found
            if not each.key
        ]
    return found


def plan(request: ConvertRequest, stack: ExitStack) -> ConvertPlan:
    """Open the source, choose, name.

    Raises ValueError with what to do. The stack closes what is read from.
    """
    tree = _open(request.source, request.inert, stack)
    found = (
        recognise.at(tree.root, request.key) if request.key is not None else _choose(request, tree)
    )
    notes = [f"took {_title(found)}: {found.why}"]
    if not found.average:
        notes.append("nothing in it says that it is an average")
    lost = [
        name for name in tree.unsupported if name.startswith(f"{found.key}." if found.key else "")
    ]
    if lost:
        raise ValueError(
            f"{request.source}: {lost[0]} cannot be converted ({tree.unsupported[lost[0]]})."
        )
    nameless = bool(found.nameless)
    if nameless:
        found = _named(request, found, stack)
        notes.append(f"names from {request.like}")
    return _complete(request, tree, found, notes, nameless)


def _choose(request: ConvertRequest, tree: _ObjectTree) -> FoundAverage:
    found = _found(tree)
    wanted = [each for each in found if request.kind in ("auto", "dcp", each.kind)]
    if request.kind == "dcp" and tree.form != "dcp":
        raise ValueError(
            f"{request.source} holds no {torch_dcp.META}: it is no folder of "
            "torch.distributed.checkpoint."
        )
    sure = [each for each in wanted if each.average and each.kind != "raw"]
    likely = [each for each in wanted if each.average]
    alone = wanted if len(wanted) == 1 and (wanted[0].key == "" or request.kind != "auto") else []
    for chosen in (sure, likely, alone):
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            raise ValueError(
                f"{request.source} holds several averages: {_listed(chosen)}. Choose one by its "
                "key."
            )
    what = "an average" if request.kind in ("auto", "dcp") else f"what {request.kind} writes"
    there = (
        f"It holds {_listed(found)}: choose one by its key"
        if found
        else "It holds no table of tensors"
    )
    raise ValueError(f"{request.source} does not show {what}. {there}.")


def _listed(found: Sequence[FoundAverage]) -> str:
    return some([_title(each) for each in found], 8)


def _title(found: FoundAverage) -> str:
    count = plural(len(found.weights) or len(found.nameless), "tensor")
    return f"{found.key or 'the whole file'} ({found.kind}, {count})"


def _named(request: ConvertRequest, found: FoundAverage, stack: ExitStack) -> FoundAverage:
    if request.like is None:
        raise ValueError(
            f"{_title(found)} in {request.source} is a list without names. Give the "
            "live model as torch.save wrote its state_dict, or a JSON list of the names in "
            "model.named_parameters()."
        )
    if request.like.suffix == ".json":
        names = _read_json(request.like)
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise ValueError(f"{request.like} must hold a list of names.")
        return recognise.name(found, names, True)
    tree = _open(request.like, request.inert, stack)
    live = [each for each in recognise.find(tree.root) if each.weights and not each.average]
    if len(live) != 1:
        raise ValueError(
            f"{request.like} must hold one table of live weights, found {_listed(live) or 'none'}."
        )
    return recognise.name(found, live[0].weights, tree.ordered)


def _complete(
    request: ConvertRequest,
    tree: _ObjectTree,
    found: FoundAverage,
    notes: list[str],
    nameless: bool,
) -> ConvertPlan:
    weights = recognise.without_wrappers(found.weights)
    rest = recognise.without_wrappers(_rest(request, tree, found))
    _refuse_growth(request, [*weights.values(), *rest.values()])
    for name in sorted(rest.keys() & weights.keys()):
        if rest[name].shape != weights[name].shape:
            raise ValueError(
                f"{name} is {weights[name].shape} in the average, {rest[name].shape} in the live "
                "model."
            )
    tied = _tied(weights, rest)
    notes.extend(f"{name} is tied to {other} in the live model" for name, other in tied.items())
    weights |= {name: weights[other] for name, other in tied.items()}
    wanted = {} if request.averaged_only else rest
    more = {name: leaf for name, leaf in wanted.items() if name not in weights}
    if more:
        notes.append(
            f"{len(more)} weights that are not averaged come from the live model: "
            f"{', '.join(sorted(more)[:3])} ..."
        )
    averaged = sorted(
        name for name, leaf in weights.items() if leaf.dtype in FLOATS and found.average
    )
    whole = not request.averaged_only and (
        bool(more) or (found.kind != "dist-ema" and not nameless)
    )
    cut = len(request.prefix)
    weights = {
        name[cut:]: leaf
        for name, leaf in (weights | more).items()
        if name.startswith(request.prefix)
    }
    averaged = [name[cut:] for name in averaged if name.startswith(request.prefix)]
    if not weights:
        raise ValueError(f"no weight of {_title(found)} begins with {request.prefix!r}.")
    chosen = ConvertPlan(
        replace(found, extra={**tree.extra, **found.extra}), weights, averaged, {}, {}, whole, notes
    )
    return _deduplicated(request, chosen)


def _refuse_growth(request: ConvertRequest, leaves: Sequence[Leaf]) -> None:
    """Raise ValueError where more would be written than the source explains: views repeat bytes."""
    once = {_key(leaf): leaf for leaf in leaves}.values()  # tied weights are one
    entries = [safetensors.Entry(_output_dtype(request, leaf), leaf.shape) for leaf in once]
    nbytes = sum(entry.nbytes for entry in entries)
    held = sum(_nbytes_at(path) for path in (request.source, request.like) if path is not None)
    limit = _MAX_GROWTH * held if request.max_size is None else request.max_size
    if nbytes > limit:
        raise ValueError(
            f"{request.source} holds {size(held)}, and {size(nbytes)} would be written, more than "
            f"the {size(limit)} that are allowed. Its tensors are probably views that repeat their "
            "elements. If that is meant, allow a larger max_size."
        )


def _nbytes_at(path: Path) -> int:
    path = atomic.follow(path)
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(each.stat().st_size for each in files if each.is_file())


def _output_dtype(request: ConvertRequest, leaf: Leaf) -> str:
    return request.dtype if request.dtype and leaf.dtype in FLOATS else leaf.dtype


def _rest(request: ConvertRequest, tree: _ObjectTree, found: FoundAverage) -> Mapping[str, Leaf]:
    """The live model beside the average, for what is not averaged."""
    if request.rest is not None:
        return {**recognise.at(tree.root, request.rest).weights, **found.rest}
    if found.kind != "dist-ema" or request.averaged_only:
        return found.rest
    names = set(found.weights)
    live = [
        each
        for each in recognise.find(tree.root)
        if not each.average and names <= set(recognise.without_wrappers(each.weights))
    ]
    return {**(live[0].weights if len(live) == 1 else {}), **found.rest}


def _tied(averaged: Mapping[str, Leaf], live: Mapping[str, Leaf]) -> dict[str, str]:
    """Names of live weights that are an averaged weight -> the name of that.

    They share memory in the checkpoint, or a matrix has the same bytes: files that write tied
    weights twice hold nothing more. Else the second name would keep its live values.
    """
    known = {name: live[name] for name in averaged if name in live}
    found = {}
    for name in (name for name in live if name not in averaged):
        same = [other for other, leaf in known.items() if _is_one(live[name], leaf)]
        if same:
            found[name] = same[0]
    return found


def _is_one(a: Leaf, b: Leaf) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or 0 in a.shape:
        return False
    if _key(a) == _key(b):
        return True
    pairs = zip(_content(a, a.dtype), _content(b, b.dtype), strict=True)
    return len(a.shape) > 1 and all(bool((x == y).all()) for x, y in pairs)


def _key(leaf: Leaf) -> Any:
    """The same for leaves that are one tensor."""
    return getattr(leaf, "key", id(leaf))


def _deduplicated(request: ConvertRequest, plan: ConvertPlan) -> ConvertPlan:
    """Tied weights once, under the name that comes first; and the dtypes of the output."""
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, leaf in plan.weights.items():
        key = _key(leaf) if 0 not in leaf.shape else id(leaf)
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    kept = {name: leaf for name, leaf in plan.weights.items() if name not in aliases}
    dtypes = {name: _output_dtype(request, leaf) for name, leaf in kept.items()}
    averaged = [name for name in plan.averaged if name in kept]
    return replace(plan, weights=kept, averaged=averaged, aliases=aliases, dtypes=dtypes)


# --- what goes out --------------------------------------------------------------------------------


def write(
    plan: ConvertPlan,
    out: Path,
    *,
    force: bool,
    tick: Callable[[int], None],
    max_shard_size: str | None = None,
) -> Manifest:
    """Write the model, atomically. Returns its ema.json. *Cost*: one window."""
    out = Path(os.path.realpath(out))  # through a link
    files = writer.lay_out(out, plan.entries, plan.aliases, max_shard_size)
    facts = Manifest(
        kind="export",
        weights="all" if plan.whole else "averaged",
        averaged=sorted(plan.averaged),
        aliases=manifest.group_aliases(plan.aliases),
        dtypes={name: TO_TORCH[leaf.dtype] for name, leaf in plan.weights.items()},
        versions={"dist_ema": _version.VERSION},
        extra={"converted": {"from": plan.found.kind, "key": plan.found.key, **plan.found.extra}},
    )
    model = writer.Model(files, safetensors.INDEX, {}, facts)
    writer.write(
        out,
        model,
        lambda name: _content(plan.weights[name], plan.dtypes[name], name),
        force=force,
        tick=tick,
    )
    return facts


def _content(leaf: Leaf, dtype: str, name: str = "") -> Iterator[Bytes]:
    size = safetensors.Entry(leaf.dtype, tuple(leaf.shape)).nbytes
    for begin in range(0, size, WINDOW):
        yield cast(name, leaf.read(begin, min(begin + WINDOW, size)), leaf.dtype, dtype)
