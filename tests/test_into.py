"""The average as another module's weights: every teacher equals the plain run, waits for its
update, and is what is saved.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from dist_ema import EMA, Warmup, load_file
from dist_ema.averaging.engines import Overlapped
from dist_ema.averaging.executors import Instant
from tests._models import Images, Net, image_batch
from tests._oracle import Oracle, Training, same, snapshot
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap

SCHEDULE = Warmup(0.9)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shift(module: nn.Module, by: float = 1.0) -> None:
    """Move the trainable weights, as an optimizer would."""
    with torch.no_grad():
        for p in module.parameters():
            p += by * p.requires_grad


# --- whose memory ---------------------------------------------------------------------------------


def test_teacher_is_the_shadow() -> None:
    """Overwritten with live, frozen, and moved bit for bit like an EMA of its own, in no memory but
    its own.
    """
    model, teacher = Net(), Net()
    ema, alone = EMA(model, SCHEDULE, into=teacher), EMA(model, SCHEDULE)
    assert equal(state(model), state(teacher))
    assert not any(p.requires_grad for p in teacher.parameters())
    for _ in range(3):
        shift(model)
        ema.update()
        alone.update()
    assert equal(alone.gather(), state(teacher))
    assert equal(alone.gather(), ema.gather())
    mine = {p.data_ptr() for p in teacher.parameters()}
    assert all(
        slot.shadow.data_ptr() in mine
        for slot in ema.weights.averages[0].averaged
        if slot.shadow is not None
    )
    assert "float32 into Net, cpu" in repr(ema)
    with (
        pytest.raises(RuntimeError, match="the teacher is the average, so evaluate the teacher"),
        ema.swap(),
    ):
        pass


class Online(nn.Module):
    """BYOL: a predictor that the teacher lacks, and a centre that only the teacher has."""

    def __init__(self, student: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        if student:
            self.predictor = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        else:
            self.register_buffer("center", torch.full((2,), 5.0))


def test_only_says_what_is_touched() -> None:
    student, teacher = Online(True), Online(False)
    with pytest.raises(
        ValueError, match=r"no predictor\.0\.weight, predictor\.0\.bias, .* Leave out with only="
    ):
        EMA(student, into=teacher)
    before = state(teacher)
    ema = EMA(student, 0.5, only="body", into=teacher)
    shift(student)
    ema.update()
    assert ema.names() == ["body.weight", "body.bias"]
    for name in ("head.weight", "head.bias", "center"):
        assert torch.equal(before[name], state(teacher)[name])
    assert torch.allclose(teacher.body.weight, student.body.weight - 0.5)
    assert teacher.head.weight.requires_grad, "not the EMA's to freeze"
    assert torch.equal(ema.gather()["predictor.0.weight"], student.predictor[0].weight)


def untied() -> Net:
    net = Net()
    net.core.head.weight = nn.Parameter(net.core.emb.weight.detach().clone())
    return net


def strided() -> nn.Module:
    net = nn.Linear(4, 4)
    net.weight = nn.Parameter(torch.zeros(4, 8)[:, ::2])
    return net


REFUSED: list[tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], str]] = [
    (
        Net,
        lambda _: Net(hidden=6),
        r"up.weight is \(5, 6\) in the model and \(6, 6\) in the teacher",
    ),
    (
        Images,
        lambda _: Images().to(memory_format=torch.channels_last),
        r"a.weight: this rank holds elements 0:135",
    ),
    (Net, copy.copy, "is one weight in the model and the teacher: give into= a copy"),
    (Net, lambda _: untied(), r"core.emb.weight and core.head.weight are tied in one"),
    (untied, lambda _: Net(), r"core.head.weight and core.emb.weight are tied in one"),
    (lambda: nn.Linear(4, 4), lambda _: strided(), "weight of the teacher is strided or expanded"),
    (
        lambda: nn.Linear(4, 4),
        lambda _: nn.Linear(4, 4).to(torch.float8_e5m2),
        "float8_e5m2 in the teacher",
    ),
    (
        lambda: nn.Linear(4, 4),
        lambda _: nn.Linear(4, 4, dtype=torch.complex64),
        "complex64 in the teacher",
    ),
    (
        lambda: nn.Linear(4, 4),
        lambda _: nn.Linear(4, 4, device="meta"),
        "weight is on the meta device",
    ),
    (lambda: nn.Linear(4, 4), lambda _: 7, "got int"),
]


@pytest.mark.parametrize(
    ("make", "teacher", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_unlike_teachers_are_refused(make: Any, teacher: Any, words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=words):
        EMA(model, into=teacher(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": [0.5, 0.9]}, "one average, got 2 decays"),
        ({"device": "cpu"}, "device='cpu', .* together with into="),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16 together with into="),
    ],
)
def test_options_that_the_teacher_decides(options: dict[str, Any], words: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=words):
        EMA(model, into=copy.deepcopy(model), **options)


def test_teacher_is_not_trained() -> None:
    model = nn.Linear(2, 2)
    teacher = copy.deepcopy(model)
    ema = EMA(model, into=teacher)
    with pytest.raises(ValueError, match="trains weight, bias of the teacher"):
        ema.attach(torch.optim.SGD([*model.parameters(), *teacher.parameters()]))
    ema.attach(torch.optim.SGD(model.parameters()))


def test_a_teacher_of_two_averages_is_refused() -> None:
    """Its memory would be neither of them. Parts may be of two, and a dropped EMA gives it free."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    teacher = copy.deepcopy(model)
    first = EMA(model, 0.5, into=teacher, only="^0")
    second = EMA(model, 0.9, into=teacher, only="^1")
    for only in (None, "weight"):  # through another module that holds the same weights
        with pytest.raises(ValueError, match=r"0\.weight.* is the average of another EMA already"):
            EMA(model, 0.9, into=nn.Sequential(*teacher), only=only)
    before = first.gather()
    del first, second
    again = EMA(model, 0.9, into=teacher)
    again.rescan()
    assert all(map(torch.equal, before.values(), again.gather().values()))


