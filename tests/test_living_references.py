"""No weak reference to a Parameter is kept: torch's `swap_tensors` refuses a tensor that has one.

`module.to` of a sharded model goes through it, so one reference makes `model.cpu()` raise for the
life of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import EMA
from dist_ema.compat import diffusers, ema_pytorch, swa_utils, timm, torch_ema
from tests.living import programs, random_step


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[2].requires_grad_(False)
    return model


def references(*models: nn.Module) -> int:
    tensors = [p for model in models for p in [*model.parameters(), *model.buffers()]]
    return sum(weakref.getweakrefcount(tensor) for tensor in tensors)


def construction(model: nn.Module) -> EMA:
    return EMA(model, 0.5)


def attached(model: nn.Module) -> EMA:
    ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema.attach(optimizer)
    random_step(optimizer)
    return ema


def swapped(model: nn.Module) -> EMA:
    ema = attached(model)
    with ema.swap():
        assert references(model) == 0
    return ema


def gathered(model: nn.Module) -> EMA:
    ema = attached(model)
    ema.gather()
    ema.metrics()
    ema.state_dict()
    return ema


def rescanned(model: nn.Module) -> EMA:
    ema = attached(model)
    ema.detach()
    model[2].requires_grad_(True)
    ema.rescan()
    return ema


def several(model: nn.Module) -> list[EMA]:
    return [
        EMA(model, [0.5, 0.9]),
        EMA(model, 0.9, device="cpu"),
        EMA(model, 0.5, buffers="average"),
    ]


def listed(model: nn.Module) -> EMA:
    return EMA(model.named_parameters(), 0.5)


def nameless(model: nn.Module) -> EMA:
    return EMA(model.parameters(), 0.5)


PROGRAMS: dict[str, Callable[[nn.Module], Any]] = {
    "construction": construction,
    "attach": attached,
    "swap": swapped,
    "gather": gathered,
    "rescan": rescanned,
    "several": several,
    "named list": listed,
    "list": nameless,
    "compat.timm": lambda model: timm.ModelEmaV3(model),
    "compat.swa_utils": lambda model: swa_utils.AveragedModel(model),
    "compat.torch_ema": lambda model: torch_ema.ExponentialMovingAverage(model.parameters(), 0.5),
    "compat.diffusers": lambda model: diffusers.EMAModel(model.parameters()),
    "compat.ema_pytorch": lambda model: ema_pytorch.EMA(model),
}
RED: dict[str, str] = {}


@pytest.mark.parametrize("program", programs(PROGRAMS, RED))
def test_no_weak_reference_is_kept(program: Any) -> None:
    model = net()
    kept = program(model)
    assert references(model) == 0
    del kept
    assert references(model) == 0


def test_no_weak_reference_to_a_teacher() -> None:
    model, teacher = net(), net()
    ema = EMA(model, 0.5, into=teacher)
    ema.update()
    teacher(torch.randn(4, 4))
    assert references(model, teacher) == 0


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "cpu": lambda model: model.cpu(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
}
SWAPPED = {
    f"{title}, EMA {state}": (call, state == "gone")
    for title, call in CONVERSIONS.items()
    for state in ("alive", "gone")
}
RED_SWAPPED: dict[str, str] = {}


@pytest.mark.parametrize("case", programs(SWAPPED, RED_SWAPPED))
def test_modules_convert_by_swapping_tensors(case: Any) -> None:
    """With torch's own flag, which sharded weights and subclasses set by themselves."""
    call, gone = case
    model = net()
    ema: Any = EMA(model, 0.5)
    if gone:
        del ema
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        call(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
