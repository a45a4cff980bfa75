"""accelerate: the average goes into every `save_state` and comes back with `load_state`.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMA(model, decay=0.9999)          # after prepare, which replaces the parameters under FSDP2
    ema.attach(optimizer)                   # real steps only: accumulation and skipped fp16 steps need nothing more
    register(accelerator, ema)

[Note: state hooks]  `register_for_checkpointing` would take any object with `state_dict()`, but it writes on the main process
and loads that one file on every rank: a sharded average would lose every other shard without an error. The state hooks
run on every rank, and on loading after FSDP's own optimizer state, which takes a step of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..ema import EMA

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator

__all__ = ["Registration", "register"]


class Registration:
    """What `register` returns."""

    def __init__(self, accelerator: Accelerator, ema: EMA, folder: str) -> None:
        self._accelerator, self._ema, self._folder = accelerator, ema, folder
        self._handles: list[Any] = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def writes(self, folder: str) -> bool:
        """Whether this is the folder that the average goes to."""
        return os.path.normpath(folder) == os.path.normpath(self._folder)

    def remove(self) -> None:
        """Take the hooks off again. Twice is once."""
        while self._handles:
            self._handles.pop().remove()

    def log(self, step: int | None = None, prefix: str = "ema/") -> None:
        """`ema.metrics()` to the trackers of the accelerator. *Collective*: call it on every rank."""
        values = self._ema.metrics()
        self._accelerator.log({prefix + name: value for name, value in values.items()}, step=step)

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        _refuse_registered(self._accelerator, self._ema)
        self._ema.save(os.path.join(folder, self._folder))

    def _load(self, models: list[Any], folder: str) -> None:
        where = os.path.join(folder, self._folder)
        if not os.path.exists(where):
            raise ValueError(
                f"{folder} holds no average: it was saved without register(accelerator, ema). Load such a state before "
                "register(), and the average starts from its weights."
            )
        self._ema.load(where)


def register(accelerator: Accelerator, ema: EMA, folder: str = "ema") -> Registration:
    """Save the average inside every state folder, under `folder`, and load it from there. *Collective* on use.

    Raises ValueError if `ema` averages none of the models that `accelerator.prepare` returned, if `folder` is taken by an
    average registered before, or if it was given to `register_for_checkpointing` ([Note: state hooks]); if that happens
    later, `save_state` raises.
    """
    _refuse_registered(accelerator, ema)
    owners = [
        getattr(hook, "__self__", None) for hook in accelerator._save_model_state_pre_hook.values()
    ]
    if any(isinstance(each, Registration) and each.writes(folder) for each in owners):
        raise ValueError(
            f"the folder {folder!r} is taken by an average that was registered before, and one would overwrite the other: "
            "remove() that registration first, or pass another folder=."
        )
    prepared = {id(parameter) for model in accelerator._models for parameter in model.parameters()}
    if prepared.isdisjoint(id(parameter) for parameter in ema.model.parameters()):
        raise ValueError(
            "the EMA averages none of the models that accelerator.prepare() returned. Build it after prepare(), on what "
            "prepare() gave back."
        )
    return Registration(accelerator, ema, folder)


def _refuse_registered(accelerator: Accelerator, ema: EMA) -> None:
    if any(each is ema for each in accelerator._custom_objects):
        raise ValueError(
            "accelerator.register_for_checkpointing(ema) writes the main process's shard only and loads it on every rank: "
            "the rest of the average would be lost. Use dist_ema.integrations.accelerate.register(accelerator, ema) alone."
        )
