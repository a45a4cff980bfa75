"""Tensor subclasses, and weights that hold nothing here: carried by name, averaged inside, or
refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from dist_ema import EMA, load_file
from dist_ema.sharding import discovery
from tests._ranks import run_ranks
from tests.living import programs


class Wrapped(Tensor):
    """A subclass by dispatch around inner tensors, as quantized and float8 weights are."""

    inner_names: tuple[str, ...] = ()

    @staticmethod
    def __new__(cls, *inner: Tensor, shape: Any = None, dtype: Any = None) -> Any:
        first = inner[0]
        return Tensor._make_wrapper_subclass(
            cls,
            first.shape if shape is None else shape,
            dtype=dtype or first.dtype,
            device=first.device,
            requires_grad=False,
        )

    def __init__(self, *inner: Tensor, shape: Any = None, dtype: Any = None) -> None:
        for name, value in zip(self.inner_names, inner, strict=True):
            setattr(self, name, value)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.inner_names), (self.shape, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return cls(*(inner[name] for name in cls.inner_names), shape=meta[0], dtype=meta[1])

    def plain(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            source = args[0]
            names = source.inner_names
            return cls(
                *(getattr(source, name) for name in names), shape=source.shape, dtype=source.dtype
            )
        if func.overloadpacket in (torch.ops.aten.add_, torch.ops.aten.copy_, torch.ops.aten.lerp_):
            cls.write(func, args, kwargs)
            return args[0]
        args, kwargs = tree_map(
            lambda x: x.plain() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    @classmethod
    def write(cls, func: Any, args: Any, kwargs: Any) -> None:
        raise RuntimeError(f"{cls.__name__} is not written")


class Int8(Wrapped):
    """Frozen base weights: integers and a scale for each row."""

    inner_names = ("ints", "scale")

    def plain(self) -> Tensor:
        return self.ints.to(self.dtype) * self.scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        ints = (weight / scale).round().to(torch.int8)
        return cls(ints, scale, shape=weight.shape, dtype=weight.dtype)


class Single(Wrapped):
    """A weight that only chooses another all-gather: one inner tensor of the same shape and
    dtype.
    """

    inner_names = ("data_",)

    def plain(self) -> Tensor:
        return self.data_

    @classmethod
    def write(cls, func: Any, args: Any, kwargs: Any) -> None:
        inner = tree_map(lambda x: x.plain() if isinstance(x, cls) else x, args)
        func(*inner, **(kwargs or {}))


class Narrow(Wrapped):
    """One inner tensor of another dtype: averaging it would be another average."""

    inner_names = ("half",)

    def plain(self) -> Tensor:
        return self.half.to(self.dtype)

    @classmethod
    def of(cls, weight: Tensor) -> Narrow:
        return cls(weight.bfloat16(), shape=weight.shape, dtype=weight.dtype)


def lora_over(quantize: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"base": nn.Linear(4, 4), "lora": nn.Linear(4, 2)})
    weight = quantize(model["base"].weight.detach())
    model["base"].weight = nn.Parameter(weight, requires_grad=False)
    model["base"].bias.requires_grad_(False)
    return model


def inside(weight: Any) -> list[Tensor]:
    """Copies of the inner tensors."""
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name).clone() for name in names]


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "only lora": {"only": "lora"},
    "buffers averaged": {"buffers": "average"},
    "host": {"device": "cpu"},
}
BASES: dict[str, Any] = {
    "int8": Int8.of,
    "two tensors": lambda weight: TwoTensor(weight, weight * 2),
    "half": Narrow.of,
}
FROZEN = {f"{base}, {title}": (BASES[base], OPTIONS[title]) for base in BASES for title in OPTIONS}
RED_FROZEN: dict[str, str] = {}


@pytest.mark.parametrize("case", programs(FROZEN, RED_FROZEN))
def test_a_frozen_subclass_is_carried_by_name(case: Any) -> None:
    """The adapters are averaged, and the quantized base is never read as memory."""
    quantize, options = case
    model = lora_over(quantize)
    ema = EMA(model, 0.5, **options)
    kept = inside(model["base"].weight)
    old = model["lora"].weight.detach().clone()
    with torch.no_grad():
        model["lora"].weight.add_(2)
    ema.update()
    assert torch.allclose(ema.gather()["lora.weight"], old + 1)
    with ema.swap():
        assert torch.allclose(model["lora"].weight, old + 1)
        assert all(map(torch.equal, inside(model["base"].weight), kept))
    assert all(map(torch.equal, inside(model["base"].weight), kept))


def test_a_frozen_subclass_is_left_out_of_files_with_a_warning(tmp_path: Path) -> None:
    model = lora_over(Int8.of)
    ema = EMA(model, 0.5)
    for verb in (ema.save, ema.export):
        with pytest.warns(UserWarning, match=r"base\.weight"):
            verb(tmp_path / verb.__name__)
        file = load_file(tmp_path / verb.__name__)
        assert {"lora.weight", "lora.bias", "base.bias"} <= file.keys()
        assert "base.weight" not in file or file["base.weight"].is_floating_point()


def test_a_file_of_adapters_needs_no_warning(tmp_path: Path) -> None:
    ema = EMA(lora_over(Int8.of), 0.5, only="lora")
    ema.export(tmp_path / "out")
    assert "lora.weight" in load_file(tmp_path / "out")


def test_a_subclass_around_one_tensor_is_averaged_inside() -> None:
    model = nn.Module()
    model.w = nn.Parameter(Single(torch.ones(3)))
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.w.detach().data_.add_(2)
    ema.update()
    assert ema.gather()["w"].tolist() == [2, 2, 2]
    with ema.swap():
        assert model.w.detach().data_.tolist() == [2, 2, 2]
    assert model.w.detach().data_.tolist() == [3, 3, 3]


def test_a_record_of_a_frozen_subclass_holds_nothing() -> None:
    """No verb can take the wrapper's storage for memory."""
    found = discovery.find_shards(lora_over(Int8.of)).shards
    (opaque,) = [shard for shard in found if shard.opaque]
    assert (opaque.name, opaque.shape, opaque.persistent) == ("base.weight", (4, 4), False)
    assert opaque.read().numel() == opaque.local_region.numel == 0
    EMA(nn.ParameterList(lora_over(Int8.of).parameters()), 0.5).update()
    listed = EMA(list(lora_over(Int8.of).named_parameters()), 0.5)
    listed.update()
    assert "base.weight" not in listed.names()


