"""What a block writes while weights are lent: named, and the same in every dtype; what is taken out
of it.
"""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ema import EMA
from dist_ema.sharding.fingerprint import bit_sums
from tests.living import programs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4, max_norm=0.5)
        self.body = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.lora = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.body(self.emb(x)))


def renormed(m: Net) -> None:
    m(torch.arange(6))


def merged(m: Net) -> None:
    m.frozen.weight += m.lora


def normalised(m: Net) -> None:
    """EDM2's forced weight normalisation."""
    m.body.weight.copy_(F.normalize(m.body.weight, dim=1))


def clamped(m: Net) -> None:
    m.body.weight.clamp_(-0.01, 0.01)


def bias_zeroed(m: Net) -> None:
    nn.init.zeros_(m.body.bias)


def row_written(m: Net) -> None:
    m.lora[0] = 3.0


def frozen_bias(m: Net) -> None:
    m.frozen.bias.add_(1)


def loaded(m: Net) -> None:
    m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()})


def assigned(m: Net) -> None:
    """A storage that moves with other values: `vector_to_parameters`, a cast there and back."""
    m.body.weight.data = m.body.weight.data + 1


def frozen_assigned(m: Net) -> None:
    m.frozen.weight.data = m.frozen.weight.data.round()


def uncounted(m: Net) -> None:
    """`.data` has a version counter of its own: averages of other libraries copy so."""
    m.body.weight.data.copy_(m.lora.detach())


def by_numpy(m: Net) -> None:
    """One element of the last column, through memory that torch does not know of."""
    m.lora.detach().view(torch.uint8).numpy()[0, -1] ^= 0x40


WRITES: dict[str, tuple[Callable[[Any], None], str]] = {
    "max_norm": (renormed, "emb.weight"),
    "merge left merged": (merged, "frozen.weight"),
    "forced normalisation": (normalised, "body.weight"),
    "clamp": (clamped, "body.weight"),
    "init": (bias_zeroed, "body.bias"),
    "a row": (row_written, "lora"),
    "frozen bias": (frozen_bias, "frozen.bias"),
    "load_state_dict": (loaded, "body.weight"),
    "data": (assigned, "body.weight"),
    "frozen data": (frozen_assigned, "frozen.weight"),
    "data in place": (uncounted, "body.weight"),
    "NumPy": (by_numpy, "lora"),
}
OPTIONS: dict[str, Any] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp64": (torch.float64, {"dtype": torch.float64}),
    "host": (torch.float32, {"device": "cpu"}),
    "compact": (torch.float32, {"dtype": torch.bfloat16}),
}
CASES = {
    f"{write}, {option}": (*WRITES[write], *OPTIONS[option])
    for write in WRITES
    for option in OPTIONS
}
RED: dict[str, str] = {}


def written_inside(ema: EMA, write: Callable[[Any], None], model: nn.Module) -> str:
    """What the exit says, by a warning or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with ema.swap(), torch.no_grad():
                write(model)
        except RuntimeError as error:
            return str(error)
    return " ".join(str(each.message) for each in caught)


def unlike(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of lent weights that are not what they were; an error about a frozen one is enough."""
    return [
        name
        for name, value in model.state_dict().items()
        if "frozen" not in name and not torch.equal(value, before[name])
    ]


@pytest.mark.parametrize("case", programs(CASES, RED))
def test_a_write_is_named_and_live_is_restored(case: Any) -> None:
    """By a warning or an error at the exit, whatever is decided for the average."""
    write, name, dtype, options = case
    torch.manual_seed(0)
    model = Net().to(dtype)
    ema = EMA(model, 0.5, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    ema.update()
    live = copy.deepcopy(model.state_dict())
    message = written_inside(ema, write, model)
    assert unlike(model, live) == []
    assert name in message, f"the write into {name} is silent"


RED_SAME: dict[str, str] = {}


@pytest.mark.parametrize("write", programs(WRITES, RED_SAME))
def test_a_write_has_one_meaning_in_every_dtype_and_placement(write: Any) -> None:
    """Either every average keeps the write, or none does."""
    kept = {}
    for title, (dtype, options) in OPTIONS.items():
        torch.manual_seed(0)
        model = Net().to(dtype)
        ema = EMA(model, 0.5, **options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.ones_like(p))
        ema.update()
        before = ema.gather()[write[1]].double()
        written_inside(ema, write[0], model)
        kept[title] = not torch.allclose(before, ema.gather()[write[1]].double(), atol=1e-2)
    assert len(set(kept.values())) == 1, f"kept: {kept}"


def test_a_pure_evaluation_names_nothing() -> None:
    """Warnings are errors here."""
    model = Net()
    model.emb.max_norm = None
    ema = EMA(model, 0.5)
    ema.update()
    with ema.swap(), torch.no_grad():
        model(torch.arange(6))
        model.train()
        model(torch.arange(6))
        model.double().float()  # moves every storage, with the same values


@pytest.mark.parametrize("begin", range(0, 9, 3))
def test_sums_of_bits_hold_every_byte(begin: int) -> None:
    """Of views that begin and end between words."""
    memory = torch.arange(64, dtype=torch.uint8)
    view = memory[begin : begin + 21]
    before = bit_sums([view])
    for place in range(21):
        view[place] += 1
        assert bit_sums([view]) != before
        view[place] -= 1
    assert bit_sums([view]) == before


def test_gradients_inside_the_block_are_no_writes() -> None:
    model = Net()
    model.emb.max_norm = None
    ema = EMA(model, 0.5)
    with ema.swap():
        model(torch.arange(6)).sum().backward()


def test_an_optimizer_that_steps_inside_is_named() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"swap|weight"), ema.swap():
        model(torch.randn(3, 2)).sum().backward()
        optimizer.step()


