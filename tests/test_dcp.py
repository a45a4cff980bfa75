"""torch.distributed.checkpoint: the average is Stateful, and reshards between wrappers and
worlds.
"""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _create_cpu_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dist_ema import EMA, HalfLife, Uniform
from dist_ema.checkpoint.flat_range import FlatRange
from tests._oracle import Training
from tests._ranks import raises, run_ranks
from tests.data import make_golden as golden

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CHAIN = [("ddp", 2), ("fsdp1 flat", 3), ("fsdp2", 2), ("none", 1), ("hsdp", 4), ("ddp whole", 2)]
ASYNC = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def build(kind: str) -> tuple[Training, EMA]:
    run = Training(kind)
    return run, EMA(run.model, Uniform(), split=kind != "ddp whole")


def load_all_then_save(kind: str, folder: str, earlier: list[str]) -> None:
    for source in earlier:
        _, ema = build(kind)
        dcp.load({"ema": ema}, checkpoint_id=f"{folder}/{source}")
        full = ema.gather()
        assert (ema.now, ema.metrics()["updates"]) == (3.0, 3)
        if full:
            want = torch.load(f"{folder}/{source.removesuffix('-async')}.pt")
            assert [name for name in ema.names() if not torch.equal(full[name], want[name])] == []
            assert torch.equal(full["core.mean"], want["core.mean"]), "the average's own buffer"
    run, ema = build(kind)
    ema.attach(run.optimizer)
    run.train(3)
    with ema.swap():
        for buffer in run.model.buffers():
            if buffer.is_floating_point():
                buffer += 0.5 + dist.get_rank()
    dcp.save({"ema": ema}, checkpoint_id=f"{folder}/{kind}")
    full = ema.gather()
    if full:
        torch.save(full, f"{folder}/{kind}.pt")
    if ASYNC:
        future = dcp.async_save({"ema": ema}, checkpoint_id=f"{folder}/{kind}-async")
        getattr(future, "result", lambda: getattr(future, "upload_completion").result())()  # noqa: B009
        ema.reset()


@pytest.mark.multirank
def test_saved_and_resharded_under_every_wrapper(tmp_path: Path) -> None:
    """Each link of the chain loads what all earlier links saved, also with async_save, then saves
    its own.
    """
    earlier: list[str] = []
    for kind, world in CHAIN:
        run_ranks(world, load_all_then_save, kind, str(tmp_path), earlier)
        earlier += [kind, f"{kind}-async"] if ASYNC else [kind]
    assert len(earlier) == (12 if ASYNC else 6)


def refuse_arithmetic() -> None:
    _, ema = build("ddp")
    state = ema.state_dict()
    part = state["averages"]["average_0"]
    ranges = [value for value in part["weights"].values() if isinstance(value, FlatRange)]
    assert ranges, "with two ranks some weight is cut"
    with raises(RuntimeError, "only for torch.distributed.checkpoint"):
        ranges[0] + 1
    assert "elements of" in repr(ranges[0])
    ema.load_state_dict(state)
    with raises(ValueError, "lacks scale, core.emb.weight"):
        ema.load_state_dict(state | {"averages": {"average_0": part | {"weights": {}}}})
    with raises(ValueError, "lacks Uniform()"):
        ema.load_state_dict(state | {"averages": {}})
    whole = {name: torch.full(tuple(value.shape), 2.0) for name, value in part["weights"].items()}
    ema.load_state_dict(state | {"averages": {"average_0": part | {"weights": whole}}})
    full = ema.gather()
    assert all((full[name] == 2).all() for name in full if name in ema.names())
    odd = {name: torch.full(tuple(value.shape), 3.0) for name, value in part["weights"].items()}
    if dist.get_rank() == 1:
        odd[list(odd)[-1]] = torch.zeros(2, 2, 2)
    with raises(
        ValueError if dist.get_rank() == 1 else RuntimeError, "(2, 2, 2) in the state_dict"
    ):
        ema.load_state_dict(state | {"averages": {"average_0": part | {"weights": odd}}})
    again = ema.gather()
    assert all(torch.equal(again[name], full[name]) for name in full), (
        "nothing was written on any rank"
    )


@pytest.mark.multirank
def test_a_flat_range_is_a_handle() -> None:
    """Arithmetic on it raises instead of giving garbage; full tensors load into any cut."""
    run_ranks(2, refuse_arithmetic)


def test_one_process_gets_plain_tensors(tmp_path: Path) -> None:
    """A world of one can use torch.save and weights_only=True."""
    model = torch.nn.Linear(3, 4)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    again = EMA(torch.nn.Linear(3, 4), 0.5)
    again.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(ema.gather().values(), again.gather().values(), strict=True)
    )
    assert again.now == 1


