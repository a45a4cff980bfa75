"""What if it happens on one rank only, late, twice, or behind our back? Each test is a way in which
averages were lost.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, Uniform, load_file
from dist_ema.averaging.engines import Overlapped
from dist_ema.checkpoint import disk
from tests._models import Core, Images, Net
from tests._oracle import same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.test_engines import Late


def error_on_one_rank(folder: str) -> None:
    """One rank's replaced weight is an error on all, at once, with its cause; afterwards they are
    in step again.
    """
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    ema = EMA(model, 0.5)
    ema.timeout = 140
    kept, mine = model.module[0].weight, dist.get_rank() == 1
    started = time.monotonic()
    for verb in (
        ema.gather,
        lambda: ema.save(f"{folder}/a"),
        lambda: ema.swap().__enter__(),
        lambda: ema.copy_to(model),
    ):
        if mine:
            model.module[0].weight = nn.Parameter(kept.clone())
        with raises(
            RuntimeError,
            "0.weight no longer shares memory",
            *([] if mine else ["failed on rank 1"]),
        ):
            verb()
        model.module[0].weight = kept
        ema.save(f"{folder}/b")
    bad = nn.Linear(3, 3, device="meta") if mine else nn.Linear(3, 3)
    with raises(ValueError if mine else RuntimeError):
        ema.copy_to(nn.Sequential(bad, nn.Linear(3, 3)))
    with raises(ValueError, "max_shard_size is '1GB' on rank 0 and 'many' on rank 1"):
        ema.save(f"{folder}/c", max_shard_size="many" if mine else "1GB")
    with raises(ValueError, "max_shard_size"):
        ema.save(f"{folder}/c", max_shard_size="many")
    assert time.monotonic() - started < 100, "nobody waited for a timeout"
    ema.save(f"{folder}/b")


def slow_disk(folder: str) -> None:
    """A slow disk is no dead rank: the timeout covers entering. Guards Ranks._beating."""
    ema = EMA(wrap("ddp", Net()), 0.5)
    ema.timeout = 1.0
    if dist.get_rank() == 0:
        opened = disk.FileWriter
        sync = opened.sync

        def slow(self: disk.FileWriter, *, every: bool = False) -> None:
            time.sleep(4.0)
            sync(self, every=every)

        opened.sync = slow  # type: ignore[method-assign]
    for mode in ("direct", "stream"):
        ema.save(f"{folder}/{mode}", mode=mode)  # type: ignore[arg-type]
    ema.load(f"{folder}/stream")


def groups_in_groups(folder: str) -> None:
    """Part of the model on a smaller group: held twice, written once, and the file is sound."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    mine = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    fsdp = nn.Sequential(nn.Linear(5, 4), FSDP(nn.Linear(4, 3), process_group=mine, device_id=cpu))
    ddp = nn.Sequential(
        nn.Linear(5, 4), nn.parallel.DistributedDataParallel(nn.Linear(4, 3), process_group=mine)
    )
    models = {"fsdp": FSDP(fsdp, device_id=cpu), "ddp": nn.parallel.DistributedDataParallel(ddp)}
    for name, model in models.items():
        ema = EMA(model, 0.5)
        ema.save(f"{folder}/{name}")
        ema.load(f"{folder}/{name}")
        full = ema.gather()
        if full:
            assert (
                full.keys()
                == load_file(f"{folder}/{name}").keys()
                == {"0.weight", "0.bias", "1.weight", "1.bias"}
            )
    with torch.no_grad():  # an expert of each group's own, under one name
        for p in [*ddp[1].parameters(), *fsdp[1].parameters()]:
            p += dist.get_rank() // 2
    for model in models.values():
        with raises(ValueError, "1.weight", "differ between ranks 0 and 2"):
            EMA(model, 0.5)


def buffers_of_another_dtype() -> None:
    """A recalibrated bf16 buffer beside an fp32 average of it: the wire carries one dtype.

    Guards .to() in layout.parts.
    """
    model = wrap("ddp", Images().to(torch.bfloat16))
    ema = EMA(model, 0.5, buffers="average")
    with ema.swap():
        for buffer in model.buffers():
            buffer.fill_(3)
    other = wrap("ddp", Images())
    ema.copy_to(other)
    assert (other.module.norm.running_mean == 3).all()
    assert (other.module.norm.running_var == 3).all()


@pytest.mark.multirank
def test_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, error_on_one_rank, str(tmp_path))
    run_ranks(2, slow_disk, str(tmp_path))
    run_ranks(4, groups_in_groups, str(tmp_path))
    run_ranks(2, buffers_of_another_dtype)


# --- behind our back ------------------------------------------------------------------------------


def test_weights_that_move_before_averaging_starts() -> None:
    """FSDP2 may pin its shards at the first forward. Guards follow() in Average.begin."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, start=1)
    with torch.no_grad():
        model.weight.set_(torch.full((1, 1), 5.0))
    model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert ema.gather()["weight"].item() == 5


class Counting(nn.Module):
    """Registers a new buffer object at every step, as running statistics written by hand often
    do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("b", torch.zeros(4))
        self.register_buffer("later", None)


