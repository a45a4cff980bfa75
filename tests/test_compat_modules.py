"""Drop-ins that hold a module: each against the package that it stands in for, and on two ranks
against the oracle.

How to read a failure: a differential test names its seed, the step and the key; `run(KIND, seed)`
repeats it alone. One live model is shared by the original and by ours, so both see the same
weights.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import io
import math
import pickle
import random
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ema_pytorch as their_ema_pytorch
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import swa_utils as theirs_swa
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ema import EMA, Power, Ramp, load_file
from dist_ema.compat import ema_pytorch as ours_ema_pytorch
from dist_ema.compat import swa_utils as ours_swa
from dist_ema.compat import timm as ours_timm
from dist_ema.compat import yolo
from tests._models import Net
from tests._oracle import Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.conftest import Seeds


class Body(nn.Module):
    """A tied pair, a frozen weight, a scalar, BatchNorm (floating and integer buffers), and a
    buffer that no file holds.
    """

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4)
        if tied:
            self.head.weight = self.a.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)))) * self.scale

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x)


class Watch(TorchDispatchMode):
    """Counts how often the host asks a tensor for its value."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def make(draw: random.Random, tied: bool = True) -> Body:
    torch.manual_seed(draw.randrange(1 << 30))
    return Body(tied).to(draw.choice([torch.float32, torch.float32, torch.float64]))


@torch.no_grad()
def train(model: nn.Module, draw: random.Random) -> None:
    """Every trainable weight and every buffer moves."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    for p in model.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 0.3
    for buffer in model.buffers():
        step = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
        buffer += step.to(buffer.dtype) if buffer.is_floating_point() else 1


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str, odd: Callable[[str], bool]
) -> None:
    """The same keys in the same order, the same values to 1e-6 but where `odd`."""
    assert list(ours) == list(theirs), where
    for key, want in theirs.items():
        mine = ours[key]
        assert (mine.dtype, mine.shape) == (want.dtype, want.shape), f"{where} {key}"
        if not odd(key):
            assert torch.allclose(mine.double(), want.double(), rtol=0, atol=1e-6), (
                f"{where} {key}: {mine} {want}"
            )


# --- torch.optim.swa_utils ------------------------------------------------------------------------


def halve(averaged: Tensor, current: Tensor, count: Any) -> Tensor:
    """A function of the user's, which knows how many models there were."""
    return averaged + (current - averaged) / (count + 2)


def halve_all(averaged: Any, current: Any, count: Any) -> None:
    for mine, live in zip(averaged, current, strict=True):
        mine += (live - mine) / (count + 2)


FUNCTIONS: list[Callable[[Any, float], dict[str, Any]]] = [
    lambda of, d: {},
    lambda of, d: {"avg_fn": of.get_ema_avg_fn(d)},
    lambda of, d: {"multi_avg_fn": of.get_ema_multi_avg_fn(d)},
    lambda of, d: {"avg_fn": of.get_swa_avg_fn()},
    lambda of, d: {"multi_avg_fn": of.get_swa_multi_avg_fn()},
    lambda of, d: {"avg_fn": halve},
    lambda of, d: {"multi_avg_fn": halve_all},
    lambda of, d: {"avg_fn": theirs_swa.get_ema_avg_fn(d)},
]


def test_swa_utils_is_torchs(seeds: Seeds) -> None:
    for seed in seeds(200):
        run_swa(seed)


def run_swa(seed: int) -> None:
    draw = random.Random(seed)
    live, options = make(draw), {"device": draw.choice([None, "cpu", torch.device("cpu")])}
    function, decay = draw.choice(FUNCTIONS), draw.choice([0.0, 0.5, 0.9, 1.0])
    # NOTE: torch's average raises for the integer buffers with functions for many tensors that take
    # a mean.
    options["use_buffers"] = draw.random() < 0.5 and function not in (FUNCTIONS[4], FUNCTIONS[6])
    theirs = theirs_swa.AveragedModel(live, **options, **function(theirs_swa, decay))
    ours = ours_swa.AveragedModel(live, **options, **function(ours_swa, decay))
    tracked = live.norm.num_batches_tracked.clone()
    for step in range(draw.randrange(4, 10)):
        what = draw.choice(
            ["update"] * 6
            + ["load", "both load", "restart", "copy", "another", "bn", "unfreeze", "replace"]
        )
        if what == "update":
            train(live, draw)
            theirs.update_parameters(live)
            ours.update_parameters(live)
            tracked = live.norm.num_batches_tracked.clone()
        elif what == "load":
            saved, fresh = copy.deepcopy(ours.state_dict()), make(draw).to(live.scale.dtype)
            ours = ours_swa.AveragedModel(fresh, **options, **function(ours_swa, decay))
            ours.load_state_dict(saved)
        elif what == "both load":
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            tracked = ours.module.norm.num_batches_tracked.clone()
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        elif what == "restart":
            ours.n_averaged.fill_(0)
            theirs.n_averaged.fill_(0)
        elif what == "copy":
            ours = copy.deepcopy(ours)
        elif what == "another":
            live = copy.deepcopy(live)
        elif what == "unfreeze":
            live.frozen.requires_grad_(True)
        elif what == "replace":
            live.b.weight = nn.Parameter(live.b.weight.detach() + 0.1)
        elif what == "bn" and not options["use_buffers"]:
            x = torch.randn(5, 3, dtype=live.scale.dtype)
            theirs_swa.update_bn([x], theirs)
            ours_swa.update_bn([(x, "label")], ours)
            tracked = ours.module.norm.num_batches_tracked.clone()
        where = f"seed {seed} step {step} {what}"
        compare(ours.state_dict(), theirs.state_dict(), where, lambda key: "tracked" in key)
        assert torch.equal(ours.module.norm.num_batches_tracked, tracked), where
        if what == "update":
            assert torch.equal(ours.module.cache, live.cache), where
        if step % 3 == 0:
            x = torch.randn(5, 3, dtype=live.scale.dtype)
            assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5), where


