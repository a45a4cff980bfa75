"""Lightning: `Trainer(callbacks=[EMACallback(decay=0.9999)])`, and nothing else.

[Note: where checkpoints go]  A callback does not learn the path of a checkpoint, so this one wraps
`save_checkpoint` and `remove_checkpoint` of the strategy. The average of `DIR/NAME.ckpt` lies in
`DIR/ema/NAME`. It must not lie beside the file: `ckpt_path="last"` takes every name that begins
with "last" for a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from ..ema import EMA
from ..schedules import Schedule, schedule_list
from ..text import warn
from . import existing, refuse_another

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "dist_ema.integrations.lightning needs lightning: pip install 'dist-ema[lightning]'."
    ) from error

__all__ = ["EMACallback"]


class EMACallback(Callback):  # type: ignore[misc]
    """An average of the module that Lightning trains.

    - Validation, test and prediction run under the average, which is swapped out again whatever
      they raise.
    - A checkpoint's `state_dict` is the live model. The average is saved and removed with it
      ([Note: where checkpoints go]). Resuming from a checkpoint without one raises ValueError.
    - Loggers get decay, updates and skipped every `log_every_n_steps`.

    Args:
        decay: as for `EMA`.
        every: as for `EMA.attach`.
        start: as for `EMA.attach`.
        options: further arguments of `EMA`.

    Raises:
        ValueError: `decay` is none that `EMA` takes.
    """

    def __init__(
        self,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        every: int = 1,
        start: int = 0,
        **options: Any,
    ) -> None:
        self._ema_options = {"decay": schedule_list(decay), **options}
        self._every, self._start = every, start
        self._swap = ExitStack()  # what the end of an evaluation undoes
        self._applied: dict[str, int] = {}  # until the first batch: the bits of the average
        self._fit: ExitStack | None = None  # what the end of the fit undoes
        self._ema: EMA | None = None
        self._after_fit: tuple[list[object], dict[str, Any]] | None = None  # placement and state

    @property
    def ema(self) -> EMA | None:
        """The average, from the beginning of the fit on. *Collective* after the fit."""
        # NOTE: Lightning moves the module to the host after a fit and back for a test. The average
        # is then built anew where the module lies.
        if self._ema is not None and self._after_fit is not None:
            placement, state = self._after_fit
            if placement != _placement(self._ema.model):
                self._ema = EMA(self._ema.model, **self._ema_options)
                self._ema.load_state_dict(state)
                self._after_fit = _placement(self._ema.model), self._ema.state_dict()
        return self._ema

    # --- fitting --------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_another(self, trainer.callbacks)  # type: ignore[attr-defined]
        self._end_fit()  # a fit that raised was not torn down

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are wrapped and restored, optimizers exist, and no step was taken."""
        if self._fit is not None:
            return
        model = trainer.strategy.model
        goes_on = trainer.global_step and self._averages(model)
        before = self._after_fit if goes_on else None
        ema = self._ema = EMA(model, **self._ema_options)
        self._after_fit = None
        # A DeepSpeed engine steps its optimizers itself.
        steps = [model] if hasattr(model, "was_step_applied") else trainer.optimizers
        ema.attach(*steps, every=self._every, start=self._start)
        if trainer.ckpt_path is not None and not _is_of_a_finder(trainer):
            ema.load(existing(_path_of(trainer.ckpt_path), trainer.ckpt_path))
        elif before is not None:  # a second fit of this trainer: more epochs, or none
            ema.load_state_dict(before[1])
        # Undone in reverse, whether the fit ends or raises.
        strategy, self._fit = trainer.strategy, ExitStack()
        self._fit.callback(ema.detach)
        for name, wrapper in (("save_checkpoint", _save), ("remove_checkpoint", _remove)):
            original = getattr(strategy, name)
            setattr(strategy, name, partial(wrapper, trainer, ema, original))
            self._fit.callback(setattr, strategy, name, original)

    on_sanity_check_start = on_train_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_fit()
        # Kept as tensors, because Lightning is about to move the module to the host.
        if self._ema is not None and self._after_fit is None and not self._ema.weights.swaps.open:
            self._after_fit = _placement(self._ema.model), self._ema.state_dict()

    def _end_fit(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.close()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.ema is not None and self._fit is None:
            warn(
                "trainer.save_checkpoint() after the fit writes no average, and a fit cannot "
                "resume from it. Let ModelCheckpoint(save_last=True) write it, or use "
                "callback.ema.save()."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.ema is not None
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # `metrics` waits for the device, so only where a line is logged; an interval of 0: never.
        if trainer.loggers and interval and trainer.global_step % interval == 0:
            metrics = self.ema.metrics(distance=False)
            values = {f"ema/{key}": metrics[key] for key in ("decay", "updates", "skipped")}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    # --- under the average ----------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is None:
            self._find(trainer)
        assert self.ema is not None
        self._swap.enter_context(self.ema.swap())
        self._applied = self.ema.weights.live_sums()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Warn if another callback wrote the weights when the evaluation began."""
        applied, self._applied = self._applied, {}
        if not applied:
            return
        assert self.ema is not None
        now = self.ema.weights.live_sums().items()
        if written := [name for name, bits in now if bits != applied[name]]:
            warn(
                f"the evaluation does not see the average: {', '.join(written[:5])} was written "
                "between its start and its first batch. A callback that swaps in weights of its "
                "own (Lightning's WeightAveraging?) must not stand beside EMACallback."
            )

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._swap.__exit__(type(exception), exception, None)

    def _find(self, trainer: Trainer) -> None:
        """The average for `validate`, `test` or `predict` outside of a fit.

        It belongs to the checkpoint that they were given, else to the last fit.
        """
        model = trainer.strategy.model
        if trainer.ckpt_path is not None:
            self._ema, self._after_fit = EMA(model, **self._ema_options), None
            self._ema.load(existing(_path_of(trainer.ckpt_path), trainer.ckpt_path))
        elif not self._averages(model):
            raise RuntimeError(
                f"EMACallback has no average of this {type(trainer.lightning_module).__name__}: "
                "fit it first with the same callback, or pass ckpt_path=."
            )
        assert self.ema is not None
        # DDP's strategy writes the weights before a test, which must not look like training.
        self.ema.weights.forget_mark()

    def _averages(self, model: nn.Module) -> bool:
        """Whether the average is one of these very weights."""
        own = () if self._ema is None else self._ema.model.parameters()
        return {*map(id, own)} == {*map(id, model.parameters())}


def _save(
    trainer: Trainer,
    ema: EMA,
    original: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> None:
    # The average comes first, so that every checkpoint that exists has its average.
    ema.save(_path_of(trainer.strategy.broadcast(filepath)))
    original(checkpoint, filepath, *args, **kwargs)


def _remove(
    trainer: Trainer,
    ema: EMA,
    original: Callable[..., None],
    filepath: str | os.PathLike[str],
) -> None:
    path, is_link = _path_of(filepath), os.path.islink(filepath)
    original(filepath)
    # The checkpoint that a link names is still there, and so must be its average.
    if trainer.is_global_zero and not is_link and os.path.isdir(path):
        trainer.strategy.checkpoint_io.remove_checkpoint(path)


def _placement(model: nn.Module) -> list[object]:
    return [(weight.device, weight.dtype) for weight in model.parameters()]


def _path_of(checkpoint: str | os.PathLike[str]) -> str:
    """Where the average of a checkpoint lies. A link leads to what it names."""
    if "://" in str(checkpoint):
        raise ValueError(
            f"{checkpoint} is no path of a file system: EMACallback writes averages beside "
            "checkpoints on one."
        )
    folder, name = os.path.split(os.path.realpath(checkpoint))
    return os.path.join(folder, "ema", name.removesuffix(".ckpt"))


def _is_of_a_finder(trainer: Trainer) -> bool:
    """Whether ckpt_path is the deleted file of a finder of learning rates or batch sizes.

    The finder restores the state before the first step, and leaves the path behind.
    """
    name: str = os.path.basename(trainer.ckpt_path)
    return not trainer.global_step and name.startswith((".lr_find_", ".scale_batch_size_"))
