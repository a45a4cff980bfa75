"""When an update comes: after every listed optimizer has stepped, in whatever order, and after what
wraps it.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_ema import EMA
from tests.living import Naive, outcome, programs, random_step


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def one_each(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]


def in_backward(order: Callable[[list[Any]], list[Any]]) -> float:
    """Optimizer-in-backward: one optimizer per weight, stepped by the hook of its gradient."""
    model = net()
    optimizers = one_each(model)
    for p, optimizer in zip(model.parameters(), optimizers, strict=True):

        def hook(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(*order(optimizers))
    for _ in range(5):
        model(torch.randn(8, 4)).square().mean().backward()
        naive.update()
    assert ema.now == 5
    return naive.error(ema.gather())


def two(listed: int, stepped: int) -> float:
    """Muon for matrices and AdamW for the rest, listed in one order and stepped in the other."""
    model = net()
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=0.1)
    both = [matrices, rest]
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(*both[::listed])
    for _ in range(5):
        for optimizer in both[::stepped]:
            random_step(optimizer)
        naive.update()
    assert ema.now == 5
    return naive.error(ema.gather())


def alternating_order() -> float:
    """A GAN that steps D first in even rounds, and G first in odd ones."""
    model = net()
    d, g = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 1))
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(g, d)
    for i in range(6):
        for optimizer in [d, g] if i % 2 else [g, d]:
            random_step(optimizer)
        naive.update()
    assert ema.now == 6
    return naive.error(ema.gather())


def several_of_one() -> float:
    """Five steps of the critic for one of the generator: one update per round."""
    model = net()
    d, g = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 1))
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(d, g)
    for _ in range(4):
        for _ in range(5):
            random_step(d)
        random_step(g)
        naive.update()
    assert ema.now == 4
    return naive.error(ema.gather())


def one_more_often(order: str, moments: str) -> float:
    """A generator that steps once for two steps of the critic.

    Args:
        order: Of the steps in a round.
        moments: The step, by its place, after which the update of a round comes: of the first
            round and of the later ones. The docstring of `attach` and limits.md say so.
    """
    model = net()
    naive, ema = Naive(model), EMA(model, 0.75)
    optimizers = {
        "G": torch.optim.SGD(model[0].parameters(), lr=0.1),
        "D": torch.optim.SGD(model[2].parameters(), lr=0.1),
    }
    ema.attach(*optimizers.values())
    for round_ in range(4):
        for place, name in enumerate(order):
            random_step(optimizers[name])
            if place == int(moments[min(round_, 1)]):
                naive.update()
    return naive.error(ema.gather()) + abs(ema.metrics()["updates"] - 4)


def three_shuffled() -> float:
    model = net()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in range(3)]
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(*optimizers)
    for i in range(6):
        for k in range(3):
            random_step(optimizers[(k * (1 + i % 2) + i) % 3])
        naive.update()
    assert ema.now == 6
    return naive.error(ema.gather())


def every_second() -> float:
    """Orders and every= together."""
    model = net()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 1))
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(first, second, every=2)
    for i in range(6):
        random_step(second)
        random_step(first)
        if i % 2:
            naive.update(0.75**2)
    return naive.error(ema.gather())


ORDERS: dict[str, Callable[[], float]] = {
    "in backward, model order": lambda: in_backward(lambda each: each),
    "in backward, reversed": lambda: in_backward(lambda each: each[::-1]),
    "in backward, shuffled": lambda: in_backward(lambda each: each[1::2] + each[::2]),
    "two, as listed": lambda: two(1, 1),
    "two, other way": lambda: two(-1, 1),
    "two, stepped other way": lambda: two(1, -1),
    "alternating": alternating_order,
    "several critic steps": several_of_one,
    "G, D, D": lambda: one_more_often("GDD", "10"),
    "D, D, G": lambda: one_more_often("DDG", "22"),
    "three shuffled": three_shuffled,
    "every second": every_second,
}
RED_ORDERS: dict[str, str] = {}


@pytest.mark.parametrize("program", programs(ORDERS, RED_ORDERS))
def test_the_order_of_the_list_is_not_the_order_of_steps(program: Any) -> None:
    assert outcome(program) == "equal"


def silent_optimizer(first: bool) -> list[str]:
    model = net()
    steps = torch.optim.SGD(model[0].parameters(), lr=0.1)
    never = torch.optim.Adam(model[1].parameters(), lr=0.1)
    ema = EMA(model, 0.75)
    ema.attach(*([never, steps] if first else [steps, never]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            random_step(steps)
    return [str(each.message) for each in caught]


RED_NEVER: dict[str, str] = {}


@pytest.mark.parametrize("first", programs({"listed first": True, "listed last": False}, RED_NEVER))
def test_an_optimizer_that_never_steps_is_named_once(first: Any) -> None:
    messages = silent_optimizer(first)
    assert len(messages) == 1
    assert "SGD has stepped 128 times, and Adam never since" in messages[0]


# --- wrappers ------------------------------------------------------------------------------------


class Outer:
    """What wraps an optimizer without being one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.after()

    def after(self) -> None:
        raise NotImplementedError


