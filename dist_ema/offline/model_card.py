"""What lies beside weights that are shipped: config and tokenizer files, and a section of the model card. No torch.

One rule for every verb that writes a folder to ship: `beside`. The section tells what average the weights are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import _version
from ..checkpoint import manifest, safetensors
from ..checkpoint.manifest import Manifest
from ..text import listed, printable, some

__all__ = ["CARD", "beside", "dtypes", "format_clock", "format_schedule", "section", "write_into"]

CARD = "README.md"
BEGIN, END = "<!-- dist_ema: begin -->", "<!-- dist_ema: end -->"
SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".vocab", ".py")
NAMES = ("LICENSE", "NOTICE")
_MOST = 20  # models that the card names
_STATE = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    manifest.META,
)


def beside(
    folder: Path, out: Path, facts: Manifest, entries: Mapping[str, safetensors.Entry]
) -> dict[str, bytes | Path]:
    """What goes into `out` with the weights, and the card: that of `out`, else that of `folder`, with the section in it.

    folder: the model that it comes from; a file has nothing beside it. facts: the ema.json that goes with the weights.
    """
    found = _beside(folder)
    old = out / CARD if (out / CARD).is_file() else found.get(CARD)
    text = old.read_bytes() if isinstance(old, Path) else b""
    found[CARD] = write_into(text, section(facts, dtypes(entries)))
    return found


def dtypes(entries: Mapping[str, safetensors.Entry]) -> dict[str, int]:
    """dtype -> how many weights have it, the most first."""
    counted = Counter(entry.dtype for entry in entries.values())
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _beside(folder: Path) -> dict[str, bytes | Path]:
    """Config, tokenizer, licence, code and card of a model folder: no weights, no pickles, no training state."""
    found: dict[str, bytes | Path] = {}
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        named = each.name.endswith(SUFFIXES) or each.name.startswith(NAMES)
        other = (
            each.name in _STATE or each.name.endswith(".index.json") or each.name.startswith(".")
        )
        if named and not other and each.is_file() and not _pickled(each):
            found[each.name] = each
    return found


def _pickled(path: Path) -> bool:
    """By its first bytes, whatever it is called: torch.save and pickle begin like that, text and protobuf do not."""
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def section(facts: Manifest, dtypes: Mapping[str, int]) -> str:
    """What average this is, as Markdown between two markers. facts: the ema.json that goes with it."""
    mean = "average" in facts.extra
    text = (
        f"These weights are an average over {'models' if mean else 'training, not its last step'}."
    )
    rows = [
        *_history(facts, mean),
        ("dtypes", listed(dict(dtypes))),
        *_origin(facts),
        ("made by", f"dist_ema {_version.VERSION}"),
    ]
    table = [f"| {what} | {_code(text)} |" for what, text in rows]
    return "\n".join(
        [BEGIN, "## Averaged weights", "", text, "", "| | |", "|---|---|", *table, END]
    )


def _history(facts: Manifest, mean: bool) -> Iterator[tuple[str, str]]:
    """A mean of models has no schedule of its own."""
    if not mean:
        yield (
            "average",
            ", ".join(map(format_schedule, facts.schedules)) or "not told by its source",
        )
        yield "clock", format_clock(facts.clock) or "not told by its source"


def _origin(facts: Manifest) -> Iterator[tuple[str, str]]:
    """The file or folder that it was exported from, or the models that it was made of."""
    if facts.source is not None:
        yield "source", facts.source["name"]
        yield from (("", f"{name}: CRC-32 {crc}") for name, crc in facts.source["crc32"].items())
    mean = facts.extra.get("average", {})
    made = [(model["path"], model["weight"]) for model in mean.get("models", ())]
    made += facts.extra.get("reconstruct", {}).get("weights", {}).items()
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
    return f"{spec.get('name')}({', '.join(f'{key}={value!r}' for key, value in spec.items() if key != 'name')})"


def format_clock(clock: Mapping[str, Any]) -> str:
    """The clock as text, `now` first."""
    counters = dict(sorted(clock.items(), key=lambda item: item[0] != "now"))
    started = counters.pop("started", True)
    return listed(counters) + ("" if started else ", not started")


def _code(text: str) -> str:
    """As code, where nothing that came from a file is Markdown, HTML or a marker."""
    return "`" + re.sub(r"[`|<>]", "?", printable(text)) + "`"


def write_into(card: bytes, section: str) -> bytes:
    """The card with the section in it: in place of an earlier one, else at the end. All other bytes stay."""
    text = section.encode()
    begin, end = re.escape(BEGIN.encode()), re.escape(END.encode())
    found = list(re.finditer(rb"%b(?:(?!%b).)*?%b" % (begin, begin, end), card, re.DOTALL))
    if found:
        return card[: found[0].start()] + text + card[found[0].end() :]
    return card + (b"" if not card else b"\n" if card.endswith(b"\n") else b"\n\n") + text + b"\n"
