"""`dist-ema export`: names, files, dtypes and order of the model to ship, alone or as `like=`.

*Cost*: windows of 4 MB, six at a time, whatever the model's size. No torch, where the names in
memory are those of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import _version
from ..checkpoint import atomic, manifest, safetensors
from ..dtypes import TORCH, float_dtype
from ..text import Bar, printable, silent
from . import library_names, model_card, report, same_weights, sources, sums, writer

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """The result of an export. beside: the names of the files beside the weights."""

    path: str
    source: str
    average: str  # its schedule, '' where the source does not tell
    files: dict[str, int]  # name -> bytes
    weights: int
    dtypes: dict[str, int]  # -> how many weights
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Form:
    """The names, dtypes and places of the weights in the files to write."""

    names: dict[str, str]  # name in the files -> name in the source
    entries: dict[str, safetensors.Entry]  # by the names in the files
    files: dict[str, safetensors.SafetensorsFile]
    index: str
    aliases: Mapping[str, str]  # further name -> name in the files


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

    Args:
        src: A saved average, an export, a folder of Hugging Face or of torch, a .safetensors file.
        out: Where it goes.
        dtype: The dtype of all floating weights, by default the model's own.
        max_shard_size: The size limit of each file in a folder, by default 5 GB.
        like: A model whose files, names, order and dtypes are taken. With a config.json of
            transformers beside it, weights that the library fuses in memory are split as it saves
            them; that takes transformers and torch.
        which: Which of several averages.
        force: Replace a model at `out`.
        bar: Shows the progress.

    Raises:
        ValueError: `src` and `like` do not hold the same weights, `src` is not complete or is
            damaged, or `out` is taken.
    """
    where = atomic.real(out)
    for path in (src,) if like is None else (src, like):
        writer.refuse_place(path, out)
    writer.refuse_target(where, force)
    with sources.open_model(src, which) as model:
        _refuse_part(model, like)
        _refuse_unsound(model)
        saved = model.manifest or manifest.Manifest()
        checked = sums.Checked(model)
        named = None if like is None else library_names.reverted(model, checked, like)
        source = checked if named is None else sums.Checked(named)
        form = _form(named or model, saved, where, dtype, max_shard_size, like)
        facts = _facts(model, saved, form, {} if named is None else named.owners)
        others = model_card.beside(Path(like or model.path), where, facts, form.entries)

        def content(names: Sequence[str]) -> Iterator[sums.FileWindow]:
            for name in names:
                was, now = source.entries[form.names[name]].dtype, form.entries[name].dtype
                for window in source.windows(form.names[name]):
                    yield window.cast(name, was, now)

        with bar(sum(entry.nbytes for entry in form.entries.values())) as tick:
            writer.write(
                where,
                form.files,
                content,
                facts,
                beside=others,
                index=form.index,
                force=force,
                tick=tick,
                check=checked.finish,
            )
    return Exported(
        path=str(out),
        source=str(src),
        average=", ".join(map(model_card.format_schedule, facts.schedules)),
        files={name: file.size for name, file in form.files.items()},
        weights=len(form.entries),
        dtypes=report.count_dtypes(form.entries),
        beside=sorted(others),
    )


# --- what is refused ------------------------------------------------------------------------------


def _refuse_part(model: sources.Source, like: str | Path | None) -> None:
    """A part of a model must not be shipped as the whole."""
    path = atomic.real(model.path)
    if not model.entries:
        raise ValueError(f"{model.path} holds no weights: there is nothing to export.")
    if like is None:  # which proves that nothing is missing
        if model.manifest is not None and model.manifest.weights == "adapter":
            raise ValueError(
                f"{model.path} holds an adapter, which peft opens as it is: copy the folder. "
                "ema.export(merged=True) writes a complete model."
            )
        if model.manifest is not None and model.manifest.weights != "all":
            raise ValueError(
                f"{model.path} holds averaged weights only (EMA(only=...)), so it is no complete "
                "model. Use ema.export(), or pass like= with a model of the same names to prove "
                "that nothing is missing."
            )
        sources.refuse_unsupported(model)
    # A further average lies in averages/LABEL of its run.
    run = path.parent.parent
    if path.parent.name == "averages" and (run / manifest.META).exists():
        raise ValueError(f"{model.path} is a part of {run}: export that with which={path.name!r}.")
    if path.is_file() and model.listed is not None:
        raise ValueError(f"{model.path} is a part of {path.parent}: name the folder.")


def _refuse_unsound(model: sources.Source) -> None:
    problems = report.report_on(model.path).problems if model.manifest is not None else []
    if problems:
        raise ValueError(
            f"{model.path / manifest.META} is not sound: {problems[0]}. `dist-ema verify` lists "
            "everything."
        )


