"""FixRes: exactly the named weights move, and undo leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema import EMA
from dist_ema.recipes.fixres import freeze_for_resolution

from ._ranks import run_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.body(x)).mean((2, 3)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        model.train()
        model(torch.randn(8, 1, 12, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_moves() -> None:
    """The classifier, and the last norm with its statistics, although the loop calls
    model.train().
    """
    model = Net()
    model.body[3].eval()
    modes = {module: module.training for module in model.modules()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    frozen = freeze_for_resolution(model, classifier="head", norm="last.1")
    assert frozen.names == ["last.1.weight", "last.1.bias", "head.weight", "head.bias"]
    before = snapshot(model)
    train(model, torch.optim.SGD(frozen.parameters(), lr=0.1, weight_decay=0.1))
    statistics = {"last.1.running_mean", "last.1.running_var", "last.1.num_batches_tracked"}
    assert changed(model, before) == set(frozen.names) | statistics
    frozen.undo()
    frozen.undo()
    assert {module: module.training for module in model.modules()} == modes
    assert {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    } == required
    assert not model._forward_pre_hooks


def test_classifier_alone_with_an_average() -> None:
    """Without norm= no statistics move either; an EMA built then averages what is trained."""
    model = Net()
    with freeze_for_resolution(model, classifier="head") as frozen:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        ema = EMA(model, decay=0.5)
        ema.attach(optimizer)
        assert ema.names() == ["head.weight", "head.bias"] == frozen.names
        before = snapshot(model)
        train(model, optimizer)
        assert changed(model, before) == set(frozen.names)
        with ema.swap():
            assert changed(model, before) == set(frozen.names)
    assert model.body[1].weight.requires_grad


def test_a_second_name() -> None:
    """A module that is registered twice is known by both names."""
    model = Net()
    model.classifier = model.head
    assert all(
        name.startswith("head.")
        for name in freeze_for_resolution(model, classifier="classifier").names
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            {"classifier": "fc"},
            "classifier='fc' is no module of the model; the last ones with weights: .*head",
        ),
        ({"classifier": ""}, "classifier='' is no module"),
        ({"classifier": "head", "norm": "body.2"}, "norm='body.2' is a ReLU without parameters"),
    ],
)
def test_refuses(names: Any, words: str) -> None:
    """A wrong name changes nothing."""
    model = Net()
    with pytest.raises(ValueError, match=words):
        freeze_for_resolution(model, **names)
    assert model.head.weight.requires_grad
    assert model.body.training


def on_ranks() -> None:
    """Frozen before DDP, which takes what still needs a gradient, and after; compiled too.

    Names are without wrappers.
    """
    statistics = {"last.1.running_mean", "last.1.running_var", "last.1.num_batches_tracked"}
    for frozen_first in (True, False):
        for compiled in (False, True):
            torch.manual_seed(0)
            model = Net()
            wrapped: Any = model
            if frozen_first:
                frozen = freeze_for_resolution(model, classifier="head", norm="last.1")
            wrapped = torch.compile(model, backend="eager") if compiled else model
            wrapped = DistributedDataParallel(wrapped, find_unused_parameters=not frozen_first)
            if not frozen_first:
                frozen = freeze_for_resolution(wrapped, classifier="head", norm="last.1")
            assert frozen.names == ["last.1.weight", "last.1.bias", "head.weight", "head.bias"]
            before = snapshot(model)
            train(wrapped, torch.optim.SGD(frozen.parameters(), lr=0.1, weight_decay=0.1))
            assert changed(model, before) == set(frozen.names) | statistics, (
                frozen_first,
                compiled,
            )


@pytest.mark.multirank
def test_on_ranks() -> None:
    run_ranks(2, on_ranks)
