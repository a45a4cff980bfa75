"""`recalibrate_all`: BatchNorm statistics over a whole loader, for `update_bn` and `bn_update`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from ..recipes import batchnorm
from ._module import Device

__all__ = ["recalibrate_all"]


def recalibrate_all(
    loader: Iterable[Any],
    model: nn.Module,
    device: Device = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Give every BatchNorm the statistics of all batches together, of all ranks. *Collective*.

    Args:
        loader: batches, or tuples and lists whose first element is the batch.
        model: without BatchNorm it is left alone.
        device: where batches go; None leaves them.
        group: whose ranks bring batches; None: those of the model's wrapper.
    """

    def forward(module: nn.Module, batch: Any) -> object:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        return module(inputs if device is None else inputs.to(device))

    tracked = (m.running_mean for m in model.modules() if isinstance(m, batchnorm.LAYERS))
    if any(mean is not None for mean in tracked):
        batchnorm.recalibrate(
            model, loader, sys.maxsize, forward=forward, progress=False, group=group
        )