# --- what the files will hold ---------------------------------------------------------------------


def _form(
    model: sources.Weights,
    saved: manifest.Manifest,
    where: Path,
    dtype: str | None,
    size: int | str | None,
    like: str | Path | None,
) -> _Form:
    # A pattern decides names, dtypes, files and order.
    if like is not None:
        with sources.open_model(like) as pattern:
            return _form_like(model, pattern, where, dtype, size)
    # Averages are saved in fp32, and shipped in the dtype of the model.
    native = saved.dtypes if saved.kind == "ema" else {}
    entries = {
        name: safetensors.Entry(
            float_dtype(entry.dtype, dtype or TORCH.get(native.get(name, ""))), entry.shape
        )
        for name, entry in model.entries.items()
    }
    return _Form(
        {name: name for name in entries},
        entries,
        writer.lay_out(where, entries, model.aliases, size),
        safetensors.INDEX,
        model.aliases,
    )


def _form_like(
    model: sources.Weights,
    pattern: sources.Source,
    where: Path,
    dtype: str | None,
    size: int | str | None,
) -> _Form:
    """The names of the pattern, which choose among tied ones, its dtypes, files and order."""
    same_weights.refuse_different([model], pattern, casts_whole=False)
    names = {name: same_weights.locate(model, name, pattern) for name in pattern.entries}
    known = {name: name for name in model.entries} | dict(model.aliases)
    # The pattern may tie what the model has twice: then the pattern's name counts.
    known |= {name: names[of] for name, of in pattern.aliases.items()}
    entries = {
        name: safetensors.Entry(float_dtype(entry.dtype, dtype), entry.shape)
        for name, entry in pattern.entries.items()
    }
    # Reversed, so that the first name of a weight wins.
    first = {source: name for name, source in reversed(names.items())}
    aliases = {other: first[source] for other, source in known.items() if other not in names}
    split = _files_like(pattern)
    name = next(iter(split)) if pattern.path.is_file() else safetensors.find_model(pattern.path)
    stem = name.removesuffix(".index.json").removesuffix(".safetensors")
    if where.suffix == ".safetensors":
        names_in_order = [name for part in split.values() for name in part]
        files = writer.lay_out(where, entries, aliases, size, _order(names_in_order, entries))
    elif size is not None:
        files = {
            f"{stem}{file.removeprefix('model')}": plan
            for file, plan in safetensors.plan(entries, size).items()
        }
    else:
        files = {
            file: safetensors.header(
                {name: entries[name] for name in part}, None, _order(part, entries)
            )
            for file, part in split.items()
        }
    return _Form(names, entries, files, f"{stem}.safetensors.index.json", aliases)


def _files_like(pattern: sources.Source) -> dict[str, list[str]]:
    """File -> its weights, as they lie there. Another form is as one file of the usual name."""
    if not pattern.files:
        return {"model.safetensors": safetensors.in_order(pattern.entries)}
    return {name: safetensors.in_order(file.entries) for name, file in pattern.files.items()}


def _order(names: list[str], entries: dict[str, safetensors.Entry]) -> list[str] | None:
    """The order of the pattern; None, so our own, where other dtypes would misalign a weight."""
    at = 0
    for name in names:
        # A reader that maps the file needs weights at multiples of their item size.
        if at % safetensors.ITEMSIZE[entries[name].dtype]:
            return None
        at += entries[name].nbytes
    return names


def _facts(
    model: sources.Source, saved: manifest.Manifest, form: _Form, owners: dict[str, str]
) -> manifest.Manifest:
    """ema.json of what is written, without what the writer fills in.

    Args:
        model: The source.
        saved: Its ema.json.
        form: What is written.
        owners: Name in the form -> the weight in the source, where it is a part of it.
    """
    origins = {name: owners.get(source, source) for name, source in form.names.items()}
    own, averaged = set(saved.own_buffers_of(model.label)), set(saved.averaged)
    sums = {name: entry["crc32"] for name, entry in saved.files.items() if name in model.files}
    return replace(
        saved,
        kind="export",
        weights="all",
        schedules=saved.schedules[saved.labels.index(model.label) :][:1],
        averages={},
        averaged=sorted(name for name, source in origins.items() if source in averaged),
        own_buffers=sorted(name for name, source in origins.items() if source in own),
        aliases=manifest.group_aliases(dict(sorted(form.aliases.items()))),
        dtypes={
            name: saved.dtypes[source] for name, source in origins.items() if source in saved.dtypes
        },
        versions=saved.versions | {"dist_ema": _version.VERSION},
        extra={},
        source={"name": printable(atomic.real(model.path).name), "crc32": sums},
        files={},
        other={},
    )
