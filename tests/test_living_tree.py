"""The module tree changes after the EMA was built: every verb sees it, and `rescan` adopts it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from dist_ema import EMA, load_file
from tests.living import Program, distance, outcome, programs, random_step


class Low(nn.Module):
    """A linear layer with an adapter of rank 2, frozen below it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, 2))

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.lora_b @ self.lora_a
        return self.base


class Tree(nn.Module):
    """Named branches for the edits: two of one shape, a list, a tied pair, an adapter, a frozen
    layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.scales = nn.ParameterList([torch.ones(4)])
        self.branches = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
        self.emb, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.emb.weight
        self.low = Low(nn.Linear(4, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.normed = weight_norm(nn.Linear(4, 2))


class Quantity(nn.Module):
    """A key in the state_dict that no parameter or buffer explains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.absmax = nn.Parameter(torch.ones(2)), torch.ones(1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "absmax"] = self.absmax


def fresh(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def replaced_head(m: Tree) -> None:
    m.head = nn.Linear(4, 3)


def resized_head(m: Tree) -> None:
    m.head = nn.Linear(4, 7)


def replaced_by_a_copy(m: Tree) -> None:
    m.head.weight = nn.Parameter(m.head.weight.detach().clone())


def two_layers_exchanged(m: Tree) -> None:
    m.body, m.neck = m.neck, m.body


def added(m: Tree) -> None:
    m.add_module("extra", nn.Linear(3, 3))


def registered(m: Tree) -> None:
    m.head.register_parameter("gain", fresh(3))


def appended(m: Tree) -> None:
    m.scales.append(fresh(4))


def deleted(m: Tree) -> None:
    del m.neck


def popped(m: Tree) -> None:
    m.branches.pop("b")


def renamed(m: Tree) -> None:
    m.branches["c"] = m.branches.pop("b")


def bias_removed(m: Tree) -> None:
    m.head.bias = None


def tied_later(m: Tree) -> None:
    m.neck.weight = m.body.weight


def untied_later(m: Tree) -> None:
    m.out.weight = nn.Parameter(m.emb.weight.detach().clone())


def lora_injected(m: Tree) -> None:
    m.body = Low(m.body)  # type: ignore[assignment]


def lora_merged(m: Tree) -> None:
    m.low = m.low.merged()  # type: ignore[assignment]


def weight_norm_later(m: Tree) -> None:
    weight_norm(m.head)


def weight_norm_removed(m: Tree) -> None:
    parametrize.remove_parametrizations(m.normed, "weight")


def pruned(m: Tree) -> None:
    prune.random_unstructured(m.head, "weight", amount=0.5)


def unfrozen(m: Tree) -> None:
    m.frozen.requires_grad_(True)


def frozen_module(m: Tree) -> None:
    m.add_module("extra", nn.Linear(3, 3).requires_grad_(False))


def frozen_weight_replaced(m: Tree) -> None:
    m.frozen = nn.Linear(2, 2).requires_grad_(False)


def frozen_layer_deleted(m: Tree) -> None:
    del m.frozen


def new_buffer(m: Tree) -> None:
    m.register_buffer("prior", torch.randn(3))


def new_integer_buffer(m: Tree) -> None:
    m.head.register_buffer("seen", torch.tensor(3))


def buffer_inside_a_new_module(m: Tree) -> None:
    m.add_module("extra", nn.BatchNorm1d(3, affine=False))


def transient_buffer(m: Tree) -> None:
    m.register_buffer("cache", torch.randn(3), persistent=False)


# title -> the edit, and what an error may name
EDITS: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "replaced head": (replaced_head, ["head."]),
    "resized head": (resized_head, ["head."]),
    "replaced by a copy": (replaced_by_a_copy, ["head.weight"]),
    "two layers exchanged": (two_layers_exchanged, ["body.", "neck."]),
    "added": (added, ["extra."]),
    "registered": (registered, ["head.gain"]),
    "appended": (appended, ["scales.1"]),
    "deleted": (deleted, ["neck."]),
    "popped": (popped, ["branches.b"]),
    "renamed": (renamed, ["branches."]),
    "bias removed": (bias_removed, ["head.bias"]),
    "tied later": (tied_later, ["neck.weight", "body.weight"]),
    "untied later": (untied_later, ["out.weight", "emb.weight"]),
    "lora injected": (lora_injected, ["body."]),
    "lora merged": (lora_merged, ["low."]),
    "weight norm later": (weight_norm_later, ["head."]),
    "weight norm removed": (weight_norm_removed, ["normed."]),
    "pruned": (pruned, ["head."]),
    "unfrozen": (unfrozen, ["frozen."]),
}
ADOPTED: dict[str, Callable[[Any], None]] = {
    "frozen module": frozen_module,
    "frozen weight replaced": frozen_weight_replaced,
    "frozen layer deleted": frozen_layer_deleted,
    "new buffer": new_buffer,
    "new integer buffer": new_integer_buffer,
    "buffers of a new module": buffer_inside_a_new_module,
    "transient buffer": transient_buffer,
}
RED_VERBS: dict[str, str] = {}
RED_RESCAN: dict[str, str] = {}
RED_ADOPTED: dict[str, str] = {}


