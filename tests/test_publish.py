"""Publishing behind training, leases, and those who follow.

How to read a failure: `versions_in` are the numbers of the sealed versions in the folder.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_ema import EMA, follow, load_file
from dist_ema.checkpoint import disk, leases, location, pointers, versions
from dist_ema.integrations.vllm import EMASource
from dist_ema.offline.verify import verify
from dist_ema.service.follow import open_version
from dist_ema.verbs.publisher import Publication
from tests._ranks import run_ranks


def versions_in(folder: Path) -> list[int]:
    return list(versions.numbered(folder))


class Trainer:
    """A plain model that publishes; `step` waits for the version in flight."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.ema = EMA(self.model, 0.5)
        self.ema.attach(self.optimizer)
        self.handle = self.ema.publish(folder, **{"every": 1, "dtype": None} | options)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.model(torch.randn(5, 4)).square().sum().backward()
            self.optimizer.step()
            self.handle.wait()


# --- publishing ----------------------------------------------------------------------------------


def publish_on_ranks(folder: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    handle = ema.publish(f"{folder}/published", every=2, keep=2, dtype=None)
    handle.metrics["loss"] = 0.25
    for step in range(1, 8):
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            ema.save(f"{folder}/saved-{step}")  # waits for the version, and has the same weights
    source = EMASource(ema, dtype=torch.bfloat16)
    whole = ema.gather()
    for mode in (torch.enable_grad, torch.inference_mode):  # it can be sent again
        with mode():
            sent = dict(source)
        assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
            (name, torch.bfloat16, tuple(value.shape)) for name, value in sent.items()
        ]
        assert sent.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
        for name in whole:  # on the first rank
            assert torch.equal(sent[name], whole[name].bfloat16())
    handle.remove()
    assert (handle.number, handle.published, handle.skipped, handle.failed) == (3, 3, 0, 0)
    fresh = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    for layer in fresh:
        fully_shard(layer)
    for version in follow(f"{folder}/published", timeout=0):
        version.load_into(fresh)
        wanted = version.state_dict()
        for name, parameter in fresh.named_parameters():
            assert torch.equal(parameter.full_tensor(), wanted[name])  # type: ignore[attr-defined]


def test_ranks_publish_what_save_writes(tmp_path: Path) -> None:
    """Two FSDP2 ranks: versions are numbered, kept by keep=, whole, and what `save` has."""
    run_ranks(2, publish_on_ranks, str(tmp_path))
    folder = tmp_path / "published"
    assert versions_in(folder) == [2, 3]
    assert (folder / "latest").read_text() == "version-000003\n"
    for number, step in ((2, 4), (3, 6)):
        path = folder / versions.name_of(number)
        assert verify(path).problems == []
        published, saved = load_file(path), load_file(tmp_path / f"saved-{step}")
        assert all(torch.equal(published[name], saved[name]) for name in saved)
        facts = json.loads((path / "ema.json").read_text())["extra"]["publish"]
        assert (facts["version"], facts["step"], facts["now"]) == (number, step, step)
        assert facts["metrics"] == {"loss": 0.25}
    assert sorted(os.listdir(folder)) == [
        ".leases", "latest", "version-000002", "version-000003",
    ]  # fmt: skip


def publish_alone(folder: str) -> tuple[int, int, list[int]]:
    """An unwrapped model on each rank. How often this one prepared the folder."""
    prepared, begin = list[int](), Publication.begin

    def count(self: Publication) -> int:
        prepared.append(begin(self))
        return prepared[-1]

    Publication.begin = count  # type: ignore[method-assign]
    torch.manual_seed(0)
    ema = EMA(nn.Linear(2, 2), 0.5)
    for again in range(2):  # the second finds versions, one of which it removes
        handle = ema.publish(folder, every=1, keep=2 - again)
        ema.update()
        handle.wait()
        ema.update()
        handle.remove()
    return len(prepared), handle.number, versions_in(Path(folder))


def test_one_rank_prepares_the_folder(tmp_path: Path) -> None:
    """Two that did both renamed the same version away, and one of them failed."""
    first, second = run_ranks(2, publish_alone, str(tmp_path / "published"))
    assert first == (2, 4, [4])
    assert second[:2] == (0, 4)