def test_a_subclass_in_a_subclass() -> None:
    model = nn.Module()
    model.w = nn.Parameter(Single(Single(torch.ones(3))))
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.w.detach().data_.data_.add_(2)
    ema.update()
    with ema.swap():
        assert model.w.detach().data_.data_.tolist() == [2, 2, 2]


def sharded_subclass() -> None:
    """torchtitan's float8 recipe: FSDP2 shards a wrapper, and the elements lie inside its shard."""
    mesh = dist.init_device_mesh("cpu", (2,))
    local = Single(torch.full((2, 3), float(dist.get_rank())))
    weight: Any = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    model = nn.Module()
    model.w = nn.Parameter(weight)
    ema = EMA(model, 0.5)
    for _ in range(3):  # the third update compares addresses only
        with torch.no_grad():
            local.data_.add_(2)
        ema.update()
    full = ema.gather()
    if full:
        assert full["w"].tolist() == [[4.25] * 3] * 2 + [[5.25] * 3] * 2
    with ema.swap():
        assert (local.data_ == 4.25 + dist.get_rank()).all()
    assert (local.data_ == 6 + dist.get_rank()).all()


@pytest.mark.multirank
def test_a_sharded_subclass() -> None:
    run_ranks(2, sharded_subclass)


def two_tensors() -> Any:
    return TwoTensor(torch.ones(3), torch.ones(3) * 5)


def other_dtype() -> Any:
    return Narrow.of(torch.ones(3))


def trained_int8() -> Any:
    return Int8.of(torch.ones(3, 3))


class Unexplained(Tensor):
    """No `__tensor_flatten__`: a storage that means nothing by itself."""

    @staticmethod
    def __new__(cls) -> Any:
        return Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls()
        raise RuntimeError(f"{func} is not for Unexplained")


