"""Wrappers are dissolved: canonical names, odd weights, records that go stale, models that cannot
be averaged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import EMA, Uniform
from dist_ema.sharding import discovery, wrappers
from tests._models import Block, Images, Net, image_batch
from tests._oracle import Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

NAMES = [name for name, _ in Net().named_parameters()]


# --- names ----------------------------------------------------------------------------------------


def names_of(kind: str, how: str) -> list[str]:
    model = Net()
    if how == "compile first":
        model = torch.compile(model, backend="eager")
    if how == "compiled blocks":
        model.core.blocks = nn.ModuleList(
            torch.compile(block, backend="eager") for block in model.core.blocks
        )
    if how == "checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
            apply_activation_checkpointing,
        )

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    model = wrap(kind, model)
    if how == "compile last":
        model = torch.compile(model, backend="eager")
    found = discovery.find_shards(model).shards
    assert [s.aliases for s in found if s.name == "core.emb.weight"] == [["core.head.weight"]]
    assert {s.name for s in found if s.kind == "buffer"} == {"core.seen", "core.mean"}
    return [s.name for s in found if s.kind != "buffer"]


def _sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def all_names() -> None:
    for kind in ("ddp", "fsdp1 flat", "fsdp1 orig", "fsdp2"):
        for how in ("plain", "compile first", "compiled blocks", "compile last", "checkpointed"):
            if kind.startswith("fsdp") and how == "compile first":
                # `wrap` wraps model.core, of which OptimizedModule forwards reads but not writes.
                continue
            assert sorted(names_of(kind, how)) == sorted(NAMES), (kind, how)
    inner = torch.compile(Block(6, 5), backend="eager")
    assert wrappers.unwrapped(inner) is inner._orig_mod
    assert (
        wrappers.unwrapped(_sharded(inner)) is inner
    )  # the forward that gathers the weights is its own


@pytest.mark.multirank
def test_names_are_canonical_under_every_wrapper() -> None:
    """No module., _orig_mod., _fsdp_wrapped_module. or _checkpoint_wrapped_module., and a user's
    own `module` stays.
    """
    run_ranks(2, all_names)
    own = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert [s.name for s in discovery.find_shards(own).shards] == ["module.weight", "module.bias"]


# --- more rows of the parity table ----------------------------------------------------------------


def bf16_policy() -> None:
    """The shards stay fp32 under a bf16 policy; so does the average."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from tests._wrappers import _fsdp2

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    model = _fsdp2(Net(), mp_policy=policy)
    ema = EMA(model, 0.8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    ema.attach(optimizer)
    oracle = {name: value.double() for name, value in ema.gather().items()}
    for step in range(3):
        tokens = torch.randint(0, 7, (4, 4), generator=torch.Generator().manual_seed(step))
        model(tokens).float().square().mean().backward()
        optimizer.step()
        live = EMA(model, 0.0).gather()
        oracle = {
            name: 0.8 * average + 0.2 * live[name].double() for name, average in oracle.items()
        }
    full = ema.gather()
    for name in ema.names() if full else []:
        assert full[name].dtype == torch.float32
        assert (full[name].double() - oracle[name]).abs().max() < 2e-6
    before = snapshot(model)
    with ema.swap():
        assert not same(before, snapshot(model))
    assert same(before, snapshot(model))


def channels_last() -> None:
    """Dense permuted weights are cut in storage order, and files and gather are row-major all the
    same.
    """
    run = Training(
        "ddp", lambda: Images().to(memory_format=torch.channels_last).eval(), image_batch
    )
    assert not run.twin.a.weight.is_contiguous()
    ema, oracle = EMA(run.model, Uniform()), Oracle(run.twin, Uniform())
    ema.attach(run.optimizer)
    run.train(3, oracle.update)
    full = ema.gather()
    if full:
        assert full["a.weight"].is_contiguous()
        assert oracle.error(full) < 2e-6
    before = snapshot(run.model)
    with ema.swap():
        seen = run.probe()
    assert (
        seen - run.twin_with({k: v.float() for k, v in oracle.average.items()})
    ).abs().max() < 2e-5
    assert same(before, snapshot(run.model))
    target = Images()
    ema.copy_to(wrap("fsdp2", target))
    back = EMA(target, 0.5).gather()
    assert all(torch.equal(back[k], full[k]) for k in full)


def sync_batchnorm() -> None:
    """SyncBatchNorm trains on accelerators only; its weights and statistics average and swap like
    any other.
    """
    ddp = nn.parallel.DistributedDataParallel(Images())
    ddp.module = nn.SyncBatchNorm.convert_sync_batchnorm(
        ddp.module
    ).eval()  # DDP refuses to be built around it on CPU
    assert isinstance(ddp.module.norm, nn.SyncBatchNorm)
    ema = EMA(ddp, 0.5, buffers="average")
    with torch.no_grad():
        for tensor in [*ddp.parameters(), *(b for b in ddp.buffers() if b.is_floating_point())]:
            tensor += 1
    ema.update()
    full = ema.gather()
    before = snapshot(ddp)
    with ema.swap():
        inside = {
            name.removeprefix("module."): tensor.clone()
            for name, tensor in ddp.state_dict().items()
        }
    assert same(before, snapshot(ddp))
    assert all(torch.equal(inside[name], full[name]) for name in full)
    live = dict(ddp.module.named_buffers())
    assert (inside["norm.running_mean"] == live["norm.running_mean"] - 0.5).all()
    assert inside["norm.num_batches_tracked"].dtype == torch.int64


def copy_between_wrappers() -> None:
    """copy_to redistributes: every cut into every other."""
    for source in ("ddp", "fsdp1 flat", "fsdp2"):
        torch.manual_seed(1)
        ema = EMA(wrap(source, Net()), 0.5)
        full = ema.gather()
        for target in ("ddp", "fsdp1 orig", "fsdp2"):
            torch.manual_seed(2)
            other = wrap(target, Net())
            ema.copy_to(other)
            arrived = EMA(other, 0.5).gather()
            assert all(torch.equal(arrived[name], full[name]) for name in full), (source, target)
    with raises(ValueError, "core.blocks.0.up.weight"):
        ema.copy_to(wrap("ddp", Net(hidden=4)))


@pytest.mark.multirank
def test_more_rows() -> None:
    run_ranks(2, bf16_policy)
    run_ranks(3, channels_last)
    run_ranks(2, sync_batchnorm)
    run_ranks(2, copy_between_wrappers)


# --- odd weights ----------------------------------------------------------------------------------


def ddp_ignored() -> None:
    """What DDP was told to ignore stays whole and local; a replica that differs is named at
    construction.
    """
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, ["1.weight", "1.bias"]
    )
    ddp = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad():
        model[1].weight.fill_(dist.get_rank())
    ema = EMA(ddp, 0.5)
    slots = {slot.name: slot for slot in ema.weights.states}
    assert slots["1.weight"].averaged_region.numel == 6
    assert slots["0.weight"].averaged_region.numel < 9
    with torch.no_grad():
        model[1].weight += 1
    ema.update()
    with ema.swap():
        assert (model[1].weight == dist.get_rank() + 0.5).all()
    full = ema.gather()
    if full:
        assert (full["1.weight"] == 0.5).all(), "files and gather take the first rank's"
    with torch.no_grad():
        model[0].weight += dist.get_rank()
    with raises(ValueError, "0.weight", "ranks 0 and 1"):
        EMA(ddp, 0.5)


