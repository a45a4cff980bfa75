"""Every verb of every drop-in inside the swap of another average, for every member of `Reads`.

How to read a failure: the parameter names the drop-in and the verb. `SHADOWS` does the same inside
a swap as outside. `LIVE` is refused where another average has swapped the weights that are averaged
here, `WHOLE_MODEL` also where it has swapped a frozen weight of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.averaging.swap_registry import Reads
from dist_ema.compat import (
    contrib,
    diffusers,
    ema_pytorch,
    ldm,
    shadow,
    swa_utils,
    timm,
    torch_ema,
    yolo,
)
from dist_ema.sharding.parameters import Parameters

SHADOWS, LIVE, WHOLE = Reads.SHADOWS, Reads.LIVE, Reads.WHOLE_MODEL
INPUT = torch.arange(6.0).view(2, 3)


class Net(nn.Module):
    """Trained weights, BatchNorm's buffers, and a frozen weight that another average may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.frozen


class Case:
    """A model, a drop-in for it, and what its verbs are called with."""

    def __init__(self, make: Callable[[nn.Module], Any], applied: bool) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.average = make(self.model)
        if isinstance(self.average, shadow.EMA):
            self.average.register()
        if isinstance(self.average, contrib.SWA):
            self.average.update_swa()
        self.saved = copy.deepcopy(self.average.state_dict()) if self.has("state_dict") else None
        if self.has("store"):
            self.average.store(self.parameters)
        if applied and self.has("backup"):
            getattr(self.average, "apply_shadow" if self.has("apply_shadow") else "apply")()
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                tensor.add_(1)

    def has(self, name: str) -> bool:
        return hasattr(type(self.average), name) or name in vars(self.average)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())


Verb = Callable[[Case], Any]


def plain(verb: str, *values: Any) -> Verb:
    return lambda case: getattr(case.average, verb)(*values)


def model(verb: str) -> Verb:
    return lambda case: getattr(case.average, verb)(case.model)


def listed(verb: str) -> Verb:
    return lambda case: getattr(case.average, verb)(case.parameters)


def attribute(name: str) -> Verb:
    def read(case: Case) -> Any:
        value = getattr(case.average, name)
        return value.state_dict() if isinstance(value, nn.Module) else value

    return read


def loaded(case: Case) -> list[Tensor]:
    case.average.load_state_dict(copy.deepcopy(case.saved))
    return [state.shadow for state in case.average.average.weights.averages[0].averaged]


def lent(case: Case) -> None:
    with case.average.average_parameters(case.parameters):
        pass