def test_bfloat16_does_not_stall() -> None:
    """torch's average of bf16 weights never moves at this decay."""
    live = nn.Linear(40, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        live.weight.fill_(1.0)
    both = [
        of.AveragedModel(live, avg_fn=of.get_ema_avg_fn(0.999)) for of in (ours_swa, theirs_swa)
    ]
    for average in both:
        average.update_parameters(live)
    with torch.no_grad():
        live.weight.fill_(2.0)
    for average in both * 400:
        average.update_parameters(live)
    ours, theirs = (average.module.weight.float().mean().item() for average in both)
    assert theirs == 1.0
    assert abs(ours - (2 - 0.999**400)) < 0.02


def test_the_model_may_change() -> None:
    """Wrapped later, cast, the copy cast: the average goes on where it was; what is the same model
    builds nothing anew.
    """
    live = Body()
    average = ours_swa.AveragedModel(live, avg_fn=ours_swa.get_ema_avg_fn(0.5))
    average.update_parameters(live)
    first = average.average
    average.update_parameters(torch.compile(live, backend="eager"))
    assert average.average is first
    want = average.module.scale.item()
    for change in (live.double, average.double, live.float, live.double):
        change()
        with torch.no_grad():
            live.scale.add_(1)
        average.update_parameters(live)
        want = 0.5 * want + 0.5 * live.scale.item()
        assert average.module.scale.item() == pytest.approx(want, abs=1e-6)
    assert (average.module.scale.dtype, average.average.now) == (torch.float64, 6)
    again = pickle.loads(pickle.dumps(average))
    with torch.no_grad():
        live.scale.add_(1)
    again.update_parameters(live)
    assert again.module.scale.item() == pytest.approx(0.5 * want + 0.5 * live.scale.item())
    assert average.module.scale.item() == pytest.approx(want), (
        "the copy of an average is an average of its own"
    )
    bodies = sum(type(each) is Body for each in gc.get_objects())
    kept = copy.deepcopy(average)
    assert sum(type(each) is Body for each in gc.get_objects()) == bodies + 1, (
        "the model is not copied with it"
    )
    assert kept.n_averaged == 6


def new_layer(live: Body) -> None:
    live.b = nn.Linear(4, 3)


def synchronised(live: Body) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(live)


EDITED: dict[str, Callable[[Body], Any]] = {
    "swa_utils": lambda m: ours_swa.AveragedModel(m, use_buffers=True),
    "timm": lambda m: ours_timm.ModelEmaV2(m, decay=0.5),
    "ema_pytorch": lambda m: ours_ema_pytorch.EMA(m, update_every=1, update_after_step=-1),
}


@pytest.mark.parametrize("kind", EDITED)
@pytest.mark.parametrize("edit", [new_layer, synchronised])
def test_modules_may_be_replaced(kind: str, edit: Any) -> None:
    """As the originals, which read the model by its names: the average goes on towards the new
    module.
    """
    live, draw = Body(tied=False), random.Random(1)
    average = EDITED[kind](live)
    copied = average.ema_model if kind == "ema_pytorch" else average.module
    for step in range(4):
        if step == 2:
            edit(live)
        train(live, draw)
        before = {name: value.clone() for name, value in copied.state_dict().items()}
        if kind == "swa_utils":
            average.update_parameters(live)
        else:
            average.update(*[] if kind == "ema_pytorch" else [live])
        after, goal = copied.state_dict(), live.state_dict()
        moved, newer, buffer = (
            float((after[name] - before[name]).sum() / (goal[name] - before[name]).sum())
            for name in ("scale", "b.weight", "norm.running_mean")
        )
        assert newer == pytest.approx(moved, abs=1e-3)
        assert buffer == pytest.approx(moved, abs=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_mode(training: bool) -> None:
    """As in the originals: a BatchNorm that is frozen by its mode stays in it in the copy."""
    live = Body().train(training)
    live.norm.train(not training)
    for ours, theirs in (
        (ours_swa.AveragedModel(live).module, theirs_swa.AveragedModel(live).module),
        (ours_ema_pytorch.EMA(live).ema_model, their_ema_pytorch.EMA(live).ema_model),
    ):
        modes = [module.training for module in ours.modules()]
        assert modes == [module.training for module in theirs.modules()]
    assert not any(module.training for module in ours_timm.ModelEmaV2(live).module.modules())


def lose(live: nn.Sequential) -> None:
    live[1].register_parameter("bias", None)


def gain(live: nn.Sequential) -> None:
    live.append(nn.Linear(3, 3))


def share(live: nn.Sequential) -> None:
    with torch.no_grad():
        live[0].weight.add_(1)
    live[1].weight.data = live[0].weight.data


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose, "1.bias is gone from the model"),
        (gain, "2.weight, 2.bias is new and trainable"),
        (share, "1.weight lies in the memory of 0.weight now, and their averages differ"),
    ],
)
def test_what_is_lost_new_or_shared_is_refused(edit: Any, words: str) -> None:
    """At every update, and nothing changes. Guards `ModuleAverage._must_rebuild` and `_build`."""
    live = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    average = ours_timm.ModelEmaV2(live, 0.5)
    average.update(live)
    before = snapshot(average)
    edit(live)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            average.update(live)
        assert same(before, snapshot(average))


def test_checkpoints_of_wrapped_models() -> None:
    """torch writes DDP's and torch.compile's prefixes into the keys; here they are taken off at
    load.
    """
    live = Body()
    average = ours_swa.AveragedModel(live)
    state = {key: value + 1 for key, value in average.state_dict().items()}
    for put in ("module.module.", "module._orig_mod.", "module.module._orig_mod."):
        fresh = ours_swa.AveragedModel(live)
        fresh.load_state_dict(
            {key.replace("module.", put, 1): value for key, value in state.items()}
        )
        compare(dict(fresh.state_dict()), state, put, lambda _: False)
    compiled = ours_swa.AveragedModel(
        live, module_fn=lambda: torch.compile(Body(), backend="eager")
    )
    compiled.load_state_dict(
        {key.replace("module.", "module._orig_mod.", 1): value for key, value in state.items()}
    )
    assert torch.equal(compiled.module.scale, state["module.scale"])
    inside = ours_swa.AveragedModel(nn.ModuleDict({"module": nn.Linear(1, 1, bias=False)}))
    inside.load_state_dict(
        {"n_averaged": torch.tensor(1), "module._orig_mod.module.weight": torch.tensor([[7.0]])}
    )
    assert inside.module["module"].weight == 7
    state["module.nothing"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="module.nothing"):
        fresh.load_state_dict(state)


