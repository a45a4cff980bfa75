"""Several averages in one pass: each equals an EMA of its own, and each has its own files, swaps
and buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from dist_ema import EMA, Constant, HalfLife, Power, load_file
from dist_ema.averaging.kernels.eager import Direct, Packed, UpdatePlan
from tests._models import Images, image_batch
from tests._oracle import Training, same, snapshot
from tests._ranks import raises, run_ranks

SCHEDULES = [Power(gamma=2.0), 0.7, HalfLife(3.0)]


def several(folder: str, options: dict[str, Any]) -> None:
    for kind in ("ddp", "fsdp2"):
        run = Training(kind, Images, image_batch)
        together = EMA(run.model, SCHEDULES, **options)
        alone = [EMA(run.model, each, **options) for each in SCHEDULES]
        together.attach(run.optimizer, every=2)
        for ema in alone:
            ema.attach(run.optimizer, every=2)
        run.train(5)
        for i, ema in enumerate(alone):
            want, got = ema.gather(), together.gather(i)
            assert all(torch.equal(want[name], got[name]) for name in want)
        before = snapshot(run.model)
        with together.swap("Constant(decay=0.7)"):
            lent = snapshot(run.model)
            run.model.train()(image_batch(0, dist.get_rank())[0])
        with alone[1].swap():
            assert same(lent, snapshot(run.model))
        assert same(before, snapshot(run.model))
        path = f"{folder}/{kind}"
        together.save(path, max_shard_size=600)
        fulls = [together.gather(i) for i in range(3)]
        again = EMA(run.model, SCHEDULES, **options)
        again.load(path)
        for i, full in enumerate(fulls):
            reread = again.gather(i)
            assert all(torch.equal(full[name], reread[name]) for name in full), (kind, i)
        one = EMA(run.model, 0.7, **options)
        one.load(path)
        middle = one.gather()
        assert all(torch.equal(fulls[1][name], middle[name]) for name in middle), (
            "found by its schedule"
        )
        with raises((ValueError, RuntimeError), "holds 3 averages, this EMA has 4"):  # type: ignore[arg-type]
            EMA(run.model, [*SCHEDULES, 0.1]).load(path)
        dcp.save({"ema": together}, checkpoint_id=f"{path}-dcp")
        again = EMA(run.model, SCHEDULES, **options)
        dcp.load({"ema": again}, checkpoint_id=f"{path}-dcp")
        assert all(torch.equal(fulls[2][name], value) for name, value in again.gather(2).items())


@pytest.mark.multirank
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16, "buffers": "average"}, {"device": "cpu"}], ids=str
)
def test_several_equal_each_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    run_ranks(2, several, str(tmp_path), options)
    assert load_file(tmp_path / "ddp").keys() == Images().state_dict().keys()
    further = sorted(path.name for path in (tmp_path / "ddp" / "averages").iterdir())
    assert further == ["1-Constant", "2-HalfLife"]


def test_which_names_an_average() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, SCHEDULES)
    for which in (1, np.int64(1), "Constant(decay=0.7)", Constant(0.7)):
        assert ema.metrics(which)["decay"] == 0.7
    for which in (3, -1, -5, "Uniform()"):
        with pytest.raises(ValueError, match=r"there is no average .* 0: Power"):
            ema.gather(which)
    with pytest.raises(ValueError, match="different schedules"):
        EMA(model, [0.5, 0.5])
    with pytest.raises(ValueError, match="different schedules"):
        EMA(model, [])
    assert ema.metrics()["bytes"] == 3 * 6 * 4
    assert "Power(sigma_rel=None, gamma=2.0, origin='start'), Constant(decay=0.7)" in repr(ema)


def test_live_is_read_once() -> None:
    """One cast of live per window, whatever the number of averages: one step per window."""
    model = nn.Linear(2048, 2048).to(torch.bfloat16)
    pairs = [EMA(model, decay).weights.updates.plan.pairs for decay in (0.5, [0.5, 0.6, 0.7])]
    plans = [UpdatePlan(each, passes=False) for each in pairs]
    cast = [
        [s for s in plan.steps if isinstance(s, Direct | Packed) and s.cast is not None]
        for plan in plans
    ]
    assert len(cast[0]) == len(cast[1]) == 5
