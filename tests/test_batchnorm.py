"""Precise BN: population statistics against float64 over the concatenated data.

How to read a failure: `expected` is the oracle. The model is linear up to each norm but for the
norms themselves, so the input of the second norm is rebuilt batch by batch in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from dist_ema import EMA, load_file
from dist_ema.recipes.batchnorm import recalibrate

from ._ranks import raises, run_ranks


class Net(nn.Module):
    """Two norms of one kind around a pointwise layer, dropout behind them, and a norm that keeps no
    statistics.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.mix, self.second = norm(3), nn.Linear(3, 5), norm(5)
        self.plain, self.drop = nn.BatchNorm1d(5, track_running_stats=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.mix(self.first(x).movedim(1, -1)).movedim(-1, 1))
        return self.drop(self.plain(x.flatten(2).sum(2) if x.dim() > 2 else x))


KINDS = [
    (nn.BatchNorm1d, ()), (nn.BatchNorm1d, (4,)), (nn.BatchNorm2d, (4, 2)),
    (nn.BatchNorm3d, (2, 2, 3)), (nn.SyncBatchNorm, (4, 2)),
]  # fmt: skip
SIZES = [[9, 4, 6], [5], [7, 3]]  # batches of each rank: unequal numbers and sizes


def batches(rank: int, shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [
        3 + 2 * rank + i + torch.randn(n, 3, *shape, generator=generator)
        for i, n in enumerate(SIZES[rank])
    ]


def expected(model: Net, data: list[Tensor]) -> dict[str, Tensor]:
    """Of all batches together, in float64; each batch is normalised by itself on its way to the
    second norm.
    """

    def flat(x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(1)

    seen: dict[str, list[Tensor]] = {"first": [], "second": []}
    for x in data:
        wide = flat(x.double())
        seen["first"].append(wide)
        mean, var = wide.mean(1, keepdim=True), wide.var(1, correction=0, keepdim=True)
        first, mix = model.first, model.mix
        full = {
            name: p.full_tensor() if hasattr(p, "full_tensor") else p
            for name, p in model.named_parameters()
        }
        normal = (wide - mean) / (var + first.eps).sqrt()
        normal = (
            normal * full["first.weight"].double()[:, None] + full["first.bias"].double()[:, None]
        )
        seen["second"].append(
            full["mix.weight"].double() @ normal + full["mix.bias"].double()[:, None]
        )
        assert mix.bias is not None
    result = {}
    for name, parts in seen.items():
        whole = torch.cat(parts, 1)
        result |= {f"{name}.running_mean": whole.mean(1), f"{name}.running_var": whole.var(1)}
    return {name: value.detach() for name, value in result.items()}


def close(model: nn.Module, oracle: dict[str, Tensor]) -> None:
    found = dict(model.named_buffers())
    for name, value in oracle.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=2e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def state(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()} | {
        f"mode of {name}": module.training for name, module in model.named_modules()
    }


def same_but_statistics(model: nn.Module, before: dict[str, Any]) -> None:
    for name, value in state(model).items():
        if not name.endswith(("running_mean", "running_var")):
            assert (
                torch.equal(value, before[name])
                if isinstance(value, Tensor)
                else value == before[name]
            ), name


@pytest.mark.parametrize(("norm", "shape"), KINDS)
def test_one_process(norm: Any, shape: tuple[int, ...]) -> None:
    """Equals float64 over all data; nothing else changes.

    Guards the correction for the means in _Moments.add.
    """
    model = Net(norm)
    model.second.eval()  # modes are restored one by one
    before = state(model)
    data = batches(0, shape)
    assert recalibrate(model, [(x, "label") for x in data]) == 3
    close(model, expected(model, data))
    same_but_statistics(model, before)


def test_one_batch_is_momentum_one() -> None:
    """The convention is BatchNorm's own: over one batch the result is what momentum=1 would
    keep.
    """
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=1.0)
    x = 5 + torch.randn(6, 3, 4, 4)
    recalibrate(ours, [x])
    theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=0)
    assert ours.num_batches_tracked == 0


