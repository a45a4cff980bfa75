"""Window: every update of the last units, weighted by a curve, under every wrapper and on resume.

The oracle keeps all weights in float64 and sums them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import EMA, Ratio, Window, load_file
from dist_ema.averaging.engines import HostThread
from dist_ema.checkpoint import reader
from dist_ema.cli import console, main
from dist_ema.posthoc import published
from dist_ema.schedules import CURVES, from_dict

from ._models import Net
from ._ranks import run_ranks
from ._wrappers import wrap

LENGTH, BLOCKS = 12, 4


def quadratic(t: float) -> float:
    return (1 - t) ** 2


def oracle(past: Sequence[Tensor], curve: Callable[[float], float], blocks: bool) -> Tensor:
    """Past weights, oldest first, from the beginning of a block on; blocks: means of each."""
    n, size = len(past), LENGTH // BLOCKS
    shares = torch.tensor([curve(j / n) - curve((j + 1) / n) for j in range(n)], dtype=torch.double)
    if blocks:
        shares = torch.cat([part.mean().expand(len(part)) for part in shares.split(size)])
    return (shares[:, None] * torch.stack(list(past))).sum(0)


def window_of(count: int) -> int:
    """How many of `count` updates a window covers: whole blocks, and the one under way."""
    size = LENGTH // BLOCKS
    return min(count, LENGTH - size + (count - 1) % size + 1)


def walk(ema: EMA, steps: int, seed: int) -> list[Tensor]:
    """Updates of one weight; what it was after each."""
    weight = next(ema.model.parameters())
    generator = torch.Generator().manual_seed(seed)
    past = []
    for _ in range(steps):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=torch.double))
        ema.update()
        past.append(weight.detach().clone())
    return past


def line() -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(5, dtype=torch.double))
    return model


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 11, 12, 13, 29, 36])
@pytest.mark.parametrize("ring", [False, True])
def test_closed_form(steps: int, ring: bool, tmp_path: Path) -> None:
    """Every curve, read from one ring, to 1e-12; linear is the plain mean of the updates."""
    tracked = Window(LENGTH, blocks=BLOCKS, ring=str(tmp_path) if ring else None)
    ema = EMA(line(), tracked, dtype=torch.float64)
    past = walk(ema, steps, 0)[-window_of(steps) :]
    for curve in [*CURVES, quadratic]:
        function = CURVES[curve] if isinstance(curve, str) else curve
        with ema.swap(Window(LENGTH, curve, BLOCKS)):
            average = ema.model.w.detach().clone()
        torch.testing.assert_close(average, oracle(past, function, True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(ema.model.w, past[-1])


def test_a_shorter_window_of_the_same_ring() -> None:
    ema = EMA(line(), [0.9, Window(LENGTH, blocks=BLOCKS)], dtype=torch.float64)
    past = walk(ema, 24, 1)[-6:]
    half = ema.gather(Window(LENGTH / 2, blocks=BLOCKS // 2))["w"]
    torch.testing.assert_close(half, torch.stack(past).mean(0), rtol=1e-12, atol=1e-12)
    for other in (Window(LENGTH, blocks=3), Window(2 * LENGTH, blocks=2 * BLOCKS)):
        with pytest.raises(ValueError, match="there is no average Window"):
            ema.gather(other)


@pytest.mark.parametrize("curve", CURVES)
def test_error_is_a_bound(curve: str) -> None:
    """Of the distance to the exact curve, by the spread of the weights over the window."""
    ema = EMA(line(), Window(LENGTH, curve, BLOCKS), dtype=torch.float64)
    past = torch.stack(walk(ema, 24, 2)[-LENGTH:])
    apart = (ema.gather()["w"] - oracle(past, CURVES[curve], False)).abs()
    error = Window(LENGTH, curve, BLOCKS).error(LENGTH)
    spread = past.max(0).values - past.min(0).values
    assert (apart <= error * spread + 1e-12).all()
    assert (error < 1e-15) is (curve == "linear")
    assert Window(LENGTH, curve, 2).error(LENGTH) >= error


def test_the_errors_that_the_page_names() -> None:
    for curve, expected in (("cosine", [0.025, 0.012]), ("minus-sqrt", [0.074, 0.053])):
        errors = [Window(4096, curve, blocks).error(4096) for blocks in (16, 32)]
        assert errors == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("every", [2, 5])
def test_elapsed_and_skipped_blocks(every: int) -> None:
    """Updates that come every 2 units, or only every 5, which is more than a block."""
    window = Window(LENGTH, blocks=BLOCKS)
    ema = EMA(line(), window, dtype=torch.float64)
    first = (window.block_at(20 * every) + 1 - BLOCKS) * window.block
    values = []
    for step in range(1, 21):
        with torch.no_grad():
            ema.model.w.fill_(float(step * step))
        ema.update(every)
        if step * every > first:
            values.append(step * step)
    assert len(values) == {2: 5, 5: 2}[every]
    assert ema.gather()["w"][0].item() == pytest.approx(sum(values) / len(values), rel=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_updates_of_any_size(every: int) -> None:
    """A smaller last batch of each epoch: the mean counts the units that each update stands for."""
    window = Window(LENGTH, blocks=BLOCKS)
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    units = [(1.0, 0.75, 0.5)[step % 3] for step in range(40)]
    sizes = iter(units)
    ema = EMA(model, window, dtype=torch.float64)
    ema.attach(optimizer, every=every, elapsed=lambda: next(sizes))
    past, clock = [], [0.0]
    for step in range(0, 40, every):
        for _ in range(every):
            model.w.grad = torch.randn(5, dtype=torch.double)
            optimizer.step()
        clock.append(clock[-1] + sum(units[step : step + every]))
        past.append(model.w.detach().clone())
        first = (window.block_at(clock[-1]) + 1 - BLOCKS) * window.block
        # A block begins where the last update before it ended.
        inside = [i for i, end in enumerate(clock[1:]) if end > first + 1e-9]
        shares = torch.tensor([clock[i + 1] - clock[i] for i in inside], dtype=torch.double)
        expected = (shares[:, None] * torch.stack([past[i] for i in inside])).sum(0) / shares.sum()
        torch.testing.assert_close(ema.gather()["w"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("elapsed", [-5.0, math.nan, 2.5])
def test_an_update_that_is_refused_ends_no_block(elapsed: float) -> None:
    """Here the average beside the window takes whole steps only."""
    ema = EMA(line(), [Window(8, blocks=2), Ratio()], dtype=torch.float64)
    past = walk(ema, 7, 0)
    with pytest.raises(ValueError, match="elapsed"):
        ema.update(elapsed)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0))
    past += walk(ema, 1, 1)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0))


def test_a_replaced_weight_has_no_past() -> None:
    """After rescan its blocks are forgotten; others keep theirs."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64)
    walk(ema, 8, 6)
    ema.model.w = nn.Parameter(torch.full((5,), 3.0, dtype=torch.double))
    ema.rescan()
    assert torch.equal(ema.gather()["w"], ema.model.w)
    entries = ema.weights.averages[0].ring.entries
    assert len(entries) == 2
    assert not any(each.values for each in entries)