def test_lists_teach_lists() -> None:
    model, teacher = Net(), Net()
    ema = EMA(model.parameters(), 0.5, into=teacher.parameters())
    shift(model)
    ema.update()
    assert torch.allclose(teacher.core.emb.weight, model.core.emb.weight - 0.5)


# --- buffers and frozen weights -------------------------------------------------------------------


def trained_images(**options: Any) -> tuple[Images, Images, EMA, EMA]:
    torch.manual_seed(0)
    model, teacher = Images(), Images()
    plain = {key: value for key, value in options.items() if key != "only"}
    ema, alone = EMA(model, 0.9, into=teacher, **options), EMA(model, 0.9, **plain)
    for step in range(3):
        model(image_batch(step, 0)[0])
        shift(model, 0.1)
        ema.update()
        alone.update()
    return model, teacher, ema, alone


def test_buffers() -> None:
    """copy: live's of the last update; average: averaged, integers copied; left out: the teacher's
    own.
    """
    model, teacher, ema, _ = trained_images()
    for (name, live), mine in zip(model.named_buffers(), teacher.buffers(), strict=True):
        assert torch.equal(live, mine), name
    model(image_batch(3, 0)[0])
    assert not torch.equal(model.norm.running_mean, teacher.norm.running_mean)
    assert torch.equal(ema.gather()["norm.running_mean"], teacher.norm.running_mean), (
        "the teacher's, not live's"
    )
    model, teacher, ema, alone = trained_images(buffers="average")
    assert torch.equal(alone.gather()["norm.running_mean"], teacher.norm.running_mean)
    assert teacher.norm.num_batches_tracked == 3
    _, teacher, _, _ = trained_images(
        only=lambda name: "running" not in name and "tracked" not in name
    )
    assert torch.equal(teacher.norm.running_mean, torch.zeros(5))


def test_registered_anew() -> None:
    """Modules assign buffers, on either side: what is copied is what they register now."""
    model, teacher = Images(), Images()
    ema = EMA(model, 0.5, into=teacher)
    for i in range(4):
        model.norm.running_mean = torch.full((5,), float(i))
        teacher.norm.running_var = torch.full((5,), -1.0)
        teacher.eval()(image_batch(0, 0)[0])
        shift(model)
        ema.update()
        assert torch.equal(teacher.norm.running_mean, model.norm.running_mean)
        assert torch.equal(teacher.norm.running_var, model.norm.running_var)


def test_frozen_weights_follow() -> None:
    """A checkpoint that is loaded after the EMA was built reaches the teacher's frozen weights
    too.
    """
    model, teacher = Net(), Net()
    ema = EMA(model, 0.5, into=teacher)
    model.load_state_dict(Net().state_dict())
    assert not torch.equal(model.core.frozen.weight, teacher.core.frozen.weight)
    ema.update()
    assert torch.equal(model.core.frozen.weight, teacher.core.frozen.weight)
    model.load_state_dict(Net().state_dict())
    assert torch.equal(ema.gather()["core.frozen.weight"], model.core.frozen.weight)
    shift(model)
    ema.reset()
    assert equal(state(model), state(teacher))


