"""Damaged ema.json: `EMA.load`, `dist-ema verify` and `dist-ema inspect` name the same problems.

How to read a failure: the three lists are printed by verb. A problem is a clause without path and
full stop. All three may say `PATH/ema.json is damaged: PROBLEM; PROBLEM. Advice.`, and the offline
verbs print one line per problem. Advice behind the first full stop is not compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Call
from tests.data import make_golden as golden
from tests.ema_json import stamped, text_of

GOLDEN = Path(golden.__file__).parent / "golden"
SAVED = "plain/attach"  # two averages of two files each
EXPORTED = "export/first"
FIRST, LABEL = "model-00001-of-00002.safetensors", "1-Constant"
INNER = f"averages/{LABEL}/{FIRST}"
SECOND = f"averages|{LABEL}|own_buffers"
GONE = object()  # as a value: the key is removed


def changed(meta: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with `value` at `place`, a path like 'clock|now'."""
    copy = json.loads(json.dumps(meta))
    *outer, last = place.split("|")
    inner = copy
    for key in outer:
        inner = inner[key]
    inner.pop(last, None)
    if value is not GONE:
        inner[last] = value
    return copy


@dataclass(frozen=True)
class Damage:
    """What is done to ema.json, and a pattern that some problem of each list must match.

    bytes_only: only a verb that reads the weights can see it, so `inspect` has no problem.
    """

    do: Callable[[Path], object]
    names: str
    folder: str = SAVED
    bytes_only: bool = False


def raw(edit: Callable[[bytes], bytes], names: str) -> Damage:
    """Damage to the text."""

    def do(file: Path) -> None:
        text = file.read_bytes()
        assert edit(text) != text, "the edit must find its place"
        file.write_bytes(edit(text))

    return Damage(do, names)


def put(place: str, value: Any, names: str, **options: Any) -> Damage:
    """Another value in one place, and a check sum that agrees with it."""
    return several([(place, value)], names, **options)


def several(changes: list[tuple[str, Any]], names: str, **options: Any) -> Damage:
    def do(file: Path) -> None:
        meta = json.loads(file.read_bytes())
        for place, value in changes:
            meta = changed(meta, place, value)
        file.write_bytes(stamped(meta))

    return Damage(do, names, **options)


def put_raw(place: str, value: Any, names: str) -> Damage:
    """Another value in one place, and the check sum of before."""
    return raw(lambda text: text_of(changed(json.loads(text), place, value)), names)


def instead(make: Callable[[Path], object], names: str = "ema.json|link|file") -> Damage:
    """Something else than a file."""

    def do(file: Path) -> None:
        file.unlink()
        make(file)

    return Damage(do, names)


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda text: text.replace(old, new)