def replaced_inside(m: Any) -> None:
    m.body = nn.Linear(4, 4)


def assigned_inside(m: Any) -> None:
    m.load_state_dict({name: v.clone() for name, v in m.state_dict().items()}, assign=True)


def removed_inside(m: Any) -> None:
    """As inference recipes fold weight norms and batch norms."""
    m.body = nn.Identity()


@pytest.mark.parametrize("edit", [replaced_inside, assigned_inside, removed_inside])
def test_a_weight_that_leaves_the_model_inside_is_named(edit: Any) -> None:
    """Its live value cannot be put back: guards `_edits` in swap."""
    model = Net()
    ema = EMA(model, 0.5)
    with pytest.warns(UserWarning, match="inside ema.swap") as caught, ema.swap():
        edit(model)
    assert re.search(r"body\.weight.* was replaced or removed", str(caught[-1].message))
    with pytest.raises(RuntimeError, match=r"body\.weight"):
        ema.update()


def fused_inside(m: Any) -> None:
    """As diffusers fuses projections: another layer beside those that it is made of."""
    m.fused = nn.Linear(4, 4)


def frozen_replaced_inside(m: Any) -> None:
    m.frozen.weight = nn.Parameter(m.frozen.weight + m.lora, requires_grad=False)


def frozen_deleted_inside(m: Any) -> None:
    del m.frozen


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (fused_inside, "fused.weight"),
        (frozen_replaced_inside, "frozen.weight"),
        (frozen_deleted_inside, "frozen.weight"),
    ],
)
def test_a_weight_that_the_block_registers_is_named(edit: Any, name: str) -> None:
    """It stays in the model, and may be made of the average: guards `_edits` in swap."""
    model = Net()
    ema = EMA(model, 0.5)
    with pytest.warns(UserWarning, match=rf"^{name}.* is not averaged and was written"), ema.swap():
        edit(model)


def test_frozen_weights_that_the_block_brings_are_not_named() -> None:
    """Metrics bring networks of their own."""
    model = Net()
    with EMA(model, 0.5).swap():
        model.metric = nn.Linear(2, 2).requires_grad_(False)


def test_a_module_that_leaves_and_comes_back_inside_is_not_named() -> None:
    model = Net()
    ema, body = EMA(model, 0.5), model.body
    with ema.swap():
        model.body = nn.Identity()  # type: ignore[assignment]
        model.body = body
    ema.update()


def test_a_block_that_raises_restores_what_it_wrote() -> None:
    model = Net()
    ema = EMA(model, 0.5)
    ema.update()
    live = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.swap(), torch.no_grad():
        clamped(model)
        merged(model)
        raise KeyError("evaluation failed")
    assert unlike(model, live) == []


def test_the_average_goes_on_rightly_after_a_write() -> None:
    """Whatever is decided at the exit, the next update starts from what `gather` shows."""
    model = nn.Linear(3, 3, bias=False)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    written_inside(ema, lambda m: nn.init.zeros_(m.weight), model)
    shown = ema.gather()["weight"]
    ema.update()
    assert torch.allclose(ema.gather()["weight"], (shown + model.weight.detach()) / 2, atol=1e-6)


def test_what_is_serialised_inside_the_block_is_the_average() -> None:
    """And what is only referenced is live afterwards: the rule is to serialise inside."""
    model = nn.Linear(3, 3)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    with ema.swap():
        copied, referenced = copy.deepcopy(model.state_dict()), model.state_dict()
        whole = copy.deepcopy(model)
    x = torch.randn(2, 3)
    assert torch.equal(copied["weight"], ema.gather()["weight"])
    assert torch.equal(referenced["weight"], model.weight)
    with ema.swap():
        assert torch.equal(whole(x), model(x))


def traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, x)


def serialised(model: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    return torch.jit.load(file)  # type: ignore[no-untyped-call]


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).module()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("take", "is_live"), [(traced, True), (exported, True), (serialised, False)]
)
def test_programs_taken_out_of_the_block(take: Any, is_live: bool) -> None:
    """A trace and an exported program refer to the model's memory, and a file of one does not."""
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    with ema.swap():
        program, average = take(model, x), model(x).detach()
        assert torch.equal(program(x), average)
    assert torch.equal(program(x), model(x) if is_live else average)
    assert not torch.equal(model(x), average)


def test_the_docstring_of_swap_says_what_happens_to_writes_and_references() -> None:
    text = " ".join((EMA.swap.__doc__ or "").split())
    assert "inside" in text
    assert "state_dict()" in text or "serialis" in text


def test_swaps_that_are_left_in_another_order_are_named_and_restore_live() -> None:
    """Two callbacks swap before an evaluation and restore after it, the first one first."""
    model = Net()
    outer, inner = EMA(model, 0.5), EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    outer.update()
    inner.update()
    live = copy.deepcopy(model.state_dict())
    averages = [ema.gather() for ema in (outer, inner)]
    first, second = outer.swap(), inner.swap()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert all(map(torch.equal, model.state_dict().values(), live.values()))
    for ema, average in zip((outer, inner), averages, strict=True):
        assert all(map(torch.equal, ema.gather().values(), average.values()))