def test_buffers_registered_anew() -> None:
    model = Counting()
    ema = EMA(model, Uniform(), buffers="average")
    for step in range(1, 11):
        model.b = torch.full((4,), float(step))
        ema.update()
    assert (ema.gather()["b"] == 5.5).all()
    live = model.b
    with ema.swap():
        model.b = torch.full((4,), 7.0)
    assert model.b is live, "the object itself is back"
    with ema.swap():
        assert (model.b == 7).all(), "and what the block registered became the average's own"
    model.b = torch.zeros(8)
    with pytest.raises(RuntimeError, match="b was .* with 4 elements here, and is now .* with 8"):
        ema.gather()
    model.b = None
    with pytest.raises(RuntimeError, match="b is gone from the model"):
        ema.gather()


def test_strided_buffers_and_frozen_weights_pass_through() -> None:
    """They need not be averaged in place, so they refuse nothing."""
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.arange(4.0).expand(3, 4))
    model.frozen = nn.Parameter(torch.arange(12.0).view(3, 4).t(), requires_grad=False)
    model.every_second = nn.Parameter(torch.arange(12.0)[::2], requires_grad=False)
    ema = EMA(model, 0.5)
    full = ema.gather()
    assert all(torch.equal(full[name], value) for name, value in model.state_dict().items())
    before = snapshot(model)
    with ema.swap():
        pass
    assert same(before, snapshot(model))
    _strided_ones_follow(model, ema)
    with pytest.raises(ValueError, match="not initialised yet"):
        EMA(nn.LazyLinear(3), 0.5)


@torch.no_grad()
def _strided_ones_follow(model: nn.Module, ema: EMA) -> None:
    """What was written to them is in the next gather, a swap restores them, and a copy reaches
    them.
    """
    for _ in range(4):
        model.every_second += 1
        model.mask[0] *= 2  # one row, that all rows are
        full = ema.gather()
        assert all(torch.equal(full[name], value) for name, value in model.state_dict().items())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.swap():
        model.mask[0] += 100
        inside = model.mask.clone()
    assert torch.equal(model.mask, before["mask"])
    with ema.swap():
        assert torch.equal(model.mask, inside), "the average's own by now"
    other = copy.deepcopy(model)
    other.every_second = nn.Parameter(torch.zeros(12)[::2], requires_grad=False)
    other.mask = torch.zeros(4).expand(3, 4)
    ema.copy_to(other)
    assert torch.equal(other.every_second, model.every_second)
    assert torch.equal(other.mask, inside)
    teacher = copy.deepcopy(other)
    teacher.every_second = nn.Parameter(torch.zeros(6), requires_grad=False)
    teacher.mask = torch.zeros(3, 4)
    pair = EMA(model, 0.5, into=teacher)
    for _ in range(4):
        model.every_second += 1
        model.mask[0] *= 2
        pair.update()
        assert torch.equal(teacher.every_second, model.every_second)
        assert torch.equal(teacher.mask, model.mask)


# --- order of calls -------------------------------------------------------------------------------


def test_updates_by_hand_before_the_start() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, start=100).remove()
    start = model.weight.item()
    with pytest.raises(ValueError, match="elapsed must be positive"):
        ema.update(-1)
    assert not ema.weights.clock.started, "a refused update begins nothing"
    ema.update()
    with torch.no_grad():
        model.weight += 1
    ema.update()
    assert ema.gather()["weight"].item() == pytest.approx(start + 0.5)
    ema.attach(optimizer, start=3)
    ema.reset()
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert (ema.now, ema.gather()["weight"].item()) == (0, pytest.approx(start)), (
        "the average is live until step 3"
    )


def test_detach_with_an_update_under_way() -> None:
    """Nobody fences after the hooks are gone. Guards settle() in Attachment.remove."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ema = EMA(model, 0.0)
    ema.attach(optimizer)
    ema.weights.updates.engine = Overlapped(Late(0))
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    want = model.weight.item()
    ema.detach()
    optimizer.step()
    assert ema.weights.averages[0].averaged[0].shadow.item() == want


def test_an_open_interval_survives_an_update_by_hand() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    ema = EMA(model, Uniform())
    ema.attach(optimizer, every=3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    ema.update()
    optimizer.step()
    assert ema.now == 4


def test_two_averagers_of_one_model(tmp_path: Path) -> None:
    """They nest, warn of nothing that the other did, and refuse what would average an average."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    a, b = EMA(model, 0.5), EMA(model, 0.9)
    a.attach(optimizer)
    b.attach(optimizer)
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    before = snapshot(model)
    with a.swap(), b.swap():
        pass
    refused = (
        a.update,
        a.reset,
        a.rescan,
        partial(a.save, tmp_path / "a"),
        partial(a.export, tmp_path / "a"),
    )
    refused += (
        a.gather,
        a.state_dict,
        partial(a.copy_to, nn.Linear(2, 2)),
        partial(a.load, tmp_path / "a"),
    )
    for verb in refused:
        with b.swap(), pytest.raises(RuntimeError, match="inside the swap of another EMA"):
            verb()
    assert list(tmp_path.iterdir()) == []
    b.detach()
    a.detach()
    a.attach(optimizer)
    with (
        b.swap(),
        pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside the swap of another EMA"),
    ):
        optimizer.step()
    assert same(before, snapshot(model))
    a.gather()