class SlowWeights(Outer):
    """Lookahead: every second step the weights go back towards slow ones, after the inner step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def after(self) -> None:
        self.count += 1
        if self.count % 2 == 0:
            weights = [p for group in self.param_groups for p in group["params"]]
            for slow, p in zip(self.slow, weights, strict=True):
                slow.lerp_(p, 0.2)
                p.copy_(slow)


class Clipper(Outer):
    """A wrapper that projects the weights after every step."""

    @torch.no_grad()
    def after(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.2, 0.2)


class MasterCopy(Outer):
    """ZeRO's way: the inner optimizer steps fp32 masters, and the model's weights are copied after
    it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.weights = [p for group in groups for p in group]
        self.masters = [nn.Parameter(p.detach().clone()) for p in self.weights]
        super().__init__(torch.optim.SGD(self.masters, lr=0.1))

    @property
    def param_groups(self) -> Any:
        return [{"params": self.weights}]

    def step(self, closure: Any = None) -> None:
        for master, p in zip(self.masters, self.weights, strict=True):
            master.grad = p.grad
        super().step()

    @torch.no_grad()
    def after(self) -> None:
        for master, p in zip(self.masters, self.weights, strict=True):
            p.copy_(master)


class Derived(torch.optim.Optimizer):
    """An Optimizer around another one: it takes hooks itself, and they are the right ones."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        super().__init__(weights, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)


class Unhooked(torch.optim.Optimizer):
    """An Optimizer by name that never called the base constructor: hooks on it would not fire."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattribute__(self, name: str) -> Any:
        if name in ("optimizer", "step", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "optimizer"), name)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)


