"""A model made ready to ship, in one pass: the average's weights under the names, files and dtypes that its users expect.

*Cost*: one window of 16 MB and its copies in other dtypes, whatever the size of the model. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import _version
from ..checkpoint import manifest, safetensors
from ..checkpoint.manifest import Manifest
from ..dtypes import FLOATS, TORCH, Bytes, fitted, narrow, widen
from ..text import Bar, silent, size_of, some
from . import model_card, writer
from .report import report_on
from .sources import Checked, Safetensors, Source, open_model, refuse_odd, windows

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written. beside: the names of what lies beside the weights."""

    path: str
    source: str
    average: str  # its schedule, '' where the source does not tell
    files: dict[str, int]  # name -> bytes
    weights: int
    dtypes: dict[str, int]  # -> how many weights
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Form:
    """What the files will hold."""

    names: dict[str, str]  # name in the files -> name in the source
    entries: dict[str, safetensors.Entry]  # by the names in the files
    files: dict[str, safetensors.SafetensorsFile]
    index: str
    aliases: dict[str, list[str]]  # name in the files -> further names of the same weight

    @property
    def dtypes(self) -> dict[str, int]:
        return model_card.dtypes(self.entries)


def export(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    like: str | Path | None = None,
    which: int | str = 0,
    force: bool = False,
    bar: Bar = silent,
) -> Exported:
    """Write the model to a folder, or to one file if `out` ends in .safetensors. Atomic.

    dtype: of all floating weights, else the model's own. like: a model whose files, names, order and dtypes are taken.
    Raises ValueError where the two do not hold the same weights, `src` is not complete or is damaged, or `out` is taken.
    """
    where = Path(os.path.realpath(out))
    for each in (src,) if like is None else (src, like):
        writer.refuse_place(each, out)
    writer.refuse_target(where, force)
    with open_model(src, which) as model:
        _refuse_part(model, like)
        saved = _sound(model)
        form = _form(model, saved, where, dtype, max_shard_size, like)
        facts = _facts(model, saved, form)
        beside = (
            {}
            if where.suffix == ".safetensors"
            else model_card.beside(Path(like or model.path), where, facts, form.entries)
        )
        target = writer.Model(form.files, form.index, beside, facts)
        source = Checked(model)

        def content(name: str) -> Iterator[Bytes]:
            was, now = model.entries[form.names[name]].dtype, form.entries[name].dtype
            for raw in windows(source, form.names[name]):
                yield raw if was == now else _cast(name, raw, was, now)

        with bar(sum(entry.nbytes for entry in form.entries.values())) as tick:
            writer.write(where, target, content, force=force, tick=tick, check=source.finish)
    average = ", ".join(map(model_card.format_schedule, facts.schedules))
    files = {name: file.size for name, file in form.files.items()}
    return Exported(
        str(out), str(src), average, files, len(form.entries), form.dtypes, sorted(beside)
    )


# --- what is refused ---------------------------------------------------------------------------------------------


def _refuse_part(model: Source, like: str | Path | None) -> None:
    """A part of a model must not be shipped as the whole."""
    path = Path(os.path.realpath(model.path))
    if not model.entries:
        raise ValueError(f"{model.path} holds no weights: there is nothing to export.")
    if model.manifest is not None and model.manifest.weights != "all" and like is None:
        raise ValueError(
            f"{model.path} holds averaged weights only (EMA(only=...)), so it is no complete model. Use ema.export(), or "
            "pass like= with a model of the same names to prove that nothing is missing."
        )
    if like is None:  # which proves that nothing is missing
        refuse_odd(model)
    run = path.parent.parent
    if path.parent.name == "averages" and (run / manifest.META).exists():
        raise ValueError(f"{model.path} is a part of {run}: export that with which={path.name!r}.")
    if path.is_file() and isinstance(model, Safetensors) and model.listed is not None:
        raise ValueError(f"{model.path} is a part of {path.parent}: name the folder.")


def _sound(model: Source) -> Manifest:
    """ema.json. Raises ValueError if it contradicts the files."""
    if model.manifest is None:
        return Manifest()
    problems = report_on(model.path).problems
    if problems:
        raise ValueError(
            f"{model.path / manifest.META} is not sound: {problems[0]}. `dist-ema verify` lists everything."
        )
    return model.manifest


# --- what the files will hold ------------------------------------------------------------------------------------


def _form(
    model: Source,
    saved: Manifest,
    where: Path,
    dtype: str | None,
    size: int | str | None,
    like: str | Path | None,
) -> _Form:
    if size is not None:
        size_of(size)
    if like is not None:
        with open_model(like) as pattern:
            return _form_like(model, pattern, where, dtype, size)
    native = saved.dtypes if saved.kind == "ema" else {}
    entries = {
        name: safetensors.Entry(
            _kind(entry.dtype, dtype or TORCH.get(native.get(name, ""))), entry.shape
        )
        for name, entry in model.entries.items()
    }
    names = {name: name for name in entries}
    aliases = _aliases(model, names)
    if where.suffix == ".safetensors":
        return _Form(
            names, entries, _one_file(where, entries, aliases, size), safetensors.INDEX, aliases
        )
    return _Form(
        names, entries, safetensors.plan(entries, size or "5GB"), safetensors.INDEX, aliases
    )


def _kind(have: str, want: str | None) -> str:
    """Floats alone are cast."""
    return want if want is not None and have in FLOATS and want in FLOATS else have


