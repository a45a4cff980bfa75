"""Lightning: the script of docs/lightning.md, killed and resumed; swaps, checkpoints and refusals
in one process.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dist_ema import load_file
from dist_ema.integrations.lightning import EMACallback

from .loops import Launcher, same_files, script_of

pytestmark = pytest.mark.filterwarnings("default")  # the framework warns of its own plans


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))
        self.seen: list[tuple[str, Tensor]] = []
        self.broken = False

    def _look(self, stage: str) -> None:
        self.seen.append((stage, self.w.detach().clone()))
        if self.broken:
            raise KeyError("a broken validation")

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (batch[0] @ self.w - 1).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self._look("validation")
        self.log("loss", (batch[0] @ self.w - 1).square().mean())

    def test_step(self, batch: Any, index: int) -> None:
        self._look("test")

    def predict_step(self, batch: Any, index: int) -> Tensor:
        self._look("predict")
        return batch[0]  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(16, 2, generator=torch.Generator().manual_seed(0))), batch_size=4
    )


def trainer(folder: Path, callback: EMACallback, **options: Any) -> Trainer:
    checkpoints = ModelCheckpoint(
        folder, filename="{epoch}", monitor="loss", save_top_k=1, save_last=True
    )
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "callbacks": [checkpoints, callback],
    }  # fmt: skip
    return Trainer(**quiet | options)


def test_fit_test_predict(tmp_path: Path) -> None:
    """Everything but training sees the average; files hold the live model, and its average beside;
    both are rotated.
    """
    callback, net = EMACallback(decay=0.5), Net()
    made = trainer(tmp_path, callback)
    made.fit(net, data(), data())
    assert callback.ema is not None
    average, live = callback.ema.gather()["w"], net.w.detach().clone()
    assert not torch.equal(average, live)
    assert torch.equal(net.seen[-1][1], average)
    assert callback.ema.now == 12
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=2.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == ["epoch=2", "last"]
    state = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)
    assert torch.equal(state["state_dict"]["w"], live)
    assert torch.equal(load_file(tmp_path / "ema" / "epoch=2")["w"], average)
    for run in (made.test, made.predict):
        run(net, data())
        assert torch.equal(net.seen[-1][1], average)
        assert torch.equal(net.w.detach(), live)
    fresh = Net()
    other = EMACallback(decay=0.5)
    trainer(tmp_path, other).test(fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(fresh.seen[-1][1], average)
    for name in ("save_checkpoint", "remove_checkpoint"):
        method, own = getattr(made.strategy, name), getattr(type(made.strategy), name)
        assert method.__func__ is own, "nothing wraps the strategy after the fit"


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    """Of the same trainer: with nothing left to train the average stays, with more epochs it goes
    on. Another trainer begins another average.
    """
    callback, net = EMACallback(decay=0.5), Net()
    made = trainer(tmp_path, callback)
    made.fit(net, data(), data())
    assert callback.ema is not None
    average = callback.ema.gather()["w"]
    made.fit(net, data(), data())
    assert torch.equal(callback.ema.gather()["w"], average)
    assert callback.ema.now == 12
    made.fit_loop.max_epochs = 4
    weights = [net.w.detach().clone()]
    net.on_train_batch_end = lambda *_: weights.append(net.w.detach().clone())  # type: ignore[method-assign]
    made.fit(net, data(), data())
    for live in weights[1:]:
        average = torch.lerp(average, live, 0.5)
    assert len(weights) == 5
    assert torch.equal(callback.ema.gather()["w"], average)
    trainer(tmp_path / "other", callback).fit(net, data(), data())
    assert callback.ema.now == 12


def test_refuses(tmp_path: Path) -> None:
    """A test without any average, a resume from a checkpoint without one, one elsewhere, a save
    under the average.
    """
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        EMACallback(decay=2)
    with pytest.raises(ValueError, match=r"decay must be a float or a schedule .* got None"):
        EMACallback(decay=[0.9, None])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="no average of this Net: fit it first"):
        trainer(tmp_path, EMACallback()).test(Net(), data())
    trainer(tmp_path, EMACallback()).fit(Net(), data(), data())
    (tmp_path / "ema" / "last").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"last\.ckpt holds no average"):
        trainer(tmp_path, EMACallback(), max_epochs=4).fit(
            Net(), data(), data(), ckpt_path=tmp_path / "last.ckpt"
        )

    callback = EMACallback()
    with pytest.raises(ValueError, match="no path of a file system"):
        trainer(tmp_path, callback, callbacks=[ModelCheckpoint("memory://run"), callback]).fit(
            Net(), data(), data()
        )

    class Hasty(Net):
        def validation_step(self, batch: Any, index: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "hasty.ckpt")

    with pytest.raises(RuntimeError, match=r"inside ema\.swap\(\)"):
        trainer(tmp_path, EMACallback()).fit(Hasty(), data(), data())
    assert not (tmp_path / "hasty.ckpt").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before_the_fit", [True, False])
def test_a_finder_before_the_first_step(before_the_fit: bool, tmp_path: Path) -> None:
    """Its checkpoint is no resume: the average starts from the weights that it restored."""
    callback, net = EMACallback(decay=0.5), Net()
    net.lr = 0.1
    callbacks = [] if before_the_fit else [LearningRateFinder(num_training_steps=3)]
    options = {"callbacks": [*callbacks, callback], "max_epochs": 1, "default_root_dir": tmp_path}
    made = trainer(tmp_path, callback, **options)
    if before_the_fit:
        Tuner(made).lr_find(net, data(), num_training=3)
    made.fit(net, data())
    assert callback.ema is not None
    assert callback.ema.now == made.global_step == 4


def test_a_validation_that_raises(tmp_path: Path) -> None:
    """The live weights are back, bit for bit, and the callback can be used again."""
    callback, net = EMACallback(decay=0.5), Net()
    trainer(tmp_path, callback).fit(net, data(), data())
    live = net.w.detach().clone()
    net.broken = True
    with pytest.raises(KeyError, match="broken"):
        trainer(tmp_path, callback).validate(net, data())
    assert torch.equal(net.w.detach(), live)
    assert not torch.equal(net.seen[-1][1], live)
    net.broken = False
    trainer(tmp_path, callback).validate(net, data())
    assert torch.equal(net.w.detach(), live)


def test_after_a_fit_that_raises(tmp_path: Path) -> None:
    """The next fit has an average of its own, and its files; another model is not taken for the one
    that was fitted.
    """

    class Late(Net):
        def validation_step(self, batch: Any, index: int) -> None:
            self.broken = self.trainer.global_step > 4
            super().validation_step(batch, index)

    callback, net = EMACallback(decay=0.5), Late()
    with pytest.raises(KeyError, match="broken"):
        trainer(tmp_path / "a", callback).fit(net, data(), data())
    assert not torch.equal(net.w.detach(), net.seen[-1][1]), "the live weights are back"
    other = Net()
    with pytest.raises(RuntimeError, match="no average of this Net"):
        trainer(tmp_path / "b", callback).validate(other, data())
    made = trainer(tmp_path / "b", callback)
    made.fit(other, data(), data())
    assert callback.ema is not None
    assert callback.ema.now == 12
    assert torch.equal(load_file(tmp_path / "b" / "ema" / "last")["w"], callback.ema.gather()["w"])
    with pytest.warns(UserWarning, match="after the fit writes no average"):
        made.save_checkpoint(tmp_path / "late.ckpt")


def test_moved_after_the_fit(tmp_path: Path) -> None:
    """Lightning moves the module to the host behind a fit.

    Here it is cast, which an EMA refuses to follow for the same reason. Guards the property `ema`.
    """
    callback, net = EMACallback(decay=0.5), Net()
    made = trainer(tmp_path, callback)
    made.fit(net, data(), data())
    average = load_file(tmp_path / "ema" / "last")["w"]
    net.double()
    assert callback.ema is not None
    assert torch.equal(callback.ema.gather()["w"], average)
    callback.ema.export(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], average.double())
    assert callback.ema.now == 12
    net.float()
    made.test(net, data())
    assert torch.equal(net.seen[-1][1], average)


class Broadcasting(SingleDeviceStrategy):
    """Writes the weights that are there again, as DDP's does before a test."""

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        with torch.no_grad():
            for weight in self.model.parameters():  # type: ignore[union-attr]
                weight.copy_(weight.clone())