@pytest.mark.parametrize("edit", programs(EDITS, RED_VERBS))
def test_every_verb_sees_the_edit(edit: Any, tmp_path: Path) -> None:
    change, names = edit
    program = Program(Tree())
    program.step(3)
    change(program.model)
    for verb, call in program.verbs(tmp_path).items():
        assert outcome(call, names) == "raised", f"{verb} did not raise"


@pytest.mark.parametrize("edit", programs(EDITS, RED_RESCAN))
def test_rescan_adopts_the_edit(edit: Any, tmp_path: Path) -> None:
    program = Program(Tree())
    program.step(3)
    edit[0](program.model)
    program.ema.rescan()
    program.naive.rescan()
    program.renew()
    program.step(3)
    for verb, call in program.verbs(tmp_path).items():
        off = call()
        assert off <= 2e-5, f"{verb} is off by {off}"
    named = {name for name, p in program.model.named_parameters() if p.requires_grad}
    assert set(program.ema.names()) == named


@pytest.mark.parametrize("change", programs(ADOPTED, RED_ADOPTED))
def test_what_is_not_trained_is_adopted(change: Any, tmp_path: Path) -> None:
    """Without `rescan`: it is live's, and belongs into files."""
    program = Program(Tree())
    program.step(3)
    change(program.model)
    program.step(2)
    for verb, call in program.verbs(tmp_path).items():
        off = call()
        assert off <= 2e-5, f"{verb} is off by {off}"


OTHER_VERBS: dict[str, Callable[[EMA, Path], Any]] = {
    "state_dict": lambda ema, path: ema.state_dict(),
    "load_state_dict": lambda ema, path: ema.load_state_dict(torch.load(path / "state.pt")),
    "load": lambda ema, path: ema.load(path / "saved"),
    "metrics": lambda ema, path: ema.metrics(),
    "copy_to": lambda ema, path: ema.copy_to(Tree()),
    "reset": lambda ema, path: ema.reset(),
}
RED_OTHER: dict[str, str] = {}


@pytest.mark.parametrize("verb", programs(OTHER_VERBS, RED_OTHER))
def test_the_other_verbs_walk_too(verb: Any, tmp_path: Path) -> None:
    program = Program(Tree())
    program.step(2)
    program.ema.save(tmp_path / "saved")
    torch.save(program.ema.state_dict(), tmp_path / "state.pt")
    replaced_head(program.model)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"head\."):
        verb(program.ema, tmp_path)


