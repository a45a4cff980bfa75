"""The bytes of an artifact: what the safetensors library reads, the same bytes for the same
weights, sums that add up, and a sentence for every file that is not sound.

How to read a failure: the oracles are the safetensors and huggingface_hub libraries and
`zlib.crc32`.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_ema import load_file as load_ours
from dist_ema.checkpoint.crc32 import RangeSum, check_sum
from dist_ema.checkpoint.manifest import FORMAT, META, Manifest, read
from dist_ema.checkpoint.open_file import DTYPES
from dist_ema.checkpoint.safetensors import (
    INDEX,
    ITEMSIZE,
    Entry,
    find_model,
    header,
    index,
    plan,
    read_header,
    read_model,
)
from dist_ema.checkpoint.strict_json import MOST_JSON, dump
from dist_ema.text import size_of
from tests.ema_json import stamped

CODES = {dtype: code for code, dtype in DTYPES.items()}


def odd_weights() -> dict[str, Tensor]:
    """Every dtype, 0-dim, empty, and names that sort oddly."""
    draw = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 2, (2, 3), dtype=torch.uint8, generator=draw)
    weights = {f"t.{code}": bytes_.to(dtype) for code, dtype in DTYPES.items()}
    weights |= {
        "scalar": torch.tensor(1.5),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "é \"'\\/": torch.ones(1),
    }
    weights |= {
        "empty.bool": torch.zeros(3, 0, dtype=torch.bool),
        "t.10": torch.ones(2),
        "t.9": torch.ones(3).bfloat16(),
    }
    return weights


def entries(weights: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(CODES[value.dtype], tuple(value.shape)) for name, value in weights.items()}


def raw(value: Tensor) -> bytes:
    return bytes(value.contiguous().view(-1).view(torch.uint8).tolist())


def write(path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file by our header and the weights' bytes at the offsets that it names."""
    file = header(entries(weights), metadata)
    content = bytearray(file.size)
    content[: len(file.head)] = file.head
    for name, entry in file.entries.items():
        content[len(file.head) + entry.begin : len(file.head) + entry.end] = raw(weights[name])
    path.write_bytes(content)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert raw(found[name]) == raw(value), name


# --- the header -----------------------------------------------------------------------------------


def test_safetensors_reads_it(tmp_path: Path) -> None:
    """header: what the safetensors library itself loads, every dtype, 0-dim and empty weights
    included.
    """
    weights = odd_weights()
    write(tmp_path / "model.safetensors", weights, {"alias": "scalar"})
    same(load_file(tmp_path / "model.safetensors"), weights)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "alias": "scalar"}
        assert file.get_slice("t.F32").get_shape() == [2, 3]


def test_we_read_safetensors(tmp_path: Path) -> None:
    """read_header and load_file: the files of the safetensors library, its own order of weights
    included.
    """
    weights = odd_weights()
    save_file(weights, tmp_path / "model.safetensors", {"who": "them"})
    assert read_header(tmp_path / "model.safetensors").metadata == {"who": "them"}
    for path in (tmp_path, tmp_path / "model.safetensors"):
        same(load_ours(path), weights)


def test_our_header_comes_back(tmp_path: Path) -> None:
    """read_header gives back what `header` laid out, its bytes included."""
    write(tmp_path / "a.safetensors", odd_weights(), {"x": "y"})
    file, made = read_header(tmp_path / "a.safetensors"), header(entries(odd_weights()), {"x": "y"})
    assert (file.head, file.entries, file.size) == (made.head, made.entries, made.size)
    assert file.metadata == {"format": "pt", "x": "y"}


def test_bytes_are_canonical() -> None:
    """The header depends on the weights alone: by dtype size descending, then name, padded to 8
    bytes.
    """
    weights, draw = entries(odd_weights()), random.Random(0)
    made = header(weights)
    for _ in range(20):
        names = draw.sample(sorted(weights), len(weights))
        assert header({name: weights[name] for name in names}).head == made.head
    keys = [(-ITEMSIZE[entry.dtype], name) for name, entry in made.entries.items()]
    assert keys == sorted(keys)
    assert len(made.head) % 8 == 0
    assert all(entry.begin % ITEMSIZE[entry.dtype] == 0 for entry in made.entries.values())


def test_nothing_to_write(tmp_path: Path) -> None:
    """A model without weights is a file too."""
    write(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}
    assert read_header(tmp_path / "a.safetensors").entries == {}