def test_two_averagers_of_parts_of_one_model(tmp_path: Path) -> None:
    """It is the weights that they share, not the first one of them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    whole, last, first = (
        EMA(model, 0.5),
        EMA(model, 0.5, only=r"^[12]"),
        EMA(model, 0.5, only=r"^0"),
    )
    listed = EMA(list(model[1].parameters()), 0.5)
    for lender, others in (
        (whole, (last, first, listed)),
        (last, (whole, listed)),
        (listed, (whole, last)),
    ):
        for other in others:
            with lender.swap(), pytest.raises(RuntimeError, match="inside the swap of another EMA"):
                other.update()
    with last.swap():
        first.update()  # they share nothing
        for verb in (first.gather, partial(first.export, tmp_path / "a")):
            with pytest.raises(RuntimeError, match="inside the swap of another EMA"):
                verb()  # what it does not average comes from the model
    model[0].requires_grad_(False)
    late = EMA(model, 0.5)
    model[0].requires_grad_(True)
    late.rescan()
    with late.swap(), pytest.raises(RuntimeError, match="inside the swap of another EMA"):
        listed.update()


def test_a_buffer_that_is_filled_later(tmp_path: Path) -> None:
    """None when the EMA was built: every verb that reads the whole model takes it in."""
    model = nn.Linear(2, 2)
    model.register_buffer("scale", None)
    ema = EMA(model, 0.5)
    assert "scale" not in ema.gather()
    model.scale = torch.ones(2)
    ema.update()
    assert torch.equal(ema.gather()["scale"], torch.ones(2))
    ema.save(tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a")["scale"], torch.ones(2))
    assert ema.now == 1


def test_a_state_dict_that_requires_grad() -> None:
    """Guards no_grad in ema._aside: shadows must not be pulled into a graph."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    state = ema.state_dict()
    state["averages"]["average_0"]["weights"] = dict(model.named_parameters())
    ema.load_state_dict(state)
    ema.update()
    assert not any(slot.shadow.requires_grad for slot in ema.weights.states)


def test_resumed_before_any_update_was_accepted(tmp_path: Path) -> None:
    """Uniform's first move copies, also when the first three were skipped in an earlier run."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    ema = EMA(model, Uniform())
    ema.attach(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    model.weight.grad = torch.ones(1, 1)
    for _ in range(3):
        optimizer.step()
    ema.save(tmp_path / "average")
    again = EMA(model, Uniform())
    again.load(tmp_path / "average")
    with torch.no_grad():
        model.weight.fill_(8.0)
    again.update()
    assert again.gather()["weight"].item() == 8


def test_host_threads_end_with_their_owner() -> None:
    """Six averages in host memory, thrown away: no thread stays behind."""
    before = threading.active_count()
    for _ in range(6):
        model = nn.Linear(4, 4)
        ema = EMA(model, 0.5, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            ema.attach(optimizer)
            ema.update()
            ema.detach()
        del ema, model, optimizer
    gc.collect()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


# --- files ----------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path: Path) -> None:
    ema = EMA(Core(), 0.5)
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    ema.save(tmp_path / "link" / "a")
    os.symlink(tmp_path / "real" / "a", tmp_path / "latest")
    ema.update()
    ema.save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    again = EMA(Core(), 0.5)
    again.load(tmp_path / "real" / "a")
    assert again.now == 1


@pytest.mark.parametrize("stop", range(1, 8))
def test_an_export_cut_short_changes_nothing(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never shards of two exports together. Guards that the folder is built beside the old one."""
    model = Core()
    ema = EMA(model, 0.0)
    ema.export(tmp_path / "out", max_shard_size=300)
    before = load_file(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    ema.update()
    fsync, calls = os.fsync, []

    def once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == stop:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(KeyboardInterrupt):
        ema.export(tmp_path / "out", max_shard_size=300)
    monkeypatch.undo()
    after = load_file(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ema.export(tmp_path / "out", max_shard_size=300)
    assert not torch.equal(load_file(tmp_path / "out")["frozen.weight"], before["frozen.weight"])


def test_frozen_then_and_averaged_now(tmp_path: Path) -> None:
    model = Core()
    EMA(model, 0.5).save(tmp_path / "a")
    model.frozen.requires_grad_(True)
    with pytest.warns(UserWarning, match="frozen.bias, frozen.weight, which were frozen then"):
        EMA(model, 0.5).load(tmp_path / "a")