@pytest.mark.parametrize("trained", [False, True])
def test_weights_that_are_registered_anew_and_not_averaged_are_live(trained: bool) -> None:
    """A hypernetwork registers them at every step: frozen ones, or what `only=` leaves out."""
    model: Any = nn.ModuleDict({"maker": nn.Linear(2, 4), "made": nn.Linear(2, 2)})
    model["made"].requires_grad_(trained)
    program = Program(model, only="^maker" if trained else None)
    for _ in range(4):
        made = model["maker"].weight.detach()[:2].clone()
        model["made"].weight = nn.Parameter(made, requires_grad=trained)
        program.step()
        assert torch.equal(program.ema.gather()["made.weight"], made)
    with program.ema.swap():
        assert torch.equal(model["made"].weight, made)


def test_a_frozen_object_under_the_name_of_a_trained_weight_is_named() -> None:
    """Its average has ended, and `rescan` says so; live's until then would be a silent end."""
    program = Program(Tree())
    program.step(2)
    program.model.body.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"^body\.weight no longer shares memory"):
        program.ema.gather()
    program.ema.rescan()
    assert "body.weight" not in program.ema.names()


def test_a_weight_that_becomes_a_buffer_is_live() -> None:
    """The same tensor object may be registered as one, and was averaged before."""
    model = nn.Module()
    model.layer, model.codes = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    program = Program(model)
    program.step(2)
    codes = model.codes
    del model.codes
    model.register_buffer("codes", codes.requires_grad_(False))
    with pytest.raises(RuntimeError, match="codes is gone from the model"):
        program.ema.gather()
    program.ema.rescan()
    program.naive.rescan()
    program.renew()
    program.step(2)
    codes.add_(1)
    assert max(program.gather(), program.swap()) < 1e-5


def test_only_decides_whether_a_new_weight_is_one() -> None:
    """A second adapter is a weight of `only=`; a new head is not, and is live's."""
    program = Program(Tree(), only="lora_")
    program.step(2)
    program.model.add_module("extra", nn.Linear(3, 3))
    gathered = program.ema.gather()
    assert torch.equal(gathered["extra.weight"], program.model.extra.weight)
    program.model.low.register_parameter("lora_c", fresh(2))
    with pytest.raises(RuntimeError, match="lora_c"):
        program.ema.gather()


def test_an_adapter_merged_and_unloaded() -> None:
    """Nothing is left of what `only=` names: the verb says so, it does not lend an orphan."""
    program = Program(Tree(), only="lora_")
    program.step(2)
    program.model.low = program.model.low.merged()
    with pytest.raises(RuntimeError, match="lora_"), program.ema.swap():
        pass


def test_a_module_shared_later_follows_its_owner() -> None:
    """After `rescan` both names hold one average, and a file restores both."""
    program = Program(Tree())
    program.step(2)
    program.model.neck = program.model.body
    with pytest.raises(RuntimeError, match=r"neck\."):
        program.ema.gather()
    program.ema.rescan()
    program.naive.rescan()
    program.renew()
    program.step(2)
    assert program.gather() <= 2e-5
    assert program.swap() <= 2e-5


def test_edits_twice_with_a_rescan_each() -> None:
    program = Program(Tree())
    for change in (added, deleted, replaced_head, appended):
        change(program.model)  # type: ignore[arg-type]
        program.ema.rescan()
        program.naive.rescan()
        program.renew()
        program.step(2)
    assert program.gather() <= 2e-5
    assert program.swap() <= 2e-5


def test_the_clock_goes_on_over_a_rescan() -> None:
    """What is not touched by the edit keeps its average."""
    program = Program(Tree())
    program.step(5)
    kept = program.ema.gather()["body.weight"]
    replaced_head(program.model)  # type: ignore[arg-type]
    program.ema.rescan()
    assert program.ema.now == 5
    gathered = program.ema.gather()
    assert torch.equal(gathered["body.weight"], kept)
    assert torch.equal(gathered["head.weight"], program.model.head.weight)


def test_keys_that_nothing_explains_are_named(tmp_path: Path) -> None:
    """Quantization state: the average of the weight beside live's scale is no model."""
    model = nn.ModuleDict({"q": Quantity(), "plain": nn.Linear(2, 2)})
    ema = EMA(model, 0.5)
    for verb in (ema.save, ema.export):
        with pytest.warns(UserWarning, match=r"q\.absmax of the state_dict is no plain parameter"):
            verb(tmp_path / verb.__name__)


