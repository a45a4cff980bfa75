"""`dist-ema convert`: the average in a foreign checkpoint, chosen, completed, written as a model.

*Cost*: one window of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import manifest, pointers, safetensors
from ..dtypes import TO_TORCH, Bytes, cast, float_dtype
from ..foreign import recognise, torch_dcp
from ..foreign.recognise import FoundAverage, Leaf
from ..text import plural, size, some
from . import blend, foreign_trees, sources, sums, writer
from .foreign_names import give_names, without_wrappers

__all__ = ["ConvertPlan", "ConvertRequest", "candidates", "plan", "write"]

_MAX_GROWTH = 4


@dataclass(frozen=True)
class ConvertRequest:
    """The arguments of a conversion."""

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


# --- what is chosen -------------------------------------------------------------------------------


def candidates(request: ConvertRequest) -> tuple[list[FoundAverage], Mapping[str, str]]:
    """Every table that can be converted, averages first; and what is left unread, name -> why."""
    with ExitStack() as stack:
        tree = foreign_trees.open_tree(request.source, request.inert, stack)
        return _tables_in(tree), {**tree.left, **tree.unsupported}


def _tables_in(tree: foreign_trees.ObjectTree) -> list[FoundAverage]:
    tables = recognise.find(tree.root)
    if not tree.extra:
        return tables
    why = "config.json has an optimization_step: EMAModel.save_pretrained"
    return [
        replace(table, kind="diffusers", why=why, average=True, extra=tree.extra)
        for table in tables
        if not table.key
    ]


def plan(request: ConvertRequest, stack: ExitStack) -> ConvertPlan:
    """Open the source, choose the average in it, and name its weights.

    Raises ValueError with what to do. The stack closes the files.
    """
    tree = foreign_trees.open_tree(request.source, request.inert, stack)
    found = (
        recognise.at(tree.root, request.key) if request.key is not None else _choose(request, tree)
    )
    notes = [f"took {_title(found)}: {found.why}"]
    if not found.average:
        notes.append("nothing in it says that it is an average")
    # What cannot be converted elsewhere in the checkpoint does no harm.
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


def _choose(request: ConvertRequest, tree: foreign_trees.ObjectTree) -> FoundAverage:
    tables = _tables_in(tree)
    wanted = [table for table in tables if request.kind in ("auto", "dcp", table.kind)]
    if request.kind == "dcp" and tree.form != "dcp":
        raise ValueError(
            f"{request.source} holds no {torch_dcp.META}: it is no folder of "
            "torch.distributed.checkpoint."
        )
    # From what names itself an average down to the only table there is.
    for chosen in (
        [table for table in wanted if table.average and table.kind != "raw"],
        [table for table in wanted if table.average],
        wanted if len(wanted) == 1 and (wanted[0].key == "" or request.kind != "auto") else [],
    ):
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            raise ValueError(
                f"{request.source} holds several averages: {_listed(chosen)}. Choose one by its "
                "key."
            )
    what = "an average" if request.kind in ("auto", "dcp") else f"what {request.kind} writes"
    raise ValueError(
        f"{request.source} does not show {what}. It holds "
        + (f"{_listed(tables)}: choose one by its key." if tables else "no table of tensors.")
    )


def _listed(tables: Sequence[FoundAverage]) -> str:
    return some(list(map(_title, tables)), 8)


def _title(found: FoundAverage) -> str:
    tensors = found.weights or found.nameless
    return f"{found.key or 'the whole file'} ({found.kind}, {plural(len(tensors), 'tensor')})"


def _named(request: ConvertRequest, found: FoundAverage, stack: ExitStack) -> FoundAverage:
    if request.like is None:
        raise ValueError(
            f"{_title(found)} in {request.source} is a list without names. Give the "
            "live model as torch.save wrote its state_dict, or a JSON list of the names in "
            "model.named_parameters()."
        )
    if request.like.suffix == ".json":
        names = foreign_trees.read_json(request.like)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{request.like} must hold a list of names.")
        return give_names(found, names, True)
    tree = foreign_trees.open_tree(request.like, request.inert, stack)
    # The names of an average are those of the live model beside it.
    live = [table for table in recognise.find(tree.root) if table.weights and not table.average]
    if len(live) != 1:
        raise ValueError(
            f"{request.like} must hold one table of live weights, found {_listed(live) or 'none'}."
        )
    return give_names(found, live[0].weights, tree.ordered)


def _complete(
    request: ConvertRequest,
    tree: foreign_trees.ObjectTree,
    found: FoundAverage,
    notes: list[str],
    nameless: bool,
) -> ConvertPlan:
    weights = without_wrappers(found.weights)
    rest = without_wrappers(_rest(request, tree, found))
    _refuse_growth(request, [*weights.values(), *rest.values()])
    for name in sorted(rest.keys() & weights.keys()):
        if rest[name].shape != weights[name].shape:
            raise ValueError(
                f"{name} is {weights[name].shape} in the average, {rest[name].shape} in the live "
                "model."
            )
    # Before the rest is taken in, or the other name of a tied weight would be live.
    tied = _tied(weights, rest)
    notes.extend(f"{name} is tied to {other} in the live model" for name, other in tied.items())
    weights |= {name: weights[other] for name, other in tied.items()}
    more = {
        name: leaf
        for name, leaf in rest.items()
        if name not in weights and not request.averaged_only
    }
    if more:
        notes.append(
            f"{plural(len(more), 'weight')} not averaged, from the live model: "
            f"{some(sorted(more), 3)}"
        )
    whole = not request.averaged_only and (
        bool(more) or (found.kind != "dist-ema" and not nameless)
    )
    chosen = {
        name.removeprefix(request.prefix): leaf
        for name, leaf in (weights | more).items()
        if name.startswith(request.prefix)
    }
    if not chosen:
        raise ValueError(f"no weight of {_title(found)} begins with {request.prefix!r}.")
    # After the prefix is cut, because a tied name outside of it is not written.
    aliases = _aliases(chosen)
    kept = {name: leaf for name, leaf in chosen.items() if name not in aliases}
    return ConvertPlan(
        replace(found, extra={**tree.extra, **found.extra}),
        kept,
        sorted(
            name
            for name, leaf in kept.items()
            if found.average and request.prefix + name in weights and blend.numeric(leaf.dtype)
        ),
        aliases,
        {name: float_dtype(leaf.dtype, request.dtype) for name, leaf in kept.items()},
        whole,
        notes,
    )


def _refuse_growth(request: ConvertRequest, leaves: Sequence[Leaf]) -> None:
    """Raise ValueError where more would be written than the source explains: views repeat bytes."""
    once = {leaf.key: leaf for leaf in leaves}.values()  # tied weights are one
    nbytes = sum(
        safetensors.Entry(float_dtype(leaf.dtype, request.dtype), leaf.shape).nbytes
        for leaf in once
    )
    held = sum(_nbytes_at(path) for path in (request.source, request.like) if path is not None)
    limit = _MAX_GROWTH * held if request.max_size is None else request.max_size
    if nbytes > limit:
        raise ValueError(
            f"{request.source} holds {size(held)}, and {size(nbytes)} would be written, more than "
            f"the {size(limit)} that are allowed. Its tensors are probably views that repeat their "
            "elements. If that is meant, allow a larger max_size."
        )


def _nbytes_at(path: Path) -> int:
    path = pointers.follow(path)
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _rest(
    request: ConvertRequest, tree: foreign_trees.ObjectTree, found: FoundAverage
) -> Mapping[str, Leaf]:
    """The live model beside the average, for what is not averaged."""
    if request.rest is not None:
        return {**recognise.at(tree.root, request.rest).weights, **found.rest}
    # In the others the average is a whole model, or names what lies beside it.
    if found.kind != "dist-ema" or request.averaged_only:
        return found.rest
    live = [
        table
        for table in recognise.find(tree.root)
        if not table.average and found.weights.keys() <= without_wrappers(table.weights).keys()
    ]
    return {**(live[0].weights if len(live) == 1 else {}), **found.rest}


def _tied(averaged: Mapping[str, Leaf], live: Mapping[str, Leaf]) -> dict[str, str]:
    """Names of live weights that are an averaged weight -> the name of that.

    They share memory in the checkpoint, or a matrix has the same bytes: files that write tied
    weights twice hold nothing more. Else the second name would keep its live values.
    """
    known = {name: live[name] for name in averaged if name in live}
    tied = {}
    for name in (name for name in live if name not in averaged):
        same = [other for other, leaf in known.items() if _is_one(live[name], leaf)]
        if same:
            tied[name] = same[0]
    return tied


def _is_one(a: Leaf, b: Leaf) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or 0 in a.shape:
        return False
    pairs = zip(_content(a, a.dtype), _content(b, b.dtype), strict=True)
    return a.key == b.key or (len(a.shape) > 1 and all(bool((x == y).all()) for x, y in pairs))


def _aliases(weights: Mapping[str, Leaf]) -> dict[str, str]:
    """Further name -> the first one, of weights that are one tensor."""
    first: dict[Any, str] = {}
    for name, leaf in weights.items():
        # Empty tensors share no memory that could tell them to be one.
        first.setdefault(leaf.key if 0 not in leaf.shape else id(leaf), name)
    return {
        alias: first[leaf.key]
        for alias, leaf in weights.items()
        if first.get(leaf.key, alias) != alias
    }


# --- what goes out --------------------------------------------------------------------------------


def write(
    plan: ConvertPlan,
    out: Path,
    *,
    force: bool,
    tick: Callable[[int], None],
    max_shard_size: str | None = None,
) -> manifest.Manifest:
    """Write the model, atomically. Returns its ema.json. *Cost*: one window."""
    origin = {"from": plan.found.kind, "key": plan.found.key, **plan.found.extra}
    return writer.write_model(
        out,
        plan.entries,
        plan.aliases,
        lambda names: (
            sums.FileWindow(raw)
            for name in names
            for raw in _content(plan.weights[name], plan.dtypes[name], name)
        ),
        manifest.Manifest(
            weights="all" if plan.whole else "averaged",
            averaged=sorted(plan.averaged),
            dtypes={name: TO_TORCH[leaf.dtype] for name, leaf in plan.weights.items()},
            extra={"converted": origin},
        ),
        max_shard_size=max_shard_size,
        force=force,
        tick=tick,
    )


def _content(leaf: Leaf, dtype: str, name: str = "") -> Iterator[Bytes]:
    for begin, end in sources.ranges(0, safetensors.Entry(leaf.dtype, leaf.shape).nbytes):
        yield cast(name, leaf.read(begin, end), leaf.dtype, dtype)