def test_weights_that_the_strategy_writes_again(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """They are no training that the average missed. Guards the last line of `_find`."""
    callback, net = EMACallback(decay=0.5), Net()
    made = trainer(tmp_path, callback, accelerator="auto", strategy=Broadcasting("cpu"))
    made.fit(net, data(), data())
    for run in (made.test, made.validate, made.predict):
        run(net, data())
    assert not [each for each in recwarn if "no update came" in str(each.message)]


def test_links_are_removed_alone(tmp_path: Path) -> None:
    """A link that is rotated leaves the average of the checkpoint that it named."""
    checkpoints, callback = (
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_last="link"),
        EMACallback(),
    )
    checkpoints.CHECKPOINT_NAME_LAST = "last-{epoch}"
    trainer(tmp_path, callback, callbacks=[checkpoints, callback]).fit(Net(), data(), data())
    assert [path.name for path in tmp_path.glob("last*")] == ["last-epoch=2.ckpt"]
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == [
        "epoch=0",
        "epoch=1",
        "epoch=2",
    ]
    trainer(tmp_path, callback, max_epochs=4).fit(
        Net(), data(), data(), ckpt_path=tmp_path / "last-epoch=2.ckpt"
    )
    assert callback.ema is not None
    assert callback.ema.now == 16