def save_staged(folder: str) -> None:
    """Each of torch's stagers, twice: the second copy goes into the buffers of the first."""
    run, ema = build("ddp")
    ema.attach(run.optimizer)
    scalars = [
        type(value)
        for value in ema.state_dict()["averages"]["average_0"]["weights"].values()
        if value.dim() == 0
    ]
    assert scalars == [FlatRange if dist.get_rank() else torch.Tensor], "not on this rank"
    options = {"use_pinned_memory": False, "use_non_blocking_copy": False}
    stagers: dict[str, Any] = {
        "blocking": BlockingAsyncStager(),
        "cached": BlockingAsyncStager(cache_staged_state_dict=True),
        "shared": BlockingAsyncStager(cache_staged_state_dict=True),
    }
    if ASYNC:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        stagers["default"] = DefaultStager(StagingOptions(use_async_staging=False, **options))
        stagers["thread"] = DefaultStager(StagingOptions(use_shared_memory=False, **options))
    state = {"ema": ema.state_dict()}
    # NOTE: without an accelerator torch cannot make the pinned buffers that it would keep.
    stagers["cached"].state_dict_cache = _create_cpu_state_dict(state)
    stagers["shared"].state_dict_cache = _create_cpu_state_dict(state, share_memory=True)
    for name, stager in stagers.items():
        for _ in range(2):
            run.train(1)
            staged = stager.stage({"ema": ema.state_dict()})
        staged = staged.result() if isinstance(staged, Future) else staged
        part = staged["ema"]["averages"]["average_0"]["weights"]
        assert isinstance(part["scale"], FlatRange) == bool(dist.get_rank()), "another one writes"
        blocks = [b for v in part.values() if isinstance(v, FlatRange) for _, b in v.blocks]
        assert all(b.is_shared() for b in blocks if name in ("shared", "default"))
        want = ema.gather()
        run.train(1)
        dcp.save(staged, checkpoint_id=f"{folder}/{name}")
        if name in ("shared", "default"):  # as it is sent to a process that writes
            staged = pickle.loads(ForkingPickler.dumps(staged))
            dcp.save(staged, checkpoint_id=f"{folder}/{name}-sent")
        for source in (name, f"{name}-sent") if name in ("shared", "default") else (name,):
            _, other = build("ddp")
            dcp.load({"ema": other}, checkpoint_id=f"{folder}/{source}")
            full = other.gather()
            assert [n for n in other.names() if full and not torch.equal(full[n], want[n])] == []


@pytest.mark.multirank
def test_staged_copies(tmp_path: Path) -> None:
    """Guards the operators and attributes of a FlatRange, and that no rank writes a scalar it
    lacks.
    """
    run_ranks(2, save_staged, str(tmp_path))


def averaged(decays: Any, steps: int = 2) -> EMA:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    ema = EMA(model, decays)
    for _ in range(steps):
        with torch.no_grad():
            model.weight += 1
        ema.update()
    return ema


def load(ema: EMA, folder: Path, planner: Any = None) -> None:
    dcp.load({"ema": ema}, checkpoint_id=folder, no_dist=True, planner=planner)


def weights(ema: EMA) -> list[torch.Tensor]:
    return [ema.gather(which)["weight"].clone() for which in range(len(ema.weights.averages))]