MODULE: dict[str, tuple[Reads, Verb]] = {
    "forward": (SHADOWS, lambda case: nn.Module.eval(case.average)(INPUT)),
    "state_dict": (SHADOWS, plain("state_dict")),
    "load_state_dict": (SHADOWS, loaded),
}
HOLDER = {
    "ema": (SHADOWS, attribute("ema")),
    "state_dict": (SHADOWS, plain("state_dict")),
    "load_state_dict": (SHADOWS, loaded),
    "update": (WHOLE, model("update")),
}
LIST = {
    "shadow_params": (WHOLE, attribute("shadow_params")),
    "state_dict": (WHOLE, plain("state_dict")),
    "load_state_dict": (SHADOWS, loaded),
    "to": (SHADOWS, plain("to", "cpu")),
    "copy_to": (WHOLE, listed("copy_to")),
    "store": (WHOLE, listed("store")),
    "restore": (WHOLE, listed("restore")),
}
TRAINABLE = {
    "restore": (LIVE, plain("restore")),
    "shadow": (LIVE, attribute("shadow")),
    "update": (LIVE, plain("update")),
    "apply_shadow": (LIVE, plain("apply_shadow")),
}
STATE = {
    "restore": (WHOLE, plain("restore")),
    "shadow": (WHOLE, attribute("shadow")),
    "update": (LIVE, plain("update")),
    "apply": (WHOLE, plain("apply")),
}
VERSIONED = {"update": (WHOLE, model("update")), "set": (WHOLE, model("set"))}
# NOTE: where a drop-in averages frozen weights too, LIVE means every weight: WHOLE in this table.
# What reads and writes no tensor of the average or the model, or only names and numbers.
HARMLESS = {
    "average", "averages", "copied", "child", "opt_state", "zero_grad", "add_param_group",
    "bn_update", "get_decay", "get_current_decay", "is_frozen", "model", "reset_num_updates",
    "update_attr", "from_pretrained", "save_pretrained", "get_params_iter", "get_buffers_iter",
    "init_ema", "register", "restore_ema_model_device", "add_to_optimizer_post_step_hook",
    "n_averaged", "decay", "num_updates", "initted", "collected_params",
}  # fmt: skip
DROP_INS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, tuple[Reads, Verb]]]] = {
    "timm V1": (lambda m: timm.ModelEma(m, 0.5), HOLDER),
    "timm V2": (lambda m: timm.ModelEmaV2(m, 0.5), MODULE | VERSIONED),
    "timm V3": (
        lambda m: timm.ModelEmaV3(m, 0.5, exclude_buffers=True),
        MODULE
        | VERSIONED
        | {"apply_update_": (WHOLE, lambda case: case.average.apply_update_(case.model, 0.5))},
    ),
    "yolo": (lambda m: yolo.ModelEMA(m, 0.5), HOLDER),
    "swa_utils": (
        swa_utils.AveragedModel,
        MODULE | {"update_parameters": (WHOLE, model("update_parameters"))},
    ),
    "ema_pytorch": (
        lambda m: ema_pytorch.EMA(m, beta=0.5, update_after_step=0, update_every=1),
        {
            "eval": (SHADOWS, lambda case: case.average.eval()(INPUT)),
            "forward": MODULE["forward"],
            "forward_eval": (SHADOWS, lambda case: case.average.forward_eval(INPUT)),
            "state_dict": (WHOLE, plain("state_dict")),
            "load_state_dict": (WHOLE, loaded),
            "update": (WHOLE, plain("update")),
            "step": (WHOLE, plain("update")),
            "update_moving_average": (
                WHOLE,
                lambda case: case.average.update_moving_average(None, case.model, 0.5),
            ),
            "copy_params_from_model_to_ema": (WHOLE, plain("copy_params_from_model_to_ema")),
            "copy_params_from_ema_to_model": (WHOLE, plain("copy_params_from_ema_to_model")),
            "update_model_with_ema": (WHOLE, plain("update_model_with_ema", 0.5)),
        },
    ),
    "diffusers": (
        lambda m: diffusers.EMAModel(m.parameters(), 0.5),
        LIST | {"step": (WHOLE, listed("step")), "pin_memory": (SHADOWS, plain("pin_memory"))},
    ),
    "torch_ema": (
        lambda m: torch_ema.ExponentialMovingAverage(m.parameters(), 0.5),
        LIST | {"update": (WHOLE, listed("update")), "average_parameters": (WHOLE, lent)},
    ),
    "ldm": (
        lambda m: ldm.LitEma(m, 0.5),
        {
            "forward": (LIVE, lambda case: case.average(case.model)),
            "state_dict": (LIVE, plain("state_dict")),
            "shadow_params": (LIVE, attribute("shadow_params")),
            "copy_to": (LIVE, model("copy_to")),
            "store": (WHOLE, listed("store")),
            "restore": (WHOLE, listed("restore")),
        },
    ),
    "shadow": (
        lambda m: shadow.EMA(m, 0.5),
        TRAINABLE,
    ),
    "shadow of a state": (
        lambda m: shadow.ModelEMA(m, 0.5),
        STATE,
    ),
    "contrib": (
        lambda m: contrib.SWA(torch.optim.SGD(m.parameters(), lr=0.1)),
        {
            "step": (WHOLE, plain("step")),
            "update_swa": (WHOLE, plain("update_swa")),
            "update_swa_group": (
                WHOLE,
                lambda case: case.average.update_swa_group(case.average.param_groups[0]),
            ),
            "swap_swa_sgd": (WHOLE, plain("swap_swa_sgd")),
            "state_dict": (WHOLE, plain("state_dict")),
            "load_state_dict": (WHOLE, lambda case: case.average.load_state_dict(case.saved)),
        },
    ),
}
CASES = [(name, verb) for name, (_, verbs) in DROP_INS.items() for verb in verbs]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return [value.detach().clone()] if isinstance(value, Tensor) else []


def test_every_public_member_is_listed() -> None:
    """Of each drop-in, so that a new verb must say what it reads."""
    for name, (make, verbs) in DROP_INS.items():
        kinds = [kind for kind in type(make(Net())).__mro__ if "dist_ema.compat" in kind.__module__]
        members = {member for kind in kinds for member in vars(kind) if not member.startswith("_")}
        assert members - HARMLESS - verbs.keys() == set(), name


@pytest.mark.parametrize(("name", "verb"), CASES, ids=[" ".join(case) for case in CASES])
def test_inside_the_swap_of_another_average(name: str, verb: str) -> None:
    """Swapped weights that are averaged here; then a frozen weight that is not."""
    make, verbs = DROP_INS[name]
    reads, call = verbs[verb]
    for swapped, refused in (("trained", LIVE | WHOLE), ("frozen", WHOLE)):
        case = Case(make, applied=verb == "restore")
        trained = [p for p in case.parameters if p.requires_grad]
        chosen = trained if swapped == "trained" else [case.model.frozen]
        others = EMA(Parameters(chosen, average_frozen=True), 0.5)
        with torch.no_grad():
            for parameter in chosen:
                parameter.add_(1)
        others.update()
        if reads & refused:
            before = tensors(dict(case.model.state_dict()))
            with others.swap(), pytest.raises(RuntimeError, match="swap"):
                call(case)
            assert all(map(torch.equal, before, tensors(dict(case.model.state_dict()))))
            continue
        twin = Case(make, applied=verb == "restore")
        with torch.no_grad():
            for parameter in [
                p for p in twin.parameters if p.requires_grad == (swapped == "trained")
            ]:
                parameter.add_(1)
        want = tensors(call(twin))
        with others.swap():
            got = tensors(call(case))
        assert len(want) == len(got)
        assert all(map(torch.equal, want, got)), swapped


def test_every_member_is_tried() -> None:
    tried = {reads for _, verbs in DROP_INS.values() for reads, _ in verbs.values()}
    # NOTE: no drop-in has a verb that goes on after a swap that failed.
    assert tried == {*Reads} - {Reads.REPLACED}