def test_sizes_agree_with_torch() -> None:
    """ITEMSIZE and DTYPES speak of the same dtypes and bytes."""
    assert {code: dtype.itemsize for code, dtype in DTYPES.items()} == ITEMSIZE


# --- several files --------------------------------------------------------------------------------


@pytest.mark.parametrize("most", ["1GB", 400, "0.3KB", 250])
def test_plan_agrees_with_hugging_face(most: int | str, tmp_path: Path) -> None:
    """plan and index: the files, the weight_map and the total that huggingface_hub makes of the
    sorted weights.
    """
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 60, (20,), generator=draw).tolist()
    weights = {f"layer.{i}.w": torch.ones(n) for i, n in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        {name: weights[name] for name in sorted(weights)}, max_shard_size=size_of(most),
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    files = plan(entries(weights), most)
    assert {name: sorted(file.entries) for name, file in files.items()} == {
        name: sorted(names) for name, names in theirs.filename_to_tensors.items()
    }
    assert (len(files) == 1) == (most == "1GB")
    text = json.loads(index(files))
    assert text["weight_map"] == (
        theirs.tensor_to_filename or dict.fromkeys(weights, "model.safetensors")
    )
    assert text["metadata"]["total_size"] == 4 * sum(sizes)
    for name, file in files.items():
        write(tmp_path / name, {key: weights[key] for key in file.entries})
    if len(files) > 1:
        (tmp_path / INDEX).write_bytes(index(files))
    assert read_model(tmp_path) == {name: read_header(tmp_path / name) for name in files}


def test_plan_of_a_giant() -> None:
    """A weight beyond max_shard_size gets a file of its own; the others keep below it."""
    weights = {
        "a": Entry("F32", (10,)),
        "b": Entry("F32", (1000,)),
        "c": Entry("F32", (10,)),
        "d": Entry("F32", (10,)),
    }
    assert [list(file.entries) for file in plan(weights, 100).values()] == [
        ["a"],
        ["b"],
        ["c", "d"],
    ]
    assert list(plan({}, 100)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5_000_000, 5_000_000),
        ("5GB", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        (" 500mb ", 5 * 10**8),
        ("2GiB", 2 << 30),
        ("1.5KiB", 1536),
        ("3MiB", 3 << 20),
        ("7", 7),
        ("7B", 7),
        ("1e3KB", 10**6),
        (np.int64(7), 7),
    ],
)
def test_size_of(text: int | str, size: int) -> None:
    """size_of: bytes from what Hugging Face users write."""
    assert size_of(text) == size


@pytest.mark.parametrize(
    "text",
    ["GB", "5TB", "5 G B", "five", "-5GB", "0", 0, -1, "inf", "nan", "1e999GB", 5.5e9, None, True],
)
def test_size_of_refuses(text: Any) -> None:
    """A size that means nothing is a ValueError with the value in it."""
    with pytest.raises(ValueError, match=rf"max_shard_size must be .*got {text!r}"):
        size_of(text)


# --- [Note: check sums] ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 64, 1000, 70_001])
def test_sums(size: int) -> None:
    """Any partition, added in any order by any number of ranks, combines to zlib's CRC-32."""
    draw = random.Random(size)
    data = draw.randbytes(size)
    for ranks in (1, 2, 5):
        cuts = sorted(draw.choices(range(size + 1), k=12))
        ranges = list(zip([0, *cuts], [*cuts, size], strict=True))
        draw.shuffle(ranges)
        sums = [RangeSum(size) for _ in range(ranks)]
        for i, (begin, end) in enumerate(ranges):
            sums[i % ranks].add(begin, memoryview(data)[begin:end])
        assert check_sum(size, [each.contribution for each in sums]) == f"{zlib.crc32(data):08x}"


def test_sums_see() -> None:
    """A flipped bit, exchanged ranges, a range left out or written elsewhere: another sum."""
    data = random.Random(0).randbytes(100)

    def total(*parts: tuple[int, bytes]) -> str:
        sum_ = RangeSum(100)
        for start, part in parts:
            sum_.add(start, part)
        return check_sum(100, [sum_.contribution])

    right = total((0, data))
    flipped = bytes([data[0] ^ 1]) + data[1:]
    assert right == total((50, data[50:]), (0, data[:50]))
    wrong = [
        total((0, flipped)),
        total((0, data[50:]), (50, data[:50])),
        total((0, data[:99])),
        total((1, data[:99])),
    ]
    assert right not in wrong
    assert (
        total() == f"{zlib.crc32(bytes(100)):08x}"
    )  # what nobody wrote is zero, as in a reserved file


