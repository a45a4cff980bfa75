"""The stages of a pipeline are one EMA, and all ranks write one model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dist_ema import EMA, Warmup, load_file
from dist_ema.checkpoint import safetensors
from tests._oracle import Collectives, Oracle, same
from tests._pipelines import LAYERS, Pipeline, make, wrapped
from tests._ranks import raises, run_ranks
from tests._wrappers import wrap
from tests.test_parity import COLUMNS

SCHEDULE = Warmup(0.95)


def check_pipeline(
    kind: str, local: int, folder: str, order: Sequence[str] = ("pp", "dp", "tp")
) -> dict[str, bool]:
    """All columns of one row of the parity table, on one rank."""
    run, held = Pipeline(kind, local, order=order), {}
    ema, oracle = EMA(run.model, SCHEDULE), Oracle(run.twin, SCHEDULE)
    ema.attach(*run.optimizers)
    run.train(4, oracle.update)
    ema.detach()
    with Collectives() as collectives:
        ema.update()
    held["no collective in update"] = collectives.count == 0
    oracle.update()
    full = ema.gather()
    if full:
        held["update = oracle"] = oracle.error(full) < 2e-6

    run.probe()
    before = run.snapshot()
    with ema.swap():
        seen = run.probe()
    restored = run.snapshot()
    held["swap forward"] = seen is None or bool((seen - run.lent(oracle)).abs().max() < 2e-5)
    held["restored"] = same(before, restored)
    with raises(KeyError, "evaluation failed"), ema.swap():
        run.probe()
        raise KeyError("evaluation failed")
    held["restored after raise"] = same(before, run.snapshot())

    ema.attach(*run.optimizers)
    run.train(2, oracle.update)
    ema.detach()
    full = ema.gather()
    held["trains on"] = not full or oracle.error(full) < 2e-6
    ema.save(f"{folder}/ema", max_shard_size=300)
    ema.export(f"{folder}/model.safetensors")
    if full:
        assert full.keys() == make().state_dict().keys()
        held["file = gather"] = all(
            stored.keys() == full.keys() and all(torch.equal(stored[k], full[k]) for k in full)
            for stored in (load_file(f"{folder}/{name}") for name in ("ema", "model.safetensors"))
        )
        torch.save(full, f"{folder}/full.pt")
    again = EMA(run.model, SCHEDULE)
    again.load(f"{folder}/ema")
    reread = again.gather()
    held["load exact"] = again.now == ema.now and all(torch.equal(reread[k], full[k]) for k in full)
    elements = sum(math.prod(state.shard.shape) for state in ema.weights.averages[0].averaged)
    share = elements / (run.lanes if kind != "none" else 1)
    held["bytes"] = ema.metrics()["bytes"] <= 4 * share * 1.5
    return held


ROWS = [("none", 1, 2), ("none", 2, 2), ("fsdp2", 1, 4), ("ddp", 1, 4), ("tp", 1, 4)]
NAMES = {("none", 1): "pp 2", ("none", 2): "pp 2 interleaved", ("fsdp2", 1): "pp 2 x fsdp2"}


@pytest.mark.multirank
@pytest.mark.parametrize(("kind", "local", "world"), ROWS)
def test_parity(
    kind: str,
    local: int,
    world: int,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    """One process in float64 is what 1F1B and interleaved 1F1B average, and what all ranks write.

    What 2 x 2 ranks saved is then loaded by other worlds.
    """
    row: dict[str, bool] = {}
    for held in run_ranks(world, check_pipeline, kind, local, str(tmp_path)):
        for column, cell in held.items():
            row[column] = row.get(column, True) and cell
    name = NAMES.get((kind, local), f"pp 2 x {kind}")
    record_property("parity", [f"{name} W={world}", row])  # conftest prints the table
    assert all(row.values()), row
    assert sorted(row) == sorted(COLUMNS)
    if kind == "fsdp2":
        for other, ranks in (("stages of 1", 4), ("one module", 2), ("one module", 1)):
            run_ranks(ranks, load_elsewhere, other, str(tmp_path))


def load_elsewhere(kind: str, folder: str) -> None:
    """Two stages of two ranks become four stages, none under FSDP2, and one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    want = torch.load(f"{folder}/full.pt")
    model: Any = [make(rank, world)] if kind == "stages of 1" else make()
    model = wrap("fsdp2", model) if kind == "one module" and world > 1 else model
    ema = EMA(model, SCHEDULE)
    ema.load(f"{folder}/ema")
    full = ema.gather()
    assert all(torch.equal(full[name], want[name]) for name in full)
    assert bool(full) == (rank == 0)
    assert ema.now == 7
    ema.save(f"{folder}/again-{kind}-{world}", max_shard_size=300)
    for path in Path(f"{folder}/ema").glob("*.safetensors") if rank == 0 else ():
        again = Path(f"{folder}/again-{kind}-{world}", path.name)
        assert again.read_bytes() == path.read_bytes()


