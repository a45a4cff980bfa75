"""Storages move between updates: the next update follows them, or raises by name, and lets the old
memory go.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dist_ema import EMA
from dist_ema.averaging import drop_in_rules
from tests.living import Naive, Program, outcome, programs, random_step


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def data_assigned(m: nn.Module) -> None:
    for p in m.parameters():
        p.data = p.data.clone()


def one_of_many(m: nn.Module) -> None:
    m[2].bias.data = m[2].bias.data.clone()


def double_and_back(m: nn.Module) -> None:
    m.double().float()


def from_a_vector(m: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(m.parameters()).clone(), m.parameters())


def set_to_another(m: nn.Module) -> None:
    with torch.no_grad():
        for p in m.parameters():
            p.set_(p.detach().clone())


def clipped(m: nn.Module) -> None:
    """A weight clipper of a WGAN, as most of them are written."""
    for p in m.parameters():
        p.data = p.data.clamp(-0.3, 0.3)


def clipped_in_place(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.clamp_(-0.3, 0.3)


def loaded_in_place(m: nn.Module) -> None:
    m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()})


def loaded_assigned(m: nn.Module) -> None:
    m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)


def offloaded(m: nn.Module) -> None:
    """The whole model between phases, by hand: host copies, storages freed, and back."""
    host = [p.detach().clone() for p in m.parameters()]
    for p in m.parameters():
        p.data = torch.empty(0)
    for p, kept in zip(m.parameters(), host, strict=True):
        p.data = kept


def resized_to_nothing(m: nn.Module) -> None:
    """FSDP1's way: the same storage object, its memory given back and taken anew."""
    for p in m.parameters():
        kept, storage = p.detach().clone(), p.untyped_storage()
        size = storage.size()
        storage.resize_(0)
        storage.resize_(size)
        p.data.copy_(kept)


def layout_changed(m: nn.Module) -> None:
    m[0].weight.data = m[0].weight.data.t().contiguous().t()


def views_of_one_buffer(m: nn.Module) -> None:
    """Flattened by an optimizer or by a communication library."""
    flat = torch.cat([p.detach().flatten() for p in m.parameters()])
    at = 0
    for p in m.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()


def storages_exchanged(m: nn.Module) -> None:
    """Two weights of one shape trade places: every address is known, and each is the other's."""
    m[1].weight.data, m[1].bias.data = m[1].bias.data, m[1].weight.data


def moved_to_the_same_device(m: nn.Module) -> None:
    m.to("cpu", non_blocking=True)


def half_and_back(m: nn.Module) -> None:
    m.bfloat16().float()


MOVES: dict[str, Callable[[Any], None]] = {
    "p.data = clone": data_assigned,
    "one weight of many": one_of_many,
    "double().float()": double_and_back,
    "bfloat16().float()": half_and_back,
    "vector_to_parameters": from_a_vector,
    "set_": set_to_another,
    "clipper": clipped,
    "clipper in place": clipped_in_place,
    "load_state_dict": loaded_in_place,
    "load_state_dict assign": loaded_assigned,
    "offload and back": offloaded,
    "storage resized": resized_to_nothing,
    "layout": layout_changed,
    "views of one buffer": views_of_one_buffer,
    "exchanged": storages_exchanged,
    "to the same device": moved_to_the_same_device,
}
WHEN = {"early": 1, "late": 30}
RED: dict[str, str] = {}
CASES = {
    f"{title}, {when}": (move, at) for title, move in MOVES.items() for when, at in WHEN.items()
}


@pytest.mark.parametrize("case", programs(CASES, RED))
def test_a_storage_that_moved(case: Any) -> None:
    """After `at` updates, when nothing is looked at any more; then a few steps, and the
    reference.
    """
    move, at = case
    program = Program(net())

    def train() -> float:
        program.step(at)
        move(program.model)
        if move is loaded_assigned:
            program.renew()
        program.step(3)
        return max(program.gather(), program.swap(), program.gather())

    outcome(train, program.ema.names())


RED_EVERY_STEP: dict[str, str] = {}
EVERY_STEP = {
    title: MOVES[title]
    for title in (
        "p.data = clone",
        "double().float()",
        "vector_to_parameters",
        "clipper",
        "exchanged",
    )
}