REFUSED: dict[str, Any] = {
    "two inner tensors": two_tensors,
    "another dtype inside": other_dtype,
    "int8 and a scale": trained_int8,
    "nothing inside": Unexplained,
}
RED_REFUSED: dict[str, str] = {}


@pytest.mark.parametrize("make", programs(REFUSED, RED_REFUSED))
def test_other_trained_subclasses_are_refused_by_name(make: Any) -> None:
    model = nn.Module()
    model.plain, model.w = nn.Parameter(torch.ones(2)), nn.Parameter(make())
    with pytest.raises(ValueError, match=r"\bw\b"):
        EMA(model, 0.5)


def test_a_refused_subclass_left_out_by_only() -> None:
    model = nn.Module()
    model.plain, model.w = nn.Parameter(torch.ones(2)), nn.Parameter(two_tensors())
    ema = EMA(model, 0.5, only="plain")
    ema.update()
    with ema.swap():
        assert model.w.detach().b.tolist() == [5, 5, 5]
    assert model.w.detach().a.tolist() == [1, 1, 1]
    assert model.w.detach().b.tolist() == [5, 5, 5]


class Marked(nn.Parameter):
    """A Parameter subclass without dispatch is memory like any other (vLLM's, diffusers' GGUF)."""


def test_a_subclass_without_dispatch_is_plain_memory() -> None:
    model = nn.Module()
    model.w = Marked(torch.ones(3))
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.w.add_(2)
    ema.update()
    assert ema.gather()["w"].tolist() == [2, 2, 2]
    with ema.swap():
        assert model.w.tolist() == [2, 2, 2]
    assert model.w.tolist() == [3, 3, 3]


STRANGE: dict[str, Any] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "compressed rows": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|quantized tensor)")
@pytest.mark.parametrize("make", programs(STRANGE, {}))
def test_a_buffer_that_is_no_strided_memory_is_carried_by_name(tmp_path: Path, make: Any) -> None:
    """A graph's adjacency, a quantized table: neither read nor written, and named at export."""
    model = nn.Linear(2, 2)
    model.register_buffer("table", make())
    ema = EMA(model, 0.5)
    with torch.no_grad():
        old = model.weight.detach().clone()
        model.weight.add_(2)
    ema.update()
    with ema.swap():
        assert torch.allclose(model.weight, old + 1)
    assert sorted(ema.gather()) == ["bias", "weight"]
    with pytest.warns(UserWarning, match=r"table of the state_dict"):
        ema.export(tmp_path / "export")


def test_a_trained_sparse_weight_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("table", nn.Parameter(torch.eye(4).to_sparse()))
    with pytest.raises(ValueError, match="table is sparse"):
        EMA(model, 0.5)


# --- weights that hold nothing here ---------------------------------------------------------------


def zero3(attribute: str) -> nn.Module:
    """What DeepSpeed's stage 3 leaves of a parameter: an empty tensor, and where the rest is."""
    model = nn.Linear(4, 4)
    for p in model.parameters():
        setattr(p, attribute, 7 if attribute == "ds_id" else p.detach().clone())
        p.data = torch.empty(0)
    return model


PARTITIONED = {"ds_id": "ds_id", "ds_tensor": "ds_tensor"}
RED_PARTITIONED: dict[str, str] = {}


@pytest.mark.parametrize("attribute", programs(PARTITIONED, RED_PARTITIONED))
def test_partitioned_parameters_are_refused_by_name(attribute: str) -> None:
    with pytest.raises(ValueError, match="weight is partitioned by DeepSpeed"):
        EMA(zero3(attribute), 0.5)


def test_a_model_whose_trained_weights_hold_nothing_is_refused() -> None:
    """Without DeepSpeed's marks: another library's way to partition."""
    model = nn.Linear(4, 4)
    for p in model.parameters():
        p.data = torch.empty(0)
    with pytest.raises(ValueError, match="weight"):
        EMA(model, 0.5)


def test_partitioned_later_is_named() -> None:
    """`deepspeed.initialize` after the EMA was built."""
    model = nn.Linear(4, 4)
    ema = EMA(model, 0.5)
    ema.update()
    for p in model.parameters():
        p.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="weight"):
        ema.update()