def test_a_version_in_flight_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is due while a version is written is skipped and counted. Guards `busy`."""
    gate, real = threading.Event(), disk.FileWriter.write

    def held(self: disk.FileWriter, *args: Any) -> None:
        assert gate.wait(60)
        real(self, *args)

    monkeypatch.setattr(disk.FileWriter, "write", held)
    trainer = Trainer(tmp_path / "published")
    for _ in range(4):
        trainer.model(torch.randn(5, 4)).sum().backward()
        trainer.optimizer.step()
    gate.set()
    trainer.handle.remove(stop=True)
    assert (trainer.handle.published, trainer.handle.skipped) == (1, 3)
    (version,) = follow(tmp_path / "published")
    assert version.step == 1, "the weights of the step that published"
    trainer.ema.publish(tmp_path / "other")
    with pytest.raises(RuntimeError, match="called before"):
        trainer.ema.publish(tmp_path / "third")


def test_snapshots_in_the_same_folder(tmp_path: Path) -> None:
    """Each of the two verbs looks at the clock for itself."""
    trainer = Trainer(tmp_path, every=2)
    taken = []
    for _ in range(4):
        trainer.step()
        taken.append(trainer.ema.snapshot(tmp_path, every=2) is not None)
    trainer.handle.remove()
    assert taken == [False, True, False, True]
    assert versions_in(tmp_path) == [1, 2]


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and the next version is tried; nothing half-written stays."""
    trainer = Trainer(tmp_path / "published")
    trainer.step()
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(disk, "reserve", full)
        with pytest.warns(UserWarning, match="version 2 could not be published.*No space left"):
            trainer.step()
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(disk.Target, "write", full)
        with pytest.warns(UserWarning, match="version 4 could not be published"):
            trainer.step()  # behind training: who waits for it learns of it
    trainer.step()
    trainer.handle.remove()
    assert (trainer.handle.published, trainer.handle.failed) == (3, 2)
    assert versions_in(tmp_path / "published") == [1, 3, 5]
    assert not [name for name in os.listdir(tmp_path / "published") if ".tmp-" in name]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every": 0}, "every must be positive and finite, got 0"),
        ({"every": float("inf")}, "every must be positive and finite, got inf"),
        ({"keep": 0}, "keep must be a whole number of versions, at least 1, got 0"),
        ({"every": "3"}, "every must be positive and finite, got '3'"),
        ({"keep": 3, "keep_at_most": 2}, "keep_at_most=2 must be a whole number, and no less than"),
        ({"keep_at_most": float("nan")}, "keep_at_most=nan must be a whole number"),
        ({"dtype": "bf16"}, "dtype must be a floating dtype, like torch.bfloat16, got 'bf16'"),
        ({"mode": "fast"}, "mode must be 'direct', 'stream' or None, got 'fast'"),
        ({"max_shard_size": True}, "max_shard_size must be bytes or a text like '5GB', got True"),
        ({"beside": "nowhere"}, "beside='.*nowhere' is no folder"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        EMA(torch.nn.Linear(2, 2)).publish(tmp_path / "published", **{"every": 1} | options)
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_a_refused_publication_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file in the way of the folder, and a weight that no file can hold: the next call counts."""
    (tmp_path / "file").touch()
    ema = EMA(torch.nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="file is a file, and a folder is needed there"):
        ema.publish(tmp_path / "file", every=1)
    handle = ema.publish(tmp_path / "folder", every=np.float32(2))
    assert handle.every == 2
    ema.update()
    ema.update()
    handle.remove()
    assert versions_in(tmp_path / "folder") == [1]
    ema.model.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    for verb, cure in (
        (partial(ema.save, tmp_path / "saved"), "Cast it in the model, or leave it out with only="),
        (partial(ema.publish, tmp_path / "folder"), "Cast it in the model"),
    ):
        with pytest.raises(ValueError, match=f"wide is torch.complex128, which .* hold. {cure}"):
            verb()


# --- leases --------------------------------------------------------------------------------------


def test_leases_keep_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live leases and the best stay, up to keep_at_most; dead leases end; retired ones are shut."""
    folder = tmp_path / "published"
    trainer = Trainer(folder, keep=1, keep_at_most=3)
    trainer.step()
    first = open_version(folder / "version-000001")
    assert first is not None
    trainer.step()
    assert versions_in(folder) == [1, 2], "leased"
    assert open_version(folder / "version-000001") is None, "retired: no new readers"
    (folder / pointers.BEST).write_text("version-000002\n")
    trainer.step()
    assert versions_in(folder) == [1, 2, 3], "leased, the best, the newest"
    for pointer, named in ((pointers.BEST, 2), (pointers.LATEST, 3)):
        version = location.locate(folder / pointer).folder
        assert version == str(folder / versions.name_of(named))
    (folder / pointers.BEST).unlink()
    first.release()
    first.release()
    trainer.step()
    assert versions_in(folder) == [4]
    held = [open_version(folder / "version-000004")]
    for number in (5, 6, 7, 8):
        trainer.step()
        held.append(open_version(folder / versions.name_of(number)))
        assert len(versions_in(folder)) <= 3
    assert versions_in(folder) == [6, 7, 8], "no lease can grow the folder"
    for version in held:
        assert version is not None
        version.release()
    dead = folder / leases.LEASES / "version-000008.dead"
    dead.write_text(json.dumps({"expiry": 5.0}))
    torn = folder / leases.LEASES / "version-000008.torn"
    torn.write_text("{")
    clock = time.monotonic()
    monkeypatch.setattr(leases.time, "monotonic", lambda: clock)
    trainer.step()
    clock += 4
    trainer.step()
    assert 8 in versions_in(folder), "seen for 4 s of the publisher's clock"
    clock += 2
    dead.write_text(json.dumps({"expiry": 5.0, "renewed": 1}))
    trainer.step()
    assert dead.exists(), "renewed meanwhile"
    clock += 61
    trainer.step()
    assert versions_in(folder) == [12]
    assert not dead.exists()
    assert not torn.exists()
    trainer.handle.remove()


def test_leases_are_renewed_and_released(tmp_path: Path) -> None:
    """The renewal changes the file; the end of the process removes it."""
    folder = tmp_path / "published"
    trainer = Trainer(folder)
    trainer.step()
    version = open_version(folder / "version-000001", expiry=0.01)
    assert version is not None
    (before,) = leases.read_all(folder).values()
    while leases.read_all(folder).values() == {before}:
        time.sleep(0.001)
    version.release()
    assert leases.read_all(folder) == {}
    trainer.handle.remove()


# --- following -----------------------------------------------------------------------------------


def test_following_over_restarts(tmp_path: Path) -> None:
    """Each version once, whatever the trainer does: absent, killed, rewound, begun anew."""
    folder = tmp_path / "published"
    followed = follow(folder, timeout=0, poll=0.001)
    newest = follow(folder, timeout=0, every=False, poll=0.001)
    assert list(followed) == [], "there is no folder yet"
    trainer = Trainer(folder)
    trainer.step(2)
    assert [(each.number, each.step) for each in followed] == [(1, 1), (2, 2)]
    assert [each.number for each in newest] == [2]
    trainer.handle.remove()
    (folder / f".version-000003.tmp-{'0' * 32}").mkdir()  # a trainer was killed
    (folder / "latest").unlink()
    rewound = Trainer(folder, keep=1)
    assert versions_in(folder) == [2], "keep=1: what the one before left goes"
    assert (folder / "latest").read_text() == "version-000002\n"
    rewound.handle.remove()
    rewound = Trainer(folder)
    rewound.step()
    assert [(each.number, each.step) for each in followed] == [(3, 1)]
    assert not [name for name in os.listdir(folder) if ".tmp-" in name]
    rewound.step(6)
    assert [each.number for each in followed] == [7, 8, 9], "keep=3"
    assert [each.number for each in newest] == [9]
    assert [each.number for each in follow(folder, timeout=0, after=8)] == [9]
    rewound.handle.remove(stop=True)
    for path in versions.numbered(folder).values():
        disk.remove(path)
    again = Trainer(folder)
    assert not (folder / versions.STOP).exists(), "a new training takes the stop file away"
    again.step()
    assert [each.number for each in followed] == [1], "another run in an emptied folder"
    (folder / "version-000001" / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="passed over"):
        assert list(follow(folder, timeout=0)) == []
    again.handle.remove()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout": math.nan}, "timeout must be"),
        ({"timeout": "3"}, "timeout must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"poll": math.inf}, "poll must be"),
        ({"poll": -0.5}, "poll must be"),
        ({"after": "3"}, "after must be"),
    ],
)
def test_following_refuses(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    """At the call: a timeout of nan would wait for ever."""
    with pytest.raises(ValueError, match=named):
        follow(tmp_path, **options)


@pytest.mark.parametrize("dtype", [torch.int8, "bf16"])
def test_a_source_refuses_dtypes(dtype: Any) -> None:
    """Weights cast to whole numbers would be sent without a word."""
    with pytest.raises(ValueError, match="must be a floating dtype"):
        EMASource(EMA(nn.Linear(2, 2)), dtype=dtype)


class Configured(nn.Linear):
    """A model that has a config to give, as diffusers' have."""

    def to_json_string(self) -> str:
        return '{"of": "the model"}'


def test_a_version_has_a_config(tmp_path: Path) -> None:
    """The model's own, or that of beside=; it goes with its version.

    Guards that `keep=` removes versions with a config that the model gave.
    """
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"of": "the base"}')
    for beside, owner in ((None, "the model"), (tmp_path / "base", "the base")):
        ema = EMA(Configured(2, 2))
        handle = ema.publish(tmp_path / owner, every=1, keep=1, dtype=None, beside=beside)
        for _ in range(3):
            ema.update()
            handle.wait()
        handle.remove()
        (version,) = follow(tmp_path / owner, timeout=0)
        assert json.loads((version.path / "config.json").read_text()) == {"of": owner}
    given = tmp_path / "base" / "config.json"
    assert given.samefile(version.path / "config.json"), "a link, where the disk has them"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").symlink_to("../base/config.json")  # as a hub's cache does
    ema = EMA(nn.Linear(2, 2))
    handle = ema.publish(tmp_path / "deep" / "er", every=1, beside=tmp_path / "hub")
    ema.update()
    handle.remove()
    (version,) = follow(tmp_path / "deep" / "er", timeout=0)
    assert given.samefile(version.path / "config.json")
    assert not (version.path / "config.json").is_symlink()