@pytest.mark.parametrize("move", programs(EVERY_STEP, RED_EVERY_STEP))
def test_a_storage_that_moves_at_every_step(move: Any) -> None:
    program = Program(net())

    def train() -> float:
        for _ in range(12):
            program.step()
            move(program.model)
        program.step()
        return program.gather()

    outcome(train, program.ema.names())


class Sharpness(torch.optim.Optimizer):
    """SAM: climb, look, and go back by assigning the old storage, then descend."""

    def __init__(self, params: Any, lr: float, assign: bool) -> None:
        super().__init__(params, {"lr": lr})
        self.assign = assign

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            old = p.data
            if self.assign:
                p.data = p.data + 0.05 * p.grad
                p.data = old.clone()
            else:
                kept = p.detach().clone()
                p.add_(p.grad, alpha=0.05)
                p.copy_(kept)
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])


RED_SAM: dict[str, str] = {}


@pytest.mark.parametrize("assign", programs({"in place": False, "assigned": True}, RED_SAM))
def test_perturb_and_restore(assign: Any) -> None:
    program = Program(net())
    program.ema.detach()
    optimizer = Sharpness(program.model.parameters(), 0.1, assign)
    program.ema.attach(optimizer)

    def train() -> float:
        for _ in range(20):
            random_step(optimizer)
            program.naive.update()
        return program.gather()

    outcome(train, program.ema.names())


def by_hand(move: Callable[[Any], None], at: int) -> float:
    """Without `attach`: `ema.update()` after the step."""
    model = net()
    naive, ema = Naive(model), EMA(model, 0.75)
    for i in range(at + 4):
        if i == at:
            move(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        ema.update()
        naive.update()
    return naive.error(ema.gather())


RED_BY_HAND: dict[str, str] = {}


@pytest.mark.parametrize("move", programs(MOVES, RED_BY_HAND))
def test_update_by_hand_follows_too(move: Any) -> None:
    outcome(lambda: by_hand(move, 20), ["weight", "bias"])


OPTIONS: dict[str, dict[str, Any]] = {
    "host": {"device": "cpu"},
    "bf16": {"dtype": torch.bfloat16},
    "two averages": {},
    "averaged buffers": {"buffers": "average"},
}
RED_OPTIONS: dict[str, str] = {}


@pytest.mark.parametrize("title", programs({title: title for title in OPTIONS}, RED_OPTIONS))
def test_every_engine_follows(title: str) -> None:
    model = net()
    decay: Any = [0.75, 0.5] if title == "two averages" else 0.75
    naive, ema = Naive(model), EMA(model, decay, **OPTIONS[title])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)

    def train() -> float:
        for i in range(40):
            if i == 20:
                double_and_back(model)
            random_step(optimizer)
            naive.update()
        return naive.error(ema.gather())

    outcome(train, ema.names(), tolerance=2e-2 if title == "bf16" else 2e-5)


def test_the_memory_of_the_old_storage_is_let_go() -> None:
    """Weeks of training beside a dead copy of the model is what an average of the wrong storage
    costs.
    """

    def alive(size: int) -> int:
        gc.collect()
        return sum(
            issubclass(type(each), Tensor) and each.untyped_storage().nbytes() == size
            for each in gc.get_objects()
        )

    model = nn.Linear(101, 103, bias=False)
    size = model.weight.untyped_storage().nbytes()
    program = Program(model)
    program.step(5)
    for p in model.parameters():
        p.grad = None
    before = alive(size)
    data_assigned(model)
    program.step(1)
    for p in model.parameters():
        p.grad = None
    assert alive(size) <= before


def test_a_weight_on_the_meta_device_is_named() -> None:
    program = Program(net())
    program.step(3)
    program.model.to("meta")
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        program.ema.update()


def assigned_all(model: nn.Module) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def one_parameter(model: Any) -> None:
    model[2].bias = nn.Parameter(torch.zeros_like(model[2].bias))


def one_module(model: Any) -> None:
    model[2] = nn.Linear(6, 3)


def one_more_child(model: Any) -> None:
    model.add_module("2 more", nn.Linear(3, 3))


def one_more_weight(model: Any) -> None:
    model[1].gain = nn.Parameter(torch.ones(3))


def one_less(model: Any) -> None:
    model[2].bias = None


