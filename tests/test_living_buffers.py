"""Buffers by their meaning: power iterations, one state per module, shapes that change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from dist_ema import EMA, load_file
from dist_ema.recipes.batchnorm import recalibrate
from tests.living import Naive, Program, distance, outcome, programs, random_step

# --- what may be averaged ------------------------------------------------------------------------


def normed_linears() -> nn.Module:
    return nn.Sequential(*[spectral_norm(nn.Linear(16, 16)) for _ in range(4)])


def normed_old() -> nn.Module:
    return nn.Sequential(*[old_spectral_norm(nn.Linear(16, 16)) for _ in range(4)])


def normed_convolutions() -> nn.Module:
    layers = [spectral_norm(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(3)]
    return nn.Sequential(nn.Unflatten(1, (4, 4)), *layers, nn.Flatten())


def normed_twice() -> nn.Module:
    """Beside another parametrization of the same weight, and inside a block."""
    layer = nn.Linear(16, 16)
    spectral_norm(layer)
    return nn.Sequential(nn.ModuleDict({"a": layer})["a"], nn.BatchNorm1d(16, affine=False), layer)


NORMED: dict[str, Callable[[], nn.Module]] = {
    "linears": normed_linears,
    "old style": normed_old,
    "convolutions": normed_convolutions,
    "shared": normed_twice,
}
RED_NORMED: dict[str, str] = {}


@pytest.mark.parametrize("make", programs(NORMED, RED_NORMED))
def test_vectors_of_a_spectral_norm_are_not_averaged(make: Any) -> None:
    """The mean of two singular vectors is none: the norm of the weight is no longer 1."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    ema = EMA(model, 0.9, buffers="average")
    ema.attach(optimizer)
    for _ in range(60):
        x = torch.randn(32, 16)
        (model(x) - 10 * x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    vectors = {
        name: value
        for name, value in ema.gather().items()
        if name.endswith(("_u", "_v")) and value.ndim == 1
    }
    assert vectors
    for name, value in vectors.items():
        assert math.isclose(float(value.norm()), 1, abs_tol=1e-4), f"{name} has norm {value.norm()}"
        assert torch.equal(value, model.state_dict()[name]), f"{name} is not live's"


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_recalibrate_refreshes_the_vectors_for_the_average(make: Any) -> None:
    """Weights far from those that the vectors were made for: afterwards the norm is 1 again."""
    torch.manual_seed(0)
    model = make().eval()
    ema = EMA(model, 0.5)
    for p in model.parameters():
        nn.init.normal_(p)
    ema.update()
    live = {name: value.clone() for name, value in model.named_buffers()}
    with ema.swap():
        assert max(spectra(model)) > 1.2, "stale vectors normalise by too little"
        recalibrate(model, [torch.randn(8, 16) for _ in range(20)])
        model(torch.randn(8, 16))
        assert max(spectra(model)) < 1.05
    assert all(torch.equal(value, live[name]) for name, value in model.named_buffers())
    vectors = [name for name in live if name.endswith(("_u", "_v"))]
    assert all(not torch.equal(ema.gather()[name], live[name]) for name in vectors), (
        "the average's own"
    )


def test_vectors_are_restored_when_recalibrate_raises() -> None:
    model = normed_linears()
    for p in model.parameters():
        nn.init.normal_(p)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(RuntimeError):
        recalibrate(model, [torch.randn(8, 16), torch.randn(8, 3)])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def spectra(model: nn.Module) -> list[float]:
    """The largest singular value of every normed weight, as the last forward used it."""
    normed = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    model(torch.randn(8, 16))
    return [float(torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2)) for m in normed]