def different_models() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

    ddp = nn.parallel.DistributedDataParallel(Other())
    ddp.module.a.bias.requires_grad_(dist.get_rank() == 0)
    with raises(ValueError, "hold different models", "a.bias"):
        EMA(ddp, 0.5)


@pytest.mark.multirank
def test_ddp_ignored_and_unequal_replicas() -> None:
    run_ranks(2, ddp_ignored)
    run_ranks(2, different_models)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
)
def test_dtypes_of_live_weights(dtype: torch.dtype) -> None:
    """fp32 shadows over 16-bit weights do not stall; complex weights keep complex shadows."""
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(5, dtype=dtype))
    ema = EMA(model, 0.999)
    with torch.no_grad():
        model.w += 1
    for _ in range(100):
        ema.update()
    got = ema.gather()["w"]
    assert got.dtype == (torch.complex64 if dtype.is_complex else torch.float32)
    assert torch.allclose(
        got.real if dtype.is_complex else got, torch.full((5,), 2 - 0.999**100), atol=1e-5
    )
    before = model.w.detach().clone()
    with ema.swap():
        assert not torch.equal(model.w, before)
    assert torch.equal(model.w, before)
    assert ema.gather()["w"].equal(got)


def test_frozen_integer_bool_and_float8_pass_through() -> None:
    """They are not averaged, and are there when gathered; a trainable float8 weight is refused by
    name.
    """
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2))
    model.q = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    model.i = nn.Parameter(torch.arange(3), requires_grad=False)
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("cache", torch.ones(1), persistent=False)
    model.empty = nn.Parameter(torch.empty(0, 3))
    ema = EMA(model, 0.5)
    assert ema.names() == ["w", "empty"]
    full = ema.gather()
    assert full.keys() == model.state_dict().keys()
    model.load_state_dict(full, strict=True)
    model.q.requires_grad_(True)
    with pytest.raises(ValueError, match="q: float8 cannot be averaged"):
        EMA(model, 0.5)
    assert EMA(model, 0.5, only="^w$").names() == ["w"]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(2, 3, device="meta"), "meta device"),
        (torch.ones(3).expand(2, 3), "not dense"),
        (torch.ones(4, 6)[:, ::2], "not dense"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_name(tensor: torch.Tensor, words: str) -> None:
    model = nn.Module()
    model.odd = nn.Parameter(tensor)
    with pytest.raises(ValueError, match=f"odd .*{words}"):
        EMA(model, 0.5)


@pytest.mark.parametrize("only", ["lora_", lambda name: False])
def test_nothing_matches(only: Any) -> None:
    with pytest.raises(ValueError, match=r"in Linear\. Are all frozen, or does only=.* match no"):
        EMA(nn.Linear(2, 2), 0.5, only=only)
    with pytest.raises(ValueError, match=r"floating-point weights in Linear\. Are all frozen\?$"):
        EMA(nn.Linear(2, 2).requires_grad_(False), 0.5)


def test_arguments() -> None:
    for options, words in [
        ({"decay": 1.5}, "decay must be in"),
        ({"decay": "0.99"}, "a float or a schedule .* got '0.99'"),
        ({"timeout": -3}, "timeout must be a positive number of seconds, got -3"),
        ({"timeout": "1"}, "timeout must be a positive number of seconds, got '1'"),
        ({"timeout": True}, "timeout must be a positive number of seconds, got True"),
        ({"timeout": 1e10}, "timeout must be a positive number of seconds, got 10000000000.0"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"buffers": "keep"}, "buffers must be"),
        ({"device": "meta"}, "device must be None or a device that is here, .* got 'meta'"),
    ]:
        with pytest.raises(ValueError, match=words):
            EMA(nn.Linear(2, 2), **options)
    ema = EMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="timeout must be"):
        ema.timeout = 0
    assert ema.timeout == 300
    assert EMA(nn.Linear(2, 2), timeout=np.float32(3)).timeout == 3