class Tied(nn.Module):
    """A stage with the embedding that another stage has too, and a layer of its own."""

    def __init__(self, number: int, value: float = 0.5, first: str = "emb") -> None:
        super().__init__()
        if first == "head" and number == 1:  # its weight has that name there, and emb's as an alias
            self.head = nn.Linear(3, 4, bias=False)
        self.emb = nn.Linear(3, 4, bias=False)
        self.emb.weight.data.fill_(value)
        self.register_buffer("count", torch.tensor(number))  # may differ
        setattr(self, f"own{number}", nn.Linear(2, 2))
        if first == "untied" and number == 0:
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight.data.fill_(value)
        if number == 1:
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.emb.weight
            self.register_buffer("expert_bias", torch.ones(3))


def share_weights(folder: str) -> None:
    for first in ("emb", "head", "untied"):
        share_one(f"{folder}/{first}", first)


def share_one(folder: str, first: str) -> None:
    """Stage 1 ties head to emb, under either name; stage 0 has emb alone, or both, untied."""
    rank = dist.get_rank()
    stage = Tied(rank, first=first)
    with raises(ValueError, "emb.weight", "other bits", "[0]", "[1]"):
        EMA([Tied(rank, rank, first)])
    ema = EMA([stage], 0.5, buffers="expert_bias")  # which one stage has
    ema.save(f"{folder}/tied")
    assert ema.metrics()["replicas_agree"]
    stored = load_file(f"{folder}/tied")
    names = ["count", "emb.weight", "expert_bias", "head.weight", *OWN]
    assert sorted(stored) == names, sorted(stored)
    assert stored["count"] == 0  # the first stage writes
    assert (
        "head.weight" not in safetensors.read_header(Path(folder, "tied/model.safetensors")).entries
    )
    assert stored["head.weight"].data_ptr() == stored["emb.weight"].data_ptr()
    assert sorted(ema.gather()) == (names if rank == 0 else [])
    ema.load(f"{folder}/tied")
    stage.emb.weight.data += rank
    ema.update()
    with raises(ValueError, "emb.weight", "other bits"):
        ema.save(f"{folder}/tied")
    with raises(ValueError, "emb.weight", "other bits"):
        ema.gather()
    assert load_file(f"{folder}/tied").keys() == stored.keys()
    half_frozen = Tied(rank, first=first)
    half_frozen.emb.weight.requires_grad_(rank == 0)
    with raises(ValueError, "emb.weight", "alike"):
        EMA([half_frozen])
    for verb in (lambda: ema.copy_to(stage), ema.tensors):
        with raises(RuntimeError, "stages of a pipeline", "save() and load()", "into=[stages]"):
            verb()


OWN = ["own0.bias", "own0.weight", "own1.bias", "own1.weight"]