def biasless(model: Any) -> None:
    model[3].weight = nn.Parameter(torch.ones(3, 3))


EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "all assigned": (assigned_all, r"0\.weight.* no longer shares memory"),
    "a parameter": (one_parameter, r"^2\.bias no longer shares memory"),
    "a module": (one_module, r"^2\.weight, 2\.bias no longer shares memory"),
    "another child": (one_more_child, r"^2 more\.weight, 2 more\.bias is new and trainable"),
    "another weight": (one_more_weight, r"^1\.gain is new and trainable"),
    "one less": (one_less, r"^2\.bias is gone"),
    "beside none": (biasless, r"^3\.weight no longer shares memory"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_next_update_sees_an_edit_of_the_tree(edit: Any) -> None:
    """Guards each of the lists that `MemoryWatch` asks."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3, bias=False))
    program = Program(model)
    program.step(5)
    edit[0](model)
    with pytest.raises(RuntimeError, match=edit[1]):
        program.ema.update()
    program.ema.rescan()
    program.naive.rescan()
    program.renew()
    program.step(2)
    assert program.gather() < 1e-5


def test_a_child_without_weights_is_no_edit() -> None:
    program = Program(nn.Sequential(nn.Linear(4, 4), nn.Sequential()))
    program.step(3)
    program.model[1].add_module("0", nn.ReLU())
    program.step(2)
    assert program.gather() < 1e-5


def test_two_weights_that_trade_their_memory_are_followed() -> None:
    """The addresses are the same ones, in another order."""
    program = Program(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
    program.step(3)
    a, b = (program.model[name].weight for name in "ab")
    a.data, b.data = b.data, a.data
    program.step(2)
    assert program.swap() < 1e-5


def test_two_weights_in_one_memory_are_named() -> None:
    """Tied by `.data` in mid-training: a swap cannot put two averages into one memory."""
    program = Program(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
    program.step(2)
    a, b = (program.model[name].weight for name in "ab")
    b.data = a.data
    for verb in (program.ema.update, program.ema.gather, program.ema.rescan):
        with pytest.raises(RuntimeError, match=r"[ab]\.weight lies in the memory of [ab]\.weight"):
            verb()
    b.data = a.data.clone()
    program.step(2)
    assert program.swap() < 1e-5


def test_two_weights_that_always_lay_in_one_memory_may_move() -> None:
    """Their averages are the same. One is a transposed view of the other."""
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 4)})
    model["b"].weight.data = model["a"].weight.data.t()
    program = Program(model)
    program.step(2)
    model["a"].weight.data = model["a"].weight.data.clone()
    model["b"].weight.data = model["a"].weight.data.t()
    program.step(2)
    assert program.swap() < 1e-5


def teacher_transposed(model: Any, teacher: Any, ema: EMA) -> None:
    teacher[0].weight.data = teacher[0].weight.data.t()


def teacher_of_one_memory(model: Any, teacher: Any, ema: EMA) -> None:
    teacher[2].weight.data = teacher[0].weight.data


def teacher_in_the_model(model: Any, teacher: Any, ema: EMA) -> None:
    teacher[0].weight.data = model[0].weight.data


TEACHERS: dict[str, tuple[Any, str]] = {
    "transposed": (teacher_transposed, r"^0\.weight of the teacher was .* in another order"),
    "one memory": (teacher_of_one_memory, r"^[02]\.weight lies in the memory of [02]\.weight"),
    "the model's": (teacher_in_the_model, r"^0\.weight lies in the memory of the average"),
}


@pytest.mark.parametrize("edit", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_whose_memory_is_no_longer_its_own(edit: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    teacher = copy.deepcopy(model)
    ema = EMA(model, 0.5, into=teacher)
    for _ in range(3):
        ema.update()
    edit[0](model, teacher, ema)
    for verb in (ema.update, ema.gather):
        with pytest.raises(RuntimeError, match=edit[1]):
            verb()


def test_rescan_does_not_follow_another_module_in_the_teacher() -> None:
    model, teacher = net(), net()
    ema = EMA(model, 0.5, into=teacher)
    model[2], teacher[2] = nn.Linear(6, 5), nn.Linear(6, 5)
    with pytest.raises(RuntimeError, match=r"^2\.weight, 2\.bias of the teacher is another"):
        ema.rescan()


def test_rescan_does_not_tie_weights_that_the_teacher_holds_apart() -> None:
    """The second of the teacher's two would be the average of nothing."""
    model, teacher = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    ema = EMA(model, 0.5, into=teacher)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"^0\.weight and 1\.weight are tied in one of"):
        ema.rescan()