def test_counts_are_not_read_back() -> None:
    live = Body()
    average = ours_swa.AveragedModel(live)
    average.update_parameters(live)
    with Watch() as watch:
        average.update_parameters(live)
    assert watch.reads == 0
    average.n_averaged.fill_(0)
    with Watch() as watch:
        average.update_parameters(live)
    assert watch.reads == 1


def and_thawed(live: Any) -> None:
    live.a.requires_grad_(True)


def and_another_head(live: Any) -> None:
    live.b = copy.deepcopy(live.b)


def and_cast(live: Any) -> None:
    live.double()
    live.float()


@pytest.mark.parametrize("then", [None, and_thawed, and_another_head, and_cast])
def test_what_is_frozen_in_mid_training_goes_on_being_averaged(then: Any) -> None:
    """In lockstep with the original, as in schedules that freeze an encoder."""
    live: Any = Body()
    functions = [m.get_ema_multi_avg_fn(0.75) for m in (ours_swa, theirs_swa)]
    ours = ours_swa.AveragedModel(live, multi_avg_fn=functions[0])
    theirs = theirs_swa.AveragedModel(live, multi_avg_fn=functions[1])
    for step in range(9):
        if step == 3:
            live.a.requires_grad_(False)
        if step == 6 and then is not None:
            then(live)
        with torch.no_grad():
            for p in live.parameters():
                p.add_(0.1 * p.requires_grad)
        for average in (ours, theirs):
            average.update_parameters(live)
        torch.testing.assert_close(ours.module.a.weight, theirs.module.a.weight)
    assert not torch.allclose(ours.module.a.weight, live.a.weight)


def test_frozen_weights_follow_under_any_function() -> None:
    live = Body()
    average = ours_swa.AveragedModel(live, avg_fn=halve)
    average.update_parameters(live)
    for weight in (live.frozen.weight.detach(), live.frozen.weight.data):
        weight.add_(1)
        average.update_parameters(live)
        assert torch.equal(average.module.frozen.weight, live.frozen.weight)


@pytest.mark.parametrize(
    "make",
    [ours_swa.AveragedModel, ours_timm.ModelEma, ours_timm.ModelEmaV3, yolo.ModelEMA],
)
def test_what_is_no_module_is_refused(make: Any) -> None:
    """At the construction and in an update, as a list of parameters or None is passed."""
    average = make(live := Body())
    update = getattr(average, "update", None) or average.update_parameters
    for wrong in (None, list(live.parameters())):
        for call in (make, update):
            with pytest.raises(ValueError, match="takes a module, got (NoneType|list)"):
                call(wrong)
    update(live)


def test_swa_utils_refuses() -> None:
    with pytest.raises(ValueError, match="one of avg_fn and multi_avg_fn, got both"):
        ours_swa.AveragedModel(Body(), avg_fn=halve, multi_avg_fn=halve_all)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        ours_swa.get_ema_avg_fn(1.5)
    assert ours_swa.SWALR is theirs_swa.SWALR


def test_update_bn_is_of_all_data() -> None:
    """The variance over all batches, where torch takes the mean of the batches' own; models without
    BatchNorm pass.
    """
    live = Body()
    average = ours_swa.AveragedModel(live)
    batches = [torch.randn(4, 3) + i for i in range(3)]
    ours_swa.update_bn(batches, average, device=torch.device("cpu"))
    seen = torch.cat([average.module.a(batch) for batch in batches])
    assert torch.allclose(average.module.norm.running_mean, seen.mean(0), atol=1e-5)
    assert torch.allclose(average.module.norm.running_var, seen.var(0), atol=1e-5)
    assert torch.equal(live.norm.running_mean, torch.zeros(4))
    ours_swa.update_bn(batches, live)
    assert not torch.equal(live.norm.running_mean, torch.zeros(4))
    ours_swa.update_bn(batches, nn.Linear(3, 3))


# --- timm -----------------------------------------------------------------------------------------