class Settings:
    """A config that is written, as that of transformers, with the names that are set on it."""

    architectures = None

    def to_json_string(self) -> str:
        return json.dumps(vars(self))


class Slots:
    """A config of the user's, which takes no other names."""

    __slots__ = ()

    def to_json_string(self) -> str:
        return "{}"


def test_a_config_in_a_module_of_the_users(tmp_path: Path) -> None:
    """A module without `dtype` gives its config all the same."""
    model: Any = nn.Linear(2, 2)
    ema = EMA(model)
    for config, dtype, expected in (
        (Settings(), None, {"architectures": ["Linear"]}),
        (Settings(), torch.bfloat16, {"architectures": ["Linear"], "dtype": "bfloat16"}),
        (Slots(), None, None),
    ):
        model.config = config
        out = tmp_path / f"{type(config).__name__}-{dtype}"
        ema.export(out, dtype=dtype)
        file = out / "config.json"
        assert (json.loads(file.read_text()) if file.exists() else None) == expected


def test_following_loads(tmp_path: Path) -> None:
    """In place and as a state_dict, synchronous and asynchronous, until the stop file."""
    folder, base = tmp_path / "published", tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin"):
        (base / name).write_text("{}")
    trainer = Trainer(folder, beside=base)
    trainer.step(4)
    assert versions_in(folder) == [2, 3, 4], "what came from beside= goes with its version"
    assert sorted(os.listdir(folder / "version-000004")) == [
        "config.json", "ema.json", "model.safetensors", "tokenizer.model",
    ]  # fmt: skip
    with trainer.ema.swap():
        wanted = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.handle.remove(stop=True)

    async def collect() -> list[int]:
        return [version.number async for version in follow(folder)]

    assert asyncio.run(collect()) == [2, 3, 4]
    fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    pointers = [value.data_ptr() for value in fresh.state_dict().values()]
    for version in follow(folder):
        version.load_into(fresh)
        state = version.state_dict()
    assert pointers == [value.data_ptr() for value in fresh.state_dict().values()], "in place"
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, wanted[name])
        assert torch.equal(state[name], wanted[name])
    with pytest.raises(ValueError, match=r"differ in 1.bias, 1.num_batches_tracked"):
        version.load_into(nn.Sequential(nn.Linear(4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.ema.load(version.path)  # a version is a start for another training