def test_a_start_has_no_past(tmp_path: Path) -> None:
    """What is loaded without blocks begins another window."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64)
    walk(ema, 8, 6)
    ema.export(tmp_path)
    with pytest.warns(UserWarning, match="is an export"):
        ema.load(tmp_path)
    past = walk(ema, 4, 8)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0), rtol=1e-12, atol=1e-12)


def test_a_block_is_kept_when_its_last_update_is_done() -> None:
    """A host thread averages behind training; here it is late."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64, device="cpu")
    engine = ema.weights.updates.engine
    assert isinstance(engine, HostThread)
    past = walk(ema, 2, 0)
    ema.weights.settle()
    engine.worker.submit(lambda: time.sleep(0.2))
    past += walk(ema, 2, 1)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0), rtol=1e-12, atol=1e-12)


def test_metrics() -> None:
    """The distance is that of the mixed window; full blocks count as host memory."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64)
    past = walk(ema, 10, 7)
    assert ema.metrics(distance=False)["pinned"] == 3 * 5 * 8
    mean = torch.stack(past[-window_of(10) :]).mean(0)
    apart = (past[-1] - mean).norm() / past[-1].norm()
    assert ema.metrics()["distance"] == pytest.approx(apart.item(), rel=1e-9)


def test_lawa() -> None:
    """A block per update: the mean of the last 3 checkpoints, made every 7 steps."""
    ema = EMA(line(), Window(21, blocks=3), dtype=torch.float64)
    optimizer = torch.optim.SGD(ema.model.parameters(), 1.0)
    ema.attach(optimizer, every=7)
    past = [torch.zeros(5, dtype=torch.double)]
    for step in range(1, 41):
        ema.model.w.grad = torch.full((5,), float(step), dtype=torch.double)
        optimizer.step()
        past.append(ema.model.w.detach().clone())
        if step >= 7:
            shares = torch.from_numpy(published.lawa(step, 7, 3))
            average = ema.gather()["w"]
            expected = (shares[:, None] * torch.stack(past)).sum(0)
            torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)


def test_resume(tmp_path: Path) -> None:
    """The saved folder is the window; its blocks come with it, for another curve and length too."""
    ema = EMA(line(), Window(LENGTH, "minus-sqrt", BLOCKS), dtype=torch.float64)
    past = walk(ema, 20, 3)
    ema.save(tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved")["w"], ema.gather()["w"])
    again = EMA(line(), [0.5, Window(LENGTH, "cosine", BLOCKS)], dtype=torch.float64)
    with pytest.warns(UserWarning, match="goes on with"):
        again.load(tmp_path / "saved")
    again.model.w.data.copy_(past[-1])
    past += walk(again, 6, 4)
    expected = oracle(past[-window_of(26) :], CURVES["cosine"], True)
    average = again.gather(Window(LENGTH, "cosine", BLOCKS))["w"]
    torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
    again.reset()
    past = walk(again, 2, 5)
    average = again.gather(1)["w"]
    torch.testing.assert_close(average, torch.stack(past).mean(0), rtol=1e-12, atol=1e-12)


def test_resume_with_recalibrated_buffers(tmp_path: Path) -> None:
    """They come back with the window that they belong to."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    schedules = [Window(8, blocks=2), Window(6, blocks=2), 0.9]
    ema = EMA(model, schedules)
    for step in range(9):
        model[0].weight.data.add_(step)
        ema.update()
        if step == 3:
            with ema.swap(1):
                model(torch.randn(4, 3))
    with ema.swap():
        model(torch.randn(4, 3))
    ema.save(tmp_path / "saved")
    again = EMA(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), schedules)
    again.load(tmp_path / "saved")
    for which in range(2):
        assert "1.running_mean" in again.weights.averages[which].own_buffers
        for name, value in ema.gather(which).items():
            assert torch.equal(again.gather(which)[name], value)
    assert not again.weights.averages[2].own_buffers


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS has no posix_fallocate")
def test_a_full_disk_under_the_ring_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write into pages without space would end the process; and the next update tries again."""
    ema = EMA(line(), Window(4, blocks=2, ring=str(tmp_path)), dtype=torch.float64)
    past = walk(ema, 2, 0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
            ema.update()
    assert ema.now == 2
    past += walk(ema, 1, 1)
    torch.testing.assert_close(ema.gather()["w"], torch.stack(past).mean(0))


def grid(model: nn.Module, step: int) -> None:
    """The same weights in every wrapper: set through full tensors of the optimizer's making."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.1 * step)