def test_sums_of_huge_files() -> None:
    """Offsets beyond 2^32 bytes: moving a part by the order of x changes nothing, by anything else
    it does.
    """
    size, order = 1 << 40, (1 << 32) - 1
    marks = []
    for start in (0, 1, (1 << 32) + 5, (1 << 39) + 5):
        sum_ = RangeSum(size)
        sum_.add(start, b"weights")
        marks.append(sum_.contribution)
    assert len(set(marks)) == 4
    moved = RangeSum(size)
    moved.add(order, b"weights")
    assert moved.contribution == marks[0]


# --- files that are not sound ---------------------------------------------------------------------


def pack(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def spec(begin: Any, end: Any, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = pack({"a": spec(0, 8), "b": spec(8, 16)}, bytes(16))
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no safetensors file, or is cut short: 0 bytes"),
    "seven bytes": (bytes(7), "cut short: 7 bytes"),
    "no header": (bytes(8), "broken safetensors header"),
    "header beyond the file": (struct.pack("<Q", 9) + b"{}", "cut short: 10 bytes, header of 9"),
    "giant header": (struct.pack("<Q", 1 << 60) + b"{}", f"header of {1 << 60}"),
    "all ones": (b"\xff" * 100, f"header of {(1 << 64) - 1}"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "cut short"),
    "one byte less": (GOOD[:-1], "cut short or damaged"),
    "one byte more": (GOOD + b"\0", "cut short or damaged"),
    "header only": (GOOD[:-16], "cut short or damaged"),
    "broken JSON": (pack(b'{"a": '), "broken safetensors header: JSONDecodeError"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "broken safetensors header: UnicodeDecodeError"),
    "deep JSON": (pack(b"[" * 200_000), "broken safetensors header: RecursionError"),
    "a list": (pack([1, 2]), "broken safetensors header"),
    "a number": (pack(b"7"), "broken safetensors header"),
    "null": (pack(b"null"), "broken safetensors header"),
    "entry is a list": (pack({"a": [1]}), "broken safetensors header"),
    "entry lacks offsets": (
        pack({"a": {"dtype": "F32", "shape": [2]}}),
        "broken safetensors header: KeyError",
    ),
    "metadata is a text": (pack({"__metadata__": "x"}), "broken safetensors header"),
    "metadata is an empty list": (pack({"__metadata__": []}), "must map texts to texts"),
    "metadata holds a list": (pack({"__metadata__": {"a": []}}), "broken safetensors header"),
    "unknown dtype": (pack({"a": spec(0, 8, "F77")}, bytes(8)), "unknown dtype 'F77'"),
    "dtype is a list": (pack({"a": spec(0, 8, ["F32"])}, bytes(8)), "broken safetensors header"),
    "negative offset": (pack({"a": spec(-8, 0)}), "whole numbers"),
    "offset is a float": (pack({"a": spec(0, 8.0)}, bytes(8)), "whole numbers"),
    "offset is a bool": (pack({"a": spec(False, 8)}, bytes(8)), "whole numbers"),
    "negative shape": (pack({"a": spec(0, 8, shape=[-1, -2])}, bytes(8)), "whole numbers"),
    "shape is a number": (pack({"a": spec(0, 8, shape=2)}, bytes(8)), "broken safetensors header"),
    "shape and range differ": (
        pack({"a": spec(0, 8, shape=[3])}, bytes(8)),
        "a lies at bytes 0 to 8, expected 12 from 0",
    ),
    "overflowing shape": (
        pack({"a": spec(0, 8, shape=[1 << 62, 1 << 62])}, bytes(8)),
        "a shape of 2 dimensions that",
    ),
    "half a character": (pack({"\ud800": spec(0, 8)}, bytes(8)), "surrogates not allowed"),
    "a size hidden by a 0": (
        pack({"a": spec(0, 0, shape=[0, 1 << 62, 1 << 62])}),
        "a shape of 3 dimensions that cannot be",
    ),
    "too many dimensions": (
        pack({"a": spec(0, 4, shape=[1] * 65)}, bytes(4)),
        "a shape of 65 dimensions that cannot be",
    ),
    "offsets beyond 2^63": (pack({"a": spec(1 << 63, 1 << 64)}), "whole numbers"),
    "a number of 4,000 digits": (pack(b'{"a": %s}' % (b"9" * 4000)), "broken safetensors header"),
    "a number of 5,000 digits": (pack(b'{"a": %s}' % (b"9" * 5000)), "broken safetensors header"),
    "the same key twice": (pack(b'{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
    "not a number": (pack(b'{"a": NaN}'), "NaN is no finite number"),
    "no finite number": (pack(b'{"a": 1e999}'), "1e999 is no finite number"),
    "UTF-16": (pack('{"a": 1}'.encode("utf-16")), "broken safetensors header: UnicodeDecodeError"),
    "overlap": (
        pack({"a": spec(0, 8), "b": spec(4, 12)}, bytes(12)),
        "b lies at bytes 4 to 12, expected 8 from 8",
    ),
    "the same bytes twice": (
        pack({"a": spec(0, 8), "b": spec(0, 8)}, bytes(8)),
        "b lies at bytes 0 to 8",
    ),
    "a gap": (
        pack({"a": spec(0, 8), "b": spec(12, 20)}, bytes(20)),
        "b lies at bytes 12 to 20, expected 8 from 8",
    ),
    "a hole at the start": (
        pack({"a": spec(4, 12)}, bytes(12)),
        "a lies at bytes 4 to 12, expected 8 from 0",
    ),
    "backwards": (pack({"a": spec(8, 0)}, bytes(8)), "a lies at bytes 8 to 0"),
    "outside": (pack({"a": spec(0, 8)}, bytes(4)), "cut short or damaged"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_read_header_refuses(what: str, tmp_path: Path) -> None:
    """Every unsound file is a ValueError that names the file and what is wrong, before a byte of
    weights is read.
    """
    content, message = BROKEN[what]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.safetensors") as caught:
        read_header(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_good_is_good(tmp_path: Path) -> None:
    """The file that the broken ones are made of is sound."""
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    assert list(read_header(tmp_path / "a.safetensors").entries) == ["a", "b"]


def test_every_cut_is_seen(tmp_path: Path) -> None:
    """A file cut at any byte is refused."""
    path = tmp_path / "a.safetensors"
    for n in range(len(GOOD)):
        path.write_bytes(GOOD[:n])
        with pytest.raises(ValueError, match="safetensors"):
            read_header(path)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "..",
        "",
        7,
        None,
        ["x.safetensors"],
        "./x.safetensors",
        "x\0.safetensors",
        "x\x07.safetensors",
    ],
)
def test_read_model_stays_inside(name: Any, tmp_path: Path) -> None:
    """An index that leads out of its folder, or to something else than safetensors, is refused:
    `_is_file_name`.
    """
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        (place / "x.safetensors").write_bytes(GOOD)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name, "b": name}}))
    with pytest.raises(
        ValueError, match="no sound weight_map: it must map weights to files beside it"
    ):
        read_model(folder)
    (folder / INDEX).write_bytes(dump({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    assert list(read_model(folder)) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "no sound weight_map"),
        (b'{"weight_map": []}', "no sound weight_map"),
        (b"[]", "must hold an object, found list"),
        (b'{"weight_map": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"weight_map": {}}', "no sound weight_map"),
        (
            b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors", "b": "x.safetensors"}}',
            "'a' occurs twice",
        ),
        (b'{"weight_map": {"a": "x.safetensors"}}', r"disagree on \[\('b', 'x.safetensors'\)\]"),
        (
            b'{"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}}',
            r"disagree on \[\('c'",
        ),
    ],
)
def test_read_model_refuses_index(text: bytes, message: str, tmp_path: Path) -> None:
    """A broken index, or one that does not agree with its files, weight by weight."""
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path)


