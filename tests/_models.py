"""Small models for tests, awkward on purpose, and their seeded data."""

from __future__ import annotations

import torch
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


class Core(nn.Module):
    """Awkward on purpose.

    Dimension 0 is 7, 5, 3 and 1: not divisible by the world, or smaller than it. There are tied
    weights, a frozen layer, a layer without gradient, an integer and a floating buffer.
    """

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
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
        if self.training:
            self.seen += 1
        return self.head(x)


class Net(nn.Module):
    """The core, and a scalar outside every FSDP group, which would refuse it.

    scalar: False gives it one dimension, for DeepSpeed, which takes no scalars.
    """

    def __init__(self, hidden: int = 5, scalar: bool = True) -> None:
        super().__init__()
        self.core = Core(hidden)
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