# --- stale records --------------------------------------------------------------------------------


def test_moved_storage_is_followed() -> None:
    """`.to()` keeps the Parameter and moves its storage. Guards the comparison of addresses."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.set_(torch.zeros(2, 2))
    ema.update()
    kept = ema.gather()["weight"].clone()
    with torch.no_grad():
        model.weight.set_(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="no update came"), ema.swap():
        assert torch.equal(model.weight, kept)
    assert (model.weight == 1).all()
    ema.weights.clock.updates = 100  # the look every 100th
    with torch.no_grad():
        model.weight.set_(torch.full((2, 2), 5.0))
    ema.update()
    assert torch.allclose(ema.gather()["weight"], 0.5 * kept + 2.5)


def test_replaced_weights_raise_by_name() -> None:
    """load_state_dict(assign=True) registers other Parameters: the optimizer does not move those
    either.
    """
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="weight, bias no longer shares memory"):
        ema.gather()
    other = nn.Linear(2, 2)
    ema = EMA(other, 0.5)
    other.to(torch.float64)
    with pytest.raises(RuntimeError, match=r"weight was torch.float32 .* is now torch.float64"):
        ema.update()
    images = Images()
    ema = EMA(images, 0.5)
    images.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"a.weight was .* lies in another order"):
        ema.update()


def test_caches_may_become_any_size() -> None:
    """A buffer that no state_dict holds (a table of positions) is the module's own: followed, lent
    by nobody, given back as it was.
    """

    def assign(*sizes: int) -> torch.Tensor:
        model.register_buffer("table", torch.randn(sizes), persistent=False)
        return model.table.clone()

    model = nn.Linear(2, 2)
    assign(4, 2)
    ema = EMA(model, [0.5, 0.9])
    for sizes in ((8, 2), (1,), (3, 3)):
        kept = assign(*sizes)
        ema.update()
        with ema.swap(1):
            assert torch.equal(model.table, kept)
            assign(9, 9)
        assert torch.equal(model.table, kept)
        with ema.swap():
            model.table.zero_()
        assert torch.equal(model.table, kept)
    assert set(ema.gather()) == {"weight", "bias"}
    model.table = None
    ema.update()
    with ema.swap():
        assert model.table is None
    assert model.table is None
    kept = assign(2, 2)
    with ema.swap():
        model.table = None
    assert torch.equal(model.table, kept)
    model.table = None
    ema = EMA(model, 0.5)  # it was not filled yet
    with ema.swap():
        assign(3)
    assert model.table is None
    kept = assign(2, 2)
    with ema.swap():
        model.table.zero_()
    assert torch.equal(model.table, kept)


def test_newly_trainable_weights_need_rescan() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    ema = EMA(model, 0.5)
    ema.update()
    model[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"1.weight, 1.bias became trainable .* ema.rescan"):
        ema.update()
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    kept = ema.weights.averages[0].averaged[0].shadow.clone()
    ema.rescan()
    assert len(ema) == 4
    assert torch.equal(ema.weights.averages[0].averaged[0].shadow, kept)
    with torch.no_grad():
        model[1].weight.fill_(5.0)
    ema.update()
    assert (ema.gather()["1.weight"] == 4).all()


def rescan_on_ranks() -> None:
    """The new weights are cut among themselves; old shadows stay where they are."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)), find_unused_parameters=True
    )
    model.module[1].requires_grad_(False)
    ema = EMA(model, 0.5)
    model.module[1].requires_grad_(True)
    ema.rescan()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    ema.update()
    before = snapshot(model)
    want = [p.detach() - 0.5 for p in model.parameters()]
    with ema.swap():
        assert all(torch.allclose(p, w) for p, w in zip(model.parameters(), want, strict=True))
    assert same(before, snapshot(model))
    total = sum(slot.averaged_region.numel for slot in ema.weights.averages[0].averaged)
    assert abs(total - (5 * 3 + 3 + 3 * 7 + 7) / 2) <= 2


