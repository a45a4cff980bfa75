"""transformers: `Trainer(..., callbacks=[EMACallback(decay=0.9999)])`, and nothing else.

[Note: reaching the trainer]  A callback has no event before an evaluation, and does not learn which
trainer calls it. So `on_train_begin` looks for the `Trainer` among its callers. From then on the
callback wraps two of its methods. `evaluation_loop` runs once as it is and once under the average,
and `log` gains the values of the average.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..ema import EMA
from ..schedules import Schedule, schedule_list
from ..verbs.publisher import Publication
from . import existing, refuse_another

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
except ImportError as error:
    raise ImportError(
        "dist_ema.integrations.transformers needs transformers: "
        "pip install 'dist-ema[transformers]'."
    ) from error

__all__ = ["EMACallback"]


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """An average of the model that a `Trainer` trains.

    - Evaluation and prediction give both metrics: `eval_loss` of the live weights, `eval_ema_loss`
      of the average. The predictions that `predict` returns are the average's.
    - Every checkpoint folder holds the average under `ema/`. `save_total_limit` removes both,
      `resume_from_checkpoint` resumes both, and raises ValueError if the average is missing.
    - `load_best_model_at_end` with `metric_for_best_model="eval_ema_loss"` (any metric of the
      average) ends with the average of the best checkpoint in the model. With a metric of the live
      weights it ends with the live ones.

    Args:
        decay: as for `EMA`.
        every: as for `EMA.attach`.
        start: as for `EMA.attach`.
        live: evaluate the live weights too. Without it an evaluation takes no longer than before,
            and metrics under their own names are the average's.
        publish: the folder to publish to, or the arguments of `EMA.publish` as a dict. The last
            numbers that the trainer logged go into each version.
        options: further arguments of `EMA`.

    Attributes:
        ema: the `EMA`, from the beginning of the training on. After it: `callback.export(...)`.

    Raises:
        ValueError: `decay` is none that `EMA` takes.
    """

    def __init__(
        self,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        every: int = 1,
        start: int = 0,
        live: bool = True,
        publish: str | os.PathLike[str] | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(publish, (str, os.PathLike)):
            publish = {"folder": publish}
        self._publish = publish
        self._publication: Publication | None = None
        self._ema_options = {"decay": schedule_list(decay), **options}
        self._every, self._start, self._live = every, start, live
        self._trainer: Trainer | None = None
        self.ema: EMA | None = None

    # --- events ---------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer, resumed = _caller()
        if state.is_hyper_param_search:
            raise ValueError(
                "EMACallback does not know the folders of a hyperparameter search: train one trial "
                "at a time."
            )
        refuse_another(self, trainer.callback_handler.callbacks)
        if self.ema is not None:  # a second train(), or a smaller batch size
            self.ema.detach()
        assert trainer.optimizer is not None
        # The wrapped model: the shards of FSDP, not those of the model inside.
        self.ema = EMA(trainer.model_wrapped, **self._ema_options)
        steps = getattr(trainer, "deepspeed", None) or trainer.optimizer
        self.ema.attach(steps, every=self._every, start=self._start)
        if resumed is not None:
            self.ema.load(existing(f"{resumed}/ema", resumed))
        if self._publish is not None:
            self._publication = self.ema.publish(**self._publish)
        self._trainer = trainer
        if getattr(trainer.log, "func", None) != self._log:  # not wrapped by an earlier train()
            trainer.evaluation_loop = partial(self._evaluate, trainer, trainer.evaluation_loop)
            trainer.log = partial(self._log, trainer.log)

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.ema is not None
        self.ema.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "ema"))

    def on_train_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.ema is not None
        assert self._trainer is not None
        self.ema.detach()
        if self._publication is not None:
            self._publication.remove(stop=state.is_world_process_zero)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = state.best_model_checkpoint
            self.ema.load(existing(f"{best}/ema", best))
            # The trainer has loaded the live weights of the best checkpoint by now.
            if not self._live or "_ema_" in f"_{args.metric_for_best_model}":
                self.ema.copy_to(self._trainer.model_wrapped)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the average by the model's own `save_pretrained`. *Collective*.

        transformers holds some weights under other names than it writes (fused experts, models of
        vision and language). These files have the names that `from_pretrained` asks for, where
        `callback.ema.export` has those of the model in memory.

        Raises:
            RuntimeError: Before the training.

        Note:
            *Cost*: the model on the first rank's host, twice.
        """
        if self.ema is None or self._trainer is None:
            raise RuntimeError(
                "EMACallback.export() found no average: call it after trainer.train()."
            )
        dtypes = {
            name: state.shard.dtype
            for state in self.ema.weights.states
            for name in state.shard.names
        }
        weights = {name: value.to(dtypes[name]) for name, value in self.ema.gather().items()}
        if weights:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            model.save_pretrained(path, state_dict=weights)

    # --- [Note: reaching the trainer] -----------------------------------------------------------

    def _evaluate(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> Any:
        assert self.ema is not None
        if trainer is not self._trainer:
            raise RuntimeError(
                "EMACallback averages the model of the trainer that trained last, and this is "
                "another. Give each trainer a callback of its own."
            )
        if not self._live:
            with self.ema.swap():
                return original(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        live = original(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with self.ema.swap():
            average = original(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
        return average._replace(metrics=live.metrics | average.metrics)

    def _log(
        self, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        assert self.ema is not None
        if "loss" in logs:  # of training steps
            values = self.ema.metrics(distance=False)
            logs = logs | {f"ema_{key}": values[key] for key in ("decay", "updates", "skipped")}
        if self._publication is not None:
            # `compute_metrics` may return texts and lists too.
            self._publication.metrics |= {
                key: value
                for key, value in logs.items()
                if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
            }
        original(logs, *args, **kwargs)


def _caller() -> tuple[Trainer, str | None]:
    """The trainer that called, and the checkpoint that it resumes from."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        names = frame.f_locals
        # `train` and its inner loop have both.
        if isinstance(names.get("self"), Trainer) and "resume_from_checkpoint" in names:
            return names["self"], names["resume_from_checkpoint"]
    raise RuntimeError(
        "EMACallback works inside transformers.Trainer.train(); for another loop use EMA itself."
    )
