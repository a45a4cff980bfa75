"""accelerate: the average goes into every `save_state` and comes back with `load_state`.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = EMA(model, decay=0.9999)  # after prepare, which replaces the parameters under FSDP2
    ema.attach(optimizer)  # sees real steps only: no accumulation, no skipped fp16 steps
    register(accelerator, ema)

[Note: state hooks]  `register_for_checkpointing` takes any object with `state_dict()`. It writes on
the main process only and loads that file on every rank. So a sharded average would lose every other
shard without an error. State hooks run on every rank. While loading they run after FSDP's own
optimizer state, which takes a step of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import nn

from ..ema import EMA
from . import existing

if TYPE_CHECKING:
    from accelerate.accelerator import Accelerator

__all__ = ["Registration", "register"]


class Registration:
    """The handle that `register` returns."""

    def __init__(self, accelerator: Accelerator, ema: EMA, folder: str) -> None:
        self._accelerator, self._ema, self.folder = accelerator, ema, os.path.normpath(folder)
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Take the hooks off again. Idempotent."""
        while self._handles:
            self._handles.pop().remove()

    def log(self, step: int | None = None, prefix: str = "ema/") -> None:
        """Send `ema.metrics()` to the trackers of the accelerator. *Collective*.

        Args:
            step: The step that trackers show.
            prefix: What the names of the metrics begin with.
        """
        self._accelerator.log(
            {prefix + name: value for name, value in self._ema.metrics().items()}, step=step
        )

    def _save(self, models: list[nn.Module], weights: list[object], folder: str) -> None:
        _refuse_registered(self._accelerator, self._ema)
        self._ema.save(os.path.join(folder, self.folder))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        path = os.path.join(folder, self.folder)
        self._ema.load(
            existing(
                path,
                folder,
                writer="register(accelerator, ema)",
                cure="Load its weights before register()",
            )
        )


def register(accelerator: Accelerator, ema: EMA, folder: str = "ema") -> Registration:
    """Save the average inside every state folder, and load it from there.

    Args:
        accelerator: whose `save_state` and `load_state` are meant.
        ema: an EMA of a model that `accelerator.prepare` returned.
        folder: the name of the average's folder inside a state folder.

    Raises:
        ValueError: `ema` averages no prepared model, `folder` does not lie inside a state folder or
            another average goes there, or `ema` was given to `register_for_checkpointing`
            ([Note: state hooks]). If that happens later, `save_state` raises.

    Note:
        *Collective* on use.
    """
    _refuse_registered(accelerator, ema)
    inside = os.path.normpath(folder)
    # Elsewhere all states would share one average, the last; and "." holds the model itself.
    if os.path.isabs(inside) or inside.split(os.sep)[0] in (os.curdir, os.pardir):
        raise ValueError(
            f"folder must be the name of a folder inside each state folder, got {folder!r}."
        )
    # accelerate has no public list of its hooks.
    for hook in accelerator._save_model_state_pre_hook.values():
        owner = getattr(hook, "__self__", None)
        if not isinstance(owner, Registration):
            continue
        if os.path.commonpath([owner.folder, inside]) in (owner.folder, inside):
            raise ValueError(
                f"the folder {folder!r} is taken by an average that was registered before, and one "
                "would overwrite the other: remove() that registration first, or pass another "
                "folder=."
            )
    # By identity: FSDP2 puts other parameters into the prepared model.
    prepared = {id(parameter) for model in accelerator._models for parameter in model.parameters()}
    if prepared.isdisjoint(id(parameter) for parameter in ema.model.parameters()):
        raise ValueError(
            "the EMA averages none of the models that accelerator.prepare() returned. Build it "
            "after prepare(), on what prepare() gave back."
        )
    return Registration(accelerator, ema, folder)


def _refuse_registered(accelerator: Accelerator, ema: EMA) -> None:
    if any(registered is ema for registered in accelerator._custom_objects):
        raise ValueError(
            "accelerator.register_for_checkpointing(ema) writes the main process's shard only and "
            "loads it on every rank: the rest of the average would be lost. Use "
            "dist_ema.integrations.accelerate.register(accelerator, ema) alone."
        )