def repinned() -> None:
    """FSDP2 may pin its local tensors anew at the first forward: the same Parameter, other
    memory.
    """
    run = Training("fsdp2 offload")
    ema = EMA(run.model, 0.5)
    for p in run.model.parameters():
        if hasattr(p, "_local_tensor"):
            p._local_tensor = p._local_tensor.clone()
    with torch.no_grad():
        for p in run.model.parameters():
            (p._local_tensor if hasattr(p, "_local_tensor") else p).add_(1.0)
    first = ema.weights.averages[0].averaged[0]
    kept = first.shadow.clone()
    ema.update()
    assert torch.allclose(first.shadow, kept + 0.5)


@pytest.mark.multirank
def test_rescan_and_repinning_on_ranks() -> None:
    run_ranks(2, rescan_on_ranks)
    run_ranks(2, repinned)


def summon() -> None:
    """A write to the shards inside summon_full_params(writeback=True) is lost, so it is refused."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    run = Training("fsdp1 flat")
    ema = EMA(run.model, 0.5)
    run.train(1)
    with FSDP.summon_full_params(run.model.core):
        with raises(RuntimeError, "summon_full_params"):
            ema.update()
        with raises(RuntimeError, "summon_full_params"):
            ema.gather()
    ema.update()


@pytest.mark.multirank
def test_summon_full_params_is_refused() -> None:
    run_ranks(2, summon)
