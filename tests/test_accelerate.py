"""accelerate: the script of docs/accelerate.md, killed and resumed; what `register` refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn

from dist_ema import EMA
from dist_ema.integrations.accelerate import register

from .loops import Launcher, same_files, script_of


class Notes(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory, main_process_only = "notes", False, True

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int | None, dict[str, Any]]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.said.append((step, values))

    @property
    def tracker(self) -> Any:
        return self.said


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    made = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=Notes())
    made.init_trackers("run")
    yield made
    made.free_memory()
    made.state._reset_state(reset_partial_state=True)


def prepared(accelerator: Accelerator) -> tuple[Any, Any, EMA]:
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema = EMA(model, decay=0.5)
    ema.attach(optimizer)
    return model, optimizer, ema


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: int) -> None:
    for _ in range(batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 3)).square().sum())
            optimizer.step()
            optimizer.zero_grad()


def test_accumulation_and_state(accelerator: Accelerator, tmp_path: Path) -> None:
    """Four batches are two steps; a state brings weights, average and clock back; remove() ends
    it.
    """
    model, optimizer, ema = prepared(accelerator)
    registration = register(accelerator, ema)
    train(accelerator, model, optimizer, 4)
    assert ema.now == 2
    accelerator.save_state(tmp_path / "state")
    saved, live = ema.gather(), model.weight.detach().clone()
    train(accelerator, model, optimizer, 2)
    accelerator.load_state(tmp_path / "state")
    assert ema.now == 2
    assert torch.equal(ema.gather()["weight"], saved["weight"])
    assert torch.equal(model.weight, live)
    registration.remove()
    registration.remove()
    accelerator.save_state(tmp_path / "without")
    assert not (tmp_path / "without" / "ema").exists()
    register(accelerator, ema)
    with pytest.raises(ValueError, match="holds no average .*: it was saved without register"):
        accelerator.load_state(tmp_path / "without")


def test_two_averages(accelerator: Accelerator, tmp_path: Path) -> None:
    """Each in a folder of its own: under one name the second would overwrite the first."""
    model, optimizer, ema = prepared(accelerator)
    other = EMA(model, 0.9)
    other.attach(optimizer)
    register(accelerator, ema)
    for again in (ema, other):
        with pytest.raises(
            ValueError, match=r"'ema' is taken by an average that was registered before"
        ):
            register(accelerator, again)
    register(accelerator, other, "./slow")
    for folder in ("slow", "slow/er"):
        with pytest.raises(ValueError, match=f"'{folder}' is taken"):
            register(accelerator, other, folder)
    train(accelerator, model, optimizer, 4)
    accelerator.save_state(tmp_path / "state")
    fast, slow = ema.gather()["weight"], other.gather()["weight"]
    assert not torch.equal(fast, slow)
    train(accelerator, model, optimizer, 2)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(ema.gather()["weight"], fast)
    assert torch.equal(other.gather()["weight"], slow)


@pytest.mark.parametrize("folder", ["", ".", "..", "../ema", "ema/../..", "/ema"])
def test_a_folder_elsewhere_is_refused(accelerator: Accelerator, folder: str) -> None:
    """All states would share one average there, or the model's own files would be its own."""
    _, _, ema = prepared(accelerator)
    with pytest.raises(ValueError, match="inside each state folder, got"):
        register(accelerator, ema, folder)


def test_log(accelerator: Accelerator) -> None:
    model, optimizer, ema = prepared(accelerator)
    registration = register(accelerator, ema)
    train(accelerator, model, optimizer, 2)
    registration.log(step=7)
    step, values = accelerator.get_tracker("notes").said[-1]
    assert step == 7
    assert values["ema/decay"] == 0.5
    assert values["ema/now"] == 1


def test_refuses_register_for_checkpointing(accelerator: Accelerator, tmp_path: Path) -> None:
    """Before and after: the main process's shard alone would be kept."""
    _, _, ema = prepared(accelerator)
    register(accelerator, ema)
    accelerator.register_for_checkpointing(ema)
    with pytest.raises(ValueError, match="the rest of the average would be lost"):
        accelerator.save_state(tmp_path / "state")
    with pytest.raises(ValueError, match="the rest of the average would be lost"):
        register(accelerator, ema)


def test_refuses_another_model(accelerator: Accelerator) -> None:
    prepared(accelerator)
    with pytest.raises(ValueError, match=r"Build it after prepare\(\)"):
        register(accelerator, EMA(nn.Linear(3, 2)))


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL in the middle; live, optimizer and average equal the uninterrupted run, byte for
    byte.
    """
    script = script_of("accelerate.md", tmp_path)
    with Launcher("accelerate", ACCELERATE_USE_CPU="1") as launcher:
        whole = launcher.start(script, tmp_path / "whole")
        killed = launcher.start(script, tmp_path / "killed")
        killed.kill_when(tmp_path / "killed" / "state-30")
        a, b = tmp_path / "whole" / "state-60", tmp_path / "killed" / "state-60"
        assert "step 60: 2 processes" in whole.wait(a)
        text = launcher.start(script, tmp_path / "killed").wait(b)
    assert text.count("step 60: ") == 1
    assert same_files(a, b, "ema/*") == ["ema/ema.json", "ema/model.safetensors"]
    same_files(a, b, "model.safetensors")
    same_files(a, b, "optimizer.bin")