def test_keys_added_by_a_hook_are_named(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model._register_state_dict_hook(
        lambda module, state, prefix, _: state.update({prefix + "scale": torch.ones(1)})
    )
    ema = EMA(model, 0.5)
    for verb in (ema.save, ema.export):
        with pytest.warns(UserWarning, match="scale"):
            verb(tmp_path / verb.__name__)


class Scaled(nn.Linear):
    """Keeps its weight in another scale in files: the key is the weight's, the value is not."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight * 2


def exchanged(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    """A value that is recorded, under the name of another one."""
    state[prefix + "weight"] = module.bias


def halved(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].half()


def cloned(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].clone()


def hooked(hook: Any) -> nn.Module:
    linear = nn.Linear(2, 2)
    linear._register_state_dict_hook(hook)
    return linear


@pytest.mark.parametrize("make", [Scaled, exchanged, halved], ids=lambda make: make.__name__)
def test_other_values_under_the_name_of_a_weight_are_named(make: Any, tmp_path: Path) -> None:
    inner = make(2, 2) if make is Scaled else hooked(make)
    ema = EMA(nn.ModuleDict({"q": inner, "plain": nn.Linear(2, 2)}), 0.5)
    for verb in (ema.export, ema.save, lambda _: ema.gather()):
        with pytest.warns(UserWarning, match=r": q\.weight of the state_dict is"):
            verb(tmp_path / "files")


def test_a_copy_under_the_name_of_a_weight_needs_no_warning(tmp_path: Path) -> None:
    EMA(hooked(cloned), 0.5).save(tmp_path / "saved")  # warnings are errors here


@pytest.mark.parametrize("state", [None, {"encoder": {"w": 1}}])
def test_a_state_dict_of_the_model_s_own_stops_no_verb(state: Any, tmp_path: Path) -> None:
    class Own(nn.Linear):
        def state_dict(self) -> Any:  # type: ignore[override]
            return state

    ema = EMA(Own(2, 2), 0.5)
    for verb in (ema.save, ema.export):
        with pytest.warns(UserWarning, match="encoder") if state else nullcontext():
            verb(tmp_path / verb.__name__)
    assert set(ema.gather()) == set(load_file(tmp_path / "save")) == {"weight", "bias"}
    EMA(nn.Sequential(Own(2, 2)), 0.5).save(tmp_path / "inside")  # where torch itself fails


def test_extra_state_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.ones(2)

        def set_extra_state(self, state: Any) -> None:
            pass

    ema = EMA(nn.Sequential(Extra(2, 2)), 0.5)
    with pytest.warns(UserWarning, match="_extra_state"):
        ema.save(tmp_path / "saved")


def test_unfreezing_is_noticed_at_the_next_update() -> None:
    """Gradual unfreezing: an average that begins 98 updates late is another one."""
    program = Program(Tree())
    program.step(5)
    unfrozen(program.model)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"frozen\."):
        program.step()


def test_unfreezing_without_an_attached_optimizer() -> None:
    model = Tree()
    ema = EMA(model, 0.5)
    for _ in range(5):
        ema.update()
    unfrozen(model)
    with pytest.raises(RuntimeError, match=r"frozen\."):
        ema.update()


def test_freezing_is_followed_or_named() -> None:
    """A layer frozen in mid-training: its average goes on towards live, or is live, or an error."""
    program = Program(Tree())
    program.step(3)
    program.model.body.requires_grad_(False)

    def train() -> float:
        program.renew()
        for _ in range(3):
            random_step(program.optimizer)
            program.naive.update()
        gathered = program.ema.gather()
        if torch.equal(gathered["body.weight"], program.model.body.weight):
            program.naive.rescan()  # live's from now on
        return program.naive.error(gathered)

    outcome(train, ["body."])


def test_a_file_holds_what_the_model_is(tmp_path: Path) -> None:
    """The case of a resized classifier: after `rescan` the file loads into the new model,
    strictly.
    """
    program = Program(Tree())
    program.step(2)
    resized_head(program.model)  # type: ignore[arg-type]
    program.ema.rescan()
    program.ema.export(tmp_path / "out")
    other = Tree()
    resized_head(other)
    other.load_state_dict(load_file(tmp_path / "out"), strict=True)
    assert distance(program.ema.gather(), other.state_dict()) == 0


def test_a_complex_weight_that_is_unfrozen_is_noticed_too() -> None:
    """At the next update, long after the first ones.

    Guards `can_average`, which both looks share.
    """
    model = nn.Module()
    model.real = nn.Parameter(torch.ones(2))
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    ema = EMA(model, 0.5)
    for _ in range(4):
        ema.update()
    model.phase.requires_grad_(True)
    with pytest.raises(RuntimeError, match="phase became trainable"):
        ema.update()


def test_an_averaged_buffer_that_is_gone_is_named() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2))
    ema = EMA(model, 0.5, buffers="average")
    ema.update()
    del model.scale
    with pytest.raises(RuntimeError, match="scale is gone"):
        ema.gather()
    ema.rescan()
    assert sorted(ema.gather()) == ["bias", "weight"]


def test_rescan_seeds_a_weight_that_was_resized_in_place() -> None:
    """The same Parameter with more rows: its old shadow cannot go on."""
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    program = Program(model)
    program.step(3)
    kept = program.ema.gather()["1.weight"]
    model[0].weight.data = torch.cat([model[0].weight.data, torch.ones(3, 2)])
    program.ema.rescan()
    weights = program.ema.gather()
    assert torch.equal(weights["0.weight"], model[0].weight)
    assert torch.equal(weights["1.weight"], kept)


def test_a_parameter_that_is_a_buffer_too() -> None:
    """It was called tied otherwise from the first update on, and rescan did not help."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(3))
    model.register_buffer("b", model.w)
    ema = EMA(model, 0.5)
    model.w.data.add_(2)
    ema.update()
    assert {name: value.tolist() for name, value in ema.gather().items()} == {
        name: [1.0, 1.0, 1.0] for name in "wb"
    }
    model.b = torch.full((3,), 5.0)
    with pytest.raises(RuntimeError, match=r"^b is tied otherwise"):
        ema.gather()
    ema.rescan()
    average = ema.gather()
    assert (average["w"].tolist(), average["b"].tolist()) == ([1.0] * 3, [5.0] * 3)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("inner", ["0", "1"])
def test_a_parameter_that_another_module_has_as_a_buffer(
    inner: str, persistent: bool, tmp_path: Path
) -> None:
    """Before or after it in the tree, in files or not: it was a buffer where that came first."""
    model: Any = nn.Sequential(nn.Module(), nn.Module())
    model.get_submodule(inner).w = w = nn.Parameter(torch.zeros(3))
    other = model[1 - int(inner)]
    other.register_buffer("b", w, persistent=persistent)
    ema = EMA(model, 0.5)
    w.data.add_(2)
    ema.update()
    assert ema.names() == [f"{inner}.w"]
    with ema.swap():
        assert w.tolist() == [1.0] * 3
    assert w.tolist() == [2.0] * 3
    ema.export(tmp_path)
    for average in (ema.gather(), load_file(tmp_path)):
        model.load_state_dict(average, strict=True)
        assert w.tolist() == [1.0] * 3
        w.data.fill_(2)


@pytest.mark.parametrize("first", [True, False])
def test_one_buffer_under_two_names_of_which_files_have_one(first: bool) -> None:
    model = nn.Linear(1, 1)
    values = torch.ones(3)
    model.register_buffer("a", values, persistent=first)
    model.register_buffer("b", values, persistent=not first)
    model.load_state_dict(EMA(model, 0.5).gather(), strict=True)
