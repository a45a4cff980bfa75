"""Caches that a module derives from its weights: `swap` drops them at both ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from dist_ema import EMA
from dist_ema.compat import timm
from tests.living import programs


class Cached(nn.Module):
    """LeViT's way: a dict that `train(True)` empties."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.cache = nn.Parameter(torch.ones(3)), {}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.w.exp()
        if "w" not in self.cache:
            self.cache["w"] = self.w.detach().exp()
        return x * self.cache["w"]


class FusedAtEval(nn.Module):
    """A fused weight, made by `eval()` and dropped by `train()`: loralib's merge."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.base.add_(self.low, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.base if self.merged else self.base + self.low)


class LeastRecent(nn.Module):
    """An own cache keyed by the input's size, emptied by `train` in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.known: dict[int, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        self.known.clear()
        return super().train(mode)

    def table(self, size: int) -> Tensor:
        if size not in self.known or self.training:
            self.known[size] = self.w.detach().exp().repeat(size, 1)
        return self.known[size]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(len(x))


class Inherited(Cached):
    """The override of `train` lies in a base class."""


class Swin(Cached):
    """Beside the cache, a mode that `train` must not lose: a norm frozen in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Merged(nn.Module):
    """As re-parametrized convolutions: `train(False)` merges, and eval reads what it merged."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3))
        self.merged: Tensor | None = None

    def train(self, mode: bool = True) -> Merged:
        self.merged = None if mode else self.weight.detach() * 2
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 2 if self.training else self.merged)


CACHES: dict[str, Callable[[], nn.Module]] = {
    "merged by train(False)": Merged,
    "dropped by train(True)": Cached,
    "keyed by size": LeastRecent,
    "inherited": Inherited,
    "beside a norm": Swin,
    "nested": lambda: nn.Sequential(nn.Identity(), nn.ModuleDict({"a": Cached()})["a"], Cached()),
}
RED_CACHES: dict[str, str] = {}


def expected(model: nn.Module, make: Callable[[], nn.Module], x: Tensor) -> Tensor:
    """What a module with these weights computes that has no cache yet."""
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()(x)


@pytest.mark.parametrize("make", programs(CACHES, RED_CACHES))
@torch.no_grad()
def test_caches_are_dropped_at_both_ends(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.rand(4, 3)
    ema = EMA(model, 0.9)
    for p in model.parameters():
        p.add_(1)
    ema.update()
    model.eval()
    live = model(x)
    modes = {name: module.training for name, module in model.named_modules()}
    for _ in range(2):
        with ema.swap():
            assert torch.allclose(model(x), expected(model, make, x)), "the block evaluates live"
        assert torch.allclose(model(x), live), "live evaluates the average"
    assert modes == {name: module.training for name, module in model.named_modules()}


@torch.no_grad()
def test_every_mode_is_restored() -> None:
    """Half in eval, half in training mode, at both ends."""
    model = nn.ModuleDict({"a": Swin(), "b": Swin(), "c": nn.Dropout()})
    ema = EMA(model, 0.9)
    ema.update()
    model.train()
    model["a"].eval()
    model["a"].norm.train()
    model["b"].norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with ema.swap():
        assert modes == {name: module.training for name, module in model.named_modules()}
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_modes_set_in_the_block_are_the_users() -> None:
    model = nn.Sequential(Cached(), nn.Dropout())
    ema = EMA(model, 0.9)
    with ema.swap():
        model.eval()
    assert not any(module.training for module in model.modules())


@torch.no_grad()
def test_weights_merged_by_eval_are_right_or_named() -> None:
    """`eval()` writes a weight: the average of merged weights, or an error, but live as it was."""
    model = FusedAtEval()
    ema = EMA(model, 0.5)
    model.base.add_(2)
    model.low.add_(4)
    ema.update()
    x = torch.ones(3)
    want = (torch.ones(3) * 2 + torch.ones(3) * 3) * x

    def evaluate() -> None:
        with ema.swap():
            model.eval()
            assert torch.allclose(model(x), want)
            model.train()

    with pytest.warns(UserWarning, match="base was written inside"):
        evaluate()
    assert model.base.tolist() == [3, 3, 3]
    assert model.low.tolist() == [5, 5, 5]
    assert torch.allclose(ema.gather()["base"], torch.full((3,), 2.0))


def plain_norm() -> nn.Module:
    return weight_norm(nn.Linear(3, 3))


def two_parametrizations() -> nn.Module:
    return spectral_norm(orthogonal(nn.Linear(3, 3))).eval()


def spectral() -> nn.Module:
    return spectral_norm(nn.Linear(3, 3)).eval()


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": plain_norm,
    "orthogonal": lambda: orthogonal(nn.Linear(3, 3)),
    "two": two_parametrizations,
    "spectral_norm": spectral,
}
RED_PARAMETRIZED: dict[str, str] = {}


@pytest.mark.parametrize("make", programs(PARAMETRIZED, RED_PARAMETRIZED))
@torch.no_grad()
def test_parametrize_cached_sees_the_swap(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3)
    ema = EMA(model, 0.9)
    for p in model.parameters():
        p.add_(torch.rand_like(p))
    ema.update()
    live = model(x)
    with ema.swap():
        average = model(x)
    assert not torch.allclose(live, average)
    with parametrize.cached():
        assert torch.allclose(model(x), live)
        with ema.swap():
            assert torch.allclose(model(x), average), "the cached weight is live's"
        assert torch.allclose(model(x), live), "the cached weight is the average's"


@torch.no_grad()
def test_a_cache_opened_inside_the_block() -> None:
    model, x = plain_norm(), torch.randn(2, 3)
    ema = EMA(model, 0.9)
    for p in model.parameters():
        p.add_(torch.rand_like(p))
    ema.update()
    live = model(x)
    with parametrize.cached():
        with ema.swap():
            model(x)
        assert torch.allclose(model(x), live)


@torch.no_grad()
def test_autocast_caches_see_the_swap() -> None:
    """The casted weight of an autocast region that surrounds the block."""
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    ema = EMA(model, 0.9)
    model.weight.add_(1)
    ema.update()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        live = model(x)
        with ema.swap():
            inside = model(x)
        assert not torch.equal(inside, live)
        assert torch.equal(model(x), live)


def drop_in_timm(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    average = timm.ModelEmaV3(model, decay=0.5)
    return average.module, lambda: average.update(model)


def teacher(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    module = Cached()
    module.load_state_dict(model.state_dict())
    ema = EMA(model, 0.5, into=module)
    return module, ema.update


COPIES: dict[str, Any] = {"compat.timm": drop_in_timm, "into=": teacher}
RED_COPIES: dict[str, str] = {}


@pytest.mark.parametrize("build", programs(COPIES, RED_COPIES))
@torch.no_grad()
def test_a_copy_in_eval_mode_is_never_stale(build: Any) -> None:
    """The averaged module stays in eval mode for ever, so nobody else would drop its cache."""
    model, x = Cached(), torch.ones(3)
    module, update = build(model)
    module.eval()
    module(x)
    for _ in range(3):
        model.w.add_(1)
        update()
        want = module.state_dict()["w"].exp() * x
        assert torch.allclose(module(x), want)
