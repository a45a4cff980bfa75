"""Every verb of every drop-in inside another average's swap: refused, or the same as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.compat import diffusers, ema_pytorch, ldm, shadow, swa_utils, timm, torch_ema, yolo
from tests.living import programs


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists, in their order."""
    if isinstance(value, Tensor):
        return [value.detach().double().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return []


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "timm": lambda m: timm.ModelEmaV3(m, decay=0.5),
    "timm V2": lambda m: timm.ModelEmaV2(m, decay=0.5),
    "timm V1": lambda m: timm.ModelEma(m, decay=0.5),
    "swa_utils": lambda m: swa_utils.AveragedModel(m),
    "swa_utils buffers": lambda m: swa_utils.AveragedModel(m, use_buffers=True),
    "ema_pytorch": lambda m: ema_pytorch.EMA(m, beta=0.5, update_after_step=0, update_every=1),
    "ldm": lambda m: ldm.LitEma(m, decay=0.5),
    "yolo": lambda m: yolo.ModelEMA(m),
    "diffusers": lambda m: diffusers.EMAModel(m.parameters(), decay=0.5),
    "torch_ema": lambda m: torch_ema.ExponentialMovingAverage(m.parameters(), 0.5),
    "shadow": lambda m: registered(shadow.EMA(m, 0.5)),
}
UPDATE: dict[str, Callable[[Any, nn.Module], Any]] = {
    "timm": lambda e, m: e.update(m),
    "timm V2": lambda e, m: e.update(m),
    "timm V1": lambda e, m: e.update(m),
    "swa_utils": lambda e, m: e.update_parameters(m),
    "swa_utils buffers": lambda e, m: e.update_parameters(m),
    "ema_pytorch": lambda e, m: e.update(),
    "ldm": lambda e, m: e(m),
    "yolo": lambda e, m: e.update(m),
    "diffusers": lambda e, m: e.step(m.parameters()),
    "torch_ema": lambda e, m: e.update(m.parameters()),
    "shadow": lambda e, m: e.update(),
}
READ: dict[str, dict[str, Callable[[Any, nn.Module], Any]]] = {
    "timm": {
        "state_dict": lambda e, m: e.state_dict(),
        "module": lambda e, m: e.module.state_dict(),
    },
    "timm V2": {"state_dict": lambda e, m: e.state_dict()},
    "timm V1": {"ema": lambda e, m: e.ema.state_dict()},
    "swa_utils": {
        "state_dict": lambda e, m: e.state_dict(),
        "forward": lambda e, m: e.eval()(torch.ones(2, 3)),
    },
    "swa_utils buffers": {"state_dict": lambda e, m: e.state_dict()},
    "ema_pytorch": {
        "state_dict": lambda e, m: e.state_dict(),
        "forward": lambda e, m: e.ema_model.eval()(torch.ones(2, 3)),
    },
    "ldm": {"state_dict": lambda e, m: e.state_dict()},
    "yolo": {"ema": lambda e, m: e.ema.state_dict()},
    "diffusers": {"state_dict": lambda e, m: e.state_dict()},
    "torch_ema": {"state_dict": lambda e, m: e.state_dict()},
    "shadow": {"shadow": lambda e, m: e.shadow},
}


def registered(average: shadow.EMA) -> shadow.EMA:
    average.register()
    return average


def trained(name: str) -> tuple[nn.Module, Any, EMA]:
    """A model with a drop-in, and another average beside it whose buffers are its own."""
    model = net()
    outer = EMA(model, 0.5, buffers="average")
    average = MAKE[name](model)
    for _ in range(4):
        model(torch.randn(8, 3) + 3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        outer.update()
        UPDATE[name](average, model)
    return model, average, outer


READS = {f"{name}.{verb}": (name, READ[name][verb]) for name in READ for verb in READ[name]}
RED_READS: dict[str, str] = {}


@pytest.mark.parametrize("case", programs(READS, RED_READS))
def test_reading_inside_anothers_swap(case: Any) -> None:
    name, read = case
    torch.manual_seed(1)
    model, average, _ = trained(name)
    want = tensors(read(average, model))
    torch.manual_seed(1)
    model, average, outer = trained(name)
    with outer.swap():
        try:
            got = tensors(read(average, model))
        except RuntimeError as error:
            assert "swap" in str(error)
            got = want
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True)), "it read the lent model"
    after = tensors(read(average, model))
    assert all(torch.equal(x, y) for x, y in zip(want, after, strict=True))


RED_UPDATES: dict[str, str] = {}


@pytest.mark.parametrize("name", programs({name: name for name in MAKE}, RED_UPDATES))
def test_updating_inside_anothers_swap_is_refused(name: str) -> None:
    """Also for the first update, which begins the average."""
    model, average, outer = trained(name)
    with outer.swap(), pytest.raises(RuntimeError, match="swap"):
        UPDATE[name](average, model)
    model = net()
    outer, average = EMA(model, 0.5), MAKE[name](model)
    with outer.swap(), pytest.raises(RuntimeError, match="swap"):
        UPDATE[name](average, model)


WRITE: dict[str, tuple[str, Callable[[Any, nn.Module], Any]]] = {
    "diffusers.store": ("diffusers", lambda e, m: e.store(m.parameters())),
    "torch_ema.store": ("torch_ema", lambda e, m: e.store(m.parameters())),
    "ldm.store": ("ldm", lambda e, m: e.store(m.parameters())),
    "ema_pytorch.copy_params": ("ema_pytorch", lambda e, m: e.copy_params_from_model_to_ema()),
    "ema_pytorch.update_model": ("ema_pytorch", lambda e, m: e.update_model_with_ema()),
    "shadow.apply": ("shadow", lambda e, m: e.apply_shadow()),
    "timm.set": ("timm", lambda e, m: e.set(m)),
}
RED_WRITES: dict[str, str] = {}


@pytest.mark.parametrize("case", programs(WRITE, RED_WRITES))
def test_copies_to_and_fro_inside_anothers_swap_are_refused(case: Any) -> None:
    name, write = case
    model, average, outer = trained(name)
    live = tensors(model.state_dict())
    with outer.swap(), pytest.raises(RuntimeError, match="swap"):
        write(average, model)
    assert all(map(torch.equal, live, tensors(model.state_dict())))


VERBS: dict[str, Callable[[EMA, Any], Any]] = {
    "update": lambda e, path: e.update(),
    "gather": lambda e, path: e.gather(),
    "save": lambda e, path: e.save(path / "a"),
    "export": lambda e, path: e.export(path / "b"),
    "reset": lambda e, path: e.reset(),
    "rescan": lambda e, path: e.rescan(),
    "metrics": lambda e, path: e.metrics(),
    "state_dict": lambda e, path: e.state_dict(),
    "swap": lambda e, path: e.swap().__enter__(),
    "copy_to": lambda e, path: e.copy_to(net()),
}
RED_VERBS: dict[str, str] = {}


@pytest.mark.parametrize("verb", programs(VERBS, RED_VERBS))
def test_a_second_average_inside_the_swap_of_the_first(verb: Any, tmp_path: Any) -> None:
    """Refused, or the same as outside: never made of lent weights."""
    model = net()
    first, second = EMA(model, 0.5), EMA(model, 0.9, buffers="average")
    for _ in range(3):
        model(torch.randn(8, 3) + 3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        first.update()
        second.update()
    want = tensors(second.gather())
    with first.swap():
        try:
            verb(second, tmp_path)
        except RuntimeError as error:
            assert "swap" in str(error)
    assert all(map(torch.equal, want, tensors(second.gather())))