def test_read_model_of_missing_files(tmp_path: Path) -> None:
    """A folder without a model, and an index that names a file that is not there: one sentence with
    the name.
    """
    with pytest.raises(ValueError, match=r"holds no model\.safetensors and no"):
        read_model(tmp_path)
    (tmp_path / INDEX).write_bytes(dump({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        read_model(tmp_path)


def test_stems(tmp_path: Path) -> None:
    """find_model: transformers' stem, then diffusers', then whatever is alone; an index before a
    file; never shards.
    """

    def holds(*names: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in ("config.json", *names):
            (folder / name).write_bytes(GOOD)
        return find_model(folder)

    assert holds("model.safetensors", "other.safetensors") == "model.safetensors"
    assert (
        holds("diffusion_pytorch_model.safetensors", "x.fp16.safetensors")
        == "diffusion_pytorch_model.safetensors"
    )
    assert (
        holds("a.safetensors.index.json", "a-00001-of-00002.safetensors", "b.safetensors")
        == "a.safetensors.index.json"
    )
    assert holds("model.safetensors", INDEX) == INDEX
    assert holds("flow.safetensors") == "flow.safetensors"
    with pytest.raises(
        ValueError, match=r"does hold a\.safetensors, b\.safetensors: name the one to read"
    ):
        holds("a.safetensors", "b.safetensors")
    with pytest.raises(
        ValueError,
        match=r"holds no model\.safetensors and no model\.safetensors\.index\.json\. `dist",
    ):
        holds("model-00001-of-00002.safetensors", "pytorch_model.bin")


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would block for ever, a device never end, a folder says so itself: refused before
    anything is read.
    """
    os.mkfifo(tmp_path / "model.safetensors")
    os.symlink("/dev/zero", tmp_path / META)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "model.safetensors", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no file"):
            read_header(path)
    with pytest.raises(ValueError, match="is no file"):
        read(tmp_path)


def test_a_giant_index_is_not_read(tmp_path: Path) -> None:
    """JSON beyond what a header may hold: refused by its size."""
    with open(tmp_path / META, "wb") as file:
        file.truncate(MOST_JSON + 1)
    with pytest.raises(ValueError, match=f"larger than {MOST_JSON} bytes"):
        read(tmp_path)


def test_weights_in_two_files(tmp_path: Path) -> None:
    """A weight in two files of one model: the index can name one of them, and the other is not
    passed over.
    """
    for name in ("x.safetensors", "y.safetensors"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / INDEX).write_bytes(
        dump({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    )
    with pytest.raises(ValueError, match="disagree"):
        read_model(tmp_path)


LISTED = {"model.safetensors": {"size": 1, "crc32": "00000000"}}
GOOD_MANIFEST = Manifest(kind="ema", files=LISTED, extra={"é": [1, None, 0.1]})


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    """ema.json comes back as it was written, what a later version added included."""
    full = replace(
        GOOD_MANIFEST,
        averages={"2-Power": ["a"], "10-Power": []},
        own_buffers=["b"],
        source={"name": "x"},
        other={"later": 1},
    )
    (tmp_path / META).write_bytes(full.to_bytes())
    found = read(tmp_path)
    assert found == full
    assert found.labels == ["", "2-Power", "10-Power"], "JSON keeps them the other way round"
    assert found.own_buffers_of("2-Power") == ["a"]
    assert found.own_buffers_of("") == ["b"]


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "1", None, 1.5, True])
def test_a_format_that_cannot_be_read(version: Any, tmp_path: Path) -> None:
    """A newer one, and none: an error that names the place, as nothing else in it can be judged."""
    (tmp_path / META).write_bytes(stamped(GOOD_MANIFEST.to_json() | {"format": version}))
    with pytest.raises(ValueError, match="format") as caught:
        read(tmp_path)
    newer = f"holds format {version}; this dist_ema reads up to {FORMAT}. Upgrade dist_ema"
    assert (newer if version == FORMAT + 1 else "names no format") in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [None, ["model.safetensors"], *({name: {}} for name in ("../x.safetensors", "/etc/passwd"))],
)
def test_files_that_lie_elsewhere(files: Any, tmp_path: Path) -> None:
    """Such names are never followed."""
    (tmp_path / META).write_bytes(stamped(GOOD_MANIFEST.to_json() | {"files": files}))
    found = read(tmp_path)
    assert found is not None
    assert found.files == {}
    assert any(problem.startswith("files: ") for problem in found.problems())


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 200_000, b"null"])
def test_a_manifest_that_is_no_object(text: bytes, tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (tmp_path / META).write_bytes(text)
    with pytest.raises(ValueError, match=r"not valid JSON|must hold an object"):
        read(tmp_path)


def test_entry() -> None:
    """nbytes by dtype and shape, 1 for a 0-dim weight's element."""
    assert [Entry("F32", shape).nbytes for shape in ((), (0, 5), (2, 3))] == [4, 0, 24]
    assert all(
        Entry(code, (2, 3)).nbytes == math.prod((2, 3)) * size for code, size in ITEMSIZE.items()
    )