def test_logs(tmp_path: Path) -> None:
    callback = EMACallback(decay=0.5, every=2)
    logger = CSVLogger(str(tmp_path))
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=4).fit(Net(), data(), data())
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "ema/decay" in text
    assert "0.25" in text, "two steps at once"
    logger = CSVLogger(str(tmp_path / "never"))
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=0).fit(Net(), data(), data())


def test_killed_and_resumed(tmp_path: Path) -> None:
    """2 processes, SIGKILL in the middle of an epoch: live and average equal the uninterrupted
    run.
    """
    script = script_of("lightning.md", tmp_path)
    with Launcher("lightning", ACCELERATE_USE_CPU="1") as launcher:
        whole = launcher.start(script, tmp_path / "whole")
        killed = launcher.start(script, tmp_path / "killed")
        killed.kill_when(tmp_path / "killed" / "step=30.ckpt")
        whole.wait(tmp_path / "whole" / "step=60.ckpt")
        launcher.start(script, tmp_path / "killed").wait(tmp_path / "killed" / "step=60.ckpt")
    assert same_files(tmp_path / "whole" / "ema", tmp_path / "killed" / "ema", "step=60/*")
    a, b = (
        torch.load(tmp_path / run / "step=60.ckpt", weights_only=False)
        for run in ("whole", "killed")
    )
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    """They would save to one place, and leave their swaps in the order in which they entered."""
    callbacks = [EMACallback(decay=0.5), EMACallback(decay=0.9)]
    made = trainer(tmp_path, callbacks[0], callbacks=callbacks)
    with pytest.raises(ValueError, match=r"takes one EMACallback.*decay=\[a, b\]"):
        made.fit(Net(), data(), data())


class OwnWeights(Callback):
    """A user's callback that tests under weights of its own."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.nn.init.ones_(pl_module.w)  # type: ignore[arg-type]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.nn.init.zeros_(pl_module.w)  # type: ignore[arg-type]


class AssignedWeights(Callback):
    """One that predicts from other memory."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = pl_module.w.data  # type: ignore[union-attr]
        pl_module.w.data = torch.ones(2)  # type: ignore[union-attr]

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.w.data = self.kept  # type: ignore[union-attr]


def test_another_callback_that_swaps_weights_is_named(tmp_path: Path) -> None:
    """Lightning's own averaging enters after the callback's swap, wherever it stands in the list.

    Guards `on_validation_batch_start`.
    """
    net, callback = Net(), EMACallback(decay=0.5)
    words = "does not see the average: w was written"
    others = [EMAWeightAveraging(decay=0.9), OwnWeights(), AssignedWeights()]
    made = trainer(
        tmp_path,
        callback,
        callbacks=[callback, *others],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
    )
    with pytest.warns(UserWarning, match=words) as caught:
        made.fit(net, data(), data())
    assert len([each for each in caught if words in str(each.message)]) == 3, "once an evaluation"
    for evaluate in (made.test, made.predict):
        with pytest.warns(UserWarning, match=words):
            evaluate(net, data())
    alone = EMACallback(decay=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=words)
        trainer(tmp_path, alone).fit(Net(), data(), data())