def _one_file(
    where: Path,
    entries: dict[str, safetensors.Entry],
    aliases: dict[str, list[str]],
    size: int | str | None,
    order: Sequence[str] | None = None,
) -> dict[str, safetensors.SafetensorsFile]:
    """Aliases lie in the header, for want of an ema.json."""
    total = sum(entry.nbytes for entry in entries.values())
    if size is not None and total > size_of(size):
        raise ValueError(
            f"{where.name} is one file of {total} bytes, max_shard_size is {size}. Name a folder."
        )
    further = {alias: name for name, others in aliases.items() for alias in others}
    return {where.name: safetensors.header(entries, further, order)}


def _aliases(model: Source, names: dict[str, str]) -> dict[str, list[str]]:
    """Of the names that the files do not have: which of those in them is the same weight."""
    first: dict[str, str] = {}
    for name, source in names.items():
        first.setdefault(source, name)
    groups: dict[str, list[str]] = {}
    for other, source in [*((name, name) for name in model.entries), *model.aliases.items()]:
        if other not in names:
            groups.setdefault(first[source], []).append(other)
    return {name: sorted(others) for name, others in groups.items()}


def _form_like(
    model: Source, pattern: Source, where: Path, dtype: str | None, size: int | str | None
) -> _Form:
    """The names of the pattern, which choose among tied ones, its dtypes, files and order."""
    known = {name: name for name in model.entries} | dict(model.aliases)
    _refuse_difference(model, pattern, known)
    names = {name: known[name] for name in pattern.entries}
    entries = {
        name: safetensors.Entry(_kind(entry.dtype, dtype), entry.shape)
        for name, entry in pattern.entries.items()
    }
    aliases = _aliases(model, names)
    split = _files_like(pattern)
    name = next(iter(split)) if pattern.path.is_file() else safetensors.find_model(pattern.path)
    stem = name.removesuffix(".index.json").removesuffix(".safetensors")
    index = f"{stem}.safetensors.index.json"
    if where.suffix == ".safetensors":
        order = _order([name for part in split.values() for name in part], entries)
        return _Form(
            names, entries, _one_file(where, entries, aliases, size, order), index, aliases
        )
    if size is not None:
        files = {
            f"{stem}{file.removeprefix('model')}": plan
            for file, plan in safetensors.plan(entries, size).items()
        }
    else:
        parts = {file: {name: entries[name] for name in part} for file, part in split.items()}
        files = {
            file: safetensors.header(part, None, _order(list(part), part))
            for file, part in parts.items()
        }
    return _Form(names, entries, files, index, aliases)


def _files_like(pattern: Source) -> dict[str, list[str]]:
    """File -> its weights, as they lie there. What is no safetensors model is as one file of the usual name."""
    files = (
        pattern.files
        if isinstance(pattern, Safetensors)
        else {"model.safetensors": safetensors.SafetensorsFile(b"", dict(pattern.entries))}
    )
    return {
        name: sorted(
            file.entries, key=lambda weight: (file.entries[weight].begin, file.entries[weight].end)
        )
        for name, file in files.items()
    }


def _order(names: list[str], entries: dict[str, safetensors.Entry]) -> list[str] | None:
    """The order of the pattern; None, so our own, where other dtypes would put a weight at an odd address in it."""
    at = 0
    for name in names:
        if at % safetensors.ITEMSIZE[entries[name].dtype]:
            return None
        at += entries[name].nbytes
    return names


def _refuse_difference(model: Source, pattern: Source, known: dict[str, str]) -> None:
    """Raise ValueError with every weight that only one of the two has, or that has another shape or kind."""
    found = [f"{name} is in {pattern.path} alone" for name in pattern.entries if name not in known]
    taken = {known.get(name) for name in [*pattern.entries, *pattern.aliases]}
    found += [f"{name} is in {model.path} alone" for name in model.entries if name not in taken]
    for name, entry in pattern.entries.items():
        held = model.entries[known[name]] if name in known else entry
        if held.shape != entry.shape:
            found.append(
                f"{name} is {list(held.shape)} in {model.path}, {list(entry.shape)} in {pattern.path}"
            )
        elif held.dtype != entry.dtype and not {held.dtype, entry.dtype} <= set(FLOATS):
            found.append(f"{name} is {held.dtype} in {model.path}, {entry.dtype} in {pattern.path}")
    if found:
        raise ValueError(
            f"{model.path} and {pattern.path} differ on {len(found)} weights: {some(found, 10, '; ')}."
        )


# --- what lies beside --------------------------------------------------------------------------------------------


def _facts(model: Source, saved: Manifest, form: _Form) -> Manifest:
    """ema.json of what is written, without what the writer fills in."""
    label = model.label if isinstance(model, Safetensors) else ""
    files = model.files if isinstance(model, Safetensors) else {}
    own, averaged = set(saved.own_buffers_of(label)), set(saved.averaged)
    sums = {name: entry["crc32"] for name, entry in saved.files.items() if name in files}
    return replace(
        saved,
        kind="export",
        weights="all",
        schedules=saved.schedules[saved.labels.index(label) :][:1],
        averages={},
        averaged=sorted(name for name, source in form.names.items() if source in averaged),
        own_buffers=sorted(name for name, source in form.names.items() if source in own),
        aliases=form.aliases,
        dtypes={
            name: saved.dtypes[source]
            for name, source in form.names.items()
            if source in saved.dtypes
        },
        versions=saved.versions | {"dist_ema": _version.VERSION},
        extra={},
        source={"name": Path(os.path.realpath(model.path)).name, "crc32": sums},
        files={},
        other={},
    )


# --- the bytes ---------------------------------------------------------------------------------------------------


def _cast(name: str, raw: Bytes, was: str, now: str) -> Bytes:
    wider = now == "F64" or (now == "F32" and was != "F64")
    return narrow(widen(raw, was), now) if wider else fitted(name, widen(raw, was), now)
