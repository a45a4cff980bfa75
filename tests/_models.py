"""Small models for tests, awkward on purpose, and their seeded data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Block(nn.Module):
    """up: [hidden, width], down: [width, hidden], with a norm that tensor parallel replicates."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class GroupedExperts(nn.Module):
    """up: [experts, width, hidden], down: [experts, hidden, width]. They may be DTensors."""

    def __init__(self, width: int, hidden: int, number: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(number, width, hidden) / width)
        self.down = nn.Parameter(torch.randn(number, hidden, width) / hidden)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        up, down = (getattr(w, "to_local", lambda w=w: w)() for w in (self.up, self.down))
        hidden = torch.tanh(torch.einsum("...w,ewh->...eh", x, up))
        return torch.einsum("...eh,ehw,...e->...w", hidden, down, weights)


class Experts(nn.Module):
    """Every token visits every expert, weighted by a router.

    group: the ranks that divide the experts; each of them computes its own for the tokens of all.
    """

    group: Any = None

    def __init__(self, width: int, hidden: int, number: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, number)
        self.grouped = GroupedExperts(width, hidden, number)
        self.register_buffer("expert_bias", torch.zeros(number))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.router(x) + self.expert_bias, -1)
        if self.training:
            self.expert_bias += 0.1
        if self.group is None:
            return x + self.grouped(x, weights)
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        number = -(-len(self.expert_bias) // size)
        own = of_all(weights, rank, size, self.group).split(number, -1)[rank]
        mixed = self.grouped(of_all(x, rank, size, self.group), own)
        return x + Sum.apply(mixed, self.group)[rank]


class Sum(torch.autograd.Function):
    """The sum over a group, as its backward too."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        context.group, summed = group, x.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].clone()
        dist.all_reduce(summed, group=context.group)
        return summed, None


def of_all(x: Tensor, rank: int, size: int, group: Any) -> Tensor:
    """What each rank of the group holds, [size, *x.shape], by a sum with zeros."""
    own = torch.stack([x if i == rank else torch.zeros_like(x) for i in range(size)])
    summed: Tensor = Sum.apply(own, group)
    return summed


class Core(nn.Module):
    """Awkward on purpose.

    Dimension 0 is 7, 5, 3 and 1: not divisible by the world, or smaller than it. There are tied
    weights, a frozen layer, a layer without gradient, an integer and a floating buffer.
    """

    def __init__(self, hidden: int = 5, experts: int = 0) -> None:
        super().__init__()
        self.experts = Experts(6, 4, experts) if experts else None
        self.emb = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList([Block(6, hidden), Block(6, 4)])
        self.frozen = nn.Linear(6, 6)
        self.unused = nn.Linear(3, 3)
        self.gate = nn.Linear(6, 1)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        x = x * torch.sigmoid(self.gate(x)) + self.frozen(x)
        if self.experts is not None:
            x = self.experts(x)
        if self.training:
            self.seen += 1
        return self.head(x)


class Net(nn.Module):
    """The core, and a scalar outside every FSDP group, which would refuse it.

    scalar: False gives it one dimension, for DeepSpeed, which takes no scalars.
    """

    def __init__(self, hidden: int = 5, scalar: bool = True, experts: int = 0) -> None:
        super().__init__()
        self.core = Core(hidden, experts)
        self.scale = nn.Parameter(torch.tensor(0.7 if scalar else [0.7]))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.core(tokens) * self.scale


class Tied(nn.Module):
    """What offline tests save: a tied head, a BatchNorm, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.head = (
            nn.Embedding(7, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 7, bias=False),
        )
        self.head.weight = self.emb.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.emb(x)))


class Images(nn.Module):
    """Convolutions for channels_last, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.norm(self.a(x)))).mean((2, 3)))


def batch(step: int, rank: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """tokens and labels of one rank at one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, 7, (size, 4), generator=generator)
    return tokens, torch.randint(0, 7, (size, 4), generator=generator)


def image_batch(step: int, rank: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(
        0, 7, (size,), generator=generator
    )


def draw(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers [n], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(n, dtype=wide, generator=generator).to(dtype)