def test_frozen_weights_that_no_counter_saw_follow_at_the_next_verb() -> None:
    model, teacher = Net(), Net()
    ema = EMA(model, 0.5, into=teacher)
    ema.update()
    model.core.frozen.weight.data.add_(1)
    assert torch.equal(ema.gather()["core.frozen.weight"], model.core.frozen.weight)
    assert torch.equal(teacher.core.frozen.weight, model.core.frozen.weight)


def test_frozen_weights_that_are_replaced_follow() -> None:
    """One that is gone raises, as the teacher would keep its last value."""
    model, teacher = Net(), Net()
    ema = EMA(model, 0.5, into=teacher)
    for _ in range(3):
        frozen = torch.randn_like(model.core.frozen.weight)
        model.core.frozen.weight = nn.Parameter(frozen, requires_grad=False)
        ema.update()
        assert torch.equal(teacher.core.frozen.weight, frozen)
    del model.core.frozen
    with pytest.raises(RuntimeError, match=r"^core\.frozen\.weight.* is gone from the model"):
        ema.update()


def test_rescan() -> None:
    model, teacher = Net(), Net()
    ema = EMA(model, 0.5, into=teacher)
    shift(model)
    ema.update()
    kept = teacher.core.emb.weight.clone()
    model.core.frozen.requires_grad_(True)
    ema.rescan()
    assert "core.frozen.weight" in ema.names()
    assert torch.equal(kept, teacher.core.emb.weight), "rescan seeds only what is new"
    shift(model)
    ema.update()
    assert torch.allclose(teacher.core.frozen.weight, model.core.frozen.weight - 0.5)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_teacher_rounds_stochastically(dtype: torch.dtype) -> None:
    """bfloat16: the same bits as a compact shadow.

    Rounded to nearest neither would ever have moved.
    """
    model = nn.Linear(64, 64)
    teacher = copy.deepcopy(model).to(dtype)
    ema, compact = EMA(model, 0.9999, into=teacher), EMA(model, 0.9999, dtype=torch.bfloat16)
    start = teacher.weight.float()
    shift(model)
    for _ in range(50):
        ema.update()
        compact.update()
    assert dtype == torch.float16 or torch.equal(teacher.weight, compact.gather()["weight"])
    assert abs((teacher.weight.float() - start).mean() / (1 - 0.9999**50) - 1) < 0.1


def test_teacher_that_changes_is_named() -> None:
    model, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
    ema = EMA(model, 0.5, into=teacher)
    for _ in range(4):
        teacher.weight.data = (
            teacher.weight.data.clone()
        )  # elsewhere, as FSDP2 puts it in a first forward: followed
        teacher(torch.ones(2, 3))
        teacher.load_state_dict(model.state_dict())
        shift(model)
        ema.update()
        assert torch.allclose(teacher.weight, model.weight - 0.5)
    teacher.double()(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match="weight of the teacher was torch.float32 .* now torch.float64"
    ):
        ema.update()
    teacher = nn.Linear(3, 3)
    ema = EMA(model, 0.5, into=teacher)
    teacher.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="weight, bias of the teacher is another object"):
        ema.gather()


# --- reads behind our back ------------------------------------------------------------------------