def equal(found: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_another_schedule_goes_on(tmp_path: Path) -> None:
    """Averages are matched by schedule, then in order, and a warning names what differs."""
    saved = averaged([0.5, HalfLife(3)])
    first, second = weights(saved)
    dcp.save({"ema": saved}, checkpoint_id=tmp_path, no_dist=True)
    turned = averaged([HalfLife(3), 0.5], steps=0)
    load(turned, tmp_path)
    assert equal(weights(turned), [second, first])
    assert turned.now == 2
    other = averaged([Uniform(), 0.5], steps=0)
    with pytest.warns(
        UserWarning, match=r"averaged with HalfLife\(units=3\); this EMA goes on with Uniform\(\)"
    ):
        load(other, tmp_path)
    assert equal(weights(other), [second, first])
    alone = averaged(0.5, steps=0)
    load(alone, tmp_path)
    assert torch.equal(weights(alone)[0], first)
    with pytest.raises(CheckpointException, match="holds 2 averages, this EMA has 3"):
        load(averaged([0.1, 0.2, 0.3], steps=0), tmp_path)


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    """The error says what is there and what to do; a planner that loads what it finds does."""
    ema = averaged(0.5)
    state = {"model": torch.nn.Linear(3, 4).state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointException) as caught:
        load(ema, tmp_path)
    assert "holds no average of dist_ema, only model, step. Leave the EMA out" in str(caught.value)
    load(ema, tmp_path, DefaultLoadPlanner(allow_partial_load=True))
    assert ema.now == 2


@pytest.mark.parametrize("clock", [None, 3, torch.zeros(2)])
def test_a_state_dict_without_its_clock_is_named(clock: Any) -> None:
    ema = averaged(0.5)
    with pytest.raises(ValueError, match="lacks clock, a tensor of 7 numbers"):
        ema.load_state_dict(ema.state_dict() | {"clock": clock})
    assert ema.now == 2


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("weights", torch.zeros(4, 3).numpy(), "bias is <class 'numpy.ndarray'> in the state_dict"),
        ("weights", torch.zeros(4, device="meta"), "bias is torch.float32 on meta"),
        ("weights", torch.zeros(4, dtype=torch.complex64), "bias is torch.complex64 on cpu"),
        ("weights", torch.zeros(4, dtype=torch.int64), "bias is torch.int64 on cpu"),
        ("own_by_name", torch.zeros(2), "has 0 buffers, and says of 2 whose they are"),
        ("own_by_name", None, "lacks own_by_name"),
        ("schedule", torch.full((9,), 200), "schedule in the state_dict of the EMA is damaged"),
    ],
)
def test_a_state_dict_that_was_edited_changes_nothing(key: str, value: Any, named: str) -> None:
    """What a copy would fail on is found before the first shadow is written."""
    ema, other = averaged(0.5), averaged(0.5, steps=0)
    state = other.state_dict()
    average = state["averages"]["average_0"]
    if key == "weights":
        average[key] |= {"bias": value}
    elif value is None:
        del average[key]
    else:
        average[key] = value
    before = ema.gather()
    with pytest.raises(ValueError, match=named):
        ema.load_state_dict(state)
    assert ema.now == 2
    assert all(torch.equal(value, before[name]) for name, value in ema.gather().items())


@pytest.mark.parametrize("order", [1, -1])
def test_several_averages_in_one_checkpoint(order: int, tmp_path: Path) -> None:
    """A generator whose weights the discriminator has too, among others; buffers of both grow."""

    def pair() -> dict[str, EMA]:
        models = {"g": torch.nn.Sequential(torch.nn.Linear(3, 3))}
        models["d"] = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        return {name: EMA(models[name], 0.5) for name in [*models][::order]}

    saved, resumed = pair(), pair()
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    dcp.load(resumed, checkpoint_id=tmp_path, no_dist=True)
    for name, ema in saved.items():
        found = resumed[name].gather()
        assert all(torch.equal(found[key], value) for key, value in ema.gather().items())


def test_a_weight_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    dcp.save({"ema": EMA(torch.nn.Linear(3, 4), 0.5)}, checkpoint_id=tmp_path, no_dist=True)
    for model in (torch.nn.Linear(3, 5), torch.nn.Sequential(torch.nn.Linear(3, 4))):
        ema = EMA(model, 0.5)
        with pytest.raises(CheckpointException, match=rf"no average of {ema.names()[0]}, .*rescan"):
            load(ema, tmp_path)


def test_keys_of_earlier_versions() -> None:
    """They held the schedule.

    An equal schedule is found by it, another one where only one is left.
    """
    case = golden.CASES["attach"]
    folder = Path(__file__).parent / "data" / "golden" / "dcp"

    def start(decays: list[float]) -> EMA:
        return golden.ema_of(replace(case, decay=decays), golden.model_of(case))

    same, other = start([0.75, 0.5]), start([0.5, 0.9])
    load(same, folder)
    with pytest.warns(UserWarning, match=r"with Constant\(decay=0.75\); .* Constant\(decay=0.9\)"):
        load(other, folder)
    name = same.names()[0]
    for a, b in ((0, 1), (1, 0)):
        assert torch.equal(same.gather(a)[name], other.gather(b)[name])
    assert not torch.equal(same.gather(0)[name], same.gather(1)[name])
    with pytest.raises(CheckpointException, match=r"Build the EMA with the saved schedules"):
        load(start([0.1, 0.2]), folder)
    state = same.state_dict()  # as torch.save kept it
    for average in state["averages"].values():
        del average["schedule"]
    second, first = state["averages"].values()
    averages = {"Constant(decay=0.5)": first, "Constant(decay=0.75)": second}
    with pytest.warns(UserWarning, match=r"with Constant\(decay=0.75\); .* Constant\(decay=0.9\)"):
        other.load_state_dict(state | {"averages": averages})
    assert torch.equal(other.gather(1)[name], same.gather(0)[name])