class Nested(Outer):
    """Two wrappers deep; only the outer one writes."""

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.after()

    @torch.no_grad()
    def after(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(0.01)


class Renamed(Clipper):
    """The inner optimizer under another attribute."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer = optimizer

    @property
    def optimizer(self) -> Any:  # type: ignore[override]
        return self.base_optimizer


def accelerated(optimizer: torch.optim.Optimizer) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(optimizer, device_placement=False)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "Lookahead-like": SlowWeights,
    "clipper": Clipper,
    "master copies": MasterCopy,
    "an Optimizer around one": Derived,
    "an Optimizer that forwards all": Unhooked,
    "nested": lambda optimizer: Nested(Derived(optimizer)),
    "another attribute": Renamed,
    "accelerate": accelerated,
    "accelerate around Lookahead": lambda optimizer: accelerated(Derived(optimizer)),
}
RED_WRAPPED: dict[str, str] = {}


def trained_by(optimizer: Any, model: nn.Module, ema: EMA, naive: Naive, by_hand: bool) -> float:
    for _ in range(6):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        naive.update()
        if by_hand:
            ema.update()
    return naive.error(ema.gather())


@pytest.mark.parametrize("wrap", programs(WRAPPED, RED_WRAPPED))
def test_what_a_wrapper_writes_is_in_the_average_or_it_is_refused(wrap: Any) -> None:
    """Refused with the way out: `ema.update()` after the outer step."""
    model = net()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.5))
    naive, ema = Naive(model), EMA(model, 0.75)
    try:
        ema.attach(optimizer)
    except (ValueError, RuntimeError) as error:
        assert "ema.update()" in str(error)
        assert trained_by(optimizer, model, ema, naive, by_hand=True) <= 2e-5
    else:
        off = trained_by(optimizer, model, ema, naive, by_hand=False)
        assert off <= 2e-5, f"silent: off by {off:.4g}"


def test_accelerates_wrapper_is_peeled() -> None:
    """It takes no hooks itself and does nothing after the inner step, so no refusal is right."""
    model = net()
    optimizer = accelerated(torch.optim.SGD(model.parameters(), lr=0.5))
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(optimizer)
    assert trained_by(optimizer, model, ema, naive, by_hand=False) <= 2e-5


@pytest.fixture
def zero_module() -> Iterator[types.ModuleType]:
    """A module of the name that DeepSpeed's ZeRO optimizers live in."""
    module = types.ModuleType("deepspeed")
    sys.modules["deepspeed"] = module
    yield module
    del sys.modules["deepspeed"]


def test_a_zero_optimizer_is_refused_or_right(zero_module: types.ModuleType) -> None:
    model = net()
    kind = type("DeepSpeedZeroOptimizer", (MasterCopy,), {"__module__": "deepspeed.runtime.zero"})
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1))
    naive, ema = Naive(model), EMA(model, 0.75)
    try:
        ema.attach(optimizer)
    except (ValueError, RuntimeError) as error:
        assert "ema.update()" in str(error)
    else:
        assert trained_by(optimizer, model, ema, naive, by_hand=False) <= 2e-5