class Quantizer(nn.Module):
    """A codebook kept by cluster sizes and sums: their ratio is the code, the mean of ratios is
    not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("cluster_size", torch.ones(3))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("steps", torch.tensor(0))


def chosen(name: str) -> bool:
    return name.endswith("mean")


CHOICES: dict[str, Any] = {
    "regex": r"mean$",
    "predicate": chosen,
    "alternatives": "^mean$|running_",
}
RED_CHOICES: dict[str, str] = {}


@pytest.mark.parametrize("choice", programs(CHOICES, RED_CHOICES))
def test_buffers_are_chosen_by_name(choice: Any) -> None:
    model = Quantizer()
    ema = EMA(model, 0.5, buffers=choice)
    with torch.no_grad():
        model.cluster_size += 2
        model.mean += 2
        model.steps += 2
    ema.update()
    gathered = ema.gather()
    assert gathered["mean"].tolist() == [1, 1]
    assert gathered["cluster_size"].tolist() == [3, 3, 3]
    assert gathered["steps"] == 2


def test_a_choice_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="runing_"):
        EMA(Quantizer(), 0.5, buffers="runing_")  # type: ignore[arg-type]


# --- one state per module ------------------------------------------------------------------------


class Observer(nn.Module):
    """Ranges and a count, as QAT observers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("enabled", torch.tensor(True))

    def observe(self) -> None:
        self.scale.mul_(3)
        self.zero_point.add_(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def observe(self) -> None:
        self.train()
        for _ in range(4):
            self.norm(torch.randn(8, 3) + 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Assigned(Observer):
    """Buffers replaced by assignment instead of being written."""

    def observe(self) -> None:
        self.scale = self.scale * 3
        self.zero_point = self.zero_point + 7


STATES: dict[str, Callable[[], Any]] = {
    "observer": Observer,
    "BatchNorm": Normed,
    "assigned": Assigned,
}
RED_STATES: dict[str, str] = {}


@pytest.mark.parametrize("make", programs(STATES, RED_STATES))
def test_recalibrated_buffers_are_one_state(make: Any, tmp_path: Path) -> None:
    """Integers beside recalibrated floats belong to the average too: in files, in the next swap."""
    model = make()
    ema = EMA(model, 0.5)
    ema.update()
    live = {name: value.clone() for name, value in model.named_buffers()}
    with ema.swap():
        model.observe()
        inside = {name: value.clone() for name, value in model.named_buffers()}
    for name, value in model.named_buffers():
        assert torch.equal(value, live[name]), f"live's {name} is not restored"
    ema.export(tmp_path / "out")
    file, gathered = load_file(tmp_path / "out"), ema.gather()
    for name, value in inside.items():
        assert torch.equal(file[name], value), f"{name} in the file is not the block's"
        assert torch.equal(gathered[name], value)
    with ema.swap():
        for name, value in model.named_buffers():
            assert torch.equal(value, inside[name]), f"{name} is not lent again"


def resume(ema: EMA, model: nn.Module, way: str, folder: Path) -> EMA:
    """An EMA of `model` that goes on from `ema`."""
    resumed = EMA(model, 0.75)
    if way == "save":
        ema.save(folder / "saved")
        resumed.load(folder / "saved")
    elif way == "torch.save":
        torch.save(ema.state_dict(), folder / "saved.pt")
        resumed.load_state_dict(torch.load(folder / "saved.pt"))
    else:
        dcp.save({"ema": ema}, checkpoint_id=folder / "dcp", no_dist=True)
        dcp.load({"ema": resumed}, checkpoint_id=folder / "dcp", no_dist=True)
    return resumed


every_way = pytest.mark.parametrize("way", ["save", "torch.save", "dcp"])
without_ranks = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:.*averaged with Constant"
)
RED_RESUME: dict[str, str] = {}


@without_ranks
@every_way
@pytest.mark.parametrize("make", programs(STATES, RED_RESUME))
def test_recalibrated_states_are_resumed_whole(make: Any, way: str, tmp_path: Path) -> None:
    model = make()
    ema = EMA(model, 0.5)
    ema.update()
    with ema.swap():
        model.observe()
        inside = {name: value.clone() for name, value in model.named_buffers()}
    other = make()
    resumed = resume(ema, other, way, tmp_path)
    for name, value in inside.items():
        assert torch.equal(resumed.gather()[name], value), name
    resumed.reset_buffers()
    for name, value in other.named_buffers():
        assert torch.equal(resumed.gather()[name], value), name


def test_modules_that_were_left_alone_keep_live_buffers() -> None:
    """The state is a module's, not the model's."""
    model = nn.ModuleDict({"a": Normed(), "b": Normed()})
    ema = EMA(model, 0.5)
    with ema.swap():
        model["a"].observe()
    model["b"].observe()
    gathered = ema.gather()
    assert torch.equal(gathered["b.norm.running_mean"], model["b"].norm.running_mean)
    assert not torch.equal(gathered["a.norm.running_mean"], model["a"].norm.running_mean)


# --- buffers that change shape -------------------------------------------------------------------


class Bank(nn.Module):
    """A queue of features that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("bank", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.bank = torch.cat([self.bank, x.detach()])
        return self.linear(x)


class Shrinking(Bank):
    def __init__(self) -> None:
        super().__init__()
        self.bank = torch.zeros(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.bank = self.bank[1:].clone()
        return self.linear(x)


class Resized(Bank):
    """In place, as observers do that learn the number of channels at the first batch."""

    def forward(self, x: Tensor) -> Tensor:
        self.bank.resize_(self.bank.shape[0] + 1, 4).fill_(1)
        return self.linear(x)


class Retyped(Bank):
    """The dtype changes, too."""

    def forward(self, x: Tensor) -> Tensor:
        self.bank = self.bank.to(torch.int64 if self.bank.is_floating_point() else torch.float32)
        return self.linear(x)


class Rotary(Bank):
    """A table of positions that is built anew for a longer sequence, not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(2, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.table = torch.ones(self.table.shape[0] + 1, 4)
        return self.linear(x)


class Vanishing(Bank):
    """None until the first batch, and None again."""

    def forward(self, x: Tensor) -> Tensor:
        self.bank = None if self.bank is not None else x.detach().clone()
        return self.linear(x)


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "grows": Bank,
    "shrinks": Shrinking,
    "resized in place": Resized,
    "another dtype": Retyped,
    "not persistent": Rotary,
    "vanishes": Vanishing,
}
RED_SHAPES: dict[str, str] = {}


@pytest.mark.parametrize("make", programs(SHAPES, RED_SHAPES))
def test_copied_buffers_may_change_shape(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(optimizer)
    for _ in range(5):
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        naive.update()
    assert naive.error(ema.gather()) <= 2e-5
    ema.export(tmp_path / "out")
    assert naive.error(load_file(tmp_path / "out")) <= 2e-5
    before = naive.state()
    with ema.swap():
        assert distance(naive.full(), naive.state()) <= 2e-5
        model(torch.randn(3, 4))
    assert distance(before, naive.state()) == 0


def test_a_swap_empties_again_what_was_none() -> None:
    """A verb has walked the tree while there was no buffer."""
    model: Any = nn.Sequential(nn.Linear(4, 4), Bank())
    ema = EMA(model, 0.75)
    model[1].bank = None
    ema.gather()
    with ema.swap():
        model[1].bank = torch.ones(3, 4)
    assert model[1].bank is None


class Filled(Bank):
    """None until the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", None)

    def forward(self, x: Tensor) -> Tensor:
        self.bank = x.detach()
        return self.linear(x)


RED_RESUMED: dict[str, str] = {}
RESUMED = {
    title: SHAPES[title] for title in ("grows", "shrinks", "resized in place", "another dtype")
}
RESUMED["filled"] = Filled


@without_ranks
@every_way
@pytest.mark.parametrize("make", programs(RESUMED, RED_RESUMED))
def test_a_resume_into_a_fresh_model_passes_over_copied_buffers(
    make: Any, way: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    for _ in range(3):
        model(torch.randn(3, 4))
    ema = EMA(model, 0.75)
    ema.update()
    fresh = make()
    found = resume(ema, fresh, way, tmp_path).gather()
    assert torch.equal(found["linear.weight"], ema.gather()["linear.weight"])
    assert ("bank" in found) == (fresh.bank is not None)
    assert fresh.bank is None or torch.equal(found["bank"], fresh.bank)


def with_another_bank(model: Any) -> None:
    model[1].bank = torch.ones(7, 4)


def without_one(model: Any) -> None:
    model[1].late = None


@without_ranks
@every_way
@pytest.mark.parametrize("edit", [with_another_bank, without_one])
def test_a_module_that_is_another_one_takes_no_own_buffers(
    edit: Any, way: str, tmp_path: Path
) -> None:
    """Half of what was recalibrated would fit: a module's buffers are one state."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.zeros(2, 4))
            self.register_buffer("late", torch.zeros(3))

    def build() -> Any:
        return nn.Sequential(nn.Linear(4, 4), Kept(), nn.BatchNorm1d(4))

    model, other = build(), build()
    ema = EMA(model, 0.75)
    with ema.swap():
        for buffer in model.buffers():
            buffer.add_(1)
    edit(other)
    with pytest.warns(UserWarning, match="recalibrated buffers"):
        found = resume(ema, other, way, tmp_path).gather()
    assert int(found["2.num_batches_tracked"]) == 1, "the other module keeps its own"
    for name, buffer in other[1].named_buffers():
        assert torch.equal(found[f"1.{name}"], buffer), name


def test_rescan_leaves_own_buffers_to_the_module_that_had_them() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    ema = EMA(model, 0.75)
    with ema.swap():
        for buffer in model.buffers():
            buffer.add_(1)
    model[0] = nn.BatchNorm1d(4)
    ema.rescan()
    found = ema.gather()
    assert int(found["0.num_batches_tracked"]) == 0, "of the module that is gone"
    assert torch.equal(found["0.running_var"], torch.ones(4))
    assert int(found["1.num_batches_tracked"]) == 1


def test_an_averaged_buffer_that_changes_shape_is_named() -> None:
    model = Bank()
    model.bank = torch.zeros(2, 4)
    program = Program(model, buffers="average")
    program.step()
    model(torch.randn(3, 4))

    def train() -> float:
        program.step()
        program.ema.gather()
        return math.inf

    assert outcome(train, ["bank"]) == "raised"


@pytest.mark.parametrize("grows", ["model", "teacher"])
def test_a_buffer_that_a_teacher_cannot_follow_is_named_with_its_cure(grows: str) -> None:
    def train(**options: Any) -> Program:
        torch.manual_seed(0)
        model, teacher = Bank(), Bank()
        program = Program(model, into=teacher, **options)
        for _ in range(3):
            (model if grows == "model" else teacher)(torch.randn(3, 4))
            program.step()
        assert torch.allclose(
            teacher.linear.weight.double(), program.naive.average["linear.weight"], atol=2e-5
        )
        return program

    with pytest.raises(RuntimeError, match=r"bank .*leave it out with only="):
        train()
    train(only="linear")


def test_observers_of_quantization_aware_training() -> None:
    """Scales get their shape at the first forward, after the EMA was built."""

    class FakeQuantize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("min_val", torch.tensor([]))
            self.register_buffer("max_val", torch.tensor([]))

        def forward(self, x: Tensor) -> Tensor:
            low, high = x.detach().amin(0), x.detach().amax(0)
            if self.min_val.numel() == 0:
                self.min_val.resize_(low.shape)
                self.max_val.resize_(high.shape)
            self.min_val.copy_(low)
            self.max_val.copy_(high)
            return x

    model = nn.Sequential(nn.Linear(4, 4), FakeQuantize())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    naive, ema = Naive(model), EMA(model, 0.75)
    ema.attach(optimizer)
    for _ in range(4):
        F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 4)).backward()
        optimizer.step()
        naive.update()
    assert naive.error(ema.gather()) <= 2e-5
    ema.detach()
    random_step(optimizer)