def timms() -> Any:
    """Its one file: timm itself imports torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    path = Path(spec.submodule_search_locations[0]) / "utils" / "model_ema.py"
    file = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timm_is_timms(version: str, tmp_path: Path, seeds: Seeds) -> None:
    theirs = getattr(timms(), version)
    for seed in seeds(70):
        run_timm(seed, theirs, getattr(ours_timm, version), tmp_path)


def run_timm(seed: int, their_class: Any, our_class: Any, folder: Path) -> None:
    draw = random.Random(seed)
    live = make(draw, tied=False)
    options: dict[str, Any] = {
        "decay": draw.choice([0.0, 0.5, 0.9, 1.0]),
        "device": draw.choice(["", "cpu"]) or None,
    }
    third, first = our_class is ours_timm.ModelEmaV3, our_class is ours_timm.ModelEma
    if third:
        options |= {"min_decay": draw.choice([0.0, 0.3]), "update_after_step": draw.choice([0, 3])}
        options |= {
            "use_warmup": draw.random() < 0.5,
            "warmup_gamma": draw.choice([1.0, 3.0]),
            "warmup_power": 0.7,
        }
        options |= {"exclude_buffers": draw.random() < 0.5, "foreach": draw.random() < 0.5}
        options |= {"dtype": draw.choice([None, torch.float64, live.scale.dtype])}
        if options["dtype"] != live.scale.dtype and live.scale.dtype == torch.float64:
            options["dtype"] = None
    if first and draw.random() < 0.3:
        options["resume"] = str(folder / "checkpoint.pt")
        torch.save({"state_dict_ema": live.state_dict()}, options["resume"])
        train(live, draw)
    if first and options["device"] is None:
        options["device"] = ""
    ours = our_class(live, **options)
    with without_timm():
        theirs = their_class(live, **options)

    def modules() -> tuple[nn.Module, nn.Module]:
        return (ours.ema, theirs.ema) if first else (ours.module, theirs.module)

    for step in range(draw.randrange(4, 10)):
        what = draw.choice(
            ["update"] * 6 + ["set", "load", "both load", "copy", "decay", "another", "unfreeze"]
        )
        if what == "update":
            train(live, draw)
            at = {"step": draw.choice([None, step, 10 * step])} if third else {}
            ours.update(live, **at)
            theirs.update(live, **at)
        elif what == "set" and not first:
            train(live, draw)
            ours.set(live)
            theirs.set(live)
        elif what == "load" and not first:
            saved = copy.deepcopy(ours.state_dict())
            ours = our_class(make(draw, tied=False).to(live.scale.dtype), **options)
            ours.decay = theirs.decay
            ours.load_state_dict(saved)
        elif what == "both load":
            mine, other = modules()
            mine.load_state_dict(copy.deepcopy(other.state_dict()))
        elif what == "copy" and not third:  # theirs has a generator, which cannot be copied
            ours = copy.deepcopy(ours)
        elif what == "decay":
            ours.decay = theirs.decay = 0.7
        elif what == "another":
            live = copy.deepcopy(live)
        elif what == "unfreeze":
            live.frozen.requires_grad_(True)
        where = f"seed {seed} step {step} {what} {options}"
        mine, other = modules()
        compare(
            dict(mine.state_dict()), dict(other.state_dict()), where, lambda key: "tracked" in key
        )
        assert not mine.training
        if what == "update" and options.get("exclude_buffers"):
            assert torch.equal(mine.cache, live.cache.to(mine.cache)), where
        if what in ("update", "set") and (what == "update" or not first):
            assert torch.equal(mine.norm.num_batches_tracked, live.norm.num_batches_tracked), where
    x = torch.randn(3, 3, dtype=mine.scale.dtype)
    assert torch.allclose((mine if first else ours)(x), other(x), atol=1e-5)


@contextlib.contextmanager
def without_timm() -> Iterator[None]:
    """Its loader of checkpoints lies where torchvision would be imported: one that does the same
    stands in.
    """
    stand_in = types.ModuleType("timm.models._helpers")
    stand_in._torch_load = torch.load  # type: ignore[attr-defined]
    names = {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models")}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {**names, "timm.models._helpers": stand_in}.items():
            patch.setitem(sys.modules, name, module)
        yield


def test_timm_third_version_takes_a_decay() -> None:
    """`apply_update_`, for loops that compute the decay themselves."""
    live = make(random.Random(1), tied=False)
    both = [of.ModelEmaV3(live, decay=0.9) for of in (ours_timm, timms())]
    for seed, decay in enumerate((0.0, 0.3, 1.0, 0.7)):
        train(live, random.Random(seed))
        for average in both:
            with torch.no_grad():
                average.apply_update_(live, decay)
        states = [dict(average.module.state_dict()) for average in both]
        compare(*states, f"decay {decay}", lambda key: "tracked" in key)


def test_timm_tied_weights_are_averaged_once() -> None:
    """timm walks the state_dict, where a tied weight stands twice, and moves it twice: a decay of
    0.81 in place of 0.9.
    """
    live = Body()
    before, theirs = live.a.weight.detach().clone(), timms()
    for version, name in (("ModelEma", "ema"), ("ModelEmaV2", "module"), ("ModelEmaV3", "module")):
        with torch.no_grad():
            live.a.weight.copy_(before)
        both = [getattr(of, version)(live, decay=0.9) for of in (ours_timm, theirs)]
        with torch.no_grad():
            live.a.weight.copy_(before + 1)
        for average in both:
            average.update(live)
        ours, other = ((getattr(average, name).a.weight - before).mean().item() for average in both)
        assert ours == pytest.approx(0.1, abs=1e-6), version
        assert other == pytest.approx(0.19, abs=1e-6), version


def test_timm_dtypes() -> None:
    """A bf16 average moves, by chance in proportion, as timm's third version does and the others do
    not.
    """
    live = nn.Linear(40, 40).bfloat16()
    with torch.no_grad():
        live.weight.fill_(1.0)
    ours, wide = (
        ours_timm.ModelEmaV3(live, 0.999),
        ours_timm.ModelEmaV3(live, 0.999, dtype=torch.float32),
    )
    first, again, other = (
        ours_timm.ModelEmaV3(live, 0.999, stochastic_rounding_seed=seed) for seed in (7, 7, 8)
    )
    with torch.no_grad():
        live.weight.fill_(2.0)
    for average in [ours, wide, first, again, other] * 400:
        average.update(live)
    assert torch.equal(first.module.weight, again.module.weight)
    assert not torch.equal(first.module.weight, other.module.weight)
    for average in (ours, wide, first, other):
        assert abs(average.module.weight.float().mean().item() - (2 - 0.999**400)) < 0.02
    assert (ours.module.weight.dtype, wide.module.weight.dtype) == (torch.bfloat16, torch.float32)


def test_timm_resumes_from_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live = Body()
    state = {key: value + 1 for key, value in live.state_dict().items()}
    torch.save(
        {"state_dict_ema": {f"module.{key}": value for key, value in state.items()}},
        tmp_path / "ddp.pt",
    )
    compare(
        dict(ours_timm.ModelEma(live, resume=str(tmp_path / "ddp.pt")).ema.state_dict()),
        state,
        "",
        lambda _: False,
    )
    torch.save({"state_dict": state}, tmp_path / "live.pt")
    average = ours_timm.ModelEma(live, resume=str(tmp_path / "live.pt"))
    assert "has no state_dict_ema" in caplog.text
    assert torch.equal(average.ema.a.weight, live.a.weight)


# --- YOLO -----------------------------------------------------------------------------------------


def test_yolo_is_its_formula(seeds: Seeds) -> None:
    """e = d e + (1 - d) m over all that floats in the state_dict, d = decay (1 - exp(-updates /
    tau)), in float64.
    """
    for seed in seeds(200):
        run_yolo(seed)


def run_yolo(seed: int) -> None:
    draw = random.Random(seed)
    live, decay, start, tau = (
        make(draw),
        draw.choice([0.9, 0.9999]),
        draw.choice([0, 500]),
        draw.choice([2000, 10]),
    )
    average = (
        yolo.ModelEMA(live, decay, start)
        if tau == 2000
        else yolo.ModelEMA(live, decay, updates=start, tau=tau)
    )
    want = {key: value.double().clone() for key, value in live.state_dict().items()}
    for step in range(draw.randrange(4, 10)):
        what = draw.choice(["update"] * 6 + ["load", "resume", "another", "half", "copy"])
        if what == "update":
            train(live, draw)
            average.update(live)
            start += 1
            d = decay * (1 - math.exp(-start / tau))
            for key, value in live.state_dict().items():
                want[key] = (
                    d * want[key] + (1 - d) * value.double()
                    if value.is_floating_point()
                    else value.double()
                )
        elif what == "load":
            average.ema.load_state_dict(live.state_dict())
            want = {key: value.double().clone() for key, value in live.state_dict().items()}
        elif what == "resume":
            average.updates = start = draw.choice([0, 7, 4000])
        elif what == "another":
            live = copy.deepcopy(live)
        elif what == "half":
            copy.deepcopy(average.ema).half()
            average.ema.to(torch.float64)
        elif what == "copy":
            average = copy.deepcopy(average)
        where = f"seed {seed} step {step} {what}"
        state = average.ema.state_dict()
        assert list(state) == list(want)
        for key, value in want.items():
            assert torch.allclose(state[key].double(), value, rtol=0, atol=2e-6), f"{where} {key}"
        assert (average.updates, average.ema.training) == (start, False), where
    assert average.decay(start) == pytest.approx(decay * (1 - math.exp(-start / tau)))
    assert not any(p.requires_grad for p in average.ema.parameters())


def test_yolo_validates_in_16_bits() -> None:
    """Its validation casts the average and casts it back, in every epoch: each time the average is
    built again around it, and no hooks of before are left. Guards `Teacher.release`.
    """
    torch.manual_seed(0)
    live = nn.Linear(2, 2)
    ema = yolo.ModelEMA(live, tau=5)
    ema.update(live)
    counts = [len(hooks) for hooks in hooks_of(ema.ema)]
    for _ in range(3):
        ema.ema.half()
        ema.ema.float()
        ema.update(live)
        assert [len(hooks) for hooks in hooks_of(ema.ema)] == counts
    assert ema.average.now == ema.updates == 4
    assert all(counts)


def hooks_of(module: nn.Module) -> list[Any]:
    return [
        module._forward_pre_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
    ]


def test_yolo_attributes() -> None:
    live = Body()
    average = yolo.ModelEMA(live)
    live.names, live.stride, live.reducer, live._hidden = ["cat"], 8, "no", "no"
    average.update_attr(live, include=["names"])
    assert average.ema.names == ["cat"]
    assert not hasattr(average.ema, "stride")
    average.update_attr(live)
    assert average.ema.stride == 8
    assert not hasattr(average.ema, "reducer")
    assert not hasattr(average.ema, "_hidden")
    average.update_attr(live, include=["names", "reducer"], exclude=["names"])
    assert average.ema.reducer == "no"


# --- ema_pytorch ----------------------------------------------------------------------------------


def test_ema_pytorch_is_ema_pytorchs(seeds: Seeds) -> None:
    for seed in seeds(200):
        run_ema_pytorch(seed)


def ema_pytorch_options(draw: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "beta": draw.choice([0.5, 0.9, 0.9, 1.0]),
        "update_after_step": draw.choice([0, 2, 5]),
    }
    options |= {
        "update_every": draw.choice([1, 1, 2]),
        "inv_gamma": draw.choice([1.0, 3.0]),
        "power": 0.7,
    }
    options |= {"min_value": draw.choice([0.0, 0.4]), "include_online_model": draw.random() < 0.5}
    options |= {
        "param_or_buffer_names_no_ema": draw.choice([set(), {"b.weight", "norm.running_mean"}])
    }
    options |= {"ignore_names": draw.choice([set(), {"a.bias", "norm.running_var"}])}
    options |= {"ignore_startswith_names": draw.choice([set(), {"head."}])}
    options |= {
        "use_foreach": draw.random() < 0.5,
        "coerce_dtype": True,
        "allow_different_devices": draw.random() < 0.5,
    }
    options |= {"update_model_with_ema_every": draw.choice([None, None, 2])}
    options |= {
        "update_model_with_ema_beta": draw.choice([0.0, 0.3]),
        "forward_method_names": ("encode",),
    }
    options |= {
        "move_ema_to_online_device": draw.random() < 0.5,
        "lazy_init_ema": draw.random() < 0.2,
    }
    return options


def another_one(live: Body) -> Body:
    """With other trainable weights."""
    module = copy.deepcopy(live)
    train(module, random.Random(7))
    return module


def run_ema_pytorch(seed: int) -> None:
    draw = random.Random(seed)
    options, tied = ema_pytorch_options(draw), draw.random() < 0.5
    # NOTE: each has a model of its own, as both write to it.
    live, other = make(random.Random(seed), tied), make(random.Random(seed), tied)
    if not options["lazy_init_ema"] and draw.random() < 0.3:
        options["ema_model"] = lambda: another_one(live)
    ours, theirs = ours_ema_pytorch.EMA(live, **options), their_ema_pytorch.EMA(other, **options)
    for step in range(draw.randrange(4, 14)):
        what = draw.choice(
            ["update"] * 9 + ["load", "both load", "back", "copy", "again", "optimizer", "pull"]
        )
        if what == "update":
            for model in (live, other):
                train(model, random.Random(seed + step))
            ours.update()
            theirs.update()
        elif theirs.ema_model is None:
            continue
        elif what == "load":
            saved = copy.deepcopy(ours.state_dict())
            live = copy.deepcopy(live)
            ours = ours_ema_pytorch.EMA(live, **options | {"lazy_init_ema": False})
            ours.load_state_dict(saved)
        elif what == "both load":
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        elif what == "back":
            ours.copy_params_from_ema_to_model()
            theirs.copy_params_from_ema_to_model()
        elif what == "copy":
            ours.copy_params_from_model_to_ema()
            theirs.copy_params_from_model_to_ema()
        elif what == "pull":
            ours.update_model_with_ema(0.8)
            theirs.update_model_with_ema(0.8)
        elif what == "again" and options["include_online_model"]:
            ours = copy.deepcopy(ours)
            live = ours.online_model
        elif what == "optimizer":
            for average, model in ((ours, live), (theirs, other)):
                optimizer = torch.optim.SGD([model.scale], lr=0.1)
                model.scale.grad = torch.ones_like(model.scale)
                handle = average.add_to_optimizer_post_step_hook(optimizer)
                optimizer.step()
                handle.remove()
        where = f"seed {seed} step {step} {what} {options}"
        compare(
            dict(ours.state_dict()), dict(theirs.state_dict()), where, lambda key: "tracked" in key
        )
        compare(
            dict(live.state_dict()), dict(other.state_dict()), where, lambda key: "tracked" in key
        )
        assert ours.get_current_decay() == pytest.approx(theirs.get_current_decay(), abs=1e-6), (
            where
        )
    if theirs.ema_model is not None:
        x = torch.randn(3, 3, dtype=live.scale.dtype)
        for mine, want in [
            (ours(x), theirs(x)),
            (ours.encode(x), theirs.encode(x)),
            (ours.eval()(x), theirs.eval()(x)),
        ]:
            assert torch.allclose(mine, want, atol=1e-5)
        assert torch.allclose(ours.forward_eval(x), theirs.forward_eval(x), atol=1e-5)


def test_ema_pytorch_names_what_floats() -> None:
    """The iterators of the original, in its order; integers are in neither."""
    live = Body()
    live.register_buffer("codes", torch.arange(3))
    ours, theirs = ours_ema_pytorch.EMA(live), their_ema_pytorch.EMA(live)
    for name in ("get_params_iter", "get_buffers_iter"):
        mine, want = (list(getattr(ema, name)(live)) for ema in (ours, theirs))
        assert [key for key, _ in mine] == [key for key, _ in want]
        assert all(a is b for (_, a), (_, b) in zip(mine, want, strict=True))
    assert "norm.running_mean" in dict(mine)
    assert "codes" not in dict(mine)


def test_ema_pytorch_ignores_names_from_then_on() -> None:
    """The sets may change during training: the next move heeds them, and what is averaged goes
    on.
    """
    options = {"beta": 0.5, "update_after_step": 0, "update_every": 1, "inv_gamma": 0.1}
    live, other = make(random.Random(3)), make(random.Random(3))
    pairs = [
        (ours_ema_pytorch.EMA(live, **options), live),
        (their_ema_pytorch.EMA(other, **options), other),
    ]
    sets = ["ignore_names", "param_or_buffer_names_no_ema", "ignore_startswith_names"]
    for step, (name, added) in enumerate(zip(sets, ["a.bias", "b.weight", "norm."], strict=True)):
        for ema, model in pairs:
            for seed in (10 * step, 10 * step + 1):
                train(model, random.Random(seed))
                ema.update()
            getattr(ema, name).add(added)
            train(model, random.Random(10 * step + 2))
            ema.update()
        states = [dict(ema.ema_model.state_dict()) for ema, _ in pairs]
        compare(*states, f"{name} {added}", lambda key: "tracked" in key)
    assert pairs[0][0].average.now == 9


def test_ema_pytorch_writes_16_bits_to_the_nearest() -> None:
    live, wide = nn.Linear(40, 40).bfloat16(), nn.Linear(40, 40)
    average = ours_ema_pytorch.EMA(live, wide)
    average.copy_params_from_ema_to_model()
    assert torch.equal(live.weight, wide.weight.bfloat16())


def test_ema_pytorch_alone() -> None:
    live = Body()
    average = ours_ema_pytorch.EMA(live, update_after_step=0, update_every=1, beta=0.5)
    assert average.model is live
    average.update()
    live.norm.num_batches_tracked += 5
    average.update()
    assert average.ema_model.norm.num_batches_tracked == 5, "theirs stays at 0"
    average.ema_model.double()
    average.restore_ema_model_device()
    average.update()
    with Watch() as watch:
        average.update()
    assert watch.reads == 0
    with pytest.raises(ValueError, match="takes a module, got list"):
        ours_ema_pytorch.EMA([torch.ones(1)])
    with pytest.raises(ValueError, match="one of ema_model and lazy_init_ema"):
        ours_ema_pytorch.EMA(live, ema_model=live, lazy_init_ema=True)
    with pytest.raises(RuntimeError, match="the first update makes it"):
        _ = ours_ema_pytorch.EMA(live, lazy_init_ema=True).ema_model


# --- two ranks ------------------------------------------------------------------------------------


def swa(model: nn.Module, **options: Any) -> nn.Module:
    return ours_swa.AveragedModel(model, multi_avg_fn=ours_swa.get_ema_multi_avg_fn(0.8), **options)


def custom(model: nn.Module, **options: Any) -> nn.Module:
    return ours_swa.AveragedModel(model, avg_fn=halve, **options)


def v3(model: nn.Module, **options: Any) -> nn.Module:
    return ours_timm.ModelEmaV3(
        model, 0.8, update_after_step=1, use_warmup=True, warmup_power=0.7, **options
    )


def warm(now: float, _: float) -> float:
    """At step 0, 10, 20, ...: 9 steps after update_after_step come first."""
    n = 10 * (now - 1) - 2
    return 0.0 if n <= 0 else min(0.8, 1 - (1 + n) ** -0.7)


def pytorch(model: nn.Module, module_fn: Any = None) -> nn.Module:
    options = {
        "update_after_step": 0,
        "update_every": 1,
        "power": 1.0,
        "beta": 0.8,
        "include_online_model": False,
    }
    return ours_ema_pytorch.EMA(model, module_fn, **options)


# what builds it, what updates it, the decay of each of its moves
DROP_INS: dict[
    str, tuple[Callable[..., Any], Callable[[Any, nn.Module], Any], Callable[[float, float], float]]
] = {
    "swa": (
        swa,
        lambda mine, model: mine.update_parameters(model),
        lambda now, _: 0.0 if now == 1 else 0.8,
    ),
    "custom": (
        custom,
        lambda mine, model: mine.update_parameters(model),
        lambda n, _: 0.0 if n == 1 else n / (n + 1),
    ),
    "timm 1": (
        partial(ours_timm.ModelEma, decay=0.8),
        lambda mine, model: mine.update(model),
        lambda *_: 0.8,
    ),
    "timm 2": (
        partial(ours_timm.ModelEmaV2, decay=0.8),
        lambda mine, model: mine.update(model),
        lambda *_: 0.8,
    ),
    "timm 3": (v3, lambda mine, model: mine.update(model, step=10 * int(mine.average.now)), warm),
    "ema_pytorch": (
        pytorch,
        lambda mine, _: mine.update(),
        lambda n, _: min(0.8, 1 - 1 / n),
    ),
    "yolo": (
        partial(yolo.ModelEMA, decay=0.9, tau=5),
        lambda mine, model: mine.update(model),
        Ramp(0.9, 5),
    ),
}


def equals_the_oracle(kind: str, name: str, with_module: bool) -> None:
    """Equal to full weights in one process; evaluated, saved and loaded with no loss."""
    build, update, decay = DROP_INS[name]
    options: dict[str, Any] = {"module_fn": lambda: wrap(kind, Net())} if with_module else {}
    training = Training(kind)
    average = build(training.model, **options)
    oracle = Oracle(training.twin, decay)

    def both() -> None:
        oracle.update()
        update(average, training.model)

    for _ in range(4):
        training.train(1, both)
        training.probe()  # leaves FSDP's roots unsharded
    check(average, oracle, training, kind, with_module)
    saved = io.BytesIO()
    torch.save(average.state_dict(), saved)
    saved.seek(0)
    again = Training(kind)
    second = build(again.model, **options)
    second.load_state_dict(torch.load(saved, weights_only=False))
    check(second, oracle, again, kind, with_module)
    training.train(2, both)
    check(average, oracle, training, kind, with_module)


def check(average: Any, oracle: Oracle, training: Training, kind: str, with_module: bool) -> None:
    weights = average.average.gather()
    assert not weights or oracle.error(weights) < 1e-6, kind
    want = training.twin_with({name: each.float() for name, each in oracle.average.items()})
    tokens = training.data(10_000, 0)[0]
    if kind == "ddp" or with_module:
        module = average.ema if hasattr(type(average), "ema") else getattr(average, average.child)
        with torch.no_grad():
            assert torch.allclose(module.eval()(tokens), want, atol=1e-5), kind
        return
    with raises(RuntimeError, "sharded by FSDP and cannot be copied", "module_fn="):
        _ = average.ema if hasattr(type(average), "ema") else getattr(average, average.child)
    with average.average.swap():
        assert torch.allclose(training.probe(), want, atol=1e-5), kind


def on_two_ranks() -> None:
    for name in DROP_INS:
        more = (
            [("fsdp2", True), ("fsdp1 orig", False), ("fsdp1 orig", True)]
            if name in ("swa", "timm 1")
            else []
        )
        for kind, with_module in [("ddp", False), ("fsdp2", False), *more]:
            try:
                equals_the_oracle(kind, name, with_module)
            except Exception as error:
                raise AssertionError(f"{name} under {kind}, module_fn={with_module}") from error

    built_before_it_was_wrapped()
    one_rank_alone()
    statistics_of_all_ranks()
    saved_with_the_first_ranks_buffers()
    for kind in ("ddp", "fsdp2", "fsdp1 orig"):
        writes_to_the_model(kind)
    another_sharded_model()
    by_distributed_checkpoint()


def built_before_it_was_wrapped() -> None:
    """timm's order of things: the average first, DDP after it."""
    live = Net()
    average = ours_timm.ModelEmaV2(live, 0.5)
    first, before = average.average, live.scale.item()
    wrapped = nn.parallel.DistributedDataParallel(live, find_unused_parameters=True)
    with torch.no_grad():
        live.scale.add_(1)
    average.update(wrapped)
    assert average.average is first
    assert abs(average.module.scale.item() - before - 0.5) < 1e-6
    assert next(iter(average.state_dict())) == "module.scale"