class ClimbsFirst(torch.optim.Optimizer):
    """SAM with a base optimizer inside, driven by first_step and second_step."""

    def __init__(self, params: Any, base: Any) -> None:
        params = list(params)
        super().__init__(params, {})
        self.base_optimizer = base(params, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("call first_step and second_step")


def test_two_phase_sam() -> None:
    """The climb writes before the step of the inner optimizer: followed, or named."""
    model = net()
    optimizer = ClimbsFirst(model.parameters(), torch.optim.SGD)
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(optimizer.base_optimizer)

    def train() -> float:
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.first_step()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.second_step()
            naive.update()
        return naive.error(ema.gather())

    outcome(train, ema.names())


def written_between(write: Callable[[nn.Module], None], overlap: bool, device: str | None) -> float:
    """Forced normalisation or a clamp between steps: averaged as the reference sees it, or
    named.
    """
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive, ema = Naive(model), EMA(model, 0.75, device=device)
    ema.attach(optimizer, overlap=overlap)
    for _ in range(6):
        random_step(optimizer)
        naive.update()
        write(model)
    return naive.error(ema.gather())


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


BETWEEN = {
    f"{place}, {'overlap' if overlap else 'inline'}": (in_place, overlap, device)
    for place, device in (("beside", None), ("host", "cpu"))
    for overlap in (True, False)
}
RED_BETWEEN: dict[str, str] = {}


@pytest.mark.parametrize("case", programs(BETWEEN, RED_BETWEEN))
def test_writes_between_steps(case: Any) -> None:
    outcome(lambda: written_between(*case), ["weight", "bias"])


class Projected:
    """A model and an attached EMA; what the optimizer's own hook writes belongs to the step."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.naive, self.ema = Naive(self.model), EMA(self.model, 0.75)
        self.ema.attach(self.optimizer)

    def project(self, *_: Any) -> None:
        in_place(self.model)

    def error(self, step: Callable[[], Any] | None = None) -> float:
        for _ in range(4):
            for p in self.model.parameters():
                p.grad = torch.randn_like(p)
            (step or self.optimizer.step)()
            self.naive.update()
        return self.naive.error(self.ema.gather())


def test_the_update_comes_after_hooks_that_were_registered_later() -> None:
    """Guards the order of hooks in `_before`, for two averages of one optimizer."""
    program = Projected()
    program.optimizer.register_step_post_hook(program.project)
    other = EMA(program.model, 0.5)
    other.attach(program.optimizer)
    assert program.error() <= 2e-5
    program.ema.detach()
    assert other.now == 4


@pytest.mark.parametrize("averages", [1, 2])
def test_the_update_comes_after_hooks_of_all_optimizers(averages: int) -> None:
    """torch runs these after those of the optimizer itself."""
    program = Projected()
    others = [EMA(program.model, 0.5) for _ in range(averages - 1)]
    for other in others:
        other.attach(program.optimizer)
    handle = register_optimizer_step_post_hook(program.project)
    try:
        assert program.error() <= 2e-5
    finally:
        handle.remove()
    assert [other.now for other in others] == [4] * len(others)


def copied_alone(model: nn.Module, optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def copied_with_its_weights(model: nn.Module, optimizer: Any) -> Any:
    """Its state is its own, and it steps the model's weights."""
    return copy.deepcopy(optimizer, {id(p): p for p in model.parameters()})


@pytest.mark.parametrize("make", [copied_alone, copied_with_its_weights])
def test_a_copy_of_an_attached_optimizer(make: Any) -> None:
    """A copy has no hooks. It steps copies of the weights, or is named as one not attached."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(optimizer)
    random_step(optimizer)
    naive.update()
    before, other = copy.deepcopy(model.state_dict()), make(model, optimizer)
    for _ in range(2):
        random_step(other)
    if make is copied_alone:
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        assert naive.error(ema.gather()) <= 2e-5
    else:
        with pytest.warns(UserWarning, match="Was ema.attach.. given the optimizer that steps"):
            ema.gather()


def test_experts_without_tokens_are_named_once() -> None:
    """Optimizers in backward: a round ends when the last expert has had a gradient."""
    experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    optimizers = one_each(experts)
    for p, optimizer in zip(experts.parameters(), optimizers, strict=True):
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    ema = EMA(experts, 0.75)
    ema.attach(*optimizers)

    def train() -> None:
        for chosen in (0, 1, 0, 0, 0, 1):
            experts[chosen](torch.ones(1, 4)).sum().backward()

    with pytest.warns(UserWarning, match="1 of 2 optimizers did not step in the last b") as caught:
        train()
    assert (len(caught), ema.now) == (1, 2)


def clamped_by_hand(program: Projected) -> None:
    """What weight clippers and constraint libraries do."""
    inner = program.optimizer.step

    def step() -> None:
        inner()
        program.project()

    program.optimizer.step = step  # type: ignore[method-assign, assignment]


def scheduled(program: Projected) -> None:
    torch.optim.lr_scheduler.ExponentialLR(program.optimizer, 0.9)


def scheduled_in_accelerate(program: Projected) -> None:
    accelerated(program.optimizer)
    scheduled(program)


def test_a_step_that_was_replaced_on_the_optimizer_is_named_once() -> None:
    program = Projected()
    clamped_by_hand(program)
    with pytest.warns(UserWarning, match="SGD.step was replaced on the optimizer") as caught:
        program.error()
    assert len(caught) == 1


def replaced_on_the_class(wrapped: bool) -> type[torch.optim.SGD]:
    """A class whose step somebody replaces when it was used already, as some libraries do."""

    class Patched(torch.optim.SGD):
        pass

    Patched([nn.Parameter(torch.ones(1))], lr=0.1)
    inner = Patched.step

    def step(self: Any, closure: Any = None) -> Any:
        result = inner(self, closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.9)
        return result

    Patched.step = functools.wraps(inner)(step) if wrapped else step  # type: ignore[method-assign]
    return Patched


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_is_replaced_on_the_class_later_is_named(wrapped: bool) -> None:
    """The hooks fire inside it, before what it writes."""

    class Patched(torch.optim.SGD):
        pass

    program = Projected()
    program.ema.detach()
    optimizer = Patched(program.model.parameters(), lr=0.1)
    program.ema.attach(optimizer)
    Patched.step = replaced_on_the_class(wrapped).step  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"Patched\.step was replaced on .* its class"):
        program.error(optimizer.step)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_was_replaced_on_the_class_before_is_right_or_named(wrapped: bool) -> None:
    """torch puts its hooks around it again, unless it looks as if it had them."""
    program = Projected()
    program.ema.detach()
    optimizer = replaced_on_the_class(wrapped)(program.model.parameters(), lr=0.1)
    program.ema.attach(optimizer)
    if not wrapped:
        assert program.error(optimizer.step) <= 2e-5
        return
    with pytest.warns(UserWarning, match=r"Patched\.step was replaced on .* its class"):
        program.error(optimizer.step)


class Scaled(torch.optim.Adam):
    """Its step calls that of its parent, and goes on to write."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.9)
        return result


class ScaledTwice(Scaled):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.clamp_(-0.3, 0.3)
        return result


@pytest.mark.parametrize("kind", [Scaled, ScaledTwice])
@pytest.mark.parametrize("parents", [(), (torch.optim.Adam,), (torch.optim.Adam, Scaled)])
def test_a_step_inside_a_step_is_no_step(kind: Any, parents: Any) -> None:
    """torch runs the hooks of a parent's step too, once an instance of the parent was made."""
    for parent in parents:
        random_step(parent([nn.Parameter(torch.ones(1))]))
    program = Projected()
    program.ema.detach()
    optimizer = kind(program.model.parameters(), lr=0.1)
    program.ema.attach(optimizer)
    assert program.error(optimizer.step) <= 2e-5
    assert program.ema.now == 4


@pytest.mark.parametrize("replace", [scheduled, scheduled_in_accelerate])
def test_steps_that_libraries_replace_are_not_named(replace: Any) -> None:
    """Warnings are errors here."""
    program = Projected()
    replace(program)
    assert program.error() <= 2e-5


def test_another_optimizer_that_steps_instead_is_named() -> None:
    """A second phase of training with an optimizer that nobody attached."""
    program = Projected()
    program.error()
    for _ in range(2):
        random_step(torch.optim.SGD(net().parameters(), lr=0.1))  # of another model
    program.ema.gather()
    second = torch.optim.Adam(program.model.parameters())
    random_step(program.optimizer)
    random_step(second)
    random_step(second)
    with pytest.warns(UserWarning, match="no update came"):
        program.ema.gather()


def test_one_of_two_optimizers_that_was_replaced_is_named() -> None:
    """`optimizer = type(optimizer)(...)` in the middle of a run: rounds end no more.

    Guards that only a round forgets steps of other optimizers, and no step of the one that is left.
    """
    model = net()
    ema = EMA(model, 0.75)
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    ema.attach(first, second)
    for optimizer in (first, second):
        random_step(optimizer)
    second = type(second)(model[2].parameters(), lr=0.05)
    for optimizer in (first, second) * 2:
        random_step(optimizer)
    with pytest.warns(UserWarning, match="no update came"):
        ema.gather()


class Fused(torch.optim.Optimizer):
    """LOMO: writes each weight as soon as its gradient is there, and its `step` is never called."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self.write)

    def write(self, p: Tensor) -> None:
        p.data.add_(p.grad, alpha=-0.1)  # type: ignore[arg-type]
        p.grad = None


def in_the_backward(model: nn.Module, ema: EMA) -> None:
    ema.attach(Fused(model.parameters()))
    model(torch.randn(2, 4)).sum().backward()


def by_a_kernel(model: nn.Module, ema: EMA) -> None:
    """As optimizers write that are compiled by others: torch does not count it."""
    for p in model.parameters():
        p.detach().numpy()[...] += 1


@pytest.mark.parametrize("train", [in_the_backward, by_a_kernel])
def test_training_that_no_counter_counts_and_no_update_follows_is_named(train: Any) -> None:
    """Guards the samples in `mark`. An evaluation in between writes nothing."""
    model = net()
    ema = EMA(model, 0.5)
    with ema.swap(), torch.no_grad():
        model(torch.randn(2, 4))
    train(model, ema)
    with pytest.warns(UserWarning, match="no update came"):
        ema.gather()
    ema.gather()


def test_an_update_is_not_traced_with_a_compiled_step() -> None:
    """Tracing took minutes for 200 weights; a storage that moves is still followed."""
    program = Projected()
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    step = torch.compile(lambda: program.optimizer.step(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert program.error(step) <= 2e-5
        assert graphs["unique_graphs"] == 1, "other graphs are those of the update"
        for p in program.model.parameters():
            p.data = p.data.clone()
        assert program.error(step) <= 2e-5


def test_an_optimizer_of_copies_is_named() -> None:
    """Master weights: the model gets what was stepped only after the step, so the average would be
    late.
    """
    model = nn.Linear(4, 4).bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    ema = EMA(model, 0.5)
    with pytest.warns(UserWarning, match="SGD holds none of the averaged weights"):
        ema.attach(torch.optim.SGD(masters, lr=0.1))


def test_an_optimizer_of_copies_of_some_weights_is_named() -> None:
    """Masters of the 16-bit weights, and the norms themselves."""
    model: Any = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4))
    masters = [nn.Parameter(p.detach().float()) for p in model[0].parameters()]
    ema = EMA(model, 0.5)
    with pytest.warns(UserWarning, match=r"in place of 0\.weight, 0\.bias, it seems"):
        ema.attach(torch.optim.SGD([*masters, *model[1].parameters()], lr=0.1))


@pytest.mark.parametrize("named", [True, False])
def test_a_listed_weight_whose_module_was_replaced_is_named(named: bool) -> None:
    """A list of parameters does not know the module."""
    model: Any = net()
    ema = EMA(model.named_parameters() if named else model.parameters(), 0.5)
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    ema.detach()
    model[2] = type(model[2])(model[2].in_features, model[2].out_features)
    with pytest.warns(UserWarning, match="the module was replaced") as caught:
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert ema.names()[-1] in str(caught[0].message)


def test_optimizers_of_views_and_beside_others_are_known() -> None:
    """Warnings are errors here: a flat buffer that the weights are views of, and a GAN's two."""
    model = nn.Linear(4, 4)

    def flattened() -> torch.optim.Optimizer:
        flat = nn.Parameter(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        torch.nn.utils.vector_to_parameters(flat.detach(), model.parameters())
        return torch.optim.SGD([flat], lr=0.1)

    before = flattened()
    ema = EMA(model, 0.5)
    for optimizer in (before, flattened()):
        ema.attach(optimizer)
        ema.detach()
    other = nn.Linear(4, 4)
    ema.attach(
        torch.optim.SGD(other.parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
    )


@pytest.mark.parametrize("every", [1, 2])
def test_updates_by_hand_beside_attached_ones_are_named_once(every: int) -> None:
    """A line that was left in the loop moves the average twice."""
    model = nn.Linear(2, 2)
    ema, optimizer = EMA(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer, every=every)

    def loop(steps: int) -> None:
        for _ in range(steps):
            random_step(optimizer)
            ema.update()

    with pytest.warns(UserWarning, match="each step moves the average twice"):
        loop(9)
    loop(9)


def test_an_update_by_hand_at_the_end_of_an_epoch_is_not_named() -> None:
    model = nn.Linear(2, 2)
    ema, optimizer = EMA(model, 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    for _ in range(5):
        random_step(optimizer)
        random_step(optimizer)
        ema.update()