def test_live_in_the_memory_of_the_average_is_named() -> None:
    """`state_dict()` aliases the shadows: what is assigned from it would be its own average."""
    program = Program(nn.Sequential(nn.Linear(4, 4)))
    program.step(2)
    shadow = program.ema.weights.states[0].shadow
    assert shadow is not None
    program.model[0].weight.data = shadow.view(4, 4)
    for verb in (program.ema.update, program.ema.gather):
        with pytest.raises(RuntimeError, match=r"^0\.weight lies in the memory of the average"):
            verb()


def test_a_weight_transposed_inside_a_swap_is_named_at_the_exit() -> None:
    program = Program(nn.Sequential(nn.Linear(4, 4)))
    program.step(2)
    weight = program.model[0].weight
    named = pytest.raises(RuntimeError, match=r"^0\.weight was .* lies in another order")
    with named, program.ema.swap():
        weight.data = weight.data.t()
    weight.data = weight.data.t()
    program.step(1)
    assert program.swap() < 1e-5


class Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("gram", torch.randn(3, 3))


def test_an_averaged_buffer_that_is_transposed_in_place_is_named() -> None:
    model = Gram()
    ema = EMA(model, 0.5, buffers="average")
    for _ in range(3):
        ema.update()
    model.gram.data = model.gram.data.t()
    with pytest.raises(RuntimeError, match=r"^gram was .* lies in another order"):
        ema.update()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_is_averaged() -> None:
    """Its dicts of parameters and modules are no dicts."""
    program = Program(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))
    program.step(3)
    assert program.gather() < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_of_a_scripted_module(buffers: str, tmp_path: Path) -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    ema = EMA(model, 0.5, buffers=buffers)
    before = model.state_dict()["1.running_mean"].clone()
    model(torch.randn(8, 4))
    live = model.state_dict()["1.running_mean"].clone()
    ema.update()
    average = ema.gather()["1.running_mean"]
    assert torch.equal(average, live if buffers == "copy" else before.lerp(live, 0.5))
    with ema.swap():
        assert torch.equal(model.state_dict()["1.running_mean"], average)
        model(torch.randn(8, 4))
    assert torch.equal(model.state_dict()["1.running_mean"], live)
    own = ema.gather()["1.running_mean"]
    assert not torch.equal(own, average)
    ema.save(tmp_path / "a")
    ema.load(tmp_path / "a")
    assert torch.equal(ema.gather()["1.running_mean"], own)


def test_conjugated_weights_and_buffers() -> None:
    """Their memory holds other bits than their values: averaged ones are named, others copied."""
    values = torch.randn(3, 2, dtype=torch.cfloat)
    with pytest.raises(ValueError, match=r"^c is not dense .*resolve_conj\(\)"):
        EMA(nn.ParameterDict({"c": nn.Parameter(values.mH)}), 0.5)
    model = nn.ParameterDict({"frozen": nn.Parameter(values.mH, False), "w": torch.ones(3)})
    model.register_buffer("buffer", values.clone().conj())
    model.register_buffer("negative", values.clone().conj().imag)
    ema = EMA(model, 0.5)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    ema.update()
    with ema.swap():
        model.buffer.add_(1)
    assert all(torch.equal(live[name], value) for name, value in model.state_dict().items())
    average = ema.gather()
    assert torch.equal(average["frozen"], live["frozen"])
    assert torch.equal(average["buffer"], live["buffer"] + 1)
    assert torch.equal(average["negative"], live["negative"])


def test_a_conjugated_view_is_named() -> None:
    """Address, shape and strides are the same, and the elements are not."""
    model = nn.ParameterDict({"c": nn.Parameter(torch.randn(3, dtype=torch.cfloat))})
    ema = EMA(model, 0.5)
    for _ in range(3):
        ema.update()
    model["c"].data = model["c"].data.conj()
    for verb in (ema.update, ema.gather):
        with pytest.raises(RuntimeError, match=r"^c was .* lies in another order"):
            verb()