DEEP = b"[" * 10**5 + b"]" * 10**5
NONE: dict[str, Any] = {"own_buffers": []}
ONE = {"size": 1, "crc32": "00000000"}
CONSTANT = {"name": "Constant", "decay": 0.5}
DAMAGES = {
    # --- the text
    "empty": raw(lambda text: b"", "JSON"),
    "cut in the middle": raw(lambda text: text[: len(text) // 2], "JSON"),
    "not UTF-8": raw(swapped(b"Constant", b"Con\xffstant"), "JSON"),
    "byte order mark": raw(lambda text: b"\xef\xbb\xbf" + text, "JSON"),
    "a key twice": raw(swapped(b'"kind": "ema"', b'"kind": "ema", "kind": "ema"'), "kind"),
    "NaN": raw(swapped(b'"now": 6.0', b'"now": NaN'), "NaN"),
    "infinity": raw(swapped(b'"now": 6.0', b'"now": -Infinity'), "Infinity"),
    "a number beyond float64": raw(swapped(b'"now": 6.0', b'"now": 1e400'), "1e400"),
    "half a character": raw(swapped(b'"epoch"', b'"\\ud800"'), "JSON"),
    "nested too deeply": raw(swapped(b'"epoch": 1', b'"a": ' + DEEP), "JSON|deep"),
    "a list": raw(lambda text: b"[]\n", "object"),
    # --- no file
    "a link to nowhere": instead(lambda file: file.symlink_to("gone")),
    "a link to itself": instead(lambda file: file.symlink_to(file.name)),
    "a folder": instead(lambda file: file.mkdir()),
    "a pipe": instead(os.mkfifo),
    # --- its own check sum
    "edited by hand": put_raw("clock|updates", 99, "changed|CRC-32"),
    "a wrong sum of itself": put_raw("crc32", "00000000", "changed|CRC-32"),
    "no sum of itself": put_raw("crc32", GONE, "changed|CRC-32|crc32"),
    # --- format and kind
    "no format": put("format", GONE, "format"),
    "the format is a text": put("format", "1", "format"),
    "the format is true": put("format", True, "format"),
    "a later format": put("format", 99, "format 99"),
    "a huge format": put("format", 10**40, "format 1"),
    "no kind": put("kind", GONE, "kind"),
    "an unknown kind": put("kind", "sun", "kind"),
    "the kind is a list": put("kind", ["ema"], "kind"),
    "unknown weights": put("weights", "some", "weights"),
    "no weights": put("weights", GONE, "weights"),
    # --- the clock
    "no clock": put("clock", GONE, "clock"),
    "the clock is a list": put("clock", [1], "clock"),
    "the clock is empty": put("clock", {}, "clock"),
    "a clock before 0": put("clock|now", -1.0, "clock"),
    "a clock of words": put("clock|now", "late", "clock"),
    "half an update": put("clock|updates", 1.5, "clock"),
    "a clock beyond 2^63": put("clock|steps", 1 << 70, "clock"),
    "a clock that lost a counter": put("clock|pending", GONE, "clock"),
    "a clock that started twice": put("clock|started", 2, "clock"),
    "nothing was accepted": put("clock|accepted", GONE, "accepted"),
    "accepted is true": put("clock|accepted", True, "accepted"),
    "accepted before 0": put("clock|accepted", -1, "accepted"),
    # --- schedules
    "no schedules": put("schedules", GONE, "schedule"),
    "schedules of no list": put("schedules", {"0": CONSTANT}, "schedule"),
    "an empty list of schedules": put("schedules", [], "schedule"),
    "a schedule too few": put("schedules", [CONSTANT], "schedule"),
    "a schedule is a number": put("schedules", [CONSTANT, 7], "schedule"),
    "an unknown schedule": put("schedules", [CONSTANT, {"name": "Cubic"}], "Cubic"),
    "a schedule with an unknown field": put("schedules", [CONSTANT, CONSTANT | {"tau": 1}], "tau"),
    "a decay of 2": put("schedules", [CONSTANT, CONSTANT | {"decay": 2}], "decay"),
    "a decay of words": put("schedules", [CONSTANT, CONSTANT | {"decay": "x"}], "schedule|decay"),
    # --- averaged
    "no averaged": put("averaged", GONE, "averaged"),
    "averaged is a text": put("averaged", "emb.weight", "averaged"),
    "averaged holds a number": put("averaged", [1], "averaged"),
    "averaged names a stranger": put("averaged", ["emb.weight", "lost"], "averaged.*lost"),
    "averaged lacks what was averaged": put("averaged", ["emb.weight"], "averaged"),
    # --- own buffers
    "no own buffers": put("own_buffers", GONE, "own_buffers"),
    "own buffers are a table": put("own_buffers", {"norm.running_mean": 1}, "own_buffers"),
    "own buffers hold a list": put("own_buffers", [["x"]], "own_buffers"),
    "own buffers name a stranger": put("own_buffers", ["lost"], "own_buffers.*lost"),
    "own buffers of the second are a text": put(SECOND, "x", "own_buffers"),
    "own buffers of the second are gone": put(SECOND, GONE, "own_buffers"),
    "own buffers of the second name a stranger": put(SECOND, ["lost"], "own_buffers.*lost"),
    # --- averages
    "no averages": put("averages", GONE, "averages"),
    "averages are a list": put("averages", [LABEL], "averages"),
    "an average is a list": put(f"averages|{LABEL}", [], "averages|own_buffers"),
    "a label without a number": put("averages", {"x-Constant": NONE}, "x-Constant"),
    "a label without a folder": put("averages", {"1-Power": NONE}, "1-Power"),
    "a label that leads out": put("averages", {"1-../..": NONE}, "averages"),
    "a label that is a parent": put("averages", {"..": NONE}, "averages"),
    "a label of another digit": put("averages", {"²-Constant": NONE}, "averages|²"),
    # --- aliases
    "no aliases": put("aliases", GONE, "aliases"),
    "aliases are a list": put("aliases", [], "aliases"),
    "an alias without a list": put("aliases", {"emb.weight": "head.weight"}, "alias"),
    "an alias is a number": put("aliases", {"emb.weight": [7]}, "alias"),
    "an alias is a weight": put("aliases", {"emb.weight": ["up.bias"]}, "up.bias"),
    "an alias of a stranger": put("aliases", {"lost": ["head.weight"]}, "alias.*lost"),
    "an alias of two weights": put("aliases", {"up.weight": ["x"], "up.bias": ["x"]}, "alias|x"),
    # --- files
    "no files": put("files", GONE, "files"),
    "files are a list": put("files", [FIRST], "files"),
    "an empty list of files": put("files", {}, FIRST),
    "a file is a number": put(f"files|{FIRST}", 7, FIRST),
    "a file without a size": put(f"files|{FIRST}|size", GONE, FIRST),
    "a size is a text": put(f"files|{FIRST}|size", "992", FIRST),
    "a size is true": put(f"files|{FIRST}|size", True, FIRST),
    "a wrong size": put(f"files|{FIRST}|size", 5, f"{FIRST}.*992"),
    "a huge size": put(f"files|{FIRST}|size", 10**40, FIRST),
    "a wrong size of the second": put(f"files|{INNER}|size", 5, INNER),
    "a file without a sum": put(f"files|{FIRST}|crc32", GONE, FIRST),
    "a sum is nothing": put(f"files|{FIRST}|crc32", None, FIRST),
    "a sum of nine digits": put(f"files|{FIRST}|crc32", "000000000", FIRST),
    "a sum of no digits": put(f"files|{FIRST}|crc32", "zzzzzzzz", FIRST),
    "a wrong sum": put(f"files|{FIRST}|crc32", "0" * 8, f"{FIRST}.*CRC-32", bytes_only=True),
    "a wrong sum of the second": put(f"files|{INNER}|crc32", "0" * 8, INNER, bytes_only=True),
    "a file is not listed": put(f"files|{FIRST}", GONE, FIRST),
    "a file of the second is not listed": put(f"files|{INNER}", GONE, INNER),
    "a file too many": put("files|gone.safetensors", ONE, "gone.safetensors"),
    "a file that leads out": put("files|../x.safetensors", ONE, "files"),
    # --- the rest
    "dtypes are a list": put("dtypes", [], "dtypes"),
    "a dtype is a number": put("dtypes|up.bias", 7, "dtypes"),
    "dtypes name a stranger": put("dtypes|lost", "float32", "dtypes.*lost"),
    "versions are a number": put("versions", 7, "versions"),
    "extra is a list": put("extra", [], "extra"),
    "attach is a number": put("attach", 7, "attach"),
    "rounding is a number": put("rounding", 7, "rounding"),
    "the seed is a text": put("rounding", {"seed": "x"}, "rounding|seed"),
    # --- an export, whose clock may be missing
    "export: clock of words": put("clock", {"now": "late"}, "clock", folder=EXPORTED),
    "export: an unknown schedule": put("schedules", [{"name": "Cubic"}], "Cubic", folder=EXPORTED),
    "export: an alias without a list": put("aliases", {"emb.weight": 7}, "alias", folder=EXPORTED),
    "export: schedules of no list": put("schedules", 7, "schedule", folder=EXPORTED),
    "export: averaged is a text": put("averaged", "x", "averaged", folder=EXPORTED),
    # --- all of them are named, not only the first
    "five at once": several(
        [
            ("clock|now", -1.0), ("schedules", [CONSTANT, {"name": "Cubic"}]), ("own_buffers", 7),
            ("aliases", {"lost": ["x"]}), (f"files|{INNER}|size", 5),
        ],
        f"(?s)(?=.*clock)(?=.*Cubic)(?=.*own_buffers)(?=.*lost)(?=.*{INNER})",
    ),
}  # fmt: skip


def problems_of(text: str, folder: Path) -> list[str]:
    """What an error or the lines on stderr name."""
    found = []
    for line in text.splitlines():
        sentence = (
            line.removeprefix("dist-ema: ").replace(f"{folder}: ", "").replace(f"{folder}/", "")
        )
        clause = re.sub(
            r"^ema\.json is (damaged|not sound): ", "", sentence.partition(". ")[0]
        ).rstrip(".")
        found += clause.split("; ")
    return found


def problem_lists(folder: Path, case: golden.Case, call: Call) -> dict[str, list[str]]:
    """The problems by verb; [] where it had none."""
    model = golden.model_of(case)
    ema = golden.ema_of(case, model)
    lists = {}
    try:
        ema.load(folder)
        lists["load"] = []
    except (OSError, ValueError) as error:
        lists["load"] = problems_of(str(error), folder)
    for verb in ("verify", "inspect"):
        code, _, err = call(verb, folder)
        lists[verb] = problems_of(err, folder)
        assert (code == 0) == (not err), (verb, code, err)
    return lists


def case_of(folder: str) -> golden.Case:
    return golden.CASES["attach" if folder == SAVED else "several"]


@pytest.mark.filterwarnings("ignore:.*clock at 0")  # an export is a start
@pytest.mark.parametrize("folder", [SAVED, EXPORTED])
def test_sound(folder: str, call: Call) -> None:
    """Without damage no verb has a problem, and `stamped` writes what dist_ema wrote."""
    assert problem_lists(GOLDEN / folder, case_of(folder), call) == {
        "load": [],
        "verify": [],
        "inspect": [],
    }
    text = (GOLDEN / folder / "ema.json").read_bytes()
    assert stamped(json.loads(text)) == text


def test_every_damage_is_done(tmp_path: Path) -> None:
    """What the verbs name must come from a damage, so no damage may miss its place."""
    for number, damage in enumerate(DAMAGES.values()):
        file, sound = tmp_path / str(number), (GOLDEN / damage.folder / "ema.json").read_bytes()
        file.write_bytes(sound)
        damage.do(file)
        assert file.is_symlink() or not file.is_file() or file.read_bytes() != sound
    assert len(DAMAGES) > 100


@pytest.mark.filterwarnings("ignore:.*(clock at 0|frozen then)")
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_problems(damage: str, call: Call, tmp_path: Path) -> None:
    kind, folder = DAMAGES[damage], tmp_path / "a"
    shutil.copytree(GOLDEN / kind.folder, folder)
    kind.do(folder / "ema.json")
    lists = problem_lists(folder, case_of(kind.folder), call)
    wanted = {
        verb: [] if verb == "inspect" and kind.bytes_only else lists["load"] for verb in lists
    }
    assert lists == wanted
    assert re.search(kind.names, "\n".join(lists["load"])), lists


def test_another_layout(call: Call, tmp_path: Path) -> None:
    """The same values, laid out by another writer of JSON, are no damage."""
    shutil.copytree(GOLDEN / SAVED, tmp_path / "a")
    file = tmp_path / "a" / "ema.json"
    file.write_text(json.dumps(json.loads(file.read_bytes())))
    lists = problem_lists(tmp_path / "a", case_of(SAVED), call)
    assert lists == {"load": [], "verify": [], "inspect": []}
