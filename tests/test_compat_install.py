"""compat.install: libraries that build the average themselves build ours, with the same numbers."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import compat
from dist_ema.compat import diffusers, ema_pytorch, swa_utils, timm, torch_ema

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own plans


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def timm_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's base of tasks, the real file. Where torchvision is missing, timm cannot be imported
    whole, so packages without contents stand for what the file does not need."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    root = Path(spec.origin).parent
    if importlib.util.find_spec("torchvision") is None:
        for name, path in (("timm", root), ("timm.task", root / "task")):
            package: Any = types.ModuleType(name)
            package.__path__ = [str(path)]
            monkeypatch.setitem(sys.modules, name, package)
        misc: Any = types.ModuleType("torchvision.ops.misc")
        misc.FrozenBatchNorm2d = nn.BatchNorm2d
        for name in ("torchvision", "torchvision.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, misc.__name__, misc)
    try:
        return importlib.import_module("timm.task.task").TrainingTask
    except ImportError:
        pytest.skip("this timm has no tasks")


def test_timm_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """setup_ema and update_ema of a task: the numbers of timm's own class, to rounding."""
    averages, new_task = [], timm_task(monkeypatch)
    for installed in (True, False):
        model, task = net(), new_task(verbose=False)
        task.trainable_module = model
        if installed:
            with compat.install("timm") as handle:
                task.setup_ema(decay=0.9, use_warmup=True)
            assert "timm.task.task.ModelEmaV3" in handle.places
        else:
            task.setup_ema(decay=0.9, use_warmup=True)
        average = task.get_trainable_module(ema=True)
        assert isinstance(average, timm.ModelEmaV3) is installed
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for step in range(1, 6):
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step)
        state = task.get_checkpoint_state(ema=True)["state_dict_ema"]
        task.load_checkpoint_state(state, ema=True)
        averages.append({name: value.clone() for name, value in state.items()})
    assert averages[0].keys() == averages[1].keys()
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name])
    monkeypatch.setitem(sys.modules, "timm.task.task", None)  # as in a version without tasks
    with pytest.raises(ImportError, match=r"builds its average elsewhere .*timm\.task\.task"):
        compat.install("timm")


def test_lightning_weight_averaging(tmp_path: Path) -> None:
    """Lightning's own callback, over ours: the same weights after the fit."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.5)

    results = []
    rows = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    for installed in (True, False):
        handle = compat.install("lightning") if installed else None
        module, callback = Module(), EMAWeightAveraging(decay=0.8)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
        assert isinstance(callback._average_model, swa_utils.AveragedModel) is installed
        results.append(module.state_dict())
        if handle is not None:
            handle.remove()
    for name, value in results[0].items():
        if not value.is_floating_point():
            continue  # torch's class averages integers and cuts them
        torch.testing.assert_close(value, results[1][name])


def test_ultralytics() -> None:
    trainer = pytest.importorskip("ultralytics.engine.trainer")
    original = trainer.ModelEMA
    with compat.install("ultralytics"):
        assert trainer.ModelEMA.__module__ == "dist_ema.compat.yolo"
        average = trainer.ModelEMA(net())
        assert average.enabled
    assert trainer.ModelEMA is original


def test_post_hoc_ema(tmp_path: Path) -> None:
    """ema_pytorch's PostHocEMA mixes checkpoints of our KarrasEMA into the same model."""
    package = pytest.importorskip("ema_pytorch")

    def synthesize(folder: Path) -> dict[str, Tensor]:
        model, generator = net(), torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"checkpoint_folder": str(folder), "ignore_names": {"0.bias"}}
        options |= {"checkpoint_every_num_steps": 10, "checkpoint_dtype": torch.float32}
        post = package.PostHocEMA(model, sigma_rels=(0.05, 0.28), update_every=2, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(30):
            model(torch.randn(8, 3, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            post.update()
        averages.add(type(post.ema_models[0]))
        return dict(post.synthesize_ema_model(sigma_rel=0.15).ema_model.state_dict())

    averages: set[type] = set()
    with compat.install("ema_pytorch"):
        ours = synthesize(tmp_path / "ours")
    theirs = synthesize(tmp_path / "theirs")
    assert averages == {ema_pytorch.KarrasEMA, package.KarrasEMA}
    for name in theirs.keys() - {"0.bias", "1.num_batches_tracked"}:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("library", "place", "ours"),
    [
        ("diffusers", "diffusers.training_utils.EMAModel", diffusers.EMAModel),
        ("ema_pytorch", "ema_pytorch.EMA", ema_pytorch.EMA),
        ("ema_pytorch", "ema_pytorch.KarrasEMA", ema_pytorch.KarrasEMA),
        ("torch", "torch.optim.swa_utils.AveragedModel", swa_utils.AveragedModel),
        ("torch_ema", "torch_ema.ExponentialMovingAverage", torch_ema.ExponentialMovingAverage),
    ],
)
def test_imports_after_it_give_ours(library: str, place: str, ours: type) -> None:
    """Until it is taken back; a second call finds nothing to replace and says so."""
    pytest.importorskip(library)
    module, name = place.rsplit(".", 1)
    __import__(module)
    original = getattr(sys.modules[module], name)
    assert original is not ours
    handle = compat.install(library)
    try:
        assert place in handle.places
        assert getattr(sys.modules[module], name) is ours
        with pytest.raises(ImportError, match="or they were replaced before"):
            compat.install(library)
    finally:
        handle.remove()
        handle.remove()
    assert getattr(sys.modules[module], name) is original


class Unnamed(types.ModuleType):
    """A module that is loaded when it is first looked at, and cannot be."""

    @property
    def __name__(self) -> str:  # type: ignore[override]
        raise ImportError("its package is not installed")


def test_other_modules_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazy module is not loaded, and None in sys.modules forbids an import."""
    monkeypatch.setitem(sys.modules, "lazy", Unnamed("lazy"))
    monkeypatch.setitem(sys.modules, "torch.forbidden", None)  # type: ignore[arg-type]
    with compat.install("torch") as handle:
        assert "torch.optim.swa_utils.AveragedModel" in handle.places


def test_refused() -> None:
    with pytest.raises(ValueError, match="no drop-in is known for 'nemo'; known are diffusers"):
        compat.install("nemo")