class Rotary(nn.Module):
    """Its table grows with the longest input, under whatever mode the forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.table):
            self.register_buffer("table", torch.arange(float(len(x))), persistent=False)
        out: Tensor = self.linear(x) * self.table[: len(x), None]
        return out


def test_a_buffer_assigned_under_inference_mode_is_restored() -> None:
    """Such a tensor is written in that mode only, and a swap restores every buffer."""
    program = Program(Rotary())
    program.step(3)
    with torch.inference_mode():
        program.model(torch.ones(5, 4))
    assert program.swap() < 2e-5
    with program.ema.swap(), torch.inference_mode():
        program.model(torch.ones(9, 4))
    assert program.model.table.tolist() == list(range(5))
    assert program.gather() < 2e-5


def test_an_averaged_buffer_assigned_under_inference_mode_is_followed() -> None:
    """It has no version counter."""
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    program = Program(model, buffers="average")
    program.step()
    with torch.inference_mode():
        model[1].running_mean = torch.ones(6)
    program.step()
    assert torch.equal(program.ema.gather()["1.running_mean"], torch.full((6,), 0.25))
    with program.ema.swap():
        pass
    assert torch.equal(model[1].running_mean, torch.ones(6))


def test_files_hold_a_buffer_that_was_filled_since(tmp_path: Path) -> None:
    """A cache that the forward fills is in the very next file, not in the one after it."""
    model = nn.Linear(3, 2)
    model.register_buffer("cache", None)
    ema = EMA(model, 0.5)
    for verb, value in [("save", 1.0), ("export", 2.0)]:
        model.cache = torch.full((2,), value)
        getattr(ema, verb)(tmp_path / verb)
        assert load_file(tmp_path / verb)["cache"].tolist() == [value] * 2
        model.cache = None
        ema.gather()


class State(nn.Module):
    """Three buffers that are one state: a mean, a count, and a bank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("bank", torch.zeros(2))


