"""Errors say what is there and what to do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import EMA
from tests.living import programs

COPIES: dict[str, Any] = {"deepcopy": copy.deepcopy, "pickle": pickle.dumps}
RED_EMA: dict[str, str] = {}
RED_OWNER: dict[str, str] = {}


class Owner(nn.Linear):
    """What a LightningModule is: a module with an EMA as an attribute."""


def test_a_resized_embedding_is_called_resized() -> None:
    """Tokens added: the shapes, and `rescan`; not a device."""
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4)})
    ema = EMA(model, 0.5)
    model["emb"].weight.data = torch.randn(9, 4)
    with pytest.raises(RuntimeError, match=r"emb\.weight") as caught:
        ema.update()
    message = str(caught.value)
    assert "5, 4" in message
    assert "9, 4" in message
    assert "model.to(" not in message


def test_weights_without_elements_are_refused() -> None:
    """What partitions weights may leave nothing of them, as ZeRO stage 3 does."""
    model = nn.ParameterDict({"a": torch.empty(0, 2), "b": torch.empty(0)})
    with pytest.raises(ValueError, match=r"^a, b hold no elements on any rank"):
        EMA(model, 0.5)


def test_a_tie_is_called_a_tie() -> None:
    """Two weights that become one, and one that becomes two: another cure than a replaced one."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    model["c"].weight = model["a"].weight
    ema = EMA(model, 0.5)
    model["b"].weight = model["a"].weight
    model["c"].weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"^b\.weight, c\.weight is tied otherwise than when"):
        ema.gather()


@pytest.mark.parametrize("make", programs(COPIES, RED_EMA))
def test_copies_of_an_ema_say_what_to_do(make: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    with pytest.raises((TypeError, RuntimeError, pickle.PicklingError), match="EMA") as caught:
        make(ema)
    assert "WeakMethod" not in str(caught.value)


@pytest.mark.parametrize("make", programs(COPIES, RED_OWNER))
def test_copies_of_a_module_that_owns_an_ema_say_what_to_do(make: Any) -> None:
    model = Owner(2, 2)
    model.ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.ema.attach(optimizer)
    with pytest.raises((TypeError, RuntimeError, pickle.PicklingError), match="EMA") as caught:
        make(model)
    assert "WeakMethod" not in str(caught.value)


def test_a_complex_weight_of_16_bytes_is_averaged_or_named() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    try:
        ema = EMA(model, 0.5)
    except ValueError as error:
        assert "w" in str(error)
        assert "complex128" in str(error)
        return
    with torch.no_grad():
        model.w.add_(2j)
    ema.update()
    assert torch.allclose(
        ema.gather()["w"].to(torch.complex128), torch.tensor(1 + 1j).to(torch.complex128)
    )
