"""transformers: `Trainer(..., callbacks=[EMACallback(decay=0.9999)])`, and nothing else.

[Note: reaching the trainer]  A callback has no event before an evaluation, and is never told who calls it. So at
`on_train_begin` it looks for the `Trainer` among its callers, and from then on stands in front of two of its methods:
`evaluation_loop`, which runs once as it is and once under the average, and `log`, which gains the average's values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ..ema import EMA

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    said = "dist_ema.integrations.transformers needs transformers: pip install 'dist-ema[transformers]'."
    raise ImportError(said) from error

__all__ = ["EMACallback"]


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """An average of the model that a `Trainer` trains: updated, evaluated, saved, resumed and rotated with it.

    decay: as for `EMA`. every, start: as for `EMA.attach`. live: evaluate the live weights too; without it an evaluation
    takes no longer than before, and metrics under their own names are the average's. options: further arguments of `EMA`.

    - Evaluation and prediction give both metrics: `eval_loss` of the live weights, `eval_ema_loss` of the average. What
      `predict` returns as predictions is the average's.
    - Every checkpoint folder holds the average under `ema/`; `save_total_limit` removes both, `resume_from_checkpoint`
      resumes both, and raises if the average is missing.
    - `load_best_model_at_end` with `metric_for_best_model="eval_ema_loss"` (any metric of the average) ends with the
      average of the best checkpoint in the model; with a metric of the live weights, with the live ones.

    `callback.ema` is the `EMA`, from the beginning of the training on: `callback.ema.export("out")` after it.
    """

    def __init__(
        self,
        decay: Any = 0.9999,
        *,
        every: int = 1,
        start: int = 0,
        live: bool = True,
        **options: Any,
    ) -> None:
        self._make = {"decay": decay, **options}
        self._attach: dict[str, Any] = {"every": every, "start": start}
        self._live = live
        self._trainer: Trainer | None = None
        self.ema: EMA | None = None

    # --- events ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, resumed = _caller()
        if state.is_hyper_param_search:
            raise ValueError(
                "EMACallback does not know the folders of a hyperparameter search: train one trial at a time."
            )
        if self.ema is not None:  # a second train(), or a smaller batch size
            self.ema.detach()
        self.ema = EMA(trainer.model_wrapped, **self._make)
        assert trainer.optimizer is not None
        self.ema.attach(trainer.optimizer, **self._attach)
        if resumed is not None:
            self.ema.load(_beside(resumed))
        if self._trainer is not trainer:
            self._trainer = trainer
            trainer.evaluation_loop = self._evaluation(trainer.evaluation_loop)  # type: ignore[method-assign]
            trainer.log = self._logging(trainer.log)  # type: ignore[method-assign]

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.ema is not None
        self.ema.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "ema"))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.ema is not None
        assert self._trainer is not None
        self.ema.detach()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.ema.load(_beside(state.best_model_checkpoint))
            if not self._live or "_ema_" in f"_{args.metric_for_best_model}":
                self.ema.copy_to(self._trainer.model_wrapped)

    # --- in front of the trainer's methods ---------------------------------------------------------------------

    def _evaluation(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluation_loop(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            assert self.ema is not None
            if not self._live:
                with self.ema.swap():
                    return original(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            live = original(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            with self.ema.swap():
                average = original(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
            return average._replace(metrics=live.metrics | average.metrics)

        return evaluation_loop

    def _logging(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            assert self.ema is not None
            if "loss" in logs:  # of training steps
                said = self.ema.metrics(distance=False)
                logs = logs | {
                    f"ema_{name}": said[name] for name in ("decay", "updates", "skipped")
                }
            original(logs, *args, **kwargs)

        return log


def _caller() -> tuple[Trainer, str | None]:
    """The trainer that called, and the checkpoint that it resumes from ([Note: reaching the trainer])."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (
            isinstance(frame.f_locals.get("self"), Trainer)
            and "resume_from_checkpoint" in frame.f_locals
        ):
            return frame.f_locals["self"], frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    raise RuntimeError(
        "EMACallback works inside transformers.Trainer.train(); for another loop use EMA itself."
    )


def _beside(checkpoint: str) -> Path:
    path = Path(checkpoint) / "ema"
    if not path.exists():
        raise ValueError(
            f"{checkpoint} holds no average (ema/): it was saved without EMACallback. Start a new training from its weights, "
            "and the average starts from them too."
        )
    return path