def one_rank_alone() -> None:
    """Under DDP the average may live on one rank: none of its calls waits for another."""
    training = Training("ddp")
    average = yolo.ModelEMA(training.model, 0.9, tau=5) if dist.get_rank() == 0 else None
    training.train(2, lambda: None if average is None else average.update(training.model))
    if average is not None:
        average.ema(training.data(0, 0)[0])
        assert average.updates == 2
        average.ema.state_dict()


class Normed(nn.Module):
    """Wrapped like any block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def statistics_of_all_ranks() -> None:
    """update_bn over each rank's own batches: all ranks' data, whatever holds the average."""
    batches = [
        [torch.randn(5, 3, generator=torch.Generator().manual_seed(3 * r + i)) for i in range(3)]
        for r in (0, 1)
    ]
    torch.manual_seed(0)
    plain = Normed()
    seen = torch.cat([plain.blocks[0][0](batch) for each in batches for batch in each])
    for kind, options in [
        ("ddp", {}),
        ("fsdp2", {}),
        ("fsdp2", {"module_fn": lambda: wrap("fsdp2", Normed())}),
    ]:
        live = wrap(kind, copy.deepcopy(plain))
        average = ours_swa.AveragedModel(live, **options)
        average.update_parameters(live)
        ours_swa.update_bn(batches[dist.get_rank()], average)
        weights = average.average.gather()
        if weights:
            assert torch.allclose(weights["blocks.0.1.running_var"], seen.var(0), atol=1e-5), kind
            assert torch.allclose(weights["blocks.0.1.running_mean"], seen.mean(0), atol=1e-5), kind
        average.update_parameters(live)
        weights = average.average.gather()
        assert not weights or torch.equal(weights["blocks.0.1.running_var"], torch.ones(4)), (
            "an update ends them"
        )


def saved_with_the_first_ranks_buffers() -> None:
    """BatchNorm's buffers differ between the ranks of DDP.

    Guards the choice of what `on_averages` compares.
    """
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    torch.manual_seed(0)
    live = wrap("ddp", Normed())
    averages = [
        ours_swa.AveragedModel(live),
        ours_timm.ModelEmaV3(live, 0.5),
        yolo.ModelEMA(live, 0.5, tau=1),
    ]
    live(torch.randn(5, 3, generator=torch.Generator().manual_seed(dist.get_rank())))
    for i, average in enumerate(averages):
        average.update_parameters(live) if i == 0 else average.update(live)
        mine = average.state_dict()
        average.average.save(f"{folder[0]}/{i}")
        saved = load_file(f"{folder[0]}/{i}")
        for name, value in saved.items():
            here = mine[f"module.{name}" if i < 2 else name]
            assert torch.equal(value, here) == (dist.get_rank() == 0 or "running" not in name), (
                f"{i} {name}"
            )
        average.average.load(f"{folder[0]}/{i}")
    with torch.no_grad():
        averages[0].module.blocks[0][0].bias += dist.get_rank()
    with raises(RuntimeError, "is not wrapped", "blocks.0.0.bias differ"):
        averages[0].average.save(f"{folder[0]}/0")


def writes_to_the_model(kind: str) -> None:
    """Hare to tortoise: the model that is trained becomes a mixture with its average, on every
    rank.
    """
    training = Training(kind)
    options = {
        "update_after_step": 0,
        "update_every": 1,
        "beta": 0.5,
        "include_online_model": False,
    }
    average = ours_ema_pytorch.EMA(training.model, **options)
    training.train(2, average.update)
    training.probe()
    want = {name: each.double() for name, each in average.average.gather().items()}
    live = {name: p.detach().double().clone() for name, p in training.twin.named_parameters()}
    for share in (0.75, 0.0):
        average.update_model_with_ema(share)
        training.probe()
        now = EMA(training.model).gather()
        for name in live if now else ():
            live[name] = share * live[name] + (1 - share) * want[name]
            assert torch.allclose(now[name].double(), live[name], atol=1e-6), f"{kind} {name}"


def another_sharded_model() -> None:
    average = ours_swa.AveragedModel(wrap("fsdp2", Net()))
    with raises(RuntimeError, "the average belongs to another model", "module_fn="):
        average.update_parameters(wrap("fsdp2", Net()))
    with raises(RuntimeError, "cannot be copied or pickled"):
        copy.deepcopy(average)
    with raises(ValueError, "lacks core.emb.weight"):
        average.load_state_dict({"n_averaged": torch.tensor(1), "module.scale": torch.tensor(1.0)})


def by_distributed_checkpoint() -> None:
    """The keys are the originals', so a folder of torch.distributed.checkpoint holds `module.NAME`
    in full.
    """
    from torch.distributed import checkpoint

    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    training = Training("fsdp2")
    average = swa(training.model)
    training.train(2, lambda: average.update_parameters(training.model))
    checkpoint.save({"ema": average.state_dict()}, checkpoint_id=folder[0])
    fresh = swa(Training("fsdp2").model)
    state = {"ema": fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=folder[0])
    fresh.load_state_dict(state["ema"])
    mine, again = average.average.gather(), fresh.average.gather()
    assert all(torch.equal(mine[name], again[name]) for name in average.average.names() if mine)
    assert fresh.n_averaged == 2
    plain = ours_swa.AveragedModel(Net())
    whole = {"ema": dict(plain.state_dict())}
    checkpoint.load(whole, checkpoint_id=folder[0])
    assert all(
        torch.equal(plain.module.get_parameter(name), mine[name])
        for name in average.average.names()
        if mine
    )


@pytest.mark.multirank
def test_two_ranks() -> None:
    run_ranks(2, on_two_ranks)


# --- ema_pytorch's KarrasEMA ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sigma_rel": 0.1}, {"gamma": 3.0, "frozen": True}])
def test_karras_is_ema_pytorchs(options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, buffers, decay, keys and counts in every call; a checkpoint goes both ways."""
    ours_class, theirs_class = ours_ema_pytorch.KarrasEMA, their_ema_pytorch.KarrasEMA
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    arguments = options | {"update_every": 3, "ignore_startswith_names": {"2."}}
    ours, theirs = ours_class(model, **arguments), theirs_class(model, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(10):
        model(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ema in (ours, theirs):
            ema.update()
        assert ours.beta == pytest.approx(theirs.beta, rel=1e-12)
        ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
        assert ours_state.keys() == theirs_state.keys()
        for name, value in theirs_state.items():
            if value.is_floating_point() or "ema_model" not in name:
                torch.testing.assert_close(ours_state[name], value)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    again = ours_class(model, **arguments)
    again.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert int(again.step) == 10
    torch.testing.assert_close(again.ema_model[0].weight, theirs.ema_model[0].weight)
    assert again.average.schedule == Power(gamma=ours.gamma)
    with pytest.raises(ValueError, match="one of sigma_rel and gamma, got None and None"):
        ours_class(model)