def differ_by_stage(folder: str) -> None:
    rank = dist.get_rank()
    parts: list[nn.Module] = [nn.Sequential(nn.Linear(2, 2))]
    if rank:
        parts = [Tied(2), nn.Module()]
        parts[0].requires_grad_(False)
    ema = EMA(parts, 0.5)
    assert len(ema) == (0 if rank else 2)
    assert repr(ema).startswith("EMA(")
    ema.attach(*(torch.optim.SGD(p.parameters(), 0.1) for p in parts if list(p.parameters())))
    ema.update()
    with ema.swap():
        pass
    ema.save(f"{folder}/part")
    ema.load(f"{folder}/part")
    whole = load_file(f"{folder}/part")
    assert sorted(whole) == [
        "0.bias",
        "0.weight",
        "count",
        "emb.weight",
        "own2.bias",
        "own2.weight",
    ]
    with raises(ValueError if rank else (ValueError, RuntimeError), "nothing"):
        EMA(parts, only="no such name")
    missing = [*parts, nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 1))][-1:] if rank == 0 else parts
    again = EMA(missing, 0.5)
    with raises((ValueError, RuntimeError), "1.weight"):  # both ranks learn of it
        again.load(f"{folder}/part")
    with raises(ValueError, "two stages of this rank", "weight"):
        EMA([nn.Linear(1, 1), nn.Linear(1, 1)])
    parts[0].requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EMA(parts, 0.5).load(f"{folder}/part")
    texts = [str(warning.message) for warning in caught]  # what a stage alone can say, it says
    assert len(texts) == rank, texts
    assert not rank or "live values of emb.weight" in texts[0], texts


def save_through_dcp(folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    run = Pipeline("none", 2)
    ema = EMA(run.model, SCHEDULE)
    ema.attach(*run.optimizers)
    run.train(2)
    dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp")
    other = EMA(run.model, SCHEDULE)
    dcp.load({"ema": other}, checkpoint_id=f"{folder}/dcp")
    want, full = ema.gather(), other.gather()
    assert all(torch.equal(full[name], want[name]) for name in want)
    assert other.now == ema.now == 2
    with ema.swap():  # every stage says which of its buffers were recalibrated
        for part in run.model:
            for layer in part.layers.values():
                layer.expert_bias += 1 + dist.get_rank()
    full = ema.gather()
    for i in range(LAYERS) if full else ():
        assert bool((full[f"layers.{i}.expert_bias"] == 1 + i % 2).all())


def teach(folder: str) -> None:
    """into= other stages: the teacher's pipeline computes with the average, also after a load."""
    run, teacher = Pipeline("none", 2), Pipeline("none", 2)
    oracle = Oracle(run.twin, SCHEDULE)
    ema = EMA(run.model, SCHEDULE, into=teacher.model)
    ema.attach(*run.optimizers)
    run.train(4, oracle.update)
    full, seen = ema.gather(), teacher.probe()
    assert not full or oracle.error(full) < 2e-6
    assert seen is None or bool((seen - run.lent(oracle)).abs().max() < 2e-5)
    ema.save(f"{folder}/teacher")
    run.train(1)
    ema.load(f"{folder}/teacher")
    reread = ema.gather()
    assert all(torch.equal(reread[name], full[name]) for name in full)
    again = teacher.probe()
    assert seen is None or torch.equal(seen, again)
    with raises(ValueError, "the teacher has no layers."):
        EMA(run.model, SCHEDULE, into=Pipeline("none", 2).model[:1])


def stages_on_two_ranks(folder: str) -> None:
    for work in (share_weights, differ_by_stage, save_through_dcp, teach):
        work(folder)


@pytest.mark.multirank
def test_two_stages(tmp_path: Path) -> None:
    run_ranks(2, stages_on_two_ranks, str(tmp_path))


def stages_alone(folder: str) -> None:
    """Each stage has an EMA of its own, which saves to one path: one of the two is refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "dp"))
    stage = dist.get_rank() // 2
    ema = EMA(wrapped("fsdp2", make(stage, 2), mesh), 0.5)
    for _ in range(2):
        refusal = ""
        try:
            ema.save(f"{folder}/one")
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
        refusals: list[str] = [""] * 4
        dist.all_gather_object(refusals, refusal)
        lost = [i for i, text in enumerate(refusals) if text]
        assert lost in ([0, 1], [2, 3]), refusals
        others = [rank for rank in range(4) if rank not in lost]
        assert all(f"ranks {others} save other weights" in refusals[i] for i in lost), refusals
        assert "EMA([stage, ...])" in refusals[lost[0]]
        dist.barrier()
    ema.save(f"{folder}/{stage}")
    if not refusal:
        assert load_file(f"{folder}/one").keys() == load_file(f"{folder}/{stage}").keys()


@pytest.mark.multirank
def test_stages_alone_do_not_replace_each_other(tmp_path: Path) -> None:
    run_ranks(4, stages_alone, str(tmp_path))