def recalibrated() -> tuple[State, EMA]:
    """The mean alone was written inside a swap, then training wrote mean and count."""
    model = State()
    ema = EMA(model, 0.5)
    with ema.swap():
        model.mean.add_(1)
    model.mean.add_(5)
    model.count.add_(5)
    return model, ema


def test_a_buffer_that_the_block_left_alone_is_kept_with_its_module() -> None:
    _, ema = recalibrated()
    weights = ema.gather()
    assert weights["mean"].tolist() == [1, 1]
    assert weights["count"] == 0


def test_a_module_whose_bank_grew_inside_keeps_no_state() -> None:
    model = State()
    ema = EMA(model, 0.5)
    with ema.swap():
        model.mean.add_(1)
        model.bank = torch.zeros(3)
    model.count.add_(5)
    weights = ema.gather()
    assert weights["mean"].tolist() == [0, 0]
    assert weights["count"] == 5
    assert weights["bank"].shape == (2,)


def test_own_buffers_end_when_training_resizes_one_of_them() -> None:
    model, ema = recalibrated()
    model.bank = torch.zeros(3)
    weights = ema.gather()
    assert weights["mean"].tolist() == [5, 5]
    assert weights["count"] == 5
    assert weights["bank"].shape == (3,)


class Shared(nn.Module):
    """One buffer tensor in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        table = torch.zeros(2)
        self.a.register_buffer("table", table)
        self.b.register_buffer("table", table)


@pytest.mark.parametrize("split", ["ab", "b"])
def test_an_averaged_buffer_that_is_no_longer_shared_is_named(split: str) -> None:
    """Guards `taken` in Inventory: after `rescan` each name has an average of its own."""
    model = Shared()
    ema = EMA(model, 0.5, buffers="average")
    ema.update()
    for name in split:
        getattr(model, name).table = torch.full((2,), 4.0)
    with pytest.raises(RuntimeError, match=r"^b\.table no longer shares memory"):
        ema.gather()
    ema.rescan()
    ema.update()
    weights = ema.gather()
    assert weights["a.table"].tolist() == [2.0 if split == "ab" else 0.0] * 2
    assert weights["b.table"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_buffers_that_move_to_another_module(buffers: Any) -> None:
    """SyncBatchNorm in the place of BatchNorm: the weights are the same objects."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    program = Program(model, buffers=buffers)
    program.step(2)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if buffers == "average":
        with pytest.raises(RuntimeError, match=r"1\.running_mean, .* no longer shares memory"):
            program.ema.gather()
        program.ema.rescan()
    program.step(2)
    assert program.swap() < 2e-5