def rank(kind: str, folder: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = wrap(kind, Net())
    ema = EMA(model, Window(LENGTH, "cosine", BLOCKS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    ema.attach(optimizer)
    for step in range(17):
        grid(model, step)
        optimizer.step()
    ema.save(f"{folder}/saved")
    for step in range(17, 25):
        grid(model, step)
        optimizer.step()
    return ema.gather()


def test_a_block_that_begins_with_skipped_steps() -> None:
    """It takes nothing of the block before, whose mean lies in the shadow until one is accepted."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64)
    first = torch.stack(walk(ema, 3, 0)).mean(0)
    weight, past = next(ema.model.parameters()), []
    for skipped in (1.0, 0.0, 0.0):
        with torch.no_grad():
            weight.add_(1 - skipped)
        ema.weights.move(1.0, skip=torch.tensor(skipped))
        past.append(weight.detach().clone())
    block = torch.lerp(past[1], past[2], 1 / 3)
    torch.testing.assert_close(ema.gather()["w"], (first + block) / 2)


def test_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save over the folder while it is opened: the blocks are those of the version that is read.

    Guards the reset in `_Targets.make`.
    """
    window = Window(LENGTH, blocks=BLOCKS)
    ema = EMA(line(), window, dtype=torch.float64)
    walk(ema, 8, 0)
    ema.save(tmp_path / "a")
    walk(ema, 20, 1)
    wanted, opened = ema.gather()["w"], reader.OpenFile

    def late(path: Path) -> reader.OpenFile:
        monkeypatch.setattr(reader, "OpenFile", opened)
        ema.save(tmp_path / "a")
        return opened(path)

    monkeypatch.setattr(reader, "OpenFile", late)
    resumed = EMA(line(), window, dtype=torch.float64)
    resumed.load(tmp_path / "a")
    assert torch.equal(resumed.gather()["w"], wanted)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 orig", "fsdp2", "hsdp"])
def test_ranks(kind: str, tmp_path: Path) -> None:
    """Every wrapper gives what one process gives, and one process goes on from its files."""
    world = 4 if kind == "hsdp" else 2
    wrapped: dict[str, Tensor] = run_ranks(world, rank, kind, str(tmp_path))[0]
    alone = rank("none", str(tmp_path / "alone"))
    assert wrapped.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(wrapped[name], value, rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    model: Any = Net()
    ema = EMA(model, Window(LENGTH, "cosine", BLOCKS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(17):
        grid(model, step)
        optimizer.step()
    ema.load(tmp_path / "saved")
    ema.attach(optimizer)
    for step in range(17, 25):
        grid(model, step)
        optimizer.step()
    for name, value in ema.gather().items():
        torch.testing.assert_close(alone[name], value, rtol=1e-6, atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    for arguments, text in (
        ({"length": 0}, "length must be positive"),
        ({"length": 8, "blocks": 0}, "blocks must be a whole number from 1"),
        ({"length": 8, "blocks": 2.0}, "blocks must be a whole number from 1, got 2.0"),
        ({"length": 8, "blocks": float("inf")}, "blocks must be a whole number from 1, got inf"),
        ({"length": 8, "curve": None}, "curve must be linear, minus-sqrt, cosine or a function"),
        ({"length": 8, "curve": lambda t: float("nan")}, "must fall from 1 to 0, got nan and nan"),
        ({"length": 8, "curve": "sqrt"}, "curve must be linear, minus-sqrt, cosine or a function"),
        ({"length": 8, "curve": lambda t: t}, "must fall from 1 to 0, got 0 and 1"),
    ):
        with pytest.raises(ValueError, match=text):
            Window(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="files cannot hold a function"):
        EMA(line(), Window(8, quadratic))
    with pytest.raises(ValueError, match="have blocks of one size"):
        EMA(line(), [Window(8, blocks=4), Window(16, blocks=8)])
    with pytest.raises(ValueError, match=r"absent' of Window\(8, .* must be a folder that takes"):
        EMA(line(), Window(8, ring=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="into= takes an average that moves in place"):
        EMA(line(), Window(8), into=line())
    with pytest.raises(RuntimeError, match="with a Window: DCP's keys"):
        EMA(line(), Window(8)).state_dict()
    window = Window(8, "cosine", 4, ring=str(tmp_path))
    assert from_dict(window.to_dict()) == window
    assert repr(window) == "Window(8, 'cosine', blocks=4)"


# --- offline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
def test_reconstruct(curve: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Snapshots at the ends of blocks span a linear window; the residual of others is told."""
    ema = EMA(line(), Window(LENGTH, blocks=BLOCKS), dtype=torch.float64)
    past = []
    for step in range(24):
        past += walk(ema, 1, step)
        ema.snapshot(tmp_path / "snapshots", every=LENGTH / BLOCKS)
    out = str(tmp_path / "out.safetensors")
    command = ["reconstruct", str(tmp_path / "snapshots"), out, "--curve", curve]
    assert main([*command, "--window", str(LENGTH), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["mixtures"]
    assert made["target"] == Window(LENGTH, curve).to_dict()
    assert (made["residual"] < 1e-9) is (curve == "linear")
    expected = oracle(past[-LENGTH:], CURVES[curve], True)
    torch.testing.assert_close(load_file(out)["w"], expected, rtol=1e-9, atol=1e-9)


def test_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models count by their clocks: each stands for the updates since the one before."""
    ema = EMA(line(), 0.0, dtype=torch.float64)
    paths, values = [], []
    for count in (4, 4, 1, 3, 8):
        values.append(walk(ema, count, count)[-1])
        paths.append(str(tmp_path / f"ema-{len(paths)}"))
        ema.save(paths[-1])
    out = str(tmp_path / "out.safetensors")
    assert main(["average", *paths, out, "--curve", "minus-sqrt", "--window", "14"]) == 0
    at = [((now - 6) / 14) ** 0.5 for now in (8, 9, 12, 20)]
    shares = [after - before for before, after in zip([0.0, *at[:-1]], at, strict=True)]
    expected = sum(share * value for share, value in zip(shares, values[1:], strict=True))
    torch.testing.assert_close(load_file(out)["w"], expected, rtol=1e-12, atol=1e-12)
    for control, order in (("reverse", [3, 2, 1, 0]), ("shuffled", [2, 0, 1, 3])):
        command = ["average", *paths, out, "--curve", "minus-sqrt", "--window", "14", "--force"]
        assert main([*command, "--control", control]) == 0
        turned = sum(shares[i] * value for i, value in zip(order, values[1:], strict=True))
        torch.testing.assert_close(load_file(out)["w"], turned, rtol=1e-12, atol=1e-12)
    capsys.readouterr()
    for arguments, text in (
        (["--control", "reverse"], "--control reorders the shares of --curve"),
        (["--curve", "linear"], "go together"),
        (["--curve", "linear", "--window", "5"], "a window of 5 holds 1 of 5 models"),
    ):
        assert main(["average", *paths, out, *arguments, "--force"]) != 0
        assert text in capsys.readouterr().err
    ema.export(plain := str(tmp_path / "plain.safetensors"))
    assert main(["average", *paths, plain, out, "--curve", "linear", "--window", "9"]) != 0
    assert "has no clock: a window takes what ema.save() wrote" in capsys.readouterr().err
    for folder in (early := [str(tmp_path / "early-0"), str(tmp_path / "early-1")]):
        EMA(line(), 0.0).save(folder)
    assert main(["average", *early, str(tmp_path / "x"), "--curve", "linear", "--window", "9"]) == 1
    assert "early-1 has a clock of 0: no update came yet" in capsys.readouterr().err


def test_average_of_fewer_models_than_the_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a window covers that no model is near to is said, and nothing of one that fits."""
    ema = EMA(line(), 0.0, dtype=torch.float64)
    paths = []
    for steps in (8, 2, 2, 2):
        walk(ema, steps, 0)
        paths.append(str(tmp_path / f"ema-{len(paths)}"))
        ema.save(paths[-1])
    command = ["average", *paths, str(tmp_path / "out"), "--curve", "linear", "--force", "--json"]
    for length, begin in ((7, None), (8, None), (10, 4), (30, 0)):
        assert main([*command, "--window", str(length)]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert len(notes) == (begin is not None)
        for note in notes:
            assert f"a window of {length} is longer than what the 4 models cover" in note
            assert f"it begins at {begin}, and the first one, at 8, stands for all" in note
    assert main([*command[:-1], "--window", "30"]) == 0
    assert "it begins at 0" in capsys.readouterr().out


def test_the_command_line_has_every_curve() -> None:
    assert console.CURVE["choices"] == list(CURVES)
