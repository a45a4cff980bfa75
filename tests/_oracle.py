"""A wrapped model that trains beside a plain one, and the float64 oracle of its average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ema.averaging.kernels import rounding
from tests._models import Net, batch
from tests._wrappers import wrap


class Training:
    """A wrapped model, and a plain twin in the same process that sees the batches of all ranks."""

    def __init__(
        self, kind: str, make: Callable[[], nn.Module] = Net, data: Callable[..., Any] = batch
    ) -> None:
        torch.manual_seed(0)
        self.twin = make()
        torch.manual_seed(0)
        self.model = wrap(kind, make())
        self.kind, self.data, self.step = kind, data, 0
        world, rank = dist.get_world_size(), dist.get_rank()
        # Ranks of one tensor parallel group see one batch. Without a wrapper there is one lane.
        self.lanes = {"fsdp2 tp": world // 2, "none": 1}.get(kind, world)
        self.lane = {"fsdp2 tp": rank // 2, "none": 0}.get(kind, rank)
        self.optimizer: Any = self.model  # a DeepSpeed engine is both
        if not kind.startswith("zero"):
            self.optimizer = torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad], lr=0.05, momentum=0.5
            )
        self.optimizers = [self.optimizer]
        self.twin_optimizer = torch.optim.SGD(
            [p for p in self.twin.parameters() if p.requires_grad], lr=0.05, momentum=0.5
        )

    def train(self, steps: int, after: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            self._one(self.model, self.optimizer, [self.lane])
            self._one(self.twin, self.twin_optimizer, range(self.lanes))
            self.step += 1
            after()

    def _one(self, model: nn.Module, optimizer: Any, lanes: Any) -> None:
        batches = [self.data(self.step, lane) for lane in lanes]
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        output = model(inputs)
        loss = F.cross_entropy(output.flatten(0, -2), labels.flatten())
        if isinstance(optimizer, nn.Module):
            model.backward(loss)  # type: ignore[operator]
            optimizer.step()
            return
        loss.backward()
        if model is self.model and self.kind not in ("none",):
            self._reduce_lone_gradients()
        optimizer.step()
        optimizer.zero_grad()

    def _reduce_lone_gradients(self) -> None:
        """The scalar outside FSDP's groups is the user's to reduce."""
        if "ddp" in self.kind:
            return
        for name, p in self.model.named_parameters():
            if name.endswith("scale") and p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def probe(self) -> Tensor:
        """What the wrapped model computes now, in eval mode. The forward pass warms its roots."""
        return self._probe(self.model)

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> Tensor:
        mode = model.training
        model.eval()
        output = model(self.data(10_000, 0)[0])
        model.train(mode)
        return output.float().clone()

    @torch.no_grad()
    def twin_with(self, weights: dict[str, Tensor]) -> Tensor:
        """What the plain twin computes with these weights."""
        kept = {name: p.clone() for name, p in self.twin.named_parameters()}
        for name, p in self.twin.named_parameters():
            p.copy_(weights.get(name, p))
        output = self._probe(self.twin)
        for name, p in self.twin.named_parameters():
            p.copy_(kept[name])
        return output


class Oracle:
    """Twenty lines of float64 over full weights in one process: what every average must equal."""

    def __init__(self, twin: nn.Module, schedule: Any) -> None:
        self._twin, self._schedule, self.now = twin, schedule, 0.0
        self.average = {name: p.detach().double().clone() for name, p in self._trained()}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self._twin.named_parameters() if p.requires_grad]

    def update(self, elapsed: float = 1.0) -> None:
        self.now += elapsed
        decay = self._schedule(self.now, elapsed)
        for name, p in self._trained():
            self.average[name] = decay * self.average[name] + (1 - decay) * p.detach().double()

    def error(self, weights: dict[str, Tensor]) -> float:
        """The largest difference to these full weights, relative to 1 or the weight."""
        return max(
            ((weights[name].double() - want).abs() / want.abs().clamp(min=1)).max().item()
            for name, want in self.average.items()
        )


def snapshot(model: nn.Module) -> list[Tensor]:
    """Bit copies of everything that the shards of `model` hold here, in its storage."""
    from dist_ema.sharding import discovery

    return [shard.read().clone() for shard in discovery.find_shards(model).shards]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Collectives:
    """Count the collectives of this process while the block runs."""

    NAMES = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "reduce_scatter_tensor",
        "send",
        "recv",
        "barrier",
    )

    def __enter__(self) -> Collectives:
        self.count, self._kept = 0, {}
        for name in self.NAMES:
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._kept[name]))
        return self

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return call(*args, **kwargs)

        return counted

    def __exit__(self, *_: Any) -> None:
        for name, call in self._kept.items():
            setattr(dist, name, call)


def noise(seed: int, update: int, name: str, indices: Tensor) -> Tensor:
    """The 16 bits by which an element of a shadow is rounded, as int32."""
    return rounding.draw_bits(rounding.noise_key(seed, update, name), indices, True)


def round_to_bfloat16(wide: Tensor, bits: Tensor) -> Tensor:
    """fp32 [n] rounded stochastically; bits: what `noise` returns."""
    return rounding.ROUND[torch.bfloat16](wide.clone(), bits)