class Late:
    """An executor that works only when somebody waits."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], None]) -> str:
        self.waiting.append(work)
        return "ticket"

    def keep(self, tensors: Any) -> None:
        """Nothing is freed here."""

    def mark(self) -> Instant:
        return Instant()

    def done(self, ticket: Any) -> bool:
        return not self.waiting

    def wait(self, ticket: Any) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x).tanh()


READS: dict[str, Callable[[Encoder, Tensor], Any]] = {
    "forward": lambda teacher, x: teacher(x),
    "method": lambda teacher, x: teacher.encode(x),
    "submodule": lambda teacher, x: teacher.b(x),
    "state_dict": lambda teacher, x: state(teacher)["a.weight"],
    "deep copy": lambda teacher, x: copy.deepcopy(teacher)(x),
    "compiled later": lambda teacher, x: torch.compile(teacher, backend="eager")(x),
    "in place": lambda teacher, x: (teacher.compile(backend="eager"), teacher(x))[1],
    "in a graph": lambda teacher, x: torch.compile(lambda x: teacher(x) + 1, backend="eager")(x),
}


def late(start: int = 0) -> tuple[Encoder, Encoder, torch.optim.Optimizer, EMA]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, teacher = Encoder(), Encoder()
    ema = EMA(model, 0.5, into=teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema.attach(optimizer, start=start)
    ema.weights.updates.engine = Overlapped(Late())
    return model, teacher, optimizer, ema


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("read", [name for name in READS if name != "deep copy"])
def test_reads_wait(read: str) -> None:
    """Each read sees the update that was under way: red without the hook that announces it."""
    model, teacher, optimizer, ema = late()
    plain = Encoder()
    for _ in range(3):
        step(model, optimizer)
        with torch.no_grad():
            seen = READS[read](teacher, torch.ones(2, 3))
            plain.load_state_dict(ema.gather())
            assert torch.equal(seen, READS[read](plain, torch.ones(2, 3)))


def test_compiled_teacher() -> None:
    """Its graph does not break: the hook of the module that was compiled runs outside."""
    model, inner, optimizer, ema = late()
    ema.detach()
    del ema
    graphs: list[Any] = []
    teacher = torch.compile(inner, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    ema = EMA(model, 0.5, into=teacher)
    ema.attach(optimizer)
    ema.weights.updates.engine = Overlapped(Late())
    for _ in range(3):
        step(model, optimizer)
        with torch.no_grad():
            seen = teacher(torch.ones(2, 3))
            assert torch.equal(seen, inner(torch.ones(2, 3)))
    assert len(graphs) == 1


class Broken(nn.Module):
    """A graph breaks in the middle, several modules deep."""

    def __init__(self, deep: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.LayerNorm(3)
        self.inner = nn.ModuleList([Broken(deep - 1) for _ in range(2 if deep else 0)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        for each in self.inner:
            x = each(x)
        return self.b(x)


def test_compiled_teacher_whose_graph_breaks() -> None:
    """Dynamo runs what it compiled for the hook of one module with the hooks of others."""
    torch._dynamo.reset()
    model, inner = Broken(), Broken()
    teacher = torch.compile(inner, backend="eager")
    ema, optimizer = EMA(model, 0.5, into=teacher), torch.optim.SGD(model.parameters(), lr=1.0)
    ema.attach(optimizer)
    plain = Broken()
    for size in (2, 3, 4):
        step(model, optimizer)
        with torch.no_grad():
            seen = teacher(torch.ones(size, 3))
            plain.load_state_dict(ema.gather())
            assert torch.equal(seen, plain(torch.ones(size, 3)))


def test_load_state_dict_waits() -> None:
    model, teacher, optimizer, ema = late()
    step(model, optimizer)
    other = Encoder()
    teacher.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(teacher(torch.ones(2, 3)), other(torch.ones(2, 3)))
    assert len(ema) == 4


def test_live_until_start() -> None:
    """Before averaging begins the average is the live model, so the teacher is."""
    model, teacher, optimizer, ema = late(start=3)
    for i in range(5):
        step(model, optimizer)
        with torch.no_grad():
            same_now = torch.equal(teacher(torch.ones(2, 3)), model(torch.ones(2, 3)))
        assert same_now == (i < 3), i
    assert ema.now == 2


def test_copies_of_the_teacher_are_free() -> None:
    """A deep copy or a pickle is a module like any other, and the EMA is not kept alive by its
    teacher. The pickle loads where dist_ema is not installed.
    """
    model, teacher, optimizer, ema = late()
    step(model, optimizer)
    written = pickle.dumps(teacher)
    assert b"dist_ema" not in written
    copies = [copy.deepcopy(teacher), pickle.loads(written)]
    waiting = ema.weights.updates.engine.executor.waiting  # type: ignore[attr-defined]
    for each in copies:
        each(torch.ones(2, 3))
        each.load_state_dict(each.state_dict())
        torch.compile(each, backend="eager", fullgraph=True)(torch.ones(2, 3))
        assert len(waiting) == 1, "a copy announced a read of the teacher"
    gone = weakref.ref(ema.weights)
    assert hooks_on(teacher) > 0
    ema.detach()
    del ema, waiting
    gc.collect()
    assert gone() is None
    teacher(torch.ones(2, 3))
    assert hooks_on(teacher) == 0, "the forward takes off what a dead EMA has left"


def test_an_ema_that_is_collected_within_a_state_dict() -> None:
    """torch iterates over the hooks of a module meanwhile."""
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    ring: list[Any] = [EMA(model, 0.5, into=teacher)]
    ring.append(ring)
    del ring
    for register in (
        teacher.register_state_dict_pre_hook,
        teacher.register_load_state_dict_pre_hook,
    ):
        for _ in range(2):
            register(lambda *_: gc.collect())
    teacher.load_state_dict(teacher.state_dict())
    teacher(torch.ones(1, 2))
    assert hooks_on(teacher) == 4, "those of the test"


def hooks_on(module: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_pre_hooks")
    return sum(len(getattr(each, kind)) for each in module.modules() for kind in kinds)


# --- files ----------------------------------------------------------------------------------------


def test_verbs_read_and_write_the_teacher(tmp_path: Path) -> None:
    """save, export, gather and copy_to take the teacher as it is, buffers and frozen weights
    included; load fills it.
    """
    _, teacher, ema, _ = trained_images()
    teacher.norm.running_mean.fill_(3.0)  # recalibrated
    want = state(teacher)
    ema.save(tmp_path / "average")
    ema.export(tmp_path / "out.safetensors")
    other = Images()
    ema.copy_to(other)
    assert equal(want, state(other))
    assert equal(want, load_file(tmp_path / "average"))
    assert equal(want, load_file(tmp_path / "out.safetensors"))
    fresh, pupil = Images(), Images()
    again = EMA(fresh, 0.9, into=pupil)
    live = state(fresh)
    again.load(tmp_path / "average")
    assert equal(want, state(pupil))
    assert equal(live, state(fresh))
    assert again.now == 3
    plain = EMA(fresh, 0.9)
    plain.load(tmp_path / "average")
    assert equal({n: want[n] for n in plain.names()}, {n: plain.gather()[n] for n in plain.names()})
    plain.save(tmp_path / "plain")
    again.load(tmp_path / "plain")


def test_state_dict() -> None:
    """The weights and every floating buffer of the teacher."""
    model, teacher, ema, _ = trained_images()
    teacher.norm.running_mean.fill_(3.0)
    want = ema.gather()
    pupil = Images()
    again = EMA(model, 0.9, into=pupil)
    again.load_state_dict(ema.state_dict())
    assert equal(want, state(pupil))
    again.load_state_dict(trained_images(buffers="average")[3].state_dict())


# --- ranks ----------------------------------------------------------------------------------------

PAIRS = [
    ("ddp", "none"),
    ("fsdp1 flat", "fsdp1 flat"),
    ("fsdp1 orig", "fsdp1 orig"),
    ("fsdp2", "fsdp2"),
    ("fsdp2 offload", "fsdp2 offload"),
    ("fsdp1 no_shard", "none"),
]


def pupil_of(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return wrap(kind, Net()).eval()


def alternate(kind: str, teacher_kind: str, folder: str) -> None:
    """Update and forward, three times: what the teacher computes is what one process computes with
    the oracle.
    """
    run = Training(kind)
    teacher = pupil_of(teacher_kind)
    run._probe(teacher)  # unsharded before the EMA comes
    ema = EMA(run.model, SCHEDULE, into=teacher)
    assert same(snapshot(run.model), snapshot(teacher)), kind
    oracle = Oracle(run.twin, SCHEDULE)
    ema.attach(run.optimizer)
    for i in range(3):
        run.train(1, oracle.update)
        # The outermost module, and the FSDP module inside, whose own hook must come after ours.
        seen = run._probe(teacher) if i != 1 else run._probe(teacher.core) * teacher.scale
        want = run.twin_with({name: value.float() for name, value in oracle.average.items()})
        assert (seen - want).abs().max() < 2e-5, kind
    full = ema.gather()
    assert not full or oracle.error(full) < 2e-6, kind
    ema.save(f"{folder}/{kind}")
    ema.load(f"{folder}/ddp")  # whoever wrote it
    run._probe(teacher)
    again = ema.gather()
    assert all(torch.equal(load_file(f"{folder}/ddp")[name], again[name]) for name in again), kind
    dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp-{kind}")
    ema.reset()
    assert (run._probe(teacher) - run.probe()).abs().max() < 2e-6, kind
    dcp.load({"ema": ema}, checkpoint_id=f"{folder}/dcp-{kind}")
    third = ema.gather()
    assert all(torch.equal(third[name], again[name]) for name in third), kind
    if kind == "fsdp1 orig":
        full_state_dict(run, teacher, ema)


def full_state_dict(run: Training, teacher: nn.Module, ema: EMA) -> None:
    """FSDP1 gathers in a hook of its own before state_dict: ours must have waited by then."""
    ema.weights.updates.engine = Overlapped(Late())
    run.train(1)
    held = state(teacher.core)
    full = ema.gather()
    assert all(torch.equal(full[f"core.{name}"], value) for name, value in held.items() if full)


def cut_otherwise() -> None:
    """Another cut is refused on every rank, even where only one of them sees it."""
    either: Any = (ValueError, RuntimeError)
    sharded, plain = wrap("fsdp2", Net()), Net()
    with raises(either, "this rank holds", "in the model and", "Wrap both the same way"):
        EMA(sharded, into=plain)
    torch.manual_seed(0)
    replicas = wrap("ddp", Net())
    with raises(either, "core.emb.weight", "this rank holds elements 0:42 of the block (7, 6)"):
        EMA(replicas, into=wrap("fsdp2", Net()))
    odd = Net(hidden=6 if dist.get_rank() else 5)
    with raises(either, "core.blocks.0.up.weight is (5, 6) in the model and (6, 6) in the teacher"):
        EMA(replicas, into=odd)


def images_under_ddp() -> None:
    """Each rank's teacher follows its own rank's statistics, as live does; the first rank's go into
    files.
    """
    run = Training("ddp", Images, image_batch)
    teacher = Images().eval()
    ema = EMA(run.model, 0.5, into=teacher)
    ema.attach(run.optimizer)
    run.train(2)
    mine = dict(run.model.module.named_buffers())
    assert all(torch.equal(value, mine[name]) for name, value in teacher.named_buffers())
    full = ema.gather()
    assert not full or torch.equal(full["norm.running_mean"], mine["norm.running_mean"])


def on_ranks(folder: str) -> None:
    for kind, teacher in PAIRS:
        alternate(kind, teacher, folder)
    cut_otherwise()
    images_under_ddp()


@pytest.mark.multirank
def test_teachers_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, on_ranks, str(tmp_path))


def test_a_teacher_whose_weights_are_replaced_is_named() -> None:
    """A new head, or `load_state_dict(assign=True)`: the average would go on in the old objects."""

    def head_replaced(teacher: Any) -> None:
        teacher[1] = nn.Linear(4, 4)

    def loaded(teacher: Any) -> None:
        state = {name: value.clone() for name, value in teacher.state_dict().items()}
        teacher.load_state_dict(state, assign=True)

    for edit in (head_replaced, loaded):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        teacher = copy.deepcopy(model)
        ema = EMA(model, 0.5, into=teacher)
        ema.update()
        edit(teacher)
        for verb in (ema.gather, ema.metrics):
            with pytest.raises(RuntimeError, match=r"1\.weight.* of the teacher is another object"):
                verb()


def test_an_update_names_the_assigned_weights_of_a_teacher() -> None:
    model = nn.Linear(4, 4)
    teacher = copy.deepcopy(model)
    ema = EMA(model, 0.5, into=teacher)
    for _ in range(3):
        ema.update()
    teacher.load_state_dict({n: v.clone() for n, v in teacher.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="weight, bias of the teacher"):
        ema.update()


# --- the teacher's own buffers --------------------------------------------------------------------


def test_own_buffers(tmp_path: Path) -> None:
    """A teacher in training mode keeps its BatchNorm's statistics, which files hold and load."""
    torch.manual_seed(0)
    model, teacher = Images(), Images()
    teacher.norm.running_mean.fill_(7.0)
    ema = EMA(model, 0.5, into=teacher, buffers="own")
    assert teacher.norm.running_mean.eq(7).all()
    for step in range(2):
        shift(model)
        model(image_batch(step, 0)[0])
        teacher(image_batch(step, 1)[0])
        own = teacher.norm.running_mean.clone()
        ema.update()
        assert torch.equal(teacher.norm.running_mean, own)
        assert not torch.equal(own, model.norm.running_mean)
    ema.save(tmp_path)
    assert torch.equal(load_file(tmp_path)["norm.running_mean"], own)
    assert torch.equal(ema.gather()["norm.running_mean"], own)
    teacher.norm.running_mean.zero_()
    ema.load(tmp_path)
    assert torch.equal(teacher.norm.running_mean, own)
    with pytest.raises(ValueError, match="buffers='own' needs into="):
        EMA(model, buffers="own")