def test_num_batches_forward_and_mappings() -> None:
    model, data = Net(nn.BatchNorm1d), batches(0, ())
    assert recalibrate(model, iter(data), num_batches=2) == 2
    close(model, expected(model, data[:2]))
    assert recalibrate(model, ({"x": x} for x in data)) == 3
    close(model, expected(model, data))
    assert recalibrate(model, data, forward=lambda inner, x: inner(x + 1)) == 3
    one = nn.Sequential(nn.BatchNorm1d(3))
    recalibrate(one, data, forward=lambda inner, x: inner[0](input=x))
    torch.testing.assert_close(one[0].running_mean, torch.cat(data).mean(0))
    close(model, expected(model, [x + 1 for x in data]))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(24.0).view(8, 3))


def test_progress_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal too, a DataLoader of an iterable dataset is fine: it has `__len__`, which
    raises.
    """
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    model = nn.BatchNorm1d(3)
    assert recalibrate(model, DataLoader(Stream(), batch_size=4)) == 2
    torch.testing.assert_close(model.running_mean, torch.tensor([10.5, 11.5, 12.5]))


class Poison(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.bad, self.aside = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bad(self.fine(x) / 0)


def fails() -> Iterator[Tensor]:
    yield torch.randn(4, 3)
    raise KeyError("the disk is gone")


@pytest.mark.parametrize(
    ("model", "loader", "error", "words"),
    [
        (nn.Linear(3, 3), [torch.randn(4, 3)], ValueError, "no BatchNorm"),
        (Net(nn.BatchNorm1d), [], ValueError, "saw no data"),
        (
            nn.Sequential(nn.BatchNorm1d(3)),
            [torch.randn(1, 3)],
            ValueError,
            "^0 saw one value per channel",
        ),
        (Poison(), [torch.randn(4, 3)], ValueError, "bad saw NaN or infinity"),
        (
            nn.Sequential(nn.BatchNorm1d(3)),
            [1e25 * torch.randn(4, 3)],
            ValueError,
            "^0 saw .* beyond float32",
        ),
        (
            nn.Sequential(nn.BatchNorm1d(3)).half(),
            [1e3 * torch.randn(4, 3).half()],
            ValueError,
            "^0 saw .* beyond float16",
        ),
        (nn.BatchNorm1d(3), [torch.full((4, 3), torch.nan)], ValueError, "^BatchNorm1d saw NaN"),
        (Net(nn.BatchNorm1d), fails(), KeyError, "the disk is gone"),
        (Net(nn.BatchNorm1d), [torch.randn(4, 2)], RuntimeError, "size"),
    ],
)
def test_refuses(model: nn.Module, loader: Any, error: type[Exception], words: str) -> None:
    """Whatever raises: statistics, modes and hooks are as before."""
    before = state(model)
    with pytest.raises(error, match=words):
        recalibrate(model, loader)
    after = state(model)
    assert all(
        torch.equal(after[n], v) if isinstance(v, Tensor) else after[n] == v
        for n, v in before.items()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_graph_and_empty_batches() -> None:
    """Autograd is off, so that batches do not pile up; a batch without images is one that adds
    nothing.
    """
    model, data, grads = nn.Sequential(nn.BatchNorm1d(3)), batches(0, ()), []
    with torch.no_grad():
        model[0].running_var.fill_(7.0)

    def look(inner: nn.Module, x: Tensor) -> None:
        y = inner(x)
        grads.append(y.requires_grad)

    assert recalibrate(model, [data[0], torch.empty(0, 3), data[1]], forward=look) == 3
    assert grads == [False] * 3
    torch.testing.assert_close(model[0].running_var, torch.cat(data[:2]).var(0))
    with pytest.raises(ValueError, match="saw no data"):
        recalibrate(model, [torch.empty(0, 3)])


@pytest.mark.parametrize("number", [0, -1, 2.5, math.inf, math.nan, "5", None])
def test_num_batches_must_be_a_positive_number(number: Any) -> None:
    with pytest.raises(ValueError, match=f"a whole number, at least 1, got {number!r}"):
        recalibrate(Net(nn.BatchNorm1d), [torch.randn(4, 3)], num_batches=number)


def test_a_layer_aside_is_named() -> None:
    model = Poison()
    model.aside.running_mean.fill_(7.0)
    model.forward = model.fine.forward  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="bad, aside was not reached"):
        recalibrate(model, [torch.randn(4, 3)], forward=lambda inner, x: inner.fine(x))
    assert (model.aside.running_mean == 7.0).all()


def test_compiled() -> None:
    """A graph that was compiled before has no hooks, so the eager code runs.

    Guards the stance, and `bare`.
    """
    data = batches(0, (4, 2))
    for in_place in (True, False):
        model = Net(nn.BatchNorm2d)
        compiled: Any = model
        if in_place:
            model.compile(backend="eager")
        else:
            compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled.eval()(data[0])
        recalibrate(compiled, data)
        close(model, expected(model, data))


def test_the_average_keeps_them(tmp_path: Path) -> None:
    """Inside swap: live has its own back, the next swap and the export have the recalibrated ones,
    to the bit.
    """
    model, data = Net(nn.BatchNorm2d), batches(0, (4, 2))
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    ema.update()
    live = state(model)
    with ema.swap():
        recalibrate(model, data)
        model.eval()
        close(model, expected(model, data))
        answer = model(data[0])
        model.train()
    after = state(model)
    assert all(torch.equal(after[n], v) for n, v in live.items() if isinstance(v, Tensor))
    ema.export(tmp_path / "out")
    model.load_state_dict(load_file(tmp_path / "out"), strict=True)
    assert torch.equal(model.eval()(data[0]), answer)


def on_ranks() -> None:
    """DDP, FSDP1 and FSDP2 with unequal data, inside and outside swap; SyncBatchNorm sends
    nothing.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    for norm, shape in KINDS:
        everything = [x for each in range(world) for x in batches(each, shape)]
        for wrap in ("ddp", "fsdp1", "fsdp2"):
            torch.manual_seed(0)
            model = Net(norm)
            if wrap == "ddp" and norm is nn.SyncBatchNorm:
                continue  # DDP refuses it on a CPU
            inner: Any = model
            if wrap == "fsdp2":
                wrapped: Any = fully_shard(model)
            else:
                kind: Any = DistributedDataParallel if wrap == "ddp" else FullyShardedDataParallel
                wrapped = (
                    kind(model) if wrap == "ddp" else kind(model, device_id=torch.device("cpu"))
                )
                inner = wrapped.module
            oracle = _oracle_of(norm, everything)
            assert recalibrate(wrapped, batches(rank, shape)) == len(SIZES[rank])
            close(inner, oracle)
            if wrap != "fsdp1":
                ema = EMA(wrapped, decay=0.5)
                kept = {name: buffer.clone() for name, buffer in inner.named_buffers()}
                with ema.swap():
                    recalibrate(wrapped, [x + 1 for x in batches(rank, shape)])
                    close(inner, _oracle_of(norm, [x + 1 for x in everything]))
                assert all(
                    torch.equal(buffer, kept[name]) for name, buffer in inner.named_buffers()
                )
    model = Net(nn.BatchNorm1d)
    verb = ["recalibrate(...) failed on rank 0"] if rank else []
    with raises(RuntimeError if rank else ZeroDivisionError, "division by zero", *verb):
        recalibrate(DistributedDataParallel(model), (1 / rank * x for x in batches(rank, ())))
    first = dist.new_group([0])
    plain = Net(nn.BatchNorm1d)
    with raises(ValueError, "a process group that holds this rank") if rank else nullcontext():
        recalibrate(plain, batches(rank, ()), group=first)
    with raises(ValueError, "at least one batch on every rank"):
        recalibrate(fully_shard(Net(nn.BatchNorm1d)), batches(rank, ()) if rank else [])
    # A rank whose loader fails must not leave the others in a forward that it never joins.
    with raises(RuntimeError if rank else KeyError, "the disk is gone"):
        recalibrate(fully_shard(Net(nn.BatchNorm1d)), batches(rank, ()) if rank else fails())


def _oracle_of(norm: Any, data: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return expected(Net(norm), data)


@pytest.mark.multirank
@pytest.mark.parametrize("world", [2, 3])
def test_on_ranks(world: int) -> None:
    run_ranks(world, on_ranks)
