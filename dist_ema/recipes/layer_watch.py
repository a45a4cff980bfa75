"""`LayerWatch`: hooks that note the `Moments` of what every BatchNorm sees, per channel.

[Note: no training mode]  No module is put into training mode. A hook in front of each layer writes
the batch's statistics into the layer, which then normalises as in evaluation. So dropout stays off,
momentum and counters are not touched, and SyncBatchNorm sends nothing. It would hang where ranks
have different numbers of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.ranks import Ranks

__all__ = ["LayerWatch", "Moments", "watched"]


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of what a layer saw, per channel."""

    count: float
    mean: Tensor  # [C], float64
    squares: Tensor  # [C], float64

    @staticmethod
    def none(like: Tensor) -> Moments:
        zeros = _wide(torch.zeros_like(like))
        return Moments(0.0, zeros, zeros)

    def add(self, count: float, mean: Tensor, squares: Tensor) -> None:
        """Add the moments of another set (Chan et al. 1983): exact for any sizes."""
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def over(self, ranks: Ranks) -> Moments:
        """The moments of all ranks' data, equal on all ranks. *Collective*: one reduction."""
        if ranks.size == 1:
            return self
        count = self.mean.new_tensor([self.count])
        local = torch.cat([count, self.mean, self.squares]).to(ranks.transfer_device())
        gathered = [torch.empty_like(local) for _ in range(ranks.size)]
        ranks.wait_for(dist.all_gather(gathered, local, group=ranks.group, async_op=True))
        total = Moments.none(self.mean)
        for of_rank in gathered:
            total.add(float(of_rank[0]), *of_rank[1:].to(self.mean.device).chunk(2))
        return total

    @property
    def variance(self) -> Tensor:
        return self.squares / (self.count - 1)

    def problem(self, module: Any) -> str:
        """Why the module must not take these statistics; '' if it may."""
        if self.count == 1:
            return "saw one value per channel: that has no variance. Give more data."
        if not (self.mean + self.squares).isfinite().all():
            return "saw NaN or infinity. No statistics were changed."
        dtype = module.running_var.dtype  # float16 ends at the variance of values of 256
        if not torch.cat([self.mean, self.variance]).to(dtype).isfinite().all():
            limit = str(dtype).removeprefix("torch.")
            return f"saw values whose statistics are beyond {limit}. None were changed."
        return ""


@dataclass
class LayerWatch:
    """The moments that the hooks of all layers collect."""

    moments: dict[str, Moments]
    counting: bool = True  # False while a rank without data repeats its last batch
    batches: int = 0  # that counted

    def before_layer(
        self, name: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note the batch's moments, and write them into the layer ([Note: no training mode])."""
        seen: Tensor = args[0] if args else kwargs["input"]
        x = _wide(seen.detach()).transpose(0, 1).flatten(1) if seen.dim() > 1 else _wide(seen)[None]
        count = x.shape[1]  # [C, everything else]
        if count == 0:
            return
        variance, mean = torch.var_mean(x, dim=1, correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
        if self.counting:
            self.moments[name].add(count, mean, variance * count)


def _wide(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # that one has no float64


@contextmanager
def watched(model: nn.Module, layers: Mapping[str, Any], watch: LayerWatch) -> Iterator[None]:
    """Evaluation mode, and a hook on every layer. Modes and statistics are restored at the end."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for name, layer in layers.items():
            for statistic in (layer.running_mean, layer.running_var):
                undo.callback(statistic.copy_, statistic.clone())
            hook = partial(watch.before_layer, name)
            undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model.eval()
        yield
