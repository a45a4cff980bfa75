"""`beside`: what a folder to ship holds with the weights: config, tokenizer, a section of its card.

One rule for every verb that writes a model to ship: `beside`. The section says what average the
weights are. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import _version
from ..checkpoint import disk, manifest, safetensors
from ..text import listed, printable, some
from . import report

__all__ = [
    "README",
    "beside",
    "format_clock",
    "format_schedule",
    "section",
    "write_into",
]

README = "README.md"  # the model card
BEGIN, END = "<!-- dist_ema: begin -->", "<!-- dist_ema: end -->"
SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".vocab", ".py")
NAMES = ("LICENSE", "NOTICE")
_MOST = 20  # models that the section names
_STATE = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    manifest.META,
)


def beside(
    folder: Path, out: Path, facts: manifest.Manifest, entries: Mapping[str, safetensors.Entry]
) -> dict[str, bytes | Path]:
    """The other files of a folder of weights: name -> content, or a file to copy.

    The model card is that of `out`, else that of `folder`, with the section in it.

    Args:
        folder: The model that the weights come from; a file has nothing beside it.
        out: A folder; a file that ends in .safetensors gets nothing.
        facts: The ema.json that goes with the weights.
        entries: The weights.
    """
    if out.suffix == ".safetensors":
        return {}
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    shipped: dict[str, bytes | Path] = {file.name: file for file in files if _is_shipped(file)}
    old = out / README if (out / README).is_file() else shipped.get(README)
    text = old.read_bytes() if isinstance(old, Path) else b""
    # The card of the target stays, because people write there.
    shipped[README] = write_into(text, section(facts, report.count_dtypes(entries)))
    return shipped


def _is_shipped(path: Path) -> bool:
    """Config, tokenizer, licence, code and card: no weights, no pickles, no training state."""
    name = path.name
    kept = name.endswith(SUFFIXES) or name.startswith(NAMES)
    left = name in _STATE or name.endswith(".index.json") or name.startswith(".")
    if not kept or left or not path.is_file():
        return False
    # torch.save and pickle begin so, text and protobuf do not
    return not disk.beginning(path, 4).startswith((b"PK\x03\x04", b"\x80"))


def section(facts: manifest.Manifest, dtypes: Mapping[str, int]) -> str:
    """A section of the model card on this average, as Markdown between two markers."""
    over, rows = "models", list[tuple[str, str]]()
    if "average" not in facts.extra:  # a mean of models has no schedule of its own
        over, unknown = "training, not its last step", "not told by its source"
        schedules = ", ".join(map(format_schedule, facts.schedules))
        rows += [("average", schedules or unknown), ("clock", format_clock(facts.clock) or unknown)]
    rows += [
        ("dtypes", listed(dict(dtypes))),
        *_origin(facts),
        ("made by", f"dist_ema {_version.VERSION}"),
    ]
    text = ["## Averaged weights", "", f"These weights are an average over {over}.", ""]
    table = ["| | |", "|---|---|", *(f"| {what} | {_code(value)} |" for what, value in rows)]
    return "\n".join([BEGIN, *text, *table, END])


def _origin(facts: manifest.Manifest) -> Iterator[tuple[str, str]]:
    """The file or folder that it was exported from, or the models that it was made of."""
    if facts.source is not None:
        yield "source", facts.source["name"]
        yield from (("", f"{name}: CRC-32 {crc}") for name, crc in facts.source["crc32"].items())
    mean = facts.extra.get("average", {})
    made = [(model["path"], model["weight"]) for model in mean.get("models", ())]
    made += facts.extra.get("reconstruct", {}).get("weights", {}).items()
    # The largest shares first; a long list is cut.
    made.sort(key=lambda item: -abs(item[1]))
    yield from (
        ("" if i else "mixed from", f"{weight:.6g} of {name}")
        for i, (name, weight) in enumerate(made[:_MOST])
    )
    if len(made) > _MOST:
        yield "", f"and {len(made) - _MOST} more, in {manifest.META}"
    if mean.get("taken_from_last"):
        yield "taken from the last", some(mean["taken_from_last"])


def format_schedule(spec: Any) -> str:
    """Power(sigma_rel=0.1) from {"name": "Power", "sigma_rel": 0.1}."""
    if not isinstance(spec, dict):
        return str(spec)
    values = [f"{key}={value!r}" for key, value in spec.items() if key != "name"]
    return f"{spec.get('name')}({', '.join(values)})"


def format_clock(clock: Mapping[str, Any]) -> str:
    """The clock as text, `now` first."""
    # Sorting is stable: the other counters keep their order.
    counters = dict(sorted(clock.items(), key=lambda item: item[0] != "now"))
    started = counters.pop("started", True)
    return listed(counters) + ("" if started else ", not started")


def _code(text: str) -> str:
    """The text as Markdown code, so that nothing from a file is markup or a marker."""
    return "`" + re.sub(r"[`|<>]", "?", printable(text)) + "`"


def write_into(page: bytes, section: str) -> bytes:
    """The page with the section in place of an earlier one, else at its end. Other bytes stay."""
    # Bytes, because a card may be in any encoding.
    text = section.encode()
    begin, end = re.escape(BEGIN.encode()), re.escape(END.encode())
    earlier = re.search(rb"%b(?:(?!%b).)*?%b" % (begin, begin, end), page, re.DOTALL)
    if earlier:
        return page[: earlier.start()] + text + page[earlier.end() :]
    return page + (b"" if not page else b"\n" if page.endswith(b"\n") else b"\n\n") + text + b"\n"
