"""Lightning: `Trainer(callbacks=[EMACallback(decay=0.9999)])`, and nothing else.

[Note: where checkpoints go]  A callback is not told the path of a checkpoint, so this one stands in front of the
strategy's `save_checkpoint` and `remove_checkpoint`. The average of `DIR/NAME.ckpt` lies in `DIR/ema/NAME`: beside the file
itself it would be taken for one, because `ckpt_path="last"` looks at every name that begins with "last".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..ema import EMA

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    said = "dist_ema.integrations.lightning needs lightning: pip install 'dist-ema[lightning]'."
    raise ImportError(said) from error

__all__ = ["EMACallback"]


class EMACallback(Callback):  # type: ignore[misc]
    """An average of the module that Lightning trains: updated, validated, saved, removed and resumed with it.

    decay: as for `EMA`. every, start: as for `EMA.attach`. options: further arguments of `EMA`.

    - Validation, test and prediction run under the average, lent once and taken back whatever they raise.
    - A checkpoint's `state_dict` is the live model; its average lies beside it ([Note: where checkpoints go]) and is removed
      with it. Resuming from a checkpoint without one raises.
    - Loggers get decay, updates and skipped every `log_every_n_steps`.

    `callback.ema` is the `EMA`, from the beginning of the fit on: `callback.ema.export("out")` after it, on all ranks.
    """

    def __init__(
        self, decay: Any = 0.9999, *, every: int = 1, start: int = 0, **options: Any
    ) -> None:
        self._make = {"decay": decay, **options}
        self._attach: dict[str, Any] = {"every": every, "start": start}
        self._lent: AbstractContextManager[EMA] | None = None
        self._undo: list[Callable[[], None]] = []
        self._left: tuple[list[Any], dict[str, Any]] | None = (
            None  # where the fit's weights lay, and what it averaged
        )
        self._ema: EMA | None = None

    @property
    def ema(self) -> EMA | None:
        """The average, from the beginning of the fit on. *Collective* after it.

        NOTE: Lightning moves the module to the host behind a fit and back for a test, so it is built again where that lies.
        """
        if (
            self._ema is not None
            and self._left is not None
            and self._left[0] != _places(self._ema.model)
        ):
            self._ema = EMA(self._ema.model, **self._make)
            self._ema.load_state_dict(self._left[1])
            self._leave(self._ema)
        return self._ema

    @ema.setter
    def ema(self, ema: EMA | None) -> None:
        self._ema, self._left = ema, None

    def _leave(self, ema: EMA) -> None:
        self._left = _places(ema.model), ema.state_dict()

    # --- fitting -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """NOTE: a fit that was left by an exception is not torn down, and its average is not that of the next one."""
        self._let_go()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are wrapped and restored, the optimizers are there, and no step was taken."""
        if self._undo:
            return
        self.ema = EMA(_wrapped(trainer), **self._make)
        self.ema.attach(*trainer.optimizers, **self._attach)
        if trainer.ckpt_path is not None:
            self.ema.load(_beside(trainer.ckpt_path, must=True))
        strategy = trainer.strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint
        strategy.save_checkpoint = self._saving(trainer, save)  # type: ignore[method-assign]
        strategy.remove_checkpoint = self._removing(trainer, remove)  # type: ignore[method-assign]
        self._undo = [lambda: setattr(strategy, "save_checkpoint", save), self.ema.detach]
        self._undo.append(lambda: setattr(strategy, "remove_checkpoint", remove))

    on_sanity_check_start = on_train_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()
        if self._ema is not None and self._left is None and self._lent is None:
            self._leave(self._ema)

    def _let_go(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _saving(self, trainer: Trainer, original: Callable[..., None]) -> Callable[..., None]:
        def save_checkpoint(
            checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any
        ) -> None:
            assert self.ema is not None
            # NOTE: the average first, so that a checkpoint that is there has its average too.
            self.ema.save(_beside(trainer.strategy.broadcast(filepath)))
            original(checkpoint, filepath, *args, **kwargs)

        return save_checkpoint

    def _removing(self, trainer: Trainer, original: Callable[..., None]) -> Callable[..., None]:
        def remove_checkpoint(filepath: Any) -> None:
            where, link = _beside(filepath), os.path.islink(filepath)
            original(filepath)
            if (
                trainer.is_global_zero and not link and os.path.isdir(where)
            ):  # what a link names has its average still
                trainer.strategy.checkpoint_io.remove_checkpoint(where)

        return remove_checkpoint

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.ema is not None and not self._undo:
            warnings.warn(
                "trainer.save_checkpoint() after the fit writes no average, and a fit cannot resume from it. Let "
                "ModelCheckpoint(save_last=True) write it, or use callback.ema.save().",
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert self.ema is not None
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            said = self.ema.metrics(distance=False)
            for logger in trainer.loggers:
                values = {f"ema/{name}": said[name] for name in ("decay", "updates", "skipped")}
                logger.log_metrics(values, step=trainer.global_step)

    # --- under the average -------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._undo:  # not inside a fit
            self._find(trainer)
        assert self.ema is not None
        self._lent = self.ema.swap()
        self._lent.__enter__()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._take_back(exception)

    def _take_back(self, error: BaseException | None = None) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.__exit__(type(error) if error is not None else None, error, None)

    def _find(self, trainer: Trainer) -> None:
        """The average for `validate`, `test` or `predict`: of the checkpoint that they were given, else of the last fit."""
        model = _wrapped(trainer)
        if trainer.ckpt_path is not None:
            self.ema = EMA(model, **self._make)
            self.ema.load(_beside(trainer.ckpt_path, must=True))
        elif self.ema is None or {*map(id, self.ema.model.parameters())} != {
            *map(id, model.parameters())
        }:
            raise RuntimeError(
                f"EMACallback has no average of this {type(trainer.lightning_module).__name__}: fit it first with the same "
                "callback, or pass ckpt_path=."
            )
        self.ema.weights.forget_mark()  # DDP's strategy broadcasts the weights that are there before it tests


def _places(model: nn.Module) -> list[Any]:
    return [(weight.device, weight.dtype) for weight in model.parameters()]


def _wrapped(trainer: Trainer) -> nn.Module:
    model = trainer.strategy.model
    assert isinstance(model, nn.Module)
    return model


def _beside(checkpoint: Any, must: bool = False) -> str:
    """Where the average of a checkpoint lies ([Note: where checkpoints go]). A link leads to what it names."""
    if "://" in str(checkpoint):
        raise ValueError(
            f"{checkpoint} is no path of a file system: EMACallback writes averages beside checkpoints on one."
        )
    folder, name = os.path.split(os.path.realpath(checkpoint))
    where = os.path.join(folder, "ema", name.removesuffix(".ckpt"))
    if must and not os.path.exists(where):
        raise ValueError(
            f"{checkpoint} has no average ({where}): it was saved without EMACallback. Load its weights and start a new fit, "
            "and the average starts from them."
        )
    return where
