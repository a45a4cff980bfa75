"""What lies beside weights that are shipped: config and tokenizer files, and a section of the model card. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import format, manifest
from .console import listed, printable

__all__ = ["CARD", "beside", "section", "write_into"]

CARD = "README.md"
BEGIN, END = "<!-- dist_ema: begin -->", "<!-- dist_ema: end -->"
SUFFIXES = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".vocab", ".py")
NAMES = ("LICENSE", "NOTICE")
_STATE = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", format.META)


def beside(folder: Path) -> dict[str, bytes | Path]:
    """Config, tokenizer, licence, code and card of a model folder: no weights, no pickles, no training state."""
    found: dict[str, bytes | Path] = {}
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        named = each.name.endswith(SUFFIXES) or each.name.startswith(NAMES)
        other = each.name in _STATE or each.name.endswith(".index.json") or each.name.startswith(".")
        if named and not other and each.is_file() and not _pickled(each):
            found[each.name] = each
    return found


def _pickled(path: Path) -> bool:
    """By its first bytes, whatever it is called: torch.save and pickle begin like that, text and protobuf do not."""
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def section(meta: Mapping[str, Any], dtypes: Mapping[str, int]) -> str:
    """What average this is, as Markdown between two markers. meta: the ema.json that goes with it."""
    rows = [
        ("average", ", ".join(map(manifest.call, meta["schedules"])) or "not told by its source"),
        ("clock", manifest.hands(meta["clock"]) or "not told by its source"),
        ("dtypes", listed(dict(dtypes))),
        ("source", meta["source"]["name"]),
        *(("", f"{name}: CRC-32 {crc}") for name, crc in meta["source"]["crc32"].items()),
        ("made by", f"dist_ema {format.VERSION}"),
    ]
    table = [f"| {what} | {_code(said)} |" for what, said in rows]
    text = "These weights are an average over training, not its last step."
    return "\n".join([BEGIN, "## Averaged weights", "", text, "", "| | |", "|---|---|", *table, END])


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