class Convolutions(nn.Module):
    """Shapes that stay alike when two dimensions change places, in both memory formats."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.rows = nn.Linear(4, 4), nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["square", "conv"])
def test_a_weight_that_is_transposed_in_place_is_named(name: str) -> None:
    """The address is the same and so is the shape: only the strides tell which element is which."""
    program = Program(Convolutions())
    program.step(3)
    weight = getattr(program.model, name).weight
    weight.data = weight.data.transpose(-1, -2)
    with pytest.raises(RuntimeError, match=rf"^{name}\.weight was .* lies in another order"):
        program.ema.update()
    with pytest.raises(RuntimeError, match=rf"^{name}\.weight was .* lies in another order"):
        program.ema.gather()
    weight.data = weight.data.transpose(-1, -2)
    program.step(2)
    assert program.gather() < 1e-5


def test_rescan_loses_no_average_of_a_weight_that_turned() -> None:
    """The whole model in another memory format: the same objects and shapes."""
    program = Program(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    program.step(3)
    program.model.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"^0\.weight lies in another order in memory"):
        program.ema.rescan()
    program.model.to(memory_format=torch.contiguous_format)
    program.step(1)
    assert program.gather() < 2e-5


def test_a_frozen_module_made_in_inference_mode() -> None:
    """Its weights count no writes, and nothing can write them."""
    with torch.inference_mode():
        encoder = nn.Linear(4, 4).requires_grad_(False)
    program = Program(nn.Sequential(encoder, nn.BatchNorm1d(4), nn.Linear(4, 2)))
    program.step(3)
    assert program.swap() < 2e-5
    program.step(1)
    assert program.gather() < 2e-5


def test_a_trained_module_made_in_inference_mode_is_named() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"^weight was made under torch.inference_mode"):
        EMA(model, 0.5)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_weight_that_moves_into_an_inference_tensor_is_named(by_hand: bool) -> None:
    model: Any = net()
    program = Program(model)
    program.step()
    with torch.inference_mode():
        assigned = torch.randn_like(model[0].weight)
    model[0].weight.data = assigned
    with pytest.raises(RuntimeError, match=r"0\.weight lies in a tensor .*inference_mode"):
        program.ema.update() if by_hand else program.ema.gather()
    model[0].weight.data = assigned.clone()
    program.ema.gather()


def test_a_storage_that_was_freed_is_named_and_followed_when_it_is_back() -> None:
    """`untyped_storage().resize_(0)`, as sharding and offloading by hand do between phases."""
    program = Program(net())
    program.step(3)
    storages = [p.untyped_storage() for p in program.model.parameters()]
    kept = [(p, p.detach().clone()) for p in program.model.parameters()]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    for verb in (program.ema.update, program.ema.gather):
        with pytest.raises(RuntimeError, match=r"0\.weight has no memory"):
            verb()
    for storage, size, (p, value) in zip(storages, sizes, kept, strict=True):
        storage.resize_(size)
        p.detach().copy_(value)
    program.step(2)
    assert program.gather() < 2e-5


def test_a_model_in_another_dtype_is_followed_or_named() -> None:
    """`model.bfloat16()` for good: live is read in its new dtype, or the dtype is named."""
    program = Program(net())
    program.step(3)
    program.model.bfloat16()

    def train() -> float:
        program.step(3)
        return program.gather()

    outcome(train, program.ema.names(), tolerance=2e-2)


def test_swap_tensors_is_followed_or_named() -> None:
    """`torch.utils.swap_tensors`, which `module.to` uses for subclasses."""
    program = Program(net())
    program.step(20)

    def train() -> float:
        for p in list(program.model.parameters()):
            p.grad = None
            other = nn.Parameter(p.detach().clone() + 1)
            torch.utils.swap_tensors(p, other)
        program.renew()
        program.step(2)
        return program.gather()

    outcome(train, program.ema.names())


def test_the_future_flags_of_module_to() -> None:
    """`overwrite_module_params_on_conversion`: `.to` builds new Parameters."""
    program = Program(net())
    program.step(20)

    def train() -> float:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            program.model.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        program.renew()
        program.step(2)
        return program.gather()

    outcome(train, program.ema.names())


def moved_then_rescan(program: Program) -> None:
    data_assigned(program.model)
    program.ema.rescan()


def moved_inside_a_swap(program: Program) -> None:
    with program.ema.swap():
        data_assigned(program.model)


def moved_then_a_copy_adopted(program: Program) -> None:
    """A verb takes a new buffer in, and with it everything is bound anew."""
    data_assigned(program.model)
    program.model.register_buffer("late", torch.zeros(3))
    program.ema.gather()


EVENTS = [moved_then_rescan, moved_inside_a_swap, moved_then_a_copy_adopted]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_a_verb_between_the_move_and_the_update(event: Any) -> None:
    """Guards `rebind_moved` in AveragedWeights.adopt, and that `follow` asks the watch."""
    program = Program(net())
    program.step(4)
    event(program)
    program.step(6)  # no further verb: the updates themselves must follow
    shadow = program.ema.weights.averages[0].averaged[0].shadow.clone()
    name = program.ema.names()[0]
    want = program.naive.average[name].flatten()
    assert (shadow.double() - want).abs().max() <= 2e-5


def test_one_of_two_averages_swapped_while_storages_move() -> None:
    """Guards `rebind_moved`, which looks at the records of each average."""
    model = net()
    ema = EMA(model, [0.5, 0.75])
    want = [{name: p.detach().double() for name, p in model.named_parameters()} for _ in range(2)]
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if step == 3:
            with ema.swap(1):
                data_assigned(model)
        ema.update()
        for average, decay in zip(want, (0.5, 0.75), strict=True):
            for name, p in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    for number, average in enumerate(want):
        full = ema.gather(number)
        assert all((full[name] - average[name]).abs().max() <= 2e-5 for name in average)
        with ema.swap(number):
            inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert all((inside[name] - average[name]).abs().max() <= 2e-5 for name in average)


def test_a_teacher_that_moved_before_a_rescan() -> None:
    model, teacher = net(), net()
    ema, want = EMA(model, 0.5, into=teacher), model[0].weight.detach().double()
    for step in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if step == 3:
            data_assigned(teacher)
            ema.rescan()
        ema.update()
        want = 0.5 * want + 0.5 * model[0].weight.detach().double()
    assert (teacher[0].weight.detach() - want).abs().max() <= 2e-5


def test_a_storage_moved_inside_a_swap(tmp_path: Path) -> None:
    """`.double()` for a precise evaluation, and back: live is there after the block."""
    program = Program(net())
    program.step(5)
    before = program.naive.state()

    def evaluate() -> float:
        with program.ema.swap():
            double_and_back(program.model)
        after = program.naive.state()
        off = max(
            float((before[name].double() - after[name].double()).abs().max()) for name in before
        )
        program.step(2)
        return max(off, program.gather())

    outcome(evaluate, program.ema.names())


def test_a_model_that_was_cast_for_good_is_named() -> None:
    program = Program(net())
    program.step(3)
    program.model.half()
    with pytest.raises(RuntimeError, match=r"0\.weight was torch.float32.*now torch.float16"):
        program.ema.update()


def copied(pairs: Any) -> None:
    """The rule of a drop-in: the average is live."""
    for shadow, live in pairs:
        shadow.copy_(live)


def test_the_rule_of_a_drop_in_reads_what_live_is() -> None:
    """`move_by` follows a storage, and does not take one average for the live model of its own."""
    model = nn.Linear(2, 1, bias=False)
    ema = EMA(model, 0.5)
    model.weight.data = torch.full((1, 2), 3.0)
    drop_in_rules.move_by(ema.weights, copied)
    assert ema.gather()["weight"].tolist() == [[3.0, 3.0]]
    with ema.swap(), pytest.raises(RuntimeError, match=r"ema\.update\(\) inside ema\.swap\(\)"):
        drop_in_rules.move_by(ema.weights, copied)


def test_pull_writes_what_live_is() -> None:
    """`pull` follows a storage, and its writes are no training that no update followed."""
    model = nn.Linear(2, 1, bias=False)
    ema = EMA(model, 0.5)
    average = ema.gather()["weight"]
    model.weight.data = torch.full((1, 2), 3.0)
    drop_in_rules.pull(ema.weights, 1.0)
    assert torch.equal(model.weight, average)
    assert torch.equal(ema.gather()["weight"], average)
